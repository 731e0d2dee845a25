"""Types of parsed recipes: commands with their parameters, and the steps of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scalar = str | int | float | bool
Value = Scalar | None | tuple[Scalar, ...]
ParameterKind = Literal["text", "path", "whole", "number", "flag"]
InputKind = Literal["model", "tokenizer", "tokenizer source", "data", "corpus", "text", "path", "plan", "merge", "task"]
OutputKind = Literal["folder", "file", "picture", "cards"]


@dataclass(frozen=True)
class NamesInput:
    """Annotation of a command's parameter whose value names something that must be there before the command runs.

    kind: "model", "tokenizer", "data" (labelled prompts), "corpus" and "text" (plain texts): what those commands open,
    local or on the Hub or of the lab. "path": a local file or folder. "plan": a growth plan. "merge": a merge config or
    method. "task": a task of the evaluation harness. "tokenizer source": union, base, or a model.
    """

    kind: InputKind


@dataclass(frozen=True)
class NamesOutput:
    """Annotation of a command's parameter that says where the command writes, which no file may say for it.

    kind: "folder" or "file": the command's result. "picture": one that it draws. "cards": the only folder in which it
    may change model cards.
    """

    kind: OutputKind


@dataclass(frozen=True)
class CommandParameter:
    """An argument or option of a command, by the name that it has on the command line without dashes.

    name: `scale-for`, `models`. kind: of one item where it takes `many`. flag: how it is typed, `--scale-for`; None for
    an argument. short: `-o`. off: what switches a flag off (`--no-rescale`). least, most: bounds of numbers. choices:
    every value that is allowed; empty where any is. metavar: what help pages call the value. names: what the value
    names, if that must exist. writes: what is written where the value says, if anything is.
    """

    name: str
    kind: ParameterKind
    help: str = ""
    flag: str | None = None
    off: str | None = None
    required: bool = False
    many: bool = False
    default: Value = None
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    short: str | None = None
    metavar: str | None = None
    names: InputKind | None = None
    writes: OutputKind | None = None


@dataclass(frozen=True)
class Command:
    """A command that a step may run; its parameters are those of the command line, but for `out`, `json` and the like,
    which are the engine's.

    writes: the parameter whose folder it makes or changes (`out`); None where it only prints. changes: the parameter
    that names a folder which it adds to, so that a step works on a copy of it (`from` of `probe heads`). goes_on: its
    folder fills while it works, and the same command goes on in it; others write theirs whole or not at all. plots: the
    option that names a picture to write, which is the engine's. suffix: how the name of what it writes ends, where that
    is a file and no folder. cards: the option that names the folder in which it may change model cards. output: the
    parameter that `writes` names, with its flags.
    """

    name: str
    help: str
    parameters: Mapping[str, CommandParameter]
    writes: str | None = None
    changes: str | None = None
    goes_on: bool = False
    plots: str | None = None
    suffix: str = ""
    cards: str | None = None
    output: CommandParameter | None = None


@dataclass(frozen=True)
class StepOutput:
    """The output of another node of the run, `step` by its name, or what lies at `inside` in it."""

    step: str
    inside: str = ""


Given = Value | StepOutput | tuple[Scalar | StepOutput, ...]


@dataclass(frozen=True)
class RecipeStep:
    """One step of a run, with everything filled in.

    name: unique in the run, and the name of its folder: `moved`, or `moved.scale=0.5` for one of a matrix. step: as
    the recipe calls it. given: parameter → value; what another step makes is a `StepOutput`. after: the nodes that it
    needs. line: where the step stands in the file. memory: bytes that the recipe says it takes at most; None estimates
    it.
    """

    name: str
    step: str
    command: Command
    given: Mapping[str, Given]
    after: tuple[str, ...] = ()
    line: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Push:
    """What is to go to the Hub once all steps are done.

    private: refuse a public repository. public: it may be public. is_allowed: whether the command line names the
    repository, by a variable that serves for nothing else; one that the file names needs consent.
    """

    node: str
    repo_id: str
    inside: str = ""
    private: bool = False
    revision: str | None = None
    pr: bool = False
    message: str | None = None
    public: bool = False
    is_allowed: bool = False


@dataclass(frozen=True)
class Pipeline:
    """A recipe that can be run: its nodes in an order in which each comes after those it needs.

    recipe: its name. about: in a line. text: of the recipe alone, as YAML with the values of this run in `vars`, for
    cards and manifests. settings: the variables' values. needs: what the recipe says it takes. chosen: the texts that
    the command line gave variables: what they name was not the file's choice.
    """

    recipe: str
    about: str
    file: Path
    text: str
    settings: Mapping[str, Value | tuple[Value, ...]]
    nodes: tuple[RecipeStep, ...]
    needs: Mapping[str, str] = field(default_factory=dict)
    pushes: tuple[Push, ...] = ()
    chosen: tuple[str, ...] = ()
