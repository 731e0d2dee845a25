"""Nothing that a file says steers the terminal, forges a line of ours or is read as markup, wherever it is printed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hostile_names import HOSTILE_NAMES, hidden_characters

import cli.main
from cli import console
from surgery.errors import ErrorList, SurgeryError
from surgery.recipes.run.progress_display import format_progress
from surgery.reporting.report import Column, Table
from surgery.runtime.progress import ProgressEvent, terminal

ROOT = Path(__file__).parents[2]
PACKAGES = ("cli", "merges", "probes", "surgery")
# Where text is escaped, and where a process that is no command answers its parent.
PRINTING = {"cli/console.py", "surgery/runtime/terminal.py", "surgery/models/chat_template_worker.py"}
PRINTERS = {
    *("print", "echo", "secho", "pprint", "input", "confirm"),
    *("print_exc", "print_exception", "StreamHandler", "Console", "Live"),
}
STREAMS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
names = pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)


def table(name: str) -> Table:
    return Table(name, ["n", Column(name)], [[1, name], [2, "x"]], note=name)


ONE_LINE: dict[str, Callable[[str], None]] = {
    "message": console.message,
    "warning": console.warn,
    "result": console.result,
    "preflight": lambda name: console.show_preflight({"label": name}, [name]),
    "error": lambda name: console.error(str(SurgeryError(f'"{name}" is wrong', where=name, hint=f"Mend {name}."))),
}
MANY_LINES: dict[str, Callable[[str], None]] = {
    "table": lambda name: console.show(table(name)),
    "token": lambda name: console.scored_token(name, 0.5),
    "document": console.document,
    "json": lambda name: console.show_json({name: [name]}),
}


@names
@pytest.mark.parametrize("outlet", [*ONE_LINE, *MANY_LINES])
def test_no_hidden_character_is_printed(outlet: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (ONE_LINE | MANY_LINES)[outlet](name)
    out, err = capsys.readouterr()
    assert hidden_characters(out + err) == []
    if outlet in ONE_LINE:
        assert len((out + err).splitlines()) <= 2, "a name has made a line of its own"
        assert len(out + err) < 25_000
    if outlet == "json":
        assert json.loads(out) == {name: [name]}
    if outlet == "table" and name in ("[red]x[/red][link=http://evil]y[/link][/]", ":smile: :skull:"):
        assert out.count(name) == 4


@names
def test_errors_have_the_lines_that_we_gave_them(name: str) -> None:
    errors = ErrorList()
    errors.add(f"{name} is wrong", where=name, hint=name)
    errors.add_tensor(name, "has NaN", "Mend it.")
    with errors.collect(name):
        raise SurgeryError(name, where=name)
    with pytest.raises(SurgeryError) as caught:
        errors.raise_if_any(name)
    lines = str(caught.value).split("\n")
    assert len(lines) == 3 and all(line.startswith("  ") for line in lines[1:])
    assert len(str(caught.value)) < 20_000


@names
@pytest.mark.parametrize("kind", [SurgeryError, OSError, RuntimeError, KeyError])
def test_every_failure_is_printed_without_hidden_characters(
    kind: type[Exception], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind(name)

    monkeypatch.setattr(cli.main, "app", fail)
    with pytest.raises(SystemExit):
        cli.main.run()
    _, err = capsys.readouterr()
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert hidden_characters(err) == []


@names
def test_progress_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal(name, 2) as advance:
        advance(1, name)
    assert hidden_characters("".join(capsys.readouterr())) == []
    assert hidden_characters(format_progress(ProgressEvent(name, 1, 2, "steps", name)), allowed="") == []


@pytest.mark.parametrize(
    "arguments", [("inspect", "{}"), ("{}",), ("inspect", "--{}"), ("--debug", "diff", "{}", "{}")]
)
def test_what_typer_and_python_print_is_escaped_too(arguments: tuple[str, ...]) -> None:
    name = "".join(
        name for name in HOSTILE_NAMES.values() if len(name) < 100 and "\0" not in name and "\ud800" not in name
    )
    done = subprocess.run(
        [sys.executable, "-c", "from cli.main import run; run()", *(each.format(name) for each in arguments)],
        capture_output=True,
        env={**os.environ, "COLUMNS": "20000", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    text = (done.stdout + done.stderr).decode()
    assert done.returncode and r"\x1b[31m" in text
    assert hidden_characters(text) == []


def test_a_panic_of_a_library_in_rust_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    panic = type("PanicException", (BaseException,), {})

    def fail() -> None:
        raise panic("retry-limit-in-match over")

    monkeypatch.setattr(cli.main, "app", fail)
    with pytest.raises(SystemExit) as left:
        cli.main.run()
    assert left.value.code == 1
    assert "error: a library broke off: retry-limit-in-match over." in capsys.readouterr().err


def calls(tree: ast.AST) -> set[str]:
    """The names of everything in a module that prints, or writes to a stream of the process."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            found |= {name} & PRINTERS
        is_stream = isinstance(node, ast.Attribute) and node.attr in ("write", "writelines", "buffer")
        if is_stream and ast.unparse(node.value) in STREAMS:
            found.add(ast.unparse(node))
    return found


def test_only_the_console_prints() -> None:
    printing = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if found := calls(tree):
                printing[path.relative_to(ROOT).as_posix()] = found
    # The live table is drawn on the console that escapes.
    assert printing.pop("surgery/recipes/run/progress_display.py") == {"Live"}
    assert set(printing) <= PRINTING, printing
    assert "cli/console.py" in printing


@pytest.mark.parametrize(
    "line", ["print(x)", "typer.echo(x)", "sys.stdout.write(x)", "sys.__stderr__.write(x)", "Console().print(x)"]
)
def test_the_search_for_printing_finds_it(line: str) -> None:
    assert calls(ast.parse(line))


def test_a_table_shows_its_first_rows_and_says_how_many_more_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(Table("many", ["name"], [[f"row{number}"] for number in range(5_000)], note="of a file"))
    shown = " ".join(capsys.readouterr().out.split())  # notes are wrapped
    assert "row999" in shown and "row1000" not in shown
    assert "… and 4,000 more rows; --json has all of them." in shown and "of a file" in shown
