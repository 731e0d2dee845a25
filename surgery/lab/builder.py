"""Build the lab's models, each at most once per recipe, and give the paths of models and of their data.

A model is kept in the cache folder (`$SURGERY_CACHE`, else `$XDG_CACHE_HOME/surgery`, else `~/.cache/surgery`) under
`lab/<key of its recipe>/<name>`. It appears there whole or not at all, also when several processes ask for it at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from surgery.errors import SurgeryError, listing, usage_error
from surgery.io.locks import exclusive_lock
from surgery.io.output_folder import atomic_folder
from surgery.io.private_files import make_private_folder
from surgery.lab import python_text
from surgery.lab.catalogue import DATA, MODELS, PREFIX, find_model, lineage
from surgery.lab.recipe import AnyRecipe, CliffRecipe, MoeRecipe, ReasoningRecipe, SpecialistsRecipe
from surgery.runtime.cache_folder import cache_folder
from surgery.runtime.progress import Progress, lines, terminal


def path_of(name: str, *, recipe: AnyRecipe | None = None) -> Path:
    """Return the folder of the model `name`, whether it has been built yet or not.

    Raises:
        SurgeryError: there is no model of this name.
    """
    model = find_model(name)
    return cache_folder("lab") / (recipe or model.recipe).key / name


def resolve(name: str, *, recipe: AnyRecipe | None = None) -> Path:
    """Return the folder of the model `name`; if need be build the model first, with a progress bar on stderr.

    Raises:
        SurgeryError: there is no model of this name, or the cache folder cannot be written.
    """
    folder = path_of(name, recipe=recipe)
    if folder.is_dir():
        return folder
    return build(name, progress=terminal, recipe=recipe)


def build(name: str, *, progress: Progress | None = None, recipe: AnyRecipe | None = None) -> Path:
    """Train the model `name`, and before it its ancestors, unless they exist; return its folder.

    Equal recipes give equal weights, byte for byte, on one machine.

    Raises:
        SurgeryError: there is no model of this name, or the cache folder cannot be written.
    """
    recipe = recipe or find_model(name).recipe
    folder = path_of(name, recipe=recipe)
    if folder.is_dir():
        return folder
    with _exclusive(folder.parent):
        # Each is looked for again: another process may have built it while this one waited for the lock.
        for ancestor in lineage(name):
            _build_missing(ancestor, recipe, progress)
    return folder


def data_of(ref: str) -> Path | None:
    """Return the data file that `lab:NAME[/KIND]` names; None if `ref` does not begin so. Errors as in `data_path`."""
    if not ref.startswith(PREFIX):
        return None
    name, _, kind = ref.removeprefix(PREFIX).partition("/")
    return data_path(name, kind) if kind else data_path(name)


def data_path(name: str, kind: str = "examples", *, recipe: AnyRecipe | None = None) -> Path:
    """Return a data file of the model `name`, or of `python`; if need be make it first.

    Args:
        kind: of a model `examples`, to probe it with, or `pool`, to choose from; of `python` a domain of
            `python_text`: `code`, `docs`, `code-held` or `docs-held`.

    Raises:
        SurgeryError: there is no model of this name, it has no data, or none of this kind.
    """
    file = _data_file(name, kind)
    return (_python_text() if name == python_text.NAME else resolve(name, recipe=recipe)) / file


def check_data_ref(ref: str) -> None:
    """Check that `lab:NAME[/KIND]` names data of the lab, without making it. Errors as in `data_path`."""
    name, _, kind = ref.removeprefix(PREFIX).partition("/")
    _data_file(name, kind or "examples")


def _data_file(name: str, kind: str) -> str:
    is_text = name == python_text.NAME
    if not is_text and not find_model(name).has_data:
        with_data = [*(other for other, model in MODELS.items() if model.has_data), python_text.NAME]
        raise usage_error(f"the lab model {name!r} has no data.", hint=f"These have: {listing(with_data)}.")
    files = python_text.FILES if is_text else DATA
    if kind not in files:
        raise usage_error(
            f"the lab has no data called {kind!r}.", where=f"{PREFIX}{name}", hint=f"There is {listing(files)}."
        )
    return files[kind]


def _python_text() -> Path:
    folder = cache_folder("lab") / python_text.cache_key()
    if folder.is_dir():
        return folder
    with _exclusive(folder.parent):
        # Another process may have written it while this one waited for the lock.
        if not folder.is_dir():
            with atomic_folder(folder) as partial:
                python_text.write_texts(partial)
    return folder


def _build_missing(name: str, recipe: AnyRecipe, progress: Progress | None) -> None:
    # Imported late: these load torch and transformers, which paths and names do without.
    from surgery.lab import cliff, moe, reasoning, specialists

    folder = path_of(name, recipe=recipe)
    if folder.is_dir():
        return
    ancestor = MODELS[name].parent
    parent = None if ancestor is None else path_of(ancestor, recipe=recipe)
    # What a killed build left is cleared: training is too short to be worth resuming.
    with atomic_folder(folder) as partial:
        match recipe:
            case ReasoningRecipe():
                reasoning.build_model(name, parent, partial, recipe=recipe, progress=progress)
            case SpecialistsRecipe():
                specialists.build_model(name, parent, partial, recipe=recipe, progress=progress)
            case CliffRecipe():
                cliff.build_model(name, parent, partial, recipe=recipe, progress=progress)
            case MoeRecipe():
                moe.build_model(name, partial, recipe=recipe, progress=progress)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, created if need be; other processes that build there wait.

    Raises:
        SurgeryError: something in the block cannot be written, with advice on where to put the cache.
    """
    try:
        make_private_folder(cache_folder("lab"))
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as waiting:
            waiting.enter_context(lines("Waiting for another process that builds a lab model"))
            with exclusive_lock(
                folder / ".lock", where=folder, busy="another build is at work here", patience=math.inf
            ):
                waiting.close()
                yield
    except OSError as error:
        raise SurgeryError(
            f"cannot keep the lab's models here: {error.strerror or error}.",
            where=folder,
            hint="Set SURGERY_CACHE to a folder with room that you may write to.",
        ) from error
