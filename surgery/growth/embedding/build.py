"""The frozen embedding that models are grown on: made of what a tokenizer's tokens look like, or without any meaning.

In comes a tokenizer, out comes the folder EMB: `embedding.safetensors` with one F32 tensor "embedding" (V, width), the
tokenizer's files, `collisions.json` with the tokens that share a row, and surgery.json; for glyphs also specimen.png.
After arXiv 2507.04886 and 2507.07129: nothing that a model trains changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from surgery.checkpoint.checkpoint import StoredTensor
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.tokenizer_files import tokenizer_files
from surgery.checkpoint.vocabulary import CONFIG
from surgery.checkpoint.write_table import Table, write_table
from surgery.engine.manifest import build_manifest_of_files, command_record, read_manifest, write_manifest
from surgery.errors import SurgeryError, usage_error
from surgery.growth.embedding import tables
from surgery.growth.embedding.from_model import embedding_rows
from surgery.growth.embedding.glyphs import Glyphs, check_cell, open_font
from surgery.growth.embedding.preview import embedding_preview
from surgery.growth.embedding.tables import Groups
from surgery.growth.embedding.token_strings import OpenTokenizer, open_tokenizer, token_strings
from surgery.io.atomic import check_free, commit_folder, copy_file, create_partial_folder, file_sizes, write_file
from surgery.io.hashing import KEY, hash_bytes, hash_tensors
from surgery.io.json_io import read_json, to_json
from surgery.models.loading import save_tokenizer
from surgery.reporting.report import Column
from surgery.reporting.report import Table as Printed
from surgery.runtime.progress import Progress, silent

Kind = Literal["glyphs", "bits", "random", "table"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND = "embedding"
TENSOR = "embedding"
WEIGHTS = "embedding.safetensors"
COLLISIONS = "collisions.json"
SPECIMEN = "specimen.png"
CELL = 32  # of the paper's bitmaps
LARGEST_GROUPS = 10  # that the manifest names
NAMED = 8  # tokens of each


@dataclass(frozen=True)
class Collisions:
    """Rows that are the same to the bit. largest: surfaces of the first tokens in the largest groups."""

    rows: int
    groups: int
    largest: tuple[tuple[str, ...], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class EmbeddingReport:
    """What was made.

    hash: of the tensor. normalised: whether rows have norm 1. collisions: in the table written; before: in the table
    before ties were broken. zero_rows: that have no norm. details: what belongs to one kind only (font, kept variance).
    """

    out: Path
    kind: Kind
    vocab_size: int
    width: int
    hash: str
    normalised: bool
    collisions: Collisions
    before: Collisions | None
    zero_rows: int
    details: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """As the manifest says it."""
        return {name: value for name, value in asdict(self).items() if name != "out"}

    def table(self) -> Printed:
        """The report, for people."""
        facts = [
            ("tokens", self.vocab_size),
            ("width", self.width),
            ("norm of rows", "1" if self.normalised else "as made"),
            *((name.replace("_", " "), value) for name, value in self.details.items() if name != "font_hash"),
            *([("rows of zeros", self.zero_rows)] if self.zero_rows else []),
            *([("tokens that shared a row", self.before.rows)] if self.before else []),
            ("tokens that share a row", self.collisions.rows),
            ("groups that they form", self.collisions.groups),
            ("hash", self.hash),
        ]
        return Printed(f"Frozen embedding: {self.kind}", [Column(""), Column("")], facts)


@dataclass(frozen=True)
class Embedding:
    """A frozen embedding on disk: `weight` (vocab_size, width) in F32, `hash` as its manifest says."""

    folder: Path
    weight: StoredTensor
    vocab_size: int
    width: int
    hash: str
    manifest: Mapping[str, Any]

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files of its tokenizer, sorted."""
        return tokenizer_files(self.folder)


@dataclass(frozen=True)
class _Made:
    table: Table
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bitmaps: np.ndarray | None = None


def open_embedding(ref: str | Path) -> Embedding:
    """Opens a folder that `make_embedding` wrote, by its headers alone.

    Raises:
        SurgeryError: `ref` is something else, or tensor and manifest contradict each other.
    """
    checkpoint = open_checkpoint(ref)
    folder = checkpoint.folder
    if folder is None:
        raise usage_error("is a file, expected an embedding's folder", where=ref)
    manifest = read_manifest(folder)
    if manifest.get("kind") != KIND:
        raise usage_error(
            f"holds a {manifest.get('kind')}, expected an embedding", where=ref, hint="`surgery grow embed` writes one."
        )
    weight = checkpoint.tensors.get(TENSOR)
    try:
        said = manifest["tensors"][TENSOR]
        as_said = weight is not None and (weight.dtype, list(weight.shape)) == (said["dtype"], said["shape"])
        found = str(said[KEY])
    except (KeyError, TypeError):
        as_said = False
    if weight is None or not as_said or (weight.dtype, len(weight.shape)) != ("F32", 2):
        raise SurgeryError(f'"{TENSOR}" is not what the manifest says', where=folder, hint="Make the embedding again.")
    vocab_size, width = weight.shape
    return Embedding(folder, weight, vocab_size, width, found, manifest)


def make_embedding(
    tokenizer: str,
    out: Path,
    *,
    kind: Kind = "glyphs",
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
    """Writes a frozen embedding for `tokenizer` to the folder `out`; the same request gives the same bytes.

    Args:
        tokenizer: its folder, or a model that has one.
        kind: glyphs, each token's picture along the pictures' principal axes; bits, those of the token's id; random,
            N(0, 1); table, the token embedding of `source`.
        width: of a row. By default cell² for glyphs (a rotation of the pictures), and the source's for a table, of
            which less are its principal axes.
        rows: V; by default as many as the tokenizer's ids need.
        font: a TTF, OTF or `.hex` file; by default DejaVu Sans Mono. cell: pixels on a picture's side.
        normalise: whether each row is divided by its norm; by default for glyphs and random.
        unique: rows that are alike are moved apart; see `surgery.growth.embedding.tables.separate_duplicates`.
        seed: of random, and of the directions that rows are moved in.

    Raises:
        SurgeryError: no such tokenizer, font or source; source and tokenizer do not fit; the width is not possible;
            `out` exists; the disk is full.
    """
    _check_options(kind, width, font=font, source=source, cell=cell)
    check_free(out, overwrite=overwrite)
    opened = open_tokenizer(tokenizer)
    names = token_strings(opened.tokenizer, rows=rows, where=tokenizer)
    unit = kind in ("glyphs", "random") if normalise is None else normalise
    if kind == "glyphs":
        made = _glyphs(names, width or cell * cell, font=font, cell=cell, normalise=unit, progress=progress)
    elif kind == "table":
        made = _stored(opened, str(source), len(names), width, normalise=unit)
    elif kind == "bits":
        table = tables.bit_table(len(names), width or 0)
        made = _Made(tables.normalize_rows(table) if unit else table)
    else:
        made = _Made(tables.random_table(len(names), width or 0, seed=seed, normalise=unit))
    groups = tables.duplicate_rows(made.table)
    before = None
    if unique:
        before = _count(groups, names)
        tables.separate_duplicates(made.table, groups, seed=seed, normalise=unit)
        groups = []
    zero_rows = int((~made.table.any(axis=1)).sum())
    size = made.table.shape[1]
    report = EmbeddingReport(
        out, kind, len(names), size, "", unit, _count(groups, names), before, zero_rows, made.details
    )
    # As it is typed: what was left to its default is left out.
    options = {
        "kind": kind,
        "width": width,
        "rows": rows,
        "font": None if font is None else str(font),
        "cell": cell if kind == "glyphs" else None,
        "from": source,
        "normalise": normalise,
        "unique": unique or None,
        "seed": seed,
    }
    command = command_record("grow embed", [tokenizer], **options)
    partial = create_partial_folder(out, overwrite=overwrite)
    with progress("Writing", made.table.nbytes) as advance:
        found = write_table(partial / WEIGHTS, TENSOR, made.table)
        advance(made.table.nbytes)
    report = replace(report, hash=found)
    _write_tokenizer(partial, opened)
    _write_collisions(partial / COLLISIONS, groups, names)
    if made.bitmaps is not None:
        write_file(partial / SPECIMEN, _specimen(names, made, groups, report))
    manifest = build_manifest_of_files(
        KIND,
        command,
        inputs={"tokenizer": _tokenizer_entry(opened), **made.inputs},
        report=report.summary(),
        files=file_sizes(partial),
        tensors={TENSOR: ("F32", made.table.shape, found)},
        versions={"numpy": np.__version__, **made.versions},
    )
    write_manifest(partial, manifest)
    commit_folder(partial, out, overwrite=overwrite)
    return report


def _check_options(kind: str, width: int | None, *, font: Path | None, source: str | None, cell: int) -> None:
    if kind not in KINDS:
        raise usage_error(f"got {kind!r}, expected one of {', '.join(KINDS)}", where="--kind")
    if font is not None and kind != "glyphs":
        raise usage_error(f"only glyphs are drawn, got kind {kind}", where="--font")
    if (source is not None) != (kind == "table"):
        what = "a table needs a model to take it from" if kind == "table" else f"only a table has one, got kind {kind}"
        raise usage_error(what, where="--from")
    if cell != CELL and kind != "glyphs":
        raise usage_error(f"only glyphs are drawn, got kind {kind}", where="--cell")
    if width is None and kind in ("bits", "random"):
        raise usage_error(f"{kind} need one", where="--width", hint="Give the width that the model is to have.")
    if width is not None and width < 1:
        raise usage_error(f"got {width}, expected 1 or more", where="--width")
    if kind == "glyphs":
        check_cell(cell)
        _check_width(width or cell * cell, cell * cell, f"the values of a bitmap ({cell} × {cell})")


def _check_width(width: int, most: int, what: str) -> None:
    if width > most:
        raise usage_error(f"got {width:,}, expected at most {most:,}, {what}", where="--width")


def _glyphs(
    names: Sequence[str], width: int, *, font: Path | None, cell: int, normalise: bool, progress: Progress
) -> _Made:
    from PIL import __version__ as pillow
    from PIL import features

    _check_width(width, len(names), "the tokens, for pictures vary along no more axes")
    opened = open_font(font, height=cell)
    glyphs = Glyphs(opened, cell=cell)
    bitmaps = np.empty((len(names), cell, cell), np.uint8)
    with progress("Drawing", len(names), "steps") as advance:
        for numbers, drawn in glyphs.bitmaps(names):
            bitmaps[numbers] = drawn
            advance(len(numbers))
    flat = bitmaps.reshape(len(names), -1)
    table, kept, rank = tables.principal_table(flat, width, normalise=normalise)
    missing = glyphs.missing
    details = {
        "font": opened.name,
        "font_hash": opened.hash,
        "cell": cell,
        "variance_kept": kept,
        "axes_that_vary": rank,
        "characters_not_in_font": len(missing),
        "tokens_with_such": sum(not missing.isdisjoint(name) for name in names),
    }
    versions = {"pillow": pillow, "freetype": str(features.version("freetype2"))}
    return _Made(table, details, versions, bitmaps=bitmaps)


def _stored(opened: OpenTokenizer, source: str, rows: int, width: int | None, *, normalise: bool) -> _Made:
    table, name, entry, compared = embedding_rows(opened, source, rows)
    own = table.shape[1]
    _check_width(width or own, own, f"the width of {source}'s embedding")
    tokens = "the same" if compared else "not known, for it has no tokenizer"
    details: dict[str, Any] = {"source": source, "tensor": name, "tokens_of_source": tokens}
    if width is not None and width < own:
        _check_width(width, rows, "the tokens, for rows vary along no more axes")
        table, kept, rank = tables.principal_table(table, width, normalise=normalise)
        details |= {"variance_kept": kept, "axes_that_vary": rank}
    elif normalise:
        tables.normalize_rows(table)
    return _Made(table, details, inputs={"source": entry})


def _count(groups: Groups, names: Sequence[str]) -> Collisions:
    largest = tuple(tuple(names[number] for number in group[:NAMED]) for group in groups[:LARGEST_GROUPS])
    return Collisions(sum(map(len, groups)), len(groups), largest)


def _specimen(names: Sequence[str], made: _Made, groups: Groups, report: EmbeddingReport) -> bytes:
    assert made.bitmaps is not None
    title = f"{made.details['font']}, {report.vocab_size:,} tokens: {report.collisions.rows:,} share a row"
    return embedding_preview(names, made.bitmaps, groups, title=title).png


def _tokenizer_entry(opened: OpenTokenizer) -> dict[str, Any]:
    hashes = {path.relative_to(opened.folder).as_posix(): hash_bytes(path.read_bytes()).hex() for path in opened.files}
    place = {"ref": opened.ref, "repo_id": opened.repo_id, "revision": opened.revision}
    return {**place, "files": hashes, KEY: hash_tensors(hashes)}


def _write_tokenizer(folder: Path, opened: OpenTokenizer) -> None:
    for path in opened.files:
        copy_file(path, folder / path.relative_to(opened.folder))
    if "tokenizer_class" not in read_json(folder / CONFIG, missing={}):
        # The model's config said what the tokenizer is, special tokens included; here there is none.
        save_tokenizer(opened.tokenizer, folder)


def _write_collisions(path: Path, groups: Groups, names: Sequence[str]) -> None:
    listed = [{"ids": group, "surfaces": [names[number] for number in group]} for group in groups]
    write_file(path, to_json({"schema": 1, "rows": sum(map(len, groups)), "groups": listed}))
