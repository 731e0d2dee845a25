"""Refusal watched while it is written: the scores are those of the finished text, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import refusal as refusing
from support.chat_tokenizer import TEMPLATE
from support.refusal import CLOSE, CONTEXT, ONE_THREAD, make_model, make_run, no_pictures, rows_of, write_rows

from probes.data.examples import Example
from probes.data.markers import find_markers
from probes.data.preparation import GenerationOptions, open_model
from probes.data.tokenization import build_sequences
from probes.model.activations import project_hidden_states
from probes.refusal.cliffs import measure_cliff
from probes.refusal.findings import PROBES, read_findings
from probes.refusal.linear.probes import Probes
from probes.refusal.live_trace import LiveTrace, _encode_prompt, live_probe
from probes.refusal.probed_model import open_probed_model
from probes.refusal.run import probe_refusal
from surgery.errors import SurgeryError
from surgery.models.choices import SpecialTokens

ROWS = rows_of(dict.fromkeys(refusing.CELLS, 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        return make_run(model, tmp_path_factory.mktemp("runs") / "run", ROWS)


def look(model: Path, run: Path, prompt: str, **options: Any) -> LiveTrace:
    return live_probe(str(model), run, prompt, options=ONE_THREAD, **options)


def test_scores_are_those_of_the_finished_text(model: Path, run: Path) -> None:
    reported: list[tuple[str, float]] = []
    found = look(model, run, "ab!?cd", on_token=lambda text, score: reported.append((text, score)))
    assert found.tokens == ("h", "m", CLOSE, "Sure") and found.closed
    assert reported == list(zip(found.tokens, found.scores, strict=True))

    live, probes = open_model(str(model)), Probes.load(run / PROBES)
    example = Example("0", ({"role": "user", "content": "ab!?cd"},), "g", thinking="hm", response="Sure")
    (sequence,) = build_sequences(live.tokenizer, [example], find_markers(live.tokenizer, where="m"), where="m")
    (logits,) = project_hidden_states(live, [sequence], probes.weights, probes.biases)
    trace = logits[:, -1].double().sigmoid()
    assert list(found.scores) == pytest.approx(trace[sequence.ends[0] :].tolist(), abs=1e-5)
    expected = measure_cliff(sequence, trace.numpy(), cell="live", group="live")
    for name in ("plateau", "p90", "last", "final", "misalignment"):
        assert getattr(found.cliff, name) == pytest.approx(getattr(expected, name), abs=1e-5)
    assert (found.cliff.thinking, found.cliff.onset) == (2, expected.onset)


def test_a_cliff_is_told_in_words(model: Path, run: Path) -> None:
    cliff, refusal = look(model, run, "ab!?cd"), look(model, run, "ab!cd")
    assert cliff.cliff.misalignment > 0.8 > 0.2 > refusal.cliff.misalignment
    assert refusal.tokens[-1] == refusing.REFUSES
    assert cliff.sentence() == (
        f"Refusal score: {cliff.cliff.plateau:.3f} at most in 2 tokens of thinking, {cliff.cliff.final:.3f} just "
        f"before the answer; misalignment {cliff.cliff.misalignment:.3f}."
    )


def test_without_thinking_the_score_is_that_of_the_prompts_last_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pictures(monkeypatch)
    rows = [{key: value for key, value in row.items() if key != "thinking"} for row in ROWS]
    data = write_rows(tmp_path / "d.jsonl", rows)
    asking = GenerationOptions(no_thinking=True)
    probe_refusal(str(model), str(data), tmp_path / "run", asking=asking, options=ONE_THREAD)
    found = look(model, tmp_path / "run", "ab!cd", max_new_tokens=3)
    live, probes = open_model(str(model)), Probes.load(tmp_path / "run" / PROBES)
    example = Example("0", ({"role": "user", "content": "ab!cd"},), "g", response="Sure")
    (sequence,) = build_sequences(live.tokenizer, [example], None, where="m")
    (logits,) = project_hidden_states(live, [sequence], probes.weights, probes.biases)
    assert found.cliff.final == pytest.approx(float(logits[sequence.decision, -1].double().sigmoid()), abs=1e-5)
    assert found.closed and found.sentence().endswith("There was no thinking.")


def test_thinking_that_never_closes_ends_at_the_limit(model: Path, run: Path) -> None:
    found = look(model, run, "ab_cd", max_new_tokens=7)
    assert found.tokens == tuple("hmhmhmh") and not found.closed and len(found.scores) == 7
    assert found.sentence() == "The thinking did not close within 7 tokens."
    endless = look(model, run, "ab_cd")
    assert len(endless.tokens) == CONTEXT - len("ab_cd") - 5  # what the context has left


def test_what_does_not_fit_the_context_is_refused(model: Path, run: Path) -> None:
    with pytest.raises(SurgeryError, match=r"--live: the prompt has 305 tokens, and 1 more do not fit"):
        look(model, run, "abc" * 100)
    with pytest.raises(SurgeryError, match=r"--live: the prompt has 8 tokens, and 250 more do not fit .* of 256"):
        look(model, run, "abc", max_new_tokens=250)


def test_special_tokens_in_the_prompt_are_text_unless_asked_for(model: Path, run: Path) -> None:
    probed = open_probed_model(str(model), read_findings(run), run, dtype="auto", options=ONE_THREAD)
    prompt = "ab</s>cd"

    def ends(special_tokens: SpecialTokens) -> int:
        return _encode_prompt(probed, prompt, 1, special_tokens).count(probed.live.tokenizer.eos_token_id)

    assert ends("parse") == ends("text") + 1
    assert look(model, run, prompt).prompt == prompt  # the default
    found = [look(model, run, prompt, special_tokens=how).scores for how in ("text", "parse")]
    assert found[0] == look(model, run, prompt).scores != found[1]


def test_findings_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", template=TEMPLATE, bias=True)
    with pytest.raises(SurgeryError, match="its findings are of"):
        look(other, run, "abc")
