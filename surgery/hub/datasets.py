"""Read data sets of the Hub: `org/name[/config][@revision]:split[a:b]` → its rows, all of one commit.

`load_rows` fetches a whole data set into the cache of `datasets`, and checks each file against the Hub's hash of it;
`stream_column` reads a large one without keeping it, so that only the connection vouches for its bytes. Both need the
extra `data`, and read files of the data set's own repository only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, first_line, listing, usage_error
from surgery.hub import download as hub
from surgery.hub.client import guarded, quiet_client
from surgery.hub.dataset_files import DatasetCommit, fetch_checked, own_files
from surgery.hub.errors import (
    MALFORMED,
    NOT_A_HUB,
    TOKEN_HINT,
    RefusedAnswerError,
    connection_failure,
    http_error_types,
    refused_answer,
    shown_cause,
)
from surgery.io.redaction import redact
from surgery.runtime.progress import terminal
from surgery.runtime.quiet_libraries import quiet

REF_FORMAT = "org/name[/config][@revision]:split[a:b]"
_REF = re.compile(
    r"(?P<repo>[^/@:\s]+/[^/@:\s]+)(?:/(?P<config>[^/@:\s]+))?(?:@(?P<revision>[^:\s]+))?:(?P<split>[^\[\]:\s]+)"
    r"(?:\[(?P<first>\d*):(?P<stop>\d*)\])?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Rows taken from a stream at a time: enough that the fixed cost of a batch does not count.
_BATCH = 1000


@dataclass(frozen=True)
class HubDataset:
    """Rows [first, stop) of a split; `stop` is None for all. `ref` is what the user typed."""

    ref: str
    repo_id: str
    config: str | None
    revision: str | None
    split: str
    first: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        """The reference without its slice; errors name rows as `name[row]`, by their number in the split."""
        return self.ref.partition("[")[0]


def parse_dataset_ref(ref: str) -> HubDataset | None:
    """Parse `ref` without asking the Hub; return None where it is no reference to a data set."""
    parts = _REF.fullmatch(ref)
    if not parts or not hub.is_repo_id(parts["repo"]):
        return None
    stop = int(parts["stop"]) if parts["stop"] else None
    return HubDataset(
        ref, parts["repo"], parts["config"], parts["revision"], parts["split"], int(parts["first"] or 0), stop
    )


def missing_split_error(ref: str) -> SurgeryError:
    """Return the error for `org/name` alone."""
    return usage_error("names no split", where=ref, hint=f"Give it as {REF_FORMAT}, e.g. {ref}:train[0:200].")


def missing_extra_error(where: object) -> SurgeryError:
    """Return the error for a missing extra `data`."""
    return usage_error("needs the extra `data`", where=where, hint="Install it: pip install 'model-surgery[data]'")


def missing_column_error(column: str, columns: Sequence[str], *, where: object) -> SurgeryError:
    """Return the error for rows that have `columns`, but not `column`."""
    return usage_error(f'has no column "{column}"', where=where, hint=f"It has {listing(columns)}.")


def resolve_commit(dataset: HubDataset) -> str:
    """Return the commit that the data set's revision names now; a commit is returned without asking the Hub.

    Raises:
        SurgeryError: there is no such data set or revision, no access, or no connection; the extra is missing.
    """
    # `datasets` reads HF_ENDPOINT once, at its import, and will fetch the rows from there: ask the same Hub.
    endpoint = _import_datasets(dataset).config.HF_ENDPOINT
    if dataset.revision and _COMMIT.fullmatch(dataset.revision):
        return dataset.revision
    from huggingface_hub import HfApi, errors

    hub.check_revision(dataset.repo_id, dataset.revision)
    try:
        with guarded(), quiet_client():
            info = HfApi(endpoint=endpoint).dataset_info(dataset.repo_id, revision=dataset.revision)
    except RefusedAnswerError as error:
        raise SurgeryError(error.what, where=dataset.ref, hint=error.hint) from shown_cause(error)
    except errors.OfflineModeIsEnabled as error:
        raise usage_error(
            "offline mode is on, so that its commit cannot be looked up",
            where=dataset.ref,
            hint=f"Give {dataset.repo_id}@COMMIT.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise usage_error(f"has no revision {dataset.revision!r}", where=dataset.ref) from error
    # Before RepositoryNotFoundError, of which it is a subclass.
    except errors.GatedRepoError as error:
        raise usage_error(
            "is gated: its authors ask you to accept terms first", where=dataset.ref, hint=f"Then {TOKEN_HINT}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise usage_error(
            "no such data set on the Hub, or it is private and needs a token",
            where=dataset.ref,
            hint=f"Check the spelling; for a private one {TOKEN_HINT}.",
        ) from error
    except (errors.HfHubHTTPError, *http_error_types(), OSError, ValueError, *MALFORMED) as error:
        raise SurgeryError(
            f"the Hub cannot be asked for its commit ({_reason(error)})",
            where=dataset.ref,
            hint="Check the connection.",
        ) from shown_cause(error)
    if not _COMMIT.fullmatch(str(info.sha)):
        raise SurgeryError(f"the Hub cannot be asked for its commit ({NOT_A_HUB})", where=dataset.ref)
    return str(info.sha)


def load_rows(dataset: HubDataset, commit: str, *, limit: int | None = None) -> list[Mapping[str, Any]]:
    """Return the rows of `dataset` at `commit`, at most `limit`, as stored: pictures and sounds are not decoded.

    Raises:
        SurgeryError: there is no such configuration or split, it cannot be loaded, or the slice is empty.
    """
    table = _load_dataset(dataset, commit, streaming=False)
    stop = min(len(table) if dataset.stop is None else dataset.stop, len(table))
    if dataset.first >= stop:
        raise usage_error(f"the slice is empty: the split has {len(table):,} rows", where=dataset.ref)
    if limit is not None:
        stop = min(stop, dataset.first + limit)
    # Arrow, because the default format decodes pictures and sounds, which needs libraries that we do not require.
    records: list[Mapping[str, Any]] = table.with_format("arrow")[dataset.first : stop].to_pylist()
    return records


def stream_column(dataset: HubDataset, commit: str, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number in the split, value of `column`) for each row at `commit`; nothing is kept on disk.

    Raises:
        SurgeryError: there is no such configuration, split or column; the connection breaks off; the slice is empty.
    """
    if dataset.stop is not None and dataset.first >= dataset.stop:
        raise usage_error("the slice is empty", where=dataset.ref)
    numbers = count(dataset.first) if dataset.stop is None else range(dataset.first, dataset.stop)
    empty = True
    # The numbers come first in zip: otherwise the end of the slice would fetch one more row, perhaps a whole batch.
    for row in zip(numbers, _column_values(dataset, commit, column), strict=False):
        empty = False
        yield row
    if empty:
        raise usage_error(f"the split has no row {dataset.first:,}", where=dataset.ref)


def _column_values(dataset: HubDataset, commit: str, column: str) -> Iterator[Any]:
    datasets = _import_datasets(dataset)
    rows = _load_dataset(dataset, commit, streaming=True)
    batches = iter((rows.skip(dataset.first) if dataset.first else rows).with_format("arrow").iter(batch_size=_BATCH))
    done = dataset.first
    while True:
        try:
            # Around each batch, not around the loop: a generator that pauses inside would silence its caller too.
            with quiet(), guarded():
                batch = next(batches, None)
        except _load_errors(datasets) as error:
            raise SurgeryError(
                f"the stream broke off after {done:,} rows ({_reason(error)})",
                where=dataset.ref,
                hint="Run the same command again.",
            ) from shown_cause(error)
        if batch is None:
            return
        if column not in batch.column_names:
            raise missing_column_error(column, batch.column_names, where=dataset.ref)
        yield from batch[column].to_pylist()
        done += len(batch)


def _load_dataset(dataset: HubDataset, commit: str, *, streaming: bool) -> Any:
    datasets = _import_datasets(dataset)
    from huggingface_hub import constants

    data = DatasetCommit(dataset.ref, dataset.repo_id, commit)
    try:
        # Step by step, as `datasets.load_dataset` does it, so that the files are checked before they are read.
        # Around what is silenced, so that stages inside are shown where this one is.
        with terminal(f"Loading {dataset.ref}", 0, "steps"), quiet(), guarded():
            builder = datasets.load_dataset_builder(dataset.repo_id, dataset.config, revision=commit)
            names = own_files(data, builder.config.data_files)
            if streaming:
                return builder.as_streaming_dataset(split=dataset.split)
            # Where and from where `datasets` will ask for them: it read both settings when it was imported.
            fetch_checked(data, names, endpoint=datasets.config.HF_ENDPOINT, cache=Path(constants.HF_HUB_CACHE))
            builder.download_and_prepare()
            return builder.as_dataset(split=dataset.split)
    except _load_errors(datasets) as error:
        raise usage_error(f"cannot be loaded ({_reason(error)})", where=dataset.ref) from shown_cause(error)


def _import_datasets(dataset: HubDataset) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra_error(dataset.ref) from error
    return datasets


def _load_errors(datasets: Any) -> tuple[type[BaseException], ...]:
    """Return what `datasets` raises where data is missing, damaged or out of reach."""
    known = OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *http_error_types()
    return *known, RefusedAnswerError, *MALFORMED


def _reason(error: BaseException) -> str:
    """Return what went wrong in a few words; never the text of an HTTP answer, which may quote a token."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    if refused := refused_answer(error):
        return refused.what
    if isinstance(error, http_error_types()):
        return connection_failure(error)
    return NOT_A_HUB if isinstance(error, MALFORMED) else redact(first_line(error))
