"""One document of a config as a job: its models opened, the plan checked, the result written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merges.card import card
from merges.checks import check_finite, check_models, check_vocabularies
from merges.config.schema import BASE, UNION, MergeConfig
from merges.layout import Layout, lay_out
from merges.output import SideFiles, side_files
from merges.plan import MergedTensor, plan_tensors
from merges.report import MergeReport, with_outcome
from merges.tokenizer.embeddings import TokenInputs
from merges.tokenizer.plan import plan_tokens, token_model
from surgery.checkpoint.checkpoint import Checkpoint, StoredTensor
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import SourceFiles
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.card import write_card
from surgery.engine.edit_report import write_config_dtype
from surgery.engine.execution import execute
from surgery.engine.manifest import build_manifest, write_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, check_output, plan_files
from surgery.engine.preflight import Preflight, check_quantised, check_space
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, listing
from surgery.vectors.align import aligned_model

_EXAMPLES = 5
CONFIG_WORD = 2  # of the line: surgery merge CONFIG.yml …


@dataclass(frozen=True)
class PlannedMerge:
    """A job that passed its checks."""

    plan: Plan
    merged: Sequence[MergedTensor]
    layout: Layout
    side_files: SideFiles
    preflight: Preflight

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the output's bytes, the sources' sizes and times among it."""
        with SourceFiles(self.plan.source_paths) as files:
            return self.plan.fingerprint(files.stamps())


class MergeJob:
    """One document's merge.

    Args:
        places: name of a document → the folder that its result lies in, or will.
        line: the words that type the command again.
        text: the config as it was written.
    """

    def __init__(self, config: MergeConfig, places: Mapping[str, Path], line: Sequence[str], text: str = "") -> None:
        self.config = config
        self.places = places
        self.text = text
        # What the models are called, not where they lie: the manifest is the same for every OUT.
        options = config.model_dump(mode="json", exclude={"where", "warnings"})
        self.command: dict[str, Any] = {
            "name": "merge",
            "arguments": list(config.models),
            "options": options,
            "line": shlex.join(line),
        }
        if text:
            # So that the merge can be made again from its manifest alone: the config's path means nothing elsewhere.
            self.command["files"] = {line[CONFIG_WORD]: text}
        self.where = config.where or f"merge {config.merge_method}"

    def check(self, out: Path, options: ExecutionOptions) -> PlannedMerge | None:
        """Everything that can be known before the documents that this one uses have results; nothing is written."""
        if not self.config.uses:
            return self.plan(out, options)
        preflight = Preflight()
        at_hand = [ref for ref in self.config.models if self._place(ref) is None]
        self._look(preflight, self._open(at_hand), out)
        preflight.errors.raise_if_any(self.where)
        return None

    def plan(self, out: Path, options: ExecutionOptions) -> PlannedMerge:
        """The merge as a plan, checked. Raises SurgeryError with every fault at once."""
        config, preflight = self.config, Preflight(warnings=list(self.config.warnings))
        checkpoints = self._open(config.models)
        self._look(preflight, checkpoints, out)
        modules = list(dict.fromkeys(section.module for section in config.sections if section.module))
        if len(modules) > 1:
            preflight.errors.add(
                f"modules: got {listing(modules)}, expected one: only a language model's own layers are merged. "
                "Leave the others out; what lies outside the layers is merged along."
            )
        preflight.errors.raise_if_any(self.where)  # of models that are not of one kind nothing more is worth saying
        layout = lay_out(preflight, config, checkpoints)
        donor = self._donor(checkpoints)
        tokens = self._tokens(preflight, checkpoints, donor, layout)
        if config.tokenizer is not None and tokens is None:
            preflight.errors.raise_if_any(self.where)  # or every embedding would be said to have the wrong shape
        merged = plan_tensors(preflight, config, layout, tokens)
        known = checkpoints if donor is None else {**checkpoints, donor.ref: donor}
        beside = side_files(
            preflight, layout, tokens.plan if tokens else None, known, chat_template=config.chat_template
        )
        preflight.errors.raise_if_any(self.where)
        if layout.left_out:
            names = listing(layout.left_out, _EXAMPLES)
            preflight.warnings.append(f"left out, as not all models have them and nothing says what they are: {names}")
        planned = [tensor.planned for tensor in merged]
        like = layout.template if {t.name for t in planned} <= layout.template.tensors.keys() else None
        plan = Plan(self.command, self._roles(checkpoints), plan_files(planned, like=like), beside.copied)
        check_space(preflight, plan, out, options.threads)
        preflight.errors.raise_if_any(self.where)
        return PlannedMerge(plan, merged, layout, beside, preflight)

    def run(self, out: Path, options: ExecutionOptions, *, steps: Mapping[str, Mapping[str, Any]]) -> MergeReport:
        """Plans and writes the merge that the config is for.

        Args:
            steps: name → manifest of the results that it may use.
        """
        return self.execute(self.plan(out, options), out, options, steps=steps)

    def execute(
        self,
        planned: PlannedMerge,
        out: Path,
        options: ExecutionOptions,
        *,
        steps: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> MergeReport:
        """Writes what was planned; without `steps`, as a step, whose manifest says what it was made from exactly."""
        plan, report = planned.plan, self.report(planned, out)
        if not options.allow_nonfinite:
            check_finite(_read_tensors(plan), options)
        more: dict[str, Any] = {"fingerprint": planned.fingerprint} if steps is None else {}
        if steps:
            more["steps"] = {name: {"inputs": one["inputs"]} for name, one in steps.items()}

        def finish(folder: Path, outcome: ExecutionResult) -> MergeReport:
            planned.side_files.write(folder)
            if stored_as := self.config.out_dtype or self.config.dtype:
                write_config_dtype(folder, dtype_name(stored_as))
            done = with_outcome(report, planned.merged, outcome)
            manifest = build_manifest(plan, outcome, kind="model", report={**done.summary(), **more})
            write_manifest(folder, manifest)
            write_card(folder, manifest, plan.sources, card(self.config, planned.layout, done, steps or {}, self.text))
            return done

        return execute(plan, out, options, finish=finish)

    def report(self, planned: PlannedMerge, out: Path) -> MergeReport:
        """What is known before the work."""
        facts, warnings = planned.preflight.facts, planned.preflight.warnings
        computed, count = len(planned.plan.computed), len(planned.plan.tensors)
        return MergeReport(out, self.config.merge_method, facts, warnings, computed, count)

    def _place(self, ref: str) -> str | None:
        """Where a model lies that is, or is an adapter on, the result of another document; None for others."""
        base, plus, adapter = ref.partition("+")
        if ref in self.places:
            return str(self.places[ref])
        return f"{self.places[base]}{plus}{adapter}" if base in self.places else None

    def _open(self, refs: Sequence[str]) -> dict[str, Checkpoint]:
        return {ref: replace(open_checkpoint(self._place(ref) or ref), ref=ref) for ref in refs}

    def _look(self, preflight: Preflight, checkpoints: Mapping[str, Checkpoint], out: Path) -> None:
        """Whether the models can be merged at all, and into `out`."""
        check_output(out, self._roles(checkpoints))
        check_quantised(preflight, checkpoints.values())
        if checkpoints:
            check_models(preflight, next(iter(checkpoints.values())), checkpoints.values())

    def _roles(self, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
        """ "base" and "model 1", "model 2", … → checkpoint."""
        others = [checkpoint for ref, checkpoint in checkpoints.items() if ref != self.config.base_model]
        base = checkpoints.get(self.config.base_model or "")
        return {**({"base": base} if base else {}), **{f"model {i}": one for i, one in enumerate(others, start=1)}}

    def _donor(self, checkpoints: Mapping[str, Checkpoint]) -> Checkpoint | None:
        """The model that only gives its tokenizer, where the config names such a one."""
        rule = self.config.tokenizer
        if rule is None or rule.source in (UNION, BASE, *checkpoints):
            return None
        return self._open([rule.source])[rule.source]

    def _tokens(
        self,
        preflight: Preflight,
        checkpoints: Mapping[str, Checkpoint],
        donor: Checkpoint | None,
        layout: Layout,
    ) -> TokenInputs | None:
        rule = self.config.tokenizer
        if rule is None:
            check_vocabularies(preflight, list(checkpoints.values()))
            return None
        try:
            models = [token_model(aligned_model(checkpoint)) for checkpoint in checkpoints.values()]
            giver = token_model(aligned_model(donor)) if donor else None
            plan = plan_tokens(models, rule, base=self.config.base_model, donor=giver)
        except SurgeryError as error:
            preflight.errors.add(str(error))
            return None
        preflight.facts["vocabulary"] = "; ".join(plan.facts)
        preflight.warnings += plan.warnings
        return TokenInputs(plan, layout.outside)


def _read_tensors(plan: Plan) -> dict[str, list[StoredTensor]]:
    """Model → the tensors that the plan reads of it, an adapter's among them, once each."""
    owner = {id(tensor): c.ref for c in plan.sources.values() for tensor in c.tensors.values()}
    found: dict[str, dict[int, StoredTensor]] = {}
    for planned in plan.tensors:
        for source in planned.inputs:
            for stored in source.tensors:
                found.setdefault(owner[id(stored)], {}).update({id(part): part for part in stored.parts})
    return {ref: list(tensors.values()) for ref, tensors in found.items()}
