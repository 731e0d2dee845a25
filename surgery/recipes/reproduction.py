"""Run the command that made an output again, and compare the tensors' hashes with its manifest.

The command runs in a temporary folder, on inputs pinned to the commits that were read. A manifest may be a stranger's:
only commands that write checkpoints are run, with arguments that this tool's own parser reads, into that folder alone,
and never through a shell.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from surgery import lab
from surgery.checkpoint.checkpoint import existing_path
from surgery.engine.manifest import read_manifest
from surgery.errors import SurgeryError, usage_error
from surgery.hub import download as hub
from surgery.io.atomic import MANIFEST
from surgery.io.hashing import KEY
from surgery.recipes.run.subprocesses import child_environment, surgery_command
from surgery.reporting.report import Column, Table

OUT = "OUT"  # what stands for the output in a recorded line
PROGRAM = "surgery"
GROUPS = ("vector", "merge", "edit", "grow")  # of the commands that make what has a manifest
TO = "-o"  # the option before the output
WRITING = (TO, "--out", "--overwrite", "--plot")  # how the options begin that say where something is written

ReproductionRunner = Callable[[Sequence[str]], int]
"""Runs one of this tool's commands, given its arguments; returns the exit code."""


@dataclass(frozen=True)
class Reproduction:
    """What came of it. line: the last command that was run. tensors: how many were compared. different: those whose
    values are not what they were. missing, added: those that only one of both has. inputs: roles whose input is another
    one now. versions: package → (then, now), where they differ.
    """

    ref: str
    line: str
    tensors: int
    different: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether every tensor has the hash that it had."""
        return not (self.different or self.missing or self.added)

    def table(self) -> Table:
        """Return the comparison as a table."""
        rows: list[tuple[str, str | int]] = [
            ("tensors compared", self.tensors),
            ("with another hash", len(self.different)),
            ("missing now", len(self.missing)),
            ("only now", len(self.added)),
        ]
        rows += [(f"input {role}", "is another one now") for role in self.inputs]
        rows += [(name, f"{then} then, {now} now") for name, (then, now) in self.versions.items()]
        title = f"{self.ref}: {'the same' if self.same else 'NOT the same'}"
        note = f"Compared with what {MANIFEST} says; `surgery verify` compares that with the weights."
        return Table(title, [Column(""), Column("")], rows, note=note)


def run_in_process(arguments: Sequence[str]) -> int:
    """Run `surgery ARGUMENTS…` in a process of its own, without its output, and return the exit code."""
    command = surgery_command(arguments)
    # No shell reads it, and it is put together from checked values.
    run = subprocess.run(command, stdout=subprocess.DEVNULL, env=child_environment(), check=False)  # noqa: S603
    return run.returncode


def reproduce(ref: str, *, run: ReproductionRunner = run_in_process, scratch: Path | None = None) -> Reproduction:
    """Run the command that made `ref` again, and compare every tensor's hash with its manifest's.

    Example:
        assert surgery.reproduce("OUT").same

    Args:
        ref: a folder with a surgery.json, or `org/name[@revision]` on the Hub.
        run: see `ReproductionRunner`.
        scratch: where the output is made, and removed at the end; by default among the system's temporary files.

    Raises:
        SurgeryError: `ref` has no manifest, or one without tensors or a command that can be run; an input is not there;
            the command failed.
    """
    folder = _folder(ref)
    manifest = read_manifest(folder)
    command = manifest.get("command") or {}
    if not manifest.get("tensors") or not command.get("line"):
        raise SurgeryError(f"its {MANIFEST} names no tensors, or no command that makes them", where=ref)
    # A stranger's manifest could otherwise make us read, and compare with, any file of this machine.
    inside = PurePath(command.get("inside", ""))
    if inside.is_absolute() or ".." in inside.parts:
        raise SurgeryError(f"its {MANIFEST} names an output outside of what its command makes: {inside}", where=ref)
    lines = [*command.get("first", ()), command["line"]]
    _check_inputs(manifest, ref)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="surgery-") as name:
        temporary = Path(name)
        files = _write_files(command.get("files", {}), temporary)
        for line in lines:
            arguments = _arguments(line, manifest, files, temporary, ref)
            code = run(arguments)
            if code:
                raise SurgeryError(
                    f"its command failed with exit code {code}: {PROGRAM} {shlex.join(arguments)}", where=ref
                )
        reproduced = read_manifest(temporary / OUT / inside)
    return _compare(ref, lines[-1], manifest, reproduced)


def _folder(ref: str) -> Path:
    path = existing_path(ref)
    if path is not None:
        return path
    if hub.is_repo_id(ref):
        return hub.fetch(*hub.parse_repo_ref(ref)).folder
    raise usage_error("no such folder, and not a Hub id (org/name[@revision])", where=ref or '""')


def _check_inputs(manifest: Mapping[str, Any], ref: str) -> None:
    """Raise SurgeryError if an input does not exist, before anything runs.

    Inputs that are made on the way are not in the command line, and are not checked.
    """
    line = manifest["command"]["line"]
    for role, entry in manifest.get("inputs", {}).items():
        source = str(entry.get("ref"))
        # Fetched, made on the spot, or put together of two: these are found when the command runs.
        if entry.get("repo_id") or source.startswith(lab.PREFIX) or "+" in source or source not in line:
            continue
        if existing_path(source) is None:
            raise SurgeryError(
                f"its {role} {source} is not here",
                where=ref,
                hint="Go to the folder in which the command was run, or put the input there.",
            )


def _write_files(files: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write the small files that a command reads into `folder`; return name in the command line → path."""
    paths = {}
    for number, (name, text) in enumerate(files.items()):
        path = folder / f"{number}{Path(name).suffix}"
        path.write_text(text, encoding="utf-8")
        paths[name] = str(path)
    return paths


def _arguments(line: str, manifest: Mapping[str, Any], files: Mapping[str, str], folder: Path, ref: str) -> list[str]:
    """Return the arguments of a recorded line, with the output in `folder`, files at their paths, and inputs pinned."""
    try:
        program, *arguments = shlex.split(line)
    except ValueError as error:
        raise SurgeryError(f"its command cannot be read ({error})", where=ref) from error
    # Exactly one `-o OUT`, and no other option that writes: the command must write nowhere else.
    outputs = [at for at in range(1, len(arguments)) if arguments[at - 1 : at + 1] == [TO, OUT]]
    writing = [word for word in arguments if word.startswith(WRITING)]
    if program != PROGRAM or not arguments or arguments[0] not in GROUPS or len(outputs) != 1 or writing != [TO]:
        raise SurgeryError(f"its command cannot be run again: {line}", where=ref)
    # Pinned to the commits that were read then: a branch may have moved since.
    known = dict(files) | {
        str(entry["ref"]): f"{entry['repo_id']}@{entry['revision']}"
        for entry in manifest.get("inputs", {}).values()
        if entry.get("repo_id") and entry.get("revision")
    }
    arguments = [known.get(word, word) for word in arguments]
    arguments[outputs[0]] = str(folder / OUT)
    return arguments


def _compare(ref: str, line: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Reproduction:
    then, now = ({name: entry.get(KEY) for name, entry in m["tensors"].items()} for m in (old, new))
    inputs = new.get("inputs", {})
    others = {role for role, entry in old.get("inputs", {}).items() if inputs.get(role, {}).get(KEY) != entry.get(KEY)}
    versions = {
        name: (version, new["versions"].get(name, "–"))
        for name, version in old.get("versions", {}).items()
        if new["versions"].get(name) != version
    }
    return Reproduction(
        ref,
        line,
        len(then),
        different=tuple(sorted(name for name in then.keys() & now.keys() if then[name] != now[name])),
        missing=tuple(sorted(then.keys() - now.keys())),
        added=tuple(sorted(now.keys() - then.keys())),
        inputs=tuple(sorted(others)),
        versions=versions,
    )
