"""What the command line takes: every command with its arguments and options, from the functions that it is made of.

Read from their signatures (`Annotated[…, typer.Option(…)]`), as Typer reads them, and not from the objects that it
makes of them for parsing, which are others in every version. Recipes and the documentation's pages are made from it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

KINDS: tuple[type, ...] = (str, Path, int, float, bool)


@dataclass(frozen=True)
class Parameter:
    """An argument, which has no `flags`, or an option: `-o`, `--out`.

    name: that of the function's parameter. kind: one of `KINDS`; of the items where it takes `many`. off: what switches
    a flag off. least, most: of numbers.
    """

    name: str
    kind: type
    many: bool
    required: bool
    default: Any
    help: str
    metavar: str | None
    flags: tuple[str, ...] = ()
    off: str | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Signature:
    """A command by its full name, such as `vector apply`. example: a line that one can type."""

    name: str
    help: str
    example: str
    parameters: tuple[Parameter, ...]


def signatures(app: typer.Typer) -> Iterator[Signature]:
    """Every command of `app`, in the order of `--help`."""
    yield from _of(app, ())


def _of(app: typer.Typer, path: tuple[str, ...]) -> Iterator[Signature]:
    for info in app.registered_commands:
        callback = info.callback
        assert callback is not None, "a command is a function"
        name = info.name or _dashed(callback.__name__)
        yield Signature(
            " ".join((*path, name)),
            inspect.getdoc(callback) or "",
            str(info.epilog or "").removeprefix("Example: "),
            tuple(_parameters(callback)),
        )
    for group in app.registered_groups:
        assert group.typer_instance is not None and group.name is not None, "a group has a name"
        yield from _of(group.typer_instance, (*path, group.name))


def _parameters(callback: Callable[..., Any]) -> Iterator[Parameter]:
    hints = get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        of, info = _split(hints[name])
        many = get_origin(of) is list
        kind = get_args(of)[0] if many else of
        assert kind in KINDS, f"{callback.__name__}: {name}: {kind} has no meaning in a recipe"
        required = parameter.default is inspect.Parameter.empty
        flags, off = _flags(name, kind, info) if isinstance(info, OptionInfo) else ((), None)
        yield Parameter(
            name,
            kind,
            many,
            required,
            None if required else parameter.default,
            info.help or "",
            info.metavar,
            flags,
            off,
            info.min,
            info.max,
        )


def _split(hint: Any) -> tuple[Any, OptionInfo | ArgumentInfo]:
    """The type of `Annotated[type, info]`, without `None`, and what Typer is told of it."""
    assert get_origin(hint) is Annotated, "every parameter of a command says what it is"
    of, *said = get_args(hint)
    if get_origin(of) in (Union, types.UnionType):
        [of] = [each for each in get_args(of) if each is not types.NoneType]
    return of, next(each for each in said if isinstance(each, OptionInfo | ArgumentInfo))


def _flags(name: str, kind: type, info: OptionInfo) -> tuple[tuple[str, ...], str | None]:
    """How an option is typed, and what switches it off."""
    # In `Annotated` the first name that is given stands where a default would.
    given = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    if given:
        return tuple(given), None
    flag = f"--{_dashed(name)}"
    return (flag,), f"--no-{_dashed(name)}" if kind is bool else None


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-")
