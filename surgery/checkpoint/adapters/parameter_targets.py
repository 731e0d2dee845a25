"""LoRA on bare parameters (PEFT's target_parameters): experts' weights in one tensor, or one by one in the file.

PEFT wraps a module once for each of its parameters, and its file does not say which wrapper is whose. The factors'
shapes do: of the parameters that the config names, one fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.adapters.adapter_config import AdapterConfig
from surgery.checkpoint.adapters.adapter_weights import AdaptedModule
from surgery.checkpoint.adapters.expert_low_rank import ExpertLowRank
from surgery.checkpoint.adapters.low_rank import LowRank
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure
from surgery.errors import SurgeryError, listing

# Families whose experts' weights are (experts, in, out) in transformers; needed only where both numbers are the same.
_IN_OUT_FAMILIES = re.compile(r"gpt_oss|aria|openai_privacy_filter")
# Parts of the fused parameters, in the order of their outputs, by the names that files have for them.
_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
_ONE_EXPERT = re.compile(r"(?P<stem>.+)\.(?P<expert>\d+)\.(?P<part>[a-z0-9_]+)\.weight", re.ASCII)


@dataclass(frozen=True)
class _Target:
    """A parameter: the experts' one tensor, or for each part of its outputs the experts' matrices in order."""

    name: str
    fused: StoredTensor | None = None
    parts: tuple[tuple[StoredTensor, ...], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in), or as the one tensor has it."""
        if self.fused is not None:
            return self.fused.shape
        outputs = sum(part[0].shape[0] for part in self.parts)
        return len(self.parts[0]), outputs, self.parts[0][0].shape[1]


class ParameterTargets:
    """The wrappers of one module, and the parameters of it that they may be for."""

    def __init__(
        self,
        module: str,
        wrappers: Sequence[AdaptedModule],
        config: AdapterConfig,
        structure: ModelStructure,
        tensors: Mapping[str, StoredTensor],
        find: Callable[[str], str | None],
        family: str,
    ) -> None:
        self._family = family
        self._module, self._wrappers, self._config = module, wrappers, config
        self._structure, self._tensors, self._find = structure, tensors, find

    def adapted(self, weights: Path) -> dict[str, StoredTensor]:
        """Return the tensors that the wrappers' factors change, changed.

        Args:
            weights: the adapter's file, for messages.

        Raises:
            SurgeryError: the base has no such parameters, or the shapes do not say which is which.
        """
        targets = list(self._targets())
        if len(targets) < len(self._wrappers):
            raise SurgeryError(
                f'adapts {len(self._wrappers)} parameters of "{self._module}" (target_parameters), of which the base '
                f"has {listing(target.name for target in targets) or 'none'}",
                where=weights.parent,
                hint="Name the right base: BASE+ADAPTER.",
            )
        changed: dict[str, StoredTensor] = {}
        for wrapper in self._wrappers:
            a, b, _ = wrapper.factors
            for factor in (a, b):
                if not factor.is_float or len(factor.shape) != 2:
                    raise SurgeryError(f'"{factor.name}" is no matrix of floats', where=weights)
            fitting = [target for target in targets if _fits(a, b, target.shape)]
            if len(fitting) != 1:
                found = listing(f"{target.name} {list(target.shape)}" for target in fitting or targets)
                problem = "fit several parameters" if fitting else "fit no parameter"
                raise SurgeryError(
                    f'"{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} {problem} that the config '
                    f"names: {found}",
                    where=weights,
                    hint=None if fitting else "Name the right base: BASE+ADAPTER.",
                )
            targets.remove(fitting[0])
            changed |= self._update(fitting[0], a, b)
        return changed

    def _targets(self) -> Iterator[_Target]:
        wanted = self._config.values.get("target_parameters") or ()
        for parameter in dict.fromkeys(target.rpartition(".")[2] for target in wanted):
            name = f"{self._module}.{parameter}"
            if not any(name == target or name.endswith(f".{target}") for target in wanted):
                continue
            found = self._find(name)
            if found is not None:
                yield _Target(parameter, self._tensors[found])
            elif parts := self._one_by_one(parameter):
                yield _Target(parameter, parts=parts)

    def _one_by_one(self, parameter: str) -> tuple[tuple[StoredTensor, ...], ...] | None:
        """Return the matrices of all experts, where the file has one for each; None where it has not."""
        layer = next((int(part) for part in self._module.split(".") if part.isdecimal()), None)
        experts = None if layer is None else self._structure.experts.get(layer)
        if experts is None or parameter not in _PARTS:
            return None
        by_part: dict[str, dict[int, StoredTensor]] = {}
        for name in experts.names:
            if match := _ONE_EXPERT.fullmatch(name):
                by_part.setdefault(match["part"], {})[int(match["expert"])] = self._tensors[name]
        parts = []
        for names in _PARTS[parameter]:
            found = next((by_part[name] for name in names if name in by_part), {})
            if sorted(found) != list(range(experts.n_experts)):
                return None
            parts.append(tuple(found[expert] for expert in range(experts.n_experts)))
        return tuple(parts)

    def _update(self, target: _Target, a: StoredTensor, b: StoredTensor) -> dict[str, StoredTensor]:
        n_experts = target.shape[0] if len(target.shape) == 3 else 1
        rank = a.shape[0] // n_experts
        scale = self._config.scale(f"{self._module}.{target.name}", rank)
        if target.fused is not None:
            weight = target.fused
            if len(weight.shape) == 2:
                return {weight.name: replace(weight, derivation=LowRank(weight, a, b, scale))}
            transposed = self._is_transposed(a, b, weight.shape)
            return {
                weight.name: replace(
                    weight, derivation=ExpertLowRank(weight, a, b, scale, n_experts, transposed=transposed)
                )
            }
        changed, outputs = {}, 0
        for part in target.parts:
            for expert, weight in enumerate(part):
                derivation = ExpertLowRank(weight, a, b, scale, n_experts, expert=expert, outputs=outputs)
                changed[weight.name] = replace(weight, derivation=derivation)
            outputs += part[0].shape[0]
        return changed

    def _is_transposed(self, a: StoredTensor, b: StoredTensor, shape: tuple[int, ...]) -> bool:
        if shape[1] != shape[2]:
            return (a.shape[1], b.shape[0]) == shape[1:]
        return bool(_IN_OUT_FAMILIES.search(self._family))


def _fits(a: StoredTensor, b: StoredTensor, shape: tuple[int, ...]) -> bool:
    n_experts = shape[0] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or not n_experts or not a.shape[0]:
        return False
    if a.shape[0] != b.shape[1] or a.shape[0] % n_experts:
        return False
    ends = a.shape[1], b.shape[0]
    return ends == shape[:-3:-1] or (len(shape) == 3 and ends == shape[1:])
