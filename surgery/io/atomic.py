"""Write files and folders atomically and durably: each appears whole or not at all.

How it works, and what an error, a kill or a power failure leaves behind:

- A file is written under a temporary name in its own folder, fsynced and renamed over its target. A kill leaves the
  target as it was, and at worst a hidden file `.NAME.xxxxxxxx` beside it.
- A folder `OUT` is written in `OUT.partial`. When it is complete every file in it is fsynced, then it is renamed to
  `OUT`, then the folder around it is fsynced. An error or a kill before the rename leaves `OUT.partial`, which the next
  run resumes or clears.
- An earlier `OUT` that is to be overwritten is first renamed to `OUT.replaced` and deleted last. A kill between the two
  renames leaves the old output in `OUT.replaced` and the complete new one in `OUT.partial`.

The order fsync → rename matters: renamed first, a file could be empty after a power failure although it has its name.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import SurgeryError, usage_error

MANIFEST = "surgery.json"  # marks a folder as an output of this tool
JOURNAL = "journal.jsonl"  # marks a staging folder whose job can be resumed; see `surgery.engine.storage.journal`
PARTIAL = ".partial"  # suffix of a staging folder
REPLACED = ".replaced"  # suffix of an output that is being overwritten


def write_file(path: Path, content: bytes | str) -> Path:
    """Write `content` (text as UTF-8) to `path` atomically, creating its folder; return `path`. Raises SurgeryError."""
    with atomic_replace(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to; at the end of the block it replaces `path` and takes over its mode.

    After an error in the block `path` is unchanged and the temporary file is gone.

    Raises:
        SurgeryError: the file cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the target's own folder: a rename is atomic only within one file system. Not by mkstemp, whose files only
        # their owner can read: the user's umask decides.
        named = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(named, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        temporary = named
        mode = os.fstat(descriptor).st_mode
        os.close(descriptor)
        yield temporary
        # Again, since safetensors puts a file of its own in this one's place.
        temporary.chmod(stat.S_IMODE(path.stat().st_mode if path.exists() else mode))
        fsync_path(temporary)
        temporary.replace(path)
        # The new name is an entry of the folder, which a power failure loses unless the folder is on the disk too.
        fsync_path(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    out: Path, *, overwrite: bool = False, keep: Collection[str] = (), suffix: str = PARTIAL
) -> Iterator[Path]:
    """Yield a staging folder to fill; at the end of the block it is made durable and becomes `out`.

    After an error in the block `out` is unchanged and the staging folder stays, as after a kill; the next call clears
    it. Errors of the block pass through unchanged.

    Args:
        overwrite: replace an earlier `out`, and discard a resumable job in the staging folder. Call `check_free` before
            the work begins, to find out whether `out` may be replaced.
        keep: names of files at the top of the staging folder that survive from a killed run, such as caches of
            finished work. They are deleted just before the commit, so that a kill until then loses none of them.
        suffix: what is appended to the name of `out` to name the staging folder.

    Raises:
        SurgeryError: as `create_partial_folder` and `commit_folder`.
    """
    partial = create_partial_folder(out, overwrite=overwrite, keep=keep, suffix=suffix)
    yield partial
    for name in keep:
        remove_path(partial / name)
    commit_folder(partial, out, overwrite=overwrite)


def check_no_journal(partial: Path, *, overwrite: bool) -> None:
    """Raise SurgeryError where a resumable job is in the staging folder `partial` and `overwrite` is off.

    For what takes long before it writes: an error of `create_partial_folder` at its end would waste all of the work.
    """
    # A journal marks hours of work of `surgery.engine`, which a quick command must not throw away unasked.
    if (partial / JOURNAL).exists() and not overwrite:
        raise usage_error(
            "holds another job's work, which goes on where it stopped",
            where=partial,
            hint="Choose another folder, or add --overwrite.",
        )


def create_partial_folder(out: Path, *, overwrite: bool, keep: Collection[str] = (), suffix: str = PARTIAL) -> Path:
    """Create the folder in which `out` is written; what a killed run left in it is deleted, except the files in `keep`.

    Raises:
        SurgeryError: as `check_no_journal`; the folder cannot be written.
    """
    partial = partial_path(out, suffix)
    check_no_journal(partial, overwrite=overwrite)
    try:
        # The name may also be that of a file or a symbolic link, which cannot be filled.
        if not keep:
            remove_path(partial)
        partial.mkdir(parents=True, exist_ok=True)
        for path in partial.iterdir():
            if path.name not in keep:
                remove_path(path)
    except OSError as error:
        raise disk_error(error, partial) from error
    return partial


def commit_folder(partial: Path, out: Path, *, overwrite: bool) -> None:
    """Make everything in `partial` durable and rename it to `out`; with `overwrite` an earlier `out` is deleted.

    Raises:
        SurgeryError: it cannot be written. Then either `out` is still the earlier one, or `partial` is complete.
    """
    replaced = partial_path(out, REPLACED)
    try:
        # Folders as well as files: a file whose entry in its folder is lost is lost with it.
        for path in (*sorted(partial.rglob("*")), partial):
            fsync_path(path)
        # A folder cannot be renamed over one that is not empty, so the earlier output has to step aside first.
        if overwrite and out.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # left by a kill between the two renames
            out.rename(replaced)
        partial.rename(out)
        fsync_path(out.parent)
    except OSError as error:
        raise disk_error(error, out) from error
    # The new output is complete: what cannot be deleted of the earlier one is no reason to report a failure.
    shutil.rmtree(replaced, ignore_errors=True)


def partial_path(out: Path, suffix: str = PARTIAL) -> Path:
    """Return the path of the staging folder of `out`."""
    return out.with_name(out.name + suffix)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise SurgeryError if `out` exists and may not be replaced: only our own outputs are ever overwritten."""
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


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file under `folder`, by its path relative to it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def remove_path(path: Path) -> None:
    """Remove a file, a symbolic link (not what it points to) or a folder; do nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Block until the file or folder `path` is on the disk. Raises SurgeryError if it cannot be written."""
    # For reading only, as folders cannot be opened in any other way; fsync needs no more.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> SurgeryError:
    """Return the SurgeryError for a failed write to `path`."""
    # A quota that is used up is the same to the user, and has the same remedy.
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SurgeryError(
            "the disk is full",
            where=path,
            hint="Free some space and run the same command again: it goes on where it stopped.",
        )
    return SurgeryError(f"cannot be written ({error.strerror})", where=path)
