"""Training loop of a stage: optimizer steps over windows of tokens, with resumable states.

With `accelerate launch` or torchrun several processes share each batch (DDP, or FSDP2 where the launcher asks for it).
A training that was stopped or killed is resumed from its last state; on CPUs, with the same number of threads, losses
and weights are then those of an uninterrupted training, bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, usage_error
from surgery.growth.training.accelerator import accelerator_for, autocast_dtype, is_sharded
from surgery.growth.training.optimizer_state import (
    FLUSH_EVERY,
    MOMENTS,
    flush_denormals,
    load_state,
    restore,
    save_state,
    snapshot,
)
from surgery.growth.training.schedule import (
    TrainingSchedule,
    WindowSource,
    has_plateaued,
    learning_rate,
    reproducible,
    step_seed,
)
from surgery.growth.training.stage_model import StageModel, prepare_stage_model
from surgery.io.hashing import hash_tensors, hash_text
from surgery.models.loaded_model import LoadedModel
from surgery.models.parameters import gather_full, local, parameter_hashes
from surgery.runtime.collectives import barrier, on_main
from surgery.runtime.environment import is_main, n_processes, rank
from surgery.runtime.interrupts import DeferredInterrupt
from surgery.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from surgery.growth.prefix_cache.prefix import Prefix, PrefixStatistics

# Steps whose windows are required together: processes wait for each other then, which should be rare.
AHEAD = 16
MINUTE = 60.0

Stopped = Literal["tokens", "plateau"]


@dataclass(frozen=True)
class TrainingStep:
    """A finished optimizer step. tokens: of this stage so far. loss: nats per token. grad_norm: before clipping."""

    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    grad_norm: float


@dataclass(frozen=True)
class StageResult:
    """The result of a stage's training.

    losses: of each step, in nats per token, over all processes. seconds: of training, including those before an
    interruption. optimizer_bytes: of AdamW's moments in this process. n_trained: parameters that trained. weights: all
    tensors that the stage changed, by name, low-rank updates merged; the model's own tensors, or under FSDP2 full
    copies on the CPU. prefix: statistics of the prefix, if there was one.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    stopped: Stopped
    optimizer_bytes: int
    n_trained: int
    weights: Mapping[str, Tensor]
    prefix: PrefixStatistics | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training; 0 where nothing was left to do."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(tokens of the stage so far, loss) for each step."""
        each = self.tokens // self.steps if self.steps else 0
        return [((step + 1) * each, loss) for step, loss in enumerate(self.losses)]


@contextmanager
def trainable_model(live: LoadedModel, schedule: TrainingSchedule, new: Sequence[int]) -> Iterator[StageModel]:
    """Freeze all of `live` in the block but what the stage trains; afterwards nothing trains and no update is left.

    Args:
        live: in fp32, on this process's device.
        new: indices of the layers that the stage added.

    Raises:
        SurgeryError: the processes cannot share the batch; nothing trains, or it cannot (`prepare_stage_model`); the
            device runs out of memory in the block.
    """
    _check_batch(schedule)
    was_training = live.model.training
    model = prepare_stage_model(live, schedule.stage, new, seed=schedule.seed)
    try:
        yield model
    except torch.OutOfMemoryError as error:
        raise SurgeryError(
            f"{live.device} has no memory for {schedule.micro_batch} windows of {schedule.sequence} tokens at a time",
            where=live.name,
            hint="Raise training.accumulate, which computes a batch in more parts.",
        ) from error
    finally:
        live.model.train(was_training)
        live.model.zero_grad(set_to_none=True)
        live.model.requires_grad_(False)
        if model.updates is not None:
            model.updates.remove()


def train_stage(
    model: StageModel,
    schedule: TrainingSchedule,
    *,
    store: WindowSource,
    prefix: Prefix | None,
    folder: Path,
    save_every: float = 5.0,
    label: str = "Training",
    progress: Progress = silent,
    log: Callable[[TrainingStep], None] | None = None,
) -> StageResult:
    """Train `model` in place, or resume its training from the last state in `folder`.

    Args:
        model: of `trainable_model`.
        prefix: gives the input of layer `model.depth`, the first in which something trains; None computes the layers
            below each time.
        folder: where states are kept; the caller removes it once the stage's model is safe.
        save_every: minutes between states; one is saved as well at the end, and at an interrupt.
        label: of the progress bar.
        log: is called in the main process after each step.

    Raises:
        SurgeryError: the prefix does not fit; a loss is not finite; a state is damaged, or another stage's.
        KeyboardInterrupt: it was requested, and the state is saved.
    """
    store.require(schedule.windows_until(AHEAD))
    _check_prefix(prefix, model)
    live = model.live
    live.model.train()
    with reproducible(live.device), DeferredInterrupt() as interrupts:
        run = _Run(model, schedule, store, prefix, folder, interrupts)
        run.resume()
        run.train(label, save_every, progress, log)
        result = run.finish()
        # The stage is complete and its state saved: now the interrupt may pass.
        if interrupts.asked:
            raise KeyboardInterrupt
        return result


class _Run:
    """A running training: the model and its optimizer, wrapped by accelerate, and the losses so far."""

    def __init__(
        self,
        model: StageModel,
        schedule: TrainingSchedule,
        store: WindowSource,
        prefix: Prefix | None,
        folder: Path,
        interrupts: DeferredInterrupt,
    ) -> None:
        self.model, self.schedule, self.store, self.prefix, self.folder = model, schedule, store, prefix, folder
        self.interrupts = interrupts
        self.fingerprint = _fingerprint(model, schedule, store.identity)
        # Before the model is sharded, which would leave only this process's part.
        self.n_trained = model.n_trained
        training = schedule.training
        optimizer = torch.optim.AdamW(
            model.optimizer_groups(training.weight_decay),
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            fused=True,
        )
        self.accelerator = accelerator_for(model, schedule.sequence)
        self.wrapped, prepared = self.accelerator.prepare(model, optimizer)
        self.optimizer: torch.optim.Optimizer = prepared.optimizer
        # Only now: under FSDP2 `prepare` replaces parameters by their shards.
        self.parameters = model.trained()
        self.losses: list[float] = []
        self.earlier_seconds = 0.0  # of training before this process resumed it
        self.required_steps = AHEAD
        self.started = self.saved = time.perf_counter()

    def resume(self) -> None:
        """Load the last saved state, if there is one."""
        barrier()
        state = load_state(self.folder, fingerprint=self.fingerprint)
        if state is not None:
            restore(self.parameters, self.optimizer, state.tensors)
            self.losses, self.earlier_seconds = list(state.numbers["losses"]), state.numbers["seconds"]
        self.started = self.saved = time.perf_counter()

    def train(
        self, label: str, save_every: float, progress: Progress, log: Callable[[TrainingStep], None] | None
    ) -> None:
        schedule = self.schedule
        with progress(label, schedule.steps * schedule.tokens_per_step, "tokens") as advance:
            if self.losses:
                advance(len(self.losses) * schedule.tokens_per_step)
            while self.stopped is None:
                started = time.perf_counter()
                due = started - self.saved >= save_every * MINUTE
                rate, norm, save, interrupted = self._step(due)
                if log is not None and is_main():
                    speed = schedule.tokens_per_step / (time.perf_counter() - started)
                    log(TrainingStep(len(self.losses) * schedule.tokens_per_step, self.losses[-1], rate, speed, norm))
                advance(schedule.tokens_per_step, f"loss {self.losses[-1]:.3f}")
                if save or self.stopped is not None:
                    self._save()
                if interrupted:
                    raise KeyboardInterrupt

    @property
    def stopped(self) -> Stopped | None:
        """Why training is complete; None while it is not."""
        if len(self.losses) >= self.schedule.steps:
            return "tokens"
        plateau = has_plateaued(self.losses, self.schedule.stage.plateau, self.schedule.tokens_per_step)
        return "plateau" if plateau else None

    def finish(self) -> StageResult:
        """Merge low-rank updates and return the result."""
        seconds = self._seconds()
        # Before updates are merged, which removes their parameters.
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
            steps * self.schedule.tokens_per_step,
            tuple(self.losses),
            seconds,
            stopped,
            sum(local(moment).nbytes for moment in moments),
            self.n_trained,
            weights,
            None if self.prefix is None else self.prefix.statistics,
        )

    def _step(self, due: bool) -> tuple[float, float, bool, bool]:
        """Do one optimizer step; return the learning rate, the gradient norm, and whether to save and to stop."""
        step, training, device = len(self.losses), self.schedule.training, self.accelerator.device
        rate = learning_rate(step, self.schedule.steps, training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(self.schedule.seed, step, rank()))
        loss = torch.zeros((), device=device)
        micro_batches, next_step = self._micro_batches(step), self._micro_batches(step + 1)
        for at, indices in enumerate(micro_batches):
            rest = micro_batches[at + 1 :]
            following = rest or next_step
            # Gradients are exchanged once a step, with the last micro-batch.
            with self.accelerator.no_sync(self.wrapped) if rest else nullcontext():
                part_loss = self._loss(indices, following[0] if following else None) / len(micro_batches)
                part_loss.backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()
        norm = gather_full(nn.utils.clip_grad_norm_(self.parameters.values(), training.clip))
        # One all-reduce for everything: processes must agree on when to save and to stop, or they would wait for each
        # other for ever; each would otherwise notice it at another step.
        facts = torch.stack(
            [loss, *(torch.tensor(float(flag), device=device) for flag in (due, self.interrupts.asked))]
        )
        if n_processes() > 1:
            torch.distributed.all_reduce(facts)
        total, length = facts.tolist(), float(norm)
        mean = total[0] / n_processes()
        # Before the update: the last saved state must not be overwritten by NaN.
        if not (math.isfinite(mean) and math.isfinite(length)):
            raise self._diverged(step + 1, f"the loss is {mean}, its gradient's norm {length}")
        self.optimizer.step()
        if (step + 1) % FLUSH_EVERY == 0:
            flush_denormals(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(mean)
        return rate, length, total[1] + total[2] > 0, total[2] > 0

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Return the window indices of a step, one list per micro-batch; nothing after the last step."""
        if step >= self.schedule.steps:
            return []
        if step >= self.required_steps:
            self.required_steps = step + AHEAD
            self.store.require(self.schedule.windows_until(self.required_steps))
        return self.schedule.micro_batches(step, self.store)

    def _loss(self, indices: Sequence[int], following: Sequence[int] | None) -> Tensor:
        """Return the loss of the windows `indices`, and prefetch the cached states of those that follow."""
        windows = self.store.windows(indices).to(self.accelerator.device)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        hidden = None
        if self.prefix is not None:
            hidden = self.prefix.hidden(indices, tokens)
            if following is not None:
                self.prefix.prefetch(following)
        loss: Tensor = self.wrapped(tokens, targets, hidden)
        return loss

    def _save(self) -> None:
        tensors = snapshot(self.parameters, self.optimizer)
        # A loss can be finite while moments have overflowed; such a state could never be resumed.
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
        return self.earlier_seconds + time.perf_counter() - self.started

    def _diverged(self, step: int, what: str) -> SurgeryError:
        state = load_state(self.folder, fingerprint=self.fingerprint)
        where = f"the state after step {state.step} is kept in {self.folder}" if state else "no state was saved yet"
        rate = self.schedule.training.learning_rate
        return SurgeryError(
            f"step {step}: {what}; {where}",
            where=self.model.live.name,
            hint=f"Lower the learning rate, which is {rate:g}, and begin the stage anew.",
        )


def _check_batch(schedule: TrainingSchedule) -> None:
    processes, accumulate = n_processes(), schedule.training.accumulate
    if schedule.batch % (processes * accumulate):
        raise usage_error(
            f"got {schedule.batch} windows, which {processes} process(es) in {accumulate} part(s) each cannot share",
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
    # States that were computed in another dtype, or for another layer, would train without any error.
    dtype = autocast_dtype(model.live.device)
    if (prefix.depth, prefix.autocast) != (model.depth, dtype):
        raise usage_error(
            f"got one up to layer {prefix.depth} in {prefix.autocast}, expected {model.depth} in {dtype}",
            where="prefix",
        )


def _fingerprint(model: StageModel, schedule: TrainingSchedule, identity: str) -> str:
    """Return a hash of everything that a state belongs to; the number of processes is not part of it."""
    facts = {
        "stage": schedule.stage.model_dump(mode="json"),
        "training": schedule.training.model_dump(mode="json"),
        "sizes": [schedule.first_window, schedule.sequence, schedule.batch, schedule.seed],
        "frozen": hash_tensors(parameter_hashes(model.frozen())),
        "start": hash_tensors(parameter_hashes(model.trained())),
        "identity": identity,
    }
    return hash_text(json.dumps(facts, sort_keys=True))
