"""Collect the result of an execution from the records of its segments: hashes of tensors, sums of measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint.dtypes import n_elements
from surgery.checkpoint.reader import SourceFiles, TensorReader, hash_tensor, segments
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.plan import Plan
from surgery.engine.storage.journal import SegmentRecord
from surgery.engine.work.computation import is_plain
from surgery.io.hashing import hash_parts


@dataclass(frozen=True)
class ExecutionResult:
    """What an execution wrote and read.

    hashes: output tensor → hash of its stored bytes.
    source_hashes: role → tensor → hash, of every source tensor that was read.
    sums: computed output tensor → its kernel's measures, and "squares" (Σ of the stored values squared) and
        "nonfinite" (how many stored values are NaN or infinite).
    """

    hashes: Mapping[str, str]
    source_hashes: Mapping[str, Mapping[str, str]]
    sums: Mapping[str, Mapping[str, float]]
    resumed_bytes: int = 0

    def total(self, measure: str) -> float:
        """Return the sum of one measure over all computed tensors."""
        return math.fsum(sums.get(measure, 0.0) for sums in self.sums.values())


def collect_result(
    plan: Plan, files: SourceFiles, records: Mapping[tuple[int, int], SegmentRecord], resumed: int
) -> ExecutionResult:
    """Return the result of a completed execution; `records` are by (tensor, segment), `resumed` is in bytes."""
    hashes: dict[str, str] = {}
    sums: dict[str, dict[str, float]] = {}
    known: dict[int, str] = {}  # id of a stored tensor → its hash
    for index, tensor in enumerate(plan.tensors):
        own = [records[index, part] for part, _ in enumerate(segments(n_elements(tensor.shape)))]
        hashes[tensor.name] = hash_parts(bytes.fromhex(record.digest) for record in own)
        if tensor.kernel is not None:
            names = ("squares", "nonfinite", *tensor.kernel.measures)
            columns = zip(*(record.sums for record in own), strict=True)
            # fsum: exact, so that the sums do not depend on the order of segments.
            totals = [math.fsum(column) for column in columns] or [0.0] * len(names)
            sums[tensor.name] = dict(zip(names, totals, strict=True))
        # Segments were hashed as they were read; their hashes together are the stored tensor's.
        for slot, source in enumerate(tensor.inputs):
            if is_plain(source) and all(len(record.inputs) > slot for record in own):
                parts = (bytes.fromhex(record.inputs[slot]) for record in own)
                known[id(source.tensor)] = hash_parts(parts)
    return ExecutionResult(hashes, _source_hashes(plan, files, known), sums, resumed)


def _source_hashes(plan: Plan, files: SourceFiles, known: dict[int, str]) -> dict[str, dict[str, str]]:
    """Return the hashes of all source tensors in the plan; those not hashed segment by segment are read again."""
    # By identity: a target and its base have tensors of the same names.
    used: dict[int, StoredTensor] = {}
    for tensor in plan.tensors:
        for source in tensor.inputs:
            used |= {id(part): part for stored in source.tensors for part in stored.parts}
    reader = TensorReader(files)
    for key, stored in used.items():
        if key not in known:
            known[key] = hash_tensor(reader, stored)
    by_role: dict[str, dict[str, str]] = {}
    for role, checkpoint in plan.sources.items():
        hashes = by_role[role] = {}
        for stored in checkpoint.tensors.values():
            hashes.update({part.name_in_file: known[id(part)] for part in stored.parts if id(part) in known})
    return by_role
