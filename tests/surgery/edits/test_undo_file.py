"""An edit is undone only in the folder that it wrote; the bytes themselves are compared in test_edits.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import build

from surgery.checkpoint.checkpoint import INDEX
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head
from surgery.edits.heads import scale_heads
from surgery.edits.undo_file import UNDO, undo
from surgery.errors import SurgeryError


def test_undo_needs_the_folder_that_the_edit_wrote(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    with pytest.raises(SurgeryError) as caught:
        undo(str(base), tmp_path / "restored")
    assert str(caught.value) == (
        f"{base}: has no undo/undo.safetensors, so nothing can be undone. Give OUT of `surgery edit heads` or "
        "`experts`; of a model on the Hub, a local copy of the whole repository."
    )
    with pytest.raises(SurgeryError, match="is no folder that an edit wrote"):
        undo(str(base / "model.safetensors"), tmp_path / "restored")


def test_undo_refuses_other_weights(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0})
    scale_heads(str(base), tmp_path / "other", scales={Head(0, 0): 0.5})
    (tmp_path / "other" / UNDO).write_bytes((tmp_path / "out" / UNDO).read_bytes())
    with pytest.raises(SurgeryError) as caught:
        undo(str(tmp_path / "other"), tmp_path / "restored")
    assert str(caught.value) == (
        f"{tmp_path / 'other' / UNDO}: belongs to other weights: model.layers.0.self_attn.o_proj.weight is not what "
        "the edit wrote. Undo works on the folder as `surgery edit` wrote it."
    )
    wider = build("qwen3", tmp_path / "wider")
    (wider / UNDO).parent.mkdir()
    (wider / UNDO).write_bytes((tmp_path / "out" / UNDO).read_bytes())
    with pytest.raises(SurgeryError, match="belongs to other weights"):
        undo(str(wider), tmp_path / "restored")
    assert not list(tmp_path.glob("restored*"))


@pytest.mark.parametrize("name", [UNDO.as_posix(), "undo/UNDO.safetensors"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_shard_named_as_the_undo_file_is_not_replaced_by_it(tmp_path: Path, name: str, dry_run: bool) -> None:
    base = build("llama", tmp_path / "base", max_shard_size="10KB")
    index = base / INDEX
    shard = open_checkpoint(base).shards[0].name
    (base / name).parent.mkdir()
    (base / shard).rename(base / name)
    index.write_text(index.read_text().replace(shard, name))
    assert name in {one.name for one in open_checkpoint(base).shards}
    with pytest.raises(SurgeryError, match=f'OUT: "{name}" of the model has the name of a file that is written there'):
        scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0}, dry_run=dry_run)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_a_damaged_undo_file_gives_nothing(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0})
    path = tmp_path / "out" / UNDO
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SurgeryError, match=r"does not give back what was edited, it is damaged: model\.layers\.0"):
        undo(str(tmp_path / "out"), tmp_path / "restored")
    assert not list(tmp_path.glob("restored*"))


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "is no undo file"),
        ({"model_surgery_undo": "2"}, "is an undo file of version 2, this version reads 1. Use the version"),
        ({"model_surgery_undo": "1"}, 'has no readable "edits". Fetch the file again.'),
        ({"model_surgery_undo": "1", "edits": "[]"}, 'has no readable "edits"'),
        ({"model_surgery_undo": "1", "edits": '{"w": {"heads": [-1]}}'}, 'has no readable "edits"'),
        ({"model_surgery_undo": "1", "edits": "{"}, 'has no readable "edits"'),
    ],
)
def test_undo_files_are_read_without_trust(metadata: dict[str, str], text: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    (base / UNDO).parent.mkdir()
    save_file({"w": torch.zeros(2)}, base / UNDO, metadata=metadata)
    with pytest.raises(SurgeryError) as caught:
        undo(str(base), tmp_path / "restored")
    assert text in str(caught.value)


def test_a_dry_undo_writes_nothing(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0})
    assert undo(str(tmp_path / "out"), tmp_path / "restored", dry_run=True).edited == 1
    assert not list(tmp_path.glob("restored*"))
