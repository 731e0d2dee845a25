"""Small files on the disk: written whole or not at all, durably, with errors that say what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import SurgeryError, usage_error

MANIFEST = "surgery.json"  # marks a folder as an output of this tool
JOURNAL = "journal.jsonl"  # marks a partial folder whose job can be resumed; see `surgery.engine.journal`


def disk_error(error: OSError, path: Path) -> SurgeryError:
    """The `SurgeryError` for a failed write to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SurgeryError(
            "the disk is full",
            where=path,
            hint="Free some space and run the same command again: it goes on where it stopped.",
        )
    return SurgeryError(f"cannot be written ({error.strerror})", where=path)


def sync(path: Path) -> None:
    """Returns once the file or folder `path` is on the disk. Raises SurgeryError where it cannot be written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        os.close(descriptor)


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """A file to be written in the block, which at its end takes the place of `path`, with the mode that `path` had.

    Raises:
        SurgeryError: it cannot be written; then, as after any error in the block, `path` is what it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp's file is for its owner alone; results are to be passed on.
        temporary.chmod(path.stat().st_mode if path.exists() else 0o644)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> Path:
    """Writes `content` (text in UTF-8) to `path`, whole or not at all. Raises SurgeryError."""
    with atomic_replace(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def partial_path(out: Path) -> Path:
    """The folder in which `out` is made."""
    return out.with_name(out.name + ".partial")


def create_partial_folder(out: Path, *, overwrite: bool) -> Path:
    """Create the empty folder in which `out` is written; leftovers of an earlier run in it are deleted.

    Raises:
        SurgeryError: the folder holds a job that can be resumed and `overwrite` is false; it cannot be created.
    """
    partial = partial_path(out)
    # A journal marks hours of work of `surgery.engine`, which a quick command must not throw away unasked.
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


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file under `folder`, by its path relative to it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


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


def commit_folder(partial: Path, out: Path, *, overwrite: bool) -> None:
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
