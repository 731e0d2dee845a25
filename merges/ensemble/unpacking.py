"""Restore the members of an ensemble, each file as it was: same shards, same headers, same bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from merges.ensemble.ensemble_model import MODEL_TYPE
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import CONFIG
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.safetensors_header import parse_header
from surgery.checkpoint.side_files import INDEXES, is_side_file
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.execution import execute
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedFile, PlannedTensor, check_output
from surgery.engine.preflight import Preflight, check_space
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, listing, usage_error
from surgery.io.atomic import MANIFEST
from surgery.io.json_fields import TEXT_TABLE, check_fields
from surgery.io.json_io import read_json
from surgery.io.output_folder import check_free
from surgery.io.safe_paths import (
    check_contained,
    contained_folder,
    find_file,
    list_folder,
    safe_name,
    unique_names,
    unique_paths,
)

MEMBERS = "members"
CARD = "README.md"
FETCH_AGAIN = "Fetch the ensemble again."


@dataclass(frozen=True)
class UnpackReport:
    """The members that were written: name → bytes of its weight files in `out`/<name>."""

    out: Path
    members: Mapping[str, int]


def unpack(ensemble: str, out: Path, *, options: ExecutionOptions = ExecutionOptions()) -> UnpackReport:
    """Write the members of `ensemble` to `out`/<name>: weights, configs and tokenizers, byte for byte.

    A member that was given as BASE+ADAPTER is written as the merged model.

    Example:
        unpack("OUT", Path("MEMBERS"))

    Raises:
        SurgeryError: `ensemble` is something else, or was saved by transformers since; `out` exists.
    """
    checkpoint = open_checkpoint(ensemble)
    folder = checkpoint.folder
    if folder is None or checkpoint.config.get("model_type") != MODEL_TYPE:
        raise usage_error("is no logit ensemble", where=ensemble, hint="`surgery merge logits` writes one.")
    check_fields(checkpoint.config, {"aliases": TEXT_TABLE}, where=folder / CONFIG)
    check_output(out, {"ensemble": checkpoint})
    # Never overwritten: the folder gets no manifest, by which it would be known to be ours.
    check_free(out, overwrite=False)
    records = _read_records(checkpoint, folder)
    files: list[PlannedFile] = []
    side_files: dict[str, Path] = {}
    sizes = {}
    for i, record in enumerate(records):
        planned = _files(record, checkpoint, f"{MEMBERS}.{i}.", folder / MEMBERS / f"{i}.json")
        files += planned
        sizes[record.name] = sum(file.size for file in planned)
        side_files |= {f"{record.name}/{path.name}": path for path in _kept_files(folder, i)}
    command = command_record("merge unpack", [ensemble])
    plan = Plan(command, {"ensemble": checkpoint}, tuple(files), side_files)
    preflight = Preflight()
    # A tensor that members share is stored once, and written for each: OUT may be far larger than the ensemble.
    check_space(preflight, plan, out, options.threads)
    preflight.errors.raise_if_any("merge unpack")

    # Not by `write_checkpoint`: `out` is a folder of models, and no model with a manifest and card itself.
    def finish(partial: Path, _: ExecutionResult) -> None:
        # Each member has the index that it came with, under its own folder.
        (partial / plan.index_name).unlink(missing_ok=True)

    execute(plan, out, options, finish=finish)
    return UnpackReport(out, sizes)


@dataclass(frozen=True)
class _MemberRecord:
    """A member's name, and of each of its weight files name, size in bytes, and header without its length."""

    name: str
    files: Sequence[tuple[str, int, bytes]]


def _read_records(checkpoint: Checkpoint, folder: Path) -> list[_MemberRecord]:
    """Return the records of all members, whose names are those of the folders to write. Raises SurgeryError."""
    members = checkpoint.config.get("members")
    if not isinstance(members, list) or not members:
        raise SurgeryError('has no list of "members"', where=folder / "config.json", hint=FETCH_AGAIN)
    records = [_read_record(folder, f"{MEMBERS}/{i}.json") for i in range(len(members))]
    unique_names((record.name for record in records), where=folder / MEMBERS, what="member")
    return records


def _read_record(folder: Path, name: str) -> _MemberRecord:
    path = find_file(folder, name)
    if path is None:
        raise SurgeryError(
            "is missing, so the members' files cannot be restored",
            where=folder / name,
            hint="Use the folder as `surgery merge logits` wrote it.",
        )
    record = read_json(path)
    files = record.get("files")
    if not isinstance(files, list) or not files or not all(map(_is_file_record, files)):
        raise SurgeryError("is damaged", where=path, hint=FETCH_AGAIN)
    # The names become those of folders and files: a stranger's must lead nowhere else, and none replace another.
    member = safe_name(record.get("name"), where=path, what="member")
    unique_paths((file["name"] for file in files), where=path)
    try:
        return _MemberRecord(member, [(file["name"], file["size"], file["header"].encode("utf-8")) for file in files])
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise SurgeryError("is damaged", where=path, hint=FETCH_AGAIN) from error


def _is_file_record(file: object) -> bool:
    # `type … is`, since isinstance would accept true and false as numbers.
    return isinstance(file, dict) and (type(file.get("name")), type(file.get("size")), type(file.get("header"))) == (
        str,
        int,
        str,
    )


def _kept_files(folder: Path, i: int) -> list[Path]:
    """Return the files that were kept of a member beside its weights. Raises SurgeryError where one cannot be of it."""
    paths = list_folder(contained_folder(folder, f"{MEMBERS}/{i}"))
    for path in paths:
        # Anything else was put there since: weights, a pickle or an adapter's config would change what the member is.
        if not is_side_file(path.name) and path.name not in (MANIFEST, CARD) and not fnmatchcase(path.name, INDEXES):
            raise SurgeryError(
                "is no file that `surgery merge logits` keeps of a member",
                where=path,
                hint="Remove it, or fetch the ensemble again.",
            )
        check_contained(folder, path)
    return paths


def _files(record: _MemberRecord, checkpoint: Checkpoint, prefix: str, where: Path) -> list[PlannedFile]:
    files = []
    names: set[str] = set()
    for name, size, body in record.files:
        # The header as it was, to the byte, so that metadata and padding are restored as well.
        header = parse_header(struct.pack("<Q", len(body)) + body, size, where)
        if twice := sorted(names.intersection(entry.name for entry in header.entries)):
            raise SurgeryError(f"has a tensor in two files: {listing(twice)}", where=where, hint=FETCH_AGAIN)
        names.update(entry.name for entry in header.entries)
        tensors = [
            PlannedTensor(
                entry.name, entry.dtype, entry.shape, (TensorInput(_stored(checkpoint, prefix + entry.name, where)),)
            )
            for entry in header.entries
        ]
        # A record that was edited, or an ensemble that was saved again in another dtype, must not give wrong bytes.
        _check_shapes(tensors, where)
        files.append(PlannedFile(f"{record.name}/{name}", header, tuple(tensors)))
    return files


def _stored(checkpoint: Checkpoint, name: str, where: Path) -> StoredTensor:
    source = (checkpoint.config.get("aliases") or {}).get(name, name)
    if source not in checkpoint.tensors:
        raise SurgeryError(f'needs "{source}", which the ensemble does not hold', where=where)
    return checkpoint.tensors[source]


def _check_shapes(tensors: Sequence[PlannedTensor], where: Path) -> None:
    for tensor in tensors:
        stored = tensor.inputs[0].tensor
        if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
            raise SurgeryError(
                f'says that "{tensor.name}" is {tensor.dtype} {list(tensor.shape)}, but the ensemble '
                f"holds {stored.dtype} {list(stored.shape)}",
                where=where,
            )
