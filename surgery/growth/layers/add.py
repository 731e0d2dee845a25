"""Layers added to a model, as surgery on its files: identities, copies of their neighbours, or random ones.

In comes a checkpoint of any family whose layers are understood, out comes a deeper one: old layers keep their bytes
under their new numbers, the config says how many there are now and of which kind. A model that has no layers yet, as a
growth begins with, gets its first ones.

* identity: copies in which everything that writes into the residual stream is zero, so that each puts out what came
  in (block expansion, arXiv 2401.02415). That it does is proved by running such a layer.
* copy: copies of the layers below (depth up-scaling, arXiv 2312.15166).
* random: as transformers initialises a layer of the family (as arXiv 2507.07129 adds them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.safetensors_header import PYTORCH
from surgery.checkpoint.structure import model_structure
from surgery.engine.card import CardContent, write_card
from surgery.engine.edit_report import write_config_dtype
from surgery.engine.execution import execute
from surgery.engine.manifest import build_manifest, command_record, write_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, check_output, plan_files
from surgery.engine.preflight import check_space
from surgery.engine.result import ExecutionResult
from surgery.errors import listing, usage_error
from surgery.growth.layers.plan_layers import COMMAND, LayerInsertionPlan
from surgery.growth.layers.random_init import random_layers, temporary_folder, transformers_version
from surgery.growth.plan import Init, LayerPosition
from surgery.io.atomic import check_free, write_file
from surgery.reporting.report import Column, Table

MODEL, NEW = "model", "new layers"
CONFIG = "config.json"
_PAPERS: dict[Init, str] = {
    "identity": "identities: what they write is zero (block expansion, arXiv:2401.02415)",
    "copy": "copies of their neighbours (depth up-scaling, arXiv:2312.15166)",
    "random": "random, as transformers initialises them (arXiv:2507.07129)",
}


@dataclass(frozen=True)
class AddReport:
    """What was added to a model.

    new: the numbers of the new layers. origins: for each the old layer that it is of the kind of (and, but for random
    ones, a copy of); None in a model that had none. tensors: of the deeper model. edited: how many of them went
    through a kernel; the rest are byte for byte those of the model, or of a fresh one. parameters: of the new layers.
    """

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    init: Init
    new: tuple[int, ...]
    origins: tuple[int | None, ...]
    layers_before: int
    layers_after: int
    tensors: int
    edited: int
    parameters: tuple[int, ...]
    resumed_bytes: int = 0
    dry_run: bool = False

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps: independent of where and in how many goes the job ran."""
        return {
            "init": self.init,
            "new": list(self.new),
            "origins": list(self.origins),
            "layers_before": self.layers_before,
            "layers_after": self.layers_after,
            "tensors": self.tensors,
            "edited_tensors": self.edited,
            "new_parameters": sum(self.parameters),
        }

    def table(self) -> Table:
        """The new layers, one by one."""
        origins = ["–" if origin is None else str(origin) for origin in self.origins]
        return Table(
            "New layers",
            [Column("layer"), Column("like the old layer"), Column("begins as"), Column("parameters", "count")],
            [
                (str(number), origin, self.init, count)
                for number, origin, count in zip(self.new, origins, self.parameters, strict=True)
            ],
            note=f"{self.layers_before} layers before, {self.layers_after} now.",
        )


def add_layers(
    model: str,
    out: Path,
    *,
    layers: int = 1,
    at: LayerPosition = "top",
    init: Init = "identity",
    seed: int = 0,
    dtype: str | None = None,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> AddReport:
    """Writes `model` with `layers` more layers, in a row, to the folder `out`.

    New layers are like the `layers` layers below them, in their order: from the lowest again where there are fewer,
    and like those above at the bottom.

    Args:
        at: top, middle (before layer n // 2), or the number of the layer before which they stand.
        init: how they begin.
        seed: of random ones; each is drawn from (`seed`, its number).
        dtype: float32 and the like stores the float tensors so; None keeps each tensor's own.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: there is no such place; the family's config cannot describe the result; what a layer writes is
            not understood, or it is no identity without that; the model is quantised, and its values would have to be
            known; `out` exists; the disk is full.
    """
    if layers < 1:
        raise usage_error(f"got {layers}, expected 1 or more", where="--layers")
    if init not in get_args(Init):
        raise usage_error(f"got {init!r}, expected one of {', '.join(get_args(Init))}", where="--init")
    stored_as = dtype_name(dtype) if dtype else None
    base = open_checkpoint(model)
    check_output(out, {MODEL: base})
    if not dry_run:
        check_free(out, overwrite=options.overwrite)
    command = command_record(COMMAND, [model], layers=layers, at=at, init=init, seed=seed, dtype=dtype)
    deepening = LayerInsertionPlan(base, model_structure(base), layers, at, init, stored_as)
    deepening.check()
    with ExitStack() as stack:
        sources = {MODEL: base}
        if deepening.needs_fresh:
            folder = stack.enter_context(temporary_folder(None if dry_run else out))
            fresh = random_layers(
                deepening.kinds, folder, seed=seed, depth=deepening.after, stack=deepening.shape.stack
            )
            deepening.take(fresh)
            sources[NEW] = fresh.checkpoint
        planned = [*deepening.old_tensors(), *deepening.new_tensors()]
        side_files = {path.name: path for path in base.side_files}
        files = plan_files(planned, metadata=base.metadata or PYTORCH)
        plan = Plan(command, sources, files, side_files)
        check_space(deepening.preflight, plan, out, options.threads)
        deepening.preflight.errors.raise_if_any(COMMAND)
        report = AddReport(
            out,
            deepening.preflight.facts,
            deepening.preflight.warnings,
            init,
            deepening.new,
            deepening.origins,
            deepening.before,
            deepening.after,
            len(planned),
            len(plan.computed),
            tuple(deepening.parameters(planned, number) for number in deepening.new),
            dry_run=dry_run,
        )
        if dry_run:
            return report

        def finish(folder: Path, outcome: ExecutionResult) -> AddReport:
            done = replace(report, resumed_bytes=outcome.resumed_bytes)
            if deepening.config:
                write_config(folder, deepening.config)
            if stored_as:
                write_config_dtype(folder, stored_as)
            manifest = build_manifest(plan, outcome, kind="model", report=done.summary())
            if deepening.needs_fresh:
                manifest["versions"] |= transformers_version()
            write_manifest(folder, manifest)
            write_card(folder, manifest, sources, _card(done, base, stored_as))
            return done

        return execute(plan, out, options, finish=finish)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json into `folder`. Raises SurgeryError where it cannot be written."""
    write_file(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _card(report: AddReport, base: Checkpoint, stored_as: str | None) -> CardContent:
    one = len(report.new) == 1
    where = listing(map(str, report.new), 40)
    kept = "Every other tensor is byte for byte the model's, under its new number."
    if stored_as or base.adapter:
        also = f", and everything is stored as {stored_as}" if stored_as else ""
        kept = f"Nothing else was changed but the layers' numbers{also}."
    method = (
        f"{base.repo_id or base.ref} with {report.layers_after} layers instead of {report.layers_before}: "
        f"{'layer' if one else 'layers'} {where} {'is' if one else 'are'} new, and began as "
        f"{_PAPERS[report.init]}. {kept}"
    )
    return CardContent(
        "Model with layers added", method, ("depth-expansion", report.init), report.table().to_markdown()
    )
