"""Write text that comes from files into other text, so that it stays text: one function for each medium.

Names of tensors, models, members and tokens, messages of servers and answers of models may be a stranger's. On a
terminal, control characters move the cursor, hide lines or set the clipboard; marks of direction and invisible
characters make a name look like another one; in Markdown and HTML the same text can be a link, a picture or a script.

- `visible` and `one_line` for terminals and plain text, `json_text` and `yaml_text` for those formats;
- `markdown_text`, `markdown_code` and `markdown_block` for model cards;
- `html_text` for pages.

All of them leave out the user's tokens too (`surgery.io.redaction`).
"""

from __future__ import annotations

import html
import re
from typing import Any

from surgery.errors import shortened
from surgery.io.redaction import redact

MOST_CHARACTERS = 2_000  # of one name, cell or line that is shown: far more than a path has, and it still fits a screen
_TAIL = 200  # characters from the end of a longer text that are shown too

# Controls (but for tab and line feed), invisible format characters, marks of direction, halves of surrogate pairs,
# separators of lines and paragraphs, letters without ink, variation selectors and tags: the categories Cc, Cf, Cs, Zl
# and Zp of Unicode, and its default ignorable characters. A table, since asking unicodedata for a million characters
# takes longer than most commands.
_HIDDEN_RANGES = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u115f-\u1160"
    "\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
)
_HIDDEN = re.compile(f"[{_HIDDEN_RANGES}]")
_HIDDEN_OR_BREAK = re.compile(f"[\t\n{_HIDDEN_RANGES}]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
# What may have a meaning in Markdown, in any of its dialects: a list or rule at the beginning, marks of emphasis, code,
# links, pictures, tags, entities, cells, formulas, mentions and emoji; and addresses, which become links by themselves.
# An underscore between letters has none.
_MARKDOWN = re.compile(
    r"^(?:[-+=]|\d+[.)])\s|[\\`*\[\]<>|~&@$#{}]|(?<![^\W_])_|_(?![^\W_])|://|www\.|mailto:|xmpp:|:[\w+-]+:",
    re.IGNORECASE,
)

# The ends of an interval, as our tables have them: [0.83, 0.92]. Brackets around anything else may be a link.
_INTERVAL = re.compile(r"(?<![!\]])\[[−\d.,% ]+\](?![\[(:])")


def visible(text: str) -> str:
    r"""Return `text` with every control and invisible character written out: ESC as `\x1b`, U+202E as `\u202e`.

    Line breaks and tabs stay: for text of several lines. A break of Windows (CR LF) becomes a line feed.
    """
    return _HIDDEN.sub(_written_out, redact(text).replace("\r\n", "\n"))


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    r"""Return `text` as `visible` does, but on one line: line breaks as `\n`, tabs as `\t`; its middle is cut out.

    most: characters that are shown; of a longer text the beginning and the end.
    """
    # Before, so that a text of a million control characters takes no time; and after, as each becomes up to ten.
    tail = min(_TAIL, most // 4)
    return shortened(_HIDDEN_OR_BREAK.sub(_written_out, shortened(redact(text), most, tail)), most, tail)


def _written_out(match: re.Match[str]) -> str:
    character = match[0]
    number = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def json_text(text: str) -> str:
    r"""Return JSON text with hidden characters as `\uXXXX`: its values are the same, and a terminal shows them.

    text: of a JSON encoder, which has escaped everything below U+0020, so that the others stand inside of strings.
    """
    return _HIDDEN.sub(_json_escape, redact(text))


def _json_escape(match: re.Match[str]) -> str:
    character = match[0]
    if ord(character) < 0x10000:
        return f"\\u{ord(character):04x}"
    # JSON writes characters beyond U+FFFF as two halves.
    return "".join(
        f"\\u{unit.hex()}" for unit in (character.encode("utf-16-be")[:2], character.encode("utf-16-be")[2:])
    )


def yaml_text(value: Any, **options: Any) -> str:
    """Return `value` as YAML of `yaml.safe_dump` with `options`; its keys in their order, hidden characters escaped."""
    import yaml  # here, as every command imports this module to print, and few write YAML

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    if _HIDDEN.search(text) is not None:
        # PyYAML takes most invisible characters for printable ones; with ASCII alone it escapes all of them.
        text = yaml.safe_dump(value, sort_keys=False, **options)
    return redact(text)


def markdown_text(text: str) -> str:
    """Return `text` for a sentence, heading or table cell of Markdown: plain words as they are, all else as code.

    In a code span nothing is a link, a picture or a tag, while backslashes would depend on the dialect.
    """
    line = one_line(text).strip()
    return markdown_code(line) if _MARKDOWN.search(_INTERVAL.sub("", line)) else line


def markdown_code(text: str) -> str:
    """Return `text` as a code span of Markdown, which may stand in a table's cell; "" stays "".

    Pipes, which end a cell even in code, get a backslash, as GitHub's dialect asks for.
    """
    line = one_line(text).strip()
    if not line:
        return ""
    # A backslash before the pipe would take away the meaning of ours: such pipes are written out.
    line = re.sub(r"(\\?)\|", lambda match: r"\\x7c" if match[1] else r"\|", line)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def markdown_block(text: str, language: str = "") -> str:
    """Return `text` as a fenced code block of Markdown; without line breaks around it."""
    shown = visible(text).strip("\n")
    # Longer than any run of backticks in the text, or the text would close the block.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", shown))])
    return f"{fence}{language}\n{shown}\n{fence}"


def html_text(text: str) -> str:
    """Return `text` for an element or a quoted attribute of HTML, with hidden characters written out."""
    return html.escape(visible(text))
