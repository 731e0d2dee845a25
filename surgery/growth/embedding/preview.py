"""The preview of a glyph embedding (specimen.png): pictures of tokens, and of tokens that look alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from surgery.growth.embedding.glyphs import INK, Image
from surgery.reporting.plots import INK as TEXT
from surgery.reporting.plots import SOFT, WIDTH, blank_canvas, render_figure
from surgery.reporting.report import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, SAMPLES = 8, 64
GROUPS_ACROSS, MOST_GROUPS = 2, 8
LONGEST, LONGEST_LINE = 13, 52  # characters above a picture, and beside one
# Inches: the margin, a picture's side, a small picture's, and the heights of a title, a heading, a row and a small row.
MARGIN, SIDE, SMALL, TITLE, HEADING, ROW, LINE = 0.2, 0.58, 0.42, 0.45, 0.4, 0.92, 0.6


def embedding_preview(
    strings: Sequence[str], bitmaps: Image, groups: Sequence[Sequence[int]], *, title: str, caption: str = ""
) -> Figure:
    """Draw 64 tokens, evenly spread over the ids, as the model sees them, and the largest groups that look alike.

    Args:
        strings: (V,) of the tokens.
        bitmaps: (V, cell, cell) uint8, 255 for ink.
        groups: ids of tokens with equal rows, the largest group first.
    """
    # unique: a small vocabulary has fewer than 64 ids.
    samples = np.unique(np.linspace(0, len(strings) - 1, min(SAMPLES, len(strings))).astype(int)).tolist()
    alike = groups[:MOST_GROUPS]
    below = TITLE + ROW * -(-len(samples) // COLUMNS)
    height = below + HEADING + LINE * -(-len(alike) // GROUPS_ACROSS) + MARGIN
    canvas = blank_canvas(height)
    # One panel measured in inches: separate panels would take a second to lay out.
    canvas.figure.set_layout_engine("none")
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _write(axes, MARGIN, TITLE / 2, title, size=11.5, weight="bold")
    for at, index in enumerate(samples):
        x, y = MARGIN + (WIDTH - 2 * MARGIN) / COLUMNS * (at % COLUMNS), TITLE + ROW * (at // COLUMNS)
        _write(axes, x, y + 0.12, _shortened(_printable(strings[index]), LONGEST), size=7.5)
        _picture(axes, bitmaps[index], x, y + 0.22, SIDE)
    heading = "Tokens with one row, the largest groups first" if alike else "No two tokens share a row"
    _write(axes, MARGIN, below + HEADING / 2, heading, size=9.5)
    for at, group in enumerate(alike):
        x = MARGIN + (WIDTH - 2 * MARGIN) / GROUPS_ACROSS * (at % GROUPS_ACROSS)
        y = below + HEADING + LINE * (at // GROUPS_ACROSS)
        _picture(axes, bitmaps[group[0]], x, y, SMALL)
        _write(axes, x + LINE, y + 0.1, f"{len(group)} tokens", size=8, color=SOFT)
        names = "   ".join(_label(strings[index]) for index in group)
        _write(axes, x + LINE, y + 0.32, _shortened(names, LONGEST_LINE), size=8)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    return render_figure(canvas, title, caption)


def _picture(axes: Axes, bitmap: Image, x: float, y: float, side: float) -> None:
    extent = (x, x + side, y + side, y)
    axes.imshow(INK - bitmap, cmap="gray", vmin=0, vmax=INK, interpolation="nearest", extent=extent)
    axes.plot([x, x + side, x + side, x, x], [y, y, y + side, y + side, y], color=SOFT, linewidth=0.5)


def _write(
    axes: Axes, x: float, y: float, text: str, *, size: float, color: str = TEXT, weight: str = "normal"
) -> None:
    axes.text(x, y, text, fontsize=size, color=color, fontweight=weight, va="center", parse_math=False)


def _printable(string: str) -> str:
    """Return `string` with spaces as ␣, and characters that matplotlib's font lacks as escapes."""
    known = _characters()
    return "".join("␣" if c == " " else c if c in known else c.encode("unicode_escape").decode() for c in string)


@cache
def _characters() -> frozenset[str]:
    """Return the characters that the font of matplotlib's texts has."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(c for c in map(chr, FT2Font(findfont("DejaVu Sans")).get_charmap()) if c.isprintable())


def _label(string: str) -> str:
    """Return `string`, a single character with its codepoint: nothing else tells those apart that look alike."""
    points = " ".join(f"U+{ord(character):04X}" for character in string)
    return f"{_printable(string)} {points}" if len(string) == 1 else _printable(string)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
