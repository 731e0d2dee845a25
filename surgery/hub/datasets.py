"""Data sets on the Hub: a reference `org/name[/config][@revision]:split[a:b]` → its rows, all of one commit.

Whole data sets are fetched into the cache of `datasets` (`load`), large ones are streamed (`stream`). Both need the
extra `data`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub import download as hub
from surgery.hub.errors import TOKEN_HINT
from surgery.runtime.quiet import quiet

SHAPE = "org/name[/config][@revision]:split[a:b]"
_SHAPE = re.compile(
    r"(?P<repo>[^/@:\s]+/[^/@:\s]+)(?:/(?P<config>[^/@:\s]+))?(?:@(?P<revision>[^:\s]+))?:(?P<split>[^\[\]:\s]+)"
    r"(?:\[(?P<first>\d*):(?P<stop>\d*)\])?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Rows that are taken from the stream at a time: enough that what is done once for each lot does not count.
_LOT = 1000


@dataclass(frozen=True)
class HubData:
    """Rows [first, stop) of a split; `stop` is None for all. `ref` is what the user typed."""

    ref: str
    repo: str
    config: str | None
    revision: str | None
    split: str
    first: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        """The reference without its slice, which is how errors point at rows: `name[row]`."""
        return self.ref.partition("[")[0]


def parse(ref: str) -> HubData | None:
    """What `ref` asks for, or None where it has another shape; the Hub is not asked."""
    asked = _SHAPE.fullmatch(ref)
    if not asked or not hub.is_repo_id(asked["repo"]):
        return None
    stop = int(asked["stop"]) if asked["stop"] else None
    return HubData(
        ref, asked["repo"], asked["config"], asked["revision"], asked["split"], int(asked["first"] or 0), stop
    )


def no_split(ref: str) -> SurgeryError:
    """The error for `org/name` alone."""
    return usage_error("names no split", where=ref, hint=f"Give it as {SHAPE}, e.g. {ref}:train[0:200].")


def no_extra(where: object) -> SurgeryError:
    """The error where the extra `data` is needed and missing."""
    return usage_error("needs the extra `data`", where=where, hint="Install it: pip install 'model-surgery[data]'")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def pin(asked: HubData) -> str:
    """The commit that the data set stands at now; the Hub is not asked where the revision is one already.

    Raises:
        SurgeryError: there is no such data set or revision, no access, or no connection; the extra is missing.
    """
    endpoint = _datasets(asked).config.HF_ENDPOINT
    if asked.revision and _COMMIT.fullmatch(asked.revision):
        return asked.revision
    from huggingface_hub import HfApi, errors

    hub.parse_repo_ref(f"{asked.repo}@{asked.revision}" if asked.revision else asked.repo)
    try:
        info = HfApi(endpoint=endpoint).dataset_info(asked.repo, revision=asked.revision)
    except errors.OfflineModeIsEnabled as error:
        raise usage_error(
            "offline mode is on, so that its commit cannot be looked up",
            where=asked.ref,
            hint=f"Give {asked.repo}@COMMIT.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise usage_error(f"has no revision {asked.revision!r}", where=asked.ref) from error
    except errors.GatedRepoError as error:
        raise usage_error(
            "is gated: its authors ask you to accept terms first", where=asked.ref, hint=f"Then {TOKEN_HINT}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise usage_error(
            "no such data set on the Hub, or it is private and needs a token",
            where=asked.ref,
            hint=f"Check the spelling; for a private one {TOKEN_HINT}.",
        ) from error
    except (errors.HfHubHTTPError, vars(errors)["HTTPError"], OSError) as error:
        # Never its text: it may quote a token.
        status = f"HTTP {error.response.status_code}" if isinstance(error, errors.HfHubHTTPError) else "no connection"
        raise SurgeryError(
            f"the Hub cannot be asked for its commit ({status})", where=asked.ref, hint="Check the connection."
        ) from error
    return str(info.sha)


def load(asked: HubData, commit: str, *, limit: int | None = None) -> list[Mapping[str, Any]]:
    """The rows asked for at `commit`, the first `limit` of them, as stored: pictures and sounds are not decoded.

    Raises:
        SurgeryError: there is no such configuration or split, it cannot be loaded, or the slice is empty.
    """
    table = _opened(asked, commit, streaming=False)
    stop = min(len(table) if asked.stop is None else asked.stop, len(table))
    if asked.first >= stop:
        raise usage_error(f"the slice is empty: the split has {len(table):,} rows", where=asked.ref)
    if limit is not None:
        stop = min(stop, asked.first + limit)
    records: list[Mapping[str, Any]] = table.with_format("arrow")[asked.first : stop].to_pylist()
    return records


def stream(asked: HubData, commit: str, column: str) -> Iterator[tuple[int, Any]]:
    """Number in the split and value of `column`, row by row, at `commit`; nothing is kept on disk.

    Raises:
        SurgeryError: there is no such configuration, split or column; the connection breaks off; the slice is empty.
    """
    if asked.stop is not None and asked.first >= asked.stop:
        raise usage_error("the slice is empty", where=asked.ref)
    numbers = count(asked.first) if asked.stop is None else range(asked.first, asked.stop)
    found = False
    for pair in zip(numbers, _values(asked, commit, column), strict=False):
        found = True
        yield pair
    if not found:
        raise usage_error(f"the split has no row {asked.first:,}", where=asked.ref)


def _values(asked: HubData, commit: str, column: str) -> Iterator[Any]:
    datasets = _datasets(asked)
    rows = _opened(asked, commit, streaming=True)
    lots = iter((rows.skip(asked.first) if asked.first else rows).with_format("arrow").iter(batch_size=_LOT))
    done = asked.first
    while True:
        try:
            with quiet():
                lot = next(lots, None)
        except _faults(datasets) as error:
            raise SurgeryError(
                f"the stream broke off after {done:,} rows ({_reason(error)})",
                where=asked.ref,
                hint="Run the same command again.",
            ) from error
        if lot is None:
            return
        if column not in lot.column_names:
            raise no_column(column, lot.column_names, where=asked.ref)
        yield from lot[column].to_pylist()
        done += len(lot)


def no_column(column: str, having: Sequence[str], *, where: object) -> SurgeryError:
    """The error for rows without `column`."""
    return usage_error(f'has no column "{column}"', where=where, hint=f"It has {listing(having)}.")


def _opened(asked: HubData, commit: str, *, streaming: bool) -> Any:
    datasets = _datasets(asked)
    try:
        with quiet():
            return datasets.load_dataset(
                asked.repo, asked.config, split=asked.split, revision=commit, streaming=streaming
            )
    except _faults(datasets) as error:
        raise usage_error(f"cannot be loaded ({_reason(error)})", where=asked.ref) from error


def _datasets(asked: HubData) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise no_extra(asked.ref) from error
    return datasets


def _faults(datasets: Any) -> tuple[type[BaseException], ...]:
    """What `datasets` raises where data is missing, damaged or out of reach."""
    from huggingface_hub import errors

    return OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, vars(errors)["HTTPError"]


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words; of an answer from the net never its text, which may quote a token."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return "no connection" if isinstance(error, vars(errors)["HTTPError"]) else first_line(error)
