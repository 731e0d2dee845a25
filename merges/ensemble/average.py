"""Write a logit ensemble: one checkpoint whose logits are the mean of its members', made of byte copies of theirs.

This is logit averaging as in arXiv 2507.07129. The members must give every token the same id. The folder has

* `model*.safetensors`: the members' tensors as `members.<i>.<name>`; a tensor of several members is stored once;
* `config.json` and `ensemble_model.py`: for transformers to load it (see `merges.ensemble.ensemble_model`);
* `members/<i>/`: the member's config, tokenizer and other side files; `members/<i>.json`: its name, and the header of
  each of its weight files. From these `merges.ensemble.unpacking` restores the members byte for byte;
* tokenizer, chat template and generation config of the first member.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from merges.choices import AveragingMode, TuneWhat
from merges.ensemble import ensemble_model
from merges.ensemble.ensemble_model import MODEL_TYPE
from merges.ensemble.members import EnsembleMember, check_vocabularies, check_weights, find_members
from merges.ensemble.shared_tensors import Shared, find_shared
from merges.ensemble.tuning import Tuned, check_tuning, tune_members
from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint, read_file
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.side_files import INDEXES
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, copy_tensor, plan_files
from surgery.engine.preflight import Preflight, check_quantised, check_space
from surgery.engine.result import ExecutionResult
from surgery.errors import usage_error
from surgery.io.atomic import MANIFEST
from surgery.io.escaping import markdown_text
from surgery.io.output_files import copy_output, write_output
from surgery.io.safe_paths import find_file, find_files
from surgery.models.choices import SpecialTokens
from surgery.reporting.report import Column, Table, format_value
from surgery.runtime.environment import n_processes

COMMAND = "merge logits"
CONFIG = "config.json"
CARD = "README.md"
MODEL_FILE = Path(ensemble_model.__file__)
MEMBERS = "members"
HEAD = "head"

ensemble_model.register()


@dataclass(frozen=True)
class MemberReport:
    """One member: `stored_bytes` of its `n_bytes` were written, an earlier member has the rest."""

    name: str
    ref: str
    kind: str
    weight: float
    tensors: int
    n_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class LogitsReport:
    """The ensemble that was, or with `dry_run` would be, written. `vocab_size`: rows that all members have."""

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    members: Sequence[MemberReport]
    mode: str
    vocab_size: int
    shared_tensors: int
    saved_bytes: int
    output_bytes: int
    tuning: Tuned | None = None
    dry_run: bool = False

    def table(self) -> Table:
        """Return the members, one row each."""
        columns = [
            Column("member"),
            Column("kind"),
            Column("weight", "number"),
            Column("tensors", "count"),
            Column("size", "bytes"),
            Column("stored", "bytes"),
        ]
        rows = [(m.name, m.kind, m.weight, m.tensors, m.n_bytes, m.stored_bytes) for m in self.members]
        return Table(f"Ensemble by {self.mode}", columns, rows, note="stored: without what an earlier member has too.")


def average_logits(
    models: Sequence[str],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    mode: AveragingMode = "logits",
    tune: Path | None = None,
    tune_what: TuneWhat = "weights",
    special_tokens: SpecialTokens = "text",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> LogitsReport:
    """Write the ensemble of `models` to the folder `out` (arXiv 2507.07129, "logit averaging").

    Example:
        average_logits(["lab:adder", "lab:sorter"], Path("OUT"))

    Args:
        weights: one per model, of any positive sum; None for equal ones.
        mode: what is averaged: logits (the paper), log-probabilities, or probabilities.
        tune: JSON lines with "text", or "prompt" and "response", to fit the weights or a fused head on.
        tune_what: "weights", one number per member; "head", the matrix on the members' concatenated hidden states
            that starts as their average.
        special_tokens: what special tokens in the rows of `tune` are: text, or those tokens (parse).
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: fewer than two models; one of them is no causal language model, needs code of its own or is
            quantised; they disagree on tokens; the weights make no mean; `tune` cannot be used; `out` exists.
    """
    normalized = check_weights(weights, len(models), mode)
    checkpoints = [open_checkpoint(model) for model in models]
    sources = {f"{MEMBERS}.{i}": checkpoint for i, checkpoint in enumerate(checkpoints)}
    check_destination(out, sources, options, dry_run=dry_run)
    # Every rank would fit its own weights, and they would write different configs.
    if tune and n_processes() > 1:
        raise usage_error("runs in one process", where="--tune", hint="Start it without accelerate launch.")
    rows = check_tuning(tune, tune_what, mode, normalized) if tune else None
    preflight = Preflight()
    check_quantised(preflight, checkpoints)
    members = find_members(preflight, checkpoints)
    preflight.errors.raise_if_any(COMMAND)
    vocab_size = check_vocabularies(preflight, members)
    preflight.errors.raise_if_any(COMMAND)
    shared = find_shared([checkpoint.tensors for checkpoint in checkpoints], options)
    tuning_options = _tuning_options(tune, tune_what, special_tokens)
    command = command_record(COMMAND, models, weight=list(weights or ()), mode=mode, **tuning_options)
    config = _config(members, normalized, mode, vocab_size, shared)
    draft = _Draft(command, preflight, members, sources, shared, config)
    check_space(preflight, draft.plan, out, options.threads)
    preflight.errors.raise_if_any(COMMAND)
    if dry_run:
        return replace(draft.report(out), dry_run=True)
    if rows is None:
        return _write(draft, out, options)
    with tempfile.TemporaryDirectory() as scratch:  # until the fitted head has been copied from it
        tuned = tune_members(config, checkpoints, rows, tune_what, Path(scratch), special_tokens, options=options)
        return _write(draft.tuned(tuned), out, options)


def _tuning_options(tune: Path | None, what: TuneWhat, special_tokens: SpecialTokens) -> dict[str, str]:
    """Return the options of fitting that repeat it; none where nothing is fitted."""
    if tune is None:
        return {}
    own = {} if special_tokens == "text" else {"special_tokens": special_tokens}
    return {"tune": str(tune), "tune_what": what, **own}


@dataclass(frozen=True)
class _Draft:
    """An ensemble before it is written. `config` is its config.json."""

    command: Mapping[str, Any]
    preflight: Preflight
    members: Sequence[EnsembleMember]
    sources: Mapping[str, Checkpoint]
    shared: Shared
    config: Mapping[str, Any]
    tuning: Tuned | None = None

    def tuned(self, tuning: Tuned) -> _Draft:
        """Return the ensemble with the weights, or the head, that were fitted."""
        config = {**self.config, "weights": list(tuning.weights), "fused_head": tuning.fused_head}
        head = {} if tuning.head is None else {HEAD: read_file(tuning.head)}
        return replace(self, config=config, sources={**self.sources, **head}, tuning=tuning)

    @cached_property
    def plan(self) -> Plan:
        """Copies of every member's tensors and files; tensors that an earlier member has are left out."""
        planned = [
            replace(copy_tensor(tensor), name=f"{role}.{name}")
            for role, checkpoint in self.sources.items()
            for name, tensor in checkpoint.tensors.items()
            if f"{role}.{name}" not in self.shared
        ]
        # Code of the first member's would shadow the ensemble's own, and an adapter's config would make it one.
        side_files = {
            name: file
            for name, file in self.members[0].checkpoint.side_files.items()
            if name not in (CONFIG, ADAPTER_CONFIG) and not name.endswith(".py")
        }
        for i, member in enumerate(self.members):
            side_files |= {f"{MEMBERS}/{i}/{name}": file for name, file in kept_files(member.checkpoint).items()}
        return Plan(self.command, self.sources, plan_files(planned), side_files)

    def report(self, out: Path) -> LogitsReport:
        """Return the report of the ensemble as it would be written now."""
        rows = []
        for i, (member, weight) in enumerate(zip(self.members, self.config["weights"], strict=True)):
            tensors = member.checkpoint.tensors
            # What an earlier member has too was left out, and costs this one nothing.
            stored = [t.n_bytes for name, t in tensors.items() if f"{MEMBERS}.{i}.{name}" not in self.shared]
            kind, total = str(member.config.model_type), member.checkpoint.n_bytes
            rows.append(
                MemberReport(member.name, member.checkpoint.ref, kind, weight, len(tensors), total, sum(stored))
            )
        saved = sum(row.n_bytes - row.stored_bytes for row in rows)
        facts = {
            **self.preflight.facts,
            "members": f"{len(rows)}, {format_value(sum(row.n_bytes for row in rows), 'bytes')} in all",
            "shared": f"{len(self.shared)} tensors stored once, {format_value(saved, 'bytes')} saved",
        }
        return LogitsReport(
            out,
            facts,
            self.preflight.warnings,
            rows,
            self.config["mode"],
            self.config["vocab_size"],
            len(self.shared),
            saved,
            self.plan.output_bytes,
            self.tuning,
        )


def _write(draft: _Draft, out: Path, options: ExecutionOptions) -> LogitsReport:
    report = draft.report(out)

    def describe(folder: Path, _: ExecutionResult) -> OutputDescription[LogitsReport]:
        write_output(folder, CONFIG, json.dumps(draft.config, indent=2) + "\n")
        copy_output(MODEL_FILE, folder, MODEL_FILE.name)
        for i, member in enumerate(draft.members):
            write_output(folder, f"{MEMBERS}/{i}.json", json.dumps(_record(member)) + "\n")
        return OutputDescription(report, _summary(report), _card(report), kind="ensemble")

    writes = (CONFIG, MODEL_FILE.name, *(f"{MEMBERS}/{i}.json" for i in range(len(draft.members))))
    return write_checkpoint(draft.plan, out, options, describe=describe, writes=writes)


def _config(
    members: Sequence[EnsembleMember], weights: Sequence[float], mode: str, vocab_size: int, shared: Mapping[str, str]
) -> dict[str, Any]:
    """Return the ensemble's config.json. Token ids are the first member's."""
    first = members[0].config.get_text_config(decoder=True)
    # transformers imports the class from this file in the folder, if the user trusts remote code.
    module = MODEL_FILE.stem
    return {
        "architectures": ["LogitEnsembleForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.LogitEnsembleConfig",
            "AutoModelForCausalLM": f"{module}.LogitEnsembleForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "mode": mode,
        "weights": list(weights),
        "fused_head": "none",
        "vocab_size": vocab_size,
        **{key: getattr(first, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        # Each member ties its own; the ensemble itself has no embedding to tie a head to.
        "tie_word_embeddings": False,
        "members": [dict(member.checkpoint.config) for member in members],
        "aliases": dict(shared),
    }


def kept_files(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """Return all files beside the weights that `unpack` restores: side files, index, manifest, model card."""
    folder = cast(Path, checkpoint.folder)
    described = [path for path in (find_file(folder, name) for name in (MANIFEST, CARD)) if path is not None]
    return {**checkpoint.side_files, **{path.name: path for path in (*described, *find_files(folder, INDEXES))}}


def _record(member: EnsembleMember) -> dict[str, Any]:
    """Return what `unpack` needs beside the files: the member's name and each weight file's header, byte for byte."""
    checkpoint = member.checkpoint
    # Planned like the member itself, so that headers have its own order, padding and metadata.
    files = plan_files([copy_tensor(tensor) for tensor in checkpoint.tensors.values()], like=checkpoint)
    return {
        "name": member.name,
        "files": [
            # Without the 8 bytes of its length, which `unpacking` puts in front again.
            {"name": file.name, "size": file.size, "header": file.header.raw[8:].decode("utf-8")}
            for file in files
        ],
    }


def _summary(report: LogitsReport) -> dict[str, Any]:
    """Return the manifest's report."""
    return {
        "mode": report.mode,
        "vocab_size": report.vocab_size,
        "members": [{"name": row.name, "kind": row.kind, "weight": row.weight} for row in report.members],
        "shared_tensors": report.shared_tensors,
        "saved_bytes": report.saved_bytes,
        "tuning": None if report.tuning is None else report.tuning.summary(),
    }


def _card(report: LogitsReport) -> CardContent:
    names = ", ".join(f"{row.weight:.4g} · {markdown_text(row.name)}" for row in report.members)
    method = (
        f"Every member runs on every token, and their {report.mode} are averaged (arXiv:2507.07129): {names}. Load it "
        "with `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`, and the tokenizer likewise; `surgery "
        "merge unpack` gives the members back. It costs as much to run as its members together, and can be worse than "
        "the best of them: measure it beside them."
    )
    body = report.table().to_markdown()
    if report.tuning is not None:
        body += f"\n\n{markdown_text(report.tuning.sentence())}"
    return CardContent("Logit ensemble", method, ("logit-ensemble", "merge"), body)
