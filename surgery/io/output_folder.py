"""Write a folder OUT whole or not at all, by one process at a time, and never over what this tool did not write.

What lies beside OUT meanwhile, and what an error, a kill or a power failure leaves there:

- `.OUT.lock` is locked from before anything else is written until nothing else is left. A killed run leaves the file,
  which says that the folders beside it are ours; the lock itself ends with its holder.
- `OUT.partial`, the staging folder, is filled. An error or a kill leaves it; the next run resumes or clears it.
- `OUT.complete` is the staging folder when everything is in it and on the disk. What only a resumed run needs, such as
  the journal, is deleted here, where no run can take it for a folder that is still being filled.
- `OUT.replaced` is an earlier OUT that is being overwritten; it is deleted last. Where a kill came before the new
  output had taken its place, the next run puts it back.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import SurgeryError, listing, usage_error
from surgery.io.atomic import (
    JOURNAL,
    MANIFEST,
    PARTIAL,
    TEMPORARY_END,
    disk_error,
    fsync_path,
    partial_path,
    remove_left_files,
    remove_path,
    write_file,
)
from surgery.io.json_io import read_json, to_json
from surgery.io.locks import exclusive_lock
from surgery.io.safe_paths import MAX_NAME_BYTES, kind_of

COMPLETE = ".complete"  # suffix of a staging folder that is complete
REPLACED = ".replaced"  # suffix of an output that is being overwritten
SIDE_FILES = "side_files"  # key of the manifest: the files of the folder that its "files" does not list
# What `surgery eval` writes into an output later; the card is written after the manifest's list was made.
LATER_FILES = ("README.md", "scores.json")
PATIENCE = 10.0  # seconds that the workers of a killed run may take to end: they hold its lock until then

_OTHER_FOLDER = "Choose another folder with -o."
_TEMPORARY = re.compile(rf"\.(.+)\.{TEMPORARY_END}")  # of `atomic_replace`, left by a kill
# Bytes and values of a manifest of our own, which must not be refused when all the work is done.
_MANIFEST_BYTES, _MANIFEST_VALUES = 1 << 30, 100_000_000

_held: dict[Path, int] = {}  # lock file → the thread of this process that has it


def check_free(out: Path, *, overwrite: bool) -> None:
    """Check that `out` can be written, before any work is done for it.

    Raises:
        SurgeryError: `out` exists and may not be replaced, because `overwrite` is off or something in it was not
            written by this tool; it is a link; it cannot be the name of a folder; what lies beside it is in the way.
    """
    try:
        _check_name(out)
        _check_parent(out)
        for path in staging_folders(out):
            _check_beside(path, out, overwrite=overwrite)
        _check_out(out, overwrite=overwrite)
    except OSError as error:
        raise usage_error(f"cannot be written ({error.strerror})", where=out, hint=_OTHER_FOLDER) from error


@contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Let no other process write `out` in the block. The thread that holds the lock may ask for it again.

    Raises:
        SurgeryError: another process is writing it; the folder around it cannot be written.
    """
    lock = _lock_path(out)
    if _held.get(lock) == threading.get_ident():
        yield
        return
    # First: beside a lock file, whatever is there counts as ours.
    for path in staging_folders(out):
        _check_beside(path, out, overwrite=False)
    busy, hint = "another process is writing it", "Wait until it is done, stop it, or choose another folder with -o."
    with exclusive_lock(lock, where=out, busy=busy, hint=hint, patience=PATIENCE):
        _held[lock] = threading.get_ident()
        try:
            _settle(out)
            yield
        finally:
            del _held[lock]
            # A kept staging folder keeps the file as well, by which it is known to be ours.
            if not (partial_path(out).exists() or partial_path(out, COMPLETE).exists()):
                lock.unlink(missing_ok=True)


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
            finished work. They are deleted by the commit, so that a kill until then loses none of them.
        suffix: what is appended to the name of `out` to name the staging folder.

    Raises:
        SurgeryError: as `output_lock`, `check_free`, `create_partial_folder` and `commit_folder`.
    """
    with output_lock(out):
        # Again: another process may have finished it while this one waited or worked.
        check_free(out, overwrite=overwrite)
        _check_beside(partial_path(out, suffix), out, overwrite=overwrite)
        partial = create_partial_folder(out, overwrite=overwrite, keep=keep, suffix=suffix)
        yield partial
        commit_folder(partial, out, overwrite=overwrite, discard=keep)


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
        partial.mkdir(parents=True, exist_ok=True)
        for path in partial.iterdir():
            if path.name not in keep:
                remove_path(path)
    except OSError as error:
        raise disk_error(error, partial) from error
    return partial


def commit_folder(partial: Path, out: Path, *, overwrite: bool, discard: Collection[str] = ()) -> None:
    """Make everything in `partial` durable and rename it to `out`; with `overwrite` an earlier `out` is deleted.

    The names of all files are listed in the folder's manifest, if it has one, so that `check_free` knows them later.

    Args:
        discard: names of files at the top of `partial` that are not part of the output. They are deleted when all else
            is done, so that a kill until then loses none of them.

    Raises:
        SurgeryError: it cannot be written; `out` is unchanged then.
    """
    complete, replaced = partial_path(out, COMPLETE), partial_path(out, REPLACED)
    try:
        _list_side_files(partial, discard)
        # Folders as well as files: a file whose entry in its folder is lost is lost with it.
        for path in (*sorted(partial.rglob("*")), partial):
            fsync_path(path)
        _delete_output(complete)
        partial.rename(complete)
        for name in discard:
            remove_path(complete / name)
        fsync_path(complete)
        # A folder cannot be renamed over one that is not empty, so the earlier output has to step aside first.
        if overwrite and out.exists():
            _delete_output(replaced)
            out.rename(replaced)
        _check_out(out, overwrite=False)
        complete.rename(out)
        fsync_path(out.parent)
    except OSError as error:
        _put_back(out)
        raise disk_error(error, out) from error
    # The new output is complete: what cannot be deleted of the earlier one is no reason to report a failure.
    with suppress(OSError):
        _delete_output(replaced)


@contextmanager
def extended_output(out: Path) -> Iterator[None]:
    """Let the block write further files into `out`, an output of ours, and list them in its manifest as such.

    What this tool did not write there before stays foreign, so that `check_free` still refuses to remove it.

    Raises:
        SurgeryError: the manifest cannot be read or written. Errors of the block pass through.
    """
    foreign = _foreign(out)
    yield
    try:
        _list_side_files(out, foreign)
    except OSError as error:
        raise disk_error(error, out) from error


def staging_folders(out: Path) -> list[Path]:
    """Return the paths of the folders that lie beside `out` while it is written."""
    return [partial_path(out, suffix) for suffix in (PARTIAL, COMPLETE, REPLACED)]


def discard_output(out: Path) -> None:
    """Delete an output of ours that nobody needs any more, with what a killed run left beside it."""
    for path in (out, *staging_folders(out)):
        shutil.rmtree(path, ignore_errors=True)
    _lock_path(out).unlink(missing_ok=True)


def _lock_path(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.lock"


def _check_name(out: Path) -> None:
    if out.name in ("", "..") or "\0" in str(out):
        raise usage_error("is no name of a new folder", where=str(out), hint="Give one with -o, such as OUT.")
    longest = max(len(suffix) for suffix in (PARTIAL, COMPLETE, REPLACED))
    if len(os.fsencode(out.name)) + longest > MAX_NAME_BYTES:
        raise usage_error(
            f"has a name of {len(os.fsencode(out.name))} bytes, expected at most {MAX_NAME_BYTES - longest}",
            where=out,
            hint=_OTHER_FOLDER,
        )


def _check_parent(out: Path) -> None:
    """Check that the nearest thing on the way to `out` that is there is a folder."""
    for parent in out.absolute().parents:
        if os.path.lexists(parent):
            # A link to a folder is as good as the folder; one to nothing is not.
            kind = kind_of(parent.stat().st_mode) if parent.exists() else "a link to nothing"
            if not parent.is_dir():
                raise usage_error(f"lies in {parent}, which is {kind}", where=out, hint=_OTHER_FOLDER)
            return


def _check_beside(path: Path, out: Path, *, overwrite: bool) -> None:
    """Check a folder that the writing of `out` uses: ours, or none."""
    if not os.path.lexists(path):
        return
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode) or path.is_mount():
        kind = "a mounted file system" if stat.S_ISDIR(mode) else kind_of(mode)
        raise usage_error(f"is {kind}, in the way of what is written to {out}", where=path, hint="Remove it.")
    if path.name.endswith(REPLACED) and not overwrite:
        return  # not used, nor deleted
    # Beside its lock a folder is ours; so is one with a journal, whose lock file was lost.
    known = os.path.lexists(_lock_path(out)) or (path / JOURNAL).is_file() or path.name.endswith(REPLACED)
    if (not known and any(path.iterdir())) or (path.name.endswith(REPLACED) and _foreign(path)):
        raise usage_error(
            f"was not left by this tool, and is in the way of what is written to {out}",
            where=path,
            hint="Move it elsewhere, or choose another folder with -o.",
        )


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        replaced = partial_path(out, REPLACED)
        # Where no process has the lock, the next run puts it back; then it is in the way as if it had never moved.
        if overwrite or not (replaced / MANIFEST).is_file() or _lock_path(out) in _held:
            return
        raise usage_error(
            f"was being overwritten when the run was ended; what was there before is in {replaced.name}",
            where=out,
            hint="Run it again with --overwrite, or rename the folder back.",
        )
    if out.is_symlink():
        raise usage_error(
            f"is a link to {out.readlink()}, and only folders are written and replaced",
            where=out,
            hint="Give the folder itself with -o, or remove the link.",
        )
    if not overwrite:
        _remove_stale_lock(out)
        raise usage_error("exists already", where=out, hint="Choose another folder, or add --overwrite.")
    if not (out / MANIFEST).is_file():
        raise usage_error(
            f"was not written by this tool (it has no {MANIFEST}), so --overwrite will not remove it",
            where=out,
            hint="Choose another folder, or remove this one yourself.",
        )
    if out.is_mount():
        raise usage_error("is a mounted file system, which cannot be replaced", where=out, hint=_OTHER_FOLDER)
    if foreign := _foreign(out):
        raise usage_error(
            f"holds what this tool did not write there, so --overwrite will not remove it: {listing(foreign, 3)}",
            where=out,
            hint="Move that elsewhere, choose another folder, or remove this one yourself.",
        )


def _foreign(folder: Path) -> list[str]:
    """Return the files in an output of ours, by their relative paths, that its manifest does not list."""
    manifest = read_json(folder / MANIFEST, missing={})
    # Of a manifest that was tampered with nothing is believed: then everything is foreign.
    lists = [value for value in (manifest.get("files"), manifest.get(SIDE_FILES)) if isinstance(value, (dict, list))]
    own = {MANIFEST, *LATER_FILES, *(name for names in lists for name in names if isinstance(name, str))}
    foreign = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder)
        temporary = _TEMPORARY.fullmatch(path.name)
        stem = name.with_name(temporary[1]) if temporary else name
        if not {name.as_posix(), stem.as_posix()} & own:
            foreign.append(name.as_posix())
    return foreign


def _list_side_files(partial: Path, discard: Collection[str]) -> None:
    """List the files of `partial` in its manifest, those aside that are listed there already."""
    path = partial / MANIFEST
    if not path.is_file():
        return
    remove_left_files(path)  # of a killed run, or the list would have them
    manifest = read_json(path, limit=_MANIFEST_BYTES, max_values=_MANIFEST_VALUES)
    others = {file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file()}
    manifest[SIDE_FILES] = sorted(others - {MANIFEST, *discard} - manifest.get("files", {}).keys())
    write_file(path, to_json(manifest))


def _settle(out: Path) -> None:
    """Clear up what a killed run left between its renames: the earlier output goes back to its place."""
    complete, replaced = partial_path(out, COMPLETE), partial_path(out, REPLACED)
    try:
        _put_back(out)
        if complete.is_dir() and not complete.is_symlink():
            _delete_output(complete)
        if replaced.is_dir() and not replaced.is_symlink() and not _foreign(replaced):
            _delete_output(replaced)
    except OSError as error:
        raise disk_error(error, out) from error


def _put_back(out: Path) -> None:
    replaced = partial_path(out, REPLACED)
    if not os.path.lexists(out) and (replaced / MANIFEST).is_file():
        replaced.rename(out)


def _delete_output(folder: Path) -> None:
    """Delete a folder of ours, its manifest last: a kill in between leaves it recognisable."""
    if not os.path.lexists(folder):
        return
    for path in folder.iterdir():
        if path.name != MANIFEST:
            remove_path(path)
    shutil.rmtree(folder)


def _remove_stale_lock(out: Path) -> None:
    """Remove the lock file of a run that was killed after all its work, when nothing else is left of it."""
    lock = _lock_path(out)
    if lock in _held or not os.path.lexists(lock) or any(map(os.path.lexists, staging_folders(out))):
        return
    with suppress(SurgeryError), exclusive_lock(lock, where=out, busy="", remove=True):
        pass
