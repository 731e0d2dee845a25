"""`merge`: a config's models merged on their weights, streamed to a folder like any other plan."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merges.check import check_finite, check_models, check_vocabularies
from merges.config import ordered
from merges.layout import Layout, lay_out
from merges.methods import METHODS
from merges.output import Side, output_side
from merges.plan import MergedTensor, plan_tensors
from merges.report import MergeReport, with_outcome
from merges.schema import MergeConfig
from merges.token_inputs import TokenInputs
from merges.tokens import plan_tokens, token_model
from surgery.checkpoint import MANIFEST, Checkpoint, StoredTensor
from surgery.commit import check_free
from surgery.dtypes import dtype_name
from surgery.edit import write_config_dtype
from surgery.execute import Options, Outcome, execute
from surgery.fit import side
from surgery.manifest import Card, build_manifest, read_manifest, write_card, write_manifest
from surgery.plan import Plan, PlannedFile, check_output, plan_files
from surgery.preflight import Preflight, check_quantised, check_space
from surgery.refs import open_checkpoint
from surgery.stream import default_threads

STEPS = ".steps"  # beside OUT, while a config of several documents is at work: their results


def merge(
    configs: Sequence[MergeConfig],
    out: Path,
    *,
    line: Sequence[str],
    text: str = "",
    dry_run: bool = False,
    options: Options = Options(),
) -> MergeReport:
    """Writes the merge that `configs` describe to the folder `out`.

    Args:
        configs: as `merges.config` reads them; those with a name are merged first, and removed when the last is done.
        line: the words that type the command again, for manifest and model card.
        text: the config as it was written, for the model card.
        dry_run: stop after the checks; nothing is written. Documents that need another's result are not looked at.

    Raises:
        SurgeryError: the models do not fit each other or the config; `out` exists; a source holds NaN or infinite
            values; the disk is full.
    """
    steps = out.with_name(out.name + STEPS)
    results: dict[str, str] = {}
    *before, last = ordered(configs)
    if not dry_run:
        check_free(out, overwrite=options.overwrite)
    for config in before:
        assert config.name is not None
        results[config.name] = str(steps / config.name)
        if not dry_run:
            _step(config.with_models(results), steps / config.name, options)
        elif not config.uses:
            _Merge(config, line, text).plan(steps / config.name, options)
    if dry_run and last.uses:
        note = "only the documents that need no other's result were checked"
        return MergeReport(out, last.merge_method, {"checked": note}, last.warnings, 0, 0, dry_run=True)
    report = _Merge(last.with_models(results), line, text).run(out, options, dry_run=dry_run)
    shutil.rmtree(steps, ignore_errors=True)
    return report


def _step(config: MergeConfig, folder: Path, options: Options) -> None:
    """Merges a document that others need, unless an earlier run has done so."""
    job = _Merge(config, ("merge", str(config.name)), "")
    if (folder / MANIFEST).is_file():
        if read_manifest(folder)["command"] == json.loads(json.dumps(job.command)):
            return
        shutil.rmtree(folder)
    job.run(folder, options)


class _Merge:
    """One document's merge."""

    def __init__(self, config: MergeConfig, line: Sequence[str], text: str) -> None:
        self.config = config
        self.text = text
        self.command = _command(config, line)
        self.preflight = Preflight(warnings=list(config.warnings))
        self.where = f"merge {config.merge_method}"

    def run(self, out: Path, options: Options, *, dry_run: bool = False) -> MergeReport:
        plan, merged, side_files = self.plan(out, options)
        facts, warnings = self.preflight.facts, self.preflight.warnings
        computed = len(plan.computed)
        report = MergeReport(
            out, self.config.merge_method, facts, warnings, computed, len(plan.tensors), dry_run=dry_run
        )
        if dry_run:
            return report
        if not options.allow_nonfinite:
            check_finite(_read_tensors(plan), options)

        def finish(folder: Path, outcome: Outcome) -> None:
            nonlocal report
            side_files.write(folder)
            if stored_as := self.config.out_dtype or self.config.dtype:
                write_config_dtype(folder, dtype_name(stored_as))
            report = with_outcome(report, merged, outcome)
            manifest = build_manifest(plan, outcome, kind="model", report=report.summary())
            write_manifest(folder, manifest)
            write_card(folder, manifest, plan.sources, self.card(report))

        execute(plan, out, options, finish=finish)
        return report

    def plan(self, out: Path, options: Options) -> tuple[Plan, list[MergedTensor], Side]:
        """The merge as a plan, checked. Raises SurgeryError with every fault at once."""
        config, preflight = self.config, self.preflight
        checkpoints = {ref: open_checkpoint(ref) for ref in config.models}
        check_output(out, checkpoints)
        check_quantised(preflight, checkpoints.values())
        layout = lay_out(preflight, config, checkpoints)
        sliced = any(source.layer_range for section in config.sections for source in section.sources)
        check_models(preflight, layout.template, checkpoints.values(), sliced=sliced)
        tokens = self.tokens(checkpoints, layout)
        preflight.settle(self.where)
        merged = plan_tensors(preflight, config, layout, tokens)
        preflight.settle(self.where)
        side_files = output_side(preflight, layout, tokens.plan if tokens else None, checkpoints)
        planned = [tensor.planned for tensor in merged]
        if layout.left_out:
            names = ", ".join(layout.left_out)
            preflight.warnings.append(f"left out, as not all models have them and nothing says what they are: {names}")
        roles = {_role(config, ref, number): one for number, (ref, one) in enumerate(checkpoints.items())}
        like = layout.template if {t.name for t in planned} <= layout.template.tensors.keys() else None
        files: tuple[PlannedFile, ...] = plan_files(planned, like=like)
        plan = Plan(self.command, roles, files, side_files.copied)
        check_space(preflight, plan, out, options.threads or default_threads())
        preflight.settle(self.where)
        return plan, merged, side_files

    def tokens(self, checkpoints: Mapping[str, Checkpoint], layout: Layout) -> TokenInputs | None:
        rule = self.config.tokenizer
        if rule is None:
            check_vocabularies(self.preflight, list(checkpoints.values()))
            return None
        models = [token_model(side(checkpoint)) for checkpoint in checkpoints.values()]
        donor = None
        if rule.source not in ("union", "base", *checkpoints):
            donor = token_model(side(open_checkpoint(rule.source)))
        plan = plan_tokens(models, rule, base=self.config.base_model, donor=donor)
        self.preflight.facts["vocabulary"] = "; ".join(plan.facts)
        self.preflight.warnings.extend(plan.warnings)
        return TokenInputs(plan, layout.outside)

    def card(self, report: MergeReport) -> Card:
        method = METHODS[self.config.merge_method].spec
        paper = f" ({method.paper})" if method.paper else ""
        names = ", ".join(self.config.models)
        body = report.table().to_markdown() if report.models else ""
        if self.text:
            body += f"\n\n## Config\n\n```yaml\n{self.text.strip()}\n```"
        sentence = (
            f"{names}, merged on their weights by `{method.name}`{paper}: {method.summary}. {report.merged} of "
            f"{report.tensors} tensors were computed, in fp32 and rounded once; the rest are copies."
        )
        return Card("Merged model", sentence, ("merge", method.name), body)


def _command(config: MergeConfig, line: Sequence[str]) -> dict[str, Any]:
    options = config.model_dump(mode="json", exclude={"where", "warnings"})
    return {"name": "merge", "arguments": list(config.models), "options": options, "line": shlex.join(line)}


def _role(config: MergeConfig, ref: str, number: int) -> str:
    return "base" if ref == config.base_model else f"model {number if config.base_model else number + 1}"


def _read_tensors(plan: Plan) -> dict[str, list[StoredTensor]]:
    """Model → the tensors that the plan reads of it, an adapter's among them, once each."""
    owner = {id(tensor): c.ref for c in plan.sources.values() for tensor in c.tensors.values()}
    found: dict[str, dict[int, StoredTensor]] = {}
    for planned in plan.tensors:
        for source in planned.inputs:
            for stored in source.tensors:
                updates = (stored.update.a, stored.update.b) if stored.update else ()
                found.setdefault(owner[id(stored)], {}).update({id(part): part for part in (stored, *updates)})
    return {ref: list(tensors.values()) for ref, tensors in found.items()}
