"""Fitting donors to a reference model: which donor tensor, and which of its rows, belongs to each tensor.

Names and shapes must agree. Tensors with one row per token also need the same token → id map, for which there are three
policies: `strict` refuses any difference, `by-token` aligns rows by token string (a token that a donor lacks gets no
update), `skip-embeddings` leaves those tensors as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint, StoredTensor
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.vocabulary import Vocabulary, align_rows, differences, read_vocabulary
from surgery.engine.preflight import Preflight, check_names
from surgery.errors import usage_error
from surgery.vectors.masks import Mask

VocabPolicy = Literal["strict", "by-token", "skip-embeddings"]
POLICIES: tuple[VocabPolicy, ...] = get_args(VocabPolicy)
OTHER_POLICIES = "--vocab by-token aligns rows by token; --vocab skip-embeddings leaves the embeddings as they are."


@dataclass(frozen=True)
class AlignedModel:
    """One model in a fit: its tensors, and the folder its tokenizer lies in (a vector keeps its donor's apart)."""

    checkpoint: Checkpoint
    tokenizer: Path | None

    @property
    def ref(self) -> str:
        return self.checkpoint.ref


def aligned_model(checkpoint: Checkpoint) -> AlignedModel:
    """A model with its own tokenizer."""
    return AlignedModel(checkpoint, checkpoint.folder)


def check_policy(policy: str) -> None:
    """Raises SurgeryError for a name that is no policy."""
    if policy not in POLICIES:
        raise usage_error(f"got {policy!r}, expected one of {', '.join(POLICIES)}", where="--vocab")


def align_tensors(
    preflight: Preflight,
    reference: AlignedModel,
    donors: Sequence[AlignedModel],
    mask: Mask,
    policy: VocabPolicy,
    *,
    zero: Collection[str] = (),
) -> dict[str, tuple[TensorInput, ...]]:
    """Finds the donors' inputs for every float tensor of `reference` that `mask` selects; faults go to `preflight`.

    Args:
        zero: names whose update is known to be zero, which no donor stores.

    Returns:
        name → one `TensorInput` per donor, each as many elements as the reference's tensor.
    """
    anatomies = [model_structure(donor.checkpoint) for donor in donors]
    own = model_structure(reference.checkpoint)
    rows = _Rows(preflight, reference, donors, policy)
    per_token = set(own.token_rows)
    fitted: dict[str, tuple[TensorInput, ...]] = {}
    missing: list[str] = []
    for name, tensor in reference.checkpoint.tensors.items():
        if not tensor.is_float or not mask.selects(name) or name in zero:
            continue
        if name in per_token and policy == "skip-embeddings":
            continue
        found = [_find(donor, shape, name, own) for donor, shape in zip(donors, anatomies, strict=True)]
        stored = [candidate for candidate in found if candidate is not None]
        if len(stored) < len(found):
            missing.append(name)
            continue
        inputs = rows.align(tensor, stored) if name in per_token else tuple(TensorInput(s) for s in stored)
        if _shapes_agree(preflight, tensor, inputs, donors, name in per_token):
            fitted[name] = inputs
    extra = sorted(
        {
            name
            for donor, shape in zip(donors, anatomies, strict=True)
            for name, tensor in donor.checkpoint.tensors.items()
            if tensor.is_float
            and mask.selects(name)
            and name not in reference.checkpoint.tensors
            and not (policy == "skip-embeddings" and name in shape.token_rows)
        }
    )
    check_names(preflight, missing, extra, reference.ref, " or ".join(dict.fromkeys(d.ref for d in donors)))
    return fitted


def _find(donor: AlignedModel, shape: ModelStructure, name: str, own: ModelStructure) -> StoredTensor | None:
    """The donor's tensor for `name`; an output matrix that the donor ties is its embedding."""
    held = donor.checkpoint.tensors.get(name)
    if held is None and name in own.lm_heads and shape.tied and len(shape.token_embeddings) == 1:
        return donor.checkpoint.tensors[shape.token_embeddings[0]]
    return held


def _shapes_agree(
    preflight: Preflight,
    tensor: StoredTensor,
    inputs: Sequence[TensorInput],
    donors: Sequence[AlignedModel],
    per_token: bool,
) -> bool:
    for source, donor in zip(inputs, donors, strict=True):
        if source.shape != tensor.shape:
            advice = OTHER_POLICIES if per_token else "Leave it as it is with --exclude."
            preflight.errors.add(
                f'"{tensor.name}" is {list(tensor.shape)}, but {list(source.tensor.shape)} in {donor.ref}. {advice}'
            )
            return False
    return True


class _Rows:
    """The row maps of the tensors that have one row per token, by the policy."""

    def __init__(
        self, preflight: Preflight, reference: AlignedModel, donors: Sequence[AlignedModel], policy: VocabPolicy
    ) -> None:
        self._preflight = preflight
        self._policy = policy
        self._own = _vocabulary(reference)
        self._theirs = [_vocabulary(donor) for donor in donors]
        lacking = [s.ref for s, v in zip((reference, *donors), (self._own, *self._theirs), strict=True) if v is None]
        self._comparable = not lacking
        self._same = True
        if policy == "skip-embeddings":
            preflight.facts["vocabulary"] = "embeddings and output matrix stay the target's"
        elif lacking:
            preflight.facts["vocabulary"] = f"not compared: no tokenizer files in {', '.join(dict.fromkeys(lacking))}"
            if policy == "by-token":
                preflight.errors.add(f"--vocab by-token needs the tokenizers of all models; {lacking[0]} has none.")
        else:
            self._compare(reference, donors)

    def _compare(self, reference: AlignedModel, donors: Sequence[AlignedModel]) -> None:
        assert self._own is not None
        for donor, theirs in zip(donors, self._theirs, strict=True):
            assert theirs is not None
            difference = differences(self._own, theirs)
            if difference.same:
                continue
            self._same = False
            if self._policy == "strict":
                self._preflight.errors.add(
                    f"the vocabularies of {reference.ref} and {donor.ref} differ: "
                    f"{difference.describe(reference.ref, donor.ref)} {OTHER_POLICIES}"
                )
        if self._same:
            self._preflight.facts["vocabulary"] = f"the same {len(self._own.ids):,} tokens in all models"

    def align(self, tensor: StoredTensor, stored: Sequence[StoredTensor]) -> tuple[TensorInput, ...]:
        plain = tuple(TensorInput(s) for s in stored)
        if self._policy != "by-token" or not self._comparable:
            return plain
        if self._same and all(s.shape == tensor.shape for s in stored):
            return plain
        assert self._own is not None
        maps = []
        for theirs, donor in zip(self._theirs, stored, strict=True):
            assert theirs is not None
            maps.append(align_rows(self._own, theirs, tensor.shape[0], donor.shape[0]))
        everywhere = np.all([rows >= 0 for rows in maps], axis=0)
        self._preflight.facts["vocabulary"] = (
            f"{int(everywhere.sum()):,} of {tensor.shape[0]:,} rows aligned by token; the rest get no update"
        )
        return tuple(
            TensorInput(donor, np.where(everywhere, rows, -1)) for donor, rows in zip(stored, maps, strict=True)
        )


def _vocabulary(model: AlignedModel) -> Vocabulary | None:
    return None if model.tokenizer is None else read_vocabulary(model.tokenizer)
