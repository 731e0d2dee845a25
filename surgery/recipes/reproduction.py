"""Run the command that made an output again, and compare the tensors' hashes with its manifest.

The command runs in a temporary folder, on inputs pinned to the commits that were read. A manifest may be a stranger's:
its command is read into typed values (`recorded_command`), of which the command line is built anew; only commands that
write checkpoints are run, into that folder alone, and never through a shell. What they read is told before.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery import lab
from surgery.checkpoint.checkpoint import existing_path
from surgery.engine.manifest import read_manifest
from surgery.errors import SurgeryError, usage_error
from surgery.growth.plan import CacheSettings, GrowthPlan, plan_text
from surgery.hub import download as hub
from surgery.io.atomic import MANIFEST
from surgery.io.hashing import KEY
from surgery.io.yaml_models import parse_model
from surgery.recipes.config_texts import config_texts
from surgery.recipes.parse.inputs import NO_FILE, input_error
from surgery.recipes.recorded_command import OUT, PROGRAM, TypedCommand, Values, pinned, read_line, read_record
from surgery.recipes.run.paths import typed_words
from surgery.recipes.run.subprocesses import child_environment, surgery_command
from surgery.recipes.types import Command, CommandParameter, InputKind, Scalar
from surgery.reporting.report import Column, Table

# What a manifest has a copy of: a merge's config and a growth's plan.
COPIED: tuple[InputKind, ...] = ("merge", "plan")
# How the names of such files may end; commands tell configs from methods by it.
SUFFIXES = (".yml", ".yaml", ".json")

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


def reproduce_output(
    ref: str,
    *,
    commands: Mapping[str, Command],
    run: ReproductionRunner = run_in_process,
    scratch: Path | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Reproduction:
    """Run the command that made `ref` again, and compare every tensor's hash with its manifest's.

    Args:
        ref: a folder with a surgery.json, or `org/name[@revision]` on the Hub.
        commands: all commands of this tool, by name.
        run: see `ReproductionRunner`.
        scratch: where the output is made, and removed at the end; by default among the system's temporary files.
        notify: called with a line for each file, folder or model that will be read.

    Raises:
        SurgeryError: `ref` has no manifest, or one without tensors or a command that can be run; an input is not there;
            the command failed.
    """
    manifest = read_manifest(_folder(ref))
    record = read_record(manifest, ref)
    if not manifest.get("tensors") or not record.line:
        raise SurgeryError(f"its {MANIFEST} names no tensors, or no command that makes them", where=ref)
    inputs = _inputs(manifest, ref)
    steps = [_with_pinned_inputs(read_line(line, commands, ref), inputs, ref) for line in record.lines]
    # All of them before the first runs: the second would otherwise fail after hours of work.
    named = [value for step in steps for value in _checked_inputs(step, record.files, ref)]
    named += [each for name, text in record.files.items() for each in config_texts(text, name)]
    for value in dict.fromkeys(named):
        if told := _read_notice(value):
            notify(told)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="surgery-") as name:
        temporary = Path(name)
        paths = _write_files(record.files, temporary, ref)
        for step in steps:
            arguments = _arguments(step, paths, temporary / OUT)
            code = run(arguments)
            if code:
                raise SurgeryError(
                    f"its command failed with exit code {code}: {PROGRAM} {shlex.join(arguments)}", where=ref
                )
        reproduced = read_manifest(temporary / OUT / record.inside)
    return _compare(ref, record.line, manifest, reproduced)


def _folder(ref: str) -> Path:
    path = existing_path(ref)
    if path is not None:
        return path
    if hub.is_repo_id(ref):
        return hub.fetch(*hub.parse_repo_ref(ref)).folder
    raise usage_error("no such folder, and not a Hub id (org/name[@revision])", where=ref or '""')


def _inputs(manifest: Mapping[str, Any], ref: str) -> dict[str, str]:
    """Return reference → `org/name@commit`, of the inputs that came from the Hub.

    Pinned to the commits that were read then: a branch may have moved since.
    """
    return {
        str(entry.get("ref")): pinned(entry["repo_id"], entry["revision"], ref)
        for entry in manifest.get("inputs", {}).values()
        if entry.get("repo_id") and entry.get("revision")
    }


def _with_pinned_inputs(step: TypedCommand, inputs: Mapping[str, str], ref: str) -> TypedCommand:
    """Return `step` with commits in the place of inputs of the Hub: only in parameters that name models."""

    def value_of(parameter: CommandParameter, value: Scalar) -> Scalar:
        if parameter.names in (None, *COPIED) or not isinstance(value, str):
            return value
        return inputs.get(value, value)

    values: Values = {}
    for name, given in step.values.items():
        parameter = step.command.parameters[name]
        many = isinstance(given, tuple)
        items = tuple(value_of(parameter, item) for item in (given if isinstance(given, tuple) else (given,)))
        values[name] = items if many else items[0]
    return replace(step, values=values)


def _checked_inputs(step: TypedCommand, files: Mapping[str, str], ref: str) -> Iterator[str]:
    """Yield each input that `step` names. Raises SurgeryError where one is not there.

    The small files that the manifest has a copy of are read from there.
    """
    for parameter, value in step.items():
        kind = parameter.names
        if kind is None or not isinstance(value, str) or (kind in COPIED and value in files):
            continue
        if problem := input_error(value, kind):
            raise SurgeryError(
                f"its {parameter.name} {value} is not here" + ("" if problem.startswith(NO_FILE) else f" ({problem})"),
                where=ref,
                hint="Go to the folder in which the command was run, or put the input there.",
            )
        yield value


def _read_notice(value: str) -> str | None:
    """Return the line that tells what is read for `value`; None where it names nothing."""
    if not value.isprintable():
        return None
    path = existing_path(value)
    if path is not None:
        return f"reads {path.resolve()}, as its {MANIFEST} says"
    is_reference = hub.is_repo_id(value) or value.startswith(lab.PREFIX) or "+" in value.strip("+")
    return f"reads {value}, as its {MANIFEST} says" if is_reference else None


def _write_files(files: Mapping[str, str], folder: Path, ref: str) -> dict[str, Path]:
    """Write the small files that a command reads into `folder`; return name in the command line → path."""
    paths = {}
    for number, (name, text) in enumerate(files.items()):
        # Of the name only the ending is used, and only one that commands look for.
        suffix = next((each for each in SUFFIXES if name.endswith(each)), "")
        paths[name] = folder / f"{number}{suffix}"
        paths[name].write_text(text, encoding="utf-8", errors="surrogatepass")
    return paths


def _arguments(step: TypedCommand, files: Mapping[str, Path], out: Path) -> list[str]:
    """Return what follows `surgery` on the command line of `step`, with its output at `out`."""
    given = dict(step.values)
    for name, value in step.values.items():
        if step.command.parameters[name].names in COPIED and value in files:
            path = files[str(value)]
            if step.command.parameters[name].names == "plan":
                _keep_cache_inside(path)
            given[name] = str(path)
    output = step.command.output
    assert output is not None and output.flag is not None, "every command that is run again has an option -o"
    return typed_words(step.command, given, {output.flag: out}, lambda made: out)


def _keep_cache_inside(path: Path) -> None:
    """Take the folder of the prefix cache out of the plan in `path`: the only place outside of OUT that plans name."""
    plan = parse_model(path.read_text(encoding="utf-8"), MANIFEST, GrowthPlan)
    cache = CacheSettings(use=plan.cache.use, dtype=plan.cache.dtype, disk=plan.cache.disk)
    path.write_text(plan_text(plan.model_copy(update={"cache": cache})), encoding="utf-8")


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
