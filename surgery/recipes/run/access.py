"""List what a run reads, writes and pushes, before any of it is done.

A recipe may be a stranger's. `AccessList` names every file, folder, model and data set that its steps are given, also
those that a config, a plan, an adapter or findings name in turn; every place that is written; and every repository that
is pushed to. What lies outside of the recipe's folder, and was not chosen on the command line either, is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from surgery import lab
from surgery.checkpoint.adapters.adapted_checkpoint import base_of
from surgery.checkpoint.checkpoint import existing_path, is_adapter
from surgery.errors import SurgeryError
from surgery.growth.plan import read_plan
from surgery.hub.settings import cache_dir
from surgery.hub.visibility import RepositoryKind, Visibility, visibility
from surgery.io.json_io import read_json
from surgery.io.patterns import has_wildcard
from surgery.publish.privacy import InputPrivacy, input_privacy
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import RunPaths, by_name, command_line, dependencies, scalars, to_text
from surgery.recipes.types import InputKind, Pipeline, Push, RecipeStep, StepOutput
from surgery.reporting.report import Column, Table, Value

OUTSIDE = "outside the recipe's folder"
RESULTS = "results.json"
MAX_READS = 20_000  # of one run; more is a slip, or a config that means harm
ReadKind = Literal["file", "folder", "Hub", "lab", "pattern", "task"]


@dataclass(frozen=True)
class ReadAccess:
    """Something that steps read.

    Attributes:
        name: as the recipe, or what it names, has it.
        place: the absolute path, links followed; `org/name@commit` where the commit is known; else the name.
        steps: the steps that it is given to, in their order.
        through: the file that names it, where no step does so itself.
        is_outside: a path outside of the recipe's folder that the command line did not choose.
    """

    name: str
    place: str
    kind: ReadKind
    steps: tuple[str, ...]
    through: str | None = None
    is_outside: bool = False


@dataclass(frozen=True)
class WriteAccess:
    """A folder that is written to. needs_consent: it is outside of RUN, and a file names it."""

    path: Path
    what: str
    needs_consent: bool = False


@dataclass(frozen=True)
class PushAccess:
    """A push. remote: who may see the repository as it is now. inputs: what may keep its source from being public."""

    push: Push
    remote: Visibility
    inputs: InputPrivacy

    @property
    def is_public(self) -> bool:
        """Whether everybody will see it; a repository whose visibility is not known is looked at when it is pushed."""
        return self.remote == "public" or (self.push.public and self.remote != "private")

    @property
    def destination(self) -> str:
        """Where it goes, in words."""
        push = self.push
        where = f"{push.repo_id}@{push.revision}" if push.revision else push.repo_id
        return f"{where}, as a pull request" if push.pr else where

    @property
    def visibility(self) -> str:
        """Who will see it, in words."""
        if self.remote in ("hidden", "unknown"):
            made = "public" if self.push.public else "private"
            return f"{made}, if it is made" if self.remote == "unknown" else f"new, {made}"
        return f"{self.remote}, as it is"


@dataclass(frozen=True)
class AccessList:
    """What a run reads, writes and pushes. lines: step → its command line."""

    lines: Mapping[str, str]
    reads: tuple[ReadAccess, ...]
    writes: tuple[WriteAccess, ...]
    pushes: tuple[PushAccess, ...]

    @property
    def outside(self) -> tuple[ReadAccess, ...]:
        """What is read outside of the recipe's folder, and was not chosen on the command line."""
        return tuple(each for each in self.reads if each.is_outside)

    def command_table(self) -> Table:
        """Return every command line."""
        return Table("Commands", [Column("step"), Column("command line")], list(map(list, self.lines.items())))

    def read_table(self) -> Table:
        """Return everything that is read."""
        rows: list[list[Value]] = [
            [each.place, each.kind, ", ".join(each.steps), each.through, OUTSIDE if each.is_outside else None]
            for each in self.reads
        ]
        columns = [Column("read"), Column("what"), Column("by"), Column("named in"), Column("")]
        return Table("Reads", columns, rows)

    def write_table(self) -> Table:
        """Return every folder that is written to."""
        rows: list[list[Value]] = [
            [str(each.path), each.what, "needs --allow-write" if each.needs_consent else None] for each in self.writes
        ]
        return Table("Writes", [Column("folder"), Column("what"), Column("")], rows)

    def push_table(self) -> Table:
        """Return every push."""
        rows: list[list[Value]] = [
            [
                each.destination,
                f"{each.push.node}/{each.push.inside}" if each.push.inside else each.push.node,
                each.visibility,
                None if each.push.is_allowed else "needs --allow-push",
            ]
            for each in self.pushes
        ]
        return Table("Publishes", [Column("to"), Column("output of"), Column("who sees it"), Column("")], rows)


def list_access(pipeline: Pipeline, paths: RunPaths, inputs: InputResolver) -> AccessList:
    """Return what a run of `pipeline` reads, writes and pushes. Raises SurgeryError where a file cannot be read."""
    reads = _Reads(pipeline, paths, inputs)
    for step in pipeline.nodes:
        reads.add_step(step)
    return AccessList(
        {step.name: command_line(step, paths) for step in pipeline.nodes},
        tuple(reads.found.values()),
        (
            WriteAccess(paths.run, "the run: every step's output, pictures, logs, the report"),
            *(WriteAccess(path, what, reads.is_outside(path)) for path, what in reads.caches.items()),
            *_cache_writes(reads.found.values()),
        ),
        tuple(_pushes(pipeline, reads)),
    )


@dataclass
class _Reads:
    """Collects what is read, each place once.

    names: step → every text by which it is given something. caches: folder that a growth plan writes to → what for.
    """

    pipeline: Pipeline
    paths: RunPaths
    inputs: InputResolver
    found: dict[str, ReadAccess] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    caches: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen = [path for text in self.pipeline.chosen if (path := _existing(text)) is not None]
        self._inside = [path.resolve() for path in (self.pipeline.file.parent, self.paths.run, *chosen)]

    def is_outside(self, path: Path) -> bool:
        """Return whether `path`, links followed, is neither near the recipe nor chosen on the command line."""
        return not any(path.resolve().is_relative_to(folder) for folder in self._inside)

    def add_step(self, step: RecipeStep) -> None:
        """Add everything that `step` is given, but for the outputs of others."""
        for name, parameter in step.command.parameters.items():
            for value in scalars(step.given.get(name)) if parameter.names is not None else ():
                if not isinstance(value, StepOutput):
                    self._add(to_text(value), step.name, parameter.names, None)

    def _add(self, text: str, step: str, kind: InputKind | None, through: str | None) -> None:
        """Add what `text` names, and what that names in turn; nothing where it names nothing."""
        path = _existing(text)
        base, plus, adapter = text.rpartition("+")
        if path is None and base and plus and adapter and kind in ("model", "tokenizer", None):
            self._add(base, step, kind, through)
            self._add(adapter, step, kind, through)
            return
        access = self._access(text, path, kind, through)
        known = self.found.get(access.place) if access is not None else None
        if access is None or (known is not None and step in known.steps):
            return
        if known is None and len(self.found) >= MAX_READS:
            raise SurgeryError(f"reads more than {MAX_READS:,} files and models", where=self.pipeline.file)
        self.found[access.place] = replace(known or access, steps=(*(known.steps if known else ()), step))
        self.names.setdefault(step, []).append(text)
        for inner, inner_kind in self._inner(text, path, kind):
            self._add(inner, step, inner_kind, text)

    def _access(self, text: str, path: Path | None, kind: InputKind | None, through: str | None) -> ReadAccess | None:
        if path is not None:
            is_folder = path.is_dir()
            return ReadAccess(
                text, str(path.resolve()), "folder" if is_folder else "file", (), through, self.is_outside(path)
            )
        if kind == "task":
            return ReadAccess(text, text, "task", (), through)
        if text.startswith(lab.PREFIX):
            return ReadAccess(text, text, "lab", (), through)
        if kind == "corpus" and has_wildcard(text):
            matches = self.inputs.matches(text)
            outside = any(map(self.is_outside, matches))
            return ReadAccess(text, str(Path(text).expanduser().absolute()), "pattern", (), through, outside)
        # A merge's method or a plan of our own: nothing that could be read.
        if kind in ("merge", "plan", "path", "text"):
            return None
        resolved = self.inputs.resolve_quietly(text)
        if resolved is None:
            return None
        _, slash, pinned = (resolved.content or "").partition("/")
        return ReadAccess(text, pinned if slash else f"{text} (its commit is not known)", "Hub", (), through)

    def _inner(self, text: str, path: Path | None, kind: InputKind | None) -> Iterator[tuple[str, InputKind | None]]:
        """Yield what the file or folder `text` names in turn, with what each is the name of, where that is known."""
        if kind == "plan":
            yield from self._inner_of_plan(text)
        elif path is None:
            return
        elif path.is_dir():
            if is_adapter(path):
                with suppress(SurgeryError):
                    yield base_of(path), "model"
            yield from _data_of_findings(path)
        else:
            yield from ((each, None) for each in self.inputs.config_texts(text) if each != text)

    def _inner_of_plan(self, text: str) -> Iterator[tuple[str, InputKind | None]]:
        try:
            plan, _ = read_plan(text)
        except SurgeryError:
            return  # such a plan is not followed
        yield from ((each, "model") for each in (plan.embed, plan.start) if each)
        yield from ((each, "corpus") for each in plan.corpus)
        yield from ((each, "data") for each in plan.evaluate.texts)
        yield from ((each, "task") for each in plan.evaluate.tasks)
        if plan.model and plan.model.config:
            yield str(plan.model.config), "path"
        if plan.cache.folder is not None:
            self.caches[plan.cache.folder.expanduser().absolute()] = f"the prefix cache of a growth, as {text} says"


def _existing(text: str) -> Path | None:
    try:
        return existing_path(text)
    except SurgeryError:
        return Path(text)  # it is there, and may not be read: the step says so


def _data_of_findings(folder: Path) -> Iterator[tuple[str, InputKind | None]]:
    """Yield the data sets that the findings of a probe in `folder` name: edits are measured on them."""
    with suppress(SurgeryError):
        for value in read_json(folder / RESULTS, missing={}).values():
            if isinstance(value, dict) and isinstance(value.get("ref"), str):
                yield value["ref"], None


def _cache_writes(reads: Iterable[ReadAccess]) -> Iterator[WriteAccess]:
    if any(each.kind == "Hub" for each in reads):
        yield WriteAccess(cache_dir(), "the Hub's cache: what must be downloaded")
    for each in reads:
        with suppress(SurgeryError):  # texts of the lab that are no model's
            if each.kind == "lab":
                folder = lab.path_of(each.name.removeprefix(lab.PREFIX).partition("/")[0]).parent
                yield WriteAccess(folder, "the lab's cache: models that are trained first")
                return


def _pushes(pipeline: Pipeline, reads: _Reads) -> Iterator[PushAccess]:
    asked: dict[tuple[str, RepositoryKind], Visibility] = {}

    def ask(repo_id: str, kind: RepositoryKind) -> Visibility:
        if (repo_id, kind) not in asked:
            asked[repo_id, kind] = visibility(repo_id, kind)
        return asked[repo_id, kind]

    steps = by_name(pipeline)
    for push in pipeline.pushes:
        remote = ask(push.repo_id, "model")
        # Of every step that has a part in it, what the recipe gives; configs and plans are no weights.
        sources = [steps[name] for name in _ancestors(steps, push.node)]
        refs = [text for step in sources for text in _sources(step)]
        yield PushAccess(push, remote, input_privacy(refs, ask=ask) if remote != "private" else InputPrivacy())


def _sources(step: RecipeStep) -> Iterator[str]:
    """Yield the models and data that the output of `step` is made from, as far as the recipe names them."""
    for name, parameter in step.command.parameters.items():
        if parameter.names in ("model", "data", "corpus", "path"):
            yield from (to_text(each) for each in scalars(step.given.get(name)) if not isinstance(each, StepOutput))


def _ancestors(steps: Mapping[str, RecipeStep], name: str) -> list[str]:
    """Return `name` and every step that it depends on, directly or not, each once."""
    found = {name: None}
    waiting = [name]
    while waiting:
        for need in dependencies(steps[waiting.pop()]):
            if need not in found:
                found[need] = None
                waiting.append(need)
    return list(found)
