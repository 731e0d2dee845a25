"""Undo edits of heads or experts: store the overwritten blocks beside the result, and restore them.

`OUT/undo/undo.safetensors` has, per edited tensor and under its name, the stored bytes of the edited heads' blocks in
ascending order of the heads: (out, k·d) of an output projection (out, n·d), (k·d, out) of a transposed (n·d, out), and
a whole bias. Experts that are stored as one tensor, (n, …), are stored as the heads of a transposed one, (k, …); a
tensor of a single expert as a whole. Its metadata has "model_surgery_undo", the format's version, and "edits", JSON:
tensor → {"heads", "n_heads", "transposed", "before", "after"}, the last two being hashes of the tensor's bytes. It is
in a folder of its own because loaders take every safetensors file beside the weights for a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from surgery.checkpoint.checkpoint import Checkpoint, read_file
from surgery.checkpoint.dtypes import DTYPES
from surgery.checkpoint.reader import (
    TORCH_DTYPES,
    SourceFiles,
    TensorInput,
    TensorReader,
    compute_dtype,
    digest,
    hash_tensor,
    octets,
    segments,
)
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.safetensors_header import build_header
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.edits.kernels import RESTORE_BLOCKS, flags_of, spread
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.edit_report import EditReport, build_edit_report, edit_table
from surgery.engine.kernel import TensorSlice
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.preflight import Preflight
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, listing, usage_error
from surgery.io.atomic import disk_error
from surgery.io.escaping import markdown_text
from surgery.io.hashing import hash_parts
from surgery.io.json_io import parse_json
from surgery.io.output_files import open_output
from surgery.io.safe_paths import find_file

UNDO = Path("undo") / "undo.safetensors"
VERSION = "1"
VERSION_KEY = "model_surgery_undo"
EDITS_KEY = "edits"
# Integers of each width: bytes are copied, never converted as values would be.
MAX_BLOCKS = 1 << 20  # in which a matrix is divided: heads, or experts
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# As long as a hash, so that the header keeps its length when the real ones take its place.
_NO_HASH = "0" * 32


@dataclass(frozen=True)
class UndoBlocks:
    """The part of a stored tensor that an edit overwrites: `heads`, ascending, of `n_heads` along the heads' axis.

    That axis is the last one, or the first where `transposed`. A tensor that is overwritten as a whole has one head.
    """

    tensor: StoredTensor
    heads: tuple[int, ...] = (0,)
    n_heads: int = 1
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the blocks in the undo file."""
        if self.n_heads == 1:  # a scalar has no axis to cut
            return self.tensor.shape
        axis = 0 if self.transposed else -1
        shape = list(self.tensor.shape)
        shape[axis] = shape[axis] // self.n_heads * len(self.heads)
        return tuple(shape)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of `RESTORE_BLOCKS`."""
        return {"heads": self.heads, "n_heads": self.n_heads, "transposed": self.transposed}


def write_undo(folder: Path, blocks: Sequence[UndoBlocks], result: ExecutionResult, *, role: str) -> None:
    """Write the undo file of an edit into its folder; one segment of one tensor is in memory at a time.

    Args:
        blocks: what the edit overwrote, of the source `role`. An adapter's update is stored as part of the weight,
            rounded as a copy of it would be.
        result: of the edit.

    Raises:
        SurgeryError: the source changed since it was edited, or the disk is full.
    """
    path = folder / UNDO
    before = dict.fromkeys((block.tensor.name for block in blocks), _NO_HASH)
    try:
        with SourceFiles(file for block in blocks for file in block.tensor.files) as files, _create(folder) as out:
            # The hashes in the header are known when all is written; their length is fixed, so the header's is too.
            out.write(_header(blocks, before, result))
            reader = TensorReader(files)
            for block in blocks:
                digests = []
                for begin, end in segments(block.tensor.n_elements):
                    words = _stored(reader, block.tensor, begin, end)
                    digests.append(digest(words))
                    place = TensorSlice(block.tensor.name, begin, block.tensor.shape)
                    flags = flags_of(block.heads, block.n_heads)
                    out.write(octets(words[spread(flags, place, end - begin, transposed=block.transposed)]))
                before[block.tensor.name] = hash_parts(digests)
            out.seek(0)
            out.write(_header(blocks, before, result))
    except OSError as error:
        raise disk_error(error, path) from error
    for block in blocks:
        # With an adapter's update the blocks are those of W + ΔW, of which no source has the hash.
        name = block.tensor.name
        if block.tensor.derivation is None and before[name] != result.source_hashes[role][name]:
            raise SurgeryError(
                f'"{name}" changed while it was being edited',
                where=block.tensor.file,
                hint="Run the command again when nothing writes to it.",
            )


def undo(model: str, out: Path, *, dry_run: bool = False, options: ExecutionOptions = ExecutionOptions()) -> EditReport:
    """Write the model that `model` was before an edit of heads or experts to the folder `out`, bit for bit.

    Where the edit read a model without an adapter the weight files have the same bytes as before; an adapter's update
    stays in the weights.

    Example:
        surgery.undo("OUT", Path("BACK"))

    Args:
        model: a folder that an edit wrote.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: `model` has no undo file, or one that belongs to other weights; `out` exists; the disk is full.
    """
    edited = open_checkpoint(model)
    path = _undo_file(edited)
    edits = _read_edits(path)
    undo_tensors = read_file(path)
    # The undo file is inside `model`, so it needs no check of its own.
    check_destination(out, {"model": edited}, options, dry_run=dry_run)
    blocks = {name: _blocks(name, fields, edited, undo_tensors) for name, fields in edits.items()}
    # Reads every edited tensor: restoring blocks of other weights would give a model that never existed.
    _check_edited(edited, blocks, edits, path)
    sources = {name: _at_their_place(blocks[name], undo_tensors.tensors[name]) for name in blocks}
    # The very objects that the kernels get as inputs: hashes of sources are collected by identity.
    restored = replace(undo_tensors, tensors={name: source.tensor for name, source in sources.items()})
    planned = [
        PlannedTensor(name, t.dtype, t.shape, (TensorInput(t), sources[name]), RESTORE_BLOCKS, blocks[name].params)
        if name in blocks
        else copy_tensor(t)
        for name, t in edited.tensors.items()
    ]
    side_files = dict(edited.side_files)
    command = command_record("edit undo", [model])
    plan = Plan(command, {"model": edited, "undo": restored}, plan_files(planned, like=edited), side_files)
    preflight = Preflight()
    preview = EditReport(out, preflight.facts, preflight.warnings, len(blocks), len(planned), dry_run=dry_run)

    def validate(folder: Path, result: ExecutionResult) -> None:
        # The hashes from before the edit prove the result, whatever happened to the undo file since.
        damaged = [name for name in blocks if result.hashes[name] != edits[name]["before"]]
        if damaged:
            raise SurgeryError(
                f"does not give back what was edited, it is damaged: {listing(damaged, 3)}",
                where=path,
                hint="Fetch the folder again.",
            )

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[EditReport]:
        report = build_edit_report(preview, edited, sorted(blocks), result)
        return OutputDescription(report, report.summary(), _card(report, edited))

    return write_checkpoint(
        plan,
        out,
        options,
        describe=describe,
        preflight=preflight,
        dry_run_report=preview if dry_run else None,
        validate=validate,
    )


def _create(folder: Path) -> BinaryIO:
    return os.fdopen(open_output(folder, UNDO.as_posix(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")


def _card(report: EditReport, edited: Checkpoint) -> CardContent:
    method = (
        f"The edit of {markdown_text(edited.repo_id or edited.ref)} is undone: {report.edited} of {report.tensors} "
        "tensors have the bytes again that they had before it."
    )
    return CardContent("Model with an edit undone", method, ("undo",), edit_table(report).to_markdown())


def _header(blocks: Sequence[UndoBlocks], before: Mapping[str, str], result: ExecutionResult) -> bytes:
    edits = {
        block.tensor.name: {
            **block.params,
            "before": before[block.tensor.name],
            "after": result.hashes[block.tensor.name],
        }
        for block in blocks
    }
    metadata = {"format": "pt", VERSION_KEY: VERSION, EDITS_KEY: json.dumps(edits, separators=(",", ":"))}
    return build_header(((block.tensor.name, block.tensor.dtype, block.shape) for block in blocks), metadata).raw


def _stored(reader: TensorReader, tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Return elements [begin, end) as a copy of `tensor` would store them, as integers of the same width."""
    if tensor.derivation is None:
        stored = reader.raw(tensor, begin, end, "undo")
    else:
        values = reader.values(TensorInput(tensor), begin, end, "undo").to(compute_dtype((tensor.dtype,)))
        stored = values.to(TORCH_DTYPES[tensor.dtype]).view(torch.uint8)
    return stored.view(_WORDS[DTYPES[tensor.dtype].bits // 8])


def _undo_file(edited: Checkpoint) -> Path:
    if edited.folder is None or edited.adapter is not None:
        raise usage_error(
            "is no folder that an edit wrote", where=edited.ref, hint="Give OUT of `surgery edit heads` or `experts`."
        )
    path = find_file(edited.folder, UNDO.as_posix())
    if path is None:
        raise usage_error(
            f"has no {UNDO}, so nothing can be undone",
            where=edited.ref,
            hint="Give OUT of `surgery edit heads` or `experts`; of a model on the Hub, a local copy of the whole "
            "repository.",
        )
    return path


def _read_edits(path: Path) -> dict[str, dict[str, Any]]:
    metadata = read_file(path).metadata
    version = metadata.get(VERSION_KEY)
    if version != VERSION:
        raise SurgeryError(
            f"is an undo file of version {version}, this version reads {VERSION}" if version else "is no undo file",
            where=path,
            hint="Use the version of model-surgery that wrote it." if version else None,
        )
    try:
        edits = parse_json(metadata[EDITS_KEY].encode(), where=path)
        checked = {name: _checked(fields) for name, fields in edits.items()}
        if not checked:
            raise ValueError(edits)
        return checked
    except (SurgeryError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SurgeryError(f'has no readable "{EDITS_KEY}"', where=path, hint="Fetch the file again.") from error


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of one edit. Raises KeyError, TypeError or ValueError where they break the format."""
    heads, n_heads, transposed = tuple(fields["heads"]), fields["n_heads"], fields["transposed"]
    # `type … is`, since isinstance would accept true and false as numbers.
    numbers = all(type(value) is int for value in (*heads, n_heads)) and type(transposed) is bool
    ordered = list(heads) == sorted(set(heads))
    if not (numbers and heads and ordered and all(0 <= head < n_heads <= MAX_BLOCKS for head in heads)):
        raise ValueError(heads)
    return {
        "heads": heads,
        "n_heads": n_heads,
        "transposed": transposed,
        "before": str(fields["before"]),
        "after": str(fields["after"]),
    }


def _blocks(name: str, fields: Mapping[str, Any], edited: Checkpoint, undo_tensors: Checkpoint) -> UndoBlocks:
    tensor, stored = edited.tensors.get(name), undo_tensors.tensors.get(name)
    blocks = None
    if tensor is not None and stored is not None and (tensor.shape or fields["n_heads"] == 1):
        blocks = UndoBlocks(tensor, fields["heads"], fields["n_heads"], fields["transposed"])
        axis = tensor.shape[0 if blocks.transposed else -1] if tensor.shape else 1
        fits = axis % blocks.n_heads == 0 and (blocks.shape, tensor.dtype) == (stored.shape, stored.dtype)
        blocks = blocks if fits else None
    if blocks is None:
        raise _foreign(undo_tensors.shards[0].path, [name])
    return blocks


def _check_edited(
    edited: Checkpoint, blocks: Mapping[str, UndoBlocks], edits: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Raise SurgeryError where the edited tensors are not those that the undo file was written for."""
    with SourceFiles(edited.files) as files:
        reader = TensorReader(files)
        foreign = [name for name, block in blocks.items() if hash_tensor(reader, block.tensor) != edits[name]["after"]]
    if foreign:
        raise _foreign(path, foreign)


def _foreign(path: Path, names: Sequence[str]) -> SurgeryError:
    return SurgeryError(
        f"belongs to other weights: {listing(names, 3)} is not what the edit wrote",
        where=path,
        hint="Undo works on the folder as `surgery edit` wrote it.",
    )


def _at_their_place(blocks: UndoBlocks, stored: StoredTensor) -> TensorInput:
    """Return a tensor's blocks of the undo file, each at its place and zeros elsewhere; rows have a head's width."""
    tensor, n, heads = blocks.tensor, blocks.n_heads, list(blocks.heads)
    if n == 1:
        return TensorInput(stored)
    if blocks.transposed:
        inside = np.repeat(flags_of(heads, n).numpy(), tensor.shape[0] // n)
        view = stored
    else:
        # Blocks of columns: seen as (rows · blocks, d), each block of a row is a row of its own to map.
        rows, width = tensor.n_elements // tensor.shape[-1], tensor.shape[-1] // n
        inside = np.tile(flags_of(heads, n).numpy(), rows)
        view = replace(stored, shape=(rows * len(heads), width))
    return TensorInput(view, np.where(inside, np.cumsum(inside) - 1, -1).astype(np.int64))
