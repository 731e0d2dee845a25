"""Promises of experts.evaluate: every model is scored twice, as it is and reinforced, which scores as baked does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.moe import AT_M, COLLAPSING, THOUGHT, make_thinker, no_pictures, rows, write_rows

from probes.experts.evaluate import add_scaled_models
from probes.experts.run import probe_experts
from surgery.checkpoint.resolve import open_checkpoint
from surgery.edits.experts import scale_experts
from surgery.engine.options import ExecutionOptions
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.evaluation.perplexity import on_texts, read_text
from surgery.evaluation.scoring import Score, score_models
from surgery.models.loading import ModelAndTokenizer, load_model

ONE_THREAD = ExecutionOptions(threads=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reinforced")
    make_thinker(folder / "m")
    write_rows(folder / "d.jsonl", rows(60))
    (folder / "text.txt").write_text("ABC<think>hm</think>S\nhmhm, hm? S")
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        probe_experts(str(folder / "m"), str(folder / "d.jsonl"), [THOUGHT], folder / "run", options=ONE_THREAD)
    return folder


def hooks_of(loaded: ModelAndTokenizer) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.model.modules())


def twice(bench: Path, measures: Any, names: tuple[str, ...] = ("m",), **how: Any):
    opened = {name: open_checkpoint(str(bench / name)) for name in names}
    how = {"top": 1, "scale": 64.0, "phase": "all", "options": ONE_THREAD, **how}
    return add_scaled_models(opened, measures, bench / "run", **how)


@pytest.mark.filterwarnings("ignore:.*its texts hold special tokens:surgery.errors.SurgeryWarning")
def test_each_model_has_a_column_as_it_is_and_one_reinforced(bench: Path, tmp_path: Path) -> None:
    models, measures = twice(bench, on_texts([read_text(bench / "text.txt")]), scale=COLLAPSING)
    assert [(name, model.folder) for name, model in models.items()] == [
        ("m", bench / "m"),
        (f"m + {AT_M} × 1.04858e+06", bench / "m"),
    ]
    scores = score_models(models, measures)
    by_model: dict[str, list[tuple[str, float]]] = {}
    for score in scores:
        by_model.setdefault(score.model, []).append((score.metric, score.value))
    assert list(by_model) == list(models)
    scale_experts(str(bench / "m"), tmp_path / "baked", scales={AT_M: COLLAPSING})
    plain = score_models({"m": bench / "m", "b": tmp_path / "baked"}, on_texts([read_text(bench / "text.txt")]))
    values = [[(s.metric, s.value) for s in plain if s.model == name] for name in ("m", "b")]
    assert list(by_model.values()) == values and values[0] != values[1]


def test_the_model_is_let_go_as_it_was(bench: Path) -> None:
    seen: list[tuple[ModelAndTokenizer, int]] = []

    def measure(loaded: ModelAndTokenizer) -> list[Score]:
        seen.append((loaded, hooks_of(loaded)))
        return [Score(loaded.name, "t", "accuracy", 0.5, 0.4, 0.6, 10)]

    def fail(loaded: ModelAndTokenizer) -> list[Score]:
        seen.append((loaded, hooks_of(loaded)))
        raise ZeroDivisionError

    models, measures = twice(bench, [fail])
    with pytest.raises(ZeroDivisionError):
        measures[0](load_model(bench / "m", next(name for name in models if "×" in name)))
    models, measures = twice(bench, [measure], phase="generated")
    for name in models:
        if "×" in name:
            with pytest.raises(SurgeryError, match="t: no token was generated one by one"):
                measures[0](load_model(bench / "m", name))
        else:
            measures[0](load_model(bench / "m", name))
    reinforced, plain, generated = seen
    assert (reinforced[1] - plain[1], generated[1] - plain[1]) == (1, 2)
    assert {hooks_of(loaded) for loaded, _ in seen} == {plain[1]}


@pytest.mark.filterwarnings("ignore:.*its texts hold special tokens:surgery.errors.SurgeryWarning")
def test_a_phase_that_reaches_nothing_is_told_not_scored(bench: Path) -> None:
    models, measures = twice(bench, on_texts([read_text(bench / "text.txt")]), phase="generated")
    with pytest.raises(SurgeryError, match="so that --phase generated changed nothing") as caught:
        score_models(models, measures)
    assert caught.value.exit_code == WRONG_USAGE


def test_findings_of_another_model_are_refused(bench: Path) -> None:
    other = Path(shutil.copytree(bench / "m", bench / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"run: its findings are of .*other has the weights"):
        twice(bench, [], ("m", "other"))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"top": 99}, "--top: .* 99 were asked for"),
        ({"scale": -1.0}, "got β = -1"),
        ({"scale": float("nan")}, "got β = nan"),
        ({"phase": "prompt"}, "--phase: got 'prompt'"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(how: dict[str, Any], text: str, bench: Path) -> None:
    with pytest.raises(SurgeryError, match=text) as caught:
        twice(bench, [], **how)
    assert caught.value.exit_code == WRONG_USAGE
