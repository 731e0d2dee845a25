"""The specimen of a glyph embedding: a sheet with pictures of tokens, and of those that look alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from surgery.growth.embedding.glyphs import INK, Image
from surgery.reporting.plots import INK as TEXT
from surgery.reporting.plots import SOFT, WIDTH, blank_canvas, finished
from surgery.reporting.report import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, SAMPLES = 8, 64
GROUPS_ACROSS, MOST_GROUPS = 2, 8
LONGEST, LONGEST_LINE = 13, 52  # characters above a picture, and beside one
# Inches: the margin, a picture's side, a small one's, and the heights of a title, a heading and a row of either.
MARGIN, SIDE, SMALL, TITLE, HEADING, ROW, LINE = 0.2, 0.58, 0.42, 0.45, 0.4, 0.92, 0.6


def embedding_preview(
    surfaces: Sequence[str], bitmaps: Image, groups: Sequence[Sequence[int]], *, title: str, caption: str = ""
) -> Figure:
    """64 tokens, evenly spread over the ids, as the model sees them; below them the largest groups that look alike.

    Args:
        surfaces: (V,) the tokens' strings.
        bitmaps: (V, cell, cell) uint8, 255 for ink.
        groups: ids of tokens with one row, the largest group first.
    """
    shown = np.unique(np.linspace(0, len(surfaces) - 1, min(SAMPLES, len(surfaces))).astype(int)).tolist()
    alike = groups[:MOST_GROUPS]
    below = TITLE + ROW * -(-len(shown) // COLUMNS)
    height = below + HEADING + LINE * -(-len(alike) // GROUPS_ACROSS) + MARGIN
    canvas = blank_canvas(height)
    # One panel measured in inches: panels of their own would take a second to lay out.
    canvas.figure.set_layout_engine("none")
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _write(axes, MARGIN, TITLE / 2, title, size=11.5, weight="bold")
    for at, number in enumerate(shown):
        x, y = MARGIN + (WIDTH - 2 * MARGIN) / COLUMNS * (at % COLUMNS), TITLE + ROW * (at // COLUMNS)
        _write(axes, x, y + 0.12, _shortened(_safe(surfaces[number]), LONGEST), size=7.5)
        _picture(axes, bitmaps[number], x, y + 0.22, SIDE)
    heading = "Tokens with one row, the largest groups first" if alike else "No two tokens share a row"
    _write(axes, MARGIN, below + HEADING / 2, heading, size=9.5)
    for at, group in enumerate(alike):
        x = MARGIN + (WIDTH - 2 * MARGIN) / GROUPS_ACROSS * (at % GROUPS_ACROSS)
        y = below + HEADING + LINE * (at // GROUPS_ACROSS)
        _picture(axes, bitmaps[group[0]], x, y, SMALL)
        _write(axes, x + LINE, y + 0.1, f"{len(group)} tokens", size=8, color=SOFT)
        names = "   ".join(_named(surfaces[number]) for number in group)
        _write(axes, x + LINE, y + 0.32, _shortened(names, LONGEST_LINE), size=8)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    return finished(canvas, title, caption)


def _picture(axes: Axes, bitmap: Image, x: float, y: float, side: float) -> None:
    place = (x, x + side, y + side, y)
    axes.imshow(INK - bitmap, cmap="gray", vmin=0, vmax=INK, interpolation="nearest", extent=place)
    axes.plot([x, x + side, x + side, x, x], [y, y, y + side, y + side, y], color=SOFT, linewidth=0.5)


def _write(
    axes: Axes, x: float, y: float, text: str, *, size: float, color: str = TEXT, weight: str = "normal"
) -> None:
    axes.text(x, y, text, fontsize=size, color=color, fontweight=weight, va="center", parse_math=False)


def _safe(surface: str) -> str:
    """`surface` with a space as ␣, and as an escape what the sheet's font has not."""
    known = _characters()
    shown = ("␣" if c == " " else c if c in known else c.encode("unicode_escape").decode() for c in surface)
    return "".join(shown)


@cache
def _characters() -> frozenset[str]:
    """What the font of matplotlib's texts can write."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(c for c in map(chr, FT2Font(findfont("DejaVu Sans")).get_charmap()) if c.isprintable())


def _named(surface: str) -> str:
    """`surface`, and the codepoints of a short one: those that look alike are read apart by nothing else."""
    points = " ".join(f"U+{ord(character):04X}" for character in surface)
    return f"{_safe(surface)} {points}" if len(surface) == 1 else _safe(surface)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
