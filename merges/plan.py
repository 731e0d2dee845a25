"""Plan the tensors of a merge: every slot with its kernel, inputs and parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merges.checks import ALIGN
from merges.config.schema import MergeConfig, merged_sources
from merges.layout import Layout, Slot
from merges.methods.registry import METHODS, Method, argument
from merges.tokenizer.embeddings import TokenInputs
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.kernel import IDENTITY, Parameter
from surgery.engine.plan import PlannedTensor, copy_tensor
from surgery.engine.preflight import Preflight
from surgery.errors import ErrorList, SurgeryError

_NO_SUM = 1e-8  # weights whose sum is smaller cannot be normalised
_NORMALISING = ("normalize", "normalize_weights")


@dataclass(frozen=True)
class MergedTensor:
    """An output tensor and its origin.

    Args:
        models: the merged models in the order of the kernel's measures, without the base where `based`.
        weights: their `weight`s, where the method has such a parameter.
    """

    planned: PlannedTensor
    group: str
    models: tuple[str, ...]
    based: bool
    weights: tuple[float, ...] | None = None


def plan_tensors(
    preflight: Preflight, config: MergeConfig, layout: Layout, tokens: TokenInputs | None
) -> list[MergedTensor]:
    """Plan every tensor of the output; what cannot be merged is added to the errors of `preflight`."""
    method = METHODS[config.merge_method]
    stored_as = config.out_dtype or config.dtype
    planner = _Planner(config, method, dtype_name(stored_as) if stored_as else None, tokens, preflight.errors)
    planned = [tensor for slot in layout.slots if (tensor := planner.plan(slot)) is not None]
    if planner.unset:  # the others are as a rule of the same parameter, one for each tensor of the model
        preflight.errors.add(planner.unset[0])
    return planned


class _Planner:
    """Plans one slot after the other. `unset`: an error for each tensor for which a parameter has no value."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        stored_as: str | None,
        tokens: TokenInputs | None,
        errors: ErrorList,
    ) -> None:
        self.config = config
        self.method = method
        self.stored_as = stored_as
        self.tokens = tokens
        self.errors = errors
        self.unset: list[str] = []

    def plan(self, slot: Slot) -> MergedTensor | None:
        refs = [source.model for source in slot.section.sources]
        base = slot.section.base_index if self.method.spec.base != "none" else None
        merged = merged_sources(self.method.spec, slot.section)
        first = slot.inputs[0 if slot.copied_from else base or 0]
        models = tuple(refs[i] for i in merged)
        if slot.copied_from is not None:
            return self.copy(slot, slot.copied_from)
        if not first.is_float:  # integers (position ids, routing tables) have no meaningful mean: the base's or first
            return MergedTensor(replace(copy_tensor(first), name=slot.name), slot.group, models, False)
        try:
            values = self.config.scope(slot.section).values(
                self.method.spec, slot.name, slot.t, [tensor.name for tensor in slot.inputs]
            )
        except SurgeryError as error:
            self.unset.append(str(error))
            return None
        # The kernel's order: base first, then the models as the config lists them.
        order = [*(() if base is None else (base,)), *merged]
        inputs = self.inputs(slot, [refs[i] for i in order], [slot.inputs[i] for i in order])
        if inputs is None:
            return None
        params: dict[str, Parameter] = {argument(name): value for name, value in values.items()}
        # Beside the method's own parameters, every kernel gets these two.
        params |= {"seed": self.config.seed, "paper": self.config.compat == "paper"}
        if not self.has_valid_parameters(slot, params):
            return None
        weight = params.get("weight")
        weights = tuple(float(a) for a in weight) if isinstance(weight, tuple) else None
        # Where the config names no dtype the base's is kept, whatever the other models are stored in.
        dtype = self.stored_as or first.dtype
        # A copy keeps its bytes; a product by 1 would be rounded to what it was, but read and computed all the same.
        if self.method.spec.name == "passthrough" and params["scale"] == (1.0,) and inputs[0].rows is None:
            planned = replace(copy_tensor(first, dtype=self.stored_as), name=slot.name)
        else:
            kernel = self.method.kernel(params, len(merged), based=base is not None)
            planned = PlannedTensor(slot.name, dtype, inputs[0].shape, inputs, kernel, params)
        return MergedTensor(planned, slot.group, models, base is not None, weights)

    def copy(self, slot: Slot, ref: str) -> MergedTensor | None:
        """Plan the copy of a tensor that only some models have; its rows are aligned like those of others."""
        planned = replace(copy_tensor(slot.inputs[0], dtype=self.stored_as), name=slot.name)
        if slot.per_token and self.tokens is not None:
            try:
                source = self.tokens.align(ref, slot.name, slot.inputs[0])
            except SurgeryError as error:
                self.errors.add(str(error))
                return None
            if source.rows is not None:
                planned = replace(planned, shape=source.shape, inputs=(source,), kernel=IDENTITY)
        return MergedTensor(planned, slot.group, (), False)

    def inputs(self, slot: Slot, refs: Sequence[str], stored: Sequence[StoredTensor]) -> tuple[TensorInput, ...] | None:
        """Return the kernel's inputs, rows aligned with the output's vocabulary; None where shapes differ."""
        if slot.per_token and self.tokens is not None:
            return tuple(self.tokens.align(ref, slot.name, tensor) for ref, tensor in zip(refs, stored, strict=True))
        shapes = [tensor.shape for tensor in stored]
        if len(set(shapes)) > 1:
            text = ", ".join(f"{list(shape)} in {ref}" for ref, shape in zip(refs, shapes, strict=True))
            hint = ALIGN if slot.per_token else "Only models of one shape can be merged."
            self.errors.add_tensor(slot.name, text, hint)
            return None
        return tuple(TensorInput(tensor) for tensor in stored)

    def has_valid_parameters(self, slot: Slot, params: Mapping[str, Parameter]) -> bool:
        """Check the parameters against each other; False where the slot cannot be merged by them."""
        weight = params.get("weight")
        # Methods that need a base divide by 1 instead, or by the weights of those that agree, as mergekit does.
        normalises = self.method.spec.base != "required" and any(params.get(name) for name in _NORMALISING)
        if isinstance(weight, tuple) and normalises and abs(sum(map(float, weight))) < _NO_SUM:
            numbers = ", ".join(f"{a:g}" for a in weight)
            what = f"weights {numbers} sum to zero, and are to be divided by their sum"
            self.errors.add_tensor(slot.name, what, "Change one, or set normalize to false.")
            return False
        density, epsilon = params.get("density"), params.get("epsilon")
        if isinstance(density, tuple) and isinstance(epsilon, tuple):
            for d, e in zip(map(float, density), map(float, epsilon), strict=True):
                # Densities of 0 and 1 are not random, whatever ε is.
                if 0 < d < 1 and not 0 < d - e <= d + e < 1:
                    what = f"density {d:g} ± epsilon {e:g} must lie between 0 and 1"
                    self.errors.add_tensor(slot.name, what, "Choose a smaller epsilon.")
                    return False
        return True
