"""Promises of cli.signatures: what recipes and pages say of the commands is what the parser takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from cli.main import app
from cli.signatures import signatures


def parsers(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command as Typer parses it; asked for nothing but what all versions of Click have."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
    for name, child in getattr(command, "commands", {}).items():
        yield from parsers(child, (*path, name))


def test_every_command_argument_and_option_is_the_parsers() -> None:
    parsed = dict(parsers(typer.main.get_command(app)))
    said = {each.name: each for each in signatures(app)}
    assert list(said) == list(parsed)
    for name, command in parsed.items():
        assert said[name].help.split() == command.help.split()
        # Typer puts arguments and options in the order of the function, and so do we.
        found = [([n for n in (p.short, p.flag) if n], p.off, p.required, p.many) for p in said[name].parameters]
        wanted = [
            (
                list(p.opts) if p.param_type_name == "option" else [],
                next(iter(p.secondary_opts), None),
                p.required,
                p.multiple if p.param_type_name == "option" else p.nargs == -1,
            )
            for p in command.params
        ]
        assert found == wanted, name


def test_limits_defaults_and_examples_come_from_the_functions() -> None:
    said = {each.name: each for each in signatures(app)}
    cell = next(each for each in said["grow embed"].parameters if each.name == "cell")
    assert (cell.kind, cell.least, cell.most, cell.default) == ("whole", 8, 128, 32)
    assert all(each.example.startswith("surgery ") for each in said.values())
