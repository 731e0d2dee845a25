"""References to data → rows as they stand there: files, and data sets on the Hub at one commit.

A reference is a `.jsonl`, `.json` (a list), `.csv`, `.parquet` or `.txt` file (one prompt per line), a Hub data set
`org/name[/config][@revision]:split[a:b]`, or `lab:NAME[/pool]`. Hub data sets and Parquet need the extra `data`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from probes.faults import Faults
from surgery import hub, lab
from surgery.checkpoint import existing_path
from surgery.errors import SurgeryError, listing, usage_error
from surgery.scoring import quiet

LAB = "lab:"
TEXT_FIELD = "prompt"  # of the rows of a .txt file
_HUB = re.compile(
    r"(?P<repo>[^/@:\s]+/[^/@:\s]+)(?:/(?P<config>[^/@:\s]+))?(?:@(?P<revision>[^:\s]+))?:(?P<split>[^\[\]:\s]+)"
    r"(?:\[(?P<first>\d*):(?P<stop>\d*)\])?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHAPE = "org/name[/config][@revision]:split[a:b]"


@dataclass(frozen=True)
class Row:
    """One record. `key` is its number in the source, from 0, as text; `where` is how errors point at it."""

    key: str
    where: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """The records of a source; `revision` is the commit of a Hub data set."""

    rows: Sequence[Row]
    revision: str | None = None


def read_rows(source: str, faults: Faults, *, limit: int | None = None) -> Rows:
    """The first `limit` rows of `source`, all of them at None. Lines that cannot be read as rows become faults.

    Raises:
        SurgeryError: there is no such file, data set, revision or split, or it cannot be read at all; the extra
            `data` is needed and missing; the slice is empty.
    """
    path = existing_path(source)
    if path is not None and path.is_dir():
        raise usage_error("is a folder, expected a file", where=source)
    if path is not None:
        return Rows(_read_file(path, faults, limit))
    if source.startswith(LAB):
        name, _, which = source.removeprefix(LAB).partition("/")
        return Rows(_read_file(lab.data_path(name, which or "examples"), faults, limit))
    asked = _HUB.fullmatch(source)
    if asked and hub.is_repo_id(asked["repo"]):
        return _read_hub(source, asked, limit)
    if hub.is_repo_id(source) and not source.lower().endswith(tuple(_READERS)):
        raise usage_error("names no split", where=source, hint=f"Give it as {_SHAPE}, e.g. {source}:train[0:200].")
    raise usage_error(
        f"no such file, and not a Hub data set ({_SHAPE}) or {LAB}NAME",
        where=source or '""',
        hint="Slices count rows from 0, as in [0:200].",
    )


def _read_file(path: Path, faults: Faults, limit: int | None) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise usage_error(f"is no {listing(_READERS)} file", where=path)
    return list(islice(reader(path, faults), limit))


def _text(path: Path) -> str:
    try:
        # Spreadsheets put a byte-order mark before their CSV.
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise usage_error(f"cannot be read ({error.strerror})", where=path) from error
    except UnicodeDecodeError as error:
        raise usage_error(f"is not UTF-8 (byte {error.start:,})", where=path, hint="Convert it first.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    # Not splitlines: JSON strings and prompts may hold line separators of Unicode.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _read_txt(path: Path, faults: Faults) -> Iterator[Row]:
    for at, (number, line) in enumerate(_lines(path)):
        yield Row(str(at), f"{path}:{number}", {TEXT_FIELD: line})


def _read_jsonl(path: Path, faults: Faults) -> Iterator[Row]:
    for at, (number, line) in enumerate(_lines(path)):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(f"is not valid JSON ({error})", where=where)
            continue
        if isinstance(record, dict):
            yield Row(str(at), where, record)
        else:
            faults.add(f"holds {_kind(record)}, expected an object", where=where)


def _read_json(path: Path, faults: Faults) -> Iterator[Row]:
    try:
        records = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        hint = "One object per line is a .jsonl file: rename it." if "Extra data" in str(error) else None
        raise usage_error(f"is not valid JSON ({error})", where=path, hint=hint) from error
    if not isinstance(records, list):
        raise usage_error(f"holds {_kind(records)}, expected a list of objects", where=path)
    for at, record in enumerate(records):
        if isinstance(record, dict):
            yield Row(str(at), f"{path}[{at}]", record)
        else:
            faults.add(f"is {_kind(record)}, expected an object", where=f"{path}[{at}]")


def _read_csv(path: Path, faults: Faults) -> Iterator[Row]:
    # A thinking may be longer than the module's limit of 131,072 characters for a cell.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from _csv_rows(path, _text(path), faults)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, text: str, faults: Faults) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        starts_at = _after_header(reader)
        for at, cells in enumerate(reader):
            where, starts_at = f"{path}:{starts_at}", reader.line_num + 1
            if None in cells:
                faults.add("has more cells than the header has names", where=where)
            else:
                # An empty cell says nothing; in JSON one can tell that from an empty text.
                rows.append(Row(str(at), where, {name: cell for name, cell in cells.items() if cell}))
    except csv.Error as error:
        raise usage_error(f"is not valid CSV ({error})", where=f"{path}:{reader.line_num}") from error
    return rows


def _after_header(reader: csv.DictReader[str]) -> int:
    """The line after the header, which is read at the first look at the names."""
    return reader.line_num + 1 if reader.fieldnames else 1


def _read_parquet(path: Path, faults: Faults) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise _no_extra(path) from error
    try:
        records = read_table(path, partitioning=None).to_pylist()
    except (ArrowException, OSError) as error:
        raise usage_error(f"cannot be read as Parquet ({_line(error)})", where=path) from error
    for at, record in enumerate(records):
        yield Row(str(at), f"{path}[{at}]", record)


_READERS: dict[str, Callable[[Path, Faults], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _read_hub(source: str, asked: re.Match[str], limit: int | None) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise _no_extra(source) from error
    repo, split = asked["repo"], asked["split"]
    commit = _commit(source, repo, asked["revision"], datasets.config.HF_ENDPOINT)
    try:
        with quiet():
            table = datasets.load_dataset(repo, asked["config"], split=split, revision=commit)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise usage_error(f"cannot be loaded ({_line(error)})", where=source) from error
    first = int(asked["first"] or 0)
    stop = min(int(asked["stop"] or len(table)), len(table))
    if first >= stop:
        raise usage_error(f"the slice is empty: the split has {len(table):,} rows", where=source)
    if limit is not None:
        stop = min(stop, first + limit)
    # As stored: a row's pictures or sounds are not decoded.
    records = table.with_format("arrow")[first:stop].to_pylist()
    name = source.partition("[")[0]
    rows = [Row(str(at), f"{name}[{at}]", record) for at, record in enumerate(records, start=first)]
    return Rows(rows, commit)


def _commit(source: str, repo: str, revision: str | None, endpoint: str) -> str:
    """The commit that `revision` names now; the Hub at `endpoint` is not asked where it is one already."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, errors

    hub.parse_repo_ref(f"{repo}@{revision}" if revision else repo)
    try:
        info = HfApi(endpoint=endpoint).dataset_info(repo, revision=revision)
    except errors.OfflineModeIsEnabled as error:
        raise usage_error(
            "offline mode is on, so that its commit cannot be looked up", where=source, hint=f"Give {repo}@COMMIT."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise usage_error(f"has no revision {revision!r}", where=source) from error
    except errors.GatedRepoError as error:
        raise usage_error(
            "is gated: its authors ask you to accept terms first", where=source, hint=f"Then {hub.TOKEN_HINT}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise usage_error(
            "no such data set on the Hub, or it is private and needs a token",
            where=source,
            hint=f"Check the spelling; for a private one {hub.TOKEN_HINT}.",
        ) from error
    except (errors.HfHubHTTPError, vars(errors)["HTTPError"], OSError) as error:
        # Never its text: it may quote a token.
        status = f"HTTP {error.response.status_code}" if isinstance(error, errors.HfHubHTTPError) else "no connection"
        raise SurgeryError(
            f"the Hub cannot be asked for its commit ({status})", where=source, hint="Check the connection."
        ) from error
    return str(info.sha)


def _no_extra(where: object) -> SurgeryError:
    return usage_error("needs the extra `data`", where=where, hint="Install it: pip install 'model-surgery[data]'")


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
