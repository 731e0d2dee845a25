"""Read text documents from files, folders, globs, data sets on the Hub and the lab's texts.

A reference is one of
- a text file of any kind, which is one document; a `.jsonl` or `.parquet` file, with one document per row in the column
  `field`;
- a folder: all such files under it in the order of their paths, except hidden ones and those with zero bytes, which are
  not text; links to folders are not followed;
- a glob such as `src/**/*.py`: all such files that it matches, each once even if links lead to it in several ways;
- a Hub data set `org/name[/config][@revision]:split[a:b]`, streamed at one commit;
- `lab:python/code` and the like (`surgery.lab.python_text`).

Text is UTF-8. Parquet and the Hub need the extra `data`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from xxhash import xxh3_128

from surgery import lab
from surgery.checkpoint.checkpoint import existing_path
from surgery.errors import SurgeryError, first_line, usage_error
from surgery.hub import datasets as hub_data
from surgery.hub import download as hub
from surgery.io.hashing import KEY, hash_text
from surgery.io.input_files import open_regular
from surgery.io.patterns import glob_paths, has_wildcard
from surgery.io.safe_paths import check_contained

FIELD = "text"
# Size of the shuffle buffer: a small corpus is shuffled as a whole, a large one in bounded memory.
BUFFER_DOCUMENTS, BUFFER_CHARACTERS = 10_000, 64_000_000
# Files of a reference that is larger in total are identified by size and time of change: to hash them takes minutes.
MAX_HASHED_BYTES = 2**30
_SNIFFED = 8192  # bytes that are searched for a zero byte, as git does to tell text from binary files
_CHUNK = 2**20


@dataclass(frozen=True)
class Document:
    """A text, and its location for error messages."""

    where: str
    text: str


@dataclass(frozen=True)
class _Files:
    """The files that `ref` names, in order; fingerprints have their paths relative to `base`."""

    ref: str
    base: Path
    paths: tuple[Path, ...]
    field: str

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            yield from _READERS.get(path.suffix.lower(), _text_file)(path, self.field)

    def fingerprint(self) -> dict[str, Any]:
        sizes = [path.stat().st_size for path in self.paths]
        identify = _hash_file if sum(sizes) <= MAX_HASHED_BYTES else _time_of_change
        names = [path.relative_to(self.base).as_posix() for path in self.paths]
        # Relative names: a corpus that was moved is still the same corpus.
        lines = [f"{name} {size} {identify(path)}\n" for name, size, path in zip(names, sizes, self.paths, strict=True)]
        return {"files": len(sizes), "bytes": sum(sizes), KEY: hash_text("".join(lines))}


@dataclass(frozen=True)
class _Hub:
    """A data set on the Hub at `commit`."""

    data_set: hub_data.HubDataset
    commit: str
    field: str

    @property
    def ref(self) -> str:
        return self.data_set.ref

    def documents(self) -> Iterator[Document]:
        for number, value in hub_data.stream_column(self.data_set, self.commit, self.field):
            where = f"{self.data_set.name}[{number}]"
            yield Document(where, _text(value, self.field, where))

    def fingerprint(self) -> dict[str, Any]:
        return {"ref": self.ref, "commit": self.commit}


@dataclass(frozen=True)
class Corpus:
    """The documents that references lead to."""

    sources: tuple[_Files | _Hub, ...]
    field: str

    def documents(self) -> Iterator[Document]:
        """Yield all documents that are not blank, one reference after the other; nothing is read ahead.

        Raises:
            SurgeryError: as they are read: a file cannot be read, or is not UTF-8; a row has no text in the column
                `field`; a reference holds no text at all.
        """
        for source in self.sources:
            has_text = False
            for document in source.documents():
                if document.text and not document.text.isspace():
                    has_text = True
                    yield document
            if not has_text:
                raise usage_error("holds no text", where=source.ref)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies this corpus and its content, as JSON values.

        Files are identified by their paths inside the referenced folder and their contents, wherever the folder is; by
        size and time of change where a reference is larger than `MAX_HASHED_BYTES`. Hub data sets by their commit.
        """
        return {"field": self.field, "refs": [source.fingerprint() for source in self.sources]}


def open_corpus(refs: Sequence[str], *, field: str = FIELD, commits: Mapping[str, str] | None = None) -> Corpus:
    """Find the files and data sets of `refs`; no document is read yet.

    Args:
        field: the column of rows that holds their text.
        commits: Hub reference → commit, for data sets that were opened before and are read on (`commits_of`).

    Raises:
        SurgeryError: no reference is given, or one leads nowhere: no such file, data set or revision; a glob matches
            no file, a folder has none; the extra `data` is needed and missing.
    """
    if not refs:
        raise usage_error("no text was given", where="corpus", hint="Name a file, a folder or a data set.")
    return Corpus(tuple(_open(ref, field, commits or {}) for ref in refs), field)


def documents(refs: Sequence[str], *, field: str = FIELD) -> Iterator[Document]:
    """Yield the documents of `refs`: `Corpus.documents` of `open_corpus`, with the errors of both."""
    return open_corpus(refs, field=field).documents()


def fingerprint(refs: Sequence[str], *, field: str = FIELD) -> dict[str, Any]:
    """Return what identifies the corpus of `refs`: `Corpus.fingerprint` of `open_corpus`, with its errors."""
    return open_corpus(refs, field=field).fingerprint()


def commits_of(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Return the commits at which the Hub data sets in a corpus's fingerprint were read, by reference."""
    return {entry["ref"]: entry["commit"] for entry in fingerprint["refs"] if "commit" in entry}


def shuffle(
    documents: Iterable[Document],
    *,
    seed: int,
    buffer_documents: int = BUFFER_DOCUMENTS,
    buffer_characters: int = BUFFER_CHARACTERS,
) -> Iterator[Document]:
    """Yield `documents` in a random order drawn from `seed`, each once.

    A buffer is filled, and whenever it overflows a random document of it is yielded. A corpus that fits into the buffer
    is shuffled uniformly; in a larger one documents stay near their place.
    """
    # Of the methods of Random only random() is promised to give the same numbers in all versions.
    random = Random(seed)
    buffer: list[Document] = []
    characters = 0

    def draw() -> Document:
        nonlocal characters
        at = int(random.random() * len(buffer))
        buffer[at], buffer[-1] = buffer[-1], buffer[at]
        characters -= len(buffer[-1].text)
        return buffer.pop()

    for document in documents:
        buffer.append(document)
        characters += len(document.text)
        while len(buffer) > buffer_documents or characters > buffer_characters:
            yield draw()
    while buffer:
        yield draw()


def _open(ref: str, field: str, commits: Mapping[str, str]) -> _Files | _Hub:
    path = existing_path(ref)
    # Files on disk come first: a folder may be named like a Hub data set.
    if path is not None and path.is_dir():
        return _Files(ref, path, _text_files(path), field)
    path = path or lab.data_of(ref)
    if path is not None:
        if not _is_rows(path) and not _holds_text(path):
            raise usage_error("holds zero bytes, so it is no text", where=ref)
        return _Files(ref, path.parent, (path,), field)
    data_set = hub_data.parse_dataset_ref(ref)
    if data_set is not None:
        return _Hub(data_set, commits.get(ref) or hub_data.resolve_commit(data_set), field)
    if has_wildcard(ref):
        return _matching_files(ref, field)
    # Almost certainly a data set whose split was forgotten.
    if hub.is_repo_id(ref):
        raise hub_data.missing_split_error(ref)
    raise usage_error(
        f"no such file or folder, and not a glob, a Hub data set ({hub_data.REF_FORMAT}) or {lab.PREFIX}NAME/KIND",
        where=ref or '""',
        hint="Check the spelling.",
    )


def _text_files(folder: Path) -> tuple[Path, ...]:
    """Return all text and row files under `folder`, sorted; a link that leads out of it is an error."""
    found = []
    for inside, folders, files in os.walk(folder, onerror=_raise):
        # In place: os.walk then does not enter the others (.git, .venv).
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inside, name) for name in files if not name.startswith(".")]
    for path in found:
        check_contained(folder, path)  # a stranger's data must not have a private file learnt
    paths = tuple(sorted(path for path in found if _is_rows(path) or _holds_text(path)))
    if not paths:
        raise usage_error(f"holds no text: none of its {len(found)} files is text, JSONL or Parquet", where=folder)
    return paths


def _matching_files(ref: str, field: str) -> _Files:
    """Return the text and row files that the glob `ref` matches."""
    pattern = Path(ref).expanduser()
    base = Path(*takewhile(lambda part: not has_wildcard(part), pattern.parts))
    found = [path for path in map(Path, glob_paths(ref)) if not path.is_dir()]
    for path in found:
        check_contained(base, path)
    if not found:
        data_set = f" A Hub data set is given as {hub_data.REF_FORMAT}." if ":" in ref else ""
        raise usage_error("matches no file", where=ref, hint=f"Looked in {base.absolute()}.{data_set}")
    # Links may lead to a folder in several ways, or in circles: the shortest way counts.
    ways = {(os.path.realpath(path.parent), path.name): path for path in sorted(found, key=lambda p: -len(p.parts))}
    paths = tuple(sorted(path for path in ways.values() if _is_rows(path) or _holds_text(path)))
    if not paths:
        raise usage_error(f"holds no text: the {len(found)} files that it matches are all binary", where=ref)
    return _Files(ref, base, paths, field)


def _raise(error: OSError) -> None:
    raise usage_error(f"cannot be read ({error.strerror})", where=error.filename) from error


def _is_rows(path: Path) -> bool:
    return path.suffix.lower() in _READERS


def _holds_text(path: Path) -> bool:
    with _reading(path), open_regular(path) as file:
        return b"\0" not in file.read(_SNIFFED)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise usage_error(f"cannot be read ({error.strerror or error})", where=path) from error


def _hash_file(path: Path) -> str:
    state = xxh3_128()
    with _reading(path), open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _time_of_change(path: Path) -> str:
    return str(path.stat().st_mtime_ns)


def _text_file(path: Path, field: str) -> Iterator[Document]:
    try:
        # Decoded as `perplexity` does, so that a model is measured on the same text that it is trained on.
        with _reading(path), io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as text:
            content = text.read()
        yield Document(str(path), content)
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error) from error


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    with _reading(path), open_regular(path) as file:
        # As bytes: text mode would split lines at Unicode separators inside JSON strings.
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.isspace() or not line:
                    continue
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise _no_utf8(where, error) from error
            except (ValueError, RecursionError) as error:
                raise usage_error(f"is not valid JSON ({error})", where=where) from error
            if not isinstance(record, dict) or field not in record:
                raise usage_error(
                    f'has no "{field}"', where=where, hint=f'Every line is an object with its text in "{field}".'
                )
            yield Document(where, _text(record[field], field, where))


def _parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise hub_data.missing_extra_error(path) from error
    number = 0
    try:
        # Batch by batch and one column only: files may be larger than memory.
        with ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise hub_data.missing_column_error(field, file.schema_arrow.names, where=path)
            for batch in file.iter_batches(batch_size=1000, columns=[field]):
                for value in batch.column(0).to_pylist():
                    where = f"{path}[{number}]"
                    yield Document(where, _text(value, field, where))
                    number += 1
    except UnicodeDecodeError as error:
        raise _no_utf8(f"{path}[{number}]", error) from error
    except (ArrowException, OSError) as error:
        raise usage_error(f"cannot be read as Parquet ({first_line(error)})", where=path) from error


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {".jsonl": _jsonl, ".parquet": _parquet}


def _text(value: object, field: str, where: str) -> str:
    """Return the text of a row, empty if its cell is."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise usage_error(f'"{field}" is {value!r:.60}, expected text', where=where)
    try:
        value.encode()  # JSON may escape lone surrogates, which are not text
    except UnicodeEncodeError as error:
        raise usage_error(f'"{field}" holds half of a surrogate pair', where=where) from error
    return value


def _no_utf8(where: object, error: UnicodeDecodeError) -> SurgeryError:
    return usage_error(f"is not UTF-8 (byte {error.start:,})", where=where, hint="Convert it first, or leave it out.")
