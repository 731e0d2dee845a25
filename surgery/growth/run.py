"""A whole growth: stage after stage, each from the checkpoint before, in one folder that can be gone on with.

In comes a plan, out comes RUN/ with `stage-1`, `stage-2`, … (plain checkpoints), `results.json`, `report.html`, and the
tokens that they were trained on. What is done is known by a key, a hash of all that it follows from: a stage that lies
there with its key is kept, one with another key is never overwritten.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.evaluation.perplexity import on_texts
from surgery.evaluation.scoring import score_models
from surgery.growth.data.token_store import TokenStore
from surgery.growth.layers.add import add_layers
from surgery.growth.layers.init_model import init_model
from surgery.growth.layers.random_init import seed_of
from surgery.growth.plan import PLAN, GrowthPlan, GrowthStage, plan_text
from surgery.growth.prefix_cache.cache import cache_bytes
from surgery.growth.prepare import TOKENS, PreparedRun, key_of, shape_of
from surgery.growth.report import growth_report
from surgery.growth.results import (
    REPORT,
    RESULTS,
    Embedding,
    Growth,
    ScoreRecord,
    TrainedStage,
    TrainingRecord,
    read_growth,
    read_training,
    write_growth,
)
from surgery.growth.training.checkpointed import RunContext, TrainingJob, train_checkpoint
from surgery.io.atomic import write_file
from surgery.runtime.collectives import barrier, local_device, on_main
from surgery.runtime.environment import is_main
from surgery.runtime.progress import Progress, silent

START = "start"
# What trains below the new layers, so that nothing there can be cached.
MOVING = {"lora", "embedding", "all"}


@dataclass(frozen=True)
class RunOptions:
    """How a growth is run; none of it changes a result beyond rounding.

    device: cpu or cuda[:N]; None takes a GPU where there is one. threads: of the processor; None leaves torch's number.
    save_every: minutes between two states to go on from. logs: whether TensorBoard's files are written.
    """

    device: str | None = None
    threads: int | None = None
    save_every: float = 5.0
    logs: bool = False
    progress: Progress = field(default=silent, compare=False)


def grow(begun: PreparedRun, doing: RunOptions = RunOptions()) -> Growth:
    """Trains every stage that is not there yet, measures it, and writes results and report; all processes call it.

    Raises:
        SurgeryError: as `add_layers`, `train_checkpoint` and the measurements; a stage lies there that another plan
            made.
    """
    plan, run = begun.plan, begun.run
    ground = run_context(begun, doing)
    keys, held = stage_keys(begun, ground), held_growth(run)
    baselines = comparable(held, plan, keys[-1])
    drawn, done = 0, list[TrainedStage]()
    for index, (stage, key) in enumerate(zip(plan.expanded, keys, strict=True), start=1):
        name = f"stage-{index}"
        first = drawn if stage.data == "continue" else 0
        record = kept(run / name, key)
        if record is None:
            before = run / f"stage-{index - 1}" if index > 1 else _start(begun)
            seed, begins = seed_of(plan.seed, name), run / f"{name}.start"
            start, new = _deepened(before, stage, begins, seed, doing)
            passes = _passes(plan, index - 1, ground.cached_windows)
            embedding: Embedding = "trained" if {"embedding", "all"} & set(stage.train) else "frozen"
            job = TrainingJob(name, start, stage, new, key, seed, first, passes, plan, embedding)
            record = train_checkpoint(ground, job)
            remove(begins)
        drawn = first + record.steps * plan.batch
        model = TrainedStage(training=record, scores=scores_of(begun, record, doing, held))
        done.append(model)
        if held is None or model not in held.stages:
            publish(begun, done, baselines)
    remove(ground.cache_folder)
    return publish(begun, done, baselines, report=True)


def run_context(begun: PreparedRun, doing: RunOptions) -> RunContext:
    """What the trainings of a run share; the corpus is opened, and the run's folder made.

    Raises:
        SurgeryError: the folder cannot be written; as `TokenStore`; the cache's room does not suffice for anything.
    """
    plan, run = begun.plan, begun.run
    if doing.threads is not None:
        torch.set_num_threads(doing.threads)
    store = TokenStore(
        run / TOKENS,
        plan.corpus,
        begun.tokenizer,
        sequence=plan.sequence,
        seed=plan.seed,
        field=plan.field,
        eos=begun.tokenizer.eos_token_id,
        vocab_size=begun.vocab_size,
        progress=doing.progress,
    )
    # From now on the folder is known as a growth's, whatever ends this run.
    (run / TOKENS).mkdir(parents=True, exist_ok=True)
    # As many windows as the longest stage draws, where the corpus has so many.
    drawn = max(_firsts(plan)[at] + steps * plan.batch for at, steps in enumerate(plan.steps_of))
    least = cache_bytes(1, plan.sequence, begun.width, getattr(torch, plan.cache.dtype))
    if plan.cache.use != "off" and drawn * least <= plan.cache.disk:
        store.require(drawn)
    elif plan.cache.use != "off":
        # A cache of all of them is too large; the corpus may have fewer, which only reading it would tell.
        store.require(plan.cache.disk // least + 1)
    windows = min(drawn, store.count or drawn)
    return RunContext(
        run,
        store,
        plan.sequence,
        plan.batch,
        plan.cache,
        windows,
        device_of(doing),
        begun.made_from,
        doing.save_every,
        doing.logs,
        doing.progress,
    )


def stage_keys(begun: PreparedRun, ground: RunContext) -> list[str]:
    """The key of every stage: a hash of all that decides its result, the stages before it included."""
    keys, key = [], begun.key
    for stage in begun.plan.expanded:
        key = key_of(key, stage.model_dump(mode="json"), ground.store.identity)
        keys.append(key)
    return keys


def comparable(held: Growth | None, plan: GrowthPlan, key: str) -> tuple[TrainedStage, ...]:
    """The baselines that lie in a run, where they belong to a growth whose last stage has this key; without scores
    where these are of other texts or tasks than the plan's."""
    if held is None or not held.stages or held.stages[-1].training.key != key:
        return ()
    if held.plan.evaluate == plan.evaluate:
        return held.baselines
    return tuple(TrainedStage(training=model.training) for model in held.baselines)


def device_of(doing: RunOptions) -> str:
    """Where this process trains."""
    return local_device(doing.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def scores_of(
    begun: PreparedRun, record: TrainingRecord, doing: RunOptions, held: Growth | None
) -> tuple[ScoreRecord, ...]:
    """What the plan measures of the model in the run's folder `record.name`; what was measured before is kept."""
    evaluate, name = begun.plan.evaluate, record.name
    for model in (*held.stages, *held.baselines) if held and held.plan.evaluate == evaluate else ():
        if (model.training.name, model.training.key) == (name, record.key) and model.scores:
            return model.scores
    measures = on_texts(begun.texts, limit=evaluate.limit, progress=doing.progress) if begun.texts else []
    if evaluate.tasks:
        from surgery.evaluation.harness import on_tasks

        measures += on_tasks(evaluate.tasks, limit=evaluate.limit, seed=begun.plan.seed)
    if not measures:
        return ()

    def score() -> list[ScoreRecord]:
        models = {name: begun.run / name}
        found = score_models(models, measures, device=device_of(doing), dtype="float32", progress=doing.progress)
        return [ScoreRecord.of(score) for score in found]

    return tuple(on_main(score))


def publish(
    begun: PreparedRun, stages: Sequence[TrainedStage], baselines: Sequence[TrainedStage], *, report: bool = False
) -> Growth:
    """Writes what there is so far: the results, and the report where it is asked for."""
    growth = Growth(plan=begun.plan, stages=tuple(stages), baselines=tuple(baselines))
    if is_main():
        write_file(begun.run / PLAN, plan_text(begun.plan))
        write_growth(begun.run, growth)
        if report:
            growth_report(growth).write(begun.run / REPORT)
    barrier()
    return growth


def kept(folder: Path, key: str) -> TrainingRecord | None:
    """The record of the training that made `folder`, where it is the one with this key; None where there is none.

    Raises:
        SurgeryError: what lies there was made by another plan, or from another corpus.
    """
    # One process looks: the others might see what it writes next.
    record = on_main(lambda: read_training(folder) if folder.exists() else None)
    if record is not None and record.key != key:
        raise usage_error(
            "was made by another plan, or from another start or corpus, and is never overwritten",
            where=folder,
            hint="Choose another RUN, or remove this folder and those after it.",
        )
    return record


def held_growth(run: Path) -> Growth | None:
    """The results that lie in the run's folder; None where there are none."""
    return on_main(lambda: read_growth(run) if (run / RESULTS).exists() else None)


def remove(folder: Path) -> None:
    """Removes a folder of the run's own, once for all processes."""
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    barrier()


def _start(begun: PreparedRun) -> Path | str:
    """The model before the first stage."""
    return made(begun, begun.run / START, layers=begun.layers) if begun.plan.embed else str(begun.plan.start)


def made(begun: PreparedRun, folder: Path, *, layers: int) -> Path:
    """A model on the plan's embedding, begun anew in `folder`: what lies there may be of another plan."""
    plan, embed, shape = begun.plan, str(begun.plan.embed), shape_of(begun.plan, layers=layers)
    options = ExecutionOptions(overwrite=True)
    on_main(init_model, embed, folder, shape=shape, seed=plan.seed, dtype=plan.dtype, options=options)
    return folder


def _deepened(
    before: Path | str, stage: GrowthStage, folder: Path, seed: int, doing: RunOptions
) -> tuple[Path | str, tuple[int, ...]]:
    """The model that a stage trains, and the numbers of its new layers."""
    if not stage.add:
        return before, ()
    options = ExecutionOptions(overwrite=True, progress=doing.progress)
    report = on_main(
        add_layers, str(before), folder, layers=stage.add, at=stage.at, init=stage.init, seed=seed, options=options
    )
    return folder, report.new


def _firsts(plan: GrowthPlan) -> list[int]:
    """How many windows were drawn before each stage begins with its first, as far as the plan tells."""
    firsts, drawn = [], 0
    for stage, steps in zip(plan.expanded, plan.steps_of, strict=True):
        firsts.append(drawn if stage.data == "continue" else 0)
        drawn = firsts[-1] + steps * plan.batch
    return firsts


def _passes(plan: GrowthPlan, at: int, windows: int) -> float | None:
    """How often a window meets the prefix of stage `at`: in it, and in those after it that build upon that prefix."""
    stages, drawn = plan.expanded, [steps * plan.batch for steps in plan.steps_of]
    if plan.cache.use == "off" or MOVING & set(stages[at].train):
        return None
    total = longest = drawn[at]
    firsts = _firsts(plan)
    for stage, more, first in zip(stages[at + 1 :], drawn[at + 1 :], firsts[at + 1 :], strict=True):
        if first != firsts[at] or MOVING & set(stage.train) or (stage.add and stage.at != "top"):
            break
        total, longest = total + more, max(longest, more)
    return total / min(longest, windows)
