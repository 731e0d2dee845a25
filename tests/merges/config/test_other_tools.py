"""Files of other programs are recognised, and the error says what is done here instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.merges import SPECS

from merges.config.parse import parse_configs
from surgery.errors import WRONG_USAGE, SurgeryError

MOE = (
    "c.yml:1: is a config of mergekit-moe, which makes a mixture of experts of dense models, and that is not done here."
)


def fault(text: str) -> str:
    with pytest.raises(SurgeryError) as caught:
        parse_configs(text, "c.yml", methods=SPECS)
    assert caught.value.exit_code == WRONG_USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        (
            "base_model: a/x\ngate_mode: hidden\nexperts:\n- {source_model: a/y, positive_prompts: [hi]}",
            MOE,
        ),
        ("base_model: a/x\nexperts:\n- source_model: a/y\nexperts_per_token: 2", MOE),
        ("base_model: a/x\ngate_mode: random\narchitecture: mixtral", MOE),
        ("merge_method: moe\nbase_model: a/x\nexperts: [{source_model: a/y}]\nshared_experts: []", MOE),
        (
            "genome:\n  models: [a/x, a/y]\n  merge_method: ties\n  base_model: a/b\ntasks: [{name: mine, weight: 1}]",
            "c.yml:1: is a config of mergekit-evolve, which searches for the parameters of a merge",
        ),
        (
            "layer_slices: [{model: a/x, start: 0, end: 16}]\nembedding_source: a/x",
            "c.yml:1: is a config of bakllama, mergekit's old form of passthrough. Write merge_method: passthrough",
        ),
        (
            "model: a/x\ndonor: a/y\nout_path: out\nmethod: omp\nk: 64",
            "c.yml:1: has options of mergekit-tokensurgeon, which puts the tokenizer of a donor into a model",
        ),
        (
            "version: 1\nsteps: {}",
            "c.yml:1: is a recipe of several steps, and no merge config. Run it with surgery run",
        ),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "c.yml:1: is a model's own config.json"),
        ('{"peft_type": "LORA", "r": 8}', "c.yml:1: is a PEFT adapter's config, and no merge config."),
    ],
)
def test_files_of_other_programs_are_known_by_their_keys(text: str, beginning: str) -> None:
    said = fault(text)
    assert said.startswith(beginning) and "\n" not in said


def test_one_among_several_documents_is_named() -> None:
    merge = "name: m\nmerge_method: passthrough\nmodels: [{model: a/x}]\n"
    assert fault(f"{merge}---\nbase_model: m\nexperts: [{{source_model: a/y}}]\n").startswith(
        "c.yml:5: document 2: is a config of mergekit-moe"
    )


def test_a_merge_with_such_a_key_is_a_merge() -> None:
    text = "merge_method: passthrough\nmodels: [{model: a/x}]\nexperts: []\n"
    assert fault(text).startswith("c.yml:3: experts: unknown key.")


def test_documents_of_mergekit_multi_are_merges_that_use_each_other() -> None:
    text = (
        "name: first\nmerge_method: passthrough\nmodels: [{model: a/x}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: a/y}]\n"
    )
    assert [config.uses for config in parse_configs(text, "c.yml", methods=SPECS)] == [(), ("first",)]


def test_pickles_of_mergekit_pytorch_are_refused_and_its_safetensors_read(tmp_path: Path) -> None:
    merge = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ⟨one⟩}, {model: a/y}]\n"
    (tmp_path / "one.pt").write_bytes(b"")
    for ref in (str(tmp_path / "one.pt"), "./weights/model.bin", "/data/x.pth", "model.ckpt", "../a/b.PKL"):
        assert fault(merge.replace("⟨one⟩", ref)) == (
            f"c.yml:3: models[0].model: {ref} is a pickle of PyTorch, as mergekit-pytorch takes them, which can run "
            "code when it is opened, and is not read. Save it as .safetensors, of which a single file is a model too"
        )
    (tmp_path / "folder.bin").mkdir()
    for ref in ("one.safetensors", str(tmp_path / "folder.bin"), "org/model.pt"):
        (config,) = parse_configs(merge.replace("⟨one⟩", ref), "c.yml", methods=SPECS)
        assert config.models == (ref, "a/y")
