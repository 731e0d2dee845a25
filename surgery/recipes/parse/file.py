"""Read a recipe file: its recipes as trees that know their lines, and every error in how it is built.

A file says `recipes: {NAME: {about, needs, vars, steps, push}}`. What stands in `with`, `matrix`, `when`, `vars` and
`push` are values: scalars, lists of them, and references. A text that begins with `$` is a reference as a whole,
`$name` or `$name/inside/path`; `$$` begins a text with one `$`. Nothing else means anything: there is no code, no shell
and no template. Strings are compared, never run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from surgery.errors import SurgeryError, did_you_mean, listing, usage_error
from surgery.io.json_records import Strict
from surgery.io.yaml_models import n_bytes, read_text, validate_node
from surgery.io.yaml_nodes import YamlErrors, YamlNode, plain_scalars, read_documents

# Steps and recipes name folders, so that no name may be hidden, or leave the folder that it is in.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME_RULE = "expected letters, digits, `.`, `_` and `-`, the first a letter or digit"
LONGEST_NAME = 100  # characters, so that a node of a matrix still names a folder
_REFERENCE = re.compile(rf"\$({NAME})(?:/(.*))?", re.DOTALL)
# What YAML 1.1 reads as a number to the base 60 or 8, though most mean the text: `4:8`, `007`.
_MISREAD = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[-+]?0[0-7_]+")


class Needs(Strict):
    """What a run takes, in words that are describe beside the recipe."""

    disk: str | None = None
    memory: str | None = None
    gpu: str | None = None
    downloads: str | None = None
    time: str | None = None


class StepEntry(Strict):
    """One command, with its options."""

    run: str = Field(description="The command, such as vector apply.")
    options: dict[str, Any] = Field(
        {}, alias="with", description="Its arguments and options, by their names without dashes."
    )
    matrix: dict[str, Any] = Field(
        {}, description="Variables of this step with lists of values; it runs for each combination."
    )
    when: dict[str, Any] = Field(
        {}, description="Variables, and the value or list of values that each must have for the step to run."
    )
    memory: PositiveInt | None = Field(None, description="What it takes at most: bytes, or such as 2 GB.")

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return n_bytes(value) if isinstance(value, str) else value


class PushEntry(Strict):
    """What goes to the Hub once every step is done."""

    source: Any = Field(alias="from", description="The step whose output it is: $step.")
    to: Any = Field(description="org/name. The push is left out where this is a variable without a value.")
    private: Any = Field(
        False, description="Whether to refuse a public repository; one that is made is private anyway."
    )
    public: Any = Field(False, description="Whether a repository that is made is public; never with private inputs.")
    revision: Any = Field(None, description="A branch.")
    pr: Any = Field(False, description="Whether to open a pull request.")
    message: Any = Field(None, description="Of the commit.")


def _listed(value: object) -> object:
    return (value,) if isinstance(value, dict) else value


class RecipeEntry(Strict):
    """A pipeline."""

    about: str = Field("", description="One line for the list of recipes.")
    needs: Needs = Field(Needs(), description="What a run takes, in words.")
    vars: dict[str, Any] = Field(
        {}, description="Variables; one without a value must be set on the command line if a step uses it."
    )
    steps: dict[str, StepEntry] = Field(description="By name, which is that of the step's folder in a run.")
    push: Annotated[tuple[PushEntry, ...], BeforeValidator(_listed)] = Field(
        (), description="What goes to the Hub: one entry, or a list."
    )

    @field_validator("steps")
    @classmethod
    def _at_least_one(cls, steps: dict[str, StepEntry]) -> dict[str, StepEntry]:
        if not steps:
            raise ValueError("holds no step")
        return steps


class RecipeFile(Strict):
    """Pipelines for `surgery run`."""

    recipes: dict[str, RecipeEntry] = Field(description="By name.")


class RecipeSummary(NamedTuple):
    """A recipe, as lists show it."""

    name: str
    about: str
    needs: Mapping[str, str]


@dataclass(frozen=True)
class Reference:
    """`$name`, or `$name/inside`."""

    name: str
    inside: str = ""


@dataclass(frozen=True)
class RecipeSource:
    """A file that was read: its recipes by name, and the errors in how they are built, which are not yet raised."""

    file: Path
    recipes: Mapping[str, YamlNode]
    errors: YamlErrors

    def recipe(self, name: str) -> YamlNode:
        """Return one recipe. Raises SurgeryError with the file's errors and the nearest name where there is none."""
        if name in self.recipes:
            return self.recipes[name]
        self.errors.raise_if_any()
        hint = nearest(name, self.recipes) or f"It holds {listing(self.recipes)}."
        raise usage_error(f"holds no recipe {name!r}", where=self.file, hint=hint)


def read(file: Path) -> RecipeSource:
    """Read the recipes of `file`.

    Raises:
        SurgeryError: it cannot be read, is not one document of YAML, or holds keys twice. What else is wrong is kept in
            `RecipeSource.errors`, for it to be told with what the recipes mean.
    """
    where = str(file)
    text = read_text(file)
    documents, errors = read_documents(text, where)
    if len(documents) != 1:
        raise usage_error(f"holds {len(documents)} documents, expected one", where=where)
    # Keys that stand twice have no single meaning, so nothing more can be said of such a file.
    errors.raise_if_any()
    for line, what in _misread(text):
        errors.add(YamlNode("", line, None), what)
    with contextlib.suppress(SurgeryError):  # they stay in `errors`
        validate_node(documents[0], errors, RecipeFile)
    recipes = children(documents[0], "recipes")
    check_names(recipes, errors, "a recipe")
    return RecipeSource(file, recipes, errors)


def recipes_in(file: Path) -> list[RecipeSummary]:
    """Return the recipes of `file`, in its order. Raises SurgeryError with every error in how they are built."""
    source = read(file)
    source.errors.raise_if_any()
    return [RecipeSummary(name, text_at(recipe, "about"), needs_of(recipe)) for name, recipe in source.recipes.items()]


def needs_of(recipe: YamlNode) -> dict[str, str]:
    """Return what a recipe says that it takes."""
    return {name: need.value for name, need in children(recipe, "needs").items() if isinstance(need.value, str)}


def children(node: YamlNode, key: str) -> dict[str, YamlNode]:
    """Return the mapping `key` of the mapping `node`; empty where either is no mapping, which is reported elsewhere."""
    below = node.value.get(key) if isinstance(node.value, dict) else None
    return below.value if below is not None and isinstance(below.value, dict) else {}


def text_at(node: YamlNode, key: str) -> str:
    """Return the text at `key` of the mapping `node`; an empty one where there is none."""
    below = node.value.get(key) if isinstance(node.value, dict) else None
    return below.value if below is not None and isinstance(below.value, str) else ""


def check_names(named: Mapping[str, YamlNode], errors: YamlErrors, of: str) -> None:
    """Add an error for every name that cannot be one, and for those that some file systems cannot tell apart."""
    seen: dict[str, str] = {}
    for name, node in named.items():
        if not re.fullmatch(NAME, name):
            errors.add(node, f"got {name!r} as the name of {of}, {NAME_RULE}")
        elif len(name) > LONGEST_NAME:
            errors.add(node, f"the name of {of} has {len(name)} characters, expected at most {LONGEST_NAME}")
        elif seen.setdefault(name.casefold(), name) != name:
            errors.add(node, f"differs from {seen[name.casefold()]} in upper and lower case alone")


def meaning(text: str) -> str | Reference:
    """Return what a text of a recipe means. Raises ValueError where it is neither a text nor a reference."""
    if not text.startswith("$"):
        return text
    if text.startswith("$$"):
        return text[1:]
    match = _REFERENCE.fullmatch(text)
    if not match:
        raise ValueError(f"got {text!r}, expected $name or $name/inside/path; $$ begins a text with one $")
    name, inside = match.groups()
    if inside is None:
        return Reference(name)
    # A path from a file must not lead out of the step's folder, on any system.
    if "\\" in inside or any(part in ("", ".", "..") for part in inside.split("/")):
        raise ValueError(f"got {text!r}, expected a path that stays inside ${name}, without `.`, `..` and empty parts")
    return Reference(name, inside)


def escaped(text: str) -> str:
    """Return the text of a recipe that means `text`."""
    return f"${text}" if text.startswith("$") else text


def nearest(name: str, known: Iterable[str], sign: str = "") -> str:
    """Return `did you mean …?`, or an empty text where no known name is near."""
    hint = did_you_mean(name, known)
    return "" if hint is None else f"did you mean {sign}{hint.removeprefix('Did you mean ')}"


def misread(text: str) -> str:
    """Return the error for a scalar without quotes that YAML 1.1 reads as nobody means it; else an empty text."""
    if not _MISREAD.fullmatch(text):
        return ""
    return f"YAML reads {text} as the number {yaml.safe_load(text)}; put it in quotes if it is a text"


def _misread(text: str) -> Iterable[tuple[int, str]]:
    for line, scalar in plain_scalars(text):
        if what := misread(scalar):
            yield line, what
