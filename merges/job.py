"""Merge one document of a config: open its models, check and plan the merge, write the result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merges.card import merge_card
from merges.checks import check_finite, check_models, check_vocabularies
from merges.config.schema import BASE, UNION, MergeConfig
from merges.layout import Layout, lay_out
from merges.output import SideFiles, side_files
from merges.plan import MergedTensor, plan_tensors
from merges.report import MergeReport, with_result
from merges.tokenizer.embeddings import TokenInputs
from merges.tokenizer.plan import plan_tokens, token_model
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import SourceFiles
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.checkpoint_writer import OutputDescription, write_checkpoint
from surgery.engine.edit_report import write_config_dtype
from surgery.engine.layouts import see_as
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, check_output, plan_files
from surgery.engine.preflight import Preflight, check_quantised, check_space
from surgery.engine.result import ExecutionResult
from surgery.engine.tied_embeddings import with_true_heads
from surgery.engine.unshared import NO_CHOICE, SeenNames, UnsharedChoice
from surgery.errors import SurgeryError, listing
from surgery.vectors.align import aligned_model

CONFIG_WORD = 2  # index of the config's path in the words of `surgery merge CONFIG.yml …`


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that passed its checks."""

    plan: Plan
    merged: Sequence[MergedTensor]
    layout: Layout
    side_files: SideFiles
    preflight: Preflight

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the output's bytes, including sizes and modification times of the sources."""
        with SourceFiles(self.plan.source_paths) as files:
            return self.plan.fingerprint(files.stamps())


class MergeJob:
    """The merge that one document describes.

    Args:
        result_folders: name of each other document → the folder that its result is, or will be, in.
        line: the words of the command line, to be typed again.
        text: the config as it was written.
        choice: what to do with tensors that only some models have.
        seen: the names that the globs of `choice` may match, of all documents up to this one.
        is_last: whether no other document follows, so that every glob must have matched.
    """

    def __init__(
        self,
        config: MergeConfig,
        result_folders: Mapping[str, Path],
        line: Sequence[str],
        text: str = "",
        choice: UnsharedChoice = NO_CHOICE,
        seen: SeenNames | None = None,
        *,
        is_last: bool = True,
    ) -> None:
        self.config = config
        self.choice = choice
        self.seen = SeenNames() if seen is None else seen
        self.is_last = is_last
        self.result_folders = result_folders
        self.text = text
        # References, not paths of results: the manifest is then the same for every OUT.
        without = {"where", "warnings", *(() if config.dequantise else ("dequantise",))}
        options = {**config.model_dump(mode="json", exclude=without), **choice.options}
        self.command: dict[str, Any] = {
            "name": "merge",
            "arguments": list(config.models),
            "options": options,
            "line": shlex.join(line),
        }
        if text:
            # The merge can then be reproduced from its manifest alone; on another machine the config's path is no use.
            self.command["files"] = {line[CONFIG_WORD]: text}
        self.where = config.where or f"merge {config.merge_method}"

    def check(self, out: Path, options: ExecutionOptions) -> PlannedMerge | None:
        """Check what can be checked before the documents that this one uses have results; write nothing.

        Returns the plan; None where it depends on such results, and only the models at hand were checked.
        """
        if not self.config.uses:
            return self.plan(out, options)
        preflight = Preflight()
        available = [ref for ref in self.config.models if self._result_path(ref) is None]
        self._check_inputs(preflight, self._open(available), out)
        preflight.errors.raise_if_any(self.where)
        return None

    def plan(self, out: Path, options: ExecutionOptions) -> PlannedMerge:
        """Plan the merge and check it. Raises SurgeryError with every error at once."""
        config, preflight = self.config, Preflight(warnings=list(self.config.warnings))
        checkpoints = self._open(config.models)
        self._check_inputs(preflight, checkpoints, out)
        modules = list(dict.fromkeys(section.module for section in config.sections if section.module))
        if len(modules) > 1:
            preflight.errors.add(
                f"modules: got {listing(modules)}, expected one: only a language model's own layers are merged. "
                "Leave the others out; what lies outside the layers is merged along."
            )
        # Tensors of models that are not of one kind would only add an error each.
        preflight.errors.raise_if_any(self.where)
        checkpoints = with_true_heads(preflight, self._in_one_layout(preflight, checkpoints))
        layout = lay_out(preflight, config, checkpoints, self.choice, self.seen)
        if self.is_last:
            self.choice.check_names(self.seen)
        # Opened only now, after the models are known to fit: it may have to be downloaded.
        donor = self._donor(checkpoints)
        tokens = self._tokens(preflight, checkpoints, donor, layout)
        if config.tokenizer is not None and tokens is None:
            preflight.errors.raise_if_any(self.where)  # else every embedding would be reported for its shape
        merged = plan_tensors(preflight, config, layout, tokens)
        known = checkpoints if donor is None else {**checkpoints, donor.ref: donor}
        files = side_files(
            preflight, layout, tokens.plan if tokens else None, known, chat_template=config.chat_template
        )
        preflight.errors.raise_if_any(self.where)
        planned = [tensor.planned for tensor in merged]
        # Shards as the template has them, where it has every tensor of the output.
        like = layout.template if {t.name for t in planned} <= layout.template.tensors.keys() else None
        plan = Plan(self.command, self._roles(checkpoints), plan_files(planned, like=like), files.copied)
        check_space(preflight, plan, out, options.threads)
        preflight.errors.raise_if_any(self.where)
        return PlannedMerge(plan, merged, layout, files, preflight)

    def run(self, out: Path, options: ExecutionOptions, *, steps: Mapping[str, Mapping[str, Any]]) -> MergeReport:
        """Plan and write the merge that the config file is for.

        Args:
            steps: name → manifest of the intermediate results that it may use.
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
        """Write a planned merge with manifest and model card.

        Args:
            steps: as for `run`; None where the merge itself is such an intermediate result. Its manifest then has a
                fingerprint, by which a later run recognises it.
        """
        preview = self.report(planned, out)
        # Before the first byte is written, as NaN in one tensor would make the whole output useless.
        if not options.allow_nonfinite:
            check_finite(_read_tensors(planned.plan), options)
        extra: dict[str, Any] = {"fingerprint": planned.fingerprint} if steps is None else {}
        if steps:
            extra["steps"] = {name: {"inputs": one["inputs"]} for name, one in steps.items()}

        def describe(folder: Path, result: ExecutionResult) -> OutputDescription[MergeReport]:
            planned.side_files.write(folder)
            if stored_as := self.config.out_dtype or self.config.dtype:
                write_config_dtype(folder, dtype_name(stored_as))
            report = with_result(preview, planned.merged, result)
            content = merge_card(self.config, planned.layout, report, steps or {}, self.text)
            return OutputDescription(report, {**report.summary(), **extra}, content)

        return write_checkpoint(planned.plan, out, options, describe=describe, writes=planned.side_files.written)

    def report(self, planned: PlannedMerge, out: Path) -> MergeReport:
        """Return what is known of the merge before it is written."""
        facts, warnings = planned.preflight.facts, planned.preflight.warnings
        computed, count = len(planned.plan.computed), len(planned.plan.tensors)
        return MergeReport(out, self.config.merge_method, facts, warnings, computed, count)

    def _result_path(self, ref: str) -> str | None:
        """Return the path of a model that is, or is an adapter on, the result of another document; None for others."""
        base, plus, adapter = ref.partition("+")
        if ref in self.result_folders:
            return str(self.result_folders[ref])
        return f"{self.result_folders[base]}{plus}{adapter}" if base in self.result_folders else None

    def _open(self, refs: Sequence[str]) -> dict[str, Checkpoint]:
        opened = {
            ref: open_checkpoint(self._result_path(ref) or ref, dequantise=self.config.dequantise) for ref in refs
        }
        return {ref: replace(checkpoint, ref=ref) for ref, checkpoint in opened.items()}

    def _in_one_layout(self, preflight: Preflight, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
        """Return the models with the names and the layout of the one whose names the output has."""
        template = checkpoints[self.config.template]
        return {ref: see_as(preflight, checkpoint, template).checkpoint for ref, checkpoint in checkpoints.items()}

    def _check_inputs(self, preflight: Preflight, checkpoints: Mapping[str, Checkpoint], out: Path) -> None:
        """Check that the models can be merged at all, and that `out` is in none of them."""
        check_output(out, self._roles(checkpoints))
        check_quantised(preflight, checkpoints.values(), has_option=True)
        if checkpoints:
            check_models(preflight, next(iter(checkpoints.values())), checkpoints.values())

    def _roles(self, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
        """Return role → checkpoint, where roles are "base", "model 1", "model 2", …"""
        # Roles are keys of the manifest's inputs; references may be long paths, and roles tell the base apart.
        others = [checkpoint for ref, checkpoint in checkpoints.items() if ref != self.config.base_model]
        base = checkpoints.get(self.config.base_model or "")
        return {**({"base": base} if base else {}), **{f"model {i}": one for i, one in enumerate(others, start=1)}}

    def _donor(self, checkpoints: Mapping[str, Checkpoint]) -> Checkpoint | None:
        """Open the model that only gives its tokenizer, where the config names such a one."""
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
        """Plan the output's vocabulary. None where rows are merged as they are, or where errors were found."""
        rule = self.config.tokenizer
        if rule is None:
            check_vocabularies(preflight, list(checkpoints.values()))
            return None
        try:
            models = [token_model(aligned_model(checkpoint)) for checkpoint in checkpoints.values()]
            donor_model = token_model(aligned_model(donor)) if donor else None
            plan = plan_tokens(models, rule, base=self.config.base_model, donor=donor_model)
        except SurgeryError as error:
            preflight.errors.add(str(error))
            return None
        preflight.facts["vocabulary"] = "; ".join(plan.facts)
        preflight.warnings += plan.warnings
        return TokenInputs(plan, layout.outside)


def _read_tensors(plan: Plan) -> dict[str, list[StoredTensor]]:
    """Return, per model, the tensors that the plan reads of it, including those of an adapter, once each."""
    # By identity: two models have tensors of one name, and a plan's inputs do not say whose they are.
    owner = {id(tensor): c.ref for c in plan.sources.values() for tensor in c.tensors.values()}
    read: dict[str, dict[int, StoredTensor]] = {}
    for planned in plan.tensors:
        for source in planned.inputs:
            for stored in source.tensors:
                read.setdefault(owner[id(stored)], {}).update({id(part): part for part in stored.parts})
    return {ref: list(tensors.values()) for ref, tensors in read.items()}
