"""`merge`: a config's models merged on their weights, streamed to a folder like any other plan."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from merges.config.document_order import ordered
from merges.config.schema import MergeConfig
from merges.job import MergeJob, PlannedMerge
from merges.report import MergeReport
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.io.atomic import MANIFEST, check_free, partial_path
from surgery.runtime.collectives import map_over_ranks

STEPS = ".steps"  # OUT.steps/ holds the results of named documents until the last is done


def merge(
    configs: Sequence[MergeConfig],
    out: Path,
    *,
    line: Sequence[str],
    text: str = "",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> MergeReport:
    """Writes the merge that `configs` describe to the folder `out`.

    Args:
        configs: as `merges.config.parse` reads them; those with a name are merged first, and removed when the last is
        done. line: the words that type the command again, for manifest and model card; the same words for the same job.
        text: the config as it was written, for the model card. dry_run: stop after the checks; nothing is written. Of
        documents that need another's result only the models
            are looked at.

    Raises:
        SurgeryError: the models do not fit each other or the config; `out` exists; a source holds NaN or infinite
            values; the disk is full.
    """
    *before, last = ordered(configs)
    steps = out.with_name(out.name + STEPS)
    # A name may hold slashes and dots, and none of them may lead out of the folder.
    places = {str(config.name): steps / f"name={quote(str(config.name), safe='')}" for config in before}
    jobs = [MergeJob(config, places, line) for config in before]
    job = MergeJob(last, places, line, text)
    if not dry_run:
        check_free(out, overwrite=options.overwrite)
    if before or dry_run:  # a fault of the last document must not show after hours of work on the first
        plans = [one.check(folder, options) for one, folder in zip([*jobs, job], [*places.values(), out], strict=True)]
        if dry_run:
            return _dry_report(job, out, plans)
    done = {name: _step(one, places[name], options) for name, one in zip(places, jobs, strict=True)}
    report = job.run(out, options, steps=done)
    map_over_ranks([None], lambda _: _remove(steps, places))
    return report


def _dry_report(job: MergeJob, out: Path, plans: Sequence[PlannedMerge | None]) -> MergeReport:
    """What the checks found; of a document that uses others' results there is no plan yet."""
    *_, last = plans
    warnings = [warning for plan in plans if plan is not None for warning in plan.preflight.warnings]
    if last is not None:
        return replace(job.report(last, out), warnings=warnings, dry_run=True)
    note = "in full the documents that need no other's result; of the others, the models"
    return MergeReport(out, job.config.merge_method, {"checked": note}, warnings, 0, 0, dry_run=True)


def _step(job: MergeJob, folder: Path, options: ExecutionOptions) -> Mapping[str, Any]:
    """Merges a document that others need, unless an earlier run has done so; returns the manifest of the result."""
    planned = job.plan(folder, options)

    def is_missing(_: None) -> bool:
        if not (folder / MANIFEST).is_file():
            return True
        if read_manifest(folder)["report"]["fingerprint"] == planned.fingerprint:
            return False
        shutil.rmtree(folder)  # of another config, or of models that have changed since
        return True

    if map_over_ranks([None], is_missing)[0]:
        job.execute(planned, folder, options)
    return read_manifest(folder)


def _remove(steps: Path, places: Mapping[str, Path]) -> None:
    """Removes the results of named documents, and nothing else that may lie in their folder."""
    for folder in places.values():
        shutil.rmtree(folder)
        shutil.rmtree(partial_path(folder), ignore_errors=True)
    if places and not any(steps.iterdir()):
        steps.rmdir()
