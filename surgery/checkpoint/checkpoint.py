"""Open a model on disk by its headers: tensor table, config and side files, with no tensor loaded."""

from __future__ import annotations

import errno
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.checkpoint.config.model_config import CONFIG, read_config
from surgery.checkpoint.dtypes import DTYPES
from surgery.checkpoint.safetensors_header import Header, read_header
from surgery.checkpoint.side_files import INDEXES, find_side_files
from surgery.checkpoint.stored_tensor import StoredTensor, stored_tensor
from surgery.errors import SurgeryError, listing
from surgery.hub.file_selection import DUPLICATES, PICKLE_SUFFIXES, WEIGHTS_SUFFIX
from surgery.io.json_io import read_json
from surgery.io.safe_paths import MAX_FILES, find_file, find_files, kind_of, list_folder
from surgery.runtime.garbage import collector_paused

ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The largest models on the Hub have about 1,000 files and 210,000 tensors.
MAX_SHARDS = MAX_FILES
MAX_TENSORS = 500_000
MAX_INDEXES = 10  # each is read to find the one that counts
MAX_INDEX_VALUES = 4 * MAX_TENSORS  # a tensor and its file are two; commas and colons in names are counted as well
# ASCII: \d would also match the digits of other scripts.
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint: its name in the folder, its path, and its header."""

    name: str
    path: Path
    header: Header


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, known by its headers.

    ref: what the user typed, for messages only.
    folder: the folder of the side files; None for a single file.
    tensors: sorted by name.
    revision: the commit hash on the Hub, if it is from there.
    adapter: the folder of the adapter whose updates the tensors have, if any.
    named_base: the reference of the adapter's base, where not the user but the adapter's own config named it.
    index: the index that names the shards, if any.
    file_overrides: name of a side file → what it is instead of the folder's: a file elsewhere, its content, or None
        where it is left out. Where `config` is not what the folder's config.json says, its text is among them.
    tokenizer_from: the folder of its tokenizer, where that is not `folder`.
    dequantised: the scheme of the quantised weights whose values the tensors are, if any.
    """

    ref: str
    folder: Path | None
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    repo_id: str | None = None
    adapter: Path | None = None
    named_base: str | None = None
    index: Path | None = None
    file_overrides: Mapping[str, Path | bytes | None] = field(default_factory=dict)
    tokenizer_from: Path | None = None
    dequantised: str | None = None

    @property
    def n_parameters(self) -> int:
        """The number of stored values, buffers included; tied tensors are stored, and counted, once."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of the first shard."""
        return self.shards[0].header.metadata

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that tensors are read from, an adapter's among them; sorted."""
        return tuple(sorted({path for tensor in self.tensors.values() for path in tensor.files}))

    @cached_property
    def side_files(self) -> Mapping[str, Path | bytes]:
        """The files that an output carries along (config, tokenizer, chat template, licence), sorted by name.

        Each is the path of the file to copy, or the content where there is no such file.

        Raises:
            SurgeryError: one is a link that leads out of the folder, or no regular file.
        """
        found = [] if self.folder is None else find_side_files(self.folder)
        files = {**{path.name: path for path in found}, **self.file_overrides}
        return {name: content for name, content in sorted(files.items()) if content is not None}

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder that its tokenizer is in; None for a single file of weights."""
        return self.tokenizer_from or self.folder

    def float_names(self) -> list[str]:
        """Return the names of all float tensors, sorted. Raises SurgeryError if there is none."""
        names = [name for name, tensor in self.tensors.items() if tensor.is_float]
        if not names:
            raise SurgeryError("holds no float tensor", where=self.ref)
        return names


def read_folder(folder: Path) -> Checkpoint:
    """Open the model in `folder`: any layout of safetensors shards, with or without an index.

    Raises:
        SurgeryError: shards are missing, damaged or contradict each other; or there are only pickles, or nothing; or a
            file, needed or not, is a link that leads out of `folder` or something else than a file.
    """
    # Even where nothing reads them yet: what is opened here is copied, loaded by transformers, or pushed later.
    find_side_files(folder)
    with collector_paused():
        index = _index_of(folder)
        named = _read_index(index, folder) if index else {}
        shard_names = sorted(set(named.values())) if index else _shards_without_index(folder)
        shards = _read_shards(folder, shard_names)
        tensors = _table(shards, named, index)
    config = find_file(folder, CONFIG)
    values = {} if config is None else read_config(config)
    return Checkpoint(str(folder), folder, shards, tensors, values, index=index)


def read_file(path: Path) -> Checkpoint:
    """Open the weights in the single file `path`, without config or tokenizer. Raises SurgeryError."""
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_only(path, path.name)
    with collector_paused():
        shard = Shard(path.name, path, read_header(path))
        return Checkpoint(str(path), None, (shard,), _table((shard,), {}, None))


def is_adapter(folder: Path) -> bool:
    """Return whether `folder` is a PEFT adapter without a model of its own. Raises SurgeryError as `read_folder`."""
    if find_file(folder, ADAPTER_CONFIG) is None:
        return False
    return _index_of(folder) is None and find_file(folder, SINGLE) is None


def _index_of(folder: Path) -> Path | None:
    indexes = find_files(folder, INDEXES)
    if len(indexes) > MAX_INDEXES:
        raise SurgeryError(f"{len(indexes):,} indexes, more than {MAX_INDEXES}", where=folder)
    if find_file(folder, SINGLE) is not None:
        # As transformers does: beside a whole model, an index that does not name it is stale.
        indexes = [path for path in indexes if _names(path, SINGLE)]
    # Where a second format lies beside the usual one, as in Mistral's models: transformers reads this index alone.
    if len(indexes) > 1 and folder / INDEX in indexes:
        return folder / INDEX
    if len(indexes) > 1:
        raise SurgeryError(
            f"{len(indexes)} indexes: {listing(path.name for path in indexes)}",
            where=folder,
            hint="Keep the one that describes the weights.",
        )
    return indexes[0] if indexes else None


def _names(index: Path, file: str) -> bool:
    weight_map = read_json(index, max_values=MAX_INDEX_VALUES).get("weight_map")
    return isinstance(weight_map, dict) and file in weight_map.values()


def _read_index(index: Path, folder: Path) -> dict[str, str]:
    weight_map = read_json(index, max_values=MAX_INDEX_VALUES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SurgeryError('has no "weight_map" from tensor names to files', where=index)
    if len(weight_map) > MAX_TENSORS:
        raise _too_many_tensors(len(weight_map), index)
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise SurgeryError(f'"{name}" is mapped to {file!r:.80}, expected a file name', where=index)
    files = {file: name for name, file in weight_map.items()}
    if len(files) > MAX_SHARDS:
        raise _too_many_shards(len(files), index)
    for file, name in files.items():
        # Followed, a stranger's index could have any file of this machine copied into an output.
        relative = PurePosixPath(file)
        if relative.is_absolute() or ".." in relative.parts or "\\" in file:
            raise SurgeryError(
                f'"{name}" is mapped to {file!r}, a path outside the folder',
                where=index,
                hint="Such an index is never followed: get the checkpoint from its author again.",
            )
    # No file has a name without letters, or with a zero byte.
    missing = [
        file for file in sorted(files) if not file or "\0" in file or find_file(folder, file, where=index) is None
    ]
    if missing:
        raise SurgeryError(
            f"names {len(missing)} shard(s) that are not there: {listing(missing)}",
            where=index,
            hint="The download is incomplete: fetch the missing files.",
        )
    # An output has the shards' names: one of another kind would take the place of a file that is written there.
    if others := [file for file in sorted(files) if not file.endswith(WEIGHTS_SUFFIX)]:
        raise SurgeryError(f"names shards that are no {WEIGHTS_SUFFIX} files: {listing(others)}", where=index)
    return weight_map


def _shards_without_index(folder: Path) -> list[str]:
    if find_file(folder, SINGLE) is not None:
        return [SINGLE]
    names = [path.name for path in find_files(folder, f"*{WEIGHTS_SUFFIX}")]
    # Without an index nothing but the name tells Mistral's second copy of the same weights from further shards.
    names = [name for name in names if not fnmatchcase(name, DUPLICATES)] or names
    if names:
        _check_numbering(names, folder)
        return names
    pickles = [path.name for path in list_folder(folder) if path.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise _pickle_only(folder, listing(pickles, 3))
    raise SurgeryError("has no .safetensors file", where=folder, hint="Give the folder that holds model.safetensors.")


def _check_numbering(names: Sequence[str], folder: Path) -> None:
    """Raise SurgeryError if a shard is missing; without an index only names like "…-00002-of-00003" show it."""
    present = set(names)
    missing = []
    counts = Counter((m[1], m[3], len(m[2])) for m in map(_NUMBERED.fullmatch, names) if m)
    for (stem, total, digits), count in sorted(counts.items()):
        # One shard more than there are of the same kind shows that some are missing: the total may be any number.
        numbers = range(1, min(int(total), count + 1) + 1)
        shards = [f"{stem}{number:0{digits}}-of-{total}.safetensors" for number in numbers]
        missing += [shard for shard in shards if shard not in present]
    if missing:
        raise SurgeryError(
            f"lacks shards that the others' names count: {listing(missing)}",
            where=folder,
            hint="The download is incomplete: fetch the missing files.",
        )


def _read_shards(folder: Path, names: Sequence[str]) -> tuple[Shard, ...]:
    if len(names) > MAX_SHARDS:
        raise _too_many_shards(len(names), folder)
    shards: list[Shard] = []
    count = 0
    for name in names:
        shards.append(Shard(name, folder / name, read_header(folder / name)))
        count += len(shards[-1].header.entries)
        # While they are read: each file alone may be within its bound.
        if count > MAX_TENSORS:
            raise _too_many_tensors(count, folder)
    return tuple(shards)


def _too_many_shards(count: int, where: Path) -> SurgeryError:
    return SurgeryError(
        f"has {count:,} weight files, more than the {MAX_SHARDS:,} that a checkpoint may have", where=where
    )


def _too_many_tensors(count: int, where: Path) -> SurgeryError:
    return SurgeryError(f"has {count:,} tensors or more, and a checkpoint may have {MAX_TENSORS:,}", where=where)


def _pickle_only(where: Path, names: str) -> SurgeryError:
    return SurgeryError(
        f"holds weights only as Python pickles ({names}), which can run code when they are opened",
        where=where,
        hint="Convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) writes safetensors.",
    )


def _table(shards: tuple[Shard, ...], named: Mapping[str, str], index: Path | None) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    shard_of: dict[str, str] = {}
    for shard in shards:
        for entry in shard.header.entries:
            if named.get(entry.name, shard.name) != shard.name:
                continue  # the index says which of two copies counts
            if entry.name in tensors:
                raise SurgeryError(
                    f'"{entry.name}" is in {shard_of[entry.name]} and in {shard.name}',
                    where=shard.path.parent,
                    hint="Remove the stale shards, or add the index that says which one counts.",
                )
            shard_of[entry.name] = shard.name
            tensors[entry.name] = stored_tensor(entry, shard.path, shard.header)
    lost = sorted(set(named) - set(tensors))
    if lost:
        raise SurgeryError(
            f"names {len(lost)} tensor(s) that their shards do not hold: {listing(lost)}",
            where=index,
            hint="Index and shards are of different saves: fetch them again together.",
        )
    if not tensors:
        raise SurgeryError("holds no tensor", where=shards[0].path)
    # Sorted, so that nothing downstream depends on how a model happens to be sharded.
    return {name: tensors[name] for name in sorted(tensors)}


def existing_path(text: str) -> Path | None:
    """Return the folder or file that `text` names, or None.

    Raises:
        SurgeryError: it may not be accessed, or is a pipe, a socket or a device.
    """
    try:
        path = Path(text).expanduser()
        if not text or not path.exists():
            return None
        mode = path.stat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise SurgeryError(f"is {kind_of(mode)}, expected a file or a folder", where=text)
        return path
    except (RuntimeError, ValueError):  # ~nobody, or a zero byte
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise SurgeryError(f"cannot be read ({error.strerror})", where=text) from error


def loadable_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder that transformers can load `checkpoint` from. Raises SurgeryError if there is none."""
    if checkpoint.adapter is not None:
        raise SurgeryError(
            "is an adapter, which only counts together with its base",
            where=checkpoint.ref,
            hint="Write the whole model first: surgery merge weights passthrough ADAPTER -o OUT.",
        )
    if checkpoint.folder is None or not checkpoint.config:
        raise SurgeryError(
            "is no model folder: weights alone cannot be run",
            where=checkpoint.ref,
            hint="Give the folder that has config.json and the tokenizer beside the weights.",
        )
    return checkpoint.folder


def dtypes_of(checkpoint: Checkpoint) -> list[str]:
    """Return the dtypes that occur in `checkpoint`, widest first."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    return sorted(dtypes, key=lambda name: (-DTYPES[name].bits, name))
