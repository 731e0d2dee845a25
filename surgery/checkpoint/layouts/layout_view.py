"""See a checkpoint in the layout of another one: with its names, and its matrices fused or apart as they are there.

A view is a `Checkpoint` whose table holds renamed and derived tensors: nothing is copied, and whatever reads tensors
reads views. Names are matched by structure (`canonical_names`), fused tensors through the matrices that they hold
(`fused_matrices`). What has no partner keeps a name that says what it is, and tensors of different shapes meet under
one name: whether that is an error is for those who compare them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import HIDDEN, language_config, number
from surgery.checkpoint.layouts.canonical_names import STACK, canonical_names
from surgery.checkpoint.layouts.regrouping import NamedTensors, Regrouping, regroup_experts, regroup_rows
from surgery.checkpoint.stored_tensor import StoredTensor

_MOST_RENAMINGS = 3  # told of one checkpoint


@dataclass(frozen=True)
class LayoutView:
    """A checkpoint as it is seen, and what was done to its names.

    absent: the names given as `absent`, as the reference has them.
    renamed: stored name → name in the view, of the tensors (and absent ones) that are not regrouped.
    regrouped: names in the view of tensors that are made of others, or cut out of one.
    problems: why parts that mean the same could not be brought together.
    """

    checkpoint: Checkpoint
    absent: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    regrouped: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def description(self) -> str | None:
        """What is seen under another name or in another layout, in one line; None if nothing is."""
        changed = [(stored, seen) for stored, seen in self.renamed.items() if stored != seen]
        parts = []
        if changed:
            heads = Counter(_changed_part(stored, seen) for stored, seen in changed).most_common()
            shown = [f"{old} → {new}" for (old, new), _ in heads[:_MOST_RENAMINGS]]
            more = ["…"] if len(heads) > _MOST_RENAMINGS else []
            parts.append(f"{len(changed)} tensor(s) seen under other names: {', '.join([*shown, *more])}")
        if self.regrouped:
            parts.append(f"{len(self.regrouped)} regrouped, such as {self.regrouped[0]}")
        return "; ".join(parts) or None


def seen_as(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    *,
    absent: Collection[str] = (),
    reference_absent: Collection[str] = (),
) -> LayoutView:
    """Return `checkpoint` with the names and the layout of `reference`, as far as they are the same network.

    Args:
        absent, reference_absent: names of tensors that count as zeros and are not stored (of task vectors).
    """
    names = {*checkpoint.tensors, *absent}
    if names == {*reference.tensors, *reference_absent} and all(
        tensor.shape == reference.tensors[name].shape
        for name, tensor in checkpoint.tensors.items()
        if name in reference.tensors
    ):
        return LayoutView(checkpoint, frozenset(absent), {name: name for name in names})
    # The width of one network: a vector's or a single file's own may not be known.
    hidden = next((n for one in (reference, checkpoint) if (n := number(language_config(one.config), HIDDEN))), None)
    theirs = _named(reference, reference_absent, hidden)
    own = _named(checkpoint, absent, hidden, like=theirs.names.stack)
    if own.names.stack is not None:
        theirs = _named(reference, reference_absent, hidden, like=own.names.stack)
    return _Matcher(own, _with_layers_of(own, theirs)).view(checkpoint)


class _Matcher:
    """Finds for every tensor of `own` where `theirs` has it."""

    def __init__(self, own: NamedTensors, theirs: NamedTensors) -> None:
        self.own, self.theirs = own, theirs
        self.tensors: dict[str, StoredTensor] = {}
        self.absent: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.regrouped: list[str] = []
        self.problems: list[str] = []
        self.used: set[str] = set()  # own names

    def view(self, checkpoint: Checkpoint) -> LayoutView:
        """Return the view; `checkpoint` as it is where two tensors would get one name."""
        self._put_made(regroup_experts(self.own, self.theirs))
        self._match_names()
        wanted = [name for name in self.theirs.tensors if name not in self.tensors and name not in self.absent]
        free = {*self.own.tensors, *self.own.absent} - self.used
        self._put_made(regroup_rows(self.own, self.theirs, wanted, free))
        seen = {*self.tensors, *self.absent}
        for name in sorted({*self.own.tensors, *self.own.absent} - self.used):
            new = self._name_beside(name)
            if new in seen:
                return LayoutView(checkpoint, self.own.absent, problems=tuple(self.problems))
            seen.add(new)
            self._put(name, new)
        tensors = {name: self.tensors[name] for name in sorted(self.tensors)}
        # Compared by identity: what is seen under its own name is the same object.
        same = all(checkpoint.tensors.get(name) is tensor for name, tensor in tensors.items())
        viewed = checkpoint if same else replace(checkpoint, tensors=tensors)
        regrouped, problems = tuple(self.regrouped), tuple(self.problems)
        return LayoutView(viewed, frozenset(self.absent), self.renamed, regrouped, problems)

    def _put(self, name: str, new: str) -> None:
        """See the own tensor `name` as `new`."""
        self.used.add(name)
        self.renamed[name] = new
        if name in self.own.absent:
            self.absent.add(new)
            return
        tensor = self.own.tensors[name]
        self.tensors[new] = tensor if name == new else replace(tensor, name=new, stored_as=tensor.name_in_file)

    def _put_made(self, made: Regrouping) -> None:
        self.used |= made.used
        self.problems += made.problems
        for name, tensor in made.tensors.items():
            if tensor is None:
                self.absent.add(name)
            else:
                self.tensors[name] = replace(tensor, name=name, stored_as=tensor.name_in_file)
                self.regrouped.append(name)

    def _match_names(self) -> None:
        wanted = (*self.theirs.tensors, *self.theirs.absent)
        free = {name for name in (*self.own.tensors, *self.own.absent) if name not in self.used}
        same_place = self.own.names.stack == self.theirs.names.stack
        for by_name in (same_place, not same_place):
            # Where the layers have one place in both, a name is the best evidence, else where it stands to them.
            for name in wanted:
                if name in self.tensors or name in self.absent:
                    continue
                found = name if by_name else self.own.names.stored.get(self.theirs.names.by_name.get(name, ""))
                if found is not None and found in free:
                    free.discard(found)
                    self._put(found, name)

    def _name_beside(self, name: str) -> str:
        """Return the name of a tensor that `theirs` lacks: inside their layers or beside them, where it is so here."""
        canonical = self.own.names.by_name.get(name)
        stack = self.own.names.stack
        if canonical is None or stack is None or self.theirs.names.stack is None:
            return name
        if canonical.startswith(f"{STACK}.") and name.startswith(stack):
            inner = name.removeprefix(stack)
            return f"{self.theirs.names.stack}{inner}"
        root = self.own.names.root
        if root and name.startswith(root):
            return f"{self.theirs.names.root}{name.removeprefix(root)}"
        return name


def _named(
    checkpoint: Checkpoint, absent: Collection[str], hidden: int | None, like: str | None = None
) -> NamedTensors:
    every = sorted({*checkpoint.tensors, *absent})
    names = canonical_names(every, checkpoint.config, like=like)
    return NamedTensors(checkpoint.ref, checkpoint.tensors, frozenset(absent), names, hidden)


def _with_layers_of(own: NamedTensors, theirs: NamedTensors) -> NamedTensors:
    """Return the reference with the layers that only `own` has: they would look there as its last one does.

    Merges of layers take some from models that are deeper than the one that gives the names.
    """
    further = sorted(_layer_numbers(own) - _layer_numbers(theirs))
    last = max(_layer_numbers(theirs), default=None)
    if not further or last is None or theirs.names.stack is None:
        return theirs
    start, canonical_start = f"{theirs.names.stack}.{last}.", f"{STACK}.{last}."
    tensors, by_name = dict(theirs.tensors), dict(theirs.names.by_name)
    for name, canonical in theirs.names.by_name.items():
        if name.startswith(start) and canonical.startswith(canonical_start) and name in theirs.tensors:
            for index in further:
                copy = f"{theirs.names.stack}.{index}.{name.removeprefix(start)}"
                tensors[copy] = theirs.tensors[name]
                by_name[copy] = f"{STACK}.{index}.{canonical.removeprefix(canonical_start)}"
    return replace(theirs, tensors=tensors, names=replace(theirs.names, by_name=by_name))


def _layer_numbers(side: NamedTensors) -> set[int]:
    """Return the numbers of the layers that canonical names tell."""
    parts = (canonical.split(".", 2) for canonical in side.names.by_name.values())
    return {int(number) for first, number, *_ in (one for one in parts if len(one) > 1) if first == STACK}


def _changed_part(stored: str, seen: str) -> tuple[str, str]:
    """Return what differs between two names: * for the components that both end with, N for numbers."""
    old, new = (["N" if part.isdigit() else part for part in name.split(".")] for name in (stored, seen))
    alike = 0
    while alike < min(len(old), len(new)) and old[-1 - alike] == new[-1 - alike]:
        alike += 1
    tail = ["*"] if alike else []
    return ".".join([*old[: len(old) - alike], *tail]), ".".join([*new[: len(new) - alike], *tail])
