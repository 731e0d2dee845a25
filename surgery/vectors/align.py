"""Align donor tensors, and their vocabulary rows, with the tensors of a reference model.

Shapes must agree, and names: what becomes of a tensor that only some models have, `surgery.engine.unshared` decides.
Tensors with one row per token also need the same token → id map, for which there are three
policies: `strict` refuses any difference, `by-token` aligns rows by token string (a token that a donor lacks gets no
update), `skip-embeddings` leaves those tensors as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.vocabulary import Vocabulary, align_rows, differences, read_vocabulary
from surgery.engine.preflight import Preflight
from surgery.engine.unshared import SeenNames, UnsharedChoice, UnsharedTensors
from surgery.errors import usage_error
from surgery.vectors.choices import VocabPolicy
from surgery.vectors.selection import TensorSelection

POLICIES: tuple[VocabPolicy, ...] = get_args(VocabPolicy)
OTHER_POLICIES = "--vocab by-token aligns rows by token; --vocab skip-embeddings leaves the embeddings as they are."


SKIP: VocabPolicy = "skip-embeddings"
HINT = (
    "--keep GLOB leaves a tensor of the target as it is, --drop GLOB leaves it out; where only the others have it, "
    "--drop leaves the update out."
)
NO_UPDATE = "without an update, as transformers ignores them where a model lacks them: {count} of {ref} ({names})"
NO_UPDATE_COMPUTED = "without an update, as the architecture computes them: {count} of {ref} ({names})"


@dataclass(frozen=True)
class VectorSettings:
    """How a vector is taken or added.

    selection: the tensors that change, and their scales. vocab: what to do where vocabularies differ. dtype: torch's
    name of the dtype to store float tensors in; None keeps each tensor's own. allow_unrelated: accept models without a
    common ancestor. unshared: what to do with tensors that only some models have. dequantise: see weights in FP8 with
    scales, and MXFP4, as bf16.

    Raises:
        SurgeryError: there is no such policy or dtype.
    """

    selection: TensorSelection = field(default_factory=TensorSelection)
    vocab: VocabPolicy = "strict"
    dtype: str | None = None
    allow_unrelated: bool = False
    unshared: UnsharedChoice = field(default_factory=UnsharedChoice)
    dequantise: bool = False

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
        options = {"vocab": self.vocab, "dtype": self.dtype, **self.selection.options}
        return {**options, **self.unshared.options, **self.input_options}

    @property
    def globs(self) -> dict[str, Any]:
        """Those of the command-line options that are globs over names."""
        chosen = self.selection
        return {"include": list(chosen.include), "exclude": list(chosen.exclude), **self.unshared.options}

    @property
    def input_options(self) -> dict[str, Any]:
        """Those of the options that say how models are opened, where they are not as usual."""
        return {"dequantise": True} if self.dequantise else {}

    def open(self, ref: str) -> Checkpoint:
        """Open a model of the job."""
        return open_checkpoint(ref, dequantise=self.dequantise)


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


@dataclass(frozen=True)
class Alignment:
    """The donors' inputs for the tensors of a reference model.

    inputs: name → one `TensorInput` per donor, each with as many elements as the reference's tensor. dropped: the
    reference's tensors that OUT does not get.
    """

    inputs: Mapping[str, tuple[TensorInput, ...]]
    dropped: frozenset[str] = frozenset()


def check_and_align(
    preflight: Preflight,
    reference: AlignedModel,
    donors: Sequence[AlignedModel],
    settings: VectorSettings,
    *,
    command: str,
    zero: Collection[str] = (),
    names: Iterable[str] = (),
    makes_model: bool = True,
) -> Alignment:
    """Check that `donors` can be aligned with `reference`, and align them. Arguments and result as `align_tensors`.

    Args:
        command: named by the errors.
        names: further names that a glob may match: of tensors that the models were found to have twice.

    Raises:
        SurgeryError: `preflight` has errors, from before or of this; a glob matches nothing.
    """
    # Models of different architectures differ in every name and shape: listing those as well would hide the reason.
    preflight.errors.raise_if_any(command)
    checkpoints = [reference.checkpoint, *(donor.checkpoint for donor in donors)]
    float_names = {name for checkpoint in checkpoints for name in checkpoint.float_names()}
    settings.selection.check_names(sorted({*float_names, *names}))
    aligned = align_tensors(preflight, reference, donors, settings, zero=zero, makes_model=makes_model)
    preflight.errors.raise_if_any(command)
    return aligned


def align_tensors(
    preflight: Preflight,
    reference: AlignedModel,
    donors: Sequence[AlignedModel],
    settings: VectorSettings,
    *,
    zero: Collection[str] = (),
    makes_model: bool = True,
) -> Alignment:
    """Find the donors' inputs for every selected float tensor of `reference`; errors are added to `preflight`.

    Args:
        zero: names whose update is known to be zero, which no donor stores.
        makes_model: whether OUT is a model, which `--drop` may leave incomplete.

    Raises:
        SurgeryError: a glob of `--keep` or `--drop` matches nothing.
    """
    selection, policy = settings.selection, settings.vocab
    structures = [model_structure(donor.checkpoint) for donor in donors]
    own = model_structure(reference.checkpoint)
    rows = _RowAligner(preflight, reference, donors, policy)
    refs = [donor.ref for donor in donors]
    models = {model.ref: model.checkpoint for model in (reference, *donors)}
    unshared = UnsharedTensors(preflight, settings.unshared, models, hint=HINT)
    per_token = set(own.token_rows)
    aligned: dict[str, tuple[TensorInput, ...]] = {}
    dropped: set[str] = set()
    for name, tensor in reference.checkpoint.tensors.items():
        candidates = [_find(donor, structure, name, own) for donor, structure in zip(donors, structures, strict=True)]
        stored = [candidate for candidate in candidates if candidate is not None]
        lacks = [ref for ref, candidate in zip(refs, candidates, strict=True) if candidate is None and name not in zero]
        # What no update is asked for may be in one model alone; but the user's word counts for it too.
        is_asked = tensor.is_float and selection.selects(name) and not (name in per_token and policy == SKIP)
        if lacks and (is_asked or settings.unshared.drops(name)):
            has = list(dict.fromkeys((reference.ref, *(ref for ref in refs if ref not in lacks))))
            if unshared.decide(name, tensor, has, lacks) == "leave out" and settings.unshared.drops(name):
                dropped.add(name)
        elif lacks:
            unshared.names.append(name)
        elif unshared.drops_shared(name, tensor, reference.ref):
            dropped.add(name)
        # Integer tensors (position ids, masks) are no weights, and have no meaningful difference.
        elif is_asked and name not in zero:
            inputs = rows.align(tensor, stored) if name in per_token else tuple(TensorInput(s) for s in stored)
            if _shapes_agree(preflight, tensor, inputs, donors, name in per_token):
                aligned[name] = inputs
    extra = _only_donors(reference, donors, structures, settings)
    for name, (tensor, has) in extra.items():
        unshared.decide(name, tensor, has, [reference.ref], can_keep=False)
    seen = SeenNames()
    seen.add(unshared.names, [*reference.checkpoint.tensors, *extra])
    if not preflight.errors:  # an error says more of a tensor than that a glob has no effect on it
        settings.unshared.check_names(seen)
    unshared.tell(kept=NO_UPDATE, left_out=NO_UPDATE_COMPUTED, makes_model=makes_model)
    return Alignment(aligned, frozenset(dropped))


def _only_donors(
    reference: AlignedModel,
    donors: Sequence[AlignedModel],
    structures: Sequence[ModelStructure],
    settings: VectorSettings,
) -> dict[str, tuple[StoredTensor, list[str]]]:
    """Return the selected float tensors that the reference lacks: name → the first donor's, and who has it."""
    # A vector is never applied in part without a word: what is left over is told of, or an error.
    extra: dict[str, tuple[StoredTensor, list[str]]] = {}
    for donor, structure in zip(donors, structures, strict=True):
        per_token = structure.token_rows if settings.vocab == SKIP else ()
        for name, tensor in donor.checkpoint.tensors.items():
            lacking = name not in reference.checkpoint.tensors and name not in per_token
            if lacking and tensor.is_float and settings.selection.selects(name):
                extra.setdefault(name, (tensor, []))[1].append(donor.ref)
    return {name: (tensor, list(dict.fromkeys(has))) for name, (tensor, has) in sorted(extra.items())}


def _find(donor: AlignedModel, structure: ModelStructure, name: str, own: ModelStructure) -> StoredTensor | None:
    """Return the donor's tensor for `name`; for an output matrix that the donor ties, its embedding."""
    # A tied donor stores one matrix for both ends; with several embeddings it is unclear which one is tied.
    stored = donor.checkpoint.tensors.get(name)
    if stored is None and name == own.main_head and structure.tied and structure.main_embedding is not None:
        return donor.checkpoint.tensors[structure.main_embedding]
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
