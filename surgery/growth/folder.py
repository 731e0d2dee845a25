"""Folders that are made in one go: in a `.partial` beside them that is begun anew, and renamed when all is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from surgery.engine.journal import NAME as JOURNAL
from surgery.errors import SurgeryError, usage_error
from surgery.hub.datasets import first_line
from surgery.io.atomic import disk_error, partial_path
from surgery.runtime.quiet import quiet


def fresh_partial(out: Path, *, overwrite: bool) -> Path:
    """An empty folder to make `out` in; what a killed run left there is removed.

    Raises:
        SurgeryError: a job that can go on lies there, and `overwrite` was not said; the folder cannot be made.
    """
    partial = partial_path(out)
    if (partial / JOURNAL).exists() and not overwrite:
        raise usage_error(
            "holds another job's work, which goes on where it stopped",
            where=partial,
            hint="Choose another folder, or add --overwrite.",
        )
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise disk_error(error, partial) from error
    return partial


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer of transformers to `folder`, as it saves itself. Raises SurgeryError."""
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    except Exception as fault:  # the tokenizers library raises nothing narrower for a full disk
        raise SurgeryError(f"the tokenizer cannot be written ({first_line(fault)})", where=folder) from fault


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file under `folder`, by its path in it, and its size in bytes."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
