"""Hash files and outputs, and cache the hashes: a file is read again only if its size, time or inode has changed.

A `.safetensors` file counts by its tensors, not by its header's metadata, which may say where and when it was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from xxhash import xxh3_128

from surgery.checkpoint.reader import SourceFiles, TensorReader, hash_tensor
from surgery.checkpoint.safetensors_header import Header, read_header
from surgery.checkpoint.stored_tensor import stored_tensor
from surgery.engine.work.workers import run
from surgery.errors import SurgeryError
from surgery.io.atomic import MANIFEST, write_file
from surgery.io.hashing import KEY, hash_tensors, hash_text
from surgery.io.input_files import open_regular
from surgery.io.json_io import read_json, to_json
from surgery.io.safe_paths import check_contained
from surgery.recipes.run.paths import STEPS, StepPaths

WEIGHTS = ".safetensors"
RESULTS = "results.json"
# Files that people and `surgery eval` write into a finished folder: the model in it stays the same.
DESCRIBING = ("README.md", "scores.json")
SCHEMA = 1
MOST_ENTRIES = 20_000  # of a folder that is hashed as an input
_CHUNK = 1 << 24
# What the layout of a table adds to its text: blanks, and lines between rows. It depends on the terminal's width.
_LAYOUT = re.compile(r"[\s─━╌╍│┃]+")


class FileHashCache:
    """Hashes of files, stored in the JSON file `path` (None: in memory only)."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                check_contained(path.parent, path)
                record = read_json(path)
            except SurgeryError:
                record = {}  # only a cache: the files are hashed again
            files = record.get("files") if record.get("schema") == SCHEMA else None
            # Only a cache: what is no entry is left out, and hashed again.
            entries = files.items() if isinstance(files, dict) else ()
            self._known = {key: entry for key, entry in entries if isinstance(entry, list) and len(entry) == 4}

    def hash_file(self, path: Path) -> str:
        """Return the hash of a file: of a .safetensors' tensors, of another's bytes. Raises SurgeryError."""
        key, stamp = _stamp(path)
        known = self._known.get(key)
        if known is not None and known[:3] == stamp:
            return str(known[3])
        return self._put(key, stamp, _tensors_hash(path) if path.suffix == WEIGHTS else _bytes_hash(path))

    def hash_content(self, path: Path) -> str:
        """Return the hash of a file, or of all files in a folder except those that describe it. Raises SurgeryError."""
        return hash_tensors(self.hash_files(path))

    def hash_files(self, path: Path) -> dict[str, str]:
        """Return the hash of each file of a folder, by its path in it; of a single file under the name "."."""
        if path.is_dir():
            return {name: self.hash_file(file) for name, file in sorted(_files(path))}
        return {".": self.hash_file(path)}

    def load_manifest_hashes(self, out: Path) -> None:
        """Take the hashes of tensors from the manifests in `out`, which has just been written, for those they list."""
        # A step's output may hold several checkpoints, each with a manifest of its own.
        for manifest in sorted(out.rglob(MANIFEST)) if out.is_dir() else ():
            try:
                listed = read_json(manifest).get("tensors")
            except SurgeryError:
                continue
            if not isinstance(listed, dict):
                continue
            for path in sorted(manifest.parent.glob(f"*{WEIGHTS}")):
                digest = _listed_hash(path, listed)
                if digest is not None:
                    key, stamp = _stamp(path)
                    self._put(key, stamp, digest)

    def is_intact(self, path: Path, files: Mapping[str, str]) -> bool:
        """Whether the files hashed in `files` by `hash_files` are unchanged; files added since do not matter."""
        # run.json and the folder may be a stranger's: nothing outside of it is read, by a name or by a link.
        if any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in files):
            return False
        try:
            if not path.exists():
                return False
            for name, digest in files.items():
                file = path if name == "." else path / name
                if name != ".":
                    check_contained(path, file)
                if self.hash_file(file) != digest:
                    return False
            return True
        except SurgeryError:
            return False

    def save(self) -> None:
        """Store the hashes, if there are new ones. Raises SurgeryError if the file cannot be written."""
        if self._changed and self._path is not None:
            alive = {key: entry for key, entry in sorted(self._known.items()) if Path(key).exists()}
            write_file(self._path, to_json({"schema": SCHEMA, "files": alive}))
            self._changed = False

    def _put(self, key: str, stamp: list[int], digest: str) -> str:
        self._known[key] = [*stamp, digest]
        self._changed = True
        return digest


def output_hash(paths: StepPaths, files: Mapping[str, str], *, run_folder: Path) -> str:
    """Return the hash of a step's output: the same for two runs of a recipe, in whatever folders.

    Over the tensors of every .safetensors file and the findings of every probe that it wrote; else over the file that
    it wrote; else over what it printed, without blanks, lines and the paths of the run's own folders.

    Args:
        files: of its output, by `FileHashCache.hash_files`.

    Raises:
        SurgeryError: what it printed cannot be read.
    """
    results = {name: digest for name, digest in files.items() if name.endswith(WEIGHTS) or _is_findings(name, files)}
    if results:
        return hash_tensors(results)
    if paths.out.is_file():
        return files["."]
    try:
        text = paths.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=paths.text) from error
    # A step prints paths in the run's folder as they were typed, or absolute.
    steps = "|".join(re.escape(f"{run}/{STEPS}/") for run in (run_folder.absolute(), run_folder))
    return hash_text(_LAYOUT.sub("", re.sub(rf"(?<![\w./-])({steps})", "", text)))


def _is_findings(name: str, files: Mapping[str, str]) -> bool:
    """Whether a file holds the findings of a probe, which have a manifest beside them.

    The results.json of a growth has none: it contains times, which differ between runs.
    """
    return PurePath(name).name == RESULTS and PurePath(name).with_name(MANIFEST).as_posix() in files


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    try:
        for number, path in enumerate(folder.rglob("*")):
            # A text of a stranger's recipe may name the root of the disk.
            if number >= MOST_ENTRIES:
                raise SurgeryError(f"holds more than {MOST_ENTRIES:,} files and folders", where=folder)
            if path.is_file() and not path.name.startswith("."):
                name = path.relative_to(folder).as_posix()
                if path.name not in DESCRIBING and "__pycache__" not in name:
                    yield name, path
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=folder) from error


def _stamp(path: Path) -> tuple[str, list[int]]:
    try:
        status = path.stat()
        return str(path.absolute()), [status.st_size, status.st_mtime_ns, status.st_ino]
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error


def _bytes_hash(path: Path) -> str:
    state = xxh3_128()
    try:
        with open_regular(path) as file:
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    return state.hexdigest()


def _tensors_hash(path: Path) -> str:
    try:
        header = read_header(path)
    except SurgeryError:
        return _bytes_hash(path)  # damaged, or no safetensors at all: then its bytes are all that it is

    def work(number: int, reader: TensorReader) -> tuple[str, str]:
        entry = header.entries[number]
        return entry.name, hash_tensor(reader, stored_tensor(entry, path, header))

    with SourceFiles([path]) as files:
        return _hash_of(header, dict(run(range(len(header.entries)), work, files, threads=None)))


def _listed_hash(path: Path, listed: Mapping[str, Any]) -> str | None:
    """Return the hash of a file from a manifest's hashes; None if one is missing, or a dtype or shape differs."""
    try:
        header = read_header(path)
        same = all(
            (listed[entry.name]["dtype"], listed[entry.name]["shape"]) == (entry.dtype, list(entry.shape))
            for entry in header.entries
        )
        return _hash_of(header, {entry.name: listed[entry.name][KEY] for entry in header.entries}) if same else None
    except (SurgeryError, KeyError, TypeError):
        return None


def _hash_of(header: Header, hashes: Mapping[str, str]) -> str:
    return hash_tensors({e.name: f"{e.dtype} {list(e.shape)} {hashes[e.name]}" for e in header.entries})
