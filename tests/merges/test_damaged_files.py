"""Every file of a model that a merge reads, damaged at every place: a result or a `SurgeryError`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.architectures import add_tokenizer, build, sibling
from support.damage import failures_of
from support.merges import SPECS

from merges.config.parse import parse_configs
from merges.run import merge


def model(folder: Path) -> Path:
    """A model with every kind of side file that a merge of tokenizers reads."""
    add_tokenizer(build("mixtral", folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        "chat_template": "{{ messages }}",
    }
    files = {
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": [1, 2], "bad_words_ids": [[1, 2]], "temperature": 0.5},
        "special_tokens_map.json": {"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<s>"]},
        "added_tokens.json": {"<pad>": 1},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.json",
    ],
)
def test_files_of_a_model_whose_tokenizer_is_merged(name: str, tmp_path: Path) -> None:
    a = model(tmp_path / "a")
    b = add_tokenizer(sibling(a, tmp_path / "b", seed=1), [f"w{i}" for i in range(5, 60)])
    text = f"""
merge_method: linear
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{weight: 1}}
tokenizer_source: union
chat_template: auto
"""
    configs = parse_configs(text, "c.yml", methods=SPECS)
    assert failures_of(a / name, lambda: merge(configs, tmp_path / "out", dry_run=True)) == []


def test_config_of_a_model_whose_layers_are_moved(tmp_path: Path) -> None:
    a = model(tmp_path / "a")
    sources = ", ".join(f"{{sources: [{{model: {a}, layer_range: [{i}, 2]}}]}}" for i in (0, 1))
    configs = parse_configs(f"merge_method: passthrough\nslices: [{sources}]\n", "c.yml", methods=SPECS)
    assert failures_of(a / "config.json", lambda: merge(configs, tmp_path / "out", dry_run=True)) == []
