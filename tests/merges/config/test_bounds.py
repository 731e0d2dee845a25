"""Configs that are hostile by their size: read in linear time, and refused where a merge could not end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.merges import SPECS

from merges.config.parse import MAX_DOCUMENTS, MAX_MODELS, parse_configs
from merges.config.schema import MergeConfig
from merges.config.settings import as_written
from surgery.errors import SurgeryError, closest
from surgery.io.yaml_models import MAX_YAML_BYTES

SECONDS = 30  # of processor time; what grows with the square took minutes


def parse(text: str) -> tuple[MergeConfig, ...]:
    assert len(text) <= MAX_YAML_BYTES
    return parse_configs(text, "c.yml", methods=SPECS)


def failure(text: str) -> str:
    with pytest.raises(SurgeryError) as caught:
        parse(text)
    return str(caught.value)


def models(count: int, entry: Callable[[int], str]) -> str:
    return "merge_method: linear\nmodels:\n" + "".join(f"- {entry(i)}\n" for i in range(count))


LARGE = {
    "models": models(5_900, lambda i: f"{{model: m{i}, parameters: {{weight: 1}}}}"),
    "one model many times": models(6_000, lambda i: "{model: m, parameters: {weight: 1}}"),
    "unknown keys": models(8_000, lambda i: f"{{model: m{i}, oops: 1}}"),
    "models that are no mappings": models(20_000, lambda i: f"m{i}"),
    "slices that are wrong": "merge_method: passthrough\nslices:\n"
    + "- {sources: [{model: a, layer_range: [1, 0]}]}\n" * 5_000,
    "keys": "merge_method: linear\n" + "".join(f"k{i}: 1\n" for i in range(20_000)),
    "parameters": "merge_method: linear\nparameters:\n" + "".join(f"  k{i}: 1\n" for i in range(18_000)),
    "tokens": "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ntokenizer:\n  tokens:\n"
    + "".join(f"    t{i}: {{source: zz}}\n" for i in range(8_000)),
    "documents": "".join(f"---\nname: d{i}\n" for i in range(10_000)),
    "filters": "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight:\n"
    + "".join(f"    - {{filter: f{i}, value: 1}}\n" for i in range(5_000)),
    "long keys": "merge_method: linear\n" + "".join(f"{'k' * 60_000}{i}: 1\n" for i in range(4)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_config_is_refused_in_linear_time(kind: str) -> None:
    began = time.process_time()
    assert failure(LARGE[kind]).startswith("c.yml")
    assert time.process_time() - began < SECONDS


def test_a_merge_has_so_many_models_and_a_file_so_many_documents() -> None:
    text = models(MAX_MODELS + 1, lambda i: f"{{model: m{i}, parameters: {{weight: 1}}}}")
    assert failure(text) == f"c.yml: names {MAX_MODELS + 1} models, more than the {MAX_MODELS} that one merge may have"
    assert len(parse(models(MAX_MODELS, lambda i: f"{{model: m{i}, parameters: {{weight: 1}}}}"))[0].models) == 500
    documents = "---\nname: x\n" * (MAX_DOCUMENTS + 1)
    assert (
        failure(documents) == f"c.yml: holds {MAX_DOCUMENTS + 1} documents, more than the {MAX_DOCUMENTS} that it may"
    )


def test_a_parameter_has_so_many_rules() -> None:
    assert "models[0].parameters.weight: got 5,000 rules, expected at most 1,000" in failure(LARGE["filters"])


def test_padding_cannot_ask_for_a_matrix_that_no_memory_holds() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ntokenizer: {pad_to_multiple_of: "
    assert "pad_to_multiple_of: got 4611686018427387904, expected a whole number in [1, 65536]" in failure(
        f"{text}{2**62}}}\n"
    )


def test_a_value_is_written_as_far_as_it_is_shown() -> None:
    whole: object = ["x" * 10] * 1_000_000
    began = time.process_time()
    assert as_written(whole) == '["xxxxxxxxxx", "xxxxxxxxxx", "xxxxxxxxxx", "xxxxxxxxxx", "x…'
    assert time.process_time() - began < 1
    assert as_written({"a": [], "b": {}, "c": [1, None]}) == "{a: [], b: {}, c: [1, nothing]}"


def test_names_of_thousands_of_characters_are_compared_with_none() -> None:
    assert closest("x" * 100_000, ["x" * 100_001]) is None
    assert closest("linaer", ["linear", "x" * 100_000]) == "linear"
