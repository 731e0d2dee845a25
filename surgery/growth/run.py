"""Run a whole growth: stage after stage, each from the checkpoint before, in one resumable folder.

RUN/ holds `stage-1`, `stage-2`, … (plain checkpoints), `results.json`, `report.html`, and the tokens that they were
trained on. Every stage has a key, a hash of everything that its result depends on: an existing stage with its key is
reused, one with another key is never overwritten.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.evaluation.perplexity import on_texts
from surgery.evaluation.scoring import score_models
from surgery.growth.data.token_store import TokenStore
from surgery.growth.layers.add import add_layers
from surgery.growth.layers.initial_model import init_model
from surgery.growth.layers.random_init import part_seed
from surgery.growth.options import RunOptions
from surgery.growth.plan import PLAN, GrowthPlan, GrowthStage, plan_text
from surgery.growth.prefix_cache.cache import cache_bytes
from surgery.growth.prepare import LOCK, TOKENS, PreparedRun, content_key, start_shape
from surgery.growth.report import growth_report
from surgery.growth.results import (
    REPORT,
    RESULTS,
    Growth,
    ScoreRecord,
    TrainedStage,
    TrainingRecord,
    read_growth,
    read_training,
    write_growth,
)
from surgery.growth.training.job import RunContext, TrainingJob
from surgery.growth.training.stage_runner import TRAINING_SUFFIX, train_checkpoint
from surgery.io.atomic import write_file
from surgery.io.locks import exclusive_lock
from surgery.io.output_folder import discard_output
from surgery.io.private_files import make_private_folder
from surgery.runtime.collectives import barrier, entered_on_main, local_device, on_main
from surgery.runtime.environment import is_main

START = "start"
START_SUFFIX = ".start"  # of the folder of the model that a training begins with
LOCK_PATIENCE = 10.0  # seconds that forked processes of a killed run may take to end: they hold its lock until then
# Trained parts that lie below the new layers: what leaves those changes from step to step, and cannot be cached.
BELOW_NEW_LAYERS = {"lora", "embedding", "all"}


def grow(prepared: PreparedRun, options: RunOptions = RunOptions()) -> Growth:
    """Train and measure every stage that does not exist yet, and write results and report; all processes call it.

    Example:
        plan = surgery.load_plan("small", embed="EMB", corpus=["lab:python/code"])
        growth = surgery.grow(surgery.prepare_run(plan, Path("RUN")))

    Raises:
        SurgeryError: as `add_layers`, `train_checkpoint` and the measurements; an existing stage belongs to another
            plan.
    """
    with run_lock(prepared.run):
        return _grow(prepared, options)


def run_lock(run: Path) -> AbstractContextManager[None]:
    """Let no other process train in the folder `run` in the block, which all ranks enter. Raises SurgeryError."""
    busy, hint = "another process is training here", "Wait until it is done, stop it, or choose another RUN."
    return entered_on_main(
        exclusive_lock(run / LOCK, where=run, busy=busy, hint=hint, patience=LOCK_PATIENCE, remove=True)
    )


def _grow(prepared: PreparedRun, options: RunOptions) -> Growth:
    plan, run = prepared.plan, prepared.run
    context = create_run_context(prepared, options)
    keys, existing = stage_keys(prepared, context), read_existing_growth(run)
    baselines = matching_baselines(existing, plan, keys[-1])
    drawn, stages = 0, list[TrainedStage]()
    for index, (stage, key) in enumerate(zip(plan.expanded, keys, strict=True)):
        first_window = drawn if stage.data == "continue" else 0
        record = read_existing_training(run / _stage_name(index), key)
        if record is None:
            record = _train_stage(prepared, context, index, key, first_window)
        drawn = first_window + record.steps * plan.batch
        model = TrainedStage(training=record, scores=evaluate_model(prepared, record, options, existing))
        stages.append(model)
        # Results that hold this stage already are left alone: written now, they would lose the later ones.
        if existing is None or model not in existing.stages:
            write_results(prepared, stages, baselines)
    remove_folder(context.cache_folder)
    return write_results(prepared, stages, baselines, report=True)


def create_run_context(prepared: PreparedRun, options: RunOptions) -> RunContext:
    """Create the run's folder, open its corpus, and return what its trainings share.

    Raises:
        SurgeryError: the folder cannot be written; as `TokenStore`.
    """
    plan, run = prepared.plan, prepared.run
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    store = TokenStore(
        run / TOKENS,
        plan.corpus,
        prepared.tokenizer,
        sequence=plan.sequence,
        seed=plan.seed,
        field=plan.field,
        eos=prepared.tokenizer.eos_token_id,
        vocab_size=prepared.vocab_size,
        parse_special=plan.special_tokens == "parse",
        progress=options.progress,
    )
    # From now on the folder is recognised as a growth's, whatever ends this run.
    make_private_folder(run / TOKENS)
    windows = _cached_windows(prepared, store)
    return RunContext(run, plan, store, windows, training_device(options), prepared.inputs, options)


def stage_keys(prepared: PreparedRun, context: RunContext) -> list[str]:
    """Return the key of every stage: a hash of all that decides its result, the stages before it included."""
    keys, key = [], prepared.key
    for stage in prepared.plan.expanded:
        key = content_key(key, stage.model_dump(mode="json"), context.store.identity)
        keys.append(key)
    return keys


def matching_baselines(existing: Growth | None, plan: GrowthPlan, key: str) -> tuple[TrainedStage, ...]:
    """Return the existing baselines if they belong to a growth whose last stage has this key.

    Their scores are left out where they were measured on other texts or tasks than the plan's.
    """
    if existing is None or not existing.stages or existing.stages[-1].training.key != key:
        return ()
    if existing.plan.evaluate == plan.evaluate:
        return existing.baselines
    return tuple(TrainedStage(training=model.training) for model in existing.baselines)


def training_device(options: RunOptions) -> str:
    """Return the device that this process trains on."""
    return local_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def evaluate_model(
    prepared: PreparedRun, record: TrainingRecord, options: RunOptions, existing: Growth | None
) -> tuple[ScoreRecord, ...]:
    """Measure the model in the run's folder `record.name` as the plan says, or return its existing scores."""
    evaluate, name = prepared.plan.evaluate, record.name
    for model in (*existing.stages, *existing.baselines) if existing and existing.plan.evaluate == evaluate else ():
        if (model.training.name, model.training.key) == (name, record.key) and model.scores:
            return model.scores
    measures = on_texts(prepared.texts, limit=evaluate.limit, progress=options.progress) if prepared.texts else []
    if evaluate.tasks:
        from surgery.evaluation.harness import on_tasks

        measures += on_tasks(evaluate.tasks, limit=evaluate.limit, seed=prepared.plan.seed)
    if not measures:
        return ()

    def score() -> list[ScoreRecord]:
        models = {name: prepared.run / name}
        scores = score_models(
            models, measures, device=training_device(options), dtype="float32", progress=options.progress
        )
        return [ScoreRecord.of(score) for score in scores]

    return tuple(on_main(score))


def write_results(
    prepared: PreparedRun, stages: Sequence[TrainedStage], baselines: Sequence[TrainedStage], *, report: bool = False
) -> Growth:
    """Write the plan and the results so far, and with `report` the HTML report; return the results."""
    growth = Growth(plan=prepared.plan, stages=tuple(stages), baselines=tuple(baselines))
    if is_main():
        write_file(prepared.run / PLAN, plan_text(prepared.plan))
        write_growth(prepared.run, growth)
        if report:
            growth_report(growth).write(prepared.run / REPORT)
    barrier()
    return growth


def read_existing_training(folder: Path, key: str) -> TrainingRecord | None:
    """Return the record of the finished training in `folder`, or None where the folder does not exist.

    What a killed run left beside it is deleted.

    Raises:
        SurgeryError: it belongs to another plan or corpus.
    """
    # Read on one process: the others might see what it writes next.
    record = on_main(lambda: read_training(folder) if folder.exists() else None)
    if record is not None and record.key != key:
        raise usage_error(
            "was made by another plan, or from another start or corpus, and is never overwritten",
            where=folder,
            hint="Choose another RUN, or remove this folder and those after it.",
        )
    if record is not None:
        # Left where a kill came after the checkpoint had its place: what it was trained from, and the training's state.
        for suffix in (START_SUFFIX, TRAINING_SUFFIX):
            on_main(discard_output, folder.with_name(folder.name + suffix))
    return record


def read_existing_growth(run: Path) -> Growth | None:
    """Return the results in the run's folder, or None where there are none."""
    return on_main(lambda: read_growth(run) if (run / RESULTS).exists() else None)


def remove_folder(folder: Path) -> None:
    """Delete a folder of the run's own, on one process."""
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    barrier()


def create_start_model(prepared: PreparedRun, folder: Path, *, layers: int) -> Path:
    """Write a new model on the plan's embedding to `folder`, and return it.

    An existing folder is overwritten, because it may belong to another plan.
    """
    plan, shape = prepared.plan, start_shape(prepared.plan, layers=layers)
    options = ExecutionOptions(overwrite=True)
    on_main(init_model, str(plan.embed), folder, shape=shape, seed=plan.seed, dtype=plan.dtype, options=options)
    return folder


def _stage_name(index: int) -> str:
    return f"stage-{index + 1}"


def _train_stage(prepared: PreparedRun, context: RunContext, index: int, key: str, first_window: int) -> TrainingRecord:
    """Add the layers of stage `index` to the model before it, and train it."""
    plan, run, name = prepared.plan, prepared.run, _stage_name(index)
    stage, seed = plan.expanded[index], part_seed(plan.seed, name)
    before = run / _stage_name(index - 1) if index else _first_model(prepared)
    deepened = run / f"{name}{START_SUFFIX}"
    start, new = _add_stage_layers(before, stage, deepened, seed, context.options)
    passes = _cache_passes(plan, index, context.cached_windows)
    record = train_checkpoint(context, TrainingJob(name, start, stage, new, key, seed, first_window, passes))
    remove_folder(deepened)
    return record


def _first_model(prepared: PreparedRun) -> Path | str:
    """Return the model before the first stage; on an embedding it is written now."""
    if prepared.plan.embed:
        return create_start_model(prepared, prepared.run / START, layers=prepared.layers)
    return str(prepared.plan.start)


def _add_stage_layers(
    before: Path | str, stage: GrowthStage, folder: Path, seed: int, options: RunOptions
) -> tuple[Path | str, tuple[int, ...]]:
    """Write the model that a stage trains; return its folder and the indices of its new layers."""
    if not stage.add:
        return before, ()
    execution = ExecutionOptions(overwrite=True, progress=options.progress)
    report = on_main(
        add_layers, str(before), folder, layers=stage.add, at=stage.at, init=stage.init, seed=seed, options=execution
    )
    return folder, report.new


def _cached_windows(prepared: PreparedRun, store: TokenStore) -> int:
    """Return how many windows the prefix cache gets room for: all that the longest stage draws."""
    plan = prepared.plan
    drawn = max(_first_windows(plan)[at] + steps * plan.batch for at, steps in enumerate(plan.steps_of))
    window_bytes = cache_bytes(1, plan.sequence, prepared.width, getattr(torch, plan.cache.dtype))
    if plan.cache.use != "off" and drawn * window_bytes <= plan.cache.disk:
        store.require(drawn)
    elif plan.cache.use != "off":
        # A cache of all of them is too large. The corpus may have fewer windows, which only reading it can tell.
        store.require(plan.cache.disk // window_bytes + 1)
    return min(drawn, store.count or drawn)


def _first_windows(plan: GrowthPlan) -> list[int]:
    """Return the position of each stage's first window, as far as the plan tells (a plateau ends a stage sooner)."""
    firsts, drawn = [], 0
    for stage, steps in zip(plan.expanded, plan.steps_of, strict=True):
        firsts.append(drawn if stage.data == "continue" else 0)
        drawn = firsts[-1] + steps * plan.batch
    return firsts


def _cache_passes(plan: GrowthPlan, at: int, windows: int) -> float | None:
    """Return how often a window meets the prefix of stage `at`, or None where that cannot be cached.

    Counted are the stage itself and those after it that build upon the same prefix.
    """
    stages, drawn = plan.expanded, [steps * plan.batch for steps in plan.steps_of]
    if plan.cache.use == "off" or BELOW_NEW_LAYERS & set(stages[at].train):
        return None
    total = longest = drawn[at]
    firsts = _first_windows(plan)
    for stage, more, first in zip(stages[at + 1 :], drawn[at + 1 :], firsts[at + 1 :], strict=True):
        # Other windows, a prefix that trains, or layers inserted into it: from here on cached states are useless.
        if first != firsts[at] or BELOW_NEW_LAYERS & set(stage.train) or (stage.add and stage.at != "top"):
            break
        total, longest = total + more, max(longest, more)
    return total / min(longest, windows)
