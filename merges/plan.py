"""A merge config as a plan: every slot with its kernel, its inputs and its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merges.checks import ALIGN, TensorFaults
from merges.config.schema import MergeConfig, merged_sources
from merges.layout import Layout, Slot
from merges.methods.registry import METHODS, Method, argument
from merges.tokenizer.embeddings import TokenInputs
from surgery.checkpoint.checkpoint import StoredTensor
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import TensorInput
from surgery.engine.kernel import Parameter
from surgery.engine.plan import PlannedTensor, copy_tensor
from surgery.engine.preflight import Preflight
from surgery.errors import SurgeryError

_NO_SUM = 1e-8  # weights whose sum is smaller cannot be normalised
_NORMALISING = ("normalize", "normalize_weights")


@dataclass(frozen=True)
class MergedTensor:
    """An output tensor and where it comes from.

    models: the merged models in the order of the kernel's measures, the base not among them where `based`.
    weights: their `weight`s, where the method has such.
    """

    planned: PlannedTensor
    group: str
    models: tuple[str, ...]
    based: bool
    weights: tuple[float, ...] | None = None


def plan_tensors(
    preflight: Preflight, config: MergeConfig, layout: Layout, tokens: TokenInputs | None
) -> list[MergedTensor]:
    """Every tensor of the output; what cannot be merged goes to the faults of `preflight`."""
    method = METHODS[config.merge_method]
    stored_as = config.out_dtype or config.dtype
    planner = _Planner(config, method, dtype_name(stored_as) if stored_as else None, tokens)
    planned = [tensor for slot in layout.slots if (tensor := planner.plan(slot)) is not None]
    for error in (*planner.faults.sentences(), *planner.unset[:1]):
        preflight.errors.add(error)
    return planned


class _Planner:
    """Plans slots. `unset`: a sentence for each tensor for which a parameter has no value."""

    def __init__(self, config: MergeConfig, method: Method, stored_as: str | None, tokens: TokenInputs | None) -> None:
        self.config = config
        self.method = method
        self.stored_as = stored_as
        self.tokens = tokens
        self.faults = TensorFaults()
        self.unset: list[str] = []

    def plan(self, slot: Slot) -> MergedTensor | None:
        refs = [source.model for source in slot.section.sources]
        base = slot.section.base_index if self.method.spec.base != "none" else None
        merged = merged_sources(self.method.spec, slot.section)
        first = slot.inputs[base or 0]
        models = tuple(refs[i] for i in merged)
        if not first.is_float:
            return MergedTensor(replace(copy_tensor(first), name=slot.name), slot.group, models, False)
        try:
            values = self.config.scope(slot.section).values(
                self.method.spec, slot.name, slot.t, [tensor.name for tensor in slot.inputs]
            )
        except SurgeryError as error:
            self.unset.append(str(error))
            return None
        order = [*(() if base is None else (base,)), *merged]
        inputs = self.inputs(slot, [refs[i] for i in order], [slot.inputs[i] for i in order])
        if inputs is None:
            return None
        params: dict[str, Parameter] = {argument(name): value for name, value in values.items()}
        params |= {"seed": self.config.seed, "paper": self.config.compat == "paper"}
        if not self.is_possible(slot, params):
            return None
        weight = params.get("weight")
        weights = tuple(float(a) for a in weight) if isinstance(weight, tuple) else None
        dtype = self.stored_as or first.dtype
        if self.method.spec.name == "passthrough" and params["scale"] == (1.0,) and inputs[0].rows is None:
            planned = replace(copy_tensor(first, dtype=self.stored_as), name=slot.name)
        else:
            kernel = self.method.kernel(params, len(merged), based=base is not None)
            planned = PlannedTensor(slot.name, dtype, inputs[0].shape, inputs, kernel, params)
        return MergedTensor(planned, slot.group, models, base is not None, weights)

    def inputs(self, slot: Slot, refs: Sequence[str], stored: Sequence[StoredTensor]) -> tuple[TensorInput, ...] | None:
        if slot.per_token and self.tokens is not None:
            return tuple(self.tokens.align(ref, slot.name, tensor) for ref, tensor in zip(refs, stored, strict=True))
        shapes = [tensor.shape for tensor in stored]
        if len(set(shapes)) > 1:
            found = ", ".join(f"{list(shape)} in {ref}" for ref, shape in zip(refs, shapes, strict=True))
            advice = ALIGN if slot.per_token else "Only models of one shape can be merged."
            self.faults.add(slot.name, found, advice)
            return None
        return tuple(TensorInput(tensor) for tensor in stored)

    def is_possible(self, slot: Slot, params: Mapping[str, Parameter]) -> bool:
        """Whether the parameters can be merged by; what cannot is a fault."""
        weight = params.get("weight")
        # Methods that need a base divide by 1 instead, or by the weights of those that agree, as mergekit does.
        normalises = self.method.spec.base != "required" and any(params.get(name) for name in _NORMALISING)
        if isinstance(weight, tuple) and normalises and abs(sum(map(float, weight))) < _NO_SUM:
            shown = ", ".join(f"{a:g}" for a in weight)
            what = f"weights {shown} sum to zero, and are to be divided by their sum"
            self.faults.add(slot.name, what, "Change one, or set normalize to false.")
            return False
        density, epsilon = params.get("density"), params.get("epsilon")
        if isinstance(density, tuple) and isinstance(epsilon, tuple):
            for d, e in zip(map(float, density), map(float, epsilon), strict=True):
                if 0 < d < 1 and not 0 < d - e <= d + e < 1:
                    what = f"density {d:g} ± epsilon {e:g} must lie between 0 and 1"
                    self.faults.add(slot.name, what, "Choose a smaller epsilon.")
                    return False
        return True
