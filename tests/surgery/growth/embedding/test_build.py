"""Frozen embeddings: the same bytes every time, their hash in the manifest, and every pair of equal rows reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from support.architectures import ARCHITECTURES
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from surgery.engine.manifest import read_manifest
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.growth.embedding.build import make_embedding
from surgery.growth.embedding.embedding_folder import open_embedding
from surgery.growth.embedding.glyphs import Glyphs, open_font
from surgery.growth.embedding.tables import bit_table, duplicate_rows, principal_table, separate_duplicates
from surgery.growth.embedding.token_text import token_strings
from surgery.io.hashing import hash_bytes, hash_parts

LETTERS = [chr(point) for point in (*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0x391, 0x3A2), *range(0x410, 0x450))]
WORDS = [f"{a}{b}" for a in "ABab xyАО" for b in "ABabOoxyоАОΑ"]
VOCAB = ["<s>", *LETTERS, *WORDS]


def save_tokenizer(folder: Path, vocab: list[str] = VOCAB) -> str:
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocab)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(vocab[0], special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=vocab[0]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tok")


def table_of(folder: Path) -> np.ndarray:
    return load_file(folder / "embedding.safetensors")["embedding"].numpy()


def bitmaps_of(strings: list[str], cell: int) -> np.ndarray:
    found = np.empty((len(strings), cell, cell), np.uint8)
    for numbers, drawn in Glyphs(open_font(None, height=cell), cell=cell).bitmaps(strings):
        found[numbers] = drawn
    return found.reshape(len(strings), -1)


def alike(rows: np.ndarray) -> list[list[int]]:
    """Groups of equal rows, by comparing each with each."""
    groups = defaultdict(list)
    for number in range(len(rows)):
        groups[next(other for other in range(number + 1) if (rows[other] == rows[number]).all())].append(number)
    return sorted((g for g in groups.values() if len(g) > 1), key=lambda g: (-len(g), g[0]))


def model_with(tokenizer: str, folder: Path, *, rows: int, width: int = 32) -> Path:
    config = ARCHITECTURES["llama"]()
    config.vocab_size, config.hidden_size = rows, width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_the_folder_is_an_embedding_with_its_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    report = make_embedding(tokenizer, tmp_path / "emb", width=24, cell=16)
    opened = open_embedding(tmp_path / "emb")
    assert (opened.vocab_size, opened.width, opened.weight.dtype) == (len(VOCAB), 24, "F32")
    assert [path.name for path in opened.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    assert token_strings(AutoTokenizer.from_pretrained(tmp_path / "emb")) == VOCAB
    assert opened.hash == report.hash == hash_parts([hash_bytes(table_of(tmp_path / "emb").tobytes())])
    assert (
        opened.manifest["kind"] == "embedding" and opened.manifest["report"]["details"]["font"] == "DejaVuSansMono.ttf"
    )
    assert verify(str(tmp_path / "emb")).ok
    assert (tmp_path / "emb" / "specimen.png").read_bytes().startswith(b"\x89PNG")
    assert report.table().rows


@pytest.mark.parametrize("kind", ["glyphs", "bits", "random"])
def test_the_same_request_gives_the_same_bytes_on_any_number_of_threads(
    tokenizer: str, tmp_path: Path, kind: str
) -> None:
    code = (
        "import sys; from pathlib import Path; from surgery.growth.embedding.build import make_embedding; "
        f"make_embedding({tokenizer!r}, Path(sys.argv[1]), kind={kind!r}, width=32, seed=3)"
    )
    make_embedding(tokenizer, tmp_path / "here", kind=kind, width=32, seed=3)
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "there").iterdir())
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_principal_axes_are_those_of_an_fp64_reference_up_to_sign() -> None:
    rows = bitmaps_of(VOCAB, 16)
    table, kept, _ = principal_table(rows, 12, normalise=False)
    reference = PCA(12, svd_solver="full").fit(rows.astype(np.float64))
    expected = reference.transform(rows.astype(np.float64))
    signs = np.sign((table * expected).sum(axis=0))
    np.testing.assert_allclose(table * signs, expected, rtol=0, atol=1e-3)  # of values up to 2,000, in fp32
    assert kept == pytest.approx(reference.explained_variance_ratio_.sum(), abs=1e-9)


def test_a_full_width_is_a_rotation() -> None:
    rows = bitmaps_of(VOCAB, 8)
    table, kept, rank = principal_table(rows, 64, normalise=False)
    distances = torch.cdist(torch.from_numpy(rows).double(), torch.from_numpy(rows).double())
    rotated = torch.cdist(torch.from_numpy(table).double(), torch.from_numpy(table).double())
    torch.testing.assert_close(rotated, distances, rtol=1e-5, atol=1e-2)
    assert kept == pytest.approx(1.0)
    assert not table[:, rank:].any() and np.linalg.matrix_rank(rows - rows.mean(axis=0)) == rank


def test_rows_of_glyphs_have_norm_one_unless_asked_otherwise(tokenizer: str, tmp_path: Path) -> None:
    make_embedding(tokenizer, tmp_path / "unit", width=24, cell=16)
    make_embedding(tokenizer, tmp_path / "raw", width=24, cell=16, normalise=False)
    unit, raw = table_of(tmp_path / "unit").astype(np.float64), table_of(tmp_path / "raw").astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)


def test_every_pair_of_tokens_that_look_alike_is_reported(tokenizer: str, tmp_path: Path) -> None:
    report = make_embedding(tokenizer, tmp_path / "emb", width=64, cell=16)
    expected = alike(bitmaps_of(VOCAB, 16))
    assert duplicate_rows(table_of(tmp_path / "emb")) == expected
    listed = json.loads((tmp_path / "emb" / "collisions.json").read_text())
    assert [group["ids"] for group in listed["groups"]] == expected
    assert ["A", "Α", "А"] in [group["surfaces"] for group in listed["groups"]]
    assert (report.collisions.rows, report.collisions.groups) == (sum(map(len, expected)), len(expected))
    assert read_manifest(tmp_path / "emb")["report"]["collisions"]["rows"] == report.collisions.rows


def test_unique_tells_every_token_apart_and_leaves_the_others_alone(tokenizer: str, tmp_path: Path) -> None:
    report = make_embedding(tokenizer, tmp_path / "unique", width=64, cell=16, unique=True)
    make_embedding(tokenizer, tmp_path / "plain", width=64, cell=16)
    unique, plain = table_of(tmp_path / "unique"), table_of(tmp_path / "plain")
    assert report.before is not None and report.before.rows == sum(map(len, duplicate_rows(plain))) > 0
    assert report.collisions.rows == 0 and not alike(unique)
    moved = {number for _, *others in duplicate_rows(plain) for number in others}
    assert {int(number) for number in np.flatnonzero((unique != plain).any(axis=1))} == moved
    distances = np.linalg.norm(unique - plain, axis=1)[sorted(moved)]
    assert (distances > 5e-3).all() and (distances < 1.01e-2).all()
    np.testing.assert_allclose(np.linalg.norm(unique, axis=1), 1, atol=1e-6)


def test_ties_that_cannot_be_broken_are_an_error() -> None:
    table = np.ones((20, 1), np.float32)
    with pytest.raises(SurgeryError, match=r"cannot be told apart at width 1. Give a larger --width"):
        separate_duplicates(table, duplicate_rows(table), seed=0, normalise=True)


def test_bits_are_those_of_the_id_each_repeated(tokenizer: str, tmp_path: Path) -> None:
    report = make_embedding(tokenizer, tmp_path / "emb", kind="bits", width=48)
    expected = [[float(bit) for bit in f"{number:016b}" for _ in range(3)] for number in range(len(VOCAB))]
    assert table_of(tmp_path / "emb").tolist() == expected
    assert (report.collisions.rows, report.zero_rows) == (0, 1)


def test_more_ids_take_more_bits() -> None:
    assert bit_table(65_536, 16)[-1].tolist() == [1.0] * 16
    assert bit_table(65_537, 17)[-1].tolist() == [1.0] + [0.0] * 16
    with pytest.raises(SurgeryError, match="--width: got 16, expected a multiple of 17, the bits of 65,537 ids"):
        bit_table(65_537, 16)


def test_random_rows_depend_on_the_seed_alone(tokenizer: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_embedding(tokenizer, tmp_path / name, kind="random", width=200, seed=seed)
    a, b, c = (table_of(tmp_path / name) for name in "abc")
    assert (a == b).all() and not (a == c).any()
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-6)
    assert abs(a.mean()) < 1e-3 and a.std() == pytest.approx(200**-0.5, rel=1e-2)


def test_a_table_is_another_models_embedding(tokenizer: str, tmp_path: Path) -> None:
    model = model_with(tokenizer, tmp_path / "model", rows=len(VOCAB) + 8)
    weights = load_file(model / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    make_embedding(tokenizer, tmp_path / "emb", kind="table", source=str(model))
    assert (table_of(tmp_path / "emb") == weights[: len(VOCAB)]).all()
    assert read_manifest(tmp_path / "emb")["inputs"]["source"]["tensors_read"] == 1
    alone = make_embedding(tokenizer, tmp_path / "alone", kind="table", source=str(model / "model.safetensors"))
    assert alone.details["tokens_of_source"] == "not known, for it has no tokenizer"
    make_embedding(tokenizer, tmp_path / "narrow", kind="table", source=str(model), width=8)
    reference = PCA(8, svd_solver="full").fit_transform(weights[: len(VOCAB)].astype(np.float64))
    np.testing.assert_allclose(np.abs(table_of(tmp_path / "narrow")), np.abs(reference), atol=1e-6)


def test_a_table_of_other_tokens_is_refused(tokenizer: str, tmp_path: Path) -> None:
    few = model_with(tokenizer, tmp_path / "few", rows=100)
    with pytest.raises(SurgeryError, match=rf"its embedding has 100 rows, and .* needs {len(VOCAB)}"):
        make_embedding(tokenizer, tmp_path / "emb", kind="table", source=str(few))
    other = save_tokenizer(tmp_path / "other", ["<s>", *reversed(VOCAB[1:])])
    model = model_with(other, tmp_path / "model", rows=len(VOCAB))
    with pytest.raises(SurgeryError, match=r"has another vocabulary: .* have another id"):
        make_embedding(tokenizer, tmp_path / "emb", kind="table", source=str(model))
    wide = model_with(tokenizer, tmp_path / "wide", rows=len(VOCAB))
    with pytest.raises(SurgeryError, match="--width: got 64, expected at most 32, the width of"):
        make_embedding(tokenizer, tmp_path / "emb", kind="table", source=str(wide), width=64)
    weights = load_file(wide / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 1] = torch.nan
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r'"model.embed_tokens.weight" holds NaN'):
        make_embedding(tokenizer, tmp_path / "emb", kind="table", source=str(wide))
    assert not (tmp_path / "emb").exists() and not (tmp_path / "emb.partial").exists()


def test_rows_beyond_the_tokenizer_are_unused_tokens(tokenizer: str, tmp_path: Path) -> None:
    make_embedding(tokenizer, tmp_path / "emb", width=24, cell=16, rows=len(VOCAB) + 3)
    assert open_embedding(tmp_path / "emb").vocab_size == len(VOCAB) + 3
    last = table_of(tmp_path / "emb")[-3:]
    assert len(np.unique(last, axis=0)) == 3


def test_what_is_there_is_kept_unless_it_may_be_replaced(tokenizer: str, tmp_path: Path) -> None:
    make_embedding(tokenizer, tmp_path / "emb", kind="random", width=8)
    before = table_of(tmp_path / "emb")
    with pytest.raises(SurgeryError, match="exists already"):
        make_embedding(tokenizer, tmp_path / "emb", kind="random", width=8, seed=1)
    assert (table_of(tmp_path / "emb") == before).all()
    make_embedding(tokenizer, tmp_path / "emb", kind="random", width=8, seed=1, overwrite=True)
    assert not (table_of(tmp_path / "emb") == before).any()


def test_what_a_killed_run_left_is_begun_anew_and_another_jobs_work_is_not(tokenizer: str, tmp_path: Path) -> None:
    partial = tmp_path / "emb.partial"
    partial.mkdir()
    (partial / "embedding.safetensors").write_bytes(b"half")
    (partial / "stale.json").write_bytes(b"half")
    (tmp_path / ".emb.lock").touch()
    make_embedding(tokenizer, tmp_path / "emb", kind="random", width=8)
    assert open_embedding(tmp_path / "emb").width == 8
    assert not partial.exists() and not (tmp_path / "emb" / "stale.json").exists()
    partial = tmp_path / "other.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("{}\n")
    with pytest.raises(SurgeryError, match="holds another job's work"):
        make_embedding(tokenizer, tmp_path / "other", kind="random", width=8)
    assert (partial / "journal.jsonl").exists()


def test_a_tokenizer_that_only_its_models_config_explains_is_saved_with_its_class(tmp_path: Path) -> None:
    folder = Path(save_tokenizer(tmp_path / "tok"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    make_embedding(str(folder), tmp_path / "emb", kind="random", width=8)
    saved = json.loads((tmp_path / "emb" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] and saved["eos_token"] == "<s>"
    assert token_strings(AutoTokenizer.from_pretrained(tmp_path / "emb")) == VOCAB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "letters"}, r"--kind: got 'letters', expected one of glyphs, bits, random, table"),
        ({"width": 300, "cell": 16}, r"--width: got 300, expected at most 256, the values of a bitmap \(16 × 16\)"),
        ({"width": 1000}, r"--width: got 1,000, expected at most \d+, the tokens"),
        ({"cell": 31}, r"--cell: got 31"),
        ({"kind": "bits"}, r"--width: bits need one"),
        ({"kind": "bits", "width": 20}, r"--width: got 20, expected a multiple of 16"),
        ({"kind": "random", "width": 0}, r"--width: got 0, expected 1 or more"),
        ({"kind": "random", "width": 8, "font": Path("x.ttf")}, r"--font: only glyphs are drawn, got kind random"),
        ({"kind": "bits", "width": 16, "cell": 16}, r"--cell: only glyphs are drawn, got kind bits"),
        ({"kind": "random", "width": 8, "source": "x"}, r"--from: only a table has one"),
        ({"kind": "table"}, r"--from: a table needs a model"),
        ({"font": Path("no.ttf"), "width": 8}, r"no.ttf: cannot be read"),
        ({"rows": 3, "width": 8}, r"--rows: got 3 rows, expected \d+ or more"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tokenizer: str, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(SurgeryError, match=message) as caught:
        make_embedding(tokenizer, tmp_path / "emb", **options)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "emb").exists()


def test_what_is_no_embedding_is_not_opened_as_one(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="no such folder or file"):
        open_embedding(tmp_path / "nowhere")
    with pytest.raises(SurgeryError, match=r"no \.safetensors file"):
        open_embedding(tokenizer)
    make_embedding(tokenizer, tmp_path / "emb", kind="random", width=8)
    save_file({"embedding": torch.zeros(3, 8)}, tmp_path / "emb" / "embedding.safetensors")
    with pytest.raises(SurgeryError, match='"embedding" is not what the manifest says'):
        open_embedding(tmp_path / "emb")
    manifest = json.loads((tmp_path / "emb" / "surgery.json").read_text())
    for tensors in (None, [], {}, {"embedding": {"dtype": "F32", "shape": [3, 8]}}):
        (tmp_path / "emb" / "surgery.json").write_text(json.dumps(manifest | {"tensors": tensors}))
        with pytest.raises(SurgeryError, match=r'"embedding" is not what the manifest says|surgery\.json: tensors'):
            open_embedding(tmp_path / "emb")
    (tmp_path / "emb" / "surgery.json").write_text(json.dumps(manifest | {"kind": "model"}))
    with pytest.raises(SurgeryError, match="holds a model, expected an embedding"):
        open_embedding(tmp_path / "emb")
