"""One merge method on given tensors, through real files and the real engine, cut wherever a test wants it cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merges.methods.registry import METHODS, argument
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.execution import execute
from surgery.engine.kernel import Parameter
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, plan_files
from surgery.engine.result import ExecutionResult

SAFETENSORS = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
SEGMENT_READERS = ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan")


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: its tensors as stored, what was measured of each, and all that the engine reports."""

    tensors: Mapping[str, Tensor]
    outcome: ExecutionResult


Merge = Callable[..., Merged]


@pytest.fixture(scope="session")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """`merge(method, models, base, …)`: see `Merger`."""
    return Merger(tmp_path_factory.mktemp("merges"))


class Merger:
    """Runs one method on tensors by name; session-wide, because every call has a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folders = (folder / str(i) for i in itertools.count())

    def __call__(
        self,
        method: str,
        models: Sequence[Mapping[str, Tensor]],
        base: Mapping[str, Tensor] | None = None,
        *,
        stored: torch.dtype | None = None,
        segment: int = 1 << 20,
        block: int = 1 << 18,
        threads: int = 1,
        out: Path | None = None,
        params: Mapping[str, object] | None = None,
    ) -> Merged:
        """The merge of `models`, in tensors of dtype `stored`, by default the first input's.

        Args:
            segment, block: elements that the engine takes at once; tiny ones cut rows in the middle.
            out: where it is written; the same folder again continues what was interrupted there.
            params: those of the method that differ from their defaults, per-model ones as one number or a tuple;
                `seed` and `paper` too.
        """
        folder = out or next(self._folders)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {**({} if base is None else {"base": base}), **{f"model{i}": model for i, model in enumerate(models)}}
        for role, tensors in roles.items():
            if not (folder / f"{role}.safetensors").exists():  # a rewritten source would be another job
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{role}.safetensors"
                )
        sources = {role: open_checkpoint(folder / f"{role}.safetensors") for role in roles}
        filled = parameters(method, len(models), params or {})
        kernel = METHODS[method].kernel(filled, len(models), based=base is not None)
        planned = []
        for name in models[0]:
            inputs = tuple(TensorInput(source.tensors[name]) for source in sources.values())
            dtype = SAFETENSORS[stored] if stored else inputs[0].tensor.dtype
            planned.append(PlannedTensor(name, dtype, inputs[0].shape, inputs, kernel, filled))
        with pytest.MonkeyPatch.context() as patch:
            for module in SEGMENT_READERS:
                patch.setattr(f"{module}.SEGMENT", segment)
            patch.setattr("surgery.engine.work.computation.BLOCK", block)
            plan = Plan({"name": "merge", "method": method}, sources, plan_files(planned))
            outcome = execute(
                plan, folder / "out", ExecutionOptions(threads=threads), finish=lambda folder, outcome: outcome
            )
        return Merged(load_file(folder / "out/model.safetensors"), outcome)


def parameters(method: str, models: int, given: Mapping[str, object]) -> dict[str, Parameter]:
    """All that a kernel of `method` is called with: what is given, and the defaults for the rest."""
    filled: dict[str, object] = {"seed": 0, "paper": False}
    names = {spec.name for spec in METHODS[method].spec.parameters} | set(filled)
    assert set(given) <= names, f"{method} has no {sorted(set(given) - names)}"
    for spec in METHODS[method].spec.parameters:
        value = given.get(spec.name, spec.default)
        assert value is not None, f"{method} needs {spec.name}"
        filled[argument(spec.name)] = (value,) * models if spec.per_model and not isinstance(value, tuple) else value
    return filled | {name: given[name] for name in ("seed", "paper") if name in given}  # type: ignore[return-value]
