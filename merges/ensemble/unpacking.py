"""Restore the members of an ensemble, each file as it was: same shards, same headers, same bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merges.ensemble.ensemble_model import MODEL_TYPE
from surgery.checkpoint.checkpoint import Checkpoint, StoredTensor
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.safetensors_header import parse_header
from surgery.engine.execution import execute
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedFile, PlannedTensor, check_output
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import check_free
from surgery.io.json_io import read_json

MEMBERS = "members"


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
    check_output(out, {"ensemble": checkpoint})
    # Never overwritten: the folder gets no manifest, by which it would be known to be ours.
    check_free(out, overwrite=False)
    count = len(checkpoint.config["members"])
    records = [_read_record(folder / MEMBERS / f"{i}.json") for i in range(count)]
    files: list[PlannedFile] = []
    side_files: dict[str, Path] = {}
    sizes = {}
    for i, record in enumerate(records):
        planned = _files(record, checkpoint, f"{MEMBERS}.{i}.", folder / MEMBERS / f"{i}.json")
        files += planned
        sizes[record["name"]] = sum(file.size for file in planned)
        files_of_member = folder / MEMBERS / str(i)
        side_files |= {
            f"{record['name']}/{path.name}": path for path in sorted(files_of_member.iterdir()) if path.is_file()
        }
    command = command_record("merge unpack", [ensemble])
    plan = Plan(command, {"ensemble": checkpoint}, tuple(files), side_files)

    # Not by `write_checkpoint`: `out` is a folder of models, and no model with a manifest and card itself.
    def finish(partial: Path, _: ExecutionResult) -> None:
        # Each member has the index that it came with, under its own folder.
        (partial / plan.index_name).unlink(missing_ok=True)

    execute(plan, out, options, finish=finish)
    return UnpackReport(out, sizes)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SurgeryError(
            "is missing, so the members' files cannot be restored",
            where=path,
            hint="Use the folder as `surgery merge logits` wrote it.",
        )
    record = read_json(path)
    name, files = record.get("name"), record.get("files")
    if not isinstance(name, str) or Path(name).name != name or not _are_files(files):
        raise SurgeryError("is damaged", where=path, hint="Fetch the ensemble again.")
    return record


def _are_files(files: object) -> bool:
    """Return whether `files` is a list of weight files whose names do not leave the member's folder."""
    return (
        isinstance(files, list)
        and bool(files)
        and all(
            isinstance(file, dict)
            and isinstance(file.get("name"), str)
            and isinstance(file.get("size"), int)
            and isinstance(file.get("header"), str)
            and not Path(file["name"]).is_absolute()
            and ".." not in Path(file["name"]).parts
            for file in files
        )
    )


def _files(record: Mapping[str, Any], checkpoint: Checkpoint, prefix: str, where: Path) -> list[PlannedFile]:
    files = []
    for file in record["files"]:
        # The header as it was, to the byte, so that metadata and padding are restored as well.
        body = file["header"].encode("utf-8")
        header = parse_header(struct.pack("<Q", len(body)) + body, file["size"], where)
        tensors = [
            PlannedTensor(
                entry.name, entry.dtype, entry.shape, (TensorInput(_stored(checkpoint, prefix + entry.name, where)),)
            )
            for entry in header.entries
        ]
        # A record that was edited, or an ensemble that was saved again in another dtype, must not give wrong bytes.
        _check_shapes(tensors, where)
        files.append(PlannedFile(f"{record['name']}/{file['name']}", header, tuple(tensors)))
    return files


def _stored(checkpoint: Checkpoint, name: str, where: Path) -> StoredTensor:
    source = checkpoint.config.get("aliases", {}).get(name, name)
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
