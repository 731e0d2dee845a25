"""Train the baselines that a growth is compared with: models of the final depth, trained in one go.

Up to four models are added to the run of a finished growth: with the same number of tokens or of operations, each with
the embedding frozen or trained. They draw the windows that the growth drew, in the same order. Reviewers of
arXiv 2507.07129 asked for this comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor

from surgery.checkpoint.checkpoint import read_folder
from surgery.checkpoint.structure import model_structure
from surgery.errors import usage_error
from surgery.growth.choices import BaselineBudget, BaselineEmbedding
from surgery.growth.layers.random_init import part_seed
from surgery.growth.options import RunOptions
from surgery.growth.plan import GrowthStage
from surgery.growth.prepare import PreparedRun, content_key
from surgery.growth.results import Budget, EmbeddingTraining, Growth, TrainedStage
from surgery.growth.run import (
    START_SUFFIX,
    create_run_context,
    create_start_model,
    evaluate_model,
    matching_baselines,
    read_existing_growth,
    read_existing_training,
    remove_folder,
    run_lock,
    stage_keys,
    write_results,
)
from surgery.growth.training.flops import forward_cost, training_cost
from surgery.growth.training.job import RunContext, TrainingJob
from surgery.growth.training.schedule import WindowSource
from surgery.growth.training.stage_runner import train_checkpoint
from surgery.io.hashing import hash_text


class ReplayedWindows:
    """The windows that a growth drew, stage after stage; after the last one they start again (a `WindowSource`).

    drawn: for each stage the position of its first window, and how many it drew.
    """

    def __init__(self, store: WindowSource, drawn: Sequence[tuple[int, int]]) -> None:
        self._store, self._drawn = store, tuple(drawn)
        self._total = sum(count for _, count in drawn)

    @property
    def identity(self) -> str:
        return hash_text(f"{self._store.identity} {self._drawn}")

    def require(self, n_windows: int) -> None:
        self._store.require(max(first + count for first, count in self._drawn))

    def window_at(self, position: int) -> int:
        # A baseline at the growth's operations may draw more windows than the growth did: then it starts over.
        at = position % self._total
        for first, count in self._drawn:
            if at < count:
                return self._store.window_at(first + at)
            at -= count
        raise AssertionError("unreachable: the counts add up to the total")

    def windows(self, indices: Sequence[int]) -> Tensor:
        return self._store.windows(indices)


def train_baselines(
    prepared: PreparedRun,
    *,
    budget: BaselineBudget = "both",
    embedding: BaselineEmbedding = "both",
    options: RunOptions = RunOptions(),
) -> Growth:
    """Train and measure the baselines that do not exist yet, and add them to results and report.

    Example:
        surgery.train_baselines(surgery.prepare_run(plan, Path("RUN")), embedding="frozen")

    Args:
        budget: what they get as much of as the growth had: tokens, operations (as if nothing had been cached), or one
            model for each.
        embedding: whether it is frozen, as in the growth, or trained too, or one model for each.

    Raises:
        SurgeryError: the growth is not finished; it deepened an existing model, whose training cannot be repeated in
            one go; else as `grow`.
    """
    # Before the lock, which creates the folder: where there is no growth, nothing is left behind.
    _finished_growth(prepared)
    with run_lock(prepared.run):
        return _train_baselines(prepared, budget, embedding, options)


def _train_baselines(
    prepared: PreparedRun, budget: BaselineBudget, embedding: BaselineEmbedding, options: RunOptions
) -> Growth:
    plan, run = prepared.plan, prepared.run
    growth = _finished_growth(prepared)
    context = create_run_context(prepared, options)
    keys = stage_keys(prepared, context)
    if [stage.training.key for stage in growth.stages] != keys:
        raise usage_error(
            "holds a growth of another plan, start or corpus", where=run, hint="Give those that it was grown by."
        )
    stages = [
        TrainedStage(training=s.training, scores=evaluate_model(prepared, s.training, options, growth))
        for s in growth.stages
    ]
    # What was drawn, not what the plan says: a plateau may have ended a stage early.
    drawn = [(s.training.first_window, s.training.steps * plan.batch) for s in growth.stages]
    context = replace(context, store=ReplayedWindows(context.store, drawn))
    budgets: tuple[Budget, ...] = ("tokens", "flops") if budget == "both" else (budget,)
    embeddings: tuple[EmbeddingTraining, ...] = ("frozen", "trained") if embedding == "both" else (embedding,)
    baselines = {model.training.name: model for model in matching_baselines(growth, plan, keys[-1])}
    for one_budget, one_embedding in product(budgets, embeddings):
        model = _train_baseline(prepared, growth, context, one_budget, one_embedding)
        baselines[model.training.name] = model
        write_results(prepared, stages, _sorted(baselines))
    return write_results(prepared, stages, _sorted(baselines), report=True)


def _finished_growth(prepared: PreparedRun) -> Growth:
    growth = read_existing_growth(prepared.run)
    if prepared.plan.embed is None:
        raise usage_error(
            "deepens a model whose own training is not known, so that there is nothing to compare with", where="start"
        )
    if growth is None or len(growth.stages) < len(prepared.plan.expanded):
        raise usage_error(
            "holds no growth that is done, of which the baselines take tokens and operations",
            where=prepared.run,
            hint="`surgery grow run PLAN -o RUN` comes first.",
        )
    return growth


def _train_baseline(
    prepared: PreparedRun, growth: Growth, context: RunContext, budget: Budget, embedding: EmbeddingTraining
) -> TrainedStage:
    plan, last = prepared.plan, growth.stages[-1].training
    name = f"baseline-{budget}-{embedding}"
    seed, start = part_seed(plan.seed, name), prepared.run / f"{name}{START_SUFFIX}"
    # The last stage's key covers all stages, whose windows and operations the baseline takes.
    key = content_key(prepared.key, last.key, name, plan.training.model_dump(mode="json"))
    record = read_existing_training(prepared.run / name, key)
    if record is None:
        create_start_model(prepared, start, layers=last.layers)
        stage = GrowthStage(
            add=0,
            init="random",
            train=("all",) if embedding == "trained" else ("new", "head", "norm"),
            tokens=_budget_tokens(prepared, growth, start.name, budget),
            training=plan.training,
        )
        # Every layer counts as new: all of them train from the start.
        new = tuple(range(last.layers))
        record = train_checkpoint(context, TrainingJob(name, start, stage, new, key, seed, 0, None, budget))
        remove_folder(start)
    return TrainedStage(training=record, scores=evaluate_model(prepared, record, context.options, growth))


def _budget_tokens(prepared: PreparedRun, growth: Growth, start: str, budget: Budget) -> int:
    """Return how many tokens a baseline may train on."""
    if budget == "tokens":
        return sum(stage.training.tokens for stage in growth.stages)
    # Costs are computed of the model itself, so that they hold for every family.
    checkpoint = read_folder(prepared.run / start)
    forward = forward_cost(checkpoint, model_structure(checkpoint), sequence=prepared.plan.sequence)
    per_token = training_cost(forward, depth=0, trained=range(len(forward.layers)), head=True).whole
    return max(1, int(sum(stage.training.flops for stage in growth.stages) / per_token))


def _sorted(baselines: Mapping[str, TrainedStage]) -> list[TrainedStage]:
    """Return baselines in the order of results.json: by name, descending (tokens before flops)."""
    return [baselines[name] for name in sorted(baselines, reverse=True)]
