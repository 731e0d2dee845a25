"""Check that what the values of a recipe name exists: files, lab models, data sets, plans, merge methods and tasks.

Nothing is opened, trained or downloaded, and the Hub is not asked: a text of the shape `org/name` counts as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from surgery import lab
from surgery.checkpoint.checkpoint import existing_path
from surgery.errors import SurgeryError, listing
from surgery.hub import datasets as hub_data
from surgery.hub import download as hub
from surgery.io.patterns import glob_paths, has_wildcard
from surgery.lab.builder import check_data_ref
from surgery.recipes.parse.file import nearest
from surgery.recipes.types import InputKind

NO_FILE = "no such file or folder"
TOKENIZER_SOURCES = ("union", "base")  # of a merge; all else is a model
MERGE_CONFIGS = (".yml", ".yaml", ".json")
MAX_SIBLINGS = 10_000  # names of one folder that are compared with a misspelt one


def input_error(text: str, kind: InputKind) -> str | None:
    """Return what is wrong with `text` as the name of a `kind`, with the nearest name; None where nothing is.

    Tasks are checked by `task_errors`, all together, because the harness takes seconds to list its own.
    """
    try:
        return _CHECKS[kind](text) if kind in _CHECKS else None
    except SurgeryError as error:
        return str(error)


def task_errors(tasks: Iterable[str]) -> Mapping[str, str]:
    """Return task → what is wrong, for those of `tasks` that neither the lab nor the harness has.

    The harness is asked only where a task is not the lab's. Where it is not installed nothing is known of its tasks.
    """
    from surgery.evaluation.harness import lab_task_names, task_names

    known = lab_task_names()
    unknown = [task for task in dict.fromkeys(tasks) if task not in known]
    if not unknown or find_spec("lm_eval") is None:
        return {}
    # Reading the harness's own tasks takes seconds.
    names = task_names()
    advice = "`lm_eval ls tasks` lists them all"
    return {task: f"no such task; {nearest(task, names) or advice}" for task in unknown if task not in names}


def _model(text: str) -> str | None:
    if existing_path(text) is not None:
        return None
    # Whether the base is an adapter itself, which is refused, shows only when it is opened.
    base, _, adapter = text.rpartition("+")
    if base and adapter:
        return _model(base) or _adapter(adapter)
    if text.startswith(lab.PREFIX):
        lab.path_of(text.removeprefix(lab.PREFIX))
        return None
    return None if hub.is_repo_id(text) else _no_file(text, "a Hub id (org/name[@revision]) or lab:NAME")


def _tokenizer_source(text: str) -> str | None:
    return None if text in TOKENIZER_SOURCES else _model(text)


def _adapter(text: str) -> str | None:
    if existing_path(text) is not None or hub.is_repo_id(text):
        return None
    return _no_file(text, "a Hub id (org/name[@revision])")


def _data(text: str) -> str | None:
    if existing_path(text) is not None or hub_data.parse_dataset_ref(text) is not None:
        return None
    if text.startswith(lab.PREFIX):
        check_data_ref(text)
        return None
    # `data/a.jsonl` has the shape of a Hub id too, and is a misspelt file.
    if hub.is_repo_id(text) and not Path(text).suffix:
        return str(hub_data.missing_split_error(text))
    return _no_file(text, f"a Hub data set ({hub_data.REF_FORMAT}) or lab:NAME")


def _corpus(text: str) -> str | None:
    if has_wildcard(text) and existing_path(text) is None and hub_data.parse_dataset_ref(text) is None:
        return None if glob_paths(text) else "matches no file"
    return _data(text)


def _text(text: str) -> str | None:
    if text.startswith(lab.PREFIX):
        check_data_ref(text)
        return None
    return _path(text)


def _path(text: str) -> str | None:
    return None if existing_path(text) is not None else _no_file(text)


def _plan(text: str) -> str | None:
    from surgery.growth.plan import plan_names

    if existing_path(text) is not None or text in plan_names():
        return None
    return f"no such plan; {nearest(text, plan_names()) or f'give a YAML file, or one of {listing(plan_names())}'}"


def _merge(text: str) -> str | None:
    from merges.methods.registry import METHODS

    if existing_path(text) is not None or text in METHODS:
        return None
    if text.endswith(MERGE_CONFIGS):
        return _no_file(text)
    return f"no such merge method or config; {nearest(text, METHODS) or f'there are {listing(METHODS)}'}"


def _no_file(text: str, otherwise: str | None = None) -> str:
    """Return the error for a text that is no path, nor `otherwise`, with the nearest name of the same folder."""
    what = NO_FILE if otherwise is None else f"{NO_FILE}, and not {otherwise}"
    folder, slash, name = text.rpartition("/")
    parent = Path(f"{folder}{slash}" or ".").expanduser()
    if not parent.is_dir():
        return f"{what}; there is no folder {folder} either"
    # Sorted, so that the same name is proposed everywhere.
    names = sorted(path.name for _, path in zip(range(MAX_SIBLINGS), parent.iterdir(), strict=False))
    near = nearest(name, names, f"{folder}{slash}")
    return f"{what}; {near or 'paths are looked up from where `surgery run` is started'}"


_CHECKS: Mapping[InputKind, Callable[[str], str | None]] = {
    "model": _model,
    "tokenizer": _model,
    "tokenizer source": _tokenizer_source,
    "data": _data,
    "corpus": _corpus,
    "text": _text,
    "path": _path,
    "plan": _plan,
    "merge": _merge,
}
