"""Save and load the resumable state of a training: parameters, AdamW's moments, and numbers.

A state is a folder of `state.safetensors` and `state.json`; a new one replaces the last once it is on the disk. A state
is loaded only if it is undamaged and belongs to the same stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.checkpoint.tensor_file import load_all_tensors
from surgery.errors import SurgeryError
from surgery.io.atomic import disk_error, partial_path
from surgery.io.hashing import hash_tensors, hash_text
from surgery.io.json_io import read_json
from surgery.io.output_folder import commit_folder
from surgery.io.safe_paths import contained_file
from surgery.models.parameters import assign, gather_full, local, parameter_hashes

TENSORS, NUMBERS = "state.safetensors", "state.json"
# Between two flushes moments fall by 0.9^64, or a thousandth: to 1e-33, still above the denormals, below 1e-38.
SMALLEST_MOMENT, FLUSH_EVERY = 1e-30, 64
WEIGHT, MOMENTS, COUNT = "weight", ("exp_avg", "exp_avg_sq"), "step"


@dataclass(frozen=True)
class TrainingState:
    """A saved state. step: finished optimizer steps. numbers: whatever else was saved, as JSON values."""

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def save_state(
    folder: Path, step: int, *, fingerprint: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Write a state to `folder`, on one process; an existing state is kept until this one is on the disk.

    Args:
        fingerprint: hash of everything that the state belongs to; `load_state` refuses a state with another one.

    Raises:
        SurgeryError: the disk is full, or cannot be written.
    """
    # Written beside the old state, which is replaced by a rename: a kill leaves one of the two whole.
    partial = partial_path(folder)
    body = {"step": step, "fingerprint": fingerprint, "tensors": parameter_hashes(tensors), "numbers": dict(numbers)}
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a kill
        partial.mkdir(parents=True)
        save_file(dict(tensors), partial / TENSORS)
        (partial / NUMBERS).write_text(json.dumps({"hash": _hash(body), "state": body}), encoding="utf-8")
        commit_folder(partial, folder, overwrite=True)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise disk_error(error, folder) from error


def load_state(folder: Path, *, fingerprint: str) -> TrainingState | None:
    """Load the state in `folder`; return None where there is none.

    If a kill came between the renames of the last `save_state`, the state before it is loaded.

    Raises:
        SurgeryError: the state is damaged, or belongs to something else.
    """
    errors: list[tuple[Path, Exception]] = []
    for candidate in (folder, folder.with_name(folder.name + ".replaced")):
        if not candidate.exists():
            continue
        try:
            return _read(candidate, fingerprint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            errors.append((candidate, error))
    if not errors:
        return None
    damaged, cause = errors[0]
    raise SurgeryError(
        f"the state of training that is kept here is damaged ({cause})",
        where=damaged,
        hint="Remove the folder to begin the stage anew.",
    ) from cause


def snapshot(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters and AdamW's state of each, unsharded on the CPU; under FSDP2 all processes call it."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"{WEIGHT}/{name}"] = gather_full(parameter.detach()).cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = gather_full(value).cpu().contiguous()
    return tensors


@torch.no_grad()
def restore(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Load a `snapshot`, each tensor to its parameter's device; under FSDP2 each process takes its shard."""
    for name, parameter in parameters.items():
        assign(parameter, tensors[f"{WEIGHT}/{name}"])
        if f"{COUNT}/{name}" not in tensors:
            continue  # it had no gradient before the snapshot
        # Set directly, as `load_state_dict` identifies parameters by position, not by name.
        optimizer.state[parameter] = {COUNT: tensors[f"{COUNT}/{name}"].to(parameter.device)}
        for key in MOMENTS:
            moment = torch.empty_like(parameter)
            assign(moment, tensors[f"{key}/{name}"])
            optimizer.state[parameter][key] = moment


@torch.no_grad()
def flush_denormals(optimizer: torch.optim.Optimizer) -> None:
    """Set moments on the CPU below `SMALLEST_MOMENT` to zero; call it every `FLUSH_EVERY` steps.

    Moments of what gets no gradient, such as rows of tokens that do not occur, halve every few steps, and arithmetic on
    denormal numbers takes thirty times as long. Beside AdamW's epsilon they are negligible.
    (`torch.set_flush_denormal` applies to some threads only, so that results would depend on which one computes.)
    """
    for state in optimizer.state.values():
        for moment in (local(state[key]) for key in MOMENTS if key in state):
            if moment.is_cpu:
                moment.copy_(torch.hardshrink(moment, SMALLEST_MOMENT))


def _hash(body: Mapping[str, Any]) -> str:
    return hash_text(json.dumps(body, sort_keys=True))


def _read(folder: Path, fingerprint: str) -> TrainingState:
    try:
        content = read_json(contained_file(folder, NUMBERS))
    except SurgeryError as error:
        raise ValueError(str(error)) from error  # told with what to do about it, if no older state is whole
    body = content["state"]
    if content["hash"] != _hash(body):
        raise ValueError(f"{NUMBERS} does not match its hash")
    if body["fingerprint"] != fingerprint:
        raise SurgeryError(
            "the state of training that is kept here is that of another stage, model or corpus",
            where=folder,
            hint="Choose another folder, or remove this one to begin the stage anew.",
        )
    try:
        tensors = load_all_tensors(contained_file(folder, TENSORS))
    except SurgeryError as error:
        raise ValueError(str(error)) from error
    # A torn file may still have a valid header.
    if hash_tensors(parameter_hashes(tensors)) != hash_tensors(body["tensors"]):
        raise ValueError(f"{TENSORS} does not match its hashes")
    return TrainingState(body["step"], tensors, body["numbers"])
