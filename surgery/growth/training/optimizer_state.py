"""The state of a stage that is being trained, on disk: what it needs to go on as if it had never stopped.

In go the parameters that train and AdamW's moments of them, by name, and numbers; out they come again, whole and of the
same stage, or not at all. A state is a folder of `state.safetensors` and `state.json`; a new one takes the place of the
last once it is on the disk.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.io.atomic import commit_folder, disk_error, partial_path
from surgery.io.hashing import hash_tensors, hash_text
from surgery.models.parameters import assign, gather_full, local, parameter_hashes

TENSORS, NUMBERS = "state.safetensors", "state.json"
# Between two clearings moments fall by 0.9^64, or a thousandth: to 1e-33, where denormals begin at 1e-38.
SPECK, SPECKS_EVERY = 1e-30, 64
WEIGHT, MOMENTS, COUNT = "weight", ("exp_avg", "exp_avg_sq"), "step"


@dataclass(frozen=True)
class TrainingState:
    """step: optimizer steps done. numbers: whatever else was saved, as JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def save_state(
    folder: Path, step: int, *, fingerprint: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Writes a state to `folder`, for one process to do; a state that is there already is kept until this one is safe.

    Args:
        fingerprint: of all that the state belongs to; `load_state` holds it to that.

    Raises:
        SurgeryError: the disk is full, or cannot be written.
    """
    partial = partial_path(folder)
    body = {"step": step, "fingerprint": fingerprint, "tensors": parameter_hashes(tensors), "numbers": dict(numbers)}
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a kill
        partial.mkdir(parents=True)
        save_file(dict(tensors), partial / TENSORS)
        (partial / NUMBERS).write_text(json.dumps({"hash": _hash(body), "state": body}), encoding="utf-8")
        commit_folder(partial, folder, overwrite=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    except SafetensorError as error:
        free, needed = shutil.disk_usage(partial).free, sum(tensor.nbytes for tensor in tensors.values())
        raise SurgeryError(
            f"the state of training cannot be written ({error})",
            where=folder,
            hint=f"It takes {needed:,} bytes; {free:,} are free.",
        ) from error


def load_state(folder: Path, *, fingerprint: str) -> TrainingState | None:
    """The state in `folder`, or the one before where a kill came between the two; None where there is none.

    Raises:
        SurgeryError: it is damaged, or is that of something else.
    """
    faults: list[tuple[Path, Exception]] = []
    for place in (folder, folder.with_name(folder.name + ".replaced")):
        if not place.exists():
            continue
        try:
            return _read(place, fingerprint)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            faults.append((place, error))
    if not faults:
        return None
    place, fault = faults[0]
    raise SurgeryError(
        f"the state of training that is kept here is damaged ({fault})",
        where=place,
        hint="Remove the folder to begin the stage anew.",
    ) from fault


def snapshot(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters and AdamW's state of each, on the CPU and whole; under FSDP2 all processes call it."""
    found = {}
    for name, parameter in parameters.items():
        found[f"{WEIGHT}/{name}"] = gather_full(parameter.detach()).cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = gather_full(value).cpu().contiguous()
    return found


@torch.no_grad()
def restore(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts a `snapshot` back, each tensor where and how its parameter lies (under FSDP2 its shard)."""
    for name, parameter in parameters.items():
        assign(parameter, tensors[f"{WEIGHT}/{name}"])
        if f"{COUNT}/{name}" not in tensors:
            continue  # it had no gradient so far
        optimizer.state[parameter] = {COUNT: tensors[f"{COUNT}/{name}"].to(parameter.device)}
        for key in MOMENTS:
            moment = torch.empty_like(parameter)
            assign(moment, tensors[f"{key}/{name}"])
            optimizer.state[parameter][key] = moment


@torch.no_grad()
def flush_denormals(optimizer: torch.optim.Optimizer) -> None:
    """Sets moments below `SPECK` to zero, on CPUs: called every `SPECKS_EVERY` steps, none ever becomes denormal.

    Moments of what gets no gradient, such as rows of tokens that do not occur, halve every few steps, and arithmetic on
    denormal numbers takes thirty times as long. Beside AdamW's epsilon they are nothing. (`torch.set_flush_denormal`
    holds for some threads only, so that results would depend on which one computes.)
    """
    for state in optimizer.state.values():
        for moment in (local(state[key]) for key in MOMENTS if key in state):
            if moment.is_cpu:
                moment.copy_(torch.hardshrink(moment, SPECK))


def _hash(body: Mapping[str, Any]) -> str:
    return hash_text(json.dumps(body, sort_keys=True))


def _read(folder: Path, fingerprint: str) -> TrainingState:
    held = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    body = held["state"]
    if held["hash"] != _hash(body):
        raise ValueError(f"{NUMBERS} does not match its hash")
    if body["fingerprint"] != fingerprint:
        raise SurgeryError(
            "the state of training that is kept here is that of another stage, model or corpus",
            where=folder,
            hint="Choose another folder, or remove this one to begin the stage anew.",
        )
    tensors = load_file(folder / TENSORS)
    if hash_tensors(parameter_hashes(tensors)) != hash_tensors(body["tensors"]):
        raise ValueError(f"{TENSORS} does not match its hashes")
    return TrainingState(body["step"], tensors, body["numbers"])
