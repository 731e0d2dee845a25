"""OUT appears whole or not at all: work goes to `OUT.partial/`, and one rename makes it OUT."""

from __future__ import annotations

import shutil
from pathlib import Path

from surgery.checkpoint import MANIFEST
from surgery.errors import usage_error
from surgery.files import disk_error, sync


def partial_of(out: Path) -> Path:
    """The folder in which `out` is made."""
    return out.with_name(out.name + ".partial")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raises SurgeryError where `out` exists and may not be replaced."""
    if not out.exists():
        return
    if not overwrite:
        raise usage_error("exists already", where=out, hint="Choose another folder, or add --overwrite.")
    if not (out / MANIFEST).is_file():
        raise usage_error(
            f"was not written by this tool (it has no {MANIFEST}), so --overwrite will not remove it",
            where=out,
            hint="Choose another folder, or remove this one yourself.",
        )


def copy_file(source: Path, target: Path) -> None:
    """Copies one small file, making its folder. Raises SurgeryError where it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise disk_error(error, target) from error


def commit(partial: Path, out: Path, *, overwrite: bool) -> None:
    """Makes everything in `partial` durable and renames it to `out`; with `overwrite` an earlier `out` gives way."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    replaced = out.with_name(out.name + ".replaced")
    if overwrite and out.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # left by a kill between the two renames
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
