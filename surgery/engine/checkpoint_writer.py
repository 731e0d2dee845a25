"""Write a planned checkpoint: the last checks, dry run, weights, manifest and model card.

Every command that writes a checkpoint ends here, so that all outputs are checked, described and committed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.engine.card import CardContent, write_card
from surgery.engine.execution import execute
from surgery.engine.manifest import build_manifest, write_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, check_output
from surgery.engine.preflight import Preflight, check_space
from surgery.engine.result import ExecutionResult
from surgery.io.atomic import MANIFEST
from surgery.io.output_folder import LATER_FILES, check_free

R = TypeVar("R")


@dataclass(frozen=True)
class OutputDescription(Generic[R]):
    """A command's description of the checkpoint that it wrote.

    report: what the command returns.
    summary: the manifest's "report", JSON-able.
    card: the model card's content.
    kind: the manifest's "kind".
    versions: of packages beyond the usual ones that decided the bytes.
    fields: further top-level entries of the manifest, which replace those of the same name.
    """

    report: R
    summary: Mapping[str, Any]
    card: CardContent
    kind: str = "model"
    versions: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def check_destination(
    out: Path, sources: Mapping[str, Checkpoint], options: ExecutionOptions, *, dry_run: bool
) -> None:
    """Raise SurgeryError where `out` is inside one of `sources` or, unless `dry_run`, exists and may not be replaced.

    Cheap: call it as soon as the sources are open, before anything that takes time.
    """
    check_output(out, sources)
    if not dry_run:
        check_free(out, overwrite=options.overwrite)


def write_checkpoint(
    plan: Plan,
    out: Path,
    options: ExecutionOptions,
    *,
    describe: Callable[[Path, ExecutionResult], OutputDescription[R]],
    preflight: Preflight | None = None,
    dry_run_report: R | None = None,
    validate: Callable[[Path, ExecutionResult], None] | None = None,
    writes: Iterable[str] = (),
) -> R:
    """Check `plan` against the disk, write it to the folder `out` with manifest and model card, return the report.

    Example:
        def describe(folder: Path, result: ExecutionResult) -> OutputDescription[EditReport]:
            report = edit_report(preview, base, edited, result)
            return OutputDescription(report, report.summary(), CardContent("Edited model", method))

        check_destination(out, sources, options, dry_run=dry_run)
        plan = Plan(command, sources, files, side_files)
        preview = EditReport(out, preflight.facts, preflight.warnings, ...)
        return write_checkpoint(
            plan, out, options, describe=describe, preflight=preflight, dry_run_report=preview if dry_run else None
        )

    Args:
        describe: called on rank 0 with the staging folder once all weights are in it; may write further files there.
        preflight: the errors found so far, raised together with those of the disk; its facts get the disk's. None
            where the caller has checked everything, `check_space` among it.
        dry_run_report: returned after the checks, and nothing is written; None writes.
        validate: see `execute`.
        writes: paths inside OUT of what `describe` writes, other than over side files that it changes; needed where a
            source names files beside them.

    Raises:
        SurgeryError: `preflight` has errors; a source's file has the name of one of ours; as `execute`.
    """
    plan.check_names((MANIFEST, *LATER_FILES, *writes))
    if preflight is not None:
        check_space(preflight, plan, out, options.threads)
        preflight.errors.raise_if_any(str(plan.command["name"]))
    if dry_run_report is not None:
        return dry_run_report

    def finish(folder: Path, result: ExecutionResult) -> R:
        description = describe(folder, result)
        manifest = build_manifest(plan, result, kind=description.kind, report=description.summary)
        manifest["versions"] |= description.versions
        manifest |= description.fields
        write_manifest(folder, manifest)
        write_card(folder, manifest, plan.sources, description.card)
        return description.report

    return execute(plan, out, options, finish=finish, validate=validate)
