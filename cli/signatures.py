"""Read every command of the command line, with its arguments and options, from the function that it is.

The functions' signatures (`Annotated[type, typer.Option(…)]`) are read as Typer reads them. The objects that Typer
makes of them for parsing differ from version to version, so they are not used. Recipes, their JSON Schema and the pages
in docs/commands are made from what this module returns.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from surgery.recipes.types import CommandParameter, NamesInput, NamesOutput, ParameterKind

KINDS: dict[type, ParameterKind] = {str: "text", Path: "path", int: "whole", float: "number", bool: "flag"}


@dataclass(frozen=True)
class Signature:
    """A command by its full name, such as `vector apply`. example: a line that one can type."""

    name: str
    help: str
    example: str
    parameters: tuple[CommandParameter, ...]


def signatures(app: typer.Typer) -> Iterator[Signature]:
    """Yield every command of `app`, in the order of `--help`."""
    yield from _signatures(app, ())


def _signatures(app: typer.Typer, groups: tuple[str, ...]) -> Iterator[Signature]:
    for info in app.registered_commands:
        callback = info.callback
        assert callback is not None, "a command is a function"
        name = info.name or _dashed(callback.__name__)
        yield Signature(
            " ".join((*groups, name)),
            inspect.getdoc(callback) or "",
            str(info.epilog or "").removeprefix("Example: "),
            tuple(_parameters(callback)),
        )
    for group in app.registered_groups:
        assert group.typer_instance is not None and group.name is not None, "a group has a name"
        yield from _signatures(group.typer_instance, (*groups, group.name))


def _parameters(callback: Callable[..., Any]) -> Iterator[CommandParameter]:
    # Annotations are texts in modules with `from __future__ import annotations`; Typer's objects in them are needed.
    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items():
        where = f"{callback.__name__}: {name}"
        annotated, metadata = _split(parameter.annotation, where)
        many = get_origin(annotated) is list
        item = get_args(annotated)[0] if many else annotated
        # Literals are texts for recipes, with an enum in the schema.
        choices = get_args(item) if get_origin(item) is Literal else ()
        # A type that recipes do not know is a KeyError here, and so found by the first test that lists the commands.
        kind = KINDS[str if choices else item]
        info = next(each for each in metadata if isinstance(each, OptionInfo | ArgumentInfo))
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        names = _option_names(name, kind, info) if isinstance(info, OptionInfo) else _OptionNames(None)
        yield CommandParameter(
            # Recipes write a parameter as the command line does: `dry-run`, not `dry_run`.
            name=name if names.flag is None else names.flag.removeprefix("--"),
            kind=kind,
            help=info.help or "",
            flag=names.flag,
            short=names.short,
            off=names.off,
            required=required,
            many=many,
            # As recipes and pages write it: both know no paths.
            default=str(default) if isinstance(default, Path) else default,
            least=info.min,
            most=info.max,
            choices=choices,
            metavar=info.metavar,
            names=next((each.kind for each in metadata if isinstance(each, NamesInput)), None),
            writes=next((each.kind for each in metadata if isinstance(each, NamesOutput)), None),
        )


def _split(hint: Any, where: str) -> tuple[Any, list[Any]]:
    """Return the type of `Annotated[type, …]` without `None`, and what else it is annotated with."""
    assert get_origin(hint) is Annotated, f"{where} has no typer.Option or typer.Argument"
    annotated, *metadata = get_args(hint)
    if get_origin(annotated) in (Union, types.UnionType):
        # `X | None` only says that an option may be left out, and the default says that too.
        [annotated] = [each for each in get_args(annotated) if each is not types.NoneType]
    return annotated, metadata


@dataclass(frozen=True)
class _OptionNames:
    flag: str | None
    short: str | None = None
    off: str | None = None


def _option_names(name: str, kind: ParameterKind, info: OptionInfo) -> _OptionNames:
    # Within `Annotated`, Typer takes the first name that is given for the default.
    given = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    if given:
        flag = next(each for each in given if each.startswith("--"))
        return _OptionNames(flag, next((each for each in given if each != flag), None))
    dashed = _dashed(name)
    return _OptionNames(f"--{dashed}", off=f"--no-{dashed}" if kind == "flag" else None)


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-")
