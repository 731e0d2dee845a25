"""A run from model and data to a folder of findings: its files, the truth of the findings, and resumption."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import refusal as refusing
from support.chat_tokenizer import make_tokenizer
from support.refusal import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    ONE_THREAD,
    SUPPRESSORS,
    WRITER,
    make_model,
    make_run,
    no_pictures,
    rows_of,
    write_rows,
)
from transformers import MambaConfig, MambaForCausalLM

from probes.data.examples import Example, TokenSequence
from probes.data.generation_cache import Completion, GenerationCache
from probes.data.markers import find_markers
from probes.data.preparation import GENERATIONS, GenerationOptions, open_model
from probes.data.records import EXAMPLES, REPORT, RESULTS, read_examples
from probes.data.tokenization import build_sequences
from probes.refusal.cliff_judge import judge
from probes.refusal.cliffs import measure_cliff
from probes.refusal.findings import HEADS as HEADS_FILE
from probes.refusal.findings import PROBES, TRACES, Findings, read_findings
from probes.refusal.fitted_probes import ProbeTraining, decision_states
from probes.refusal.heads.ablation_study import ProofOptions
from probes.refusal.heads.causal_proof import prove_heads
from probes.refusal.linear.probes import Probes
from probes.refusal.report import read_traces
from probes.refusal.run import probe_refusal
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Floats
from surgery.io.atomic import JOURNAL

FILES = (RESULTS, PROBES, TRACES, HEADS_FILE, EXAMPLES)
ROWS = rows_of(dict.fromkeys(refusing.CELLS, 8))
DEPTHS = LAYERS + 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything in it, pictures too."""
    return make_run(model, tmp_path_factory.mktemp("runs") / "run", ROWS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pictures(monkeypatch)


def probe(model: Path, out: Path, rows: Sequence[Mapping[str, Any]] = ROWS, **options: Any) -> Findings:
    data = write_rows(out.with_suffix(".jsonl"), rows)
    return probe_refusal(str(model), str(data), out, **{"options": ONE_THREAD, **options})


def contents(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FILES}


def by_prompt(run: Path) -> dict[str, Floats]:
    examples, _, traces = read_traces(run)
    return {example.prompt: trace for example, trace in zip(examples, traces, strict=True)}


# What lies in the folder


def test_results_are_read_back_as_they_were_found(model: Path, tmp_path: Path, quick: None) -> None:
    found = probe(model, tmp_path / "run", ROWS[::2], training=ProbeTraining(shuffles=1))
    assert read_findings(tmp_path / "run") == found
    record = json.loads((tmp_path / "run" / RESULTS).read_text())
    assert (record["schema"], record["kind"]) == (1, "refusal")
    manifest = json.loads((tmp_path / "run" / "surgery.json").read_text())
    assert manifest["kind"] == "refusal" and manifest["model"] == record["model"]


def test_tensors_have_the_documented_shapes(run: Path) -> None:
    probes, traces, heads = (load_file(run / name) for name in (PROBES, TRACES, HEADS_FILE))
    tokens = int(traces["ends"][:, 3].sum())
    assert {name: tuple(t.shape) for name, t in probes.items()} == {
        "weights": (DEPTHS, HIDDEN),
        "biases": (DEPTHS,),
        "out_of_fold": (32, DEPTHS),
        "fold": (32,),
        "fold_weights": (5, DEPTHS, HIDDEN),
        "fold_biases": (5, DEPTHS),
    }
    assert {name: (tuple(t.shape), t.dtype) for name, t in traces.items()} == {
        "scores": ((tokens,), torch.float32),
        "all": ((tokens, DEPTHS), torch.float16),
        "ends": ((32, 4), torch.int64),
    }
    scored = read_findings(run).heads_n
    assert {name: tuple(t.shape) for name, t in heads.items()} == {
        "exact": (scored, LAYERS, HEADS),
        "paper": (scored, LAYERS, HEADS),
        **{f"layer.{layer}": (HEADS, HEAD_DIM) for layer in range(LAYERS)},
    }


def test_results_are_what_the_tensors_say(run: Path) -> None:
    found, heads, traces = read_findings(run), load_file(run / HEADS_FILE), load_file(run / TRACES)
    for row in found.heads:
        assert row.exact is not None
        assert row.exact.value == pytest.approx(float(heads["exact"][:, row.layer, row.head].mean()), abs=1e-6)
        assert row.paper.value == pytest.approx(float(heads["paper"][:, row.layer, row.head].mean()), abs=1e-6)
    assert torch.allclose(traces["scores"], traces["all"][:, -1].float(), atol=1e-3)
    examples, sequences, scores = read_traces(run)
    for row in found.cliffs:
        own = [
            measure_cliff(s, t, cell=e.cell, group=e.group)
            for e, s, t in zip(examples, sequences, scores, strict=True)
            if e.cell == row.cell
        ]
        assert row.n == len(own) == 8
        for name in ("plateau", "p90", "last", "final", "misalignment"):
            assert getattr(row, name).value == pytest.approx(np.mean([getattr(c, name) for c in own]), abs=1e-6)


def test_traces_are_read_by_probes_that_did_not_see_the_example(model: Path, run: Path) -> None:
    live, probes = open_model(str(model)), Probes.load(run / PROBES)
    examples, sequences, scores = read_traces(run)
    made = build_sequences(live.tokenizer, examples, find_markers(live.tokenizer, where="m"), where="m")
    assert [s.ends for s in made] == [s.ends for s in sequences]
    final = [float(t[s.decision]) for s, t in zip(sequences, scores, strict=True)]
    assert final == pytest.approx(probes.out_of_fold[:, -1].tolist(), abs=1e-5)
    states = decision_states(live, made)[:, -1].double()
    for at, fold in enumerate(probes.fold.tolist()):
        logit = states[at] @ probes.fold_weights[fold, -1].double() + probes.fold_biases[fold, -1].double()
        assert final[at] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)


def test_the_report_is_one_page_with_tables_and_pictures(run: Path) -> None:
    page = (run / REPORT).read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 4
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "@import" not in page and "url(" not in page
    for text in ("harmful/complied", "Probes, by depth", "Cliffs", "Heads that write against refusal", "L1H2"):
        assert text in page
    assert page.count("<table") == 4
    assert {path.name for path in run.iterdir()} == {
        *FILES,
        REPORT,
        "surgery.json",
        "cliffs.png",
        "heads.png",
        "probes.png",
        "misalignment.png",
    }


# That it is true


def test_it_finds_the_cliff_and_the_heads_that_make_it(run: Path) -> None:
    found = read_findings(run)
    cliffs = {row.cell: row for row in found.cliffs}
    for cell, ends in (("harmful/complied", (0, 0.3)), ("harmful/refused", (0.7, 1))):
        assert (cliffs[cell].plateau.value or 0) > 0.8
        assert ends[0] <= (cliffs[cell].final.value or 0) <= ends[1]
    assert cliffs["harmful/complied"].onset == 0 and found.onset_cell == found.heads_cell == "harmful/complied"
    names = [str(row.name) for row in found.ranked]
    assert tuple(names[:2]) == SUPPRESSORS and names[-1] == WRITER
    assert all((row.exact.high or 0) < 0 for row in found.ranked[:2] if row.exact)
    assert found.unexplained is not None and found.unexplained < 1e-5
    assert found.probes[0].auroc.value == 0.5 and (found.probes[-1].auroc.value or 0) > 0.95


def test_the_four_cells_are_counted_and_nothing_is_warned_about(run: Path) -> None:
    found = read_findings(run)
    assert found.cells == dict.fromkeys(sorted(refusing.CELLS), 8)
    assert (found.never_closed, found.generated, found.warnings) == (0, 0, [])
    assert found.markers is not None and found.markers["close"] == refusing.CLOSE


def test_empty_cells_are_warned_about(model: Path, tmp_path: Path, quick: None) -> None:
    paper = [row for row in ROWS if row["label"] in ("harmful/refused", "harmless/complied")]
    found = probe(model, tmp_path / "run", paper)
    assert any("Topic and refusal coincide" in warning for warning in found.warnings)
    assert found.heads_cell == "harmful/refused"


def test_thinking_that_never_closes_is_counted_and_left_out(model: Path, tmp_path: Path, quick: None) -> None:
    endless = [{"prompt": "ab_c", "label": "harmful"}, {"prompt": "_b", "label": "harmless"}]
    found = probe(model, tmp_path / "run", [*ROWS, *endless], asking=GenerationOptions(max_new_tokens=12))
    assert (found.never_closed, found.generated, sum(found.cells.values())) == (2, 2, 32)
    assert any("2 examples were left out: their thinking never closed" in warning for warning in found.warnings)
    assert len(load_file(tmp_path / "run" / TRACES)["ends"]) == 32


def test_a_probe_that_is_no_better_than_chance_is_warned_about(model: Path, tmp_path: Path, quick: None) -> None:
    draw = random.Random(1)
    labels = [row["label"] for row in ROWS]
    draw.shuffle(labels)
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels, strict=True)]
    found = probe(model, tmp_path / "run", rows, training=ProbeTraining(shuffles=0))
    assert (found.probes[-1].auroc.low or 0) <= 0.5
    assert any("is no better than chance" in warning for warning in found.warnings)


def test_the_papers_two_cells_train_the_probe_and_all_are_traced(model: Path, tmp_path: Path, quick: None) -> None:
    found = probe(model, tmp_path / "run", training=ProbeTraining(cells="paper"))
    assert load_file(tmp_path / "run" / PROBES)["out_of_fold"].shape == (16, DEPTHS)
    assert {row.cell for row in found.cliffs} == set(refusing.CELLS)
    assert any("Topic and refusal coincide" in warning for warning in found.warnings)
    neither = [row for row in ROWS if row["label"] in ("harmful/complied", "harmless/refused")]
    with pytest.raises(SurgeryError, match="--cells paper: no example is harmful/refused or harmless/complied"):
        probe(model, tmp_path / "none", neither, training=ProbeTraining(cells="paper"))


def test_a_second_data_set_tests_the_probes_and_its_losses_are_reported(
    model: Path, tmp_path: Path, quick: None
) -> None:
    other = [*rows_of(dict.fromkeys(refusing.CELLS, 3), seed=1, whole=False), {"prompt": "a_", "label": "harmful"}]
    path = write_rows(tmp_path / "other.jsonl", other)
    found = probe(model, tmp_path / "run", transfer=str(path), asking=GenerationOptions(max_new_tokens=12))
    assert found.transfer is not None and found.transfer_data is not None
    assert len(found.transfer) == DEPTHS and (found.transfer[-1].auroc.value or 0) > 0.9
    assert found.transfer_data.ref == str(path) and found.generated == 0
    assert any("1 examples of the second data set were left out" in warning for warning in found.warnings)
    assert sum(found.cells.values()) == len(ROWS)


def test_verdicts_come_from_the_phrases_that_are_given_and_the_run_keeps_them(
    model: Path, tmp_path: Path, quick: None
) -> None:
    rows = [{**row, "label": row["label"].split("/")[0]} for row in ROWS]
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("Sure\n", encoding="utf-8")
    found = probe(model, tmp_path / "run", rows, asking=GenerationOptions(phrases=phrases))
    answers = {(e.response, e.refused) for e in read_examples(tmp_path / "run")}
    assert answers == {("I can't", False), ("Sure", True)}
    assert found.settings["asking"]["phrases"] == ["Sure"]


def test_verdicts_come_from_the_guard_that_is_given(
    model: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(examples: Sequence[Example], guard: object, **settings: object) -> list[Example]:
        return [Example(**{**vars(e), "refused": "=" not in e.prompt}) for e in examples]

    monkeypatch.setattr("probes.data.preparation.label_by_guard", stand_in)
    rows = [{**row, "label": row["label"].split("/")[0]} for row in ROWS]
    found = probe(model, tmp_path / "run", rows, asking=GenerationOptions(guard=str(model)))
    assert found.cells == {"harmful/refused": 16, "harmless/complied": 8, "harmless/refused": 8}


def test_given_markers_take_the_place_of_those_found(model: Path, tmp_path: Path, quick: None) -> None:
    found = probe(model, tmp_path / "run", asking=GenerationOptions(think_open="<think>", think_close="\n</think>\n"))
    assert found.markers is not None and found.markers["close"] == "</think>" and found.markers["after_close"] == "\n"
    text = load_file(tmp_path / "run" / TRACES)["ends"]
    assert set((text[:, 2] - text[:, 1]).tolist()) == {len("\n</think>\n")}  # a token a character


def test_a_model_that_does_not_think_has_probes_and_heads_and_no_cliffs(
    model: Path, tmp_path: Path, quick: None
) -> None:
    rows = [{key: value for key, value in row.items() if key != "thinking"} for row in ROWS]
    found = probe(model, tmp_path / "run", rows, asking=GenerationOptions(no_thinking=True))
    assert found.markers is None and found.cliffs == [] and found.onset_cell is None
    assert len(found.heads) == LAYERS * HEADS
    ends = load_file(tmp_path / "run" / TRACES)["ends"]
    assert torch.equal(ends[:, 0], ends[:, 2])


def test_the_papers_form_of_attribution_leaves_the_exact_one_out(model: Path, tmp_path: Path, quick: None) -> None:
    found = probe(model, tmp_path / "run", attribution="paper")
    assert found.unexplained is None and all(row.exact is None for row in found.heads)
    assert tuple(str(row.name) for row in found.ranked[:2]) == SUPPRESSORS
    assert load_file(tmp_path / "run" / HEADS_FILE)["exact"].isnan().all()


# That it is the same


def test_neither_the_order_of_the_data_nor_the_size_of_batches_matters(
    model: Path, run: Path, tmp_path: Path, quick: None
) -> None:
    rows = list(ROWS)
    random.Random(0).shuffle(rows)
    one, other = read_findings(run), probe(model, tmp_path / "other", rows, batch_tokens=40)
    assert [row.name for row in one.heads] == [row.name for row in other.heads]
    for a, b in zip(one.heads, other.heads, strict=True):
        for form in ("exact", "paper"):
            x, y = getattr(a, form), getattr(b, form)
            assert (y.value, y.low, y.high) == pytest.approx((x.value, x.low, x.high), abs=1e-5)
    for c, d in zip(one.cliffs, other.cliffs, strict=True):
        assert c.cell == d.cell and c.onset == d.onset
        for name in ("plateau", "p90", "last", "final", "misalignment"):
            x, y = getattr(c, name), getattr(d, name)
            assert (y.value, y.low, y.high) == pytest.approx((x.value, x.low, x.high), abs=1e-5)
    for e, f in zip(one.probes, other.probes, strict=True):
        assert (f.auroc.value, f.accuracy.value) == (e.auroc.value, e.accuracy.value)
    traces = [by_prompt(folder) for folder in (run, tmp_path / "other")]
    assert set(traces[0]) == set(traces[1])
    for prompt, trace in traces[0].items():
        assert np.allclose(trace, traces[1][prompt], atol=1e-5)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let the process die after so many cached batches of completions; None lets it live."""
    add, left = GenerationCache.add, [-1]

    def dying(self: GenerationCache, completions: Mapping[str, Completion]) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, completions)

    monkeypatch.setattr(GenerationCache, "add", dying)
    yield lambda count: left.__setitem__(0, count)


def test_a_run_that_was_killed_while_generating_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, quick: None, killed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(dict.fromkeys(refusing.CELLS, 5), whole=False)
    data, out = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "run"

    def go(to: Path) -> None:
        probe_refusal(str(model), str(data), to, asking=GenerationOptions(batch_size=4), options=ONE_THREAD)

    go(tmp_path / "whole")
    killed(3)
    with pytest.raises(KeyboardInterrupt):
        go(out)
    partial = tmp_path / "run.partial"
    assert not out.exists() and len((partial / GENERATIONS).read_text().splitlines()) == 12
    for name in ("cumulative.png", ".results.json.abc"):  # as a kill while writing would leave them
        (partial / name).write_text("cut short")
    killed(2)  # what is there is not made again: two batches are left
    go(out)
    assert contents(out) == contents(tmp_path / "whole")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert not partial.exists()


def test_a_fault_leaves_nothing_behind_where_nothing_was_generated(model: Path, tmp_path: Path) -> None:
    one_class = [row for row in ROWS if row["label"].endswith("complied")]
    with pytest.raises(SurgeryError, match="no example is refused"):
        probe(model, tmp_path / "run", one_class)
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_out_is_only_replaced_when_asked_and_only_if_it_is_ours(model: Path, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "run"
    probe(model, out, ROWS[::2])
    with pytest.raises(SurgeryError, match="run: exists already"):
        probe(model, out)
    found = probe(model, out, options=ExecutionOptions(threads=1, overwrite=True))
    assert read_findings(out) == found and sum(found.cells.values()) == 32
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with pytest.raises(SurgeryError, match="theirs: was not written by this tool"):
        probe(model, theirs, options=ExecutionOptions(threads=1, overwrite=True))


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused_by_its_option(strength: float, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="--strength: got"):
        probe(model, tmp_path / "run", training=ProbeTraining(strength=strength))


def test_only_the_first_examples_are_taken_where_that_is_asked(model: Path, tmp_path: Path, quick: None) -> None:
    mixed = [ROWS[at] for at in np.arange(32).reshape(4, 8).T.ravel()]
    assert sum(probe(model, tmp_path / "run", mixed, limit=16).cells.values()) == 16


def test_a_sequences_segments_are_kept_without_its_ids(run: Path) -> None:
    _, sequences, scores = read_traces(run)
    assert all(isinstance(s, TokenSequence) and len(t) == s.ends[3] for s, t in zip(sequences, scores, strict=True))


def test_a_model_without_attention_is_probed_and_its_layers_are_named(tmp_path: Path, quick: None) -> None:
    config = MambaConfig(
        vocab_size=96,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        intermediate_size=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    found = probe(tmp_path / "mamba", tmp_path / "run", ROWS[::4])
    assert (found.heads, found.skipped_layers, len(found.probes)) == ([], [0, 1], 3)
    assert read_findings(tmp_path / "run") == found


def test_another_jobs_work_in_the_way_is_told_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / JOURNAL).write_text("{}", encoding="utf-8")
    with pytest.raises(SurgeryError, match="holds another job's work"):
        probe_refusal(str(model), "nowhere.jsonl", tmp_path / "run")
    assert (tmp_path / "run.partial" / JOURNAL).exists()


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_what_a_probe_writes_has_the_modes_that_the_umask_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    if umask != 0o002:
        no_pictures(monkeypatch)  # once with the report
    model = make_model(tmp_path / "m")
    before = os.umask(umask)
    try:
        (tmp_path / "new").mkdir()
        run = make_run(model, tmp_path / "new" / "run", rows_of(dict.fromkeys(refusing.CELLS, 6)))
        prove_heads(str(model), run, proof=ProofOptions(controls=0, examples=4), options=ONE_THREAD)
        pool = write_rows(tmp_path / "pool.jsonl", [{"prompt": "ab!cd", "label": "harmful"}] * 4)
        judge(str(model), run, str(pool), tmp_path / "new" / "subset.jsonl", top="2", options=ONE_THREAD)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    assert len(modes) > 5
    # Except for what a rerun goes on from, which is its owner's alone.
    files = {path.name: mode for path, mode in modes.items() if path.is_file() and path.name != GENERATIONS}
    assert {"results.json", "examples.jsonl", "subset.jsonl"} < files.keys()
    assert set(files.values()) == {0o666 & ~umask}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o777 & ~umask}
