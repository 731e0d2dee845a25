"""Costs that follow from a model's matrices are those that torch counts while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.architectures import VOCABULARY
from support.models import make_live
from torch.utils.flop_counter import FlopCounterMode

from surgery.checkpoint.structure import model_structure
from surgery.growth.plan import GrowthStage, TrainableParts
from surgery.growth.training.flops import forward_cost, training_cost
from surgery.growth.training.stage_model import prepare_stage_model
from surgery.models.forward_pass import partial_forward, tupled_layers
from surgery.models.loaded_model import LoadedModel

ROWS, LENGTH, LAYERS = 2, 16, 3


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    live = make_live("llama", tmp_path_factory.mktemp("flops") / "m", num_hidden_layers=LAYERS)
    live.model.set_attn_implementation("eager")  # whose products are counted one by one
    return live


def counted(counter: FlopCounterMode) -> float:
    """Per token, as `flops` counts: of the products inside attention, half, since a causal one sees half."""
    found = {str(product): flops for product, flops in counter.get_flop_counts()["Global"].items()}
    assert found.keys() <= {"aten.mm", "aten.bmm"}
    return (found["aten.mm"] + found.get("aten.bmm", 0) / 2) / (ROWS * LENGTH)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("train", "new"),
    [
        (("new", "head", "norm"), [2]),  # all below is frozen
        (("new", "head", "norm"), [0]),  # all above is frozen
        (("new", "head", "norm"), [1]),  # both
        (("new",), [1]),  # a frozen head above, too
        (("new", "head"), [0, 1, 2]),
        (("head", "norm"), []),
        (("head",), []),  # whose input needs no gradient
        (("norm",), []),
        (("all",), []),
        (("embedding", "head"), []),
    ],
)
def test_training_costs_what_torch_counts(
    live: LoadedModel, train: Sequence[TrainableParts], new: list[int], cached: bool
) -> None:
    model = prepare_stage_model(live, GrowthStage(train=tuple(train), tokens=1), new, seed=0)
    layers = range(LAYERS) if "all" in train else new
    said = set(train)
    cost = training_cost(
        forward_cost(live.checkpoint, model_structure(live.checkpoint), sequence=LENGTH),
        depth=model.depth,
        trained=layers,
        head=bool(said & {"head", "all"}),
        norm=bool(said & {"norm", "all"}),
    )
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens, hidden = ids[:, :-1], None
    if cached:
        hidden = partial_forward(live, tokens, 0, None, model.depth, tupled=tupled_layers(live))
    live.model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        model(tokens, ids[:, 1:], hidden if model.depth else None).backward()
    assert counted(counter) == (cost.above if cached else cost.whole)
