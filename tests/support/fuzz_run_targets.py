"""What the fuzzer runs on the files of runs: data, plans, results, tokens, ensembles, journals and chat templates."""

from __future__ import annotations

from pathlib import Path

from support.fuzz_corpus import FINGERPRINT, ONE_THREAD
from support.fuzzing import FuzzTarget

from merges.ensemble.tuning import read_rows
from merges.ensemble.unpacking import unpack
from probes.data.reader import read_data
from probes.data.records import read_examples
from probes.experts.findings import read_expert_findings
from probes.experts.report import expert_sentences, expert_tables
from probes.refusal.findings import read_findings
from probes.refusal.tables import refusal_sentences, refusal_tables
from surgery.checkpoint.inspect import inspect_checkpoint, inspect_tables
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.storage.journal import Journal
from surgery.errors import SurgeryError
from surgery.evaluation.perplexity import read_text
from surgery.evaluation.scorecard import read_scores
from surgery.growth.data.corpus import documents
from surgery.growth.data.token_index import read_index
from surgery.growth.embedding.embedding_folder import open_embedding
from surgery.growth.prepare import load_plan, prepare_run
from surgery.growth.report import growth_report
from surgery.growth.results import read_growth, read_training

_ROWS = ("rows.jsonl", "rows.json", "rows.csv", "rows.txt")


def _data(folder: Path, out: Path) -> None:
    refused = []
    for name in _ROWS:
        try:
            read_data(name)
        except SurgeryError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _texts(folder: Path, out: Path) -> None:
    read_text(Path("text.jsonl"))
    read_text(Path("rows.txt"))
    read_rows(Path("text.jsonl"))
    for _ in documents(["text.jsonl", "rows.txt"]):
        pass


def _plan(folder: Path, out: Path) -> None:
    prepare_run(load_plan("plan.yml"), out)


def _embedding(folder: Path, out: Path) -> None:
    open_embedding(folder / "emb")


def _growth(folder: Path, out: Path) -> None:
    growth_report(read_growth(folder / "run"))
    read_training(folder / "run" / "stage-1")
    read_index(folder / "run" / "tokens" / "tokens.json")


def _unpack(folder: Path, out: Path) -> None:
    unpack(str(folder / "out"), out, options=ONE_THREAD)


def _inspect_ensemble(folder: Path, out: Path) -> None:
    inspect_tables(inspect_checkpoint(open_checkpoint(folder / "out")))


def _journal(folder: Path, out: Path) -> None:
    with Journal(folder / "partial", FINGERPRINT) as journal:
        journal.record(0, 1)


def _scores(folder: Path, out: Path) -> None:
    read_scores(folder / "out")


def _findings(folder: Path, out: Path) -> None:
    found = read_findings(folder / "refusal")
    refusal_tables(found)
    refusal_sentences(found)
    read_examples(folder / "refusal")


def _experts(folder: Path, out: Path) -> None:
    found = read_expert_findings(folder / "experts")
    expert_tables(found)
    expert_sentences(found)
    read_examples(folder / "experts")


PLAN = ("plan.yml", "sums.txt", "words.txt")
RUN_TARGETS = (
    FuzzTarget("data", ("data",), _ROWS, _data, weight=3, named=_ROWS),
    FuzzTarget("texts", ("data",), ("text.jsonl", "rows.txt"), _texts, named=("text.jsonl", "rows.txt")),
    FuzzTarget("findings", ("findings",), ("refusal/*.json", "refusal/*.jsonl"), _findings, weight=2),
    FuzzTarget("expert findings", ("findings",), ("experts/*.json", "experts/*.jsonl"), _experts, weight=2),
    FuzzTarget("growth plan", ("growth",), ("plan.yml",), _plan, weight=2, named=PLAN, follows=True),
    FuzzTarget("embedding", ("growth",), ("emb/*",), _embedding),
    FuzzTarget("growth results", ("growth",), ("run/results.json", "run/*/*.json"), _growth, every=2),
    FuzzTarget("ensemble", ("ensemble",), ("out/config.json", "out/members/*.json", "out/*"), _inspect_ensemble),
    FuzzTarget(
        "unpack", ("ensemble",), ("out/config.json", "out/members/*.json", "out/members/*/*"), _unpack, weight=2
    ),
    FuzzTarget("scores", ("scores",), ("out/scores.json", "out/surgery.json"), _scores),
    FuzzTarget("journal", ("journal",), ("partial/*",), _journal, weight=2, writes=True),
)
