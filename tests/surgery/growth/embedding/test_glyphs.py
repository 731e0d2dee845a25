"""Glyphs: pictures of strings, exact to the grey, from any font."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.growth.embedding.glyphs import Font, Glyphs, Image, codepoint_box, open_font, resize, resize_width

BAR = "0041:" + "80" * 16  # a bar at the left, 8 dots wide
WIDE = "4E2D:" + "FFFF" * 16  # all ink, 16 dots wide


def drawn(strings: Sequence[str], font: Font, cell: int = 32) -> Image:
    found = np.empty((len(strings), cell, cell), np.uint8)
    for numbers, bitmaps in Glyphs(font, cell=cell).bitmaps(strings):
        found[numbers] = bitmaps
    return found


def mean_over_areas(row: Sequence[int], width: int) -> list[int]:
    """The rule, in fractions."""
    step = Fraction(len(row), width)
    means = []
    for at in range(width):
        begin, end = at * step, (at + 1) * step
        shares = [max(Fraction(0), min(end, j + 1) - max(begin, Fraction(j))) for j in range(len(row))]
        mean = sum(share * value for share, value in zip(shares, row, strict=True)) / step
        means.append(int(mean + Fraction(1, 2)))
    return means


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 40))
def test_resizing_takes_means_over_areas_rounded_half_up(row: list[int], width: int) -> None:
    assert resize_width(np.array(row, np.uint8), width).tolist() == mean_over_areas(row, width)


def test_resizing_keeps_an_image_of_the_same_size_and_repeats_dots_in_a_multiple() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (resize(image, 3, 4) == image).all()
    assert (resize(image, 6, 8) == np.kron(image, np.ones((2, 2), np.uint8))).all()


def test_a_string_longer_than_fp32_is_exact_for_is_resized_right() -> None:
    row = np.full(70_001, 255, np.uint8)
    assert resize_width(row, 3).tolist() == [255, 255, 255]


def test_each_string_is_the_row_of_its_cells_whatever_is_drawn_beside_it() -> None:
    font = open_font(None, height=32)
    together = drawn(["ab", "c", "abc", "ab"], font)
    assert (together[0] == together[3]).all()
    for string, bitmap in zip(["ab", "c", "abc"], together, strict=False):
        assert (drawn([string], font)[0] == bitmap).all()
    cells = [resize(drawn([character], font)[0], 32, 16) for character in "ab"]
    assert (resize_width(np.concatenate(cells, axis=1), 32) == together[0]).all()


def test_spaces_are_seen_and_counted() -> None:
    bitmaps = drawn(["a", " a", "a ", " ", "  ", "   "], open_font(None, height=32))
    assert len(np.unique(bitmaps.reshape(6, -1), axis=0)) == 6
    assert bitmaps.reshape(6, -1).any(axis=1).all()


def test_letters_of_three_alphabets_that_look_alike_are_alike() -> None:
    latin, greek, cyrillic, other = drawn(["A", "Α", "А", "Б"], open_font(None, height=32))
    assert (latin == greek).all() and (latin == cyrillic).all() and not (latin == other).all()


def test_characters_that_a_font_lacks_are_boxes_with_their_codepoint() -> None:
    strings = ["中", "丮", "\n", "\t", "\u200d", "\U0001f600", "\U0010ffff", "a"]
    glyphs = Glyphs(open_font(None, height=32), cell=32)
    bitmaps = np.concatenate([part for _, part in glyphs.bitmaps(strings)])
    assert len(np.unique(bitmaps.reshape(len(strings), -1), axis=0)) == len(strings)
    assert {"中", "\n", "\U0001f600"} <= glyphs.missing and "a" not in glyphs.missing


def test_a_box_has_its_digits_inside() -> None:
    box = codepoint_box(0x4E2D) // 255
    assert box[0].all() and box[-1].all() and box[:, 0].all() and box[:, -1].all()
    four = ["#.#", "#.#", "###", "..#", "..#"]
    assert ["".join(".#"[dot] for dot in row) for row in box[2:7, 4:7]] == four
    assert not box[1, 1:-1].any() and not box[14, 1:-1].any()
    assert codepoint_box(0x10FFFF).shape == (16, 16) and not (codepoint_box(0x1F600) == codepoint_box(0x1F601)).all()


def test_unifont_is_read_dot_by_dot(tmp_path: Path) -> None:
    path = tmp_path / "unifont.hex"
    path.write_text(f"{BAR}\n\n{WIDE}\n")
    font = open_font(path, height=16)
    assert font.name == "unifont.hex" and len(font.hash) == 32
    bar, wide, both = drawn(["A", "中", "A中"], font, cell=16)
    assert (bar[:, :2] == 255).all() and not bar[:, 2:].any()  # 8 dots become 16 pixels
    assert (wide == 255).all()
    # 8 and 16 dots become 16 pixels: each is the mean over a dot and a half.
    assert both[0].tolist() == mean_over_areas([255] + [0] * 7 + [255] * 16, 16)


def test_a_combining_mark_alone_lies_inside_its_cell() -> None:
    assert drawn(["\u0301"], open_font(None, height=32)).any()


@pytest.mark.parametrize("cell", [6, 31, 130])
def test_a_size_that_cannot_be_is_refused(cell: int) -> None:
    with pytest.raises(SurgeryError, match=f"--cell: got {cell}, expected an even number from 8 to 128"):
        Glyphs(open_font(None, height=32), cell=cell)


def test_fonts_that_are_none_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"no.ttf: cannot be read \(No such file"):
        open_font(tmp_path / "no.ttf", height=32)
    (tmp_path / "text.ttf").write_text("hello")
    with pytest.raises(SurgeryError, match=r"text.ttf: is no font that can be drawn"):
        open_font(tmp_path / "text.ttf", height=32)
    (tmp_path / "bad.hex").write_text(f"{BAR}\n0042:12\n")
    with pytest.raises(SurgeryError, match=r"bad.hex:2: is no glyph \(1 bytes of dots\)"):
        open_font(tmp_path / "bad.hex", height=32)
    (tmp_path / "empty.hex").write_text("\n")
    with pytest.raises(SurgeryError, match="holds no glyph"):
        open_font(tmp_path / "empty.hex", height=32)
