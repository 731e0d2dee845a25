"""Baselines get as many tokens, or operations, as the growth had, on its windows, with the embedding frozen or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.growth_runs import BATCH, CPU, SEQUENCE, STEPS, TOKENS, grown, prepared, write_corpora, write_substrate
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.growth.baseline import ReplayedWindows, train_baselines
from surgery.growth.report import comparison_table, growth_report, verdicts
from surgery.growth.results import Growth, read_growth
from surgery.growth.run import grow

NAMES = ["baseline-tokens-trained", "baseline-tokens-frozen", "baseline-flops-trained", "baseline-flops-frozen"]


class Numbered:
    """Windows that are their own numbers; the store wraps at 10."""

    identity = "numbered"

    def __init__(self) -> None:
        self.required = 0

    def require(self, n_windows: int) -> None:
        self.required = n_windows

    def window_at(self, drawn: int) -> int:
        return drawn % 10

    def windows(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_corpora(folder)
    write_substrate(folder)
    texts = {"texts": [str(folder / "words.txt")], "limit": 1}
    grown(folder, folder / "run", evaluate=texts)
    train_baselines(prepared(folder, folder / "run", plan=folder / "run.yml"), options=CPU)
    return folder


@pytest.fixture(scope="module")
def growth(bench: Path) -> Growth:
    return read_growth(bench / "run")


def test_windows_come_in_the_order_of_the_growth_and_then_again() -> None:
    store = Numbered()
    order = ReplayedWindows(store, [(0, 3), (8, 4), (0, 2)])
    assert [order.window_at(at) for at in range(12)] == [0, 1, 2, 8, 9, 0, 1, 0, 1, 0, 1, 2]
    order.require(1)
    assert store.required == 12
    assert order.identity != ReplayedWindows(store, [(0, 4), (8, 4), (0, 2)]).identity


def test_four_models_of_the_final_depth_are_trained(bench: Path, growth: Growth) -> None:
    records = {model.training.name: model.training for model in growth.baselines}
    assert list(records) == NAMES
    assert {record.layers for record in records.values()} == {3}
    assert all(model.scores for model in growth.baselines)
    table = load_file(bench / "emb/embedding.safetensors")["embedding"]
    for name, record in records.items():
        held = load_file(bench / f"run/{name}/model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(held, table) == (record.embedding == "frozen")
        assert record.proven == (1 if record.embedding == "frozen" else 0)


def test_tokens_are_the_growths_and_operations_are_no_more_than_its(growth: Growth) -> None:
    flops = sum(stage.training.flops for stage in growth.stages)
    for model in growth.baselines:
        record = model.training
        if record.budget == "tokens":
            assert record.tokens == 3 * TOKENS
        else:
            step = record.flops / record.steps
            assert flops - step < record.flops < flops + step
            assert record.steps < 3 * STEPS


def test_growth_costs_less_for_each_token_than_all_layers_at_once(growth: Growth) -> None:
    costs = [stage.training.flops / stage.training.tokens for stage in growth.stages]
    whole = growth.baselines[0].training.flops / growth.baselines[0].training.tokens
    assert costs == sorted(costs) and costs[2] < whole


def test_the_report_says_which_way_it_comes_out(growth: Growth) -> None:
    sentences = verdicts(growth)
    assert len(sentences) == len(NAMES)
    grown_loss = next(s.value for s in growth.stages[2].scores if s.metric == "nats per token")
    for model, sentence in zip(growth.baselines, sentences, strict=True):
        theirs = next(s.value for s in model.scores if s.metric == "nats per token")
        word = "worse" if grown_loss > theirs else "better"
        assert sentence.startswith(f"Against {model.training.name}, on ")
        assert f"the grown model is {word} by {abs(grown_loss - theirs):.3f} nats per token" in sentence
    page = growth_report(growth).to_html()
    assert all(name in page for name in NAMES)
    assert len(comparison_table(growth).rows) == 3 + len(NAMES)


def test_baselines_stay_when_the_growth_is_run_again(bench: Path, growth: Growth) -> None:
    assert grow(prepared(bench, bench / "run", plan=bench / "run.yml"), CPU) == growth


def test_one_of_them_may_be_asked_for(bench: Path, tmp_path: Path) -> None:
    grown(bench, tmp_path / "run", stages=[{"tokens": TOKENS}])
    asked = prepared(bench, tmp_path / "run", plan=tmp_path / "run.yml")
    found = train_baselines(asked, budget="tokens", embedding="frozen", options=CPU)
    assert [model.training.name for model in found.baselines] == ["baseline-tokens-frozen"]
    # One layer, all at once: a growth of one stage is nothing else.
    assert found.baselines[0].training.tokens == TOKENS == STEPS * BATCH * SEQUENCE
    assert verdicts(found) and "in training alone" in verdicts(found)[0]


def test_there_must_be_a_growth_to_compare_with(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="holds no growth that is done"):
        train_baselines(prepared(bench, tmp_path / "run"), options=CPU)
