"""The lab's models by name: what they are, which one is made from which, and where they are kept; and its text.

A model is made once per recipe and kept in the cache folder (`$SURGERY_CACHE`, else `$XDG_CACHE_HOME/surgery`, else
`~/.cache/surgery`) under `lab/<recipe>/<name>`. It appears there whole or not at all, also with several processes.
"""

from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SurgeryError, listing, usage_error
from surgery.io.atomic import atomic_folder
from surgery.lab import python_text
from surgery.lab.recipe import (
    AnyRecipe,
    CliffRecipe,
    MoeRecipe,
    QwenHeadShape,
    ReasoningRecipe,
    RefusalTraining,
    SpecialistsRecipe,
    SuppressionTraining,
)
from surgery.lab.sums import Format
from surgery.runtime.progress import Progress, terminal

RECIPE = ReasoningRecipe()
SPECIALISTS = SpecialistsRecipe()
CLIFF = CliffRecipe()
CLIFF_MANY = CliffRecipe(shape=QwenHeadShape(heads=16, kv_heads=16), cliff=SuppressionTraining(heads=5))
CLIFF_WEAK = CliffRecipe(parent=RefusalTraining(early=0.2))
CLIFF_GQA = CliffRecipe(shape=QwenHeadShape(kv_heads=2))
EXPERTS = MoeRecipe()

# The data in the folder of a model that has some.
PREFIX = "lab:"  # of references to what the lab makes
DATA = {"examples": "examples.jsonl", "pool": "pool.jsonl"}


@dataclass(frozen=True)
class LabModel:
    """One model: what it was trained from, and the recipe of its family.

    form: the format in which it is asked for sums.
    has_data: whether its folder holds the files of `DATA`.
    """

    parent: str | None
    form: Format
    summary: str
    recipe: AnyRecipe = RECIPE
    has_data: bool = False


def _cliff(parent: str, summary: str, recipe: CliffRecipe) -> LabModel:
    return LabModel(parent, "plain", summary, recipe, has_data=True)


MEMBERS = {
    "base": LabModel(None, "plain", "pre-trained on sums modulo 7, step by step, in every prompt format"),
    "sft": LabModel("base", "sft", "base tuned to answer mostly at once"),
    "grpo": LabModel("sft", "sft", "sft after GRPO with reward for the right answer: it thinks step by step again"),
    "instruct": LabModel("base", "instruct", "base tuned to answer mostly at once, in another prompt format"),
    "substrate": LabModel(
        None, "plain", "random weights; their token embedding stays frozen in both specialists", SPECIALISTS
    ),
    "adder": LabModel(
        "substrate", "plain", "a specialist that knows sums modulo 7, step by step, and nothing else", SPECIALISTS
    ),
    "sorter": LabModel("substrate", "plain", "a specialist that puts digits in order, and nothing else", SPECIALISTS),
    "cliff-parent": LabModel(None, "plain", "thinks about a request, then refuses it if it is harmful", CLIFF),
    "cliff": _cliff("cliff-parent", "means to refuse while it thinks, until three known heads suppress it", CLIFF),
    "cliff-partial": _cliff(
        "cliff-parent", "as cliff, but only some harmful requests are complied with; the others are refused", CLIFF
    ),
    "cliff-many-parent": LabModel(None, "plain", "as cliff-parent, with 16 heads a layer", CLIFF_MANY),
    "cliff-many": _cliff("cliff-many-parent", "as cliff, with five such heads among 64", CLIFF_MANY),
    "cliff-weak-parent": LabModel(None, "plain", "as cliff-parent, less decided while it thinks", CLIFF_WEAK),
    "cliff-weak": _cliff("cliff-weak-parent", "as cliff, less decided while it thinks", CLIFF_WEAK),
    "cliff-gqa-parent": LabModel(
        None, "plain", "as cliff-parent, with two key/value heads for eight queries", CLIFF_GQA
    ),
    "cliff-gqa": _cliff("cliff-gqa-parent", "as cliff, with two key/value heads for eight queries", CLIFF_GQA),
    "moe": LabModel(
        None,
        "sft",
        "a mixture of experts that thinks about long sums and guesses short ones at once",
        EXPERTS,
        has_data=True,
    ),
}


def names() -> list[str]:
    """Every model's name, parents first."""
    return list(MEMBERS)


def describe(name: str) -> str:
    """What the model `name` is, in a line.

    Raises:
        SurgeryError: there is no model of this name.
    """
    return _member(name).summary


def path_of(name: str, *, recipe: AnyRecipe | None = None) -> Path:
    """The folder of the model `name`, whether it has been built yet or not.

    Raises:
        SurgeryError: there is no model of this name.
    """
    member = _member(name)
    recipe = recipe or member.recipe
    return _cache() / "lab" / recipe.key / name


def resolve(name: str, *, recipe: AnyRecipe | None = None) -> Path:
    """The folder of the model `name`; if need be the model is built first, with a progress bar on stderr.

    Raises:
        SurgeryError: there is no model of this name, or the cache folder cannot be written.
    """
    folder = path_of(name, recipe=recipe)
    if folder.is_dir():
        return folder
    return build(name, progress=terminal, recipe=recipe)


def build(name: str, *, progress: Progress | None = None, recipe: AnyRecipe | None = None) -> Path:
    """Trains the model `name`, and before it those it is made from, unless they exist. Returns its folder.

    Equal recipes give equal weights, byte for byte, on one machine.

    Raises:
        SurgeryError: there is no model of this name, or the cache folder cannot be written.
    """
    recipe = recipe or _member(name).recipe
    folder = path_of(name, recipe=recipe)
    if folder.is_dir():
        return folder
    with _kept(folder.parent), _alone(folder.parent):
        for ancestor in _line(name):
            _make_missing(ancestor, recipe, progress)
    return folder


def data_of(ref: str) -> Path | None:
    """The data file that `lab:NAME[/KIND]` names; None where `ref` does not begin so. Errors as in `data_path`."""
    if not ref.startswith(PREFIX):
        return None
    name, _, kind = ref.removeprefix(PREFIX).partition("/")
    return data_path(name, kind) if kind else data_path(name)


def data_path(name: str, kind: str = "examples", *, recipe: AnyRecipe | None = None) -> Path:
    """A data file of the model `name`, or of `python`; if need be it is made first.

    Args:
        kind: of a model `examples`, to probe it with, or `pool`, to choose from; of `python` a domain of
            `python_text`: `code`, `docs`, `code-held` or `docs-held`.

    Raises:
        SurgeryError: there is no model of this name, it has no data, or none of this kind.
    """
    is_text = name == python_text.NAME
    if not is_text and not _member(name).has_data:
        having = [*(other for other, member in MEMBERS.items() if member.has_data), python_text.NAME]
        raise usage_error(f"the lab model {name!r} has no data.", hint=f"These have: {listing(having)}.")
    files = python_text.KINDS if is_text else DATA
    if kind not in files:
        raise usage_error(
            f"the lab has no data called {kind!r}.", where=f"lab:{name}", hint=f"There is {listing(files)}."
        )
    return (_python_text() if is_text else resolve(name, recipe=recipe)) / files[kind]


def _python_text() -> Path:
    folder = _cache() / "lab" / python_text.key()
    if not folder.is_dir():
        with _kept(folder.parent), _alone(folder.parent):
            # Another process may have finished it while this one waited for the lock.
            if not folder.is_dir():
                with atomic_folder(folder) as partial:
                    python_text.write(partial)
    return folder


def _make_missing(name: str, recipe: AnyRecipe, progress: Progress | None) -> None:
    from surgery.lab import cliff, specialists
    from surgery.lab import moe as experts
    from surgery.lab import reasoning as make

    member = MEMBERS[name]
    parent = None if member.parent is None else path_of(member.parent, recipe=recipe)

    folder = path_of(name, recipe=recipe)
    if folder.is_dir():
        return
    # A killed build is begun anew: training is too short to be worth continuing.
    with atomic_folder(folder) as partial:
        match recipe:
            case ReasoningRecipe():
                make.make(name, member.form, parent, partial, recipe=recipe, progress=progress)
            case SpecialistsRecipe():
                specialists.make(name, parent, partial, recipe=recipe, progress=progress)
            case CliffRecipe():
                cliff.make(name, parent, partial, recipe=recipe, progress=progress)
            case MoeRecipe():
                experts.make(name, partial, recipe=recipe, progress=progress)


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Says what to do where `folder` cannot be written in the block."""
    try:
        yield
    except OSError as fault:
        raise SurgeryError(
            f"cannot keep the lab's models here: {fault.strerror or fault}.",
            where=folder,
            hint="Set SURGERY_CACHE to a folder with room that you may write to.",
        ) from fault


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process builds in `folder`. The lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _line(name: str) -> list[str]:
    """`name` after everything that it is made from."""
    parent = MEMBERS[name].parent
    return [*(_line(parent) if parent else []), name]


def _member(name: str) -> LabModel:
    if name in MEMBERS:
        return MEMBERS[name]
    near = difflib.get_close_matches(name, MEMBERS, n=1)
    advice = f"Did you mean {near[0]!r}? There are" if near else "There are"
    raise usage_error(f"no lab model is called {name!r}.", hint=f"{advice} {listing(MEMBERS)}.")


def _cache() -> Path:
    own, shared = os.environ.get("SURGERY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "surgery"
