"""One training from checkpoint to checkpoint, and the proof of what it left alone.

In come a model on disk, a stage of the plan and windows of tokens; out comes a folder that appears whole or not at all:
the trained model in the dtypes that it had, its manifest and card, and the training's record. Every tensor that was
frozen has the hash in it that it had before, or there is no folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.structure import model_structure
from surgery.engine.card import CardContent, write_card
from surgery.engine.execution import execute
from surgery.engine.manifest import build_manifest, command_record, write_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, copy_tensor, plan_files
from surgery.engine.result import ExecutionResult
from surgery.engine.verification import tensor_hashes
from surgery.errors import SurgeryError, listing
from surgery.growth.layers.random_init import save
from surgery.growth.plan import PLAN, CacheSettings, Evaluation, GrowthPlan, GrowthStage, StageTraining, plan_text
from surgery.growth.prefix_cache.cache import PrefixCache, recorded
from surgery.growth.prefix_cache.decide import decide_caching
from surgery.growth.prefix_cache.prefix import Prefix
from surgery.growth.results import TRAINING, Budget, CacheUse, Embedding, TrainingRecord, ends, thinned, training_text
from surgery.growth.training.accelerator import autocast_dtype, is_sharded
from surgery.growth.training.flops import sizes, step_cost
from surgery.growth.training.loop import StageResult, TrainingStep, train_stage
from surgery.growth.training.lr_schedule import Windows
from surgery.growth.training.tensorboard import tensorboard
from surgery.io.atomic import write_file
from surgery.io.hashing import hash_text
from surgery.models.loaded_model import LoadedModel, load_with_structure
from surgery.models.parameters import gather_full
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import is_main, n_processes
from surgery.runtime.progress import Progress, silent

BEFORE, TRAINED = "before", "trained"
LOGS, CACHE = "logs", "cache"
PAPER = "arXiv:2507.07129"


@dataclass(frozen=True)
class RunContext:
    """What all trainings of a run share.

    run: its folder. batch: windows in a step. cache: the plan's. cached_windows: that the prefix cache has room for.
    made_from: the inputs, as manifests name them. save_every: minutes. logs: whether TensorBoard's files are written.
    """

    run: Path
    store: Windows
    sequence: int
    batch: int
    cache: CacheSettings
    cached_windows: int
    device: str
    made_from: Mapping[str, Mapping[str, Any]]
    save_every: float = 5.0
    logs: bool = False
    progress: Progress = silent

    @property
    def cache_folder(self) -> Path:
        """Where the prefix cache lies: runs that name the same folder do not share it."""
        if self.cache.folder is None:
            return self.run / CACHE
        return self.cache.folder / hash_text(str(self.run.resolve()))


@dataclass(frozen=True)
class TrainingJob:
    """One training.

    name: of the folder in the run. start: the model that is trained. new: the layers that were added to it. key: hash
    of all that decides the result. first_window: how many windows were drawn before. passes: how often each window
    meets the prefix that this training begins with, here and later; None: there is no cache. plan: of the run.
    """

    name: str
    start: Path | str
    stage: GrowthStage
    new: tuple[int, ...]
    key: str
    seed: int
    first_window: int
    passes: float | None
    plan: GrowthPlan
    embedding: Embedding = "frozen"
    budget: Budget | None = None


def train_checkpoint(ground: RunContext, job: TrainingJob) -> TrainingRecord:
    """Trains, or goes on with it, and writes the model to `ground.run / job.name`; all processes call it.

    Raises:
        SurgeryError: as `train_stage`, `decide_caching` and `execute`; a frozen tensor is not what it was.
    """
    work = ground.run / f"{job.name}.training"
    live = load_with_structure(job.start, device=ground.device, dtype="float32", name=job.name)
    below = _Below(ground, job, live)
    with _logging(ground, job) as log:
        result = train_stage(
            live,
            job.stage,
            job.new,
            store=ground.store,
            first_window=job.first_window,
            sequence=ground.sequence,
            batch=ground.batch,
            seed=job.seed,
            prefix=below.prefix,
            folder=work / "state",
            save_every=ground.save_every,
            label=job.name,
            progress=ground.progress,
            log=log,
        )
    use = below.close()
    state = _gathered(live) if is_sharded() else None
    # One process writes; all get the record, or its error.
    return on_main(_write, ground, job, live, state, result, use, below.depth, work)


def _gathered(live: LoadedModel) -> dict[str, Any]:
    """The weights of a model that is sharded, on the CPU of the process that writes; empty in the others."""
    state = {}
    for name, value in live.model.state_dict().items():
        values = gather_full(value)
        if is_main():
            state[name] = values.cpu()
    return state


class _Sizes(TypedDict):
    """What a cache is known by."""

    windows: int
    sequence: int
    width: int
    dtype: torch.dtype
    tokens: str


class _Below:
    """The prefix of one training: decided on once it is known what trains."""

    def __init__(self, ground: RunContext, job: TrainingJob, live: LoadedModel) -> None:
        self.ground, self.job, self.live = ground, job, live
        self.depth = 0
        self.use = CacheUse(used=False, reason="no prefix cache: all layers train")
        self._cache: PrefixCache | None = None
        self._prefix: Prefix | None = None

    def prefix(self, depth: int) -> Prefix | None:
        """What gives the input of layer `depth`, the first in which something trains; None where nothing is cached."""
        self.depth = depth
        if self.job.passes is None:
            return None
        if is_sharded():
            self.use = CacheUse(used=False, reason="no prefix cache: FSDP shards the model")
            return None
        ground, live, folder = self.ground, self.live, self.ground.cache_folder
        # A training that goes on does as it did: rounded states (bf16) and computed ones are not the same to the bit.
        decided = on_main(self._decided)
        if decided is not None:
            self.use = decided
        else:
            held = recorded(folder, **self._sizes) or {}
            first = ground.store.windows([ground.store.number_of(self.job.first_window)])
            rows = max(1, ground.batch // n_processes() // (self.job.stage.training or StageTraining()).accumulate)
            decision = decide_caching(
                live,
                depth,
                settings=ground.cache,
                folder=folder,
                windows=ground.cached_windows,
                passes=self.job.passes,
                batch_tokens=first[:, :-1].expand(rows, -1),
                held=max((at for at in held if at <= depth), default=0),
                autocast=autocast_dtype(live.device),
            )
            self.use = CacheUse(used=decision.use, reason=decision.reason, bytes=decision.bytes if decision.use else 0)
            if is_main():
                write_file(self._decision, self.use.model_dump_json())
        if not self.use.used:
            return None
        try:
            self._cache = PrefixCache(folder, **self._sizes)
        except SurgeryError as error:
            # There was room when it was decided. All processes get the error of the one that takes the room.
            if ground.cache.use == "on":
                raise
            self.use = CacheUse(used=False, reason=f"no prefix cache: {error.what}")
            return None
        self._prefix = Prefix(live, depth, self._cache, autocast=autocast_dtype(live.device))
        return self._prefix

    def close(self) -> CacheUse:
        """Closes the cache; returns what became of it."""
        if self._prefix is not None:
            done, fault = self._prefix.statistics, self._prefix.fault
            self._prefix.close()
            counts = {"read": done.read, "extended": done.extended, "computed": done.computed}
            reason = self.use.reason if fault is None else f"{self.use.reason}; then its disk failed: {fault}"
            self.use = self.use.model_copy(update={**counts, "reason": reason})
        if self._cache is not None:
            self._cache.close()
        return self.use

    @property
    def _decision(self) -> Path:
        return self.ground.run / f"{self.job.name}.training" / "cache.json"

    @property
    def _sizes(self) -> _Sizes:
        ground = self.ground
        return {
            "windows": ground.cached_windows,
            "sequence": ground.sequence,
            "width": self.live.width,
            "dtype": getattr(torch, ground.cache.dtype),
            "tokens": ground.store.identity,
        }

    def _decided(self) -> CacheUse | None:
        """What was decided when this training began, where it goes on."""
        path = self._decision
        return CacheUse.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _logging(ground: RunContext, job: TrainingJob) -> AbstractContextManager[Callable[[TrainingStep], None] | None]:
    return tensorboard(ground.run / LOGS / job.name) if ground.logs else nullcontext()


def _write(
    ground: RunContext,
    job: TrainingJob,
    live: LoadedModel,
    state: dict[str, Any] | None,
    result: StageResult,
    use: CacheUse,
    depth: int,
    work: Path,
) -> TrainingRecord:
    """The trained model as a checkpoint like the one before, with every frozen tensor proven to be what it was."""
    before, saved_at = live.checkpoint, work / "saved"
    shutil.rmtree(saved_at, ignore_errors=True)  # left by a kill
    saved = save(live.model, saved_at, state=state)
    _check_names(before, saved, job)
    planned = [copy_tensor(saved.tensors[name], dtype=tensor.dtype) for name, tensor in before.tensors.items()]
    sources = {BEFORE: before, TRAINED: saved}
    side_files = {path.name: path for path in before.side_files}
    plan = Plan(_command(ground, job), sources, plan_files(planned, like=before), side_files)
    hashes = tensor_hashes(before)
    trained = _may_change(before, job)
    record = _record(ground, job, live, result, use, depth, proven=len(before.tensors) - len(trained))

    def finish(folder: Path, outcome: ExecutionResult) -> None:
        changed = sorted(name for name, old in hashes.items() if name not in trained and outcome.hashes[name] != old)
        if changed:
            raise SurgeryError(f"frozen, but changed in training: {listing(changed)}", where=job.name)
        (folder / TRAINING).write_text(training_text(record), encoding="utf-8")
        (folder / PLAN).write_text(plan_text(job.plan), encoding="utf-8")
        manifest = build_manifest(plan, outcome, kind="model", report=record.model_dump(mode="json", exclude={"curve"}))
        # What it was copied from is gone in a moment; what the run began with is what others can get.
        manifest["inputs"] = dict(ground.made_from)
        write_manifest(folder, manifest)
        write_card(folder, manifest, {BEFORE: before}, _card(job, record))

    # What a killed run left half-written was copied from files that are made anew, and so begins anew too.
    execute(plan, ground.run / job.name, ExecutionOptions(overwrite=True), finish=finish)
    shutil.rmtree(work, ignore_errors=True)
    return record


def _command(ground: RunContext, job: TrainingJob) -> dict[str, Any]:
    """How the manifest records the training: the plan as far as this stage, the commands, and where in RUN it lies.

    On another number of threads sums are split otherwise, so that it is part of the command.
    """
    stages = job.plan.expanded
    done = stages if job.budget else stages[: int(job.name.rpartition("-")[2])]
    plan = job.plan.model_copy(update={"stages": done, "evaluate": Evaluation()})
    how = {"device": ground.device.partition(":")[0], "threads": torch.get_num_threads()}
    record = command_record("grow run", [PLAN], **how)
    if job.budget:
        first = record["line"]
        record = command_record("grow baseline", [PLAN], budget=job.budget, embedding=job.embedding, **how)
        record["first"] = [first]
    return record | {"files": {PLAN: plan_text(plan)}, "inside": job.name}


def _may_change(before: Checkpoint, job: TrainingJob) -> set[str]:
    """The tensors that the stage trains, by what the plan says; names in memory may differ."""
    train, shape = set(job.stage.train), model_structure(before)
    groups = {"head": "lm_head", "norm": "final norm", "embedding": "embed"}
    wanted = {groups[part] for part in train & groups.keys()}
    wanted |= {f"layer {index}" for index in job.new if "new" in train}
    wanted |= {f"layer {layer.index}" for layer in shape.blocks if "lora" in train and layer.index not in job.new}
    return {name for name in before.tensors if "all" in train or shape.group_of(name) in wanted}


def _check_names(before: Checkpoint, saved: Checkpoint, job: TrainingJob) -> None:
    other = sorted(before.tensors.keys() ^ saved.tensors.keys())
    if other:
        raise SurgeryError(
            f"transformers saves this family under other names than the checkpoint's: {listing(other)}",
            where=job.name,
            hint="Save the model with transformers once, and start from that.",
        )


def _record(
    ground: RunContext,
    job: TrainingJob,
    live: LoadedModel,
    result: StageResult,
    use: CacheUse,
    depth: int,
    *,
    proven: int,
) -> TrainingRecord:
    train, n_layers = set(job.stage.train), len(live.layers)
    layers = range(n_layers) if "all" in train else job.new if "new" in train else ()
    size = sizes(live.checkpoint, model_structure(live.checkpoint), sequence=ground.sequence)
    cost = step_cost(
        size, depth=depth, trained=set(layers), head=bool(train & {"head", "all"}), norm=bool(train & {"norm", "all"})
    )
    first, last = ends(result.losses)
    return TrainingRecord(
        key=job.key,
        name=job.name,
        stage=job.stage,
        layers=n_layers,
        new=job.new,
        parameters=sum(tensor.n_elements for tensor in live.checkpoint.tensors.values()),
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
        curve=thinned(result.losses, ground.batch * ground.sequence),
        cache=use,
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
