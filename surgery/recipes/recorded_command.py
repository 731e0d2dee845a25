"""Read the command that a manifest records into typed values: the command, and what each of its parameters is given.

A manifest may be a stranger's. Its line is never run and never edited: it is read word by word against the parameters
that the command has, each value is checked as the command would check it, and only these values go on. What is written,
and where, is no part of them. A value stays the value of its parameter, whatever it looks like.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError, usage_error
from surgery.io.safe_paths import safe_relative_path
from surgery.recipes.parse.scalars import convert, describe, scalar_error
from surgery.recipes.types import Command, CommandParameter, Scalar

OUT = "OUT"  # what stands for the output in a recorded line
PROGRAM = "surgery"
# The commands that write checkpoints with a manifest. Others may be just as harmless, but nothing is made by them that
# could be compared.
REPRODUCIBLE = frozenset(
    {
        *("vector extract", "vector apply", "vector transfer"),
        *("merge weights", "merge logits"),
        *("edit heads", "edit experts", "edit undo"),
        *("grow embed", "grow init", "grow add", "grow run", "grow baseline"),
    }
)
MERGE, MERGE_WEIGHTS = "merge", "merge weights"  # the first is the short form of the second
MAX_LINES = 4  # of one record: a baseline has two, its own and that of the growth before it
MAX_FILES = 8  # of one record: today's have one, a merge's config or a growth's plan
MAX_LINE = 1_000_000  # characters
MAX_WORDS = 10_000
MAX_SHOWN = 300  # characters of a line that a message repeats
Values = dict[str, Scalar | tuple[Scalar, ...]]


@dataclass(frozen=True)
class CommandRecord:
    """What reproducing reads of a manifest's `command`.

    Attributes:
        line: the command as it is typed; empty where there is none.
        first: lines of the commands that come before it, into the same output.
        files: name, as in the lines → text of the small files that they read.
        inside: where the checkpoint lies in what the command writes.
    """

    line: str
    first: tuple[str, ...]
    files: Mapping[str, str]
    inside: str

    @property
    def lines(self) -> list[str]:
        """All commands, in the order in which they were run."""
        return [*self.first, self.line]


@dataclass(frozen=True)
class TypedCommand:
    """A command with the values of its parameters, checked one by one; its output is not among them."""

    command: Command
    values: Values

    def items(self) -> Iterator[tuple[CommandParameter, Scalar]]:
        """Yield each value with its parameter."""
        for name, value in self.values.items():
            for item in value if isinstance(value, tuple) else (value,):
                yield self.command.parameters[name], item


def read_record(manifest: Mapping[str, Any], where: str) -> CommandRecord:
    """Return the record of the command in a manifest, whose types were checked when it was read.

    Raises:
        SurgeryError: it has more lines or files than any command, or an output outside of what its command makes.
    """
    command = manifest.get("command") or {}
    record = CommandRecord(
        command.get("line") or "", tuple(command.get("first", ())), command.get("files", {}), command.get("inside", "")
    )
    if len(record.lines) > MAX_LINES or len(record.files) > MAX_FILES or max(map(len, record.lines)) > MAX_LINE:
        raise SurgeryError(
            f"its manifest has more than {MAX_LINES} commands, {MAX_FILES} files, or {MAX_LINE:,} characters in a line",
            where=where,
        )
    if record.inside:
        try:
            # A stranger's manifest could otherwise make us read, and compare with, any file of this machine.
            safe_relative_path(record.inside, where=where, what="folder")
        except SurgeryError as error:
            raise SurgeryError(
                f"its manifest names an output outside of what its command makes: {_shown(record.inside)}",
                where=where,
            ) from error
    return record


def read_line(line: str, commands: Mapping[str, Command], where: str) -> TypedCommand:
    """Return the command that a recorded line names, with its values.

    Args:
        commands: all that there are, by name.

    Raises:
        SurgeryError: the line cannot be read; it names no command that writes a checkpoint, or an option that the
            command does not have or that no manifest may give; a value is none of its parameter's.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise SurgeryError(f"its command cannot be read ({error})", where=where) from error
    name, given = _command_name(words[:MAX_WORDS], commands)
    if name is None:
        raise SurgeryError(f"its command cannot be run again: {_shown(line)}", where=where)
    try:
        return TypedCommand(commands[name], _Words(commands[name], given).values())
    except ValueError as error:
        raise SurgeryError(f"its command cannot be run again: {error}, in: {_shown(line)}", where=where) from error


def _shown(line: str) -> str:
    """Return a line as messages show it: cut short, and with escapes where it cannot be printed."""
    text = line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"
    return text if text.isprintable() else ascii(text)


def _command_name(words: Sequence[str], commands: Mapping[str, Command]) -> tuple[str | None, Sequence[str]]:
    """Return the command that `words` name, None where it is none to run again, and the words after its name."""
    if len(words) < 3 or words[0] != PROGRAM:
        return None, words
    name, rest = " ".join(words[1:3]), words[3:]
    if name not in commands and words[1] == MERGE:
        name, rest = MERGE_WEIGHTS, words[2:]
    return (name if name in REPRODUCIBLE and name in commands else None), rest


class _Words:
    """Reads words as the command line does: an option takes the next word, whatever it is; after `--` nothing is one.

    Raises ValueError, with what is wrong, where the command line would refuse them, and for every option that says
    where something is written, except the output, once.
    """

    def __init__(self, command: Command, words: Sequence[str]) -> None:
        self._command, self._words = command, list(words)
        self._found: dict[str, list[Scalar]] = {}
        self._outputs: list[str] = []
        self._flags = {
            flag: (parameter, flag != parameter.off)
            for parameter in command.parameters.values()
            for flag in (parameter.flag, parameter.short, parameter.off)
            if flag is not None
        }

    def values(self) -> Values:
        """Return parameter → value, or values where it takes many."""
        arguments = []
        while self._words:
            word = self._words.pop(0)
            if word == "--":
                arguments += self._words
                break
            if word.startswith("-"):
                self._option(word)
            else:
                arguments.append(word)
        self._share_arguments(arguments)
        if self._outputs != [OUT]:
            raise ValueError(f"expected one -o {OUT}")
        for name, parameter in self._command.parameters.items():
            if parameter.required and name != self._command.writes and name not in self._found:
                raise ValueError(f"{name} is missing")
        parameters = self._command.parameters
        return {name: tuple(each) if parameters[name].many else each[0] for name, each in self._found.items()}

    def _option(self, word: str) -> None:
        flag, equals, text = word.partition("=")
        output = self._command.output
        if output is not None and flag in (output.short, output.flag):
            self._outputs.append(text if equals else self._next(flag))
            return
        parameter, is_on = self._flags.get(flag, (None, True))
        if parameter is None or parameter.writes is not None:
            raise ValueError(f"{describe(flag)} is no option that a manifest may give to `{self._command.name}`")
        if parameter.kind == "flag":
            if equals:
                raise ValueError(f"{flag} takes no value")
            self._add(parameter, is_on)
        else:
            self._add(parameter, text if equals else self._next(flag))

    def _next(self, flag: str) -> str:
        if not self._words:
            raise ValueError(f"{flag} needs a value")
        return self._words.pop(0)

    def _share_arguments(self, arguments: Sequence[str]) -> None:
        """Give the arguments to their parameters in order: one each, and what is left to the one that takes many."""
        parameters = [each for each in self._command.parameters.values() if each.flag is None]
        left = list(arguments)
        for number, parameter in enumerate(parameters):
            n_after = sum(not each.many for each in parameters[number + 1 :])
            count = max(0, len(left) - n_after) if parameter.many else min(1, len(left))
            for text in left[:count]:
                self._add(parameter, text)
            left = left[count:]
        if left:
            raise ValueError(f"{describe(left[0])} is an argument too many")

    def _add(self, parameter: CommandParameter, value: Scalar) -> None:
        if what := scalar_error(value):
            raise ValueError(f"{parameter.name}: {what}")
        # The names of files and models that people give can be printed; those that cannot would hide what is read.
        if parameter.names is not None and not str(value).isprintable():
            raise ValueError(f"{parameter.name}: got {describe(value)}, expected a name that can be printed")
        try:
            converted = convert(value, parameter)
        except ValueError as error:
            raise ValueError(f"{parameter.name}: got {describe(value)}, {error}") from error
        items = self._found.setdefault(parameter.name, [])
        if items and not parameter.many:
            raise ValueError(f"{parameter.name} is given twice")
        items.append(converted)


def pinned(repo_id: object, revision: object, where: str) -> str:
    """Return `org/name@commit` of an input as a manifest names it. Raises SurgeryError where it can be neither."""
    from surgery.hub import download as hub

    if not isinstance(repo_id, str) or "@" in repo_id or not hub.is_repo_id(repo_id):
        raise usage_error(f"its manifest names the input {describe(repo_id)}, expected org/name", where=where)
    if not isinstance(revision, str) or revision.startswith("-"):
        raise usage_error(f"its manifest names the revision {describe(revision)} of {repo_id}", where=where)
    hub.check_revision(repo_id, revision)
    return f"{repo_id}@{revision}"
