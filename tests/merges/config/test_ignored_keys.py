"""Keys that mergekit passes over are read with a warning; what may be a mistake is an error as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.merges import SPECS, files_of, run

from merges.config.ignored_keys import OPTIONS
from merges.config.parse import parse_configs
from merges.config.schema import MergeConfig
from surgery.errors import WRONG_USAGE, SurgeryError

TIES = """\
merge_method: ties
base_model: org/base
models:
- {model: a/x, parameters: {weight: 0.5}}
- {model: a/y, parameters: {weight: 0.3}}
parameters: {density: 0.4}
"""
SLERP = """\
merge_method: slerp
base_model: a/x
slices:
- sources:
  - {model: a/x, layer_range: [0, 8]}
  - {model: a/y, layer_range: [0, 8]}
parameters: {t: 0.5}
"""
STOCK = "merge_method: model_stock\nbase_model: a/b\nmodels: [{model: a/x}, {model: a/y}]\n"


def parse(text: str) -> MergeConfig:
    (config,) = parse_configs(text, "c.yml", methods=SPECS)
    return config


def faults(text: str) -> list[str]:
    with pytest.raises(SurgeryError) as caught:
        parse_configs(text, "c.yml", methods=SPECS)
    assert caught.value.exit_code == WRONG_USAGE
    return str(caught.value).splitlines()


def same_as(config: MergeConfig, text: str) -> bool:
    return config.model_copy(update={"warnings": ()}) == parse(text).model_copy(update={"warnings": ()})


# -- helpers ----------------------------------------------------------------------------------------------------------

HELPERS = [
    "base: &b org/base\nweights: &w 0.5",
    "base: &b org/base\nweight: &w 0.5",
    "_anchors: {base: &b org/base, numbers: [&w 0.5]}",
    ".defaults: [&b org/base, &w 0.5]",
    "base_models: &unused [&b org/base]\nmodel_a: {weight: &w 0.5}",
    "base_model_name: &b org/base\ndtypes: [&w 0.5]",
]


@pytest.mark.parametrize("helpers", HELPERS)
def test_keys_that_hold_anchors_are_read_with_a_warning(helpers: str) -> None:
    text = TIES.replace("org/base", "*b").replace("weight: 0.5", "weight: *w")
    config = parse(f"{helpers}\n{text}")
    assert same_as(config, TIES)
    keys = [line.partition(":")[0] for line in helpers.splitlines()]
    said = "has no effect by itself: what it holds counts where it is referred to"
    assert config.warnings == tuple(f"c.yml:{i}: {key}: {said}" for i, key in enumerate(keys, start=1))


def test_whole_entries_may_come_from_helpers() -> None:
    text = """\
shared: &shared
  weight: &half 0.5
  density: 0.4
common: &common {base_model: org/base, merge_method: ties}
<<: *common
models:
- {model: a/x, parameters: *shared}
- {model: a/y, parameters: {<<: *shared, weight: 0.3}}
"""
    config = parse(text)
    assert [line.split(": ")[1] for line in config.warnings] == ["shared", "common"]
    expected = TIES.replace("weight: 0.5", "weight: 0.5, density: 0.4").replace(
        "weight: 0.3", "weight: 0.3, density: 0.4"
    )
    assert same_as(config, expected.replace("parameters: {density: 0.4}\n", ""))


def test_helpers_may_stand_inside_too() -> None:
    text = TIES.replace("parameters: {density: 0.4}", "parameters: {steps: &s [0.5, 0.3], density: *s}")
    assert [line.split(": ")[1] for line in parse(text).warnings] == ["parameters.steps"]
    text = SLERP.replace("- sources:", "- layers: &l [0, 8]\n  sources:").replace("[0, 8]}", "*l}")
    assert same_as(parse(text), SLERP)


@pytest.mark.parametrize("key", ["x-notes", "x-", "X-Author", "x-models"])
@pytest.mark.parametrize("value", ["", "7", "[1, {a: b}]", "&unused {model: a/z}"])
def test_keys_that_begin_with_x_are_for_people(key: str, value: str) -> None:
    config = parse(f"{TIES}{key}: {value}\n")
    assert same_as(config, TIES)
    assert config.warnings == (f"c.yml:7: {key}: has no effect, as every key that begins with x-",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # No alias refers to it, or only one inside of it: what it is for nobody can know.
        (f"{TIES}helper: 7\n", "c.yml:7: helper: unknown key."),
        (f"{TIES}helper: &h 7\n", "c.yml:7: helper: unknown key."),
        (f"{TIES}helper: [&h 7, *h]\n", "c.yml:7: helper: unknown key."),
        (TIES.replace("0.4", "&d 0.4") + "helper: *d\n", "c.yml:7: helper: unknown key."),
        # An anchor makes no helper of a misspelling.
        (
            f"{TIES}tokenizer_sorce: &t a/x\nchat_template: *t\n",
            'c.yml:7: tokenizer_sorce: unknown key. Did you mean "tokenizer_source"?',
        ),
        (
            TIES.replace("base_model: org/base", "base_modle: &b org/base").replace("a/y", "*b"),
            'c.yml:2: base_modle: unknown key. Did you mean "base_model"?',
        ),
        (
            SLERP.replace("slices:", "slcies: &s").replace("{t: 0.5}", "{t: 0.5}\nx-all: *s"),
            'c.yml:3: slcies: unknown key. Did you mean "slices"?',
        ),
        (
            TIES.replace("{density: 0.4}", "{densty: &d 0.4, gamma: *d}"),
            'c.yml:6: parameters.densty: unknown key. Did you mean "density"?',
        ),
        (f"{TIES}xnotes: 1\n", "c.yml:7: xnotes: unknown key."),
    ],
)
def test_other_unknown_keys_are_errors(text: str, expected: str) -> None:
    assert any(fault.startswith(expected) for fault in faults(text)), faults(text)


def test_a_helper_called_like_a_key_that_is_there_or_takes_other_values_is_none_of_it() -> None:
    assert same_as(parse("base_model1: &b org/base\n" + TIES.replace("org/base", "*b")), TIES)
    assert same_as(parse("model: &m a/y\n" + SLERP.replace("model: a/y", "model: *m")), SLERP)


# -- dead keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_command_line_in_a_file_are_told_of(name: str) -> None:
    for written in (name, name.replace("_", "-"), f"no_{name}"):
        config = parse(f"{TIES}{written}: true\n")
        assert same_as(config, TIES)
        said = f"has no effect, as it is an option of mergekit's command line. {OPTIONS[name]}"
        assert config.warnings == (f"c.yml:7: {written}: {said}",)


def test_every_option_of_mergekit_is_known() -> None:
    theirs = """allow_crimes unsafe_truncate_embeddings transformers_cache lora_merge_cache lora_merge_dtype cuda device
        low_cpu_memory out_shard_size copy_tokenizer clone_tensors trust_remote_code random_seed lazy_unpickle
        write_model_card safe_serialization verbosity quiet read_to_gpu multi_gpu num_threads gpu_rich async_write
        write_threads"""  # the fields of mergekit 0.1.5's MergeOptions
    assert set(theirs.split()) <= OPTIONS.keys()


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        (
            f"{SLERP}embed_slerp: true\n",
            ["8: embed_slerp: has no effect, as in mergekit: embeddings are merged by the merge method too"],
        ),
        (
            SLERP.replace("{t: 0.5}", "{t: 0.5, embed_slerp: true, dtype: bfloat16, random_seed: 0}"),
            [
                "7: parameters.embed_slerp: has no effect, as in mergekit: embeddings are merged by the merge method "
                "too",
                "7: parameters.dtype: has no effect here, as in mergekit: dtype belongs to the top of a document",
                "7: parameters.random_seed: has no effect, as it is an option of mergekit's command line. "
                "Write seed: NUMBER",
            ],
        ),
        (
            TIES.replace("{density: 0.4}", "{density: 0.4, consensus_method: count}"),
            ["6: parameters.consensus_method: has no effect, as in mergekit: the sum decides on signs"],
        ),
        (
            SLERP.replace("- sources:", "- merge_method: linear\n  dtype: float16\n  layer_range: [0, 8]\n  sources:"),
            [
                "4: slices[0].merge_method: has no effect, as in mergekit: a document has one method, that at its top. "
                "For another one give these layers a document of their own, with a name",
                "5: slices[0].dtype: has no effect here, as in mergekit: dtype belongs to the top of a document",
                "6: slices[0].layer_range: has no effect here, as in mergekit: it belongs to each entry of sources",
            ],
        ),
        (
            TIES.replace("a/x, p", "a/x, layer_range: [0, 8], lora: a/l, revision: v1, trust_remote_code: true, p"),
            [
                "4: models[0].layer_range: has no effect here, as in mergekit: models merges all layers. "
                "Give slices to choose some",
                "4: models[0].lora: has no effect here, as in mergekit: no adapter is added. "
                "Write model: BASE+ADAPTER for one",
                "4: models[0].revision: has no effect here, as in mergekit: the default revision is read. "
                "Write model: NAME@REVISION for another",
                "4: models[0].trust_remote_code: has no effect, as it is an option of mergekit's command line. "
                "No code of models is run",
            ],
        ),
        (
            SLERP.replace("a/y, l", "a/y, revision: v1, base_model: a/x, l"),
            [
                "6: slices[0].sources[1].revision: has no effect here, as in mergekit: the default revision is read. "
                "Write model: NAME@REVISION for another",
                "6: slices[0].sources[1].base_model: has no effect here, as in mergekit: base_model belongs to the top "
                "of a document",
            ],
        ),
        (
            f"{TIES}layer_range: [0, 8]\npad_to_multiple_of: 64\ntokens: {{}}\n",
            [
                "7: layer_range: has no effect here, as in mergekit: it belongs to each entry of slices[].sources",
                "8: pad_to_multiple_of: has no effect here, as in mergekit: it belongs under tokenizer",
                "9: tokens: has no effect here, as in mergekit: it belongs under tokenizer",
            ],
        ),
        (
            TIES.replace("base_model: org/base", "base_model: {model: org/base, parameters: {weight: 1}}"),
            [
                "2: base_model.parameters: has no effect here, as in mergekit: parameters belong to a document, "
                "a slice or a model",
            ],
        ),
    ],
)
def test_keys_without_effect_say_what_to_write_instead(text: str, warnings: list[str]) -> None:
    config = parse(text)
    assert same_as(config, SLERP if "slerp" in text else TIES)
    assert config.warnings == tuple(f"c.yml:{line}" for line in warnings)


def test_the_tokenizer_may_have_dead_keys_too() -> None:
    config = parse(f"{TIES}tokenizer: {{source: union, embed_slerp: true, chat_template: auto}}\n")
    assert same_as(config, f"{TIES}tokenizer_source: union\n")
    assert [line.split(": ")[1] for line in config.warnings] == ["tokenizer.embed_slerp", "tokenizer.chat_template"]
    config = parse(f"{TIES}tokenizer_source: model:a/x\n")
    assert same_as(config, f"{TIES}tokenizer_source: a/x\n")
    said = "is read as a/x: model: stands before a name in old configs only"
    assert config.warnings == (f"c.yml:7: tokenizer_source: {said}",)
    assert faults(f"{TIES}tokenizer: union\n") == [
        'c.yml:7: tokenizer: got "union", expected a mapping of keys to values. Write tokenizer_source: … for one'
    ]


# -- parameters at wrong places ---------------------------------------------------------------------------------------


def test_parameters_outside_of_parameters_pass_where_that_makes_no_difference() -> None:
    config = parse(f"{STOCK}normalize: false\nint8_mask: true\nweight: 3\nfilter_wise: no\n")
    assert same_as(config, STOCK)
    assert config.warnings == (
        "c.yml:4: normalize: has no effect: model_stock does not take it",
        "c.yml:5: int8_mask: has no effect, as masks are never kept",
        "c.yml:6: weight: has no effect: model_stock does not take it",
        "c.yml:7: filter_wise: has no effect outside of parameters, and filter_wise is that anyway",
    )
    config = parse(f"{TIES}density: 0.9\nnormalize: true\n")
    assert same_as(config, TIES)
    assert config.warnings == (
        "c.yml:7: density: has no effect here, as in mergekit: the one under parameters counts",
        "c.yml:8: normalize: has no effect outside of parameters, and normalize is that anyway",
    )
    text = STOCK.replace("{model: a/x}", "{model: a/x, weight: 0.5}")
    assert same_as(parse(text), STOCK)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"{TIES}normalize: false\n", "c.yml:7: normalize"),
        (f"{TIES}weight: 3\n", "c.yml:7: weight"),
        (TIES.replace("a/x, p", "a/x, density: 0.1, p"), "c.yml:4: models[0].density"),
        (SLERP.replace("- sources:", "- t: 0.1\n  sources:"), "c.yml:4: slices[0].t"),
        (f"{TIES}lambda: [0, 1]\n", "c.yml:7: lambda"),
    ],
)
def test_elsewhere_it_is_an_error_that_says_where_it_belongs(text: str, key: str) -> None:
    assert faults(text) == [f"{key}: unknown key. It belongs under parameters."]


def test_under_compat_paper_dead_parameters_are_errors_as_others_without_effect() -> None:
    text = SLERP.replace("{t: 0.5}", "{t: 0.5, embed_slerp: true}")
    assert faults(f"{text}compat: paper\n") == [
        "c.yml:7: parameters.embed_slerp: has no effect, as in mergekit: embeddings are merged by the merge method too"
    ]


# -- dtypes and methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("fp16", 'got "fp16". Did you mean "float16"?'),
        ("bf16", 'got "bf16". Did you mean "bfloat16"?'),
        ("half", 'got "half". Did you mean "float16"?'),
        ("float", 'got "float". Did you mean "float32"?'),
        ("16", 'got 16. Did you mean "float16"?'),
        ("auto", 'got "auto". Leave it out, and every tensor keeps the dtype that it has.'),
        (
            "float8_e4m3fn",
            'got "float8_e4m3fn". Narrower dtypes than 16 bits are a quantiser\'s work: write bfloat16, and quantise '
            "the result.",
        ),
        ("flot16", 'got "flot16". Did you mean "float16"?'),
        ("[float16]", 'got ["float16"], expected text. Put it in quotes'),
    ],
)
def test_dtypes_by_other_names_are_guessed(written: str, said: str) -> None:
    for key in ("dtype", "out_dtype"):
        (fault,) = faults(f"{TIES}{key}: {written}\n")
        assert fault.removesuffix(". Put it in quotes") == f"c.yml:7: {key}: {said}".removesuffix(". Put it in quotes")


def test_methods_in_capitals_are_guessed() -> None:
    assert 'c.yml:1: merge_method: got "TIES". Did you mean "ties"?' in faults(TIES.replace("ties", "TIES"))
    assert 'c.yml:1: merge_method: got "Dare-TIES". Did you mean "dare_ties"?' in faults(
        TIES.replace("ties", "Dare-TIES")
    )


# -- the merge --------------------------------------------------------------------------------------------------------


def test_a_config_full_of_them_gives_the_merge_without_them(llama: Path, tmp_path: Path) -> None:
    text = """\
x-notes: for people
base: &base ⟨base⟩
numbers: {half: &half 0.5}
merge_method: ties
base_model: *base
models:
- {model: ⟨a⟩, layer_range: [0, 2], parameters: {weight: *half}}
- {model: ⟨b⟩, parameters: {weight: *half}}
int8_mask: true
embed_slerp: true
random_seed: 7
allow_crimes: true
chat_template: auto
"""
    report = run(text, llama, tmp_path / "out")
    plain = "merge_method: ties\nbase_model: ⟨base⟩\nparameters: {weight: 0.5}\nmodels: [{model: ⟨a⟩}, {model: ⟨b⟩}]\n"
    run(plain, llama, tmp_path / "plain")
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "plain")
    records = {"README.md", "surgery.json"}  # which quote the config
    assert {name: data for name, data in ours.items() if name not in records} == {
        name: data for name, data in theirs.items() if name not in records
    }
    said = [line.split(": ")[1] for line in report.warnings if line.startswith("c.yml")]
    keys = "x-notes base numbers models[0].layer_range int8_mask embed_slerp random_seed allow_crimes"
    assert said == keys.split()
    assert any(line.startswith("chat_template: auto has no effect") for line in report.warnings)
