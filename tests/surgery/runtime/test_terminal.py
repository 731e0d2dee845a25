"""The terminal shows what files say, and is not steered by it."""

from __future__ import annotations

import io
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.hostile_names import HOSTILE_NAMES, hidden_characters
from tqdm import tqdm

from surgery.runtime.terminal import EscapingStream, escape_output, library_bars, rich_console, trusted_stream

names = pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def guarded() -> Iterator[Terminal]:
    """A terminal as stdout and stderr, guarded. Not as a fixture: pytest sets the streams anew for the test itself."""
    before, raw = (sys.stdout, sys.stderr), Terminal()
    sys.stdout = sys.stderr = raw
    try:
        escape_output()
        yield raw
    finally:
        sys.stdout, sys.stderr = before


@names
def test_whatever_is_printed_is_escaped(name: str) -> None:
    with guarded() as terminal, warnings.catch_warnings():
        warnings.simplefilter("always")
        print(name)
        print(name, file=sys.stderr)
        sys.stderr.writelines([name, "\n"])
        sys.stderr.write(warnings.formatwarning(name, UserWarning, "library.py", 1))
        try:
            raise ValueError(name)
        except ValueError:
            traceback.print_exc()
    text = terminal.getvalue()
    assert "ValueError" in text and "library.py" in text
    assert hidden_characters(text) == []


def test_the_guard_is_there_once_and_can_be_passed() -> None:
    with guarded() as terminal:
        escape_output()
        assert trusted_stream(sys.stdout) is terminal
        assert trusted_stream(terminal) is terminal
        assert sys.stdout.isatty() and isinstance(sys.stdout, EscapingStream)
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")  # type: ignore[arg-type]


def test_a_terminal_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    escape_output()
    print("α")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\u03b1\n"


@names
def test_rich_reads_no_markup_and_sends_no_control(name: str) -> None:
    with guarded() as terminal:
        rich_console(sys.stdout, color_system=None, width=10_000_000).print(name)
    text = terminal.getvalue()
    assert hidden_characters(text) == []
    if name.isprintable() and not hidden_characters(name):
        assert text.rstrip("\n") == name


def test_bars_of_libraries_move_and_their_text_does_not() -> None:
    with guarded() as terminal:
        with library_bars():
            for _ in tqdm(range(2), desc="a\x1b[31m\rb\u202e", ascii=True):
                pass
            print("x\x1b[A", file=sys.stderr)
        assert isinstance(sys.stderr, EscapingStream)
        print("\rx")
    text = terminal.getvalue()
    assert {*hidden_characters(text)} == {"\r"}
    assert r"a\x1b[31m\rb\u202e" in text and r"x\x1b[A" in text and "\n\\rx\n" in text
