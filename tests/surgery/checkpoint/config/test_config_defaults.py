"""What is filled in is what the installed transformers fills in."""

from __future__ import annotations

import json

import pytest
import transformers
from support.config_defaults import config_classes, describe_class
from transformers import CONFIG_MAPPING

from surgery.checkpoint.config.config_defaults import DEFAULTS, config_class

FILE = json.loads(DEFAULTS.read_text(encoding="utf-8"))
# One of each way of filling in: sizes from others, windows, patterns, rotary embeddings by kind of layer and by other
# names, configs inside, and keys that no rule gives.
SOME = (
    *("llama", "qwen2", "qwen2_moe", "gemma3_text", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "modernbert", "granite"),
    *("deepseek_v3", "smollm3", "qwen2_5_vl", "mistral3", "paligemma", "gemma3n_text", "dbrx"),
)


def of_file(entry: object) -> object:
    return json.loads(json.dumps(entry))


def test_the_file_is_of_the_pinned_transformers() -> None:
    assert FILE["transformers"] == transformers.__version__


@pytest.mark.parametrize("model_type", SOME)
def test_a_family_is_described_as_the_generator_describes_it(model_type: str) -> None:
    assert of_file(describe_class(CONFIG_MAPPING[model_type])) == FILE["classes"][model_type]


@pytest.mark.slow
def test_all_families_are_described_as_the_generator_describes_them() -> None:
    classes = config_classes()
    assert classes.keys() == FILE["classes"].keys()
    assert {name: of_file(describe_class(cls)) for name, cls in classes.items()} == FILE["classes"]


def test_few_families_have_keys_that_no_rule_gives() -> None:
    unknown = [name for name, entry in FILE["classes"].items() if entry.get("unknown")]
    assert len(unknown) < len(FILE["classes"]) / 7
    common = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "mistral", "mixtral", "gemma2", "gemma3_text")
    common += ("gemma4_text", "phi3", "granite", "cohere2", "olmo2", "olmo3", "gpt_oss", "deepseek_v3", "smollm3")
    assert not set(common) & set(unknown)


def test_families_that_transformers_does_not_know_have_no_entry() -> None:
    assert config_class("of_somebody") is None
