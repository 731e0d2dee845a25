"""mergekit's configs become our types; every fault is named with its line, all of them at once."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from merges.config.command_line import config_for_method
from merges.config.document_order import ordered
from merges.config.parse import parse_configs, read_configs
from merges.config.schema import MergeConfig, ModelToken, TokenRule, ZeroToken
from merges.config.settings import EDGE_POSITION, MethodSpec, ParameterSpec, Rule, layer_position
from surgery.errors import WRONG_USAGE, SurgeryError

WEIGHT = ParameterSpec("weight", "number", per_model=True)
T = ParameterSpec("t", "number", low=0, high=1)
METHODS = {
    spec.name: spec
    for spec in (
        MethodSpec("linear", (WEIGHT, ParameterSpec("normalize", "boolean", True))),
        MethodSpec("slerp", (T,), base="required", models=(1, 1)),
        MethodSpec("nuslerp", (WEIGHT,), base="optional", models=(2, 2)),
        MethodSpec("model_stock", (ParameterSpec("filter_wise", "boolean", False),), base="required", models=(2, None)),
        MethodSpec("karcher", (ParameterSpec("max_iter", "integer", 10, low=1),), joins_base=True),
        MethodSpec("passthrough", (ParameterSpec("scale", "number", 1.0, per_model=True),), models=(1, 1)),
        MethodSpec(
            "ties",
            (
                WEIGHT,
                ParameterSpec("density", "number", 1.0, per_model=True, low=0, high=1, low_open=True),
                ParameterSpec("normalize", "boolean", True),
                ParameterSpec("lambda", "number", 1.0),
            ),
            base="required",
        ),
    )
}

TIES = """\
models:
  - model: org/writer
    parameters:
      density: [1, 0.8, 0.2]  # from the first layer to the last
      weight: 0.75
  - model: org/maths
    parameters:
      density: 0.4
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLICES = """\
merge_method: slerp
base_model: a/x
slices:
- sources:
  - {model: a/x, layer_range: [0, 8]}
  - {model: a/y, layer_range: [8, 16]}
- sources:
  - {model: a/z, layer_range: [0, 1]}
  - {model: a/w, layer_range: [2, 3], parameters: {}}
  base_model: a/w
  parameters: {t: 0.1}
parameters:
  t:
  - filter: self_attn
    value: [0.2, 0.4, 0.9]
  - filter: mlp
    value: [0.8, 0.6, 0.1]
  - value: 0.5
"""
DOCUMENTS = """\
merge_method: ties
models:
- {model: ours, parameters: {weight: 1}}
- {model: half+a/lora, parameters: {weight: 1e-1}}
base_model: a/base
tokenizer: {source: ours, tokens: {x: {source: ours}, y: {source: {kind: model_token, model: ours, token: z}}}}
---
name: ours
merge_method: linear
models:
- {model: half, parameters: {weight: 1}}
- {model: a/y, parameters: {weight: 2}}
---
name: half
merge_method: passthrough
models: [{model: a/x}]
parameters: {scale: 0.5}
"""


def parse(text: str) -> MergeConfig:
    (config,) = parse_configs(text, "c.yml", methods=METHODS)
    return config


def faults(text: str) -> list[str]:
    with pytest.raises(SurgeryError) as caught:
        parse_configs(text, "c.yml", methods=METHODS)
    assert caught.value.exit_code == WRONG_USAGE
    return str(caught.value).splitlines()


def linear(lines: str = "", *, models: str = "models: [{model: a/x}, {model: a/y}]") -> str:
    return f"merge_method: linear\n{models}\nparameters: {{weight: 0.5}}\n{lines}"


# -- what is read -----------------------------------------------------------------------------------------------------


def test_models_are_one_section_over_all_layers_and_the_base_joins_it() -> None:
    config = parse(TIES)
    (section,) = config.sections
    assert [source.model for source in section.sources] == [
        "org/writer",
        "org/maths",
        "org/base",
    ]
    assert [source.implied for source in section.sources] == [False, False, True]
    assert {source.layer_range for source in section.sources} == {None}
    assert section.base_index == 2
    assert section.sources[0].parameters["density"] == (Rule((1.0, 0.8, 0.2)),)
    assert section.sources[1].parameters["weight"] == (Rule((0.5,), "mlp"), Rule((0.0,)))
    assert config.parameters["normalize"] == (Rule((True,)),)
    assert (config.dtype, config.out_dtype, config.compat, config.seed) == ("float16", None, "mergekit", 0)
    assert config.models[0] == "org/base"
    assert config.warnings == ()


def test_a_listed_base_stays_where_it_is() -> None:
    text = TIES.replace("org/base", "base").replace("models:\n", "models:\n  - model: base\n")
    section = parse(text).sections[0]
    assert section.base_index == 0 and len(section.sources) == 3
    assert not any(source.implied for source in section.sources)


def test_slices_keep_their_layers_and_their_base() -> None:
    config = parse(SLICES)
    first, second = config.sections
    assert [(s.model, s.layer_range) for s in first.sources] == [("a/x", (0, 8)), ("a/y", (8, 16))]
    assert (first.base_model, first.base_index) == ("a/x", 0)
    assert (second.base_model, second.base_index) == ("a/w", 1)
    assert config.models == ("a/x", "a/y", "a/w", "a/z")


def test_modules_are_sections_of_their_own() -> None:
    text = """\
merge_method: linear
modules:
  text_decoder:
    slices:
    - sources: [{model: a/x, layer_range: [0, 2]}]
    - sources: [{model: a/y, layer_range: [2, 4], parameters: {weight: 3}}]
    parameters: {weight: 2}
  vision_tower:
    models: [{model: a/x}]
parameters: {weight: 1}
"""
    config = parse(text)
    assert [section.module for section in config.sections] == ["text_decoder", "text_decoder", "vision_tower"]
    weights = [config.scope(section).value(WEIGHT, "w", 0, source=0) for section in config.sections]
    assert weights == [2, 3, 1]


@pytest.mark.parametrize(
    ("written", "ref"),
    [
        ("org/name", "org/name"),
        ("org/name@v1", "org/name@v1"),
        ("./folder+org/lora", "./folder+org/lora"),
        ("{model: org/name}", "org/name"),
        ("{model: {path: org/name}, lora: null}", "org/name"),
        ("{model: {path: org/name, revision: v1}, lora: {path: a/l, revision: v2}}", "org/name@v1+a/l@v2"),
        ("{model: org/name, lora: a/l}", "org/name+a/l"),
    ],
)
def test_models_in_either_form_become_our_references(written: str, ref: str) -> None:
    text = f"merge_method: linear\nmodels:\n- model: {written}\n  parameters: {{weight: 1}}\nbase_model: {written}\n"
    config = parse(text)
    assert config.sections[0].sources[0].model == config.base_model == ref


def test_tokenizer_in_both_forms() -> None:
    assert parse(linear()).tokenizer is None
    short = parse(linear("tokenizer_source: union")).tokenizer
    assert short is not None and (short.source, dict(short.tokens)) == ("union", {})
    text = """\
tokenizer:
  source: a/other
  pad_to_multiple_of: 64
  tokens:
    <|a|>: {source: a/x}
    <|b|>: {source: {kind: zero}, force: true}
    <|c|>: {source: {kind: model_token, model: a/y, token_id: 7}}
    <|d|>: {source: {kind: model_token, model: {model: a/y}, token: </s>}}
    <|e|>: {force: false}
    <|f|>: {source: {model: {path: a/y}}}
"""
    full = parse(linear(text)).tokenizer
    assert full is not None and (full.source, full.pad_to_multiple_of) == ("a/other", 64)
    assert dict(full.tokens) == {
        "<|a|>": TokenRule(source="a/x"),
        "<|b|>": TokenRule(source=ZeroToken(), force=True),
        "<|c|>": TokenRule(source=ModelToken(model="a/y", token_id=7)),
        "<|d|>": TokenRule(source=ModelToken(model="a/y", token="</s>")),
        "<|e|>": TokenRule(),
        "<|f|>": TokenRule(source="a/y"),
    }
    assert parse(linear("tokenizer: {}")).tokenizer == short


@pytest.mark.parametrize("template", ["auto", "chatml", "llama3", "{{ messages }}"])
def test_chat_templates_are_known_by_name_or_written_out(template: str) -> None:
    assert parse(linear(f'chat_template: "{template}"')).chat_template == template


def test_empty_keys_are_not_given() -> None:
    text = linear("dtype:\nslices: null\nbase_model: ~\nchat_template:\ntokenizer:\nname:\nseed:")
    assert parse(text) == parse(linear())


def test_numbers_that_yaml_takes_for_text_are_numbers_and_words_are_truth() -> None:
    config = parse("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1e-5}}]\nparameters: {normalize: 0}")
    scope = config.scope(config.sections[0])
    assert scope.values(METHODS["linear"], "w", 0) == {"weight": (1e-5,), "normalize": False}


def test_our_own_keys() -> None:
    config = parse(linear("seed: 7\ncompat: paper\ndtype: torch.bfloat16\nout_dtype: float32"))
    assert (config.seed, config.compat, config.dtype, config.out_dtype) == (7, "paper", "bfloat16", "float32")


def test_a_file_is_read_with_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(b"\xef\xbb\xbf" + TIES.encode())
    (config,) = read_configs(path, methods=METHODS)
    assert (config.merge_method, config.where) == ("ties", str(path))


# -- where a parameter comes from -------------------------------------------------------------------------------------


def test_the_innermost_place_with_a_value_for_the_tensor_counts() -> None:
    text = """\
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: [0.1, 0.3]}]}}
  - {model: b, layer_range: [0, 2]}
  parameters: {weight: [{filter: attn, value: 0.2}], normalize: false}
parameters: {weight: 0.9, normalize: true}
"""
    config = parse(text)
    scope = config.scope(config.sections[0])
    linear = METHODS["linear"]
    assert scope.values(linear, "layers.0.mlp", 0.5) == {"weight": (0.2, 0.9), "normalize": False}
    assert scope.values(linear, "layers.0.attn", 0.5) == {"weight": (0.2, 0.2), "normalize": False}
    assert scope.values(linear, "layers.0.norm", 0.5) == {"weight": (0.9, 0.9), "normalize": False}


def test_filters_of_a_model_look_at_its_own_tensor() -> None:
    text = """\
merge_method: linear
slices:
- sources: [{model: a, layer_range: [4, 5], parameters: {weight: [{filter: layers.4., value: 0.1}, {value: 0.2}]}}]
"""
    config = parse(text)
    scope = config.scope(config.sections[0])
    assert scope.values(METHODS["linear"], "layers.0.w", 1, ["layers.4.w"])["weight"] == (0.1,)
    assert scope.values(METHODS["linear"], "layers.0.w", 1)["weight"] == (0.2,)


def test_the_base_has_no_values_where_the_method_sets_it_apart() -> None:
    config = parse(TIES)
    values = config.scope(config.sections[0]).values(METHODS["ties"], "layers.0.mlp", 0.5)
    assert values == {"weight": (0.75, 0.5), "density": (0.8, 0.4), "normalize": True, "lambda": 1.0}


def test_a_tensor_that_no_rule_speaks_of_is_an_error_where_there_is_no_default() -> None:
    text = "merge_method: linear\nmodels: [{model: a/x, parameters: {weight: {filter: mlp, value: 1}}}]"
    config = parse(text)
    with pytest.raises(SurgeryError) as caught:
        config.scope(config.sections[0]).value(WEIGHT, "lm_head.weight", 0, source=0)
    expected = "c.yml: weight has no value for lm_head.weight of a/x. Add a rule without a filter to its list."
    assert str(caught.value) == expected


# -- faults -----------------------------------------------------------------------------------------------------------


def test_all_faults_of_a_document_are_reported_with_their_lines() -> None:
    text = """\
merge_method: ties
base_model: a/base
models:
  - model: a/x
    parameters: {weight: 0.5, densty: 1}
  - modell: a/y
    parameters:
      density: [1, 0.6, 1.5]
      weight:
        - filter: mlp
          value: [0, abc]
        - valeu: 0
        - 3
parameters:
  lamda: 1
  lambda: [1, .inf]
dtype: flot16
tokenizer_sorce: union
weight: 3
seed: -1
chat_template: chatlm
"""
    assert faults(text) == [
        'c.yml:5: models[0].parameters.densty: unknown key. Did you mean "density"?',
        'c.yml:6: models[1].modell: unknown key. Did you mean "model"?',
        "c.yml:6: models[1]: model is missing",
        "c.yml:8: models[1].parameters.density[2]: got 1.5, expected a number in (0, 1]",
        'c.yml:11: models[1].parameters.weight[0].value[1]: got "abc", expected a number',
        'c.yml:12: models[1].parameters.weight[1].valeu: unknown key. Did you mean "value"?',
        "c.yml:12: models[1].parameters.weight[1]: value is missing",
        "c.yml:13: models[1].parameters.weight[2]: got 3 among rules, expected {filter, value}",
        'c.yml:15: parameters.lamda: unknown key. Did you mean "lambda"?',
        "c.yml:16: parameters.lambda[1]: got inf, expected a finite number",
        'c.yml:17: dtype: got "flot16". Did you mean "float16"?',
        'c.yml:18: tokenizer_sorce: unknown key. Did you mean "tokenizer_source"?',
        "c.yml:19: weight: unknown key. It belongs under parameters.",
        "c.yml:20: seed: got -1, expected a whole number in [0, 9.22337e+18)",
        'c.yml:21: chat_template: got "chatlm". Did you mean "chatml"?',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c.yml: holds no merge config"),
        ("- a", 'c.yml:1: got ["a"], expected a mapping of keys to values'),
        ("models: [{model: a}]", "c.yml:1: merge_method is missing"),
        ("merge_method: linera\nmodels: [{model: a}]", 'c.yml:1: merge_method: got "linera". Did you mean "linear"?'),
        (
            "merge_method: zzz\nmodels: [{model: a, parameters: {weight: x}}]",
            'c.yml:1: merge_method: got "zzz". Expected one of: linear, slerp, nuslerp, model_stock, karcher, '
            "passthrough, ties.",
        ),
        (linear(models=""), "c.yml:1: got none of them, expected exactly one of models, slices and modules"),
        (
            linear("slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"),
            "c.yml:1: got models, slices, expected exactly one of models, slices and modules",
        ),
        (linear(models="models: []"), "c.yml:2: models: got [], expected a list with at least one entry"),
        (linear(models="models: {a: 1}"), "c.yml:2: models: got {a: 1}, expected a list with at least one entry"),
        (linear(models="modules: {}"), "c.yml:2: modules: names no module"),
        (linear(models="modules: {m: {}}"), "c.yml:2: modules.m: expected exactly one of models and slices"),
        (linear(models="models: [{model: 7}]"), "c.yml:2: models[0].model: got 7, expected text. Put it in quotes"),
        (linear(models='models: [{model: " "}]'), 'c.yml:2: models[0].model: got " ", expected text'),
        (
            linear(models="models: [{model: {path: a/x}}]"),
            "c.yml:2: models[0].model.path: unknown key. Expected one of: model, lora, override_architecture.",
        ),
        (
            linear(models="models: [{model: a/x}, {model: a/x}]"),
            "c.yml:2: models[1]: a/x stands here a second time; the first is models[0]",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/x, parameters: {weight: 1}}, {model: a/y}]",
            "c.yml:2: models[1]: linear needs weight, a number. Add it under parameters.",
        ),
        (
            "merge_method: slerp\nbase_model: a/x\nmodels: [{model: a/y}]",
            "c.yml:3: models: slerp needs t, a number in [0, 1]. Add it under parameters.",
        ),
        (
            "merge_method: ties\nparameters: {weight: 1}\nmodels: [{model: a/x}]",
            "c.yml:3: models: ties needs a base model, and none is given. Add base_model: MODEL.",
        ),
        (
            "merge_method: slerp\nparameters: {t: 1}\nbase_model: a\nmodels: [{model: x}, {model: y}]",
            "c.yml:4: models: got 2, expected exactly 1 model beside the base for slerp",
        ),
        (
            "merge_method: model_stock\nbase_model: a\nmodels: [{model: a}, {model: y}]",
            "c.yml:3: models: got 1, expected at least 2 models beside the base for model_stock",
        ),
        (
            "merge_method: nuslerp\nparameters: {weight: 1}\nmodels: [{model: x}, {model: y}, {model: z}]",
            "c.yml:3: models: got 3, expected exactly 2 models for nuslerp",
        ),
        (
            SLICES.replace("  base_model: a/w", "  base_model: a/v"),
            "c.yml:7: slices[1].sources: the base model a/v is not among them. Add it with its layer_range.",
        ),
        (
            SLICES.replace("[8, 16]", "[8, 15]"),
            "c.yml:4: slices[0].sources: got runs of 8, 7 layers, expected as many from each source",
        ),
        (
            SLICES.replace("layer_range: [0, 1]", "layer_range: [1, 0]"),
            "c.yml:8: slices[1].sources[0].layer_range: got [1, 0], expected [first, end] with 0 ≤ first < end, "
            "such as [0, 16]",
        ),
        (
            SLICES.replace("layer_range: [0, 1]", "layer_rnage: [0, 1]"),
            'c.yml:8: slices[1].sources[0].layer_rnage: unknown key. Did you mean "layer_range"?',
        ),
        (
            linear("tokenizer_source: union\ntokenizer: {source: base}"),
            "c.yml:4: tokenizer_source: cannot stand beside tokenizer. Write it as tokenizer: {source: …}.",
        ),
        (linear("tokenizer_source: base"), "c.yml:4: tokenizer_source: says base, and there is no base_model"),
        (
            linear("tokenizer: {tokens: {x: {source: {kind: model_token, model: a/x}}}}"),
            "c.yml:4: tokenizer.tokens.x.source: expected exactly one of token and token_id",
        ),
        (
            linear("tokenizer: {tokens: {x: {source: {kind: zeros}}}}"),
            'c.yml:4: tokenizer.tokens.x.source.kind: got "zeros". Did you mean "zero"?',
        ),
        (
            linear("tokenizer: {tokens: {x: {source: a/z}}}"),
            "c.yml:4: tokenizer.tokens.x.source: a/z is not one of the merged models",
        ),
        (
            linear("tokenizer: {pad_to_multiple_of: 0}"),
            "c.yml:4: tokenizer.pad_to_multiple_of: got 0, expected a whole number in [1, 65536]",
        ),
        (linear("compat: papers"), 'c.yml:4: compat: got "papers". Did you mean "paper"?'),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: []}",
            "c.yml:3: parameters.weight: got an empty list, expected a number, or a list of such",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: }",
            "c.yml:3: parameters.weight: got nothing, expected a number",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: {filter: 3, value: 1}}",
            "c.yml:3: parameters.weight.filter: got 3, expected a part of tensor names, in quotes",
        ),
    ],
)
def test_each_fault_says_where_and_what(text: str, expected: str) -> None:
    assert expected in faults(text)


def test_the_same_model_may_stand_twice_with_other_layers() -> None:
    sources = "[{model: a/x, layer_range: [0, 2]}, {model: a/x, layer_range: [2, 4]}]"
    section = parse(linear(models=f"slices: [{{sources: {sources}}}]")).sections[0]
    assert [source.layer_range for source in section.sources] == [(0, 2), (2, 4)]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.yml", "cannot be read (No such file or directory)"),
        (tmp_path, "is a folder, expected a file. Put the file itself in its place, or remove it."),
        (tmp_path / "latin.yml", "is not UTF-8 text (byte 1)"),
    ):
        (tmp_path / "latin.yml").write_bytes(b"a\xe4")
        with pytest.raises(SurgeryError) as caught:
            read_configs(path, methods=METHODS)
        assert str(caught.value) == f"{path}: {message}"


# -- warnings ---------------------------------------------------------------------------------------------------------


def test_what_mergekit_passes_over_is_a_warning_and_under_compat_paper_a_fault() -> None:
    text = """\
merge_method: linear
models:
- {model: a/x, parameters: {weight: 1, normalize: false, int8_mask: on}}
- {model: a/y, parameters: {weight: [{value: 1}, {filter: mlp, value: 2}]}}
parameters: {density: 0.5, int8_mask: yes}
"""
    config = parse(text)
    assert set(config.sections[0].sources[0].parameters) == {"weight", "int8_mask"}
    assert set(config.parameters) == {"int8_mask"}
    idle = [
        "c.yml:3: models[0].parameters.normalize: has no effect for one model. "
        "Move it to the parameters of the whole merge",
        "c.yml:5: parameters.density: has no effect: linear does not take it",
    ]
    never = "c.yml:4: models[1].parameters.weight[1]: is never reached: the rule before it holds for every tensor"
    assert config.warnings == (idle[0], never, idle[1])
    assert faults(text + "compat: paper") == idle


def test_keys_without_effect_are_warned_of() -> None:
    text = SLICES.replace("  parameters: {t: 0.1}", "  residual_weight: 0.1\n  parameters: {t: 0.1}")
    assert parse(text).warnings == ("c.yml:11: slices[1].residual_weight: has no effect, as in mergekit",)
    text = SLICES.replace("{model: a/z,", "{model: {model: a/z, override_architecture: LlamaForCausalLM},")
    assert parse(text).warnings == (
        "c.yml:8: slices[1].sources[0].model.override_architecture: has no effect: tensors are found by name and shape",
    )
    text = TIES.replace("models:\n", "models:\n  - {model: org/base, parameters: {weight: 1}}\n")
    assert parse(text).warnings == ("c.yml:2: models[0]: is the base model: its weight has no effect",)


def test_a_base_that_a_method_has_no_use_for_is_left_out_or_merged_as_mergekit_does() -> None:
    config = parse(linear("base_model: a/b"))
    assert [source.model for source in config.sections[0].sources] == ["a/x", "a/y"]
    assert config.warnings == ("c.yml:2: models: linear has no use for a base: no weights are taken from a/b",)
    text = "merge_method: karcher\nmodels: [{model: a/x}]\nbase_model: a/b\n"
    config = parse(text)
    assert [source.model for source in config.sections[0].sources] == ["a/x", "a/b"]
    expected = "karcher merges a/b as one more model, as in mergekit. `compat: paper` leaves it out"
    assert config.warnings == (f"c.yml:2: models: {expected}",)
    assert [source.model for source in parse(text + "compat: paper").sections[0].sources] == ["a/x"]


# -- several documents ------------------------------------------------------------------------------------------------


def test_documents_run_after_those_they_use() -> None:
    configs = parse_configs(DOCUMENTS, "c.yml", methods=METHODS)
    assert [config.uses for config in configs] == [("ours", "half"), ("half",), ()]
    assert [config.name for config in ordered(configs)] == ["half", "ours", None]
    assert [config.where for config in configs] == [f"c.yml: document {i}" for i in (1, 2, 3)]


def test_the_only_document_may_have_a_name() -> None:
    configs = parse_configs(linear("name: mine"), "c.yml", methods=METHODS)
    assert ordered(configs) == configs and configs[0].name == "mine"


def test_where_all_have_names_the_result_is_what_none_uses() -> None:
    configs = parse_configs(f"name: top\n{DOCUMENTS}", "c.yml", methods=METHODS)
    assert [config.name for config in ordered(configs)] == ["half", "ours", "top"]


def test_documents_that_nobody_uses_are_left_out_with_a_warning() -> None:
    configs = parse_configs(f"{DOCUMENTS}---\n{linear('name: odd')}", "c.yml", methods=METHODS)
    assert [config.name for config in ordered(configs)] == ["half", "ours", None]
    assert configs[0].warnings == ("c.yml:1: document 1: odd is used by no document, and is left out",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            DOCUMENTS.replace("{model: ours,", "{model: our,"),
            "c.yml:3: document 1: models[0].model: no document is called our, and there is no such folder. "
            'Did you mean "ours"?',
        ),
        (
            DOCUMENTS.replace("model: a/x", "model: ours"),
            "c.yml:8: document 2: name: is made from itself: ours → half → ours",
        ),
        (
            DOCUMENTS.replace("name: half", "name: ours"),
            "c.yml:14: document 3: name: ours is the name of document 2 already",
        ),
        (
            DOCUMENTS.replace("name: half", ""),
            "c.yml:15: document 3: which is the result, document 1 or this? Give a name to every document but one.",
        ),
    ],
)
def test_names_that_lead_nowhere_are_faults(text: str, expected: str) -> None:
    assert expected in faults(text)


def test_a_folder_is_no_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    configs = parse_configs(DOCUMENTS.replace("model: a/x", "model: here"), "c.yml", methods=METHODS)
    assert configs[2].models == ("here",)


# -- the command line -------------------------------------------------------------------------------------------------


def command(
    method: str, *models: str, base: str | None = None, dtype: str | None = None, **given: Sequence[object]
) -> MergeConfig:
    parameters = {name.removesuffix("_"): values for name, values in given.items()}
    return config_for_method(method, models, methods=METHODS, base=base, dtype=dtype, parameters=parameters)


def test_the_command_line_says_the_same_as_a_config() -> None:
    text = """\
merge_method: ties
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.3}}]
base_model: x
parameters: {density: 0.4, lambda: [0, 1]}
dtype: bfloat16
"""
    given = command("ties", "a", "b", base="x", dtype="bfloat16", weight=[0.5, 0.3], density=[0.4], lambda_=[[0, 1]])
    assert given == parse(text).model_copy(update={"where": ""})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: command("ties", "a", "b", base="x", weight=[1, 2, 3]), "--weight: got 3 values for 2 models"),
        (lambda: command("ties", "a", "b", weight=[1]), "--base: ties needs a base model, and none is given"),
        (lambda: command("linear", "a"), "--weight: linear needs a number, and none is given"),
        (
            lambda: command("ties", "a", "b", base="x", weight=[1], lambda_=[1, 2]),
            "--lambda: got 2 values, expected one: it holds for all models",
        ),
        (
            lambda: command("ties", "a", "b", base="x", weight=[1], density=[1, 2]),
            "--density: got 2, expected a number in (0, 1]",
        ),
        (lambda: command("linear", "a", weight=[1], density=[1]), "--density: has no effect: linear does not take it"),
        (lambda: command("linera", "a"), 'METHOD: got "linera". Did you mean "linear"?'),
        (lambda: command("linear", weight=[1]), "MODELS: got [], expected a list with at least one entry"),
        (
            lambda: command("linear", "a", "a", weight=[1]),
            "MODEL 2: a stands here a second time; the first is MODEL 1",
        ),
        (lambda: command("linear", "a", dtype="bf16", weight=[1]), '--dtype: got "bf16". Did you mean "bfloat16"?'),
        (
            lambda: command("slerp", "a", "b", base="x", t=[0]),
            "MODELS: got 2, expected exactly 1 model beside the base for slerp",
        ),
    ],
)
def test_faults_of_a_command_line_name_the_option(config: object, expected: str) -> None:
    assert callable(config)
    with pytest.raises(SurgeryError) as caught:
        config()
    assert str(caught.value) == expected


# -- whatever the text ------------------------------------------------------------------------------------------------

PIECES = (
    "",
    "null",
    "[]",
    "{}",
    "- ",
    ": ",
    "\n",
    "  ",
    "'",
    '"',
    "&a ",
    "*a",
    "<<: ",
    "1e5",
    ".nan",
    "---\n",
    "!!set ",
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([TIES, SLICES, DOCUMENTS]), st.integers(0, 2**32))
@example(DOCUMENTS.replace("name: half", "name: union"), 0)
def test_mutated_configs_are_read_or_refused_and_never_crash(text: str, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(draw.randrange(4)):
        start = draw.randrange(len(text))
        end = min(len(text), start + draw.choice((0, 1, 2, 8, 30)))
        other = draw.randrange(len(text))
        piece = draw.choice((*PIECES, text[other : other + draw.randrange(40)]))
        text = text[:start] + piece + text[end:]
        if not text:
            return
    try:
        configs = parse_configs(text, "c.yml", methods=METHODS)
    except SurgeryError as error:
        assert error.exit_code == WRONG_USAGE
        assert all(line.startswith("c.yml:") for line in str(error).splitlines())
    else:
        assert ordered(configs)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["linear", "a/x", "union", "*", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "value", "source"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([TIES, SLICES, DOCUMENTS.partition("---")[0]]), VALUES, st.integers(0, 2**32))
def test_any_value_at_any_place_is_read_or_refused(text: str, value: object, seed: int) -> None:
    draw = random.Random(seed)
    document = yaml.safe_load(text)
    place = document
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    place[key] = value
    try:
        parse_configs(yaml.safe_dump(document), "c.yml", methods=METHODS)
    except SurgeryError as error:
        assert error.exit_code == WRONG_USAGE


# -- mergekit itself --------------------------------------------------------------------------------------------------

PARITY = """\
merge_method: linear
dtype: float32
slices:
- sources:
  - {model: ZERO, layer_range: [1, 4], parameters: {weight: 0}}
  - model: ONE
    layer_range: [1, 4]
    parameters: {weight: [{filter: mlp, value: [0.1, 0.7]}, {filter: layers.2.self_attn, value: 0.35}]}
  parameters: {weight: [{filter: self_attn, value: [0.2, 0.5, 0.4]}]}
- sources:
  - {model: ZERO, layer_range: [0, 1], parameters: {weight: 0}}
  - {model: ONE, layer_range: [0, 1], parameters: {weight: [0.6, 0.8]}}
parameters: {weight: 0.9, normalize: [false, no, 0]}
"""


def test_values_are_those_that_mergekit_computes_with(tmp_path: Path) -> None:
    program = os.environ.get("MERGEKIT")
    if not program:
        pytest.skip("MERGEKIT does not name mergekit-yaml")
    text = PARITY
    for name, value in (("ZERO", 0.0), ("ONE", 1.0)):
        shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 4}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **shape))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save_pretrained(tmp_path / name)
        text = text.replace(name, str(tmp_path / name))
    (tmp_path / "c.yml").write_text(text)
    options = ["--no-copy-tokenizer", "--no-write-model-card"]
    subprocess.run([program, tmp_path / "c.yml", tmp_path / "out", *options], check=True, capture_output=True)
    merged = {name: x for path in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(path).items()}
    config = parse(text)
    for name, tensor in merged.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer is None:
            section = config.sections[0 if "embed" in name else -1]
            t, own = EDGE_POSITION, name
        elif layer < 3:
            section, t = config.sections[0], layer_position(layer, 3)
            own = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
        else:
            section, t = config.sections[1], layer_position(0, 1)
            own = name.replace("layers.3.", "layers.0.")
        values = config.scope(section).values(METHODS["linear"], name, t, [own, own])
        weight = values["weight"]
        assert isinstance(weight, tuple) and values["normalize"] is False
        torch.testing.assert_close(tensor, torch.full_like(tensor, float(weight[1])), msg=name)
    assert len(merged) == 39
