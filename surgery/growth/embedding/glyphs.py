"""A string → its picture: one cell per character, and the row of cells resized to a square bitmap.

After arXiv 2507.04886: a token's bitmap is what it looks like. In comes a font, a TTF or OTF file or GNU Unifont's
`.hex`, out come bitmaps of uint8, 0 (paper) to 255 (ink). Cells are half as wide as high; a wide character (16 × 16 in
Unifont) takes two. Three deviations from the paper:

- Resizing takes means over areas and keeps greys, where black and white would lose strokes thinner than a pixel.
- A space has a mark at its foot, as in text editors that show it, or runs of spaces would all be blank.
- What a font lacks, or draws without ink, is a box with its codepoint in it, as Unifont's own are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from surgery.errors import SurgeryError, usage_error
from surgery.io.hashing import hash_bytes

Image = npt.NDArray[np.uint8]

INK = 255
DEFAULT_FONT = "DejaVuSansMono.ttf"  # matplotlib ships it
HEX = ".hex"
SMALLEST, LARGEST = 8, 128  # of a bitmap's side: below, letters run together; above, an axis more is 128 MiB of fp64
WIDE_FROM = 1.5  # widths of a cell, from which a character takes two
UNIFONT = 16  # height in dots of Unifont's glyphs, and of those drawn here
EXACT = 2**24  # whole numbers up to it are exact in fp32
STRETCH = 2**23  # values of rows of cells that are resized at a time: 32 MiB in fp32

SPACE_MARK = ("........",) * 11 + (".#....#.",) * 2 + (".######.",) + ("........",) * 2
# Three dots wide and five high, row by row.
_DIGITS = {
    "0": "### #.# #.# #.# ###",
    "1": ".#. ##. .#. .#. ###",
    "2": "##. ..# .#. #.. ###",
    "3": "##. ..# .#. ..# ##.",
    "4": "#.# #.# ### ..# ..#",
    "5": "### #.. ##. ..# ##.",
    "6": ".## #.. ### #.# ###",
    "7": "### ..# .#. .#. .#.",
    "8": "### #.# ### #.# ###",
    "9": "### #.# ### ..# ##.",
    "A": ".#. #.# ### #.# #.#",
    "B": "##. #.# ##. #.# ##.",
    "C": ".## #.. #.. #.. .##",
    "D": "##. #.# #.# #.# ##.",
    "E": "### #.. ##. #.. ###",
    "F": "### #.. ##. #.. #..",
}


@dataclass(frozen=True)
class Font:
    """A font for bitmaps of one size.

    hash: of the file. draw: a character as an image as high as the font draws it, ink on paper, or None where the font
    has no such character.
    """

    name: str
    hash: str
    draw: Callable[[str], Image | None]


def open_font(path: Path | None, *, height: int) -> Font:
    """The font in the file `path`; by default DejaVu Sans Mono, which comes with matplotlib.

    Args:
        height: of a cell, in pixels: outlines are drawn so that the font's ascent and descent fill it.

    Raises:
        SurgeryError: the file cannot be read, or holds no font.
    """
    if path is None:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / DEFAULT_FONT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise usage_error(f"cannot be read ({error.strerror})", where=path, hint="Give a font's file.") from error
    draw = _hex_glyphs(data, path) if path.suffix == HEX else _outlines(path, height)
    return Font(path.name, hash_bytes(data).hex(), draw)


class Glyphs:
    """Draws strings with `font` as bitmaps of `cell` × `cell`; every character is drawn once.

    Raises:
        SurgeryError: `cell` is odd, or not between 8 and 128.
    """

    def __init__(self, font: Font, *, cell: int) -> None:
        check_cell(cell)
        self._font = font
        self._height, self._width = cell, cell // 2
        self._cells: list[Image] = []
        self._places: dict[str, tuple[int, ...]] = {}
        self._missing: set[str] = set()

    @property
    def missing(self) -> frozenset[str]:
        """Characters drawn so far that the font lacks, or has without ink (the space not counted)."""
        return frozenset(self._missing)

    def bitmaps(self, strings: Sequence[str]) -> Iterator[tuple[Sequence[int], Image]]:
        """(numbers of some of the strings, their bitmaps (n, cell, cell)), until all are drawn; strings not empty."""
        by_length: dict[int, list[int]] = {}
        rows = [[place for character in string for place in self._place(character)] for string in strings]
        for number, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(number)
        cells = np.stack(self._cells) if self._cells else np.zeros((0, self._height, self._width), np.uint8)
        for length, numbers in sorted(by_length.items()):
            room = max(1, STRETCH // (length * self._height * self._width))
            for begin in range(0, len(numbers), room):
                some = numbers[begin : begin + room]
                drawn = cells[np.array([rows[number] for number in some])]  # (n, length, height, width)
                stretched = drawn.transpose(0, 2, 1, 3).reshape(len(some), self._height, length * self._width)
                yield some, resize_width(stretched, self._height)

    def _place(self, character: str) -> tuple[int, ...]:
        """Where the cells of `character` are."""
        if character not in self._places:
            image = self._image(character)
            first = len(self._cells)
            self._cells += np.split(image, image.shape[1] // self._width, axis=1)
            self._places[character] = tuple(range(first, len(self._cells)))
        return self._places[character]

    def _image(self, character: str) -> Image:
        """`character` as one or two cells."""
        drawn = _dots(SPACE_MARK) if character == " " else self._font.draw(character)
        if drawn is None or not drawn.any():
            self._missing.add(character)
            drawn = codepoint_box(ord(character))
        if drawn.shape[0] != self._height:  # drawn in dots, which keep their shape
            drawn = resize(drawn, self._height, max(1, drawn.shape[1] * self._height // drawn.shape[0]))
        room = self._width * (2 if drawn.shape[1] >= WIDE_FROM * self._width else 1)
        if drawn.shape[1] > room:
            return resize(drawn, self._height, room)
        before = (room - drawn.shape[1]) // 2
        return np.pad(drawn, ((0, 0), (before, room - drawn.shape[1] - before)))


def check_cell(cell: int) -> None:
    """Raises SurgeryError where bitmaps cannot be `cell` pixels wide and high."""
    if not SMALLEST <= cell <= LARGEST or cell % 2:
        raise usage_error(f"got {cell}, expected an even number from {SMALLEST} to {LARGEST}", where="--cell")


def resize(image: Image, height: int, width: int) -> Image:
    """`image` (h, w) → (height, width): means over areas, rounded half up; first across, then down."""
    return resize_width(resize_width(image, width).T, height).T


def resize_width(images: Image, width: int) -> Image:
    """(…, w) → (…, width): each value is the mean over what it covers of the w, rounded half up; exact.

    A narrower image is stretched by the same rule.
    """
    shares, total = _overlaps(images.shape[-1], width)
    # Products and sums are whole numbers that the dtype holds exactly: the order of adding them is of no account.
    exact = np.float32 if INK * total < EXACT else np.float64
    sums = images.astype(exact) @ shares.astype(exact)
    means: Image = ((2 * sums.astype(np.int64) + total) // (2 * total)).astype(np.uint8)
    return means


def codepoint_box(codepoint: int) -> Image:
    """A box of 16 × 16 dots with the codepoint in it, in hexadecimal: two rows of two digits, or of three."""
    digits = f"{codepoint:04X}" if codepoint <= 0xFFFF else f"{codepoint:06X}"
    box = np.zeros((UNIFONT, UNIFONT), np.uint8)
    box[[0, -1]] = box[:, [0, -1]] = INK
    half = len(digits) // 2
    left = (UNIFONT - 4 * half + 1) // 2
    for at, digit in enumerate(digits):
        top, begin = 2 + 7 * (at // half), left + 4 * (at % half)
        box[top : top + 5, begin : begin + 3] = _dots(_DIGITS[digit].split())
    return box


def _dots(rows: Sequence[str]) -> Image:
    return np.array([[INK * (dot == "#") for dot in row] for row in rows], np.uint8)


def _overlaps(old: int, new: int) -> tuple[npt.NDArray[np.int64], int]:
    """How much of the j-th of `old` equal parts lies in the i-th of `new`: (old, new), and the sum of each column."""
    common = math.gcd(old, new)
    # A part is `new` units long before, and `old` after, both divided by what they share.
    before, after = new // common, old // common
    begins, ends = np.arange(old)[:, None] * before, np.arange(new) * after
    inside = np.minimum(begins + before, ends + after) - np.maximum(begins, ends)
    return np.maximum(inside, 0), after


def _outlines(path: Path, height: int) -> Callable[[str], Image | None]:
    """Draws the outlines in a font's file, greys at their edges."""
    from matplotlib.ft2font import FT2Font
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    def load(size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)

    try:
        covered = FT2Font(str(path)).get_charmap()
        # Ascent and descent are rounded up, so that the largest size that fits is found by trying.
        font = next(font for size in range(2 * height, 0, -1) if sum((font := load(size)).getmetrics()) <= height)
    except (OSError, RuntimeError, StopIteration, ValueError) as error:
        raise usage_error(
            "is no font that can be drawn", where=path, hint="Give a TTF or OTF file, or GNU Unifont as .hex."
        ) from error
    ascent, _ = font.getmetrics()

    def draw(character: str) -> Image | None:
        if ord(character) not in covered:
            return None
        left, _, right, _ = font.getbbox(character, anchor="ls")
        # A combining mark hangs over what is before it: here it has a cell of its own, and lies inside.
        begin = min(0, math.floor(left))
        end = max(round(font.getlength(character)), math.ceil(right), begin + 1)
        picture = Picture.new("L", (end - begin, height))
        ImageDraw.Draw(picture).text((-begin, ascent), character, font=font, fill=INK, anchor="ls")
        return np.asarray(picture)

    return draw


def _hex_glyphs(data: bytes, path: Path) -> Callable[[str], Image | None]:
    """Draws the glyphs of a `.hex` file: a line `CODEPOINT:DOTS` each, 8 or 16 dots wide and 16 high."""
    glyphs: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        codepoint, _, dots = line.strip().partition(b":")
        try:
            glyph = bytes.fromhex(dots.decode("ascii"))
            if len(glyph) not in (UNIFONT, 2 * UNIFONT):
                raise ValueError(f"{len(glyph)} bytes of dots")
            glyphs[int(codepoint, 16)] = glyph
        except ValueError as error:
            raise SurgeryError(
                f"is no glyph ({error}), expected CODEPOINT:DOTS with 16 or 32 bytes of dots in hexadecimal",
                where=f"{path}:{number}",
            ) from error
    if not glyphs:
        raise usage_error("holds no glyph", where=path)

    def draw(character: str) -> Image | None:
        glyph = glyphs.get(ord(character))
        if glyph is None:
            return None
        bits = np.unpackbits(np.frombuffer(glyph, np.uint8)).reshape(UNIFONT, -1)
        return (bits * INK).astype(np.uint8)

    return draw
