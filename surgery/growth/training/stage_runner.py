"""Train one stage from checkpoint to checkpoint.

The model on disk is loaded, trained on the run's windows, and written as a checkpoint of its own that appears whole or
not at all. A training that was interrupted is resumed from its last saved state.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from surgery.growth.results import TrainingRecord
from surgery.growth.training.accelerator import is_sharded
from surgery.growth.training.job import RunContext, TrainingJob
from surgery.growth.training.loop import TrainingStep, train_stage, trainable_model
from surgery.growth.training.metrics_log import tensorboard
from surgery.growth.training.open_prefix import open_prefix_cache
from surgery.growth.training.stage_checkpoint import FinishedTraining, save_stage
from surgery.models.loaded_model import LoadedModel, load_with_structure
from surgery.models.parameters import gather_full
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import is_main

TRAINING_SUFFIX = ".training"  # of the folder of a training's state, beside its checkpoint

LOGS = "logs"


def train_checkpoint(context: RunContext, job: TrainingJob) -> TrainingRecord:
    """Train `job.start`, or resume that, and write the model to `context.run / job.name`; all processes call it.

    Raises:
        SurgeryError: as `train_stage`, `decide_caching` and `execute`; a frozen tensor was changed.
    """
    folder = context.run / f"{job.name}{TRAINING_SUFFIX}"
    schedule = job.schedule(context.plan)
    live = load_with_structure(job.start, device=context.device, dtype="float32", name=job.name)
    with _logging(context, job) as log, trainable_model(live, schedule, job.new) as model:
        # The cache is measured on real windows, of which the first must be there.
        context.store.require(schedule.windows_until(1))
        opened = open_prefix_cache(context, job, model, folder)
        result = train_stage(
            model,
            schedule,
            store=context.store,
            prefix=opened.prefix,
            folder=folder / "state",
            save_every=context.options.save_every,
            label=job.name,
            progress=context.options.progress,
            log=log,
        )
        depth = model.depth
    use = opened.close()
    state = _gather_weights(live) if is_sharded() else None
    # One process writes; all get the record, or its error.
    return on_main(save_stage, context, job, FinishedTraining(live, state, result, use, depth), folder)


def _gather_weights(live: LoadedModel) -> dict[str, Any]:
    """Return the weights of a sharded model, on the CPU of the process that writes; the others get nothing."""
    state = {}
    for name, value in live.model.state_dict().items():
        # A collective: every process must take part, or those that do would wait for ever.
        values = gather_full(value)
        if is_main():
            state[name] = values.cpu()
    return state


def _logging(context: RunContext, job: TrainingJob) -> AbstractContextManager[Callable[[TrainingStep], None] | None]:
    return tensorboard(context.run / LOGS / job.name) if context.options.logs else nullcontext()
