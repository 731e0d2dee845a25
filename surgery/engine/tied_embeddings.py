"""See models with tied embeddings as what they are: one matrix, or a head of its own and a config that says so.

A config may say that the output head is the token embedding although a head is stored beside it. transformers (from
version 5) compares the two, ties them where they are equal, and leaves both where they differ. So here: a stored head
that equals the embedding is left out of the table, and one that differs makes the config say that it is not tied. What
models are is decided for all of them together, so that their order is of no account.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.config_layers import with_tie
from surgery.checkpoint.config.model_config import CONFIG, stated_tie
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader, segments
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import parts_of, word_of
from surgery.engine.preflight import Preflight
from surgery.errors import listing
from surgery.io.escaping import json_text

LABEL = "output head"  # of the facts
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class _Ends:
    """The two ends of a model: the names of its token embedding and head, and what its config says of them.

    spare: further names of the embedding (T5's encoder.embed_tokens beside shared). Ends that are not stored, or of
    which there are several that nothing tells apart, are None.
    """

    model: Checkpoint
    structure: ModelStructure
    embedding: str | None
    head: str | None
    spare: tuple[str, ...]
    stated: bool | None
    is_equal: bool = False

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding: none is stored, or one that equals it."""
        return self.structure.tied if self.head is None else self.is_equal

    @property
    def has_own_head(self) -> bool:
        """Whether its head is another matrix than its embedding."""
        return self.head is not None and not self.is_equal


def with_true_heads(preflight: Preflight, models: Mapping[K, Checkpoint]) -> dict[K, Checkpoint]:
    """Return views of `models` in which heads are stored and configs say so, or neither; told of in `preflight`.

    Where every head is the embedding, all of them are left out and the configs say that they are tied. Where one model
    has a head of its own, each that stores one keeps it. Values are compared only where a config does not rule out that
    they are equal, and reading stops at the first difference.

    Raises:
        SurgeryError: a file cannot be read.
    """
    named = {key: _with_embedding(preflight, model, list(models.values())) for key, model in models.items()}
    ends = {key: _ends(model) for key, model in named.items()}
    if not any(one.structure.tied or (one.head and one.stated is not False) or one.spare for one in ends.values()):
        return named
    ends = {key: _compared(one) for key, one in ends.items()}
    all_tied = all(one.is_tied for one in ends.values() if one.head or one.structure.tied)
    # Where every config says that heads are matrices of their own, they stay so, equal or not.
    declared = any(one.is_tied and one.stated is not False for one in ends.values())
    seen = {key: _without_spare(preflight, one, ends.values()) for key, one in ends.items()}
    if all_tied and declared:
        return {key: _tied_view(preflight, seen[key], one) for key, one in ends.items()}
    return {key: _untied_view(preflight, seen[key], one) for key, one in ends.items()}


def with_head(model: Checkpoint, name: str) -> Checkpoint:
    """Return a view of a tied `model` that has its embedding under the name of a head too, and is not tied."""
    structure = model_structure(model)
    embedding = _ends(model).embedding
    assert structure.tied and embedding is not None, "a tied model with one embedding"
    stored = model.tensors[embedding]
    alias = replace(stored, name=name, stored_as=stored.name_in_file)
    return _with_config(replace(model, tensors=dict(sorted({**model.tensors, name: alias}.items()))), tied=False)


def without(model: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return a view of `model` that lacks the tensors `names`."""
    return replace(model, tensors={name: tensor for name, tensor in model.tensors.items() if name not in names})


def same_values(a: Sequence[StoredTensor], b: Sequence[StoredTensor]) -> bool:
    """Return whether two tensors, or two differences x₀ − x₁ of tensors, have the same values; none are zeros.

    Reads segment by segment, up to the first difference.
    """
    shapes = {tensor.shape for tensor in (*a, *b)}
    if len(shapes) > 1:
        return False
    everything = [*a, *b]
    with SourceFiles(path for tensor in everything for path in tensor.files) as files:
        reader = TensorReader(files)
        for begin, end in segments(everything[0].n_elements if everything else 0):
            left, right = (_difference(reader, terms, begin, end, slot) for terms, slot in ((a, "a"), (b, "b")))
            if not torch.equal(left, right):
                return False
    return True


def _difference(reader: TensorReader, terms: Sequence[StoredTensor], begin: int, end: int, slot: str) -> Tensor:
    """Return x₀ − x₁ − …, in fp64, where the difference of two 16- or 32-bit values is exact enough to tell zero."""
    total = torch.zeros(end - begin, dtype=torch.float64)
    for at, tensor in enumerate(terms):
        values = reader.values(TensorInput(tensor), begin, end, (slot, at)).double()
        total = values if at == 0 else total - values
    return total


def _ends(model: Checkpoint) -> _Ends:
    structure = model_structure(model)
    embedding, head = structure.main_embedding, structure.main_head
    # Encoder and decoder of T5 may each store what `shared` is.
    spare = [name for name in structure.token_embeddings if name.endswith(".embed_tokens.weight") and name != embedding]
    is_t5 = embedding is not None and word_of(parts_of(embedding)) == "shared"
    stated = stated_tie(model.config)
    return _Ends(model, structure, embedding, head if embedding else None, tuple(spare) if is_t5 else (), stated)


def _compared(ends: _Ends) -> _Ends:
    if ends.head is None or ends.embedding is None:
        return ends
    tensors = ends.model.tensors
    return replace(ends, is_equal=same_values([tensors[ends.head]], [tensors[ends.embedding]]))


def _with_embedding(preflight: Preflight, model: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """Return a view of a tied model that stores its one matrix as a head only: under the name that others have."""
    structure = model_structure(model)
    if structure.token_embeddings or len(structure.lm_heads) != 1 or stated_tie(model.config) is False:
        return model
    stored = model.tensors[structure.lm_heads[0]]
    for other in others:
        names = model_structure(other).token_embeddings
        if len(names) == 1 and names[0] not in model.tensors:
            tensors = {**without(model, [stored.name]).tensors}
            tensors[names[0]] = replace(stored, name=names[0], stored_as=stored.name_in_file)
            preflight.facts[f"{LABEL} of {model.ref}"] = f"{stored.name} is all that is stored: read as {names[0]} too"
            view = replace(model, tensors=dict(sorted(tensors.items())))
            return view if stated_tie(model.config) else _with_config(view, tied=True)
    return model


def _without_spare(preflight: Preflight, ends: _Ends, all_ends: Collection[_Ends]) -> Checkpoint:
    """Return the model without second copies of its embedding, where another model has none of them."""
    tensors = ends.model.tensors
    copies = [
        name
        for name in ends.spare
        if ends.embedding is not None
        and any(name not in other.model.tensors for other in all_ends)
        and same_values([tensors[name]], [tensors[ends.embedding]])
    ]
    if not copies:
        return ends.model
    preflight.facts[f"embedding of {ends.model.ref}"] = f"left out, as equal to {ends.embedding}: {listing(copies, 3)}"
    return without(ends.model, copies)


def _tied_view(preflight: Preflight, model: Checkpoint, ends: _Ends) -> Checkpoint:
    if ends.head is None:
        return model
    preflight.facts[f"{LABEL} of {model.ref}"] = f"{ends.head} equals {ends.embedding}: left out, they stay tied"
    return _with_config(without(model, [ends.head]), tied=True)


def _untied_view(preflight: Preflight, model: Checkpoint, ends: _Ends) -> Checkpoint:
    if ends.head is None or ends.stated is False:
        return model
    if ends.has_own_head and ends.stated:
        preflight.warnings.append(
            f"{model.ref} stores {ends.head}, which differs from {ends.embedding}, although its config ties them: "
            "both are used, and OUT is not tied"
        )
    elif ends.is_equal:
        preflight.warnings.append(f"{model.ref} is tied, and others have an output head of their own: OUT is not tied")
    else:
        preflight.facts[f"{LABEL} of {model.ref}"] = f"{ends.head} differs from {ends.embedding}: they are not tied"
    return _with_config(model, tied=False)


def _with_config(model: Checkpoint, *, tied: bool) -> Checkpoint:
    """Return a view of `model` whose config says whether its head is tied."""
    if not model.config or stated_tie(model.config) is tied:
        return model
    config = with_tie(model.config, tied=tied)
    text = json_text(json.dumps(config, indent=2, ensure_ascii=False)) + "\n"
    return replace(model, config=config, file_overrides={**model.file_overrides, CONFIG: text.encode()})
