"""Low-rank updates of frozen layers (LoRA, arXiv 2106.09685): W + (α / r)·B·A, merged into W after training.

Every matrix of the layers gets a trainable A and B beside it. `LoraUpdates.merge` adds them to the weights and removes
them again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import SurgeryError
from surgery.growth.plan import Lora
from surgery.models.parameters import assign, gather_full

LORA = "lora"  # name of the submodule with A and B: layers.0.self_attn.q_proj.lora.A


class LoraUpdate(nn.Module):
    """The update added to a matrix's output: (α / r)·B·(A·x).   x: (…, in) → (…, out)

    A: (r, in), uniform in ±1/√in as in the paper's code, from (seed, name). B: (out, r), zero. Both in the matrix's
    dtype and on its device.
    """

    def __init__(self, fan_in: int, fan_out: int, settings: Lora, *, like: Tensor, name: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        bound = 1 / math.sqrt(fan_in)
        # Drawn on the CPU: GPUs have other generators, and the start must not depend on the device.
        initial = torch.empty(settings.rank, fan_in).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(initial.to(like))
        self.B = nn.Parameter(torch.zeros(fan_out, settings.rank).to(like))
        self.scale = settings.alpha / settings.rank

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(functional.linear(inputs, self.A), self.B) * self.scale

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return (α / r)·B·A in fp64: (out, in). Under FSDP2 all processes call it."""
        product: Tensor = gather_full(self.B).double() @ gather_full(self.A).double()
        return product * self.scale


@dataclass(frozen=True)
class LoraUpdates:
    """The updates added to a model.

    modules: name → module of every updated matrix. transposed: names of those whose weight is stored (in, out).
    """

    modules: Mapping[str, nn.Module]
    transposed: frozenset[str]

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to its weight, summed in fp64 and rounded once, and remove it."""
        for name, module in self.modules.items():
            weight, update = _weight(module), _update(module)
            added = update.matrix()
            # fp64, so that the only rounding is that of the result.
            assign(weight, gather_full(weight).double() + (added.T if name in self.transposed else added))
        self.remove()

    def remove(self) -> None:
        """Remove the updates without adding them to the weights."""
        for module in self.modules.values():
            if hasattr(module, LORA):
                vars(module).pop(_HOOK).remove()
                delattr(module, LORA)

    @property
    def merged_names(self) -> tuple[str, ...]:
        """Names of the parameters that `merge` changes."""
        return tuple(f"{name}.weight" for name in self.modules)


def add_lora(layers: Mapping[str, nn.Module], settings: Lora, *, seed: int) -> LoraUpdates:
    """Give every matrix in `layers` (name → layer) a trainable update that is zero at first, and freeze the weights.

    Matrices are the weights of nn.Linear, and of transformers' Conv1D. Experts that are fused into one 3-D parameter
    are not matrices, and get no update.

    Raises:
        SurgeryError: there is no matrix in the layers; one is smaller than the rank.
    """
    matrices = dict(_matrices(layers))
    if not matrices:
        raise SurgeryError("the layers hold no matrix that a low-rank update could be added to", where="lora")
    transposed = frozenset(name for name, module in matrices.items() if not isinstance(module, nn.Linear))
    for name, module in matrices.items():
        weight = _weight(module)
        fan_out, fan_in = reversed(weight.shape) if name in transposed else weight.shape
        if settings.rank > min(fan_in, fan_out):
            raise SurgeryError(
                f"got {settings.rank}, which {name} ({fan_out} × {fan_in}) has no room for",
                where="lora.rank",
                hint=f"Use {min(fan_in, fan_out)} or less.",
            )
    for name, module in matrices.items():
        weight = _weight(module)
        weight.requires_grad_(False)
        fan_out, fan_in = reversed(weight.shape) if name in transposed else weight.shape
        module.add_module(LORA, LoraUpdate(fan_in, fan_out, settings, like=weight, name=name, seed=seed))
        vars(module)[_HOOK] = module.register_forward_hook(_add_update, with_kwargs=True)
    return LoraUpdates(matrices, transposed)


_HOOK = "_lora_hook"


def _add_update(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor:
    # Some families call their projections with keyword arguments.
    inputs = arguments[0] if arguments else next(iter(keywords.values()))
    added: Tensor = output + _update(module)(inputs)
    return added


def _matrices(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    # GPT-2's matrices; stored (in, out), the transpose of nn.Linear's.
    from transformers.pytorch_utils import Conv1D

    # Layers may share a matrix: it gets one update.
    seen: set[int] = set()
    for root, layer in layers.items():
        for inside, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(module, nn.Linear | Conv1D) or not isinstance(weight, Tensor) or id(weight) in seen:
                continue
            if weight.dim() == 2 and weight.is_floating_point():
                seen.add(id(weight))
                yield f"{root}.{inside}", module


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _update(module: nn.Module) -> LoraUpdate:
    update = module.get_submodule(LORA)
    assert isinstance(update, LoraUpdate)
    return update
