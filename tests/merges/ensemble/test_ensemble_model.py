"""The ensemble as transformers sees it: exact logits for every family, one cache, generation, devices, saving."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import architectures
from support.hub_server import HubServer
from transformers import AutoModelForCausalLM, DynamicCache

from merges.ensemble.average import MODEL_FILE, average_logits
from merges.ensemble.ensemble_model import EnsembleCache, LogitEnsembleConfig, LogitEnsembleForCausalLM, combine

PAIR = ("llama", "gpt2")  # rotary and learnt positions, two widths
# The file's text is copied into every ensemble: change this number only together with a change that all ensembles
# written from then on shall have. Formatters must leave the file alone (see [tool.ruff.format] in pyproject.toml).
MODEL_FILE_SHA256 = "2bf9d9bc9a728745c4454fbc6a244e57f1e8ef02e800d407ac157a2de5e4ba44"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two fp32 models of different families with one tokenizer, and one MoE whose experts transformers fuses."""
    root = tmp_path_factory.mktemp("members")
    names = [*PAIR, "mixtral"]
    return [
        architectures.add_tokenizer(architectures.build(name, root / name, seed=i, dtype=torch.float32))
        for i, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def ensemble_folder(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ensemble") / "out"
    average_logits([str(folder) for folder in folders], out, weights=[2, 1, 1])
    return out


@pytest.fixture(scope="module")
def ensemble(ensemble_folder: Path) -> LogitEnsembleForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(ensemble_folder)
    model.generation_config.eos_token_id = None  # generate to the end
    return model


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Two prompts, the first with three tokens of left padding."""
    ids = torch.randint(4, architectures.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def test_the_model_file_is_the_one_that_ensembles_have() -> None:
    assert MODEL_FILE.name == "ensemble_model.py"
    assert hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest() == MODEL_FILE_SHA256


@torch.no_grad()
def test_every_family_gives_the_same_bits_as_by_itself(tmp_path: Path) -> None:
    names = list(architectures.ARCHITECTURES)
    folders = [architectures.build(name, tmp_path / name, seed=i) for i, name in enumerate(names)]
    average_logits([str(folder) for folder in folders], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(4, architectures.VOCABULARY, (2, 9))
    logits = model.member_logits(ids)
    for i, folder in enumerate(folders):
        alone = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.float()
        assert torch.equal(logits[i], alone), names[i]


@torch.no_grad()
def test_logits_are_the_weighted_mean_in_fp32(ensemble: LogitEnsembleForCausalLM, folders: list[Path]) -> None:
    ids = torch.randint(4, architectures.VOCABULARY, (2, 9))
    alone = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits.double() for folder in folders]
    got = ensemble(ids).logits
    assert got.dtype == torch.float32
    expected = 0.5 * alone[0] + 0.25 * alone[1] + 0.25 * alone[2]
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_modes_by_their_formulas() -> None:
    logits = torch.randn(3, 2, 5, dtype=torch.float64)
    weights = [0.5, 0.3, 0.2]
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(combine(logits, weights, "logits"), (w * logits).sum(0))
    torch.testing.assert_close(combine(logits, weights, "logprobs"), (w * logits.log_softmax(-1)).sum(0))
    mixture = combine(logits, weights, "probs")
    torch.testing.assert_close(mixture, (w * logits.softmax(-1)).sum(0).log())
    torch.testing.assert_close(mixture.exp().sum(-1), torch.ones(2, dtype=torch.float64))


def test_probabilities_too_small_for_fp32_are_not_lost() -> None:
    logits = torch.tensor([[0.0, -200.0], [0.0, -300.0]])
    assert combine(logits, [0.5, 0.5], "probs")[1] == pytest.approx(-200 - 0.6931, abs=1e-3)


def test_a_weight_of_zero_leaves_a_member_out_of_the_mixture() -> None:
    logits = torch.randn(2, 4)
    torch.testing.assert_close(combine(logits, [1.0, 0.0], "probs"), logits[0].log_softmax(-1))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_generation_with_the_cache_is_generation_without_it(
    ensemble: LogitEnsembleForCausalLM, padded: dict[str, torch.Tensor], how: dict[str, object]
) -> None:
    plain = {k: v for k, v in how.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    torch.manual_seed(0)
    cached = ensemble.generate(**padded, **how, max_new_tokens=12)
    torch.manual_seed(0)
    uncached = ensemble.generate(**padded, **plain, max_new_tokens=12, use_cache=False)
    assert torch.equal(cached, uncached)


def test_a_padded_prompt_generates_what_it_does_alone(
    ensemble: LogitEnsembleForCausalLM, padded: dict[str, torch.Tensor]
) -> None:
    together = ensemble.generate(**padded, max_new_tokens=12)
    alone = ensemble.generate(padded["input_ids"][:1, 3:], max_new_tokens=12)
    assert torch.equal(together[0, 7:], alone[0, 4:])


def test_greedy_decoding_is_the_same_with_and_without_cache_over_256_tokens(tmp_path: Path) -> None:
    a = architectures.build("llama", tmp_path / "a", dtype=torch.float32)
    config = json.loads((a / "config.json").read_text(encoding="utf-8"))
    (a / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}), encoding="utf-8")
    b = architectures.sibling(a, tmp_path / "b", seed=1, relative=0.5)
    average_logits([str(a), str(b)], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 6, 7, 8]])
    cached = model.generate(ids, max_new_tokens=256)
    assert cached.shape == (1, 260)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=256, use_cache=False))


@torch.no_grad()
def test_one_cache_holds_all_members(ensemble: LogitEnsembleForCausalLM) -> None:
    ids = torch.randint(4, architectures.VOCABULARY, (1, 8))
    first = ensemble(ids[:, :5])
    assert isinstance(first.past_key_values, EnsembleCache)
    assert first.past_key_values.get_seq_length() == 5
    assert len(first.past_key_values) == sum(model.config.num_hidden_layers for model in ensemble.models)
    second = ensemble(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, ensemble(ids).logits[:, 5:], atol=1e-5, rtol=1e-4)
    first.past_key_values.crop(-3)
    assert [cache.get_seq_length() for cache in first.past_key_values.caches] == [5, 5, 5]


def test_a_cache_of_another_kind_is_refused(ensemble: LogitEnsembleForCausalLM) -> None:
    with pytest.raises(TypeError, match=r"DynamicCache, expected model\.new_cache\(\)"):
        ensemble(torch.tensor([[5]]), past_key_values=DynamicCache())


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])], ids=str)
def test_logits_to_keep(ensemble: LogitEnsembleForCausalLM, keep: int | torch.Tensor) -> None:
    ids = torch.randint(4, architectures.VOCABULARY, (2, 6))
    whole = ensemble(ids).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(ensemble(ids, logits_to_keep=keep).logits, expected, atol=1e-6, rtol=1e-5)


def test_labels_give_the_loss_of_the_mean(ensemble: LogitEnsembleForCausalLM) -> None:
    ids = torch.randint(4, architectures.VOCABULARY, (2, 6))
    out = ensemble(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    loss, logits = ensemble(ids, labels=ids, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits, out.logits)


def test_it_loads_where_this_package_is_absent_from_folder_and_hub(
    ensemble_folder: Path, tmp_path: Path, server: HubServer
) -> None:
    server.add("org/ensemble", ensemble_folder)
    script = """
import sys
sys.modules.update(merges=None, surgery=None, cli=None)
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
for place in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    ids = model.generate(**tokenizer("w5 w6 w7", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)
    print(ids.tolist())
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(ensemble_folder), "org/ensemble"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    native = AutoModelForCausalLM.from_pretrained(ensemble_folder)
    expected = native.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5).tolist()
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        "cpu",
        "auto",
        {"members.0": "cpu", "members.1": "disk", "members.2": "disk"},
        {"members.0.model": "cpu", "members.0.lm_head": "disk", "members.1": "cpu", "members.2": "cpu"},
    ],
    ids=str,
)
def test_device_maps(
    ensemble: LogitEnsembleForCausalLM, ensemble_folder: Path, tmp_path: Path, device_map: dict[str, str] | str
) -> None:
    placed = AutoModelForCausalLM.from_pretrained(ensemble_folder, device_map=device_map, offload_folder=tmp_path)
    ids = torch.randint(4, architectures.VOCABULARY, (2, 6))
    assert torch.equal(placed(ids).logits, ensemble(ids).logits)
    on_disk = "disk" in str(device_map)
    assert any(value.is_meta for value in placed.parameters()) == on_disk


def test_a_device_map_that_forgets_a_member_is_refused(ensemble_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device_map says nothing about members\.1; it names members\.0"):
        AutoModelForCausalLM.from_pretrained(ensemble_folder, device_map={"members.0": "cpu"})


def test_what_may_not_be_split_is_the_members_union(ensemble: LogitEnsembleForCausalLM) -> None:
    assert {"LlamaDecoderLayer", "GPT2Block", "MixtralDecoderLayer"} <= ensemble._no_split_modules
    plan = ensemble.models[0].tp_plan
    assert plan
    assert {name: ensemble.tp_plan[f"members.0.{name}"] for name in plan} == plan


def test_decoding_with_an_assistant_is_plain_greedy_decoding(ensemble: LogitEnsembleForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    plain = ensemble.generate(ids, max_new_tokens=12)
    assert torch.equal(ensemble.generate(ids, max_new_tokens=12, assistant_model=ensemble.models[0]), plain)
    assert torch.equal(ensemble.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=2), plain)


def test_dtype_is_handed_to_the_members(ensemble_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ensemble_folder, dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.float32


def test_the_attention_asked_for_is_the_members(ensemble_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ensemble_folder, attn_implementation="eager")
    assert {member.config._attn_implementation for member in model.models} == {"eager"}


@torch.no_grad()
def test_a_saved_ensemble_loads_again(ensemble_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ensemble_folder)
    model.models[0].lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_member_without_key_value_cache_is_refused() -> None:
    mamba = {"model_type": "mamba", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    config = LogitEnsembleConfig([mamba, mamba], [0.5, 0.5], vocab_size=96)
    with pytest.raises(ValueError, match=r"member 0 \(MambaForCausalLM\) does not keep its state in past_key_values"):
        LogitEnsembleForCausalLM(config)


def test_a_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: got 'median', expected one of logits, logprobs, probs"):
        LogitEnsembleConfig(mode="median")
    with pytest.raises(ValueError, match="weights: got 1 for 0 members"):
        LogitEnsembleConfig(weights=[1.0])


def test_a_folder_without_weights_says_so(ensemble_folder: Path, tmp_path: Path) -> None:
    shutil.copy(ensemble_folder / "config.json", tmp_path)
    with pytest.raises(OSError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
