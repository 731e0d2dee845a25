"""Align donor tensors, and their vocabulary rows, with the tensors of a reference model.

Names and shapes must agree. Tensors with one row per token also need the same token → id map, for which there are three
policies: `strict` refuses any difference, `by-token` aligns rows by token string (a token that a donor lacks gets no
update), `skip-embeddings` leaves those tensors as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.vocabulary import Vocabulary, align_rows, differences, read_vocabulary
from surgery.engine.preflight import Preflight, check_names, check_quantised
from surgery.errors import usage_error
from surgery.vectors.choices import VocabPolicy
from surgery.vectors.selection import TensorSelection

POLICIES: tuple[VocabPolicy, ...] = get_args(VocabPolicy)
OTHER_POLICIES = "--vocab by-token aligns rows by token; --vocab skip-embeddings leaves the embeddings as they are."


@dataclass(frozen=True)
class VectorSettings:
    """How a vector is taken or added.

    selection: the tensors that change, and their scales. vocab: what to do where vocabularies differ. dtype: torch's
    name of the dtype to store float tensors in; None keeps each tensor's own. allow_unrelated: accept models without a
    common ancestor.

    Raises:
        SurgeryError: there is no such policy or dtype.
    """

    selection: TensorSelection = field(default_factory=TensorSelection)
    vocab: VocabPolicy = "strict"
    dtype: str | None = None
    allow_unrelated: bool = False

    def __post_init__(self) -> None:
        if self.vocab not in POLICIES:
            raise usage_error(f"got {self.vocab!r}, expected one of {', '.join(POLICIES)}", where="--vocab")
        if self.dtype:
            dtype_name(self.dtype)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype's name in safetensors files."""
        return dtype_name(self.dtype) if self.dtype else None

    @property
    def options(self) -> dict[str, Any]:
        """The command-line options that give these settings, as manifests record them."""
        return {"vocab": self.vocab, "dtype": self.dtype, **self.selection.options}


@dataclass(frozen=True)
class AlignedModel:
    """A model to align: its tensors, and the folder that its tokenizer is in (a vector keeps its donor's apart)."""

    checkpoint: Checkpoint
    tokenizer: Path | None

    @property
    def ref(self) -> str:
        """The reference that the model was opened by."""
        return self.checkpoint.ref


def aligned_model(checkpoint: Checkpoint) -> AlignedModel:
    """Return a model with its own tokenizer."""
    return AlignedModel(checkpoint, checkpoint.tokenizer_folder)


def check_and_align(
    preflight: Preflight,
    reference: AlignedModel,
    donors: Sequence[AlignedModel],
    settings: VectorSettings,
    *,
    command: str,
    zero: Collection[str] = (),
) -> dict[str, tuple[TensorInput, ...]]:
    """Check that `donors` can be aligned with `reference`, and align them. Arguments and result as `align_tensors`.

    Args:
        command: named by the errors.

    Raises:
        SurgeryError: `preflight` has errors, from before or of this; a glob of the selection matches nothing.
    """
    # Models of different architectures differ in every name and shape: listing those as well would hide the reason.
    preflight.errors.raise_if_any(command)
    checkpoints = [reference.checkpoint, *(donor.checkpoint for donor in donors)]
    check_quantised(preflight, checkpoints)
    settings.selection.check_names(sorted({name for checkpoint in checkpoints for name in checkpoint.float_names()}))
    aligned = align_tensors(preflight, reference, donors, settings.selection, settings.vocab, zero=zero)
    preflight.errors.raise_if_any(command)
    return aligned


def align_tensors(
    preflight: Preflight,
    reference: AlignedModel,
    donors: Sequence[AlignedModel],
    selection: TensorSelection,
    policy: VocabPolicy,
    *,
    zero: Collection[str] = (),
) -> dict[str, tuple[TensorInput, ...]]:
    """Find the donors' inputs for every selected float tensor of `reference`; errors are added to `preflight`.

    Args:
        zero: names whose update is known to be zero, which no donor stores.

    Returns:
        name → one `TensorInput` per donor, each with as many elements as the reference's tensor.
    """
    structures = [model_structure(donor.checkpoint) for donor in donors]
    own = model_structure(reference.checkpoint)
    rows = _RowAligner(preflight, reference, donors, policy)
    per_token = set(own.token_rows)
    aligned: dict[str, tuple[TensorInput, ...]] = {}
    missing: list[str] = []
    for name, tensor in reference.checkpoint.tensors.items():
        # Integer tensors (position ids, masks) are no weights, and have no meaningful difference.
        if not tensor.is_float or not selection.selects(name) or name in zero:
            continue
        if name in per_token and policy == "skip-embeddings":
            continue
        candidates = [_find(donor, structure, name, own) for donor, structure in zip(donors, structures, strict=True)]
        stored = [candidate for candidate in candidates if candidate is not None]
        if len(stored) < len(candidates):
            missing.append(name)
            continue
        inputs = rows.align(tensor, stored) if name in per_token else tuple(TensorInput(s) for s in stored)
        if _shapes_agree(preflight, tensor, inputs, donors, name in per_token):
            aligned[name] = inputs
    # A vector that is applied in part would not be the vector that was extracted: what is left over is an error.
    extra = sorted(
        {
            name
            for donor, structure in zip(donors, structures, strict=True)
            for name, tensor in donor.checkpoint.tensors.items()
            if tensor.is_float
            and selection.selects(name)
            and name not in reference.checkpoint.tensors
            and not (policy == "skip-embeddings" and name in structure.token_rows)
        }
    )
    check_names(preflight, missing, extra, reference.ref, " or ".join(dict.fromkeys(d.ref for d in donors)))
    return aligned


def _find(donor: AlignedModel, structure: ModelStructure, name: str, own: ModelStructure) -> StoredTensor | None:
    """Return the donor's tensor for `name`; for an output matrix that the donor ties, its embedding."""
    # A tied donor stores one matrix for both ends; with several embeddings it is unclear which one is tied.
    stored = donor.checkpoint.tensors.get(name)
    if stored is None and name in own.lm_heads and structure.tied and len(structure.token_embeddings) == 1:
        return donor.checkpoint.tensors[structure.token_embeddings[0]]
    return stored


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


class _RowAligner:
    """Map the rows of tensors with one row per token from the reference's vocabulary to the donors'."""

    def __init__(
        self, preflight: Preflight, reference: AlignedModel, donors: Sequence[AlignedModel], policy: VocabPolicy
    ) -> None:
        self._preflight = preflight
        self._policy = policy
        self._own = _vocabulary(reference)
        self._donors = [_vocabulary(donor) for donor in donors]
        models = zip((reference, *donors), (self._own, *self._donors), strict=True)
        without = [model.ref for model, vocabulary in models if vocabulary is None]
        self._comparable = not without
        self._same = True
        if policy == "skip-embeddings":
            preflight.facts["vocabulary"] = "embeddings and output matrix stay the target's"
        elif without:
            preflight.facts["vocabulary"] = f"not compared: no tokenizer files in {', '.join(dict.fromkeys(without))}"
            if policy == "by-token":
                preflight.errors.add(f"--vocab by-token needs the tokenizers of all models; {without[0]} has none.")
        else:
            self._compare(reference, donors)

    def _compare(self, reference: AlignedModel, donors: Sequence[AlignedModel]) -> None:
        assert self._own is not None
        for donor, vocabulary in zip(donors, self._donors, strict=True):
            assert vocabulary is not None
            difference = differences(self._own, vocabulary)
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
        """Return the donors' tensors `stored` with a row map each, where the policy and the vocabularies ask for it."""
        unmapped = tuple(TensorInput(s) for s in stored)
        if self._policy != "by-token" or not self._comparable:
            return unmapped
        # The same vocabulary under another shape means padding rows, which the row maps leave out.
        if self._same and all(s.shape == tensor.shape for s in stored):
            return unmapped
        assert self._own is not None
        maps = []
        for vocabulary, donor in zip(self._donors, stored, strict=True):
            assert vocabulary is not None
            maps.append(align_rows(self._own, vocabulary, tensor.shape[0], donor.shape[0]))
        # A token's update needs all donors: tuned − base of a row that only one of them has would be no difference.
        in_all = np.all([rows >= 0 for rows in maps], axis=0)
        self._preflight.facts["vocabulary"] = (
            f"{int(in_all.sum()):,} of {tensor.shape[0]:,} rows aligned by token; the rest get no update"
        )
        return tuple(TensorInput(donor, np.where(in_all, rows, -1)) for donor, rows in zip(stored, maps, strict=True))


def _vocabulary(model: AlignedModel) -> Vocabulary | None:
    return None if model.tokenizer is None else read_vocabulary(model.tokenizer)
