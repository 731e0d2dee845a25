"""Which tensors meet in a merge: every output tensor with the tensors of its sources, found by structure.

No architecture is listed. A model's layers are the numbered stack that `surgery.checkpoint.structure` finds in its
names; a section's layers are renumbered into the output's stack, and tensors meet that have the same name inside their
layers. What lies outside the layers meets by its full name: embeddings by the first section, final norm and head by the
last, and so do layers beyond the stack, which only predict further tokens ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merges.checks import TensorFaults
from merges.config.schema import MergeConfig, MergeSection
from merges.config.settings import EDGE_POSITION, layer_position
from surgery.checkpoint.checkpoint import Checkpoint, StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import NUMBER
from surgery.engine.preflight import Preflight
from surgery.errors import listing

FINAL_NORM, LM_HEAD, BEYOND = "final norm", "lm_head", "beyond"


@dataclass(frozen=True)
class Slot:
    """One output tensor.

    group: the part of the model that it is reported under. t: where its layer stands in the section, for gradients.
    inputs: one per source of the section, in their order. per_token: whether it has one row per token.
    """

    name: str
    group: str
    section: MergeSection
    t: float
    inputs: tuple[StoredTensor, ...]
    per_token: bool = False


@dataclass(frozen=True)
class Layout:
    """All slots, and for each output layer the number of the layer that stands for it in the config: the template's
    own, or the first source's where the template has no share in it.

    template: the model whose config, names and side files the output gets. left_out: tensors that it does not get,
    because not all models have them and nothing says what they are. outside: model → full name → tensor, of what lies
    in no layer.
    """

    template: Checkpoint
    slots: tuple[Slot, ...]
    layers: tuple[int, ...]
    left_out: tuple[str, ...]
    outside: Mapping[str, Mapping[str, StoredTensor]]


class _Models:
    """The merge's models, their anatomies, and their tensors by the place they take."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], template: str) -> None:
        self.checkpoints = checkpoints
        self.anatomies: dict[str, ModelStructure] = {
            ref: model_structure(checkpoint) for ref, checkpoint in checkpoints.items()
        }
        self.stack = self.anatomies[template].stack or ""
        self.template = template
        self.layers: dict[str, list[dict[str, str]]] = {}
        for ref, shape in self.anatomies.items():
            self.layers[ref] = [
                {name.removeprefix(f"{_start(shape.stack)}{layer.index}."): name for name in layer.names}
                for layer in shape.blocks
            ]
        # Under every name by which one of the models stores a head, or a final norm.
        self.heads = sorted({head for shape in self.anatomies.values() for head in shape.lm_heads})
        self.ends: dict[str, str] = {}
        for shape in self.anatomies.values():
            self.ends |= {name: part for name, part in shape.group_by_name.items() if part in (FINAL_NORM, LM_HEAD)}

    def in_layer(self, ref: str, index: int) -> dict[str, StoredTensor]:
        """Name inside the layer → tensor."""
        tensors = self.checkpoints[ref].tensors
        return {inner: tensors[name] for inner, name in self.layers[ref][index].items()}

    def beyond(self, ref: str, name: str) -> tuple[int, str] | None:
        """For a tensor of a layer behind the last that counts: how far behind it is, from 0, and its inner name."""
        start, held = _start(self.anatomies[ref].stack), len(self.layers[ref])
        number, _, inner = name.removeprefix(start).partition(".")
        if not held or not name.startswith(start) or not NUMBER.fullmatch(number):
            return None
        return int(number) - held, inner

    def outside(self, ref: str) -> dict[str, StoredTensor]:
        """Full name → tensor, of what lies in no layer; a tied head is there as well where another model's is not."""
        shape, tensors = self.anatomies[ref], self.checkpoints[ref].tensors
        found = {name: tensor for name, tensor in tensors.items() if shape.layer_of(name) is None}
        if shape.tied and len(shape.token_embeddings) == 1:
            found |= {head: tensors[shape.token_embeddings[0]] for head in self.heads if head not in found}
        return found


def lay_out(preflight: Preflight, config: MergeConfig, checkpoints: Mapping[str, Checkpoint]) -> Layout:
    """The slots of a merge; what does not fit goes to the faults of `preflight`."""
    template = config.base_model or config.sections[0].sources[0].model
    models = _Models(checkpoints, template)
    builder = _Builder(preflight, models)
    builder.begin(config.sections[0])
    layers: list[int] = []
    for section in config.sections:
        layers += builder.layers(section, first=len(layers))
    builder.end(config.sections[-1], len(layers))
    builder.settle()
    return Layout(
        checkpoints[template],
        tuple(builder.slots),
        tuple(layers),
        tuple(sorted(builder.left_out)),
        {ref: models.outside(ref) for ref in checkpoints},
    )


class _Builder:
    def __init__(self, preflight: Preflight, models: _Models) -> None:
        self.preflight = preflight
        self.models = models
        self.slots: list[Slot] = []
        self.left_out: set[str] = set()
        self.missing = TensorFaults()
        for ref, shape in models.anatomies.items():
            numbers = [layer.index for layer in shape.blocks]
            if numbers != list(range(len(numbers))):
                preflight.errors.add(
                    f"{ref} holds {len(numbers)} layers from {numbers[0]} to {numbers[-1]}: a part of a model. "
                    "Give the whole."
                )

    def layers(self, section: MergeSection, *, first: int) -> list[int]:
        """Adds the slots of a section's layers, numbered from `first`; returns what `Layout.layers` says of them."""
        ranges = []
        for source in section.sources:
            held = len(self.models.layers[source.model])
            begin, end = source.layer_range or (0, held)
            if end > held:
                self.preflight.errors.add(
                    f"layer_range [{begin}, {end}] of {source.model} reaches beyond its {held} layers."
                )
                return []
            ranges.append(range(begin, end))
        if len({len(one) for one in ranges}) > 1:
            counts = ", ".join(f"{s.model} {len(r)}" for s, r in zip(section.sources, ranges, strict=True))
            self.preflight.errors.add(
                f"the models differ in their number of layers ({counts}). Name the layers to merge with `slices:`."
            )
            return []
        refs = [source.model for source in section.sources]
        n = len(ranges[0])
        for i in range(n):
            found = [self.models.in_layer(ref, one[i]) for ref, one in zip(refs, ranges, strict=True)]
            self.meet(section, found, layer_position(i, n), self.prefix(first + i), f"layer {first + i}")
        at = refs.index(self.models.template) if self.models.template in refs else 0
        return list(ranges[at])

    def begin(self, section: MergeSection) -> None:
        """Adds the slots of what comes before the layers, and of what is beside them."""
        found = [
            {name: tensor for name, tensor in self.models.outside(ref).items() if self.end_of(ref, name) is None}
            for ref in (source.model for source in section.sources)
        ]
        self.meet(section, found, EDGE_POSITION)

    def end(self, section: MergeSection, layers: int) -> None:
        """Adds the slots of what comes after the output's `layers` layers: final norm, head, and layers beyond."""
        refs = [source.model for source in section.sources]
        for part in (FINAL_NORM, LM_HEAD):
            found = [{n: t for n, t in self.models.outside(ref).items() if self.end_of(ref, n) == part} for ref in refs]
            self.meet(section, found, EDGE_POSITION)
        beyond: list[dict[str, StoredTensor]] = []
        for ref in refs:
            places = {name: self.models.beyond(ref, name) for name in self.models.outside(ref)}
            tensors = self.models.checkpoints[ref].tensors
            beyond.append(
                {
                    f"{self.prefix(layers + at[0])}{at[1]}": tensors[name]
                    for name, at in places.items()
                    if at is not None
                }
            )
        self.meet(section, beyond, EDGE_POSITION)

    def end_of(self, ref: str, name: str) -> str | None:
        """What comes after the layers that a tensor is part of: the final norm, the head, more layers; else None."""
        if self.models.beyond(ref, name) is not None:
            return BEYOND
        return self.models.ends.get(name)

    def prefix(self, layer: int) -> str:
        """What the names of an output layer's tensors begin with."""
        return f"{_start(self.models.stack)}{layer}."

    def meet(
        self,
        section: MergeSection,
        found: Sequence[Mapping[str, StoredTensor]],
        t: float,
        prefix: str = "",
        group: str | None = None,
    ) -> None:
        """Adds a slot for every name that all sources of the section have in `found`.

        group: the slots' part of the model; None for what the first source calls it.
        """
        refs = [source.model for source in section.sources]
        shape = self.models.anatomies[refs[0]]
        for name in dict.fromkeys(name for tensors in found for name in tensors):
            holders = [tensors.get(name) for tensors in found]
            inputs = tuple(tensor for tensor in holders if tensor is not None)
            if len(inputs) < len(holders):
                self.miss(prefix + name, holders, refs)
                continue
            per_token = group is None and inputs[0].name in shape.token_rows
            part = group or self.models.ends.get(name) or shape.group_of(inputs[0].name)
            self.slots.append(Slot(prefix + name, part, section, t, inputs, per_token))

    def miss(self, name: str, holders: Sequence[StoredTensor | None], refs: Sequence[str]) -> None:
        """Notes a tensor that only some of the sources have: a fault, unless nobody can tell what it is."""
        have = [(ref, tensor) for ref, tensor in zip(refs, holders, strict=True) if tensor is not None]
        if all(tensor.name in self.models.anatomies[ref].not_understood for ref, tensor in have):
            self.left_out.add(name)
            return
        held = listing(ref for ref, _ in have)
        lack = listing(ref for ref, tensor in zip(refs, holders, strict=True) if tensor is None)
        self.missing.add(name, f"in {held} and not in {lack}", "Merge models of one layout.")

    def settle(self) -> None:
        """Adds the faults of single tensors to those of the whole."""
        for error in self.missing.sentences():
            self.preflight.errors.add(error)


def _start(stack: str | None) -> str:
    """What stands before a layer's number in the names of a stack."""
    return f"{stack}." if stack else ""
