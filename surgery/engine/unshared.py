"""Decide what becomes of tensors that only some models have: one rule for merges and vectors.

Buffers that the architecture computes are left out, what transformers ignores on loading is kept as the base (or the
first model that has it) has it, and both are told in one line each. Everything else is an error that names the models,
unless `--keep GLOB` or `--drop GLOB` says what to do. `surgery.checkpoint.unshared_tensors` finds out what a tensor is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.unshared_tensors import UnsharedModel, unshared_kind, unshared_model
from surgery.engine.preflight import Preflight
from surgery.errors import listing, usage_error
from surgery.io.patterns import check_length, matches_glob

MAX_GLOBS = 200  # of each option: every one is tried on every tensor
MOST_NAMES = 3  # in a line; there may be one for each layer

HINT = "--keep GLOB copies it from the base, or from the first model that has it; --drop GLOB leaves it out of OUT."

Verdict = Literal["keep", "leave out", "error"]


@dataclass(frozen=True)
class UnsharedChoice:
    """The user's word on tensors that only some models have: globs over names.

    keep: keep it from the base, or the first model that has it. drop: leave it out of OUT, whoever has it.
    """

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, globs in (("--keep", self.keep), ("--drop", self.drop)):
            if len(globs) > MAX_GLOBS:
                raise usage_error(f"got {len(globs):,} globs, expected at most {MAX_GLOBS}", where=option)
            for glob in globs:
                check_length(glob, where=option)

    @property
    def options(self) -> dict[str, Any]:
        """The command-line options that give this choice, as manifests record them."""
        return {"keep": list(self.keep), "drop": list(self.drop)}

    def keeps(self, name: str) -> bool:
        """Return whether `--keep` names the tensor."""
        return any(matches_glob(name, glob) for glob in self.keep)

    def drops(self, name: str) -> bool:
        """Return whether `--drop` names the tensor."""
        return any(matches_glob(name, glob) for glob in self.drop)

    def check_names(self, seen: SeenNames) -> None:
        """Raise SurgeryError where a glob matches nothing that it could have an effect on, as after a typing error."""
        for option, globs, names, what in (
            ("--keep", self.keep, seen.unshared, "tensors that only some models have"),
            ("--drop", self.drop, seen.every, "tensors"),
        ):
            for glob in globs:
                if not any(matches_glob(name, glob) for name in names):
                    examples = f", such as {listing(names, MOST_NAMES)}" if names else ""
                    raise usage_error(f"matches none of {len(names):,} {what}{examples}", where=f"{option} {glob!r}")


NO_CHOICE = UnsharedChoice()


@dataclass
class SeenNames:
    """The names of all tensors, of one job or of several, and of those that only some models have."""

    unshared: list[str] = field(default_factory=list)
    every: list[str] = field(default_factory=list)

    def add(self, unshared: Iterable[str], every: Iterable[str]) -> None:
        """Add names, each once."""
        self.unshared = list(dict.fromkeys((*self.unshared, *unshared)))
        self.every = list(dict.fromkeys((*self.every, *every)))


@dataclass
class _Told:
    """The names that one line tells of, by the model that has them."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, ref: str, name: str) -> None:
        self.names.setdefault(ref, []).append(name)

    def lines(self, text: str) -> list[str]:
        return [
            text.format(count=len(names), names=listing(names, MOST_NAMES), ref=ref)
            for ref, names in self.names.items()
        ]


class UnsharedTensors:
    """Decides tensor by tensor, and tells of all of them at the end.

    Args:
        choice: the user's word, which counts before what a tensor is.
        models: reference → model, of all that take part.
        hint: the next step of an error.
    """

    def __init__(
        self,
        preflight: Preflight,
        choice: UnsharedChoice,
        models: Mapping[str, Checkpoint],
        *,
        hint: str = HINT,
    ) -> None:
        self.names: list[str] = []
        self._preflight = preflight
        self._choice = choice
        self._models = models
        self._hint = hint
        self._opened: dict[str, UnsharedModel] = {}
        self._computed, self._ignored, self._kept = _Told(), _Told(), _Told()
        self._dropped: list[str] = []
        self._needed: list[str] = []

    def decide(
        self, name: str, tensor: StoredTensor, has: Sequence[str], lacks: Sequence[str], *, can_keep: bool = True
    ) -> Verdict:
        """Return what becomes of `tensor`, which the models `has` have (its own first) and the models `lacks` lack.

        Args:
            name: the one that OUT would have it under.
            can_keep: whether `--keep` may say to keep it.
        """
        if can_keep:
            self.names.append(name)
        holder, absent = self._model(has[0]), [self._model(ref) for ref in lacks]
        kind = unshared_kind(tensor, holder, absent)
        if self._choice.drops(name):
            self._dropped.append(name)
            return "leave out"
        if can_keep and self._choice.keeps(name):
            self._kept.add(has[0], name)
            return "keep"
        if kind == "computed":
            self._computed.add(has[0], name)
            return "leave out"
        if kind == "ignored":
            self._ignored.add(has[0], name)
            return "keep"
        self._preflight.errors.add_tensor(name, f"in {listing(has)} and not in {listing(lacks)}", self._hint)
        return "error"

    def drops_shared(self, name: str, tensor: StoredTensor, ref: str) -> bool:
        """Return whether `--drop` names a tensor that all models have; `tensor` is that of the model `ref`."""
        if not self._choice.drops(name):
            return False
        self._dropped.append(name)
        if unshared_kind(tensor, self._model(ref), ()) == "learnt":
            self._needed.append(name)
        return True

    def tell(self, *, kept: str, left_out: str, makes_model: bool = True) -> None:
        """Add the lines on all tensors that were decided on to the warnings.

        Args:
            kept, left_out: texts with {count}, {names} and {ref}, of what transformers ignores and of computed buffers.
            makes_model: whether OUT is a model, which may be incomplete.
        """
        lines = self._computed.lines(left_out) + self._ignored.lines(kept)
        lines += self._kept.lines("kept from {ref}, as --keep says: {count} tensor(s) ({names})")
        if self._dropped:
            count, names = len(self._dropped), listing(self._dropped, MOST_NAMES)
            lines.append(f"left out, as --drop says: {count} tensor(s) ({names})")
        if self._needed and makes_model:
            count, names = len(self._needed), listing(self._needed, MOST_NAMES)
            lines.append(
                f"--drop leaves out {count} tensor(s) that all models have ({names}): where transformers needs them, "
                "it fills them with random values."
            )
        self._preflight.warnings += lines

    def _model(self, ref: str) -> UnsharedModel:
        if ref not in self._opened:
            self._opened[ref] = unshared_model(self._models[ref])
        return self._opened[ref]
