"""Generate a Markdown page for every command, from the functions that the command line is made of.

`python -m cli.reference docs/commands` writes them; a test compares the files with what the code says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cli.main import app
from cli.signatures import Signature, signatures
from surgery.recipes.types import CommandParameter, ParameterKind

INDEX = "README.md"
METAVARS: dict[ParameterKind, str] = {"whole": "N", "number": "X", "path": "PATH", "text": "TEXT"}


def pages() -> dict[str, str]:
    """Return file name → Markdown: a page per command, and an index of them."""
    commands = list(signatures(app))
    return {INDEX: _index(commands), **{_file(command): _page(command) for command in commands}}


def _file(command: Signature) -> str:
    return f"{command.name.replace(' ', '-')}.md"


def _index(commands: list[Signature]) -> str:
    rows = [
        f"| [`surgery {command.name}`]({_file(command)}) | {_cell(command.help.splitlines()[0])} |"
        for command in commands
    ]
    return "\n".join(["# Commands", "", "| command | what it does |", "|---|---|", *rows, ""])


def _page(command: Signature) -> str:
    arguments = [each for each in command.parameters if each.flag is None]
    options = [each for each in command.parameters if each.flag]
    usage = " ".join(["surgery", command.name, *map(_argument, arguments), "[OPTIONS]"])
    parts = [f"# surgery {command.name}", command.help, f"```\n{usage}\n```"]
    if arguments:
        parts.append(_table("argument", [(f"`{_argument(each)}`", each) for each in arguments]))
    if options:
        parts.append(_table("option", [(_option(each), each) for each in options]))
    if command.example:
        parts.append(f"## Example\n\n```\n{command.example}\n```")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(what: str, rows: list[tuple[str, CommandParameter]]) -> str:
    lines = [f"| {what} | | default |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(each.help)} | {_default(each)} |" for name, each in rows)])


def _argument(parameter: CommandParameter) -> str:
    return parameter.metavar or parameter.name.upper()


def _option(parameter: CommandParameter) -> str:
    names = ", ".join(f"`{name}`" for name in (parameter.short, parameter.flag, parameter.off) if name)
    if parameter.kind == "flag":
        return names
    return f"{names} {parameter.metavar or '|'.join(parameter.choices) or METAVARS[parameter.kind]}"


def _default(parameter: CommandParameter) -> str:
    if parameter.required:
        return "needed"
    # A flag that is off by default is an option left out: there is no value to write.
    return "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"


def _cell(text: str) -> str:
    # A pipe would end the cell, and a line break the table.
    return " ".join(text.replace("|", "\\|").split())


def main(folder: Path) -> None:
    """Write the pages into `folder`, and remove those of commands that no longer exist."""
    from surgery.io.atomic import write_file

    wanted = pages()
    for path in folder.glob("*.md"):
        # Else the page of a renamed command would stay, and describe what does not exist.
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        write_file(folder / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
