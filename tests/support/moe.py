"""Build tiny mixtures of experts with a known answer: one expert of one layer fires (almost) only at one token.

`plant` sets the router of a family's model by hand; `make_thinker` is a Qwen3-MoE that writes, too: `hm</think>S`
behind every prompt, and `hmhmhm…` for ever once the expert that fires at `m` is scaled enough. Its experts at `<think>`
and `m` are `AT_THINK` and `AT_M`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_tokenizer import make_tokenizer
from support.models import open_folder
from support.moe_families import EXPERTS, FAMILIES, HIDDEN, NARROW, VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from probes.data.examples import TokenSequence
from probes.model.expert_scaling import ExpertScaling, scaled_routing
from probes.model.routers import Router
from surgery.checkpoint.selectors import Expert
from surgery.errors import SurgeryError
from surgery.evaluation.scoring import Score
from surgery.models.loaded_model import LoadedModel

PLANTED = Expert(1, 5)
MARKER = 6  # `<think>`, in the tokenizer of `support.chat_tokenizer`

_CONSTANT, _OWN = 0, 1


def plant(name: str, folder: Path, *, seed: int = 0) -> LoadedModel:
    """Return a model of family `name` whose expert `PLANTED` fires at the token `MARKER`, and hardly anywhere else.

    The marker's embedding is large in a dimension that all others lack and the expert's router row reads; the row is
    repelled by a dimension that all tokens have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[name]())
        with torch.no_grad():
            for held in model.state_dict().values():
                if held.is_floating_point() and held.dim() > 1:
                    held.normal_(0, 0.02)
            embedding = model.get_input_embeddings().weight
            embedding.normal_(0, 1)
            embedding[:, _CONSTANT] = 2
            embedding[:, _OWN] = 0
            embedding[MARKER] *= 0.1
            embedding[MARKER, _OWN] = 8
            for number, router in enumerate(router_matrices(model)):
                router.normal_(0, 1)
                router[:, [_CONSTANT, _OWN]] = 0
                if number == PLANTED.layer:
                    router[PLANTED.index] = 0
                    router[PLANTED.index, _OWN], router[PLANTED.index, _CONSTANT] = 4, -4
    model.save_pretrained(folder)
    return open_folder(folder)


def router_matrices(model: Any) -> list[Tensor]:
    """Return the router's weight of each layer, (experts, hidden); a dummy where a layer has none."""
    stack = model.base_model.layers
    return [
        next(
            (p for name, p in layer.named_parameters() if "experts" not in name.split(".")[-2:] and _is_router(p)),
            torch.zeros(EXPERTS, HIDDEN),
        )
        for layer in stack
    ]


def _is_router(parameter: Tensor) -> bool:
    return parameter.dim() == 2 and parameter.shape[1] == HIDDEN and parameter.shape[0] in (EXPERTS, EXPERTS + 2)


def texts(
    count: int, *, length: int = 20, seed: int = 0, markers: Sequence[Sequence[int]] = ((MARKER,),)
) -> list[TokenSequence]:
    """Return random sequences of about `length` tokens with each of `markers` at a random position."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    found = []
    for at in range(count):
        ids = torch.randint(10, VOCABULARY, (length + number(0, 7),), generator=draw).tolist()
        for phrase in markers:
            where = number(0, len(ids) + 1)
            ids[where:where] = list(phrase)
        third = len(ids) // 3
        found.append(TokenSequence(f"s{at}", tuple(ids), (third, 2 * third - 1, 2 * third, len(ids))))
    return found


# The model that writes

AT_THINK, AT_M = Expert(1, 3), Expert(1, 6)
LAYERS = 2
OPENING, CLOSING = "<think>", "</think>"
THOUGHT, ANSWER = "hm", "S"
COLLAPSING = 2.0**20  # of AT_M
_WRITTEN = (OPENING, "\n", "h", "m", CLOSING, ANSWER)
_FOLLOWING = {OPENING: "h", "\n": "h", "h": "m", "m": CLOSING, CLOSING: ANSWER, ANSWER: "</s>"}


def make_thinker(folder: Path) -> Path:
    """Save the model with its tokenizer into `folder`, and return `folder`.

    The next token depends on the last one alone, as long as no expert is scaled.
    """
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    config = Qwen3MoeConfig(
        **{
            **NARROW,
            "num_experts": EXPERTS,
            "norm_topk_prob": True,
            "head_dim": 8,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1e-3)
            embedding = model.model.embed_tokens.weight
            embedding.normal_(0, 0.5)
            embedding[:, : 1 + len(_WRITTEN)] = 0
            embedding[:, _CONSTANT] = 1
            own = {token: 1 + at for at, token in enumerate(_WRITTEN)}
            for token, dimension in own.items():
                embedding[vocabulary[token]] *= 0.1
                embedding[vocabulary[token], _CONSTANT] = 1
                embedding[vocabulary[token], dimension] = 4
            for layer in model.model.layers:
                layer.mlp.gate.weight.normal_(0, 1)
                layer.mlp.gate.weight[:, : 1 + len(_WRITTEN)] = 0
            for expert, token in ((AT_THINK, OPENING), (AT_M, "m")):
                mlp = model.model.layers[expert.layer].mlp
                row = mlp.gate.weight[expert.index]
                row.zero_()
                row[own[token]], row[_CONSTANT] = 4, -8
                # Half of the first matrix is the gate; what it lets through is written where `<think>` stands.
                first, width = mlp.experts.gate_up_proj[expert.index], config.moe_intermediate_size
                first[0, own[token]] = first[width, own[token]] = 1
                mlp.experts.down_proj[expert.index][own[OPENING], 0] = 1e-3
            head = model.lm_head.weight
            for token, successor in _FOLLOWING.items():
                head[vocabulary[successor], own[token]] = 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, *, whole: bool = True, seed: int = 0) -> list[dict[str, str]]:
    """Return prompts of random letters; `whole` ones with the thinking and the answer that the model would write."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for at in range(count):
        letters = torch.randint(26, (6 + at % 5,), generator=draw).tolist()
        prompt = "".join(chr(ord("A") + letter) for letter in letters)
        found.append({"prompt": prompt} | ({"thinking": THOUGHT, "response": ANSWER} if whole else {}))
    return found


def write_rows(path: Path, listed: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    return path


Lives = Callable[[str], LoadedModel]


def planter(folder: Path) -> Lives:
    """Return `plant` with a cache: each model is built once, in a folder below `folder`."""
    made: dict[str, LoadedModel] = {}

    def get(name: str) -> LoadedModel:
        if name not in made:
            made[name] = plant(name, folder / name)
        return made[name]

    return get


def experts_modules(live: LoadedModel) -> dict[int, Any]:
    """Return layer → the module that applies its experts, found by class name: independent of the tested code."""
    found = {}
    for number, layer in enumerate(live.layers):
        for module in layer.modules():
            if type(module).__name__.endswith("Experts"):
                found[number] = module
    return found


def watch_experts(live: LoadedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return layer → the arguments of its experts in a pass over `ids` (N, T): states, indices and weights."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    handles = []
    for number, module in experts_modules(live).items():

        def keep(_: Any, given: tuple[Tensor, Tensor, Tensor], number: int = number) -> None:
            seen[number] = (given[0].clone(), given[1].clone(), given[2].clone())

        handles.append(module.register_forward_pre_hook(keep))
    try:
        with torch.inference_mode():
            live.body(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def logits_of(live: LoadedModel, ids: Tensor) -> Tensor:
    """Return the logits, (N, T, vocabulary)."""
    with torch.inference_mode():
        logits: Tensor = live.model(ids, use_cache=False).logits
    return logits


# Tasks that are no tasks


@dataclass(frozen=True)
class Asked:
    """One evaluation of a task: how experts were scaled, and on which part of its samples."""

    task: str
    scales: Mapping[Expert, float]
    part: tuple[int, int] | None


def stub_tasks(
    patch: pytest.MonkeyPatch, score: Callable[[Asked], float], *, known: Sequence[str] = ("t",)
) -> list[Asked]:
    """Replace the harness's tasks by tasks named `known`, scored by `score`; return the list of their evaluations.

    Each runs one pass of the model.
    """
    from probes.experts import sweep as expert_sweep

    now: list[ExpertScaling] = []
    asked: list[Asked] = []

    @contextmanager
    def entered(live: LoadedModel, routers: Sequence[Router], how: ExpertScaling) -> Iterator[Any]:
        with scaled_routing(live, routers, how) as applied:
            now.append(how)
            try:
                yield applied
            finally:
                now.pop()

    def on_tasks(tasks: Sequence[str], *, part: tuple[int, int] | None = None, **_: Any) -> list[Any]:
        def measure(loaded: Any, task: str) -> list[Score]:
            with torch.inference_mode():
                loaded.model(torch.tensor([[2, MARKER]]))
            asked.append(Asked(task, dict(now[-1].scales), part))
            value = score(asked[-1])
            return [Score(loaded.name, task, "accuracy", value, value - 0.1, value + 0.1, 20, True)]

        if unknown := [task for task in tasks if task not in known]:
            raise SurgeryError(f"no such task: {unknown[0]}")
        return [partial(measure, task=task) for task in tasks]

    patch.setattr(expert_sweep, "scaled_routing", entered)
    patch.setattr(expert_sweep, "on_tasks", on_tasks)
    return asked


def no_pictures(patch: pytest.MonkeyPatch) -> None:
    """Leave reports out, which take longer than everything else."""
    patch.setattr("probes.experts.results.write_expert_report", lambda folder, *, name: folder)
