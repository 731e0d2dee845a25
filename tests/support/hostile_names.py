"""Names as a stranger may choose them, and what of them must not reach a terminal, a model card or a page."""

from __future__ import annotations

import unicodedata

HOSTILE_NAMES = {
    "ansi colour": "\x1b[31mred\x1b[0m",
    "ansi clear": "\x1b[2J\x1b[Hgone",
    "title": "\x1b]0;owned\x07name",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x1b\\name",
    "hyperlink": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "c1": "\x9b31mname\x9d0;x\x9c",
    "overwritten": "bad\rgood",
    "erased": "bad\b\b\bgood\x7f",
    "bell": "name\x07\x00",
    "direction": "abc\u202egnp.exe",
    "isolates": "\u2066abc\u2069\u200e\u200f\u061c",
    "invisible": "a\u200bd\ufeffm\u2060i\u00adn\u180e",
    "tags": "name\U000e0041\U000e0042\U000e007f",
    "selectors": "n\ufe00\U000e0100",
    "fillers": "a\u3164\uffa0\u115fb",
    "separators": "a\u2028b\u2029c\x85d\x0b\x0c",
    "surrogate": "a\ud800b",
    "forged line": "x\nerror: all is well\n\nwarning: none",
    "forged row": "x\r\n| a | b |\r\n|---|---|",
    "rich markup": "[red]x[/red][link=http://evil]y[/link][/]",
    "emoji code": ":smile: :skull:",
    "script": "<script>alert(1)</script>",
    "picture": "<img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'y',
    "closing": "</title></style></script><svg onload=alert(1)>",
    "comment": "<!-- x --><!--",
    "cdata": "]]><![CDATA[",
    "entity": "&lt;b&gt; &#60;",
    "markdown picture": "![x](http://tracker/p.png)",
    "markdown link": "[x](javascript:alert(1))",
    "reference": "[x][y] [^1]\n\n[y]: http://evil",
    "autolink": "<http://evil> http://evil www.evil.com a@evil.com",
    "code": "a`b``c```d",
    "backtick": "`",
    "fence": "x\n```\n<b>out</b>\n~~~",
    "emphasis": "**a** _b_ ~~c~~ __init__",
    "heading": "x\n# Heading\n---\n- item",
    "cells": "a|b\\|c\\",
    "front matter": "x\n---\nlicense: mit\n---\n",
    "formula": "$x^2$ $$\\frac{1}{0}$$ $\\undefined{",
    "jinja": "{{ 7 * 7 }}{% raw %}",
    "unicode": "模型 модель \U0001f600 é",
    "long": "x" * 100_000,
    "empty": "",
    "blank": "   ",
}


def hidden_characters(text: str, allowed: str = "\n\t") -> list[str]:
    """The control, format and surrogate characters of `text`, and separators of lines: what nobody sees."""
    return [
        character
        for character in text
        if character not in allowed
        and (
            unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
            or character in "\u3164\uffa0\u115f\ufe00\ufe0f"
        )
    ]
