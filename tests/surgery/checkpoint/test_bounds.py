"""Files that are hostile by their size: refused by what they claim, or read in a time in proportion to it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from surgery.checkpoint import checkpoint, safetensors_header
from surgery.checkpoint.inspect import inspect_checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.sentencepiece_model import MAX_FIELDS
from surgery.checkpoint.vocabulary import align_rows, read_vocabulary
from surgery.errors import SurgeryError
from surgery.io import safe_paths

SECONDS = 20  # far above what any of these takes, on a slow machine too, and far below what the square of it would take
MEGABYTES = 500


def write_empty(path: Path, names: Iterable[str], **fields: object) -> Path:
    """A file of tensors of no element, one for each name."""
    table = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | fields for name in names}
    body = json.dumps(table, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(body)) + body)
    return path


def failure(ref: Path) -> str:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(ref)
    return str(caught.value)


def test_too_many_tensors_of_one_file_are_counted_and_not_parsed(tmp_path: Path) -> None:
    path = write_empty(tmp_path / "model.safetensors", map(str, range(safetensors_header.MAX_TENSORS + 1)))
    began = time.monotonic()
    assert "the header names 100,001 tensors, more than the 100,000 that a file may have" in failure(path)
    assert time.monotonic() - began < 2


def test_too_many_tensors_are_found_however_their_keys_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 10)
    path = write_empty(tmp_path / "model.safetensors", map(str, range(11)))
    path.write_bytes(path.read_bytes().replace(b"data_offsets", b"data\\u005foffset"))
    body = path.read_bytes()[8:].replace(b'offset"', b'offsets"')
    path.write_bytes(struct.pack("<Q", len(body)) + body)
    assert "the header names 11 tensors, more than the 10" in failure(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[' + b"0," * 3_000_000 + b'0],"data_offsets":[0,0]}}', "has about 3,000,0"),
        (b'{"a":' + b"[" * 3_000_001, "has about 3,000,00"),
        (b'{"a":' + b"[" * 100_000, "the header is not JSON"),
        (b'{"' + b"a." * 501 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "has 1,002 characters"),
        (b'{"a":{"dtype":"F32","shape":[' + b"1," * 64 + b'0],"data_offsets":[0,0]}}', '"a" has 65 dimensions'),
    ],
    ids=["numbers", "brackets", "nesting", "name", "rank"],
)
def test_absurd_headers_are_refused(body: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body)
    assert message in failure(path)


def test_tensors_of_all_shards_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 100)
    for shard in range(3):
        write_empty(tmp_path / f"{shard}.safetensors", (f"{shard}.{i}" for i in range(40)))
    assert "has 120 tensors or more, and a checkpoint may have 100" in failure(tmp_path)


def test_weight_files_are_counted_before_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARDS", 5)
    monkeypatch.setattr(safe_paths, "MAX_FILES", 5)
    for shard in range(6):
        (tmp_path / f"{shard}.safetensors").touch()
    assert "holds 6 files *.safetensors, more than the 5 that it may" in failure(tmp_path)
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(6)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has 6 weight files, more than the 5 that a checkpoint may have" in failure(tmp_path)


def test_names_of_many_incomplete_sets_of_shards_take_no_time_each_for_all(tmp_path: Path) -> None:
    for number in range(3_000):
        (tmp_path / f"a{number}-00001-of-99999.safetensors").touch()
    began = time.monotonic()
    assert "lacks shards that the others' names count" in failure(tmp_path)
    assert time.monotonic() - began < SECONDS


def test_an_index_may_have_so_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 5)
    index = {"weight_map": {str(i): "1.safetensors" for i in range(6)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has 6 tensors or more, and a checkpoint may have 5" in failure(tmp_path)


def test_many_indexes_are_not_all_read(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"{number}.safetensors.index.json").write_text("{}")
    assert "11 indexes, more than 10" in failure(tmp_path)


MANY: Mapping[str, list[str]] = {
    "stacks of their own": [f"a{i}.{j}.attn.{k}" for i in range(5_000) for j in (0, 1) for k in "abcde"],
    "experts": [f"model.layers.{i}.experts.{j}.{k}" for i in (0, 1) for j in range(12_500) for k in ("w1", "w2")],
    "layers": [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(50_000)],
    "embeddings": [f"a{i}.embed_tokens.weight" for i in range(50_000)],
}


@pytest.mark.parametrize("kind", MANY)
def test_a_structure_of_many_parts_is_found_in_linear_time(kind: str, tmp_path: Path) -> None:
    path = write_empty(tmp_path / "model.safetensors", MANY[kind], shape=[0, 0])
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    began = time.monotonic()
    description = inspect_checkpoint(open_checkpoint(path.parent))
    assert time.monotonic() - began < SECONDS
    assert description["tensors"] == 50_000
    assert len(description["notes"]) < 100


MEASURED = """
import resource, sys
from surgery.checkpoint.inspect import inspect_checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    inspect_checkpoint(open_checkpoint(sys.argv[1]))
except SurgeryError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory_of(folder: Path) -> tuple[float, str]:
    """MB that `surgery inspect` takes beyond the imports, and what it says."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1_000  # ru_maxrss is in bytes there, in kB here
    return int(done.stdout) * unit / 1e6, done.stderr


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    """A file of `size` bytes that takes no place on the disk: `start`, then zeros."""
    path.write_bytes(start)
    os.truncate(path, size)


@pytest.mark.parametrize("case", ["config", "header", "tensors"])
def test_memory_is_bounded(case: str, tmp_path: Path) -> None:
    write_empty(tmp_path / "model.safetensors", ["a"])
    if case == "config":
        sparse(tmp_path / "config.json", 300_000_000, b"{")
    elif case == "header":
        sparse(tmp_path / "model.safetensors", 100_000_000, struct.pack("<Q", 93_000_000) + b"{")
    else:
        # As many as fit the header's bytes: none of them is parsed.
        write_empty(tmp_path / "model.safetensors", map(str, range(500_000)))
    megabytes, text = memory_of(tmp_path)
    assert "more than the" in text
    assert megabytes < MEGABYTES


def test_pieces_of_a_sentencepiece_model_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a\x00" * (MAX_FIELDS + 1))
    began = time.process_time()
    with pytest.raises(SurgeryError, match="is no whole sentencepiece model \\(more than 1,100,000 fields\\)"):
        read_vocabulary(tmp_path)
    assert time.process_time() - began < SECONDS
    sparse(path, 40_000_000)
    with pytest.raises(SurgeryError, match="has 40,000,000 bytes, more than the 32,000,000"):
        read_vocabulary(tmp_path)


def test_rows_of_an_embedding_are_never_listed_for_a_claim(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary is not None
    with pytest.raises(SurgeryError, match="an embedding with 1,099,511,627,776 rows is more than the 50,000,000"):
        align_rows(vocabulary, vocabulary, 2**40, 1)
    path = write_empty(tmp_path / "model.safetensors", ["a"], shape=[2**40, 0])
    assert "more than a tensor without elements may claim" in failure(path)
