"""Plan an output before any byte is written: every tensor with its kernel and inputs, and the files they go to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import INDEX, Checkpoint
from surgery.checkpoint.dtypes import n_bytes
from surgery.checkpoint.reader import SEGMENT, TensorInput
from surgery.checkpoint.safetensors_header import PYTORCH, Header, build_header
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.kernel import IDENTITY, Kernel, Parameter, Pass
from surgery.errors import SurgeryError, usage_error
from surgery.hub.file_selection import WEIGHTS_SUFFIX
from surgery.io.atomic import JOURNAL
from surgery.io.hashing import hash_bytes, hash_text
from surgery.io.input_files import MAX_TEXT_BYTES
from surgery.io.output_files import write_output
from surgery.io.output_folder import staging_folders
from surgery.io.safe_paths import folded, unique_paths

# The shard size of transformers up to version 4, which most models on the Hub have: a failed transfer costs one shard.
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. Without a kernel, the bytes of its one input are copied and never pass through a dtype.

    part: the tensor's index in the tuple that a "whole" kernel returns.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[TensorInput, ...]
    kernel: Kernel | None = None
    params: Mapping[str, Parameter] = field(default_factory=dict)
    part: int = 0

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes over its inputs that come before it can be written."""
        return self.kernel.passes if self.kernel else ()


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file of the output; `tensors` are in the order of their bytes."""

    name: str
    header: Header
    tensors: tuple[PlannedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        data = self.header.entries[-1].end if self.header.entries else 0
        return self.header.data_start + data


@dataclass(frozen=True)
class Plan:
    """Everything that an execution reads and writes.

    Args:
        command: the manifest's record of the command; see `surgery.engine.manifest.command_record`.
        sources: role ("target", "tuned", "base", …) → checkpoint.
        side_files: path inside OUT → file to copy there, or the content to write.
        index_name: file name of the index where OUT has several weight files.

    Raises:
        SurgeryError: two files would have one name, or a name leads out of OUT or is the journal's; a side file is too
            large to be one.
    """

    command: Mapping[str, Any]
    sources: Mapping[str, Checkpoint]
    files: tuple[PlannedFile, ...]
    side_files: Mapping[str, Path | bytes] = field(default_factory=dict)
    index_name: str = INDEX

    def __post_init__(self) -> None:
        # Names of shards and side files are those of the sources, which may be a stranger's: none may lead out of OUT,
        # replace another, or take the place of what the execution itself writes.
        written = (*(file.name for file in self.files), *self.side_files, self.index_name)
        unique_paths(written, where="OUT", what="output file")
        stem, suffix = JOURNAL.split(".")
        for name in written:
            top = folded(name.partition("/")[0])
            if top.startswith(stem) and top.endswith(suffix):
                raise SurgeryError(f'"{name}" has the name of a journal, which is written there', where="OUT")
        for file in self.files:
            if not file.name.endswith(WEIGHTS_SUFFIX):
                raise SurgeryError(f'"{file.name}" holds weights, but is no {WEIGHTS_SUFFIX} file', where="OUT")
        for path in self.side_files.values():
            if isinstance(path, Path) and path.is_file() and (size := path.stat().st_size) > MAX_TEXT_BYTES:
                raise SurgeryError(
                    f"has {size:,} bytes, more than the {MAX_TEXT_BYTES:,} of a file beside the weights",
                    where=path,
                    hint="It is damaged, or not what its name says.",
                )

    def check_names(self, own: Iterable[str]) -> None:
        """Raise SurgeryError where a file of the plan has the name of one that the command writes itself.

        A source says how its shards are called: written later under such a name, ours would replace one in silence.

        Args:
            own: paths inside OUT; a file of the plan may not be a folder on the way to one either.
        """
        taken = [folded(name) for name in own]
        for name in (*(file.name for file in self.files), *self.side_files):
            key = folded(name)
            if any(key == one or key.startswith(f"{one}/") or one.startswith(f"{key}/") for one in taken):
                raise SurgeryError(
                    f'"{name}" of the model has the name of a file that is written there beside it',
                    where="OUT",
                    hint="Give the file another name, in the model's index too.",
                )

    @property
    def tensors(self) -> list[PlannedTensor]:
        """All output tensors, file by file, in the order of their bytes."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def computed(self) -> list[PlannedTensor]:
        """The output tensors that a kernel computes."""
        return [tensor for tensor in self.tensors if tensor.kernel is not None]

    @property
    def output_bytes(self) -> int:
        """Bytes that the output's weight files will take."""
        return sum(file.size for file in self.files)

    @property
    def source_paths(self) -> list[Path]:
        """Every weight file that is read, sorted."""
        return sorted({path for checkpoint in self.sources.values() for path in checkpoint.files})

    def memory_bytes(self, threads: int) -> int:
        """Return an estimate of the buffers of `threads` threads in bytes, without interpreter and libraries."""
        return threads * max((_working_set(tensor) for tensor in self.tensors), default=0)

    def fingerprint(self, stamps: Sequence[tuple[str, int, int]]) -> str:
        """Return a hash of all that decides the output's bytes; `stamps` are the source files' sizes and times.

        Two runs with the same fingerprint may continue each other.
        """
        description = {
            # A journal counts in segments, so one of another segment size cannot be continued.
            "segment": SEGMENT,
            "command": self.command,
            "stamps": [list(stamp) for stamp in stamps],
            "files": [[file.name, hash_bytes(file.header.raw).hex()] for file in self.files],
            "tensors": [
                [
                    tensor.name,
                    tensor.kernel.name if tensor.kernel else None,
                    dict(tensor.params),
                    tensor.part,
                    [_input_key(source) for source in tensor.inputs],
                ]
                for tensor in self.tensors
            ],
        }
        return hash_text(json.dumps(description, sort_keys=True, default=str))


def plan_files(
    tensors: Sequence[PlannedTensor],
    *,
    like: Checkpoint | None = None,
    metadata: Mapping[str, str] = PYTORCH,
    shard_bytes: int | None = None,
    stem: str = "model",
) -> tuple[PlannedFile, ...]:
    """Distribute `tensors` over files.

    With `like` and no `shard_bytes`, each tensor stays in the file it has in `like`, and a file whose table comes
    out unchanged keeps its header to the byte: files that nothing touched keep their hash. Else the tensors are laid
    out by name in files of at most `shard_bytes` (or of one tensor that is larger).
    """
    if like is None or shard_bytes is not None:
        return _by_size(tensors, metadata, shard_bytes or DEFAULT_SHARD_BYTES, stem)
    by_name = {tensor.name: tensor for tensor in tensors}
    seen = _names_seen(like)
    # Loaders and people expect a tensor in the file where they know it, and unchanged files keep their hash.
    taken = []
    for shard in like.shards:
        names = [name for entry in shard.header.entries for name in seen.get((shard.path, entry.name), (entry.name,))]
        taken.append((shard, [by_name.pop(name) for name in names if _belongs_to(like, name, shard.path, by_name)]))
    kept = [(shard, own) for shard, own in taken if own]
    if by_name:
        # What `like` has beside its files: an output head that an adapter parted from the embedding.
        assert kept and by_name.keys() <= like.tensors.keys(), f"{like.ref} does not have {sorted(by_name)}"
        kept[-1][1].extend(tensor for _, tensor in sorted(by_name.items()))
    files = []
    for shard, own in kept:
        header = build_header(((t.name, t.dtype, t.shape) for t in own), shard.header.metadata)
        unchanged = header.entries == shard.header.entries
        files.append(PlannedFile(shard.name, shard.header if unchanged else header, tuple(own)))
    return tuple(files)


def copy_tensor(tensor: StoredTensor, *, dtype: str | None = None) -> PlannedTensor:
    """Plan a copy of `tensor`: of its bytes, unless it is derived or another float dtype needs arithmetic."""
    wanted = dtype if dtype and tensor.is_float else tensor.dtype
    kernel = None if tensor.derivation is None and wanted == tensor.dtype else IDENTITY
    return PlannedTensor(tensor.name, wanted, tensor.shape, (TensorInput(tensor),), kernel)


def write_index(plan: Plan, folder: Path) -> None:
    """Write the index, tensor name → file, that loaders need where there are several files."""
    # Loaders find a single file by its name.
    if len(plan.files) < 2:
        return
    weight_map = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    # Of the tensors without headers, as transformers counts it.
    total = sum(file.size - file.header.data_start for file in plan.files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_output(folder, plan.index_name, json.dumps(index, indent=2) + "\n")


def check_output(out: Path, sources: Mapping[str, Checkpoint]) -> None:
    """Raise SurgeryError where writing `out` would write into one of the sources, or replace it."""
    try:
        # What lies beside OUT while it is written, too.
        resolved, *beside = (path.resolve() for path in (out, *staging_folders(out)))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise usage_error("is a link that leads nowhere", where=out, hint="Choose another folder.") from error
    for role, checkpoint in sources.items():
        for path in checkpoint.files:
            # Without a folder (a file given by its path) only that file's own folder is off limits.
            folder = path.parent.absolute() if checkpoint.folder is None else checkpoint.folder.resolve()
            if resolved == folder or (checkpoint.folder is not None and folder in resolved.parents):
                raise SurgeryError(
                    f"lies inside the {role} {checkpoint.ref}, which is only ever read",
                    where=out,
                    hint="Choose a folder outside of it.",
                    exit_code=2,
                )
            if resolved in folder.parents or any(path == folder or path in folder.parents for path in beside):
                raise usage_error(
                    f"would take the place of the {role} {checkpoint.ref}",
                    where=out,
                    hint="Choose another folder.",
                )


def _names_seen(checkpoint: Checkpoint) -> dict[tuple[Path, str], list[str]]:
    """Return (file, name in it) → the names that the tensor is seen under, of those that are not seen by their own."""
    seen: dict[tuple[Path, str], list[str]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name_in_file != tensor.name:
            seen.setdefault((tensor.file, tensor.name_in_file), []).append(tensor.name)
    return seen


def _belongs_to(like: Checkpoint, name: str, path: Path, wanted: Mapping[str, object]) -> bool:
    # An adapter may have replaced a tensor by one in its own file: it still goes where the base had it.
    stored = like.tensors.get(name)
    return name in wanted and stored is not None and (stored.file == path or like.adapter is not None)


def _by_size(
    tensors: Sequence[PlannedTensor], metadata: Mapping[str, str], limit: int, stem: str
) -> tuple[PlannedFile, ...]:
    # By name, as transformers shards: the same tensors give the same files whatever their order in the plan.
    groups: list[list[PlannedTensor]] = []
    room = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        size = n_bytes(tensor.dtype, tensor.shape)
        # A tensor larger than the limit gets a file of its own: tensors are never split.
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= size
    names = (
        [f"{stem}.safetensors"]
        if len(groups) == 1
        else [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    return tuple(
        PlannedFile(name, build_header(((t.name, t.dtype, t.shape) for t in group), metadata), tuple(group))
        for name, group in zip(names, groups, strict=True)
    )


def _working_set(tensor: PlannedTensor) -> int:
    whole = tensor.kernel is not None and tensor.kernel.kind == "whole"
    fp32 = 4
    # Twice in fp32: the inputs as read and as kernels compute with them.
    count = sum((source.n_elements if whole else min(SEGMENT, source.n_elements)) for source in tensor.inputs)
    return count * 2 * fp32


def _input_key(source: TensorInput) -> list[Any]:
    # Where a value is read from decides it; the file's size and time are among the stamps.
    key: list[Any] = []
    for tensor, rows in ((source.tensor, source.rows), *source.others):
        row_hash = None if rows is None else hash_bytes(rows.tobytes()).hex()
        key += [tensor.key(), row_hash]
    if source.constant is not None:
        key += [hash_bytes(part.tobytes()).hex() for part in source.constant]
    return key
