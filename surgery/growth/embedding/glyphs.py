"""Draw strings as square bitmaps: one cell per character, and the row of cells resized to a square.

After arXiv 2507.04886. Fonts are TTF or OTF files or GNU Unifont's `.hex`; bitmaps are uint8, 0 (paper) to 255 (ink).
Cells are half as wide as high; a wide character (16 × 16 in Unifont) takes two. Three deviations from the paper:

- Resizing takes means over areas and keeps greys; black and white would lose strokes thinner than a pixel.
- A space has a mark at its foot, as text editors show it; otherwise all runs of spaces would be blank.
- A character that a font lacks, or draws without ink, is a box with its codepoint in it, as in Unifont.
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
from surgery.io.input_files import read_bytes

Image = npt.NDArray[np.uint8]

INK = 255
DEFAULT_FONT = "DejaVuSansMono.ttf"  # matplotlib ships it
HEX = ".hex"
SMALLEST, LARGEST = 8, 128  # of a bitmap's side: below, letters merge; above, PCA takes too much memory (P² in fp64)
WIDE_FROM = 1.5  # width of a character, in cells, from which it takes two
UNIFONT = 16  # height in dots of Unifont's glyphs, and of those drawn here
MAX_EXACT = 2**24  # whole numbers up to it are exact in fp32
CHUNK = 2**23  # pixels that are resized at a time: 32 MiB in fp32

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

    hash: of the file. draw: returns a character as an image of the font's height, or None if the font lacks it.
    """

    name: str
    hash: str
    draw: Callable[[str], Image | None]


def open_font(path: Path | None, *, height: int) -> Font:
    """Open the font file `path`; by default DejaVu Sans Mono, which comes with matplotlib.

    Args:
        height: of a cell, in pixels: outlines are drawn so that the font's ascent and descent fill it.

    Raises:
        SurgeryError: the file cannot be read, or holds no font.
    """
    if path is None:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / DEFAULT_FONT
    try:
        data = read_bytes(path)
    except SurgeryError as error:
        raise usage_error(error.what, where=path, hint="Give a font's file.") from error
    draw = _hex_glyphs(data, path) if path.suffix == HEX else _outlines(path, height)
    return Font(path.name, hash_bytes(data).hex(), draw)


class Glyphs:
    """Renderer of strings as bitmaps of `cell` × `cell` pixels in `font`; every character is drawn once.

    Raises:
        SurgeryError: `cell` is odd, or not between 8 and 128.
    """

    def __init__(self, font: Font, *, cell: int) -> None:
        check_cell(cell)
        self._font = font
        self._height, self._width = cell, cell // 2
        self._cells: list[Image] = []
        self._cells_of: dict[str, tuple[int, ...]] = {}
        self._missing: set[str] = set()

    @property
    def missing(self) -> frozenset[str]:
        """Characters drawn so far that the font lacks, or has without ink (the space not counted)."""
        return frozenset(self._missing)

    def bitmaps(self, strings: Sequence[str]) -> Iterator[tuple[Sequence[int], Image]]:
        """Yield (indices of some strings, their bitmaps (n, cell, cell)) until all are drawn; none may be empty."""
        by_length: dict[int, list[int]] = {}
        rows = [[cell for character in string for cell in self._draw(character)] for string in strings]
        for index, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(index)
        cells = np.stack(self._cells) if self._cells else np.zeros((0, self._height, self._width), np.uint8)
        # Strings of one length are resized together.
        for length, indices in sorted(by_length.items()):
            # A vocabulary's rows of cells together would not fit into memory.
            room = max(1, CHUNK // (length * self._height * self._width))
            for begin in range(0, len(indices), room):
                some = indices[begin : begin + room]
                drawn = cells[np.array([rows[index] for index in some])]  # (n, length, height, width)
                stretched = drawn.transpose(0, 2, 1, 3).reshape(len(some), self._height, length * self._width)
                yield some, resize_width(stretched, self._height)

    def _draw(self, character: str) -> tuple[int, ...]:
        """Draw `character` unless it was drawn before; return the indices of its cells."""
        if character not in self._cells_of:
            image = self._image(character)
            first = len(self._cells)
            self._cells += np.split(image, image.shape[1] // self._width, axis=1)
            self._cells_of[character] = tuple(range(first, len(self._cells)))
        return self._cells_of[character]

    def _image(self, character: str) -> Image:
        """Return the image of `character`, one or two cells wide."""
        drawn = _dots(SPACE_MARK) if character == " " else self._font.draw(character)
        # Glyphs without ink would all look alike.
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
    """Raise SurgeryError if bitmaps cannot be `cell` pixels wide and high."""
    if not SMALLEST <= cell <= LARGEST or cell % 2:
        raise usage_error(f"got {cell}, expected an even number from {SMALLEST} to {LARGEST}", where="--cell")


def resize(image: Image, height: int, width: int) -> Image:
    """Resize `image` (h, w) to (height, width) by means over areas, rounded half up; first across, then down."""
    return resize_width(resize_width(image, width).T, height).T


def resize_width(images: Image, width: int) -> Image:
    """Resize images (…, w) to (…, width): each pixel is the exact mean over the area it covers, rounded half up.

    Enlarging follows the same rule.
    """
    weights, total = _overlaps(images.shape[-1], width)
    # Products and sums are whole numbers that the dtype represents exactly, so that their order does not matter.
    exact = np.float32 if INK * total < MAX_EXACT else np.float64
    sums = images.astype(exact) @ weights.astype(exact)
    means: Image = ((2 * sums.astype(np.int64) + total) // (2 * total)).astype(np.uint8)
    return means


def codepoint_box(codepoint: int) -> Image:
    """Return a box of 16 × 16 dots with the codepoint in it in hexadecimal: two rows of two or three digits."""
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
    """Return the overlaps of `old` equal parts with `new` equal parts of the same length, and the sum of each column.

    Entry (j, i) of (old, new) is the overlap of the j-th old with the i-th new part, in units that make all integers.
    """
    common = math.gcd(old, new)
    # An old part is `new` units long and a new one `old` units, both divided by their greatest common divisor.
    before, after = new // common, old // common
    begins, ends = np.arange(old)[:, None] * before, np.arange(new) * after
    inside = np.minimum(begins + before, ends + after) - np.maximum(begins, ends)
    return np.maximum(inside, 0), after


def _outlines(path: Path, height: int) -> Callable[[str], Image | None]:
    """Return a function that draws the outlines of a TTF or OTF file, antialiased."""
    from matplotlib.ft2font import FT2Font
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    def load(size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)

    try:
        covered = FT2Font(str(path)).get_charmap()
        # Ascent and descent are rounded up, so that the largest size that fits can only be found by trying.
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
        # A combining mark extends to the left, over the character before it: here it gets a cell of its own.
        begin = min(0, math.floor(left))
        end = max(round(font.getlength(character)), math.ceil(right), begin + 1)
        picture = Picture.new("L", (end - begin, height))
        ImageDraw.Draw(picture).text((-begin, ascent), character, font=font, fill=INK, anchor="ls")
        return np.asarray(picture)

    return draw


def _hex_glyphs(data: bytes, path: Path) -> Callable[[str], Image | None]:
    """Return a function that draws the glyphs of a `.hex` file.

    Each has a line `CODEPOINT:DOTS` and is 8 or 16 dots wide and 16 high.
    """
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
