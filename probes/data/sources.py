"""Read the rows of a reference to data: a file, or a data set on the Hub at one commit.

A reference is a `.jsonl`, `.json` (a list), `.csv`, `.parquet` or `.txt` file (one prompt per line), a Hub data set
`org/name[/config][@revision]:split[a:b]`, or `lab:NAME[/pool]`. Hub data sets and Parquet need the extra `data`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery import lab
from surgery.checkpoint.checkpoint import existing_path
from surgery.errors import ErrorList, first_line, listing, usage_error
from surgery.hub import datasets as hub_data
from surgery.hub import download as hub
from surgery.io.input_files import read_given_text

TEXT_FIELD = "prompt"  # of the rows of a .txt file


@dataclass(frozen=True)
class SourceRow:
    """One record. `key` is its number in the source, from 0, as text; `where` is its place in error messages."""

    key: str
    where: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class SourceRows:
    """The records of a source; `revision` is the commit of a Hub data set. trusted: whether they are the lab's own."""

    rows: Sequence[SourceRow]
    revision: str | None = None
    trusted: bool = False


def read_rows(source: str, errors: ErrorList, *, limit: int | None = None) -> SourceRows:
    """Read the first `limit` rows of `source`, all if None. Lines that are no valid rows are added to `errors`.

    Raises:
        SurgeryError: there is no such file, data set, revision or split, or it cannot be read at all; the extra
            `data` is needed and not installed; the slice is empty.
    """
    path = existing_path(source)
    # Files first: a file may have a name that also reads as a Hub repository.
    if path is not None and path.is_dir():
        raise usage_error("is a folder, expected a file", where=source)
    if path is not None:
        return SourceRows(_read_file(path, errors, limit))
    if (data := lab.data_of(source)) is not None:
        return SourceRows(_read_file(data, errors, limit), trusted=True)
    hub_reference = hub_data.parse_dataset_ref(source)
    if hub_reference is not None:
        return _read_hub(hub_reference, limit)
    # A data set without split: a better error than "no such file".
    if hub.is_repo_id(source) and not source.lower().endswith(tuple(_READERS)):
        raise hub_data.missing_split_error(source)
    raise usage_error(
        f"no such file, and not a Hub data set ({hub_data.REF_FORMAT}) or {lab.PREFIX}NAME",
        where=source or '""',
        hint="Slices count rows from 0, as in [0:200].",
    )


def _read_file(path: Path, errors: ErrorList, limit: int | None) -> list[SourceRow]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise usage_error(f"is no {listing(_READERS)} file", where=path)
    return list(islice(reader(path, errors), limit))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    # Not splitlines: JSON strings and prompts may contain line separators of Unicode.
    for number, line in enumerate(read_given_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _read_txt(path: Path, errors: ErrorList) -> Iterator[SourceRow]:
    for index, (number, line) in enumerate(_lines(path)):
        yield SourceRow(str(index), f"{path}:{number}", {TEXT_FIELD: line})


def _read_jsonl(path: Path, errors: ErrorList) -> Iterator[SourceRow]:
    for index, (number, line) in enumerate(_lines(path)):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            errors.add(f"is not valid JSON ({error})", where=where, usage=True)
            continue
        if isinstance(record, dict):
            yield SourceRow(str(index), where, record)
        else:
            errors.add(f"holds {_kind(record)}, expected an object", where=where, usage=True)


def _read_json(path: Path, errors: ErrorList) -> Iterator[SourceRow]:
    try:
        records = json.loads(read_given_text(path))
    except (ValueError, RecursionError) as error:
        hint = "One object per line is a .jsonl file: rename it." if "Extra data" in str(error) else None
        raise usage_error(f"is not valid JSON ({error})", where=path, hint=hint) from error
    if not isinstance(records, list):
        raise usage_error(f"holds {_kind(records)}, expected a list of objects", where=path)
    for index, record in enumerate(records):
        if isinstance(record, dict):
            yield SourceRow(str(index), f"{path}[{index}]", record)
        else:
            errors.add(f"is {_kind(record)}, expected an object", where=f"{path}[{index}]", usage=True)


def _read_csv(path: Path, errors: ErrorList) -> Iterator[SourceRow]:
    # A thinking may be longer than the csv module's limit of 131,072 characters for a cell.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from _csv_rows(path, read_given_text(path), errors)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, text: str, errors: ErrorList) -> list[SourceRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        # Cells may contain line breaks: a row starts where the one before it ended, not at its number.
        first_line = _after_header(reader)
        for index, cells in enumerate(reader):
            where, first_line = f"{path}:{first_line}", reader.line_num + 1
            if None in cells:
                errors.add("has more cells than the header has names", where=where, usage=True)
            else:
                # An empty cell means that there is no value: unlike JSON, CSV has no null.
                rows.append(SourceRow(str(index), where, {name: cell for name, cell in cells.items() if cell}))
    except csv.Error as error:
        raise usage_error(f"is not valid CSV ({error})", where=f"{path}:{reader.line_num}") from error
    return rows


def _after_header(reader: csv.DictReader[str]) -> int:
    """Return the number of the line after the header; `fieldnames` reads the header when first used."""
    return reader.line_num + 1 if reader.fieldnames else 1


def _read_parquet(path: Path, errors: ErrorList) -> Iterator[SourceRow]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise hub_data.missing_extra_error(path) from error
    try:
        records = read_table(path, partitioning=None).to_pylist()
    except (ArrowException, OSError) as error:
        raise usage_error(f"cannot be read as Parquet ({first_line(error)})", where=path) from error
    for index, record in enumerate(records):
        yield SourceRow(str(index), f"{path}[{index}]", record)


_READERS: dict[str, Callable[[Path, ErrorList], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _read_hub(data: hub_data.HubDataset, limit: int | None) -> SourceRows:
    # The branch's commit is looked up first, so that rows and recorded revision cannot differ.
    commit = hub_data.resolve_commit(data)
    records = hub_data.load_rows(data, commit, limit=limit)
    rows = [
        SourceRow(str(index), f"{data.name}[{index}]", record) for index, record in enumerate(records, start=data.first)
    ]
    return SourceRows(rows, commit)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
