"""Add layers to a checkpoint by editing its files: identity layers, copies of their neighbours, or random ones.

Works for every family whose layers are recognised. Old layers keep their bytes under their new numbers, and the config
is updated in number and kind of layers. A model without layers, such as a growth starts from, gets its first ones.

* identity: copies in which everything that writes into the residual stream is zero, so that the output of each is its
  input (block expansion, arXiv 2401.02415). This is proved by running such a layer.
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
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.edit_report import write_config_dtype
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, plan_files
from surgery.engine.result import ExecutionResult
from surgery.errors import listing, usage_error
from surgery.growth.choices import LayerInit, LayerPosition
from surgery.growth.layers.plan_layers import COMMAND, LayerInsertionPlan
from surgery.growth.layers.random_init import temporary_folder, transformers_version
from surgery.io.atomic import write_file
from surgery.io.escaping import json_text, markdown_text
from surgery.reporting.report import Column, Table

MODEL, NEW = "model", "new layers"
CONFIG = "config.json"
# Sentences of the model card.
_PAPERS: dict[LayerInit, str] = {
    "identity": "identities: what they write is zero (block expansion, arXiv:2401.02415)",
    "copy": "copies of their neighbours (depth up-scaling, arXiv:2312.15166)",
    "random": "random, as transformers initialises them (arXiv:2507.07129)",
}


@dataclass(frozen=True)
class AddReport:
    """The result of `add_layers`.

    new: indices of the new layers. origins: for each the old layer whose kind it has (and, unless it is random, whose
    copy it is); None in a model that had none. tensors: of the deeper model. edited: how many of them went through a
    kernel; the rest are byte for byte those of the model, or of the random layers. parameters: of each new layer.
    """

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    init: LayerInit
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
        """Return the manifest's report, which does not depend on where the job ran or whether it was resumed."""
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
        """Return a table with one row per new layer."""
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
    init: LayerInit = "identity",
    seed: int = 0,
    dtype: str | None = None,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> AddReport:
    """Write `model` with `layers` consecutive layers added to the folder `out`.

    New layers are modelled on the `layers` layers below them, in their order; if there are fewer, these are repeated
    from the lowest on. At the bottom, the layers above are taken.

    Example:
        surgery.add_layers("lab:sft", Path("deeper"), layers=2, init="identity")

    Args:
        at: top, middle (before layer n // 2), or the number of the layer before which they are inserted.
        init: how their weights are initialised.
        seed: of random layers; each is drawn from (`seed`, its number).
        dtype: stores float tensors as float32 and the like; None keeps each tensor's own dtype.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: there is no such place; the family's config cannot describe the result; what a layer writes is
            not recognised, or zeroing it makes no identity; values of a quantised model are needed; `out` exists.
    """
    _check_arguments(layers, init)
    stored_as = dtype_name(dtype) if dtype else None
    base = open_checkpoint(model)
    check_destination(out, {MODEL: base}, options, dry_run=dry_run)
    command = command_record(COMMAND, [model], layers=layers, at=at, init=init, seed=seed, dtype=dtype)
    insertion = LayerInsertionPlan(base, model_structure(base), layers, at, init, stored_as)
    insertion.check()
    with ExitStack() as stack:
        sources = {MODEL: base}
        if insertion.needs_random_layers:
            folder = stack.enter_context(temporary_folder(None if dry_run else out))
            sources[NEW] = insertion.create_random_layers(folder, seed)
        plan = _plan(insertion, command, sources)
        preview = _preview(insertion, plan, out, dry_run=dry_run)

        def describe(folder: Path, result: ExecutionResult) -> OutputDescription[AddReport]:
            report = replace(preview, resumed_bytes=result.resumed_bytes)
            if insertion.config:
                write_config(folder, insertion.config)
            if stored_as:
                write_config_dtype(folder, stored_as)
            versions = transformers_version() if insertion.needs_random_layers else {}
            return OutputDescription(report, report.summary(), _card(report, base, stored_as), versions=versions)

        return write_checkpoint(
            plan,
            out,
            options,
            describe=describe,
            preflight=insertion.preflight,
            dry_run_report=preview if dry_run else None,
        )


def _check_arguments(layers: int, init: str) -> None:
    if layers < 1:
        raise usage_error(f"got {layers}, expected 1 or more", where="--layers")
    if init not in get_args(LayerInit):
        raise usage_error(f"got {init!r}, expected one of {', '.join(get_args(LayerInit))}", where="--init")


def _plan(insertion: LayerInsertionPlan, command: Mapping[str, Any], sources: Mapping[str, Checkpoint]) -> Plan:
    base = insertion.base
    planned = [*insertion.old_tensors(), *insertion.new_tensors()]
    return Plan(command, sources, plan_files(planned, metadata=base.metadata or PYTORCH), base.side_files)


def _preview(insertion: LayerInsertionPlan, plan: Plan, out: Path, *, dry_run: bool) -> AddReport:
    """Return the report as far as it is known before anything is written."""
    planned = plan.tensors
    return AddReport(
        out,
        insertion.preflight.facts,
        insertion.preflight.warnings,
        insertion.init,
        insertion.new,
        insertion.origins,
        insertion.before,
        insertion.after,
        len(planned),
        len(plan.computed),
        tuple(insertion.parameters(planned, number) for number in insertion.new),
        dry_run=dry_run,
    )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json into `folder`. Raises SurgeryError where it cannot be written."""
    write_file(folder / CONFIG, json_text(json.dumps(config, indent=2, ensure_ascii=False)) + "\n")


def _card(report: AddReport, base: Checkpoint, stored_as: str | None) -> CardContent:
    one = len(report.new) == 1
    where = listing(map(str, report.new), 40)
    kept = "Every other tensor is byte for byte the model's, under its new number."
    # Then tensors pass through a kernel, and their bytes change.
    if stored_as or base.adapter:
        also = f", and everything is stored as {stored_as}" if stored_as else ""
        kept = f"Nothing else was changed but the layers' numbers{also}."
    method = (
        f"{markdown_text(base.repo_id or base.ref)} with {report.layers_after} layers instead of "
        f"{report.layers_before}: "
        f"{'layer' if one else 'layers'} {where} {'is' if one else 'are'} new, and began as "
        f"{_PAPERS[report.init]}. {kept}"
    )
    return CardContent(
        "Model with layers added", method, ("depth-expansion", report.init), report.table().to_markdown()
    )
