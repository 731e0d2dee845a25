"""Match the tensors of a merge's models: for every output tensor those of its sources, found by structure.

No architecture is listed. A model's layers are the numbered stack that `surgery.checkpoint.structure` finds in its
names; a section's layers are renumbered into the output's stack, and tensors are merged that have the same name inside
their layers. Tensors outside the layers are matched by their full names: embeddings by the first section, final norm
and head by the last, as are layers beyond the stack, which only predict further tokens ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merges.config.schema import MergeConfig, MergeSection
from merges.config.settings import EDGE_POSITION, layer_position
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import NUMBER
from surgery.engine.preflight import Preflight
from surgery.engine.unshared import NO_CHOICE, SeenNames, UnsharedChoice, UnsharedTensors
from surgery.errors import usage_error

MAX_LAYERS = 2_000  # of an output; the deepest models have about 130
FINAL_NORM, LM_HEAD, BEYOND = "final norm", "lm_head", "beyond"
KEPT = "kept from {ref}, which others lack and transformers ignores on loading: {count} tensor(s) ({names})"
LEFT_OUT = "left out, as the architecture computes them and not all models have them: {count} of {ref} ({names})"


@dataclass(frozen=True)
class Slot:
    """One output tensor.

    Args:
        group: the part of the model that it is reported under.
        t: position of its layer in the section, for gradients; see `layer_position`.
        inputs: one per source of the section, in their order; of a tensor that is copied only that one.
        per_token: whether it has one row per token.
        copied_from: the model whose tensor is copied, of those that only some models have.
    """

    name: str
    group: str
    section: MergeSection
    t: float
    inputs: tuple[StoredTensor, ...]
    per_token: bool = False
    copied_from: str | None = None


@dataclass(frozen=True)
class Layout:
    """Every output tensor of a merge.

    Args:
        template: the model whose config, names and side files the output gets.
        layers: for each output layer the number of the layer whose entries in the config it gets: the template's own,
            or the first source's where the template has no share in it.
        outside: model → full name → tensor, of the tensors in no layer.
    """

    template: Checkpoint
    slots: tuple[Slot, ...]
    layers: tuple[int, ...]
    outside: Mapping[str, Mapping[str, StoredTensor]]


class _Models:
    """The models of a merge, their structures, and their tensors by position."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], template: str) -> None:
        self.checkpoints = checkpoints
        self.structures: dict[str, ModelStructure] = {
            ref: model_structure(checkpoint) for ref, checkpoint in checkpoints.items()
        }
        self.stack = self.structures[template].stack or ""
        self.template = template
        # By names inside the layer: what stands before the number differs from model to model.
        self.layers: dict[str, list[dict[str, str]]] = {}
        for ref, shape in self.structures.items():
            self.layers[ref] = [
                {name.removeprefix(f"{_start(shape.stack)}{layer.index}."): name for name in layer.names}
                for layer in shape.blocks
            ]
        # Models store a head, or a final norm, under different names: each of them counts for all.
        self.heads = sorted({shape.main_head for shape in self.structures.values() if shape.main_head is not None})
        self.ends: dict[str, str] = {}
        for shape in self.structures.values():
            self.ends |= {name: part for name, part in shape.group_by_name.items() if part in (FINAL_NORM, LM_HEAD)}

    def in_layer(self, ref: str, index: int) -> dict[str, StoredTensor]:
        """Return the tensors of one layer by their names inside it."""
        tensors = self.checkpoints[ref].tensors
        return {inner: tensors[name] for inner, name in self.layers[ref][index].items()}

    def beyond(self, ref: str, name: str) -> tuple[int, str] | None:
        """Return, for a tensor of a layer behind the model's last, how far behind (from 0), and its name inside it."""
        start, n_layers = _start(self.structures[ref].stack), len(self.layers[ref])
        # Such layers are numbered on from the last, in the same stack (DeepSeek's multi-token prediction).
        number, _, inner = name.removeprefix(start).partition(".")
        if not n_layers or not name.startswith(start) or not NUMBER.fullmatch(number):
            return None
        return int(number) - n_layers, inner

    def outside(self, ref: str) -> dict[str, StoredTensor]:
        """Return the tensors in no layer by name, with a tied head under the name of another model's untied one."""
        shape, tensors = self.structures[ref], self.checkpoints[ref].tensors
        outside = {name: tensor for name, tensor in tensors.items() if shape.layer_of(name) is None}
        if shape.tied and shape.main_embedding is not None:
            outside |= {head: tensors[shape.main_embedding] for head in self.heads if head not in outside}
        return outside


def lay_out(
    preflight: Preflight,
    config: MergeConfig,
    checkpoints: Mapping[str, Checkpoint],
    choice: UnsharedChoice = NO_CHOICE,
    seen: SeenNames | None = None,
) -> Layout:
    """Return the slots of a merge; what does not match is added to the errors of `preflight`.

    Args:
        choice: what to do with tensors that only some models have.
        seen: gets the names that the globs of `choice` may match.

    Raises:
        SurgeryError: the output would have too many layers.
    """
    template = config.template
    models = _Models(checkpoints, template)
    unshared = UnsharedTensors(preflight, choice, checkpoints)
    builder = _LayoutBuilder(preflight, models, unshared)
    builder.add_embeddings(config.sections[0])
    layers: list[int] = []
    for section in config.sections:
        # Before its slots are made: a config of some kB can ask for any number of copies of layers.
        if len(layers) + _length(section, models) > MAX_LAYERS:
            raise usage_error(f"asks for more than {MAX_LAYERS:,} layers", where=config.where)
        layers += builder.add_layers(section, first=len(layers))
    builder.add_ends(config.sections[-1], len(layers))
    if seen is not None:
        seen.add(unshared.names, [*(slot.name for slot in builder.slots), *unshared.names, *builder.dropped])
    unshared.tell(kept=KEPT, left_out=LEFT_OUT)
    return Layout(
        checkpoints[template],
        tuple(builder.slots),
        tuple(layers),
        {ref: models.outside(ref) for ref in checkpoints},
    )


def _length(section: MergeSection, models: _Models) -> int:
    """Return the number of layers that a section asks for: that of its first source."""
    first = section.sources[0]
    n_layers = len(models.layers[first.model])
    begin, end = first.layer_range or (0, n_layers)
    return min(end, n_layers) - begin


class _LayoutBuilder:
    """Collects slots: embeddings, then layers, then final norm and head."""

    def __init__(self, preflight: Preflight, models: _Models, unshared: UnsharedTensors) -> None:
        self.preflight = preflight
        self.models = models
        self.unshared = unshared
        self.slots: list[Slot] = []
        self.dropped: list[str] = []  # shared tensors that the user leaves out
        for ref, shape in models.structures.items():
            # A shard saved alone, say: its layers would be merged with the wrong ones of other models.
            numbers = [layer.index for layer in shape.blocks]
            if numbers != list(range(len(numbers))):
                preflight.errors.add(
                    f"{ref} holds {len(numbers)} layers from {numbers[0]} to {numbers[-1]}: a part of a model. "
                    "Give the whole."
                )

    def add_layers(self, section: MergeSection, *, first: int) -> list[int]:
        """Add the slots of a section's layers, numbered from `first`; return their entries of `Layout.layers`."""
        ranges = []
        for source in section.sources:
            n_layers = len(self.models.layers[source.model])
            # A source under `models:` has no range: all its layers.
            begin, end = source.layer_range or (0, n_layers)
            if end > n_layers:
                self.preflight.errors.add(
                    f"layer_range [{begin}, {end}] of {source.model} reaches beyond its {n_layers} layers."
                )
                # Without any slot of the section: to match the rest would add an error for every tensor.
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
            tensors = [self.models.in_layer(ref, one[i]) for ref, one in zip(refs, ranges, strict=True)]
            self.match(section, tensors, layer_position(i, n), self.prefix(first + i), f"layer {first + i}")
        # What the config says of a layer (sliding windows, expert layers) comes from the template if it has a share.
        at = refs.index(self.models.template) if self.models.template in refs else 0
        return list(ranges[at])

    def add_embeddings(self, section: MergeSection) -> None:
        """Add the slots of the tensors before the layers, and beside them."""
        tensors = [
            {name: tensor for name, tensor in self.models.outside(ref).items() if self.end_of(ref, name) is None}
            for ref in (source.model for source in section.sources)
        ]
        self.match(section, tensors, EDGE_POSITION)

    def add_ends(self, section: MergeSection, layers: int) -> None:
        """Add the slots of the tensors after the output's `layers` layers: final norm, head, and layers beyond."""
        refs = [source.model for source in section.sources]
        for part in (FINAL_NORM, LM_HEAD):
            tensors_of_part = [
                {n: t for n, t in self.models.outside(ref).items() if self.end_of(ref, n) == part} for ref in refs
            ]
            self.match(section, tensors_of_part, EDGE_POSITION)
        beyond: list[dict[str, StoredTensor]] = []  # numbered on from the output's last layer, as in their own model
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
        self.match(section, beyond, EDGE_POSITION)

    def end_of(self, ref: str, name: str) -> str | None:
        """Return which end of the model a tensor is part of: final norm, head, or layers beyond; None for others."""
        if self.models.beyond(ref, name) is not None:
            return BEYOND
        return self.models.ends.get(name)

    def prefix(self, layer: int) -> str:
        """Return the start of the names of an output layer's tensors."""
        return f"{_start(self.models.stack)}{layer}."

    def match(
        self,
        section: MergeSection,
        tensors: Sequence[Mapping[str, StoredTensor]],
        t: float,
        prefix: str = "",
        group: str | None = None,
    ) -> None:
        """Add a slot for every name that all sources of the section have, or that is kept from one of them.

        Args:
            tensors: per source, its tensors by the names to match.
            prefix: of the slots' names, before the matched name.
            group: the slots' part of the model; None for the one it has in the first source.
        """
        refs = [source.model for source in section.sources]
        # In the order of the sources: a set's would change from run to run, and the output's files with it.
        for name in dict.fromkeys(name for one in tensors for name in one):
            held = [(ref, one[name]) for ref, one in zip(refs, tensors, strict=True) if name in one]
            copied_from = None
            if len(held) < len(refs):
                # The base's, or that of the first model that has it.
                held.sort(key=lambda pair: pair[0] != self.models.template)
                has = list(dict.fromkeys(ref for ref, _ in held))
                lacks = [ref for ref in dict.fromkeys(refs) if ref not in has]
                if self.unshared.decide(prefix + name, held[0][1], has, lacks) != "keep":
                    continue
                held = held[:1]
                copied_from = held[0][0]
            elif self.unshared.drops_shared(prefix + name, held[0][1], held[0][0]):
                self.dropped.append(prefix + name)
                continue
            shape, first = self.models.structures[held[0][0]], held[0][1]
            # Layers have no rows per token; and a head counts under whichever name any of the models stores it.
            per_token = group is None and first.name in shape.token_rows
            part = group or self.models.ends.get(name) or shape.group_of(first.name)
            inputs = tuple(tensor for _, tensor in held)
            self.slots.append(Slot(prefix + name, part, section, t, inputs, per_token, copied_from))


def _start(stack: str | None) -> str:
    """Return the part of a stack's tensor names before the layer number."""
    return f"{stack}." if stack else ""
