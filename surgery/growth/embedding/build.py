"""Create the frozen embedding that models are grown on: of pictures of a tokenizer's tokens, or without any meaning.

The folder EMB holds `embedding.safetensors` with one F32 tensor "embedding" (V, width), the tokenizer's files,
`collisions.json` with the tokens that share a row, and surgery.json; for glyphs also specimen.png.
After arXiv 2507.04886 and 2507.07129: no training changes the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from surgery.checkpoint.table_file import Table, write_table
from surgery.checkpoint.vocabulary import CONFIG
from surgery.engine.manifest import build_manifest_of_files, command_record, write_manifest
from surgery.errors import usage_error
from surgery.growth.choices import EmbeddingKind
from surgery.growth.embedding import tables
from surgery.growth.embedding.embedding_folder import KIND, TENSOR, WEIGHTS
from surgery.growth.embedding.from_model import embedding_rows
from surgery.growth.embedding.glyphs import Glyphs, check_cell, open_font
from surgery.growth.embedding.preview import embedding_preview
from surgery.growth.embedding.report import Collisions, EmbeddingReport
from surgery.growth.embedding.tables import Groups
from surgery.growth.embedding.token_text import OpenTokenizer, open_tokenizer, token_strings
from surgery.io.atomic import file_sizes, write_file
from surgery.io.hashing import KEY, hash_bytes, hash_tensors
from surgery.io.input_files import read_bytes
from surgery.io.json_io import read_json, to_json
from surgery.io.output_files import copy_output
from surgery.io.output_folder import atomic_folder, check_free
from surgery.models.loading import save_tokenizer
from surgery.runtime.progress import Progress, silent

# The values are the CLI's choices and entries of manifests.
COLLISIONS = "collisions.json"
SPECIMEN = "specimen.png"
CELL = 32  # pixels on a side, as in the paper


@dataclass(frozen=True)
class _BuiltTable:
    """A table, and what reports, manifest and preview need of it. bitmaps: (V, cell, cell), for glyphs."""

    table: Table
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bitmaps: np.ndarray | None = None


def make_embedding(
    tokenizer: str,
    out: Path,
    *,
    kind: EmbeddingKind = "glyphs",
    width: int | None = None,
    rows: int | None = None,
    font: Path | None = None,
    cell: int = CELL,
    source: str | None = None,
    normalise: bool | None = None,
    unique: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> EmbeddingReport:
    """Write a frozen embedding for `tokenizer` to the folder `out`; the same arguments give the same bytes.

    Example:
        surgery.make_embedding("TOKENIZER", Path("EMB"), kind="glyphs", width=256)

    Args:
        tokenizer: its folder, or a model that has one.
        kind: glyphs, the picture of each token projected on the pictures' principal axes; bits, those of the token's
            id; random, N(0, 1); table, the token embedding of `source`.
        width: of a row. By default cell² for glyphs (a rotation of the pictures), and the source's for a table; a
            smaller one projects it on its principal axes.
        rows: V; by default as many as the tokenizer's ids need.
        font: a TTF, OTF or `.hex` file; by default DejaVu Sans Mono. cell: pixels on a picture's side.
        normalise: whether each row is divided by its norm; by default for glyphs and random.
        unique: equal rows are moved apart; see `surgery.growth.embedding.tables.separate_duplicates`.
        seed: of random tables, and of the directions that equal rows are moved in.

    Raises:
        SurgeryError: no such tokenizer, font or source; source and tokenizer do not fit; the width is not possible;
            `out` exists; the disk is full.
    """
    settings = _Settings(kind, width, rows, font, cell, source, normalise, unique, seed)
    settings.check()
    check_free(out, overwrite=overwrite)
    opened = open_tokenizer(tokenizer)
    strings = token_strings(opened.tokenizer, rows=rows, where=tokenizer)
    built = _build_table(settings, opened, strings, progress)
    groups = tables.duplicate_rows(built.table)
    before = None
    if unique:
        before = Collisions.of(groups, strings)
        tables.separate_duplicates(built.table, groups, seed=seed, normalise=settings.normalises)
        # None are left: `separate_duplicates` raises otherwise.
        groups = []
    report = _preview_report(out, settings, built, Collisions.of(groups, strings), before)
    command = command_record("grow embed", [tokenizer], **settings.as_typed())
    # The folder appears as a whole: a half-written embedding would be trained on for hours before anyone noticed.
    with atomic_folder(out, overwrite=overwrite) as partial:
        return _write_folder(partial, _Content(report, built, groups, strings, opened), command, progress)


@dataclass(frozen=True)
class _Settings:
    """The arguments of `make_embedding` that decide the table."""

    kind: EmbeddingKind
    width: int | None
    rows: int | None
    font: Path | None
    cell: int
    source: str | None
    normalise: bool | None
    unique: bool
    seed: int

    @property
    def normalises(self) -> bool:
        """Whether each row is divided by its norm."""
        return self.kind in ("glyphs", "random") if self.normalise is None else self.normalise

    def as_typed(self) -> dict[str, Any]:
        """Return the options of the command; those that were left to their default are None."""
        return {
            "kind": self.kind,
            "width": self.width,
            "rows": self.rows,
            "font": None if self.font is None else str(self.font),
            "cell": self.cell if self.kind == "glyphs" else None,
            "from": self.source,
            "normalise": self.normalise,
            "unique": self.unique or None,
            "seed": self.seed,
        }

    def check(self) -> None:
        """Raise SurgeryError for options that do not exist or do not fit each other."""
        kind, width = self.kind, self.width
        if kind not in get_args(EmbeddingKind):
            raise usage_error(f"got {kind!r}, expected one of {', '.join(get_args(EmbeddingKind))}", where="--kind")
        if self.font is not None and kind != "glyphs":
            raise usage_error(f"only glyphs are drawn, got kind {kind}", where="--font")
        if (self.source is not None) != (kind == "table"):
            missing = "a table needs a model to take it from"
            raise usage_error(missing if kind == "table" else f"only a table has one, got kind {kind}", where="--from")
        if self.cell != CELL and kind != "glyphs":
            raise usage_error(f"only glyphs are drawn, got kind {kind}", where="--cell")
        if width is None and kind in ("bits", "random"):
            raise usage_error(f"{kind} need one", where="--width", hint="Give the width that the model is to have.")
        if width is not None and width < 1:
            raise usage_error(f"got {width}, expected 1 or more", where="--width")
        if kind == "glyphs":
            check_cell(self.cell)
            most = self.cell * self.cell
            _check_width(width or most, most, f"the values of a bitmap ({self.cell} × {self.cell})")


def _build_table(settings: _Settings, opened: OpenTokenizer, strings: Sequence[str], progress: Progress) -> _BuiltTable:
    if settings.kind == "glyphs":
        return _glyph_table(strings, settings, progress)
    if settings.kind == "table":
        return _source_table(opened, settings, len(strings))
    if settings.kind == "bits":
        # `check` has made sure of a width here; 0 only satisfies the type checker.
        table = tables.bit_table(len(strings), settings.width or 0)
        return _BuiltTable(tables.normalize_rows(table) if settings.normalises else table)
    return _BuiltTable(
        tables.random_table(len(strings), settings.width or 0, seed=settings.seed, normalise=settings.normalises)
    )


def _preview_report(
    out: Path, settings: _Settings, built: _BuiltTable, collisions: Collisions, before: Collisions | None
) -> EmbeddingReport:
    """Return the report as far as it is known before anything is written: without the table's hash."""
    vocab_size, width = built.table.shape
    zero_rows = int((~built.table.any(axis=1)).sum())
    return EmbeddingReport(
        out,
        settings.kind,
        vocab_size,
        width,
        "",
        settings.normalises,
        collisions,
        before,
        zero_rows,
        built.details,
    )


@dataclass(frozen=True)
class _Content:
    """Everything that is written to an embedding's folder, except its manifest."""

    report: EmbeddingReport
    built: _BuiltTable
    groups: Groups
    strings: Sequence[str]
    tokenizer: OpenTokenizer


def _write_folder(folder: Path, content: _Content, command: Mapping[str, Any], progress: Progress) -> EmbeddingReport:
    """Write every file of the embedding to `folder`; return the report with the table's hash."""
    built, groups, strings = content.built, content.groups, content.strings
    with progress("Writing", built.table.nbytes) as advance:
        table_hash = write_table(folder / WEIGHTS, TENSOR, built.table)
        advance(built.table.nbytes)
    report = replace(content.report, hash=table_hash)
    _write_tokenizer(folder, content.tokenizer)
    _write_collisions(folder / COLLISIONS, groups, strings)
    if built.bitmaps is not None:
        write_file(folder / SPECIMEN, _preview(strings, built, groups, report))
    # Last, as it lists the sizes of all files before it.
    manifest = build_manifest_of_files(
        KIND,
        command,
        inputs={"tokenizer": _tokenizer_entry(content.tokenizer), **built.inputs},
        report=report.summary(),
        files=file_sizes(folder),
        tensors={TENSOR: ("F32", built.table.shape, table_hash)},
        versions={"numpy": np.__version__, **built.versions},
    )
    write_manifest(folder, manifest)
    return report


def _check_width(width: int, most: int, what: str) -> None:
    if width > most:
        raise usage_error(f"got {width:,}, expected at most {most:,}, {what}", where="--width")


def _glyph_table(strings: Sequence[str], settings: _Settings, progress: Progress) -> _BuiltTable:
    # Needed for glyphs alone, and slow to import.
    from PIL import __version__ as pillow
    from PIL import features

    cell = settings.cell
    width = settings.width or cell * cell
    _check_width(width, len(strings), "the tokens, for pictures vary along no more axes")
    font = open_font(settings.font, height=cell)
    glyphs = Glyphs(font, cell=cell)
    bitmaps = np.empty((len(strings), cell, cell), np.uint8)
    with progress("Drawing", len(strings), "steps") as advance:
        for indices, drawn in glyphs.bitmaps(strings):
            bitmaps[indices] = drawn
            advance(len(indices))
    # Kept as uint8: their sums are exact, and they take an eighth of the memory.
    flat = bitmaps.reshape(len(strings), -1)
    table, kept, rank = tables.principal_table(flat, width, normalise=settings.normalises)
    missing = glyphs.missing
    details = {
        "font": font.name,
        "font_hash": font.hash,
        "cell": cell,
        "variance_kept": kept,
        "axes_that_vary": rank,
        "characters_not_in_font": len(missing),
        "tokens_with_such": sum(not missing.isdisjoint(string) for string in strings),
    }
    # Other versions may draw other pixels, and so another embedding.
    versions = {"pillow": pillow, "freetype": str(features.version("freetype2"))}
    return _BuiltTable(table, details, versions, bitmaps=bitmaps)


def _source_table(opened: OpenTokenizer, settings: _Settings, rows: int) -> _BuiltTable:
    source, width = str(settings.source), settings.width
    table, name, entry, compared = embedding_rows(opened, source, rows)
    own = table.shape[1]
    _check_width(width or own, own, f"the width of {source}'s embedding")
    # Worth saying: rows of another vocabulary would silently stand for other tokens.
    tokens = "the same" if compared else "not known, for it has no tokenizer"
    details: dict[str, Any] = {"source": source, "tensor": name, "tokens_of_source": tokens}
    if width is not None and width < own:
        _check_width(width, rows, "the tokens, for rows vary along no more axes")
        table, kept, rank = tables.principal_table(table, width, normalise=settings.normalises)
        details |= {"variance_kept": kept, "axes_that_vary": rank}
    elif settings.normalises:
        tables.normalize_rows(table)
    return _BuiltTable(table, details, inputs={"source": entry})


def _preview(strings: Sequence[str], built: _BuiltTable, groups: Groups, report: EmbeddingReport) -> bytes:
    assert built.bitmaps is not None
    title = f"{built.details['font']}, {report.vocab_size:,} tokens: {report.collisions.rows:,} share a row"
    return embedding_preview(strings, built.bitmaps, groups, title=title).png


def _tokenizer_entry(opened: OpenTokenizer) -> dict[str, Any]:
    # Paths in the folder, not the disk: the same tokenizer elsewhere gives the same manifest.
    hashes = {path.relative_to(opened.folder).as_posix(): hash_bytes(read_bytes(path)).hex() for path in opened.files}
    source = {"ref": opened.ref, "repo_id": opened.repo_id, "revision": opened.revision}
    return {**source, "files": hashes, KEY: hash_tensors(hashes)}


def _write_tokenizer(folder: Path, opened: OpenTokenizer) -> None:
    for path in opened.files:
        copy_output(path, folder, path.relative_to(opened.folder).as_posix())
    if "tokenizer_class" not in read_json(folder / CONFIG, missing={}):
        # Old tokenizers rely on the model's config for their class and special tokens; here there is no such config.
        save_tokenizer(opened.tokenizer, folder)


def _write_collisions(path: Path, groups: Groups, strings: Sequence[str]) -> None:
    listed = [{"ids": group, "surfaces": [strings[index] for index in group]} for group in groups]
    write_file(path, to_json({"schema": 1, "rows": sum(map(len, groups)), "groups": listed}))
