"""The logit ensemble: one checkpoint whose logits are the mean of its members', written as byte copies of theirs.

After logit averaging in arXiv 2507.07129. In come models that give every token the same id; out comes a folder with

* `model*.safetensors`: the members' tensors as `members.<i>.<name>`; what an earlier member has too is stored once;
* `config.json` and `ensemble_model.py`: what transformers loads it with (see `merges.ensemble.ensemble_model`);
* `members/<i>/`: the member's config, tokenizer and other side files; `members/<i>.json`: its name, and the header of
  each of its weight files. From these `merges.ensemble.unpack` restores the members to the bit;
* tokenizer, chat template and generation config of the first member.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from merges.ensemble import ensemble_model
from merges.ensemble.ensemble_model import MODEL_TYPE
from merges.ensemble.members import EnsembleMember, Mode, check_vocabularies, check_weights, find_members
from merges.ensemble.shared_tensors import Shared, find_shared
from merges.ensemble.tune import Tuned, TuneWhat, check_tuning, tune_members
from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint, read_file
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.card import CardContent, write_card
from surgery.engine.execution import execute
from surgery.engine.manifest import build_manifest, command_record, write_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, check_output, copy_tensor, plan_files
from surgery.engine.preflight import Preflight, check_quantised, check_space
from surgery.engine.result import ExecutionResult
from surgery.errors import usage_error
from surgery.io.atomic import MANIFEST, check_free
from surgery.reporting.report import Column, Table, format_value
from surgery.runtime.environment import n_processes

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
    """What was, or with `dry_run` would be, written. `vocab_size`: rows that all members have."""

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
        """The members, one row each."""
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
    mode: Mode = "logits",
    tune: Path | None = None,
    tune_what: TuneWhat = "weights",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> LogitsReport:
    """Writes the ensemble of `models` to the folder `out` (arXiv 2507.07129, "logit averaging").

    Args:
        weights: one per model, of any positive sum; None for equal ones.
        mode: what is averaged: logits (the paper), log-probabilities, or probabilities.
        tune: JSON lines with "text", or "prompt" and "response", to fit the weights or a fused head on.
        tune_what: "weights", one number per member; "head", the matrix on the members' concatenated hidden states
            that starts as their average.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: fewer than two models; one of them is no causal language model, needs code of its own or is
            quantised; they disagree on tokens; the weights make no mean; `tune` cannot be used; `out` exists.
    """
    given = check_weights(weights, len(models), mode)
    checkpoints = [open_checkpoint(model) for model in models]
    sources = {f"{MEMBERS}.{i}": checkpoint for i, checkpoint in enumerate(checkpoints)}
    check_output(out, sources)
    if not dry_run:
        check_free(out, overwrite=options.overwrite)
    if tune and n_processes() > 1:
        raise usage_error("runs in one process", where="--tune", hint="Start it without accelerate launch.")
    rows = check_tuning(tune, tune_what, mode, given) if tune else None
    preflight = Preflight()
    check_quantised(preflight, checkpoints)
    members = find_members(preflight, checkpoints)
    preflight.errors.raise_if_any("merge logits")
    vocab_size = check_vocabularies(preflight, members)
    preflight.errors.raise_if_any("merge logits")
    shared = find_shared([checkpoint.tensors for checkpoint in checkpoints], options)
    chosen = {"tune": str(tune), "tune_what": tune_what} if tune else {}
    command = command_record("merge logits", models, weight=list(weights or ()), mode=mode, **chosen)
    config = _config(members, given, mode, vocab_size, shared)
    plan = _plan(command, members, sources, shared)
    check_space(preflight, plan, out, options.threads)
    preflight.errors.raise_if_any("merge logits")
    report = _report(out, preflight, members, config, shared, plan)
    if dry_run:
        return replace(report, dry_run=True)
    with ExitStack() as stack:
        if rows is not None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tuned = tune_members(
                config,
                [member.checkpoint for member in members],
                rows,
                tune_what,
                scratch,
                device=options.device,
                progress=options.progress,
            )
            config = {**config, "weights": list(tuned.weights), "fused_head": tuned.fused_head}
            if tuned.head is not None:
                sources |= {HEAD: read_file(tuned.head)}
                plan = _plan(command, members, sources, shared)
            report = replace(_report(out, preflight, members, config, shared, plan), tuning=tuned)

        def finish(folder: Path, outcome: ExecutionResult) -> None:
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(MODEL_FILE, folder / MODEL_FILE.name)
            for i, member in enumerate(members):
                (folder / MEMBERS / f"{i}.json").write_text(json.dumps(_record(member)) + "\n", encoding="utf-8")
            manifest = build_manifest(plan, outcome, kind="ensemble", report=_summary(report))
            write_manifest(folder, manifest)
            write_card(folder, manifest, sources, _card(report))

        execute(plan, out, options, finish=finish)
    return report


def _config(
    members: Sequence[EnsembleMember], weights: Sequence[float], mode: str, vocab_size: int, shared: Mapping[str, str]
) -> dict[str, Any]:
    """What config.json of the ensemble says. Token ids are the first member's."""
    first = members[0].config.get_text_config(decoder=True)
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
        "tie_word_embeddings": False,
        "members": [dict(member.checkpoint.config) for member in members],
        "aliases": dict(shared),
    }


def _plan(
    command: Mapping[str, Any], members: Sequence[EnsembleMember], sources: Mapping[str, Checkpoint], shared: Shared
) -> Plan:
    planned = [
        replace(copy_tensor(tensor), name=f"{role}.{name}")
        for role, checkpoint in sources.items()
        for name, tensor in checkpoint.tensors.items()
        if f"{role}.{name}" not in shared
    ]
    side_files = {
        path.name: path
        for path in members[0].checkpoint.side_files
        if path.name not in (CONFIG, ADAPTER_CONFIG) and path.suffix != ".py"
    }
    for i, member in enumerate(members):
        side_files |= {f"{MEMBERS}/{i}/{path.name}": path for path in kept_files(member.checkpoint)}
    return Plan(command, sources, plan_files(planned), side_files)


def kept_files(checkpoint: Checkpoint) -> list[Path]:
    """All files beside the weights that `unpack` restores: side files, index, manifest, model card."""
    folder = cast(Path, checkpoint.folder)
    extra = [folder / MANIFEST, folder / CARD, *sorted(folder.glob("*.safetensors.index.json"))]
    return [*checkpoint.side_files, *(path for path in extra if path.is_file())]


def _record(member: EnsembleMember) -> dict[str, Any]:
    """What `unpack` needs beside the files: each weight file's header, to the byte."""
    checkpoint = member.checkpoint
    files = plan_files([copy_tensor(tensor) for tensor in checkpoint.tensors.values()], like=checkpoint)
    return {
        "name": member.name,
        "files": [
            {"name": file.name, "size": file.size, "header": file.header.raw[8:].decode("utf-8")} for file in files
        ],
    }


def _report(
    out: Path,
    preflight: Preflight,
    members: Sequence[EnsembleMember],
    config: Mapping[str, Any],
    shared: Shared,
    plan: Plan,
) -> LogitsReport:
    rows = []
    for i, (member, weight) in enumerate(zip(members, config["weights"], strict=True)):
        tensors = member.checkpoint.tensors
        stored = [t.n_bytes for name, t in tensors.items() if f"{MEMBERS}.{i}.{name}" not in shared]
        kind = str(member.config.model_type)
        whole = member.checkpoint.n_bytes
        rows.append(MemberReport(member.name, member.checkpoint.ref, kind, weight, len(tensors), whole, sum(stored)))
    saved = sum(row.n_bytes - row.stored_bytes for row in rows)
    preflight.facts["members"] = f"{len(rows)}, {format_value(sum(row.n_bytes for row in rows), 'bytes')} in all"
    preflight.facts["shared"] = f"{len(shared)} tensors stored once, {format_value(saved, 'bytes')} saved"
    return LogitsReport(
        out,
        preflight.facts,
        preflight.warnings,
        rows,
        config["mode"],
        config["vocab_size"],
        len(shared),
        saved,
        plan.output_bytes,
    )


def _summary(report: LogitsReport) -> dict[str, Any]:
    """What the manifest keeps."""
    return {
        "mode": report.mode,
        "vocab_size": report.vocab_size,
        "members": [{"name": row.name, "kind": row.kind, "weight": row.weight} for row in report.members],
        "shared_tensors": report.shared_tensors,
        "saved_bytes": report.saved_bytes,
        "tuning": None if report.tuning is None else report.tuning.summary(),
    }


def _card(report: LogitsReport) -> CardContent:
    names = ", ".join(f"{row.weight:.4g} · {row.name}" for row in report.members)
    method = (
        f"Every member runs on every token, and their {report.mode} are averaged (arXiv:2507.07129): {names}. Load it "
        "with `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`, and the tokenizer likewise; `surgery "
        "merge unpack` gives the members back. It costs as much to run as its members together, and can be worse than "
        "the best of them: measure it beside them."
    )
    body = report.table().to_markdown()
    if report.tuning is not None:
        body += f"\n\n{report.tuning.sentence()}"
    return CardContent("Logit ensemble", method, ("logit-ensemble", "merge"), body)
