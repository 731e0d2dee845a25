"""A page for every command, in Markdown, from the functions that the command line is made of.

`python -m cli.reference docs/commands` writes them; a test holds what lies there to what the program says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "README.md"


def pages() -> dict[str, str]:
    """File name → Markdown: a page per command, and an index of them."""
    found = {f"{name.replace(' ', '-')}.md": _page(name, command) for name, command in commands()}
    return {INDEX: _index(), **found}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its full name, with the object that parses it, in the order of `--help`."""
    import typer

    from cli.main import app

    yield from _walk(typer.main.get_command(app), ())


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), command
    for name, child in (children or {}).items():
        yield from _walk(child, (*path, name))


def _index() -> str:
    rows = [
        f"| [`surgery {name}`]({name.replace(' ', '-')}.md) | {_cell(_summary(command))} |"
        for name, command in commands()
    ]
    return "\n".join(["# Commands", "", "| command | what it does |", "|---|---|", *rows, ""])


def _page(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["surgery", name, *(_argument(p) for p in arguments), "[OPTIONS]"])
    parts = [f"# surgery {name}", command.help or "", f"```\n{usage}\n```"]
    if arguments:
        parts.append(_table("argument", [(f"`{_argument(p)}`", p.help or "", p) for p in arguments]))
    if options:
        parts.append(_table("option", [(_option(p), p.help or "", p) for p in options]))
    if command.epilog:
        example = str(command.epilog).removeprefix("Example: ")
        parts.append(f"## Example\n\n```\n{example}\n```")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(what: str, rows: list[tuple[str, str, Any]]) -> str:
    lines = [f"| {what} | | default |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(text)} | {_default(p)} |" for name, text, p in rows)])


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or _kind(parameter)}"


def _kind(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    return {"int": "N", "float": "X", "Path": "PATH"}.get(getattr(annotation, "__name__", ""), "TEXT")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    value = parameter.default
    if value is None or value is False or callable(value):
        return ""
    return f"`{value}`"


def _summary(command: Any) -> str:
    return str(command.help or "").strip().splitlines()[0]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(folder: Path) -> None:
    """Writes the pages into `folder`, and removes those of commands that are no more."""
    from surgery.files import write_file

    wanted = pages()
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        write_file(folder / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
