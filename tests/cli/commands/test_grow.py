"""`surgery grow …` as a user types it: from a text to a model that grew, two that were merged, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import Surgery, commands_in, contents, run_command
from support.growth_runs import TOKENS, WIDTH, write_corpora, write_plan
from transformers import AutoModelForCausalLM

from cli.commands.reproduce import reproduce

GROW = ("grow", "run", "plan.yml", "--embed", "emb", "--device", "cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two corpora, the tokenizer `tok`, the embedding `emb`, `plan.yml`, and `sums`, a run of it."""
    folder = tmp_path_factory.mktemp("bench")
    write_corpora(folder)
    write_plan(folder, stages=[{"times": 2, "tokens": TOKENS}], evaluate={"texts": ["sums.txt", "words.txt"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ("grow", "tokenizer", "sums.txt", "words.txt", "--vocab", "320", "-o", "tok"),
            ("grow", "embed", "tok", "--kind", "glyphs", "--cell", "16", "--width", WIDTH, "-o", "emb"),
            (*GROW, "--corpus", "sums.txt", "-o", "sums"),
        ):
            assert run_command(patch, *words) == 0
    return folder


@pytest.fixture
def surgery(bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    """Runs a command in this process, in the folder `bench`."""
    return commands_in(bench, monkeypatch, capsys, columns=220)


# The whole way


def test_two_specialists_on_one_substrate_are_merged_by_their_logits(surgery: Surgery, bench: Path) -> None:
    done = surgery(*GROW, "--corpus", "words.txt", "-o", "words")
    assert done.code == 0 and "Stages" in done.out and "stage-2" in done.out
    assert "Report: words/report.html" in done.err
    merged = surgery("merge", "logits", "sums/stage-2", "words/stage-2", "-o", "both", "--threads", "1")
    assert merged.code == 0, merged.err
    ids = torch.arange(8)[None]
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(bench / f"{name}/stage-2")(ids).logits for name in ("sums", "words")
        )
        both = AutoModelForCausalLM.from_pretrained(bench / "both", trust_remote_code=True)(ids).logits
    torch.testing.assert_close(both, (one + other) / 2, rtol=1e-5, atol=1e-6)
    texts = ("--perplexity", "sums.txt", "--perplexity", "words.txt")
    scored = surgery("eval", "sums/stage-2", "words/stage-2", "both", *texts, "--json")
    values = {(s["model"], s["task"]): s["value"] for s in scored.json["scores"] if s["metric"] == "nats per token"}
    assert len(values) == 6
    assert values["sums/stage-2", "sums.txt"] < values["words/stage-2", "sums.txt"]
    assert values["words/stage-2", "words.txt"] < values["sums/stage-2", "words.txt"]


def test_a_run_is_compared_with_its_baselines(surgery: Surgery, bench: Path) -> None:
    done = surgery(
        "grow",
        "baseline",
        "plan.yml",
        "--embed",
        "emb",
        "--corpus",
        "sums.txt",
        "--device",
        "cpu",
        "--embedding",
        "frozen",
        "--budget",
        "tokens",
        "-o",
        "sums",
    )
    assert done.code == 0 and "baseline-tokens-frozen" in done.out
    assert "Against baseline-tokens-frozen, on sums.txt: the grown model is" in done.err
    assert json.loads((bench / "sums/results.json").read_text())["baselines"]


def test_the_same_command_again_changes_nothing(surgery: Surgery, bench: Path) -> None:
    models = {path: contents(path) for path in (bench / "sums/stage-1", bench / "sums/stage-2")}
    again = surgery(*GROW, "--corpus", "sums.txt", "-o", "sums", "--json")
    assert again.code == 0 and len(again.json["stages"]) == 2
    assert {path: contents(path) for path in models} == models


def test_a_model_is_begun_and_deepened_by_hand(surgery: Surgery, bench: Path, tmp_path: Path) -> None:
    begun = surgery(
        "grow",
        "init",
        "--embed",
        "emb",
        "--hidden",
        WIDTH,
        "--heads",
        "2",
        "--mlp",
        "24",
        "--context",
        "8",
        "-o",
        tmp_path / "m0",
    )
    assert begun.code == 0 and f"Wrote {tmp_path / 'm0'}" in begun.err
    one = surgery("grow", "add", tmp_path / "m0", "--init", "random", "-o", tmp_path / "m1", "--threads", "1")
    assert one.code == 0 and "New layers" in one.out
    two = surgery("grow", "add", tmp_path / "m1", "--at", "0", "-o", tmp_path / "m2", "--json", "--threads", "1")
    assert two.json["new"] == [0]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / m)(ids).logits for m in ("m1", "m2"))
    assert torch.equal(before, after)


def test_the_shipped_plans_are_named_and_sized(surgery: Surgery, bench: Path) -> None:
    for name, depth in (("one-by-one", 6), ("small", 6), ("three-by-three", 9)):
        shown = surgery("grow", "run", name, "--embed", "emb", "--corpus", "sums.txt", "-o", "none", "--dry-run")
        assert (shown.code, shown.out) == (0, "")
        assert f"from 0 to {depth} layers" in shown.err and "Nothing written" in shown.err
    assert not (bench / "none").exists()


@pytest.mark.parametrize("kind", ["bits", "random", "table"])
def test_embeddings_of_every_kind(surgery: Surgery, bench: Path, tmp_path: Path, kind: str) -> None:
    more = ("--from", "sums/stage-2") if kind == "table" else ("--width", "32")
    made = surgery("grow", "embed", "tok", "--kind", kind, *more, "-o", tmp_path / "emb", "--json")
    assert made.code == 0 and made.json["vocab_size"] == 320
    table = load_file(tmp_path / "emb/embedding.safetensors")["embedding"]
    assert table.shape == (320, WIDTH if kind == "table" else 32)


def test_a_stage_and_a_baseline_are_made_again_from_their_manifests(surgery: Surgery, bench: Path) -> None:
    texts = ("--embed", "emb", "--corpus", "sums.txt", "--device", "cpu", "--threads", "1")
    assert surgery("grow", "run", "plan.yml", *texts, "-o", "again").code == 0
    asked = ("--embedding", "frozen", "--budget", "flops", "-o", "again")
    assert surgery("grow", "baseline", "plan.yml", *texts, *asked).code == 0
    for name in ("stage-1", "stage-2", "baseline-flops-frozen"):
        found = reproduce(f"again/{name}", run=lambda words: surgery(*words).code)
        assert found.same and found.tensors > 9, name


# Refusals


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("grow", "run", "none.yml", "-o", "x"), 2, "none.yml: no such plan. Give a YAML file, or one of"),
        (("grow", "run", "plan.yml", "-o", "x"), 2, "plan.yml: says neither embed nor start"),
        ((*GROW, "-o", "x"), 2, "plan.yml: names no corpus"),
        ((*GROW, "--corpus", "none", "-o", "x"), 2, "none: no such file or folder"),
        ((*GROW, "--corpus", "empty.txt", "-o", "x"), 2, "empty.txt: holds no text"),
        ((*GROW, "--corpus", "sums.txt", "--seed", "1", "-o", "sums"), 1, "made with another seed"),
        ((*GROW, "--corpus", "sums.txt", "-o", "tok"), 2, "tok: is not empty, and no growth"),
        (("grow", "run", "bad.yml", "-o", "x"), 2, "bad.yml:2: stages[0].tokns: is not known"),
        (("grow", "run", "plan.yml", "--embed", "tok", "--corpus", "sums.txt", "-o", "x"), 1, "tok: "),
        (("grow", "add", "sums/stage-2", "--at", "9", "-o", "x"), 2, "9"),
        (("grow", "add", "sums/stage-2", "--at", "mid", "-o", "x"), 2, "--at: got 'mid', expected top or middle"),
        (("grow", "add", "sums/stage-2", "--init", "zero", "-o", "x"), 2, "--init: got 'zero'"),
        (("grow", "init", "--embed", "emb", "--hidden", "17", "-o", "x"), 2, "hidden: got 17, expected the embedding"),
        (("grow", "init", "--embed", "emb", "--heads", "3", "-o", "x"), 2, "3 heads do not divide"),
        (("grow", "embed", "tok", "--kind", "glyph", "-o", "x"), 2, "Did you mean glyphs?"),
        (("grow", "embed", "none", "-o", "x"), 2, "none"),
        (("grow", "embed", "tok", "--font", "sums.txt", "--width", "16", "-o", "x"), 2, "sums.txt"),
        (("grow", "embed", "tok", "--kind", "bits", "--width", "17", "-o", "x"), 2, "17"),
        (("grow", "tokenizer", "sums.txt", "--vocab", "9", "-o", "x"), 2, "9"),
        (("grow", "tokenizer", "empty.txt", "--vocab", "400", "-o", "x"), 2, "empty.txt"),
        (("grow", "baseline", "plan.yml", "--embed", "emb", "--corpus", "sums.txt", "-o", "x"), 2, "holds no growth"),
        (("grow", "baseline", "plan.yml", "--budget", "time", "-o", "x"), 2, ""),
    ],
)
def test_bad_input_is_refused_in_a_line(
    surgery: Surgery, bench: Path, tmp_path: Path, words: tuple[object, ...], code: int, message: str
) -> None:
    (bench / "empty.txt").write_text("\n")
    (bench / "bad.yml").write_text("stages:\n  - {tokns: 5}\n")
    out = tmp_path / "x"
    refused = surgery(*(out if word == "x" else word for word in words))
    assert (refused.code, refused.out) == (code, "")
    assert refused.err.startswith("error: ") and message in refused.err
    assert "Traceback" not in refused.err
    assert not list(tmp_path.iterdir())
