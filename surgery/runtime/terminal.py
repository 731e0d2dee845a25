"""Write to the terminal: streams and consoles that show control characters instead of sending them, and no token.

Whatever a program prints may quote a file that somebody else wrote. `escape_output` guards the streams themselves, so
that warnings of libraries, log lines and tracebacks are safe too; what draws colours and bars for us writes past the
guard, to `trusted_stream`, after it has escaped the text by itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, cast

from surgery.io.escaping import visible

if TYPE_CHECKING:
    from rich.console import Console

_CURSOR_MOVES = re.compile(r"(?:\n|\x1b\[A)*")  # between the lines of several bars, as tqdm writes them


class EscapingStream:
    """A text stream that writes every text to `raw` as `printable` returns it; all else is that of `raw`."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    @property
    def rich_proxied_file(self) -> TextIO:
        """The stream that rich's consoles write to: they colour text, and print our own or escaped text only."""
        return self.raw

    def write(self, text: str) -> int:
        """Write `text`; return how many characters it has."""
        self.raw.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class _BarStream(EscapingStream):
    """An `EscapingStream` that also lets tqdm move between the lines of its bars, and draw over a line."""

    def write(self, text: str) -> int:
        if _CURSOR_MOVES.fullmatch(text):
            self.raw.write(text)
        else:
            # tqdm begins with it what replaces the last state of a bar; further ones would be those of a name.
            rest = text.removeprefix("\r")
            self.raw.write(text[: len(text) - len(rest)] + printable(rest))
        return len(text)


def printable(text: str) -> str:
    """Return `text` as it may be sent to a terminal or a log, without secrets: the one function all output passes."""
    return visible(text)


def escape_output() -> None:
    """Guard stdout and stderr of this process from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, EscapingStream):
            continue
        if hasattr(stream, "reconfigure"):
            # A terminal that is not UTF-8 shows what it cannot as an escape, where Python would raise an error.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, EscapingStream(stream))


def trusted_stream(stream: TextIO) -> TextIO:
    """Return the stream below the guard of `stream`; the stream itself where it has none."""
    return cast(EscapingStream, stream).raw if isinstance(stream, EscapingStream) else stream


@contextmanager
def library_bars() -> Iterator[None]:
    """Let libraries draw bars of tqdm on stderr in the block, where their text is escaped all the same."""
    before = sys.stderr
    sys.stderr = cast(TextIO, _BarStream(trusted_stream(before)))
    try:
        yield
    finally:
        sys.stderr = before


def rich_console(stream: TextIO, **options: Any) -> Console:
    """Return a rich console for `stream` that reads no markup and escapes what it prints."""
    return _console_type()(file=trusted_stream(stream), markup=False, emoji=False, highlight=False, **options)


@cache
def _console_type() -> type[Console]:
    # Imported late: most commands print no table, and `--help` is to be fast.
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class EscapingConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # Control segments are rich's own: moves of the cursor while a bar is drawn.
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return EscapingConsole
