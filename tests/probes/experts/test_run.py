"""Promises of experts.run: one run finds the experts that were planted, says what its texts cannot show, goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.architectures import build
from support.chat_tokenizer import make_tokenizer
from support.moe import (
    AT_M,
    AT_THINK,
    CLOSING,
    OPENING,
    THOUGHT,
    make_thinker,
    no_pictures,
    rows,
    stub_tasks,
    write_rows,
)
from support.moe_families import EXPERTS
from support.processes import fork_ranks

from probes.data.generation_cache import Completion, GenerationCache
from probes.data.preparation import GENERATIONS, GenerationOptions
from probes.data.records import check_model, read_examples
from probes.experts.findings import ExpertFindings, read_expert_findings
from probes.experts.run import probe_experts
from probes.experts.scoring import Support
from probes.experts.sweep import CHOICE, BetaGrid
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.errors import WRONG_USAGE, SurgeryError

ROOT = Path(__file__).parents[3]
ONE_THREAD = ExecutionOptions(threads=1)
THINKING = (OPENING, f"-{CLOSING}")
BARE = 24  # rows without an answer, which the model gives


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `m`, whole rows and bare ones."""
    folder = tmp_path_factory.mktemp("experts")
    make_thinker(folder / "m")
    write_rows(folder / "d.jsonl", rows(60))
    write_rows(folder / "other.jsonl", rows(60, seed=1))
    write_rows(folder / "bare.jsonl", rows(BARE, whole=False))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pictures(monkeypatch)


def probe(bench: Path, out: Path, data: str = "d.jsonl", tokens: Any = THINKING, **how: Any) -> ExpertFindings:
    how = {"options": ONE_THREAD, **how}
    return probe_experts(str(bench / "m"), str(bench / data), tokens, out, **how)


def test_the_planted_expert_comes_first_and_all_experts_are_there(bench: Path, tmp_path: Path, quick: None) -> None:
    found = probe(bench, tmp_path / "run")
    stored = json.loads((tmp_path / "run/results.json").read_text())
    assert (stored["schema"], stored["kind"]) == (1, "experts")
    first = stored["experts"][0]
    assert (first["layer"], first["expert"], first["npmi"]) == (AT_THINK.layer, AT_THINK.index, pytest.approx(2))
    assert (first["rank"], first["fires"], first["at_marker"], first["by_marker"]) == (1, 60, 60, [1, -1])
    assert {(row["layer"], row["expert"]) for row in stored["experts"]} == {
        (layer, expert) for layer in range(2) for expert in range(EXPERTS)
    }
    ranks = [row["rank"] for row in stored["experts"]]
    ranked = [rank for rank in ranks if rank is not None]
    assert ranked == list(range(1, len(ranked) + 1)) and ranks == [*ranked, *[None] * (16 - len(ranked))]
    scores = [row["smoothed"]["value"] for row in stored["experts"] if row["rank"] is not None]
    assert scores == sorted(scores, reverse=True)
    assert all(row["why"] for row in stored["experts"] if row["rank"] is None)
    assert first["norm_ratio"] > 0 and first["rate"] == pytest.approx(60 / found.positions)
    assert read_expert_findings(tmp_path / "run") == found
    check_model(found, open_checkpoint(str(bench / "m")), tmp_path / "run", options=ONE_THREAD)


def test_what_was_counted_is_told(bench: Path, tmp_path: Path, quick: None) -> None:
    found = probe(bench, tmp_path / "run", tokens=[THOUGHT, f"-0.5*{CLOSING}"])
    examples = read_examples(tmp_path / "run")
    assert (found.sequences, found.generated, len(examples)) == (60, 0, 60)
    assert [(m.text, m.weight, m.positions) for m in found.markers] == [(THOUGHT, 1, 60), (CLOSING, -0.5, 60)]
    # <s>, <user>, the letters, </s>, <bot>, <think> and a line; hm, the closing template of 5; S.
    assert found.by_part == {
        "prompt": sum(len(example.prompt) for example in examples) + 6 * 60,
        "thinking": 60 * (2 + 4),
        "answer": 60,
    }
    assert found.positions == sum(found.by_part.values())
    assert (found.layers, found.n_experts, found.top_k) == ([0, 1], [EXPERTS, EXPERTS], [2, 2])
    assert found.experts[0].name == AT_M and found.warnings == []


def test_a_marker_that_stands_only_in_the_prompt_is_warned_of(bench: Path, tmp_path: Path, quick: None) -> None:
    found = probe(bench, tmp_path / "run")
    assert len(found.warnings) == 1 and found.warnings[0].startswith("Every '<think>' stands in the prompt")


def test_answers_are_generated_where_they_lack(bench: Path, tmp_path: Path, quick: None) -> None:
    found = probe(bench, tmp_path / "run", "bare.jsonl", support=Support(fires=10, at_marker=10))
    assert (found.generated, found.sequences) == (BARE, BARE)
    assert {(e.thinking, e.response) for e in read_examples(tmp_path / "run")} == {(THOUGHT, "S")}
    assert found.experts[0].name == AT_THINK
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "run" / GENERATIONS).exists()


def test_a_second_data_set_is_held_against_the_first(bench: Path, tmp_path: Path, quick: None) -> None:
    found = probe(bench, tmp_path / "run", transfer=str(bench / "other.jsonl"))
    overlap = found.overlap
    assert overlap is not None and overlap.data.ref == str(bench / "other.jsonl")
    assert str(AT_THINK) in overlap.shared and 0 < overlap.jaccard <= 1
    same = probe(bench, tmp_path / "same", transfer=str(bench / "d.jsonl")).overlap
    assert same is not None and same.jaccard == 1 and same.spearman.value == pytest.approx(1)
    assert same.shared == [str(row.name) for row in found.ranked[:10]]


def test_where_no_expert_has_evidence_the_run_says_so_and_is_written(bench: Path, tmp_path: Path) -> None:
    found = probe(bench, tmp_path / "run", support=Support(fires=10_000))
    assert found.ranked == [] and found.warnings[-1].startswith("No expert has evidence enough to be ranked")
    assert all(row.rank is None and row.norm_ratio is None for row in found.experts)
    assert "No expert has evidence enough" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_a_sweep_goes_into_the_findings_and_the_report(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(asked: Any) -> float:
        return 0.8 if asked.scales == {AT_M: 4.0} else 0.5

    asked = stub_tasks(monkeypatch, score)
    grid = BetaGrid([1, 4], ["t"], top=1, controls=2)
    found = probe(bench, tmp_path / "run", tokens=[THOUGHT], grid=grid, asking=GenerationOptions(max_new_tokens=12))
    assert found.sweep is not None and found.sweep.best == 4 and found.sweep.experts == [str(AT_M)]
    assert [point.collapsed and point.collapsed.n for point in found.sweep.points[:2]] == [32, 32]
    assert [a.part for a in asked[:2]] == [CHOICE, CHOICE]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "β = 4, chosen on one half of t" in page and "β, chosen and tested" in page
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"experts.png", "ranking.png", "beta-0.png"}
    assert read_expert_findings(tmp_path / "run") == found


# Killed, and several processes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jsonl")}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets so many batches of completions be kept before the process dies."""
    add, left = GenerationCache.add, [-1]

    def dying(self: GenerationCache, completions: Mapping[str, Completion]) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, completions)

    monkeypatch.setattr(GenerationCache, "add", dying)
    yield lambda count: left.__setitem__(0, count)


def test_a_run_that_was_killed_while_generating_goes_on_to_the_same_bytes(
    bench: Path, tmp_path: Path, quick: None, killed: Callable[[int], None]
) -> None:
    how: dict[str, Any] = {"data": "bare.jsonl", "asking": GenerationOptions(batch_size=4)}
    probe(bench, tmp_path / "whole", **how)
    killed(2)
    with pytest.raises(KeyboardInterrupt):
        probe(bench, tmp_path / "run", **how)
    partial = tmp_path / "run.partial"
    assert not (tmp_path / "run").exists() and len((partial / GENERATIONS).read_text().splitlines()) == 8
    killed(BARE // 4 - 2)  # what is there is not made again
    probe(bench, tmp_path / "run", **how)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole") and not partial.exists()


SCRIPT = """
import sys
from pathlib import Path

sys.path[:0] = sys.argv[2:]
from test_run import BARE, ONE_THREAD, THINKING
from probes.experts.run import probe_experts
from probes.experts.scoring import Support
from probes.data.preparation import GenerationOptions
import torch

torch.set_num_threads(1)
bench = Path(sys.argv[1])
probe_experts(
    str(bench / "m"), str(bench / "bare.jsonl"), THINKING, Path("run"), asking=GenerationOptions(batch_size=4),
    support=Support(fires=10), batch_tokens=60, transfer=str(bench / "d.jsonl"), options=ONE_THREAD,
)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(bench: Path, tmp_path: Path) -> None:
    paths = [ROOT, ROOT / "tests", Path(__file__).parent]
    for world, count in (("one", 1), ("two", 2)):
        (tmp_path / world).mkdir()
        codes, said, _ = fork_ranks(SCRIPT, bench, *paths, world=count, cwd=tmp_path / world)
        assert codes == [0] * count, said
    assert contents(tmp_path / "two/run") == contents(tmp_path / "one/run")
    assert not list(tmp_path.glob("*/*.partial"))


# Bad input


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], "no marker was given"),
        (["漢"], "--token: '漢' is not in the model's vocabulary"),
        (["Zebra"], "--token: 'Zebra' never occurs in 60 texts"),
        ([f"-{OPENING}"], "--token: got -1[*]<think>, expected finite weights, one of them above 0"),
        (["nan*hm"], "expected finite weights"),
        ([OPENING, f"-{OPENING}"], "--token: '<think>' is given twice"),
    ],
)
def test_markers_that_say_nothing_are_told_and_leave_nothing(
    tokens: list[str], text: str, bench: Path, tmp_path: Path
) -> None:
    with pytest.raises(SurgeryError, match=text) as caught:
        probe(bench, tmp_path / "run", tokens=tokens)
    assert caught.value.exit_code == WRONG_USAGE and list(tmp_path.iterdir()) == []


def test_markers_are_looked_at_before_anything_is_generated(
    bench: Path, tmp_path: Path, killed: Callable[[int], None]
) -> None:
    killed(0)
    for tokens in (["漢"], [f"-{OPENING}"], [OPENING, OPENING]):
        with pytest.raises(SurgeryError):
            probe(bench, tmp_path / "run", "bare.jsonl", tokens)


def test_a_dense_model_has_no_experts(bench: Path, tmp_path: Path) -> None:
    build("llama", tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(SurgeryError, match="dense: no layer routes tokens to experts") as caught:
        probe_experts(str(tmp_path / "dense"), str(bench / "d.jsonl"), THINKING, tmp_path / "run")
    assert caught.value.exit_code == WRONG_USAGE and not (tmp_path / "run").exists()


def test_an_unknown_task_is_told_before_the_model_is_opened(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_tasks(monkeypatch, lambda asked: 0.5)
    with pytest.raises(SurgeryError, match="no such task: x"):
        probe_experts("nowhere", str(bench / "d.jsonl"), THINKING, tmp_path / "run", grid=BetaGrid([2], ["x"]))


def test_out_is_only_replaced_when_asked(bench: Path, tmp_path: Path, quick: None) -> None:
    probe(bench, tmp_path / "run")
    with pytest.raises(SurgeryError, match="run: exists already"):
        probe(bench, tmp_path / "run")
    found = probe(bench, tmp_path / "run", limit=30, options=ExecutionOptions(threads=1, overwrite=True))
    assert read_expert_findings(tmp_path / "run") == found and found.sequences == 30


def test_findings_of_another_kind_or_version_are_told(bench: Path, tmp_path: Path, quick: None) -> None:
    probe(bench, tmp_path / "run", limit=12)
    path = tmp_path / "run/results.json"
    held = json.loads(path.read_text())
    for change, text in (
        ({"kind": "refusal"}, "holds 'refusal' of schema 1, expected 'experts' of schema 1"),
        ({"schema": 9}, "holds 'experts' of schema 9"),
        ({"experts": [{"layer": "x"}]}, "experts.0.layer: "),
        ({"more": 1}, "more: is not known here"),
    ):
        path.write_text(json.dumps({**held, **change}))
        with pytest.raises(SurgeryError, match=text):
            read_expert_findings(tmp_path / "run")
    with pytest.raises(SurgeryError, match=r"m: has no results.json.* `surgery probe experts"):
        read_expert_findings(bench / "m")
