"""Merge the weights of models as a config describes, streamed to a folder like any other plan."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from merges.config.document_order import ordered
from merges.config.parse import parse_configs
from merges.config.schema import MergeConfig
from merges.job import MergeJob, PlannedMerge
from merges.methods import METHODS
from merges.report import MergeReport
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.unshared import SeenNames, UnsharedChoice
from surgery.errors import usage_error
from surgery.io.atomic import MANIFEST
from surgery.io.command_line import option_words
from surgery.io.output_folder import check_free, discard_output, output_lock
from surgery.io.yaml_models import read_text
from surgery.runtime.collectives import entered_on_main, on_main

STEPS = ".steps"  # OUT.steps/ holds the results of named documents until the last is done


def merge(
    configs: Path | Sequence[MergeConfig],
    out: Path,
    *,
    line: Sequence[str] = (),
    text: str = "",
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    dequantise: bool = False,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> MergeReport:
    """Write the merge that `configs` describe to the folder `out`.

    Example:
        merge(Path("config.yml"), Path("OUT"))

    Args:
        configs: a mergekit YAML file, or what `merges.config` reads; those with a name are merged first, and removed
            when the last is done.
        line: the words of the command line, for manifest and model card; the same words for the same job. By default
            those that merge the file.
        text: the config as it was written, for the model card.
        keep: globs over tensor names; of tensors that only some models have, those to keep as the base, or the first
            model that has them, has them.
        drop: globs over tensor names; tensors that OUT does not get.
        dequantise: see models in FP8 with scales, or in MXFP4, as bf16; so is then what is written.
        dry_run: stop after the checks; nothing is written. Of documents that need another's result only the models are
            checked.

    Raises:
        SurgeryError: the models do not fit each other or the config; `out` exists; a source holds NaN or infinite
            values; the disk is full.
    """
    if isinstance(configs, Path):
        words = option_words({"keep": keep, "drop": drop, "dequantise": dequantise or None})
        line = line or ["surgery", "merge", str(configs), *words, "-o", "OUT"]
        text = text or read_text(configs)
        configs = parse_configs(text, str(configs), methods={name: one.spec for name, one in METHODS.items()})
    if dequantise:
        configs = [config.model_copy(update={"dequantise": True}) for config in configs]
    *before, last = ordered(configs)
    steps = out.with_name(out.name + STEPS)
    # A name may hold slashes and dots, and none of them may lead out of the folder.
    folders = {str(config.name): steps / f"name={quote(str(config.name), safe='')}" for config in before}
    choice, seen = UnsharedChoice(tuple(keep), tuple(drop)), SeenNames()
    jobs = [MergeJob(config, folders, line, "", choice, seen, is_last=False) for config in before]
    job = MergeJob(last, folders, line, text, choice, seen)
    if not dry_run:
        _make_way(out, steps, folders, overwrite=options.overwrite)
    if before or dry_run:  # an error of the last document must not show after hours of work on the first
        plans = [one.check(folder, options) for one, folder in zip([*jobs, job], [*folders.values(), out], strict=True)]
        if dry_run:
            return _dry_report(job, out, plans)
    with entered_on_main(output_lock(out)):
        # Each in its own folder until the last is done: an interrupted run goes on after the last finished step.
        done = {name: _step(one, folders[name], options) for name, one in zip(folders, jobs, strict=True)}
        report = job.run(out, options, steps=done)
        on_main(_remove, steps, folders)
    return report


def _make_way(out: Path, steps: Path, folders: Mapping[str, Path], *, overwrite: bool) -> None:
    """Check that `out` and the documents' results have a place, which an earlier run may have to leave."""
    if folders and not overwrite:
        on_main(_remove_left, out, steps, folders)
    check_free(out, overwrite=overwrite)
    if folders and (steps.is_symlink() or (steps.exists() and not steps.is_dir())):
        raise usage_error("is no folder, and in the way of the documents' results", where=steps, hint="Remove it.")


def _dry_report(job: MergeJob, out: Path, plans: Sequence[PlannedMerge | None]) -> MergeReport:
    """Return what the checks found; of a document that uses others' results there is no plan yet."""
    *_, last = plans
    warnings = [warning for plan in plans if plan is not None for warning in plan.preflight.warnings]
    if last is not None:
        return replace(job.report(last, out), warnings=warnings, dry_run=True)
    note = "in full the documents that need no other's result; of the others, the models"
    return MergeReport(out, job.config.merge_method, {"checked": note}, warnings, 0, 0, dry_run=True)


def _step(job: MergeJob, folder: Path, options: ExecutionOptions) -> Mapping[str, Any]:
    """Merge a document that others need, unless an earlier run has done so; return the manifest of the result."""
    planned = job.plan(folder, options)

    def is_missing() -> bool:
        if not (folder / MANIFEST).is_file():
            return True
        if read_manifest(folder).get("report", {}).get("fingerprint") == planned.fingerprint:
            return False
        shutil.rmtree(folder)  # of another config, or of models that have changed since
        return True

    if on_main(is_missing):
        job.execute(planned, folder, options)
    return read_manifest(folder, needs=["inputs"])


def _remove_left(out: Path, steps: Path, folders: Mapping[str, Path]) -> None:
    """Remove the results of documents that a run left beside `out`, complete, when it was killed at its very end."""
    if not steps.is_dir() or steps.is_symlink() or not (out / MANIFEST).is_file():
        return
    used = read_manifest(out)["report"].get("steps") or {}
    left = {name: read_manifest(folder) for name, folder in folders.items() if (folder / MANIFEST).is_file()}
    # Those of another merge are the finished part of a run that is still to go on.
    if used.keys() == folders.keys() and all(used[name] == {"inputs": one["inputs"]} for name, one in left.items()):
        with output_lock(out):
            _remove(steps, folders)


def _remove(steps: Path, folders: Mapping[str, Path]) -> None:
    """Remove the results of named documents, and nothing else that may be in their folder."""
    for folder in folders.values():
        discard_output(folder)
    if folders and not any(steps.iterdir()):
        steps.rmdir()
