"""What growth is to be compared with: models of the final depth, trained in one go on what the growth saw.

In comes a plan whose growth is done, out come up to four models in the same run: at the same tokens and at the same
operations, with the embedding frozen and trained. They draw the windows that the growth drew, in the same order. As
reviewers of arXiv 2507.07129 asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

from torch import Tensor

from surgery.checkpoint.checkpoint import read_folder
from surgery.checkpoint.structure import model_structure
from surgery.errors import usage_error
from surgery.growth.layers.random_init import seed_of
from surgery.growth.plan import GrowthStage
from surgery.growth.prepare import PreparedRun, key_of
from surgery.growth.results import Budget, Embedding, Growth, TrainedStage
from surgery.growth.run import (
    RunOptions,
    comparable,
    held_growth,
    kept,
    made,
    publish,
    remove,
    run_context,
    scores_of,
    stage_keys,
)
from surgery.growth.training.checkpointed import RunContext, TrainingJob, train_checkpoint
from surgery.growth.training.flops import sizes, step_cost
from surgery.growth.training.lr_schedule import Windows
from surgery.io.hashing import hash_text

Budgets = Literal["tokens", "flops", "both"]
Embeddings = Literal["frozen", "trained", "both"]


class SameOrder:
    """The windows that a growth drew, stage after stage; behind the last one they begin again.

    drawn: for each stage the first that it drew, and how many. See `course.Windows`.
    """

    def __init__(self, store: Windows, drawn: Sequence[tuple[int, int]]) -> None:
        self._store, self._drawn = store, tuple(drawn)
        self._total = sum(count for _, count in drawn)

    @property
    def identity(self) -> str:
        return hash_text(f"{self._store.identity} {self._drawn}")

    def require(self, n_windows: int) -> None:
        self._store.require(max(first + count for first, count in self._drawn))

    def number_of(self, drawn: int) -> int:
        at = drawn % self._total
        for first, count in self._drawn:
            if at < count:
                return self._store.number_of(first + at)
            at -= count
        raise AssertionError("unreachable: the counts add up to the total")

    def windows(self, numbers: Sequence[int]) -> Tensor:
        return self._store.windows(numbers)


def train_baselines(
    begun: PreparedRun, *, budget: Budgets = "both", embedding: Embeddings = "both", doing: RunOptions = RunOptions()
) -> Growth:
    """Trains the baselines that are not there yet, measures them, and adds them to results and report.

    Args:
        budget: what they get as much of as the growth had: tokens, operations (as if nothing had been cached), or one
            model for each.
        embedding: whether it is frozen, as in the growth, or trains too, or one model for each.

    Raises:
        SurgeryError: the growth is not done; it deepened a model that was there before, which nothing can be trained
            like in one go; else as `grow`.
    """
    plan, run = begun.plan, begun.run
    growth = held_growth(run)
    if plan.embed is None:
        raise usage_error(
            "deepens a model whose own training is not known, so that there is nothing to compare with", where="start"
        )
    if growth is None or len(growth.stages) < len(plan.expanded):
        raise usage_error(
            "holds no growth that is done, of which the baselines take tokens and operations",
            where=run,
            hint="`surgery grow run PLAN -o RUN` comes first.",
        )
    shared = run_context(begun, doing)
    keys = stage_keys(begun, shared)
    if [stage.training.key for stage in growth.stages] != keys:
        raise usage_error(
            "holds a growth of another plan, start or corpus", where=run, hint="Give those that it was grown by."
        )
    stages = [
        TrainedStage(training=s.training, scores=scores_of(begun, s.training, doing, growth)) for s in growth.stages
    ]
    drawn = [(s.training.first_window, s.training.steps * plan.batch) for s in growth.stages]
    ground = RunContext(
        run,
        SameOrder(shared.store, drawn),
        shared.sequence,
        shared.batch,
        shared.cache,
        shared.cached_windows,
        shared.device,
        shared.made_from,
        shared.save_every,
        shared.logs,
        shared.progress,
    )
    budgets: tuple[Budget, ...] = ("tokens", "flops") if budget == "both" else (budget,)
    embeddings: tuple[Embedding, ...] = ("frozen", "trained") if embedding == "both" else (embedding,)
    found = {model.training.name: model for model in comparable(growth, plan, keys[-1])}
    for one, other in product(budgets, embeddings):
        model = _baseline(begun, growth, ground, one, other, doing)
        found[model.training.name] = model
        publish(begun, stages, _ordered(found))
    return publish(begun, stages, _ordered(found), report=True)


def _baseline(
    begun: PreparedRun, growth: Growth, ground: RunContext, budget: Budget, embedding: Embedding, doing: RunOptions
) -> TrainedStage:
    plan, last = begun.plan, growth.stages[-1].training
    name = f"baseline-{budget}-{embedding}"
    seed, begins = seed_of(plan.seed, name), begun.run / f"{name}.start"
    key = key_of(begun.key, last.key, name, plan.training.model_dump(mode="json"))
    record = kept(begun.run / name, key)
    if record is None:
        made(begun, begins, layers=last.layers)
        stage = GrowthStage(
            add=0,
            init="random",
            train=("all",) if embedding == "trained" else ("new", "head", "norm"),
            tokens=_tokens(begun, growth, begins.name, budget),
            training=plan.training,
        )
        new = tuple(range(last.layers))
        record = train_checkpoint(
            ground, TrainingJob(name, begins, stage, new, key, seed, 0, None, plan, embedding, budget)
        )
        remove(begins)
    return TrainedStage(training=record, scores=scores_of(begun, record, doing, growth))


def _tokens(begun: PreparedRun, growth: Growth, start: str, budget: Budget) -> int:
    """What the budget comes to in tokens."""
    if budget == "tokens":
        return sum(stage.training.tokens for stage in growth.stages)
    checkpoint = read_folder(begun.run / start)
    size = sizes(checkpoint, model_structure(checkpoint), sequence=begun.plan.sequence)
    each = step_cost(size, depth=0, trained=range(len(size.layers)), head=True).whole
    return max(1, int(sum(stage.training.flops for stage in growth.stages) / each))


def _ordered(found: dict[str, TrainedStage]) -> list[TrainedStage]:
    return [found[name] for name in sorted(found, reverse=True)]
