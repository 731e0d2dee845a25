"""Read PEFT adapters as checkpoints: what `merge_and_unload` gives on the adapter's base, computed when it is read.

LoRA's update is W + s·B·A with s = α/r, or α/√r for rank-stabilised LoRA (arXiv 2106.09685, 2312.03732), and DoRA's
m · V / ‖V‖ with V = W + s·B·A. Modules, biases and rows of tokens that were trained as a whole take the place of the
base's. What PEFT can save but nothing saved decides (random or data-driven changes of the base) is refused.

Two deviations from PEFT 0.21, whose `merge_and_unload` gives there another function than the adapter that was trained:
where only one of a tied pair is adapted, and where both are adapted alike, PEFT merges into the one tensor that both
are. Here the pair is parted in the first case, and adapted once in the second, as the adapter runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from surgery.checkpoint.adapters.adapter_config import CONVERT, AdapterConfig, read_adapter_config
from surgery.checkpoint.adapters.adapter_vocabulary import TiedPair, with_adapter_files
from surgery.checkpoint.adapters.adapter_weights import WEIGHTS, AdaptedModule, read_adapter_weights
from surgery.checkpoint.adapters.low_rank import LowRank, ScaledSum
from surgery.checkpoint.adapters.parameter_targets import ParameterTargets
from surgery.checkpoint.adapters.principal_residual import PrincipalResidual
from surgery.checkpoint.adapters.replaced_rows import ReplacedRows, Retyped
from surgery.checkpoint.adapters.weight_decomposed import WeightDecomposed
from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint, existing_path
from surgery.checkpoint.dtypes import n_bytes
from surgery.checkpoint.layouts.canonical_names import canonical_names
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.errors import SurgeryError, listing
from surgery.hub import download as hub
from surgery.io.safe_paths import contained_folder, find_file, list_folder

NAME_THE_BASE = "Name the base yourself: BASE+ADAPTER."
NAME_THE_RIGHT_BASE = "Name the right base: BASE+ADAPTER."
# Tasks whose models have a head that language models lack → what they are called.
OTHER_TASKS = {"SEQ_CLS": "classifying texts", "TOKEN_CLS": "classifying tokens", "QUESTION_ANS": "finding answers"}
# A folder inside of the adapter's with this in its name may hold the factors as they were before training.
INITIAL = "init"


def base_of(folder: Path, *, is_local: bool = True) -> str:
    """Return the reference of the model that the adapter in `folder` was trained on, as its config names it.

    Args:
        is_local: the adapter is a folder of this machine, which may name another one. From the Hub, no file may choose
            what is read here: it may name a model on the Hub, a lab model, or a folder of its own.

    Raises:
        SurgeryError: it names none, or one that is not there or that it may not name.
    """
    config = read_adapter_config(folder).values
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise SurgeryError('has no "base_model_name_or_path"', where=folder / ADAPTER_CONFIG, hint=NAME_THE_BASE)
    # Beside the adapter first: a folder that was moved together with its base still finds it.
    beside = folder / base
    if (is_local or beside.resolve().is_relative_to(folder.resolve())) and _is_folder(beside):
        return str(beside)
    # Folders alone, as PEFT writes them: a file that a stranger's adapter names could be any of this machine.
    if is_local and _is_folder(Path(base)):
        return base
    if hub.is_repo_id(base):
        return f"{base}@{revision}" if revision and "@" not in base else base
    if base.startswith("lab:"):
        return base
    missing = "is no folder" if existing_path(base) else "is not there"
    reason = missing if is_local else "is no model on the Hub: which of your folders it reads is for you to say"
    raise SurgeryError(f'names the base "{base}", which {reason}', where=folder / ADAPTER_CONFIG, hint=NAME_THE_BASE)


def _is_folder(path: Path) -> bool:
    found = existing_path(str(path))
    return found is not None and found.is_dir()


def add_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """Return `base` with all that the adapter in `folder` changes: tensors, and config and tokenizer if rows are new.

    Raises:
        SurgeryError: the adapter is of a kind that cannot be rebuilt, or does not fit `base`.
    """
    config = read_adapter_config(folder)
    config.refuse_other_kinds()
    if find_file(folder, WEIGHTS) is None:
        raise SurgeryError(f"has no {WEIGHTS}", where=folder, hint="Save the adapter as safetensors.")
    return _Application(base, folder, config).result()


class _Application:
    """One adapter on one base. `tensors`: the base's, and in their place whatever the adapter makes of them."""

    def __init__(self, base: Checkpoint, folder: Path, config: AdapterConfig) -> None:
        self.base, self.folder, self.config = base, folder, config
        self.weights = read_adapter_weights(folder / WEIGHTS)
        self.structure: ModelStructure = model_structure(base)
        self.tensors: dict[str, StoredTensor] = dict(base.tensors)
        self.pair = TiedPair.find(base, self.structure, self.weights.names)

    def result(self) -> Checkpoint:
        """Return the base with the adapter on it."""
        pair = self.pair
        if pair and not pair.is_stored:
            embedding = self.tensors[pair.embedding]
            self.tensors[pair.head] = replace(embedding, name=pair.head, stored_as=embedding.name_in_file)
        for name, tensor in self.weights.whole.items():
            self._replace_whole(name, tensor)
        for name, wrappers in self.weights.by_module.items():
            self._adapt(name, wrappers)
        if pair and not pair.is_stored and not self._is_parted:
            del self.tensors[pair.head]
        tensors = {name: self.tensors[name] for name in sorted(self.tensors)}
        adapted = replace(self.base, tensors=tensors, adapter=self.folder)
        return with_adapter_files(adapted, self.base, self.structure, pair if self._is_parted else None)

    @cached_property
    def _is_parted(self) -> bool:
        """Whether the adapter makes a tied pair two."""
        targets = {name: target for name in self.weights.names if (target := self._find(name)) is not None}
        return self.pair is not None and self.pair.is_parted(targets, self.weights, self.config)

    def _places(self, target: str) -> tuple[str, ...]:
        """Return the tensors that what the adapter has for `target` is for: of a pair that stays one, both or none."""
        if self.pair is None or self._is_parted or target not in self.pair.names:
            return (target,)
        return self.pair.names if target == self.pair.embedding else ()

    def _find(self, name: str) -> str | None:
        """Return the tensor that an adapter's name refers to: by that name, or as the same part of the network."""
        if name in self.tensors:
            return name
        found = self._stored.get(self._canonical.get(name, ""))
        if found is None:
            # Without layers in the adapter nothing says what its names begin with: an embedding alone was trained.
            end = name.partition(".")[2]
            ends = [one for one in self.tensors if one == end or one.partition(".")[2] == name]
            found = ends[0] if len(ends) == 1 else None
        return found

    @cached_property
    def _canonical(self) -> Mapping[str, str]:
        """Names in the adapter's file → canonical names."""
        names = {*self.weights.names, *(f"{name.rpartition('.')[0]}.bias" for name in self.weights.names)}
        like = canonical_names(self.base.tensors, self.base.config).stack
        return canonical_names(names, self.base.config, like=like).by_name

    @cached_property
    def _stored(self) -> Mapping[str, str]:
        """Canonical names → names of the base's tensors, and of a tied head."""
        return canonical_names(self.tensors, self.base.config).stored

    def _target(self, name: str) -> str:
        found = self._find(name)
        if found is not None:
            return found
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and self._find(f"{module}.weight"):
            raise SurgeryError(
                f'has a bias for "{module}", which has none in the base {self.base.ref}: no checkpoint of this model '
                "has a place for it",
                where=self.folder,
            )
        if self.config.saves(module) and self.config.task in OTHER_TASKS:
            raise SurgeryError(
                f'brings "{module}", a head for {OTHER_TASKS[self.config.task]}, which the base {self.base.ref} has no '
                "place for",
                where=self.folder,
                hint="Merge it with PEFT into a model of that class, and give the merged folder.",
            )
        raise SurgeryError(
            f'changes "{name}", which the base {self.base.ref} does not have (it has {listing(self.base.tensors, 3)})',
            where=self.folder,
            hint=NAME_THE_RIGHT_BASE,
        )

    def _replace_whole(self, name: str, tensor: StoredTensor) -> None:
        """Put `tensor` in the place of a whole one: a saved module, a trained bias, an embedding with more rows."""
        target = self._target(name)
        weight = self.tensors[target]
        has_token_rows = target in self.structure.token_rows or (self.pair is not None and target in self.pair.names)
        # Rows may be more, or fewer, than the base's: tokens were added before the training.
        fits = len(tensor.shape) == len(weight.shape) > 0 and tensor.shape[1:] == weight.shape[1:]
        if tensor.shape != weight.shape and not (fits and has_token_rows):
            raise _other_shape(tensor.shape, weight, self.folder)
        self._check_float(weight, tensor)
        places = self._places(target)
        if self.pair is not None and target in self.pair.names and not self.config.saves(name.rpartition(".")[0]):
            # Not trained beside the base's tensor but resized in its place: the tied pair is still one.
            other = next(one for one in self.pair.names if one != target)
            places = (target,) if other in map(self._find, self.weights.whole) else self.pair.names
        for one in places:
            self.tensors[one] = _as_stored(tensor, one, weight.dtype)

    def _adapt(self, name: str, wrappers: Sequence[AdaptedModule]) -> None:
        if self._find(f"{name}.weight") is None and self.config.values.get("target_parameters"):
            if self.config.decomposition or self.config.changed_base:
                raise SurgeryError(
                    f'adapts parameters of "{name}" with init_lora_weights: {self.config.initial}, which PEFT has for '
                    "modules alone",
                    where=self.config.where,
                )
            family = str(self.base.config.get("model_type"))
            targets = ParameterTargets(name, wrappers, self.config, self.structure, self.tensors, self._find, family)
            self.tensors |= targets.adapted(self.folder / WEIGHTS)
            return
        places = self._places(self._target(f"{name}.weight"))
        for module in wrappers:
            for target in places:
                if module.is_low_rank:
                    self.tensors[target] = self._low_rank(module, target)
                if rows := module.parts.get("trainable_tokens_delta"):
                    self.tensors[target] = self._with_tokens(module, rows, target)
            if bias := module.parts.get("lora_B.bias"):
                self._add_bias(module, bias)

    def _low_rank(self, module: AdaptedModule, target: str) -> StoredTensor:
        a, b, is_embedding = module.factors
        # PEFT has an embedding's factors as those of a layer from tokens to width: B·A is (width, tokens).
        transposed = is_embedding or _is_transposed(target, self.structure, self.config)
        weight = self.tensors[target]
        _check_factors(a, b, weight, transposed, self.folder)
        scale = self.config.scale(module.name, a.shape[0])
        if not is_embedding:  # PEFT begins those of embeddings with zeros whatever the others begin with
            weight = self._trained_base(module, weight, scale, transposed)
        updated = replace(weight, derivation=LowRank(weight, a, b, scale, transposed))
        magnitude = module.parts.get("lora_magnitude_vector")
        if (magnitude is not None) != bool(self.config.values.get("use_dora")):
            has, says = ("no ", "a ") if magnitude is None else ("a ", "no ")
            raise SurgeryError(
                f'has {has}lora_magnitude_vector for "{module.name}", and is {says}DoRA adapter by its config',
                where=self.folder,
                hint="Put the config and the weights of one training together.",
            )
        if magnitude is None:
            return updated
        outputs = b.shape[0]
        if magnitude.n_elements != outputs or not magnitude.is_float:
            raise SurgeryError(
                f'"{magnitude.name}" is {magnitude.dtype} {list(magnitude.shape)}, expected {outputs} floats',
                where=magnitude.file,
            )
        return replace(weight, derivation=WeightDecomposed(updated, magnitude, by_column=transposed))

    def _trained_base(
        self, module: AdaptedModule, weight: StoredTensor, scale: float, transposed: bool
    ) -> StoredTensor:
        """Return the weight that the factors were trained on: W, or what their initialisation left of it."""
        kind, reason = self.config.decomposition, self.config.changed_base
        if kind is None and reason is None:
            return weight
        if self._initial is not None:
            first = self._initial.get(module.name)
            if first is None:
                raise SurgeryError(
                    f'has no factors for "{module.name}" in the initial adapter beside it',
                    where=self.folder,
                    hint="Put the adapter there as it was saved before this training.",
                )
            a, b, _ = first.factors
            _check_factors(a, b, weight, transposed, self.folder)
            return replace(weight, derivation=LowRank(weight, a, b, -scale, transposed))
        if kind is None:
            raise SurgeryError(
                f"was trained on a changed base (init_lora_weights: {self.config.initial}), which follows from "
                f"{reason}, not from what is saved",
                where=self.config.where,
                hint=f"Put the initial adapter beside it, as {self.folder.name}/{INITIAL}. Or: {CONVERT}",
            )
        rank = module.factors[0].shape[0]
        if kind == "olora" and transposed:
            raise SurgeryError(
                f'is OLoRA on "{weight.name}", which is stored as (in, out): PEFT cannot run that either',
                where=self.config.where,
            )
        return replace(weight, derivation=PrincipalResidual(weight, kind, rank, scale, transposed))

    @cached_property
    def _initial(self) -> Mapping[str, AdaptedModule] | None:
        """The factors before training, if a folder inside of the adapter's has them."""
        for path in list_folder(self.folder):
            if INITIAL not in path.name.lower() or not path.is_dir():
                continue
            if find_file(contained_folder(self.folder, path.name), WEIGHTS) is not None:
                return read_adapter_weights(path / WEIGHTS).modules
        return None

    def _with_tokens(self, module: AdaptedModule, rows: StoredTensor, target: str) -> StoredTensor:
        weight = self.tensors[target]
        indices = self.config.token_rows(module.name)
        if indices is None or len(weight.shape) != 2 or rows.shape != (len(indices), weight.shape[1]):
            count = "no" if indices is None else f"{len(indices):,}"
            raise SurgeryError(
                f'"{rows.name}" has the shape {list(rows.shape)}, and the config names {count} tokens for rows of '
                f"{list(weight.shape[1:])}",
                where=rows.file,
            )
        if len(indices) and indices.max() >= weight.shape[0]:
            raise SurgeryError(
                f'has a row for token {indices.max():,}, and "{target}" of the base {self.base.ref} has '
                f"{weight.shape[0]:,} rows",
                where=self.folder,
                hint=NAME_THE_RIGHT_BASE,
            )
        self._check_float(weight, rows)
        return replace(weight, derivation=ReplacedRows(weight, rows, indices))

    def _add_bias(self, module: AdaptedModule, bias: StoredTensor) -> None:
        target = self._target(f"{module.name}.bias")
        weight = self.tensors[target]
        if bias.shape != weight.shape:
            raise _other_shape(bias.shape, weight, self.folder)
        self._check_float(weight, bias)
        scale = self.config.scale(module.name, module.factors[0].shape[0])
        self.tensors[target] = replace(weight, derivation=ScaledSum(weight, bias, scale))

    def _check_float(self, weight: StoredTensor, tensor: StoredTensor) -> None:
        if not weight.is_float:
            raise SurgeryError(f'"{weight.name}" is {weight.dtype} in the base: it is quantised', where=self.folder)
        if not tensor.is_float:
            raise SurgeryError(f'"{tensor.name}" is {tensor.dtype}, expected floats', where=tensor.file)


def _as_stored(tensor: StoredTensor, name: str, dtype: str) -> StoredTensor:
    """Return a tensor of the adapter's file under `name`, in the base's dtype."""
    own = replace(tensor, name=name, stored_as=tensor.name_in_file)
    if tensor.dtype == dtype:
        return own
    return replace(own, dtype=dtype, n_bytes=n_bytes(dtype, tensor.shape), derivation=Retyped(own))


def _check_factors(a: StoredTensor, b: StoredTensor, weight: StoredTensor, transposed: bool, folder: Path) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise SurgeryError(
            f'"{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} do not multiply',
            where=folder / WEIGHTS,
        )
    for factor in (a, b):
        if not factor.is_float:
            raise SurgeryError(f'"{factor.name}" is {factor.dtype}, expected floats', where=folder / WEIGHTS)
    product = (b.shape[0], a.shape[1])
    product = product[::-1] if transposed else product
    if product != weight.shape:
        raise _other_shape(product, weight, folder)
    if not weight.is_float:
        raise SurgeryError(f'"{weight.name}" is {weight.dtype} in the base: it is quantised', where=folder)


def _other_shape(shape: tuple[int, ...], weight: StoredTensor, folder: Path) -> SurgeryError:
    return SurgeryError(
        f'gives "{weight.name}" the shape {list(shape)}, the base has {list(weight.shape)}',
        where=folder,
        hint=NAME_THE_RIGHT_BASE,
    )


def _is_transposed(target: str, structure: ModelStructure, config: AdapterConfig) -> bool:
    """Return whether the stored weight is (in, out).

    As in PEFT the module decides, not `fan_in_fan_out`: in an adapter of GPT-2's Conv1D layers and its (linear) output
    head, that flag describes only the last of them.
    """
    if structure.output_projections:
        is_conv = any(heads.transposed for heads in structure.output_projections.values())
        return is_conv and structure.layer_of(target) is not None
    return bool(config.values.get("fan_in_fan_out"))
