"""Findings are read back as they were written, belong to one model, and errors in them are named."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build, sibling
from support.damage import failures_of

from probes.data.examples import Example
from probes.data.records import (
    EXAMPLES,
    RESULTS,
    DataRecord,
    IntervalRecord,
    ModelRecord,
    check_model,
    interval_record,
    parse_top,
    read_examples,
    write_examples,
)
from probes.refusal.findings import (
    CausalRecord,
    CliffRecord,
    EffectRecord,
    Findings,
    GreedyStepRecord,
    HeadRecord,
    ProbeRecord,
    read_findings,
    write_findings,
)
from probes.refusal.tables import refusal_sentences, refusal_tables
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.errors import FAILED, WRONG_USAGE, SurgeryError
from surgery.evaluation.statistics import EstimateWithInterval

SOME = IntervalRecord(value=0.1 + 0.2, low=1e-300, high=1.0, n=7)
UNKNOWN = IntervalRecord(value=None)
PROBE = ProbeRecord(depth=2, auroc=SOME, accuracy=SOME, balanced_accuracy=0.5, ece=None, brier=1 / 3, selectivity=None)


def head(layer, index, exact, paper=0.0):
    return HeadRecord(
        layer=layer,
        head=index,
        exact=None if exact is None else IntervalRecord(value=exact),
        paper=IntervalRecord(value=paper),
    )


def findings(**changes):
    data = DataRecord(ref="d.jsonl", revision=None, xxh3="cd")
    step = GreedyStepRecord(heads=["L0H1"], score=SOME, refusal=UNKNOWN, kl=SOME, perplexity=12.5)
    causal = CausalRecord(
        ablation="scale 0",
        positions="last 4",
        method="cached prefix",
        cell="harmful/complied",
        n=3,
        effects=[EffectRecord(layer=0, head=1, effect=SOME)],
        spearman=UNKNOWN,
        candidates=["L0H1"],
        base=GreedyStepRecord(heads=[], score=SOME),
        steps=[step],
        stopped="all candidates are in the set",
        control=[[step], []],
        kl_budget=0.1,
    )
    known = {
        "model": ModelRecord(
            ref="m", repo_id=None, revision=None, xxh3="ab" * 16, tokenizer="t", template="c", dtype="float32"
        ),
        "data": data,
        "settings": {"folds": 5, "top": "3%", "refusals": ["I can’t", "“no”\n"]},
        "markers": {"opening": "<think>", "closing": "\n</think>\n\n"},
        "cells": {"harmful/complied": 3},
        "never_closed": 0,
        "generated": 1,
        "warnings": ["ein Wörtchen"],
        "folds": 5,
        "probes": [PROBE] * 3,
        "transfer": [PROBE] * 3,
        "transfer_data": data,
        "depth": 2,
        "cliffs": [
            CliffRecord(
                cell="harmful/complied",
                n=3,
                plateau=SOME,
                p90=SOME,
                last=SOME,
                final=SOME,
                misalignment=UNKNOWN,
                onset=-1.5,
            )
        ],
        "onset_cell": None,
        "heads_cell": "harmful/complied",
        "heads_n": 3,
        "heads": [head(0, 0, 0.5, -3.0), head(0, 1, -2.0, 1.0), head(1, 0, -2.0, -1.0)],
        "attribution": "exact",
        "unexplained": 1e-7,
        "skipped_layers": [2],
        "causal": causal,
    }
    return Findings(**known | changes)


@pytest.mark.parametrize("changes", [{}, {"causal": None, "transfer": None, "transfer_data": None, "markers": None}])
def test_findings_come_back_as_they_were(changes, tmp_path):
    written = findings(**changes)
    write_findings(tmp_path, written)
    assert read_findings(tmp_path) == written
    write_findings(tmp_path, read_findings(tmp_path))  # once more, over the old ones
    assert read_findings(tmp_path) == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "surgery.json"]


def test_the_file_says_what_it_is(tmp_path):
    write_findings(tmp_path, findings())
    record = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))
    assert (record["kind"], record["schema"]) == ("refusal", 1)
    assert json.loads((tmp_path / "surgery.json").read_text(encoding="utf-8"))["model"]["xxh3"] == "ab" * 16


def test_a_folder_without_findings_is_named(tmp_path):
    with pytest.raises(SurgeryError, match=r"nowhere: has no results.json. Give a folder that") as error:
        read_findings(tmp_path / "nowhere")
    assert error.value.exit_code == WRONG_USAGE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "holds 'refusal' of schema 2, expected 'refusal' of schema 1"),
        ({"schema": None}, "holds 'refusal' of schema nothing"),
        ({"kind": "merge"}, "holds 'merge' of schema 1"),
        ({"folds": "many"}, "folds: got 'many', expected a valid integer"),
        ({"strange": 1}, "strange: is not known here"),
        ({"attribution": "guess"}, "attribution: got 'guess', expected 'exact' or 'paper'"),
        ({"model": {"ref": "m"}}, "model.repo_id: is missing"),
        ({"heads": [{"layer": 0}]}, "heads.0.head: is missing"),
    ],
)
def test_findings_of_another_form_are_refused(change, message, tmp_path):
    write_findings(tmp_path, findings())
    path = tmp_path / RESULTS
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(SurgeryError) as error:
        read_findings(tmp_path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "Probe the model again" in error.value.hint


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_file_that_is_no_record_is_refused(text, tmp_path):
    (tmp_path / RESULTS).write_text(text, encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"results\.json"):
        read_findings(tmp_path)


def test_findings_that_lack_something_are_refused(tmp_path):
    write_findings(tmp_path, findings())
    path = tmp_path / RESULTS
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["heads"]
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SurgeryError, match="heads: is missing") as error:
        read_findings(tmp_path)
    assert error.value.exit_code == FAILED


def test_another_models_findings_are_refused(tmp_path):
    folder = build("llama", tmp_path / "mine")
    other = sibling(folder, tmp_path / "other", seed=1)
    mine = open_checkpoint(folder)
    known = findings(model=findings().model.model_copy(update={"xxh3": weights_hash(mine), "ref": "org/mine"}))
    check_model(known, mine, tmp_path / "run", options=ExecutionOptions())
    with pytest.raises(
        SurgeryError, match=r"run: its findings are of org/mine with the weights [0-9a-f]{12}…, but"
    ) as error:
        check_model(known, open_checkpoint(other), tmp_path / "run", options=ExecutionOptions())
    assert str(other) in str(error.value)
    assert error.value.exit_code == WRONG_USAGE
    assert error.value.hint == "Probe this model first; findings of another one say nothing about it."


def test_heads_are_ranked_by_the_attribution_in_use_ties_by_name():
    assert [row.name for row in findings().ranked] == [Head(0, 1), Head(1, 0), Head(0, 0)]
    assert [row.name for row in findings(attribution="paper").ranked] == [Head(0, 0), Head(1, 0), Head(0, 1)]
    assert [findings().score_of(row) for row in findings().heads] == [0.5, -2.0, -2.0]


EXAMPLE = Example(
    key="a/1",
    messages=({"role": "system", "content": "s"}, {"role": "user", "content": "q\u2028\nü"}),
    group="g",
    thinking="",
    closing="\n</think>\n\n",
    response=None,
    topic="harmful",
    refused=False,
    row={"prompt": "q", "n": [1]},
)


def test_examples_come_back_as_they_were(tmp_path):
    written = [EXAMPLE, replace(EXAMPLE, key="b", thinking=None, refused=None, topic=None, response="\x85 yes")]
    write_examples(tmp_path, written)
    assert read_examples(tmp_path) == written


@pytest.mark.parametrize("text", ["{", "[]", '{"key": "a"}', '{"key": "a", "messages": [], "group": "g", "more": 1}'])
def test_examples_of_another_form_are_refused(text, tmp_path):
    (tmp_path / EXAMPLES).write_text(text + "\n", encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"examples\.jsonl: cannot be read"):
        read_examples(tmp_path)
    with pytest.raises(SurgeryError, match=r"examples\.jsonl: cannot be read"):
        read_examples(tmp_path / "nowhere")


def test_what_is_no_number_is_stored_as_none():
    assert interval_record(EstimateWithInterval(0.5, math.nan, math.nan), 3) == IntervalRecord(
        value=0.5, low=None, high=None, n=3
    )
    assert interval_record(EstimateWithInterval(math.nan, 0.0, 1.0)) == IntervalRecord(value=None, low=0.0, high=1.0)


@given(part=st.integers(0, 10_000), of=st.integers(1, 5000))
def test_a_share_is_rounded_up(part, of):
    """`parse_top` against whole numbers: part / 10,000 of `of`, rounded up."""
    count = -(-part * of // 10_000)
    text = f"{part // 100}.{part % 100:02d}%"
    if count == 0:
        with pytest.raises(SurgeryError, match=r"--top: got .*, which is 0 of"):
            parse_top(text, of)
    else:
        assert parse_top(text, of) == count


@given(count=st.integers(-5, 50), of=st.integers(1, 30), space=st.sampled_from(["", " ", "\t"]))
def test_a_count_is_taken_as_it_is(count, of, space):
    if 1 <= count <= of:
        assert parse_top(f"{space}{count}{space}", of) == count
    else:
        with pytest.raises(SurgeryError, match=rf"which is {count} of {of}, expected 1 to {of}"):
            parse_top(str(count), of)


@given(st.text(max_size=8), st.integers(1, 1000))
def test_any_other_text_is_a_clear_error(text, of):
    try:
        assert 1 <= parse_top(text, of, where="--best") <= of
    except SurgeryError as error:
        assert str(error).startswith(f"--best: got {text!r}")
        assert error.exit_code == WRONG_USAGE


@pytest.mark.parametrize("text", ["", "%", "x", "1.5", "1e400%", "nan%", "inf%", "-1%", "101%", "3%%", "0"])
def test_what_is_neither_share_nor_count_is_refused(text):
    with pytest.raises(SurgeryError, match="--top: got"):
        parse_top(text, 100)


def test_shares_at_the_edges():
    assert [parse_top(text, 100) for text in ("7%", "0.1%", "100%", " 3 %", "1e1%")] == [7, 1, 100, 3, 10]
    assert parse_top("3%", 32) == 1


def test_damaged_findings_are_named_or_shown(tmp_path):
    write_findings(tmp_path, findings())

    def use():
        found = read_findings(tmp_path)
        assert len(found.ranked) == len(found.heads)
        refusal_sentences(found)
        for table in refusal_tables(found):
            table.to_markdown()

    assert failures_of(tmp_path / "results.json", use) == []
