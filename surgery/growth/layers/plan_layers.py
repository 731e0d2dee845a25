"""Plan the tensors and the config of a deeper model: which old tensors are renamed, where new ones come from.

Or report every reason why the layers cannot be added. No family is listed by name: layers are the numbered stack of
`surgery.checkpoint.structure`, and what they write into the residual stream is what
`surgery.growth.layers.residual_writes` finds and tests.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.config_layers import (
    inexpressible_layers,
    language_part,
    with_count,
    with_explicit_layer_kinds,
    with_layers,
)
from surgery.checkpoint.config.model_config import layer_count
from surgery.checkpoint.quantised.quantisation import stated_settings
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure
from surgery.checkpoint.tensor_roles import NUMBER
from surgery.engine.kernel import Kernel
from surgery.engine.plan import PlannedTensor, copy_tensor
from surgery.engine.preflight import Preflight, check_quantised
from surgery.errors import SurgeryError, listing, usage_error
from surgery.growth.choices import LayerInit, LayerPosition
from surgery.growth.layers.compatibility import layer_changes
from surgery.growth.layers.random_init import LayerSpec, RandomLayers, layer_prefix, random_layers, text_config
from surgery.growth.layers.residual_writes import LayerTensors, layer_key, layer_tensors, prove_identity

COMMAND = "grow add"


def zeros(tensors: Sequence[Tensor]) -> Tensor:
    """0.   (…) → (…)"""
    return torch.zeros_like(tensors[0])


ZEROS = Kernel("zeros", zeros)


def source_layers(position: int, layers: int, depth: int) -> list[int]:
    """Return the old layers that `layers` new ones, inserted before layer `position` of `depth`, are modelled on."""
    if not depth:
        return []
    # There is nothing below the bottom: the layers above are repeated.
    if not position:
        return [number % depth for number in range(layers)]
    if layers <= position:
        return list(range(position - layers, position))
    return [number % position for number in range(layers)]


@dataclass
class LayerInsertionPlan:
    """Layers to be added to `base`, whose structure is `structure`; the other arguments are those of `add.add_layers`.

    Call `check` first; then, if `needs_random_layers`, `create_random_layers`; then the tensors are available.

    config: of the deeper model. order: the old layer at each position of the deeper model. zeroed: layer → names inside
    it of the tensors that are set to zero; by its old number, or by its new one in a model that had none.
    """

    base: Checkpoint
    structure: ModelStructure
    layers: int
    at: LayerPosition
    init: LayerInit
    stored_as: str | None = None
    preflight: Preflight = field(default_factory=Preflight)
    config: dict[str, Any] = field(init=False)
    position: int = field(init=False)
    order: list[int] = field(init=False)
    zeroed: dict[int, tuple[str, ...]] = field(default_factory=dict)
    random: RandomLayers | None = None
    _proved: dict[str, bool] = field(default_factory=dict)

    @property
    def before(self) -> int:
        """Number of layers before."""
        return self.structure.layers

    @property
    def after(self) -> int:
        """Number of layers afterwards."""
        return self.before + self.layers

    @property
    def new(self) -> tuple[int, ...]:
        """Indices of the new layers."""
        return tuple(range(self.position, self.position + self.layers))

    @property
    def origins(self) -> tuple[int | None, ...]:
        """The old layer that each new one is modelled on."""
        return tuple(source_layers(self.position, self.layers, self.before)) or (None,) * self.layers

    @property
    def needs_random_layers(self) -> bool:
        return self.init == "random" or not self.before

    @property
    def layer_specs(self) -> dict[int, LayerSpec]:
        """New layer → the layer that transformers is to create for it."""
        full = self.full_config()
        return {
            number: LayerSpec(full, origin, None if origin is None else self.structure)
            for number, origin in zip(self.new, self.origins, strict=True)
        }

    def check(self) -> None:
        """Find position, order and config of the deeper model. Raises SurgeryError with every reason against it."""
        self._check_stack()
        self.position = self._position()
        # Copies of quantised layers keep their bytes; everything else needs their values.
        if self.init != "copy" or self.stored_as:
            check_quantised(self.preflight, [self.base])
        else:
            for place, settings in stated_settings(self.base).items():
                self._check_numbers_named(place, settings)
        self._check_extra_layers()
        self.preflight.errors.raise_if_any(COMMAND)
        # The config's lists are rewritten with it: entry i becomes that of layer order[i].
        old = list(range(self.before))
        self.order = [*old[: self.position], *(o for o in self.origins if o is not None), *old[self.position :]]
        full = self.full_config()
        if self.before:
            for error in inexpressible_layers(full, self.order, self.structure):
                self.preflight.errors.add(error)
            self.config = with_layers(full, self.order, self.structure)
            self.preflight.errors.raise_if_any(COMMAND)
            self._check_kinds(full)
        else:
            self.config = with_count(full, self.after)
            self.config = with_explicit_layer_kinds(self.config, text_config(self.config), self.after)
        numbers = f"{self.new[0]}" if self.layers == 1 else f"{self.new[0]} to {self.new[-1]}"
        self.preflight.facts["layers"] = f"{self.before} → {self.after}; new: {numbers}, {self.init}"
        self.preflight.errors.raise_if_any(COMMAND)
        if self.init == "identity" and self.before:
            # Each old layer once, although it may be copied several times.
            for origin in dict.fromkeys(self.origins):
                assert origin is not None
                self._prove(
                    layer_tensors(self.base, self.structure, origin), LayerSpec(full, origin, self.structure), origin
                )
            self.preflight.errors.raise_if_any(COMMAND)

    def full_config(self) -> dict[str, Any]:
        """Return the model's config, with the lists written out that say of which kind each layer is."""
        try:
            whole = text_config(self.base.config)
        except SurgeryError:  # remote code, or no config: nothing but what it contains is known
            return dict(self.base.config)
        return with_explicit_layer_kinds(self.base.config, whole, self.before)

    def create_random_layers(self, folder: Path, seed: int) -> Checkpoint:
        """Write random layers to `folder` and use them as the new ones.

        Raises:
            SurgeryError: they do not have the names and shapes of the model's own.
        """
        specs = self.layer_specs
        fresh = random_layers(specs, folder, seed=seed, depth=self.after, stack=self.structure.stack)
        self.random = fresh
        if not self.before and (others := sorted(fresh.outside ^ self.base.tensors.keys())):
            raise SurgeryError(
                f"is not named as transformers names this family ({listing(others, 3)}), so nothing says what a "
                "layer of it would be called",
                where=self.base.ref,
            )
        for number, origin in zip(self.new, self.origins, strict=True):
            tensors = fresh.inner[number]
            if origin is not None:
                self._compare(tensors, layer_tensors(self.base, self.structure, origin).inner, origin)
            if self.init == "identity":
                hidden = self.structure.hidden_size
                self._prove(LayerTensors(tensors, hidden), specs[number], number)
        self.preflight.errors.raise_if_any(COMMAND)
        return fresh.checkpoint

    def old_tensors(self) -> list[PlannedTensor]:
        """Return the model's own tensors under their new names."""
        return [
            replace(copy_tensor(tensor, dtype=self.stored_as), name=self._renamed(name))
            for name, tensor in self.base.tensors.items()
        ]

    def new_tensors(self) -> list[PlannedTensor]:
        """Return the tensors of the new layers."""
        planned = []
        for number, origin in zip(self.new, self.origins, strict=True):
            originals = {} if origin is None else layer_tensors(self.base, self.structure, origin).inner
            source = originals if self.random is None else self.random.inner[number]
            stack = self.structure.stack if self.random is None else self.random.stack
            # Copies are zeroed by the number of the old layer, first layers of a model by their own.
            zeroed = self.zeroed.get(number if origin is None else origin, ())
            for inner, tensor in source.items():
                name = f"{layer_prefix(stack)}{number}.{inner}"
                dtype = self.stored_as or (originals[inner].dtype if inner in originals else self._usual_dtype(tensor))
                # A kernel instead of a file of zeros: nothing has to be stored first.
                if inner in zeroed:
                    planned.append(PlannedTensor(name, dtype, tensor.shape, (TensorInput(tensor),), ZEROS))
                else:
                    planned.append(replace(copy_tensor(tensor, dtype=dtype), name=name))
        return planned

    def parameters(self, planned: Sequence[PlannedTensor], number: int) -> int:
        """Return the number of values in one new layer."""
        start = f"{layer_prefix(self.structure.stack or (self.random.stack if self.random else None))}{number}."
        return sum(tensor.inputs[0].n_elements for tensor in planned if tensor.name.startswith(start))

    def _check_stack(self) -> None:
        ref, stated = self.base.ref, layer_count(self.base.config)
        if not self.before:
            if stated or not self.base.config:
                why = f"its config says {stated}" if stated else "it has no config.json that says there are none"
                raise SurgeryError(f"no layers were found in its names, and {why}", where=ref)
            if language_part(whole := dict(self.base.config)) is not whole:
                raise SurgeryError("a model of several parts cannot be begun without layers", where=ref)
            if self.init == "copy":
                raise usage_error(
                    "has no layers that could be copied", where=ref, hint="Begin with random ones, or identity."
                )
            return
        # Renumbering a shard of a model would give a model with holes.
        numbers = [block.index for block in self.structure.blocks]
        if numbers != list(range(len(numbers))):
            raise SurgeryError(
                f"holds {len(numbers)} layers from {numbers[0]} to {numbers[-1]}: a part of a model",
                where=ref,
                hint="Give the whole.",
            )
        if stated is not None and stated != self.before:
            raise SurgeryError(f"its config says {stated} layers, its names hold {self.before}", where=ref)

    def _position(self) -> int:
        if self.at == "top":
            return self.before
        if self.at == "middle":
            return self.before // 2
        if isinstance(self.at, int) and 0 <= self.at <= self.before:
            return self.at
        raise usage_error(f"got {self.at}, expected top, middle, or 0 to {self.before}", where="--at")

    def _check_numbers_named(self, place: str, settings: object) -> None:
        """Add an error if settings of quantisation name layers by number, because their numbers change."""
        last = (self.structure.stack or "").rpartition(".")[2]
        if found := re.search(rf"{re.escape(last)}\\*\.\d+", json.dumps(settings)):
            self.preflight.errors.add(
                f"the {place} of {self.base.ref} names layers by number ({found[0]!r}), and these change. "
                "Use the unquantised model."
            )

    def _check_extra_layers(self) -> None:
        """Check layers after the last that the config counts (multi-token prediction), which get new numbers.

        A config whose lists count them too cannot be rewritten.
        """
        ahead = {at for name in self.base.tensors if (at := self._extra_layer_of(name)) is not None}
        if not ahead:
            return
        part = language_part(dict(self.base.config))
        lists = [
            key for key, value in part.items() if isinstance(value, list) and len(value) == self.before + len(ahead)
        ]
        if lists := [key for key in lists if "layer" in key or "types" in key]:
            self.preflight.errors.add(
                f"{listing(lists)} of {self.base.ref} counts layers that predict further tokens ahead, and cannot be "
                "rewritten. Remove those layers first."
            )
        self.preflight.facts["beyond"] = f"{len(ahead)} layer(s) that predict further tokens ahead, renumbered"

    def _check_kinds(self, full: Mapping[str, Any]) -> None:
        try:
            changes = layer_changes(full, self.config, self.order, self.structure.stack or "")
        except SurgeryError as error:
            self.preflight.warnings.append(f"that every layer stays of its kind was not tried: {error}")
            return
        for change in changes:
            self.preflight.errors.add(change)

    def _prove(self, tensors: LayerTensors, spec: LayerSpec, number: int) -> None:
        """Zero what the layer writes, and add an error unless that is proved to make it an identity."""
        writers = tensors.writers
        layer = f"layer {number} of {self.base.ref}" if self.before else f"a layer of {self.base.ref}"
        # Random layers were named by transformers, so that nothing in them is unknown.
        unknown_names = tensors.possible_writers(self.structure.roles) if self.random is None else ()
        unknown = f" Not understood: {listing(unknown_names, 5)}." if unknown_names else ""
        hint = f"{unknown} Use --init {'copy' if self.before else 'random'}."
        if not writers:
            self.preflight.errors.add(f"nothing was recognised by which {layer} writes into the residual stream.{hint}")
            return
        self.zeroed[number] = writers
        try:
            # Running a layer takes seconds; most layers of a model are of one kind.
            key = layer_key(spec)
            if key not in self._proved:
                self._proved[key] = prove_identity(spec, tensors.inner, writers)
        except SurgeryError as error:
            self.preflight.errors.add(f"{layer} cannot be proved an identity: {error}.{hint}")
            return
        if not self._proved[key]:
            self.preflight.errors.add(
                f"{layer} is no identity when what it writes is zero ({listing(writers, 5)}).{hint}"
            )
            return
        self.preflight.facts["identity"] = f"proved by running a layer; zero are {listing(writers, 5)}"

    def _compare(self, new: Mapping[str, StoredTensor], old: Mapping[str, StoredTensor], origin: int) -> None:
        # Older files of a family may have other names or shapes than transformers' current code.
        wrong = [name for name, x in new.items() if name not in old or old[name].shape != x.shape]
        if wrong:
            self.preflight.errors.add(
                f"layer {origin} of {self.base.ref} is not what transformers makes: {listing(wrong, 3)} is missing in "
                "it, or of another shape. Use --init identity or copy."
            )

    def _extra_layer_of(self, name: str) -> int | None:
        """Return the number of the layer that a tensor belongs to, if it is after the last that the config counts."""
        start = layer_prefix(self.structure.stack)
        number = name.removeprefix(start).partition(".")[0]
        if not self.before or self.structure.layer_of(name) is not None or not name.startswith(start):
            return None
        return int(number) if NUMBER.fullmatch(number) else None

    def _renamed(self, name: str) -> str:
        number = self.structure.layer_of(name)
        number = self._extra_layer_of(name) if number is None else number
        if number is None or number < self.position:
            return name
        start = layer_prefix(self.structure.stack)
        # Everything from the insertion on moves up.
        return f"{start}{number + self.layers}{name[len(f'{start}{number}') :]}"

    def _usual_dtype(self, tensor: StoredTensor) -> str:
        """Return the dtype of most of the model's float tensors."""
        counts = Counter(t.dtype for t in self.base.tensors.values() if t.is_float)
        return counts.most_common(1)[0][0] if counts and tensor.is_float else tensor.dtype
