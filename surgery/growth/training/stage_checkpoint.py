"""Write a trained stage as a checkpoint, and prove that frozen tensors are unchanged.

The folder appears whole or not at all: the model in the dtypes that it had, its manifest and card, and the training's
record. Every frozen tensor has the hash in it that it had before, or there is no folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.structure import model_structure
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, write_checkpoint
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, copy_tensor, plan_files
from surgery.engine.result import ExecutionResult
from surgery.engine.verification import tensor_hashes
from surgery.errors import SurgeryError, listing
from surgery.growth.layers.random_init import save_model
from surgery.growth.plan import PLAN, Evaluation, plan_text
from surgery.growth.results import (
    TRAINING,
    CacheUse,
    TrainingRecord,
    downsample_losses,
    first_and_last_loss,
    training_text,
)
from surgery.growth.training.flops import forward_cost, training_cost
from surgery.growth.training.job import RunContext, TrainingJob
from surgery.growth.training.loop import StageResult
from surgery.io.output_files import write_output
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.environment import n_processes

BEFORE, TRAINED = "before", "trained"
PAPER = "arXiv:2507.07129"


@dataclass(frozen=True)
class FinishedTraining:
    """A trained model that is not saved yet.

    state: its whole weights, where FSDP2 has sharded the model. cache: what became of the prefix cache. depth: the
    first layer in which something trained.
    """

    live: LoadedModel
    state: Mapping[str, Any] | None
    result: StageResult
    cache: CacheUse
    depth: int


def save_stage(context: RunContext, job: TrainingJob, trained: FinishedTraining, work: Path) -> TrainingRecord:
    """Write the trained model as a checkpoint like the one before, with every frozen tensor proven unchanged.

    work: the training's folder, deleted once the checkpoint is safe.

    Raises:
        SurgeryError: a frozen tensor was changed, or the model is saved under other names; as `execute`.
    """
    before, saved_at = trained.live.checkpoint, work / "saved"
    shutil.rmtree(saved_at, ignore_errors=True)  # left by a kill
    # First by transformers, which knows the names on disk; then copied with the dtypes, shards and files of `before`.
    saved = save_model(trained.live.model, saved_at, state=trained.state)
    _check_names(before, saved, job)
    planned = [copy_tensor(saved.tensors[name], dtype=tensor.dtype) for name, tensor in before.tensors.items()]
    sources = {BEFORE: before, TRAINED: saved}
    plan = Plan(_command(context, job), sources, plan_files(planned, like=before), before.side_files)
    trainable = _trainable_tensors(before, job)
    frozen = {name: old for name, old in tensor_hashes(before).items() if name not in trainable}
    record = _record(context, job, trained, proven=len(frozen))

    def describe(folder: Path, written: ExecutionResult) -> OutputDescription[TrainingRecord]:
        changed = sorted(name for name, old in frozen.items() if written.hashes[name] != old)
        if changed:
            raise SurgeryError(f"frozen, but changed in training: {listing(changed)}", where=job.name)
        write_output(folder, TRAINING, training_text(record))
        write_output(folder, PLAN, plan_text(context.plan))
        return OutputDescription(
            record,
            record.model_dump(mode="json", exclude={"curve"}),
            _card(job, record),
            # The files it was copied from are deleted in a moment; what the run started from is what others can get.
            fields={"inputs": dict(context.inputs)},
        )

    # A half-written copy of a killed run had sources that no longer exist, so that it cannot be resumed.
    options = ExecutionOptions(overwrite=True)
    write_checkpoint(plan, context.run / job.name, options, describe=describe, writes=(TRAINING, PLAN))
    shutil.rmtree(work, ignore_errors=True)
    return record


def _command(context: RunContext, job: TrainingJob) -> dict[str, Any]:
    """Return the manifest's record of the training: the plan up to this stage, the commands, and the folder in RUN.

    The number of threads is part of it, because it decides the order in which sums are taken.
    """
    stages = context.plan.expanded
    done = stages if job.budget else stages[: int(job.name.rpartition("-")[2])]
    # Scores change no weights, and later stages do not belong to this checkpoint.
    plan = context.plan.model_copy(update={"stages": done, "evaluate": Evaluation()})
    settings = {"device": context.device.partition(":")[0], "threads": torch.get_num_threads()}
    record = command_record("grow run", [PLAN], **settings)
    if job.budget:
        first = record["line"]
        record = command_record("grow baseline", [PLAN], budget=job.budget, embedding=job.embedding, **settings)
        # A baseline is reproduced by growing first.
        record["first"] = [first]
    return record | {"files": {PLAN: plan_text(plan)}, "inside": job.name}


def _trainable_tensors(before: Checkpoint, job: TrainingJob) -> set[str]:
    """Return the names of the tensors that the stage trains.

    Derived from the plan and the names on disk alone, because names in memory may differ: so the proof that the others
    are unchanged does not depend on the code that trained.
    """
    train, structure = set(job.stage.train), model_structure(before)
    group_of = {"head": "lm_head", "norm": "final norm", "embedding": "embed"}
    groups = {group_of[part] for part in train & group_of.keys()}
    groups |= {f"layer {index}" for index in job.new if "new" in train}
    groups |= {f"layer {layer.index}" for layer in structure.blocks if "lora" in train and layer.index not in job.new}
    return {name for name in before.tensors if "all" in train or structure.group_of(name) in groups}


def _check_names(before: Checkpoint, saved: Checkpoint, job: TrainingJob) -> None:
    other = sorted(before.tensors.keys() ^ saved.tensors.keys())
    if other:
        raise SurgeryError(
            f"transformers saves this family under other names than the checkpoint's: {listing(other)}",
            where=job.name,
            hint="Save the model with transformers once, and start from that.",
        )


def _record(context: RunContext, job: TrainingJob, trained: FinishedTraining, *, proven: int) -> TrainingRecord:
    checkpoint, result, train = trained.live.checkpoint, trained.result, set(job.stage.train)
    n_layers = len(trained.live.layers)
    # Low-rank updates cost next to nothing beside the matrices, and are not counted.
    layers = range(n_layers) if "all" in train else job.new if "new" in train else ()
    forward = forward_cost(checkpoint, model_structure(checkpoint), sequence=context.plan.sequence)
    cost = training_cost(
        forward,
        depth=trained.depth,
        trained=set(layers),
        head=bool(train & {"head", "all"}),
        norm=bool(train & {"norm", "all"}),
    )
    first, last = first_and_last_loss(result.losses)
    return TrainingRecord(
        key=job.key,
        name=job.name,
        stage=job.stage,
        layers=n_layers,
        new=job.new,
        parameters=sum(tensor.n_elements for tensor in checkpoint.tensors.values()),
        trained_parameters=result.n_trained,
        optimizer_bytes=result.optimizer_bytes,
        steps=result.steps,
        tokens=result.tokens,
        first_window=job.first_window,
        stopped=result.stopped,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        flops=cost.whole * result.tokens,
        first_loss=first,
        last_loss=last,
        curve=downsample_losses(result.losses, context.plan.batch * context.plan.sequence),
        cache=trained.cache,
        proven=proven,
        processes=n_processes(),
        embedding=job.embedding,
        budget=job.budget,
    )


def _card(job: TrainingJob, record: TrainingRecord) -> CardContent:
    trains = ", ".join(record.stage.train)
    grown = f"{len(record.new)} of {record.layers} layers were added" if record.new else "no layer was added"
    growth = f"grown layer by layer, its embedding {job.embedding} in this stage, after {PAPER}"
    what = (
        f"trained in one go ({job.budget} as in the growth), its embedding {job.embedding}"
        if job.budget
        else f"{growth}: {grown}, and {trains} trained"
    )
    method = (
        f"A language model {what}, on {record.tokens:,} tokens ({record.steps:,} steps). The loss went from "
        f"{record.first_loss:.3f} to {record.last_loss:.3f} nats per token. {record.proven:,} frozen tensors have the "
        f"hashes that they had before. `{TRAINING}` has the whole curve."
    )
    return CardContent(
        "Baseline, trained in one go" if job.budget else "Model grown layer by layer", method, ("growth",)
    )
