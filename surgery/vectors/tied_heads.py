"""Let a vector meet a target whose output head is its token embedding.

What counts is the update, θ_tuned − θ_base: where that of the head is the embedding's, a tied target stays tied and the
head's is left out; where they differ, OUT gets a head of its own, the target's embedding with the head's update, and a
config that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import stated_tie
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.tensor_roles import HEAD_WORDS, parts_of, word_of
from surgery.engine.preflight import Preflight
from surgery.engine.tied_embeddings import LABEL, same_values, with_head, with_true_heads, without
from surgery.vectors.align import SKIP, VectorSettings
from surgery.vectors.task_vector import VectorInput


def with_pair_heads(preflight: Preflight, tuned: Checkpoint, base: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Return views of two models that both have an output head, or both none. Raises SurgeryError."""
    views = with_true_heads(preflight, {"tuned": tuned, "base": base})
    # The base's embedding is found where it has no head; the tuned model is the reference, and needs the name itself.
    head = model_structure(views["base"]).main_head
    if head is not None and head not in views["tuned"].tensors and model_structure(views["tuned"]).tied:
        views["tuned"] = with_head(views["tuned"], head)
    return views["tuned"], views["base"]


def with_target_heads(
    preflight: Preflight, target: Checkpoint, vector: VectorInput, settings: VectorSettings
) -> tuple[Checkpoint, VectorInput]:
    """Return views of a target and a vector that fit each other in their output heads.

    Raises:
        SurgeryError: a file cannot be read.
    """
    target = with_true_heads(preflight, {"target": target})["target"]
    if len(vector.models) > 1:  # of a vector on disk there is the difference only
        pair = with_true_heads(Preflight(), {role: model.checkpoint for role, model in vector.models.items()})
        vector = _with_checkpoints(vector, pair)
    own = model_structure(target)
    heads = _heads(vector, target)
    if own.main_head is not None:
        return target, _with_zero_head(vector, own.main_head, own.main_embedding)
    if not own.tied or own.main_embedding is None or len(heads) != 1:
        return target, vector
    (head,) = heads
    # What the user leaves out is left as it is: a head that nothing is added to follows the embedding, as it did.
    if not settings.selection.selects(head) or settings.unshared.drops(head) or settings.vocab == SKIP:
        return target, vector
    if same_values(_terms(vector, head, own.main_embedding), _terms(vector, own.main_embedding, None)):
        what = f"the update of {head} is that of {own.main_embedding}: left out, OUT stays tied"
        preflight.facts[f"{LABEL} of {target.ref}"] = what
        views = {role: without(model, [head]) for role, model in vector.checkpoints.items()}
        return target, replace(_with_checkpoints(vector, views), zero=frozenset(vector.zero) - {head})
    preflight.warnings.append(
        f"{target.ref} is tied, and the vector changes {head} otherwise than {own.main_embedding}: OUT has both, and "
        "its config says that they are not tied"
    )
    return with_head(target, head), vector


def _with_checkpoints(vector: VectorInput, views: dict[str, Checkpoint]) -> VectorInput:
    models = {role: replace(model, checkpoint=views[role]) for role, model in vector.models.items()}
    return replace(vector, models=models)


def _heads(vector: VectorInput, target: Checkpoint) -> list[str]:
    """Return the names of the output heads in a vector that `target` has no tensor for."""
    heads = {model_structure(model).main_head for model in vector.checkpoints.values()}
    # A head whose update is zero is not stored, and its name is all that there is of it.
    heads |= {name for name in vector.zero if word_of(parts_of(name)) in HEAD_WORDS and name.endswith(".weight")}
    return sorted(name for name in heads if name is not None and name not in target.tensors)


def _terms(vector: VectorInput, name: str, otherwise: str | None) -> Sequence[StoredTensor]:
    """Return what the update of a tensor is the difference of; nothing where it is zero.

    otherwise: the tensor that stands for it in a model without it.
    """
    tables = [model.tensors for model in vector.checkpoints.values()]
    other = None if name in vector.zero else otherwise
    found = [table.get(name) or (table.get(other) if other else None) for table in tables]
    return [tensor for tensor in found if tensor is not None]


def _with_zero_head(vector: VectorInput, head: str, embedding: str | None) -> VectorInput:
    """Return the vector with a zero update of the target's head, where tied donors have one of their embedding."""
    is_known = head in vector.zero or any(head in model.tensors for model in vector.checkpoints.values())
    if is_known or embedding not in vector.zero or stated_tie(vector.config) is not True:
        return vector
    return replace(vector, zero=frozenset(vector.zero) | {head})
