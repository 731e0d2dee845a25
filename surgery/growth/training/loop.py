"""One stage of a growth is trained: windows of tokens go through the model, and what the stage names learns from them.

In come a live model, the stage, and windows by number; out come the model, trained in place, and a `StageResult`. With
`accelerate launch` or torchrun several processes share each batch (DDP, or FSDP2 where the launcher says so). A run
that was stopped, or killed, goes on from its last state; on CPUs with as many threads the losses and weights are then
those of a run that never stopped, bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, usage_error
from surgery.growth.plan import GrowthStage, StageTraining
from surgery.growth.training.accelerator import accelerator_for, autocast_dtype, is_sharded
from surgery.growth.training.lr_schedule import (
    TrainingSchedule,
    Windows,
    has_plateaued,
    learning_rate,
    reproducible,
    step_seed,
)
from surgery.growth.training.optimizer_state import (
    MOMENTS,
    SPECKS_EVERY,
    flush_denormals,
    load_state,
    restore,
    save_state,
    snapshot,
)
from surgery.growth.training.stage_model import StageModel, prepare_stage_model
from surgery.io.hashing import hash_tensors, hash_text
from surgery.models.loaded_model import LoadedModel
from surgery.models.parameters import gather_full, local, parameter_hashes
from surgery.runtime.collectives import barrier, on_main
from surgery.runtime.environment import DeferredInterrupt, is_main, n_processes, rank
from surgery.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from surgery.growth.prefix_cache.prefix import Prefix


# Batches whose tokens are asked for at a time: processes wait for each other then.
AHEAD = 16
MINUTE = 60.0

Stopped = Literal["tokens", "plateau"]


@dataclass(frozen=True)
class TrainingStep:
    """An optimizer step that was done. tokens: of this stage so far. loss: nats per token. grad_norm: unclipped."""

    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    grad_norm: float


@dataclass(frozen=True)
class StageResult:
    """What a stage's training came to.

    losses: of each step, in nats per token, over all processes. seconds: of training, those before an interruption
    included. optimizer_bytes: of AdamW's moments in this process. n_trained: numbers that trained. weights: all
    parameters that the stage changed, by name, low-rank updates merged; those of the live model itself, but where
    FSDP2 has sharded it: then whole, on the CPU. prefix: its statistics, where there was one.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    stopped: Stopped
    optimizer_bytes: int
    n_trained: int
    weights: Mapping[str, Tensor]
    prefix: Any = None

    @property
    def tokens_per_second(self) -> float:
        """How many tokens were trained on in a second; 0 where nothing was left to do."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(tokens of the stage so far, loss) of each step."""
        each = self.tokens // self.steps if self.steps else 0
        return [((step + 1) * each, loss) for step, loss in enumerate(self.losses)]


def train_stage(
    live: LoadedModel,
    stage: GrowthStage,
    new: Sequence[int],
    *,
    store: Windows,
    first_window: int,
    sequence: int,
    batch: int,
    seed: int,
    prefix: Callable[[int], Prefix | None] | None,
    folder: Path,
    save_every: float = 5.0,
    label: str = "Training",
    progress: Progress = silent,
    log: Callable[[TrainingStep], None] | None = None,
) -> StageResult:
    """Trains `live` in place, as `stage` says, or goes on with that.

    Args:
        live: in fp32, on this process's device.
        new: the numbers of the layers that the stage added.
        first_window: how many windows were drawn before this stage's.
        batch: windows in an optimizer step, over all processes.
        prefix: is called once all is frozen that does not train, with the number of the first layer in which something
            trains (as many as there are layers where only what follows them does); it returns what gives that layer's
            input. None, from it or instead of it, computes the layers below each time.
        folder: where states are kept; the caller removes it once the stage's model is safe.
        save_every: minutes between states; one is saved as well at the end, and at an interrupt.
        label: of the progress bar.
        log: is called in the main process after each step.

    Raises:
        SurgeryError: the batch cannot be divided; nothing trains, or it cannot (`stage.prepare`); a loss is not finite;
            a state is damaged, or another stage's; the device has too little memory.
        KeyboardInterrupt: asked for, and the state is saved.
    """
    course = TrainingSchedule(stage, stage.training or StageTraining(), first_window, sequence, batch, seed)
    _check_batch(course)
    was_training = live.model.training
    model = prepare_stage_model(live, stage, new, seed=seed)
    try:
        store.require(course.windows_until(AHEAD))
        below = None if prefix is None else prefix(model.depth)
        _check_prefix(below, model)
        live.model.train()
        with reproducible(live.device), DeferredInterrupt() as interrupts:
            run = _Run(model, course, store, below, folder, interrupts)
            run.go_on()
            run.train(label, save_every, progress, log)
            result = run.finish()
            if interrupts.asked:
                raise KeyboardInterrupt
            return result
    except torch.OutOfMemoryError as error:
        raise SurgeryError(
            f"{live.device} has no memory for {course.part} windows of {sequence} tokens at a time",
            where=live.name,
            hint="Raise training.accumulate, which computes a batch in more parts.",
        ) from error
    finally:
        live.model.train(was_training)
        live.model.zero_grad(set_to_none=True)
        live.model.requires_grad_(False)
        if model.updates is not None:
            model.updates.remove()


class _Run:
    """A training that is under way: the model and its optimizer in their wrappers, and how far they are."""

    def __init__(
        self,
        model: StageModel,
        course: TrainingSchedule,
        store: Windows,
        prefix: Prefix | None,
        folder: Path,
        interrupts: DeferredInterrupt,
    ) -> None:
        self.model, self.course, self.store, self.prefix, self.folder = model, course, store, prefix, folder
        self.interrupts = interrupts
        self.fingerprint = _fingerprint(model, course, store.identity)
        self.n_trained = model.n_trained
        training = course.training
        optimizer = torch.optim.AdamW(
            model.optimizer_groups(training.weight_decay),
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            fused=True,
        )
        self.accelerator = accelerator_for(model, course.sequence)
        self.wrapped, prepared = self.accelerator.prepare(model, optimizer)
        self.optimizer: torch.optim.Optimizer = prepared.optimizer
        self.parameters = model.trained()
        self.losses: list[float] = []
        self.earlier = 0.0  # seconds
        self.required = AHEAD
        self.began = self.saved = time.perf_counter()

    def go_on(self) -> None:
        """Takes up the last state, where there is one."""
        barrier()
        state = load_state(self.folder, fingerprint=self.fingerprint)
        if state is not None:
            restore(self.parameters, self.optimizer, state.tensors)
            self.losses, self.earlier = list(state.numbers["losses"]), state.numbers["seconds"]
        self.began = self.saved = time.perf_counter()

    def train(
        self, label: str, save_every: float, progress: Progress, log: Callable[[TrainingStep], None] | None
    ) -> None:
        course = self.course
        with progress(label, course.steps * course.tokens_per_step, "tokens") as advance:
            if self.losses:
                advance(len(self.losses) * course.tokens_per_step)
            while self.stopped is None:
                started = time.perf_counter()
                due = started - self.saved >= save_every * MINUTE
                rate, norm, save, interrupted = self._step(due)
                if log is not None and is_main():
                    speed = course.tokens_per_step / (time.perf_counter() - started)
                    log(TrainingStep(len(self.losses) * course.tokens_per_step, self.losses[-1], rate, speed, norm))
                advance(course.tokens_per_step, f"loss {self.losses[-1]:.3f}")
                if save or self.stopped is not None:
                    self._save()
                if interrupted:
                    raise KeyboardInterrupt

    @property
    def stopped(self) -> Stopped | None:
        """Why nothing is left to do; None while something is."""
        if len(self.losses) >= self.course.steps:
            return "tokens"
        plateau = has_plateaued(self.losses, self.course.stage.plateau, self.course.tokens_per_step)
        return "plateau" if plateau else None

    def finish(self) -> StageResult:
        """What it came to; low-rank updates are merged."""
        seconds = self._seconds()
        moments = [state[key] for state in self.optimizer.state.values() for key in MOMENTS]
        changed = self.model.finish()
        weights = {name: gather_full(self.model.model.get_parameter(name).detach()) for name in changed}
        if self.accelerator.is_fsdp2:
            weights = {name: value.cpu() for name, value in weights.items()}
        self.accelerator.free_memory()
        stopped, steps = self.stopped, len(self.losses)
        assert stopped is not None
        return StageResult(
            steps,
            steps * self.course.tokens_per_step,
            tuple(self.losses),
            seconds,
            stopped,
            sum(local(moment).nbytes for moment in moments),
            self.n_trained,
            weights,
            None if self.prefix is None else self.prefix.statistics,
        )

    def _step(self, due: bool) -> tuple[float, float, bool, bool]:
        """One optimizer step: the learning rate, the gradient's norm, and whether to save and to stop."""
        step, training, device = len(self.losses), self.course.training, self.accelerator.device
        rate = learning_rate(step, self.course.steps, training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(self.course.seed, step, rank()))
        loss = torch.zeros((), device=device)
        parts, after = self._parts(step), self._parts(step + 1)
        for at, numbers in enumerate(parts):
            following = parts[at + 1 :] or after
            with self.accelerator.no_sync(self.wrapped) if parts[at + 1 :] else nullcontext():
                of_part = self._loss(numbers, following[0] if following else None) / len(parts)
                of_part.backward()  # type: ignore[no-untyped-call]
            loss += of_part.detach()
        norm = gather_full(nn.utils.clip_grad_norm_(self.parameters.values(), training.clip))
        # One exchange: processes must agree on when to save and to stop, which each would see at another step.
        facts = torch.stack(
            [loss, *(torch.tensor(float(flag), device=device) for flag in (due, self.interrupts.asked))]
        )
        if n_processes() > 1:
            torch.distributed.all_reduce(facts)
        total, length = facts.tolist(), float(norm)
        mean = total[0] / n_processes()
        if not (math.isfinite(mean) and math.isfinite(length)):
            raise self._diverged(step + 1, f"the loss is {mean}, its gradient's norm {length}")
        self.optimizer.step()
        if (step + 1) % SPECKS_EVERY == 0:
            flush_denormals(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(mean)
        return rate, length, total[1] + total[2] > 0, total[2] > 0

    def _parts(self, step: int) -> list[list[int]]:
        """The numbers of the windows of a step, part by part; none behind the last step."""
        if step >= self.course.steps:
            return []
        if step >= self.required:
            self.required = step + AHEAD
            self.store.require(self.course.windows_until(self.required))
        return self.course.parts(step, self.store)

    def _loss(self, numbers: Sequence[int], then: Sequence[int] | None) -> Tensor:
        device = self.accelerator.device
        windows = self.store.windows(numbers).to(device)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        hidden = None
        if self.prefix is not None:
            hidden = self.prefix.hidden(numbers, tokens)
            if then is not None:
                self.prefix.ahead(then)
        loss: Tensor = self.wrapped(tokens, targets, hidden)
        return loss

    def _save(self) -> None:
        tensors = snapshot(self.parameters, self.optimizer)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise self._diverged(len(self.losses), "weights or their moments are no longer finite")
        numbers = {"losses": self.losses, "seconds": self._seconds()}
        # One process writes; where it cannot, all stop.
        on_main(
            save_state,
            self.folder,
            len(self.losses),
            fingerprint=self.fingerprint,
            tensors=tensors,
            numbers=numbers,
        )
        self.saved = time.perf_counter()

    def _seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def _diverged(self, step: int, what: str) -> SurgeryError:
        kept = load_state(self.folder, fingerprint=self.fingerprint)
        where = f"the state after step {kept.step} is kept in {self.folder}" if kept else "no state was saved yet"
        return SurgeryError(
            f"step {step}: {what}; {where}",
            where=self.model.live.name,
            hint=f"Lower the learning rate, which is {self.course.training.learning_rate:g}, and begin the stage anew.",
        )


def _check_batch(course: TrainingSchedule) -> None:
    processes, accumulate = n_processes(), course.training.accumulate
    if course.batch % (processes * accumulate):
        raise usage_error(
            f"got {course.batch} windows, which {processes} process(es) in {accumulate} part(s) each cannot share",
            where="batch",
            hint=f"Use a multiple of {processes * accumulate}.",
        )


def _check_prefix(prefix: Prefix | None, model: StageModel) -> None:
    if prefix is None:
        return
    if is_sharded():
        raise usage_error(
            "the prefix cache does not work where FSDP shards the model",
            where="cache",
            hint="Set use: off, or start without FSDP.",
        )
    dtype = autocast_dtype(model.live.device)
    if (prefix.depth, prefix.autocast) != (model.depth, dtype):
        raise usage_error(
            f"got one up to layer {prefix.depth} in {prefix.autocast}, expected {model.depth} in {dtype}",
            where="prefix",
        )


def _fingerprint(model: StageModel, course: TrainingSchedule, identity: str) -> str:
    """Of all that a state belongs to; the number of processes is not part of it."""
    facts = {
        "stage": course.stage.model_dump(mode="json"),
        "training": course.training.model_dump(mode="json"),
        "sizes": [course.first_window, course.sequence, course.batch, course.seed],
        "frozen": hash_tensors(parameter_hashes(model.frozen())),
        "start": hash_tensors(parameter_hashes(model.trained())),
        "identity": identity,
    }
    return hash_text(json.dumps(facts, sort_keys=True))
