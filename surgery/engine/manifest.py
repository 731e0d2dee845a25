"""Read and write surgery.json: the inputs of an output, its command, and the hash of every tensor."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.engine.manifest_schema import Manifest
from surgery.engine.plan import Plan
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, listing
from surgery.io.atomic import MANIFEST
from surgery.io.command_line import command_words, option_words
from surgery.io.hashing import KEY, hash_tensors
from surgery.io.json_fields import shown
from surgery.io.json_io import read_json, to_json
from surgery.io.json_records import invalid_record
from surgery.io.output_files import write_output
from surgery.io.safe_paths import find_file
from surgery.runtime.version import installed_version

# Goes up when a reader of the old form would misread the new one: `read_manifest` refuses every other number.
SCHEMA = 1
MAKE_AGAIN = "The file is damaged: fetch or make the output again."


def build_manifest(plan: Plan, result: ExecutionResult, *, kind: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return an output's manifest as JSON-able data, without time or place: the same job gives the same bytes.

    Hashes are those of `surgery.io.hashing`. A tensor's is taken over those of its segments of 2²⁰ elements, a
    checkpoint's over the sorted (name, hash) of the tensors that were read from it, however they are sharded.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": plan.command,
        # Of packages that decide the bytes: torch computes, safetensors' format is written.
        "versions": {name: installed_version(name) for name in ("model-surgery", "torch", "safetensors")}
        | {"python": platform.python_version()},
        "inputs": {
            role: input_entry(checkpoint, result.source_hashes.get(role, {}))
            for role, checkpoint in plan.sources.items()
        },
        "report": report,
        "files": {file.name: file.size for file in plan.files},
        "tensors": {
            tensor.name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                KEY: result.hashes[tensor.name],
                "edited": tensor.kernel is not None,
            }
            for tensor in sorted(plan.tensors, key=lambda t: t.name)
        },
    }


def build_manifest_of_files(
    kind: str,
    command: Mapping[str, Any],
    *,
    inputs: Mapping[str, Mapping[str, Any]],
    report: Mapping[str, Any],
    files: Mapping[str, int],
    tensors: Mapping[str, tuple[str, tuple[int, ...], str]],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return the manifest of an output that was not written from a plan, in the form of `build_manifest`.

    Args:
        inputs: role → the input, with its hash.
        files: name → size in bytes.
        tensors: name → dtype, shape and hash.
        versions: of what else decided the bytes.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": command,
        "versions": {
            "model-surgery": installed_version("model-surgery"),
            **versions,
            "python": platform.python_version(),
        },
        "inputs": inputs,
        "report": report,
        "files": dict(sorted(files.items())),
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape), KEY: digest}
            for name, (dtype, shape, digest) in sorted(tensors.items())
        },
    }


def input_entry(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return a manifest's entry for a checkpoint of which the tensors in `hashes` (name → hash) were read."""
    # Only where an adapter's own config chose it: what was read must never depend on a name that is not recorded.
    base = {} if checkpoint.named_base is None else {"named_base": checkpoint.named_base}
    return {
        "ref": checkpoint.ref,
        **base,
        "repo_id": checkpoint.repo_id,
        "revision": checkpoint.revision,
        "tensors_read": len(hashes),
        "tensors": len(checkpoint.tensors),
        KEY: hash_tensors(hashes),
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write surgery.json into `folder`."""
    write_output(folder, MANIFEST, to_json(manifest))


def read_manifest(folder: Path, *, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Read the manifest in `folder`, and check the types of its fields: see `surgery.engine.manifest_schema`.

    Args:
        needs: the fields that must be there.

    Raises:
        SurgeryError: there is none, or one of another schema; a field is missing, or holds what it may not.
    """
    path = folder / MANIFEST
    if find_file(folder, MANIFEST) is None:
        raise SurgeryError(
            f"has no {MANIFEST}", where=folder, hint="Only folders that this tool wrote have a manifest."
        )
    manifest = read_json(path)
    if manifest.get("schema") != SCHEMA:
        raise SurgeryError(
            f"has schema {shown(manifest.get('schema'))}, this version reads {SCHEMA}",
            where=path,
            hint="Use the version of model-surgery that wrote it.",
        )
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        raise invalid_record(error, path, hint=MAKE_AGAIN) from error
    if missing := [name for name in needs if name not in manifest]:
        raise SurgeryError(f"has no {listing(missing)}", where=path, hint=MAKE_AGAIN)
    return manifest


def command_record(name: str, arguments: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return the manifest's record of a command: name, arguments, options, and the line that repeats it."""
    # OUT instead of the folder's name: the manifest is the same wherever it was written.
    words = ["surgery", *command_words(name, list(map(str, arguments)), ["-o", "OUT", *option_words(options)])]
    return {
        "name": name,
        "arguments": list(map(str, arguments)),
        "options": options,
        "line": shlex.join(words),
    }
