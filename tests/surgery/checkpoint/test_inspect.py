"""`surgery inspect`'s facts: JSON for programs, tables for people."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.architectures import EXPERTS, add_tokenizer, build

from surgery.checkpoint.inspect import inspect_checkpoint, inspect_tables
from surgery.checkpoint.resolve import open_checkpoint


def test_description_is_json_and_prints(tmp_path: Path) -> None:
    folder = add_tokenizer(build("mixtral", tmp_path, max_shard_size="40KB"))
    checkpoint = open_checkpoint(folder)
    told = json.loads(json.dumps(inspect_checkpoint(checkpoint)))
    assert len(told["files"]) > 1 and told["bytes"] == checkpoint.n_bytes
    assert told["dtypes"]["BF16"]["parameters"] == told["parameters"] == checkpoint.n_parameters
    assert (told["layers"], told["heads"], told["kv_heads"], told["experts"]) == (2, 4, 2, EXPERTS)
    assert told["tokenizer"] and not told["chat_template"] and told["not_understood"] == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_checkpoint(open_checkpoint(folder))["chat_template"]
    facts, dtypes = inspect_tables(told)
    assert "4 × 8" in facts.to_markdown() and "BF16" in dtypes.to_markdown()


def test_what_is_not_understood_is_folded_over_layers(tmp_path: Path) -> None:
    file = build("llama", tmp_path) / "model.safetensors"
    wobbles = {f"model.layers.{layer}.wobble": torch.zeros(3) for layer in range(2)}
    save_file({**load_file(file), **wobbles}, file, metadata={"format": "pt"})
    *_, last = inspect_tables(inspect_checkpoint(open_checkpoint(tmp_path)))
    assert list(last.rows) == [("model.layers.*.wobble", 2)]
