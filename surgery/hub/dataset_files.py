"""Check the files that a data set of the Hub is read from: of its own repository only, with the bytes that are listed.

A data set says in its card which files it is made of, and `datasets` reads whatever it names there: files of this
machine too, or of any server.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from surgery.errors import SurgeryError, listing
from surgery.hub.arrival import show_arrival
from surgery.hub.listing import ListedFile
from surgery.hub.verification import verify_files
from surgery.io.safe_paths import safe_relative_path


@dataclass(frozen=True)
class DatasetCommit:
    """A data set at one commit; its text, the reference that the user typed, is the `where` of errors."""

    ref: str
    repo_id: str
    commit: str

    def __str__(self) -> str:
        return self.ref


def own_files(data: DatasetCommit, data_files: Mapping[str, Iterable[str]] | None) -> list[str]:
    """Return the paths in the repository of all `data_files` (split → addresses).

    Raises:
        SurgeryError: a file is not of this repository and commit.
    """
    own = f"hf://datasets/{data.repo_id}@{data.commit}/"
    names: dict[str, None] = {}
    for address in (each for files in (data_files or {}).values() for each in files):
        # Behind `::` is the archive that the file is in, which is what is fetched.
        place = str(address).rpartition("::")[2]
        if not place.startswith(own):
            raise SurgeryError(
                f"is made of a file outside of its repository: {place[:200]!r}",
                where=data,
                hint="Such a file is not read: tell the data set's author.",
            )
        names[safe_relative_path(unquote(place.removeprefix(own)), where=data)] = None
    return list(names)


def fetch_checked(data: DatasetCommit, names: list[str], *, endpoint: str, cache: Path) -> None:
    """Download the files `names` to the cache, where `datasets` will find them, and check their hashes.

    To be called within `surgery.hub.client.guarded`.

    Raises:
        SurgeryError: a file is not listed, or is not what the Hub lists.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    if not names:
        return
    info = HfApi(endpoint=endpoint).dataset_info(data.repo_id, revision=data.commit, files_metadata=True)
    listed = {file.rfilename: ListedFile.of(file) for file in info.siblings or []}
    if info.sha != data.commit:
        raise SurgeryError(f"the Hub names commit {info.sha}, expected {data.commit}", where=data)
    if missing := [name for name in names if name not in listed]:
        raise SurgeryError(f"the Hub does not list {listing(missing, 3)}", where=data)
    place = cache / repo_folder_name(repo_id=data.repo_id, repo_type="dataset")
    there = place / "snapshots" / data.commit
    missing_bytes = sum(listed[name].size or 0 for name in names if not (there / name).exists())
    # The client's own bars are silenced, with all that `datasets` says.
    with show_arrival(data.repo_id, missing_bytes, place):
        folder = snapshot_download(
            data.repo_id,
            repo_type="dataset",
            revision=data.commit,
            cache_dir=cache,
            endpoint=endpoint,
            allow_patterns=[glob.escape(name) for name in names],
        )
    verify_files(Path(folder), [listed[name] for name in names], data, progress=True)
