"""Writing ensembles and taking them apart again: bytes, shared tensors, refusals before any write."""

from __future__ import annotations

import filecmp
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import architectures
from support.hub_server import HubServer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cli.commands import merge as commands
from merges.ensemble import tuning
from merges.ensemble.average import MODEL_FILE, average_logits
from merges.ensemble.ensemble_model import combine
from merges.ensemble.members import check_weights
from merges.ensemble.tuning import RATES
from merges.ensemble.unpacking import unpack
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.verification import verify
from surgery.errors import SurgeryError, SurgeryWarning

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two siblings with one frozen embedding; the first in shards."""
    root = tmp_path_factory.mktemp("pair")
    a = architectures.add_tokenizer(architectures.build("llama", root / "a", max_shard_size="10KB"))
    b = architectures.sibling(a, root / "b", seed=1)
    shard = json.loads((a / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"][EMBEDDING]
    tensors = load_file(b / shard)
    tensors[EMBEDDING] = load_file(a / shard)[EMBEDDING]
    save_file(tensors, b / shard, metadata={"format": "pt"})
    return str(a), str(b)


@pytest.fixture(scope="module")
def out(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "ensemble"
    average_logits(pair, folder)
    return folder


def _same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    matching, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return names == sorted(path.name for path in b.iterdir()) == sorted(matching)


def test_an_embedding_that_members_share_is_stored_once(pair: tuple[str, str], tmp_path: Path) -> None:
    report = average_logits(pair, tmp_path / "out")
    table = open_checkpoint(tmp_path / "out").tensors
    size = open_checkpoint(pair[0]).tensors[EMBEDDING].n_bytes
    assert f"members.0.{EMBEDDING}" in table
    assert f"members.1.{EMBEDDING}" not in table
    assert report.saved_bytes == size
    assert [row.n_bytes - row.stored_bytes for row in report.members] == [0, size]
    assert report.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.models[0].model.embed_tokens.weight is model.models[1].model.embed_tokens.weight
    assert model.models[0].lm_head.weight is not model.models[1].lm_head.weight


def test_a_tied_head_follows_the_shared_embedding(tmp_path: Path) -> None:
    a = architectures.build("qwen2", tmp_path / "a", tied=True)
    average_logits([str(a), str(a)], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len({id(value) for value in model.parameters()}) == len(open_checkpoint(a).tensors)
    one, two = model.models
    assert one.model.embed_tokens.weight is two.lm_head.weight


def test_a_model_with_itself_is_that_model_at_its_size(tmp_path: Path) -> None:
    a = architectures.build("mixtral", tmp_path / "a", dtype=torch.float32)
    report = average_logits([str(a), str(a)], tmp_path / "out")
    assert report.shared_tensors == len(open_checkpoint(a).tensors)
    assert set(open_checkpoint(tmp_path / "out").tensors) == {f"members.0.{n}" for n in open_checkpoint(a).tensors}
    ids = torch.tensor([[5, 6, 7]])
    expected = AutoModelForCausalLM.from_pretrained(a)(ids).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, expected)


def test_equal_tensors_of_one_member_stay_apart(tmp_path: Path) -> None:
    a = architectures.build("llama", tmp_path / "a", max_shard_size=None)
    norms = ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")
    tensors = load_file(a / "model.safetensors")
    tensors |= {name: torch.ones_like(tensors[name]) for name in norms}
    save_file(tensors, a / "model.safetensors", metadata={"format": "pt"})
    b = architectures.build("llama", tmp_path / "b", seed=1)
    assert average_logits([str(a), str(b)], tmp_path / "out").shared_tensors == 0


def test_several_files_load_and_verify(pair: tuple[str, str], out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "sharded")
    tensors = load_file(tmp_path / "sharded" / "model.safetensors")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, tmp_path / "sharded" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    ids = torch.tensor([[5, 6, 7]])
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(sharded(ids).logits, AutoModelForCausalLM.from_pretrained(out)(ids).logits)
    assert verify(str(tmp_path / "sharded")).ok
    unpack(str(tmp_path / "sharded"), tmp_path / "members")
    assert _same_files(Path(pair[0]), tmp_path / "members" / "a")


def test_an_ensemble_on_the_hub_gives_its_members_back(
    pair: tuple[str, str], out: Path, tmp_path: Path, server: HubServer
) -> None:
    server.add("org/ensemble", out)
    unpack("org/ensemble", tmp_path / "members")
    for folder in map(Path, pair):
        assert _same_files(folder, tmp_path / "members" / folder.name)


def test_the_folder_verifies_and_carries_what_a_model_needs(pair: tuple[str, str], out: Path) -> None:
    report = verify(str(out))
    assert report.ok
    assert report.hashes_compared
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (Path(pair[0]) / name).read_bytes()
    assert (out / MODEL_FILE.name).read_bytes() == MODEL_FILE.read_bytes()
    manifest = json.loads((out / "surgery.json").read_text(encoding="utf-8"))
    assert manifest["kind"] == "ensemble"
    assert manifest["command"]["line"] == f"surgery merge logits {pair[0]} {pair[1]} -o OUT --mode logits"
    assert "0.5 · a, 0.5 · b" in (out / "README.md").read_text(encoding="utf-8")


def test_the_same_job_gives_the_same_bytes(pair: tuple[str, str], out: Path, tmp_path: Path) -> None:
    average_logits(pair, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (out / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_unpacking_restores_every_file(tmp_path: Path, name: str) -> None:
    a = architectures.add_tokenizer(architectures.build(name, tmp_path / "a", max_shard_size="20KB"))
    b = architectures.add_tokenizer(architectures.build("qwen3", tmp_path / "b"))
    (a / "README.md").write_text("A card of its own.\n", encoding="utf-8")
    average_logits([str(a), str(b), str(a)], tmp_path / "out")
    report = unpack(str(tmp_path / "out"), tmp_path / "members")
    assert sorted(path.name for path in (tmp_path / "members").iterdir()) == ["a", "a-2", "b"]
    assert _same_files(a, tmp_path / "members" / "a")
    assert _same_files(a, tmp_path / "members" / "a-2")
    assert _same_files(b, tmp_path / "members" / "b")
    assert report.members["b"] == (b / "model.safetensors").stat().st_size


def test_shards_without_an_index_come_back_without_one(tmp_path: Path) -> None:
    a = architectures.build("llama", tmp_path / "a", max_shard_size="20KB")
    (a / "model.safetensors.index.json").unlink()
    average_logits([str(a), str(a)], tmp_path / "out")
    unpack(str(tmp_path / "out"), tmp_path / "members")
    assert _same_files(a, tmp_path / "members" / "a")


def test_padded_rows_are_cut_to_what_all_members_have(tmp_path: Path) -> None:
    a = architectures.add_tokenizer(architectures.build("llama", tmp_path / "a", dtype=torch.float32), 90)
    b = architectures.sibling(a, tmp_path / "b", seed=1)
    tensors = load_file(b / "model.safetensors")
    for name in (EMBEDDING, "lm_head.weight"):
        tensors[name] = tensors[name][:91].clone()
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((b / "config.json").read_text(encoding="utf-8"))
    (b / "config.json").write_text(json.dumps({**config, "vocab_size": 91}), encoding="utf-8")
    report = average_logits([str(a), str(b)], tmp_path / "out")
    assert report.vocab_size == 91
    assert report.preflight["rows"] == "a 96, b 91; cut to 91, which hold every token"
    ids = torch.tensor([[5, 6, 7]])
    each = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits[..., :91] for folder in (a, b)]
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(got, (each[0] + each[1]) / 2, atol=1e-6, rtol=1e-5)

    architectures.add_tokenizer(a, 93)
    architectures.add_tokenizer(b, 93)
    with pytest.raises(SurgeryError, match=r"b has 91 rows for tokens with ids up to 92: those beyond would be lost"):
        average_logits([str(a), str(b)], tmp_path / "lost")
    for folder in (a, b):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SurgeryError, match=r"different sizes \(a 96, b 91\) and no model has a tokenizer"):
        average_logits([str(a), str(b)], tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_members_without_tokenizer_are_warned_about(tmp_path: Path) -> None:
    a = architectures.build("llama", tmp_path / "a")
    report = average_logits([str(a), str(a)], tmp_path / "out", dry_run=True)
    assert report.warnings[0] == f"{a} has no tokenizer files: only its number of rows was compared."
    assert report.preflight["tokens"] == "not compared: no tokenizer; 96 rows each"
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_on_its_base_is_a_member(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = architectures.build("llama", tmp_path / "base", dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    report = average_logits([str(base), f"{base}+{tmp_path / 'adapter'}"], tmp_path / "out")
    assert report.shared_tensors == len(open_checkpoint(base).tensors) - 2
    ids = torch.tensor([[5, 6, 7]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.member_logits(ids)[1], adapted(ids).logits, atol=1e-5, rtol=1e-5)
    unpack(str(tmp_path / "out"), tmp_path / "members")
    assert (tmp_path / "members" / "base" / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "members" / "adapter")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["logits", "logprobs", "probs"])
def test_mode_and_weights_reach_the_model(pair: tuple[str, str], tmp_path: Path, mode: str) -> None:
    average_logits(pair, tmp_path / "out", weights=[3, 1], mode=mode)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.weights == [0.75, 0.25]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, combine(model.member_logits(ids), [0.75, 0.25], mode))


def test_special_tokens_of_tuning_rows_are_told_and_recorded(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "EPOCHS", 1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "w5 w6 w7 </s> w8"}\n' * 5, encoding="utf-8")
    average_logits(pair, tmp_path / "text", tune=rows)
    with pytest.warns(SurgeryWarning, match=r"--tune: its texts hold special tokens, which act as such: </s> 5×"):
        average_logits(pair, tmp_path / "parse", tune=rows, special_tokens="parse")
    lines = [
        json.loads((tmp_path / name / "surgery.json").read_text())["command"]["line"] for name in ("text", "parse")
    ]
    assert "--special-tokens" not in lines[0] and "--special-tokens parse" in lines[1]


@pytest.mark.parametrize("what", ["weights", "head"])
def test_tuning_is_written_and_reported(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATES, "head", 1e-2)
    a = architectures.add_tokenizer(architectures.build("llama", tmp_path / "a", dtype=torch.float32))
    b = architectures.add_tokenizer(architectures.build("gpt2", tmp_path / "b", seed=1, dtype=torch.float32))
    rows = [json.dumps({"text": " ".join(["w5 w6 w7 w8"] * 3)})] * 20
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    plain = average_logits([str(a), str(b)], tmp_path / "plain")
    report = average_logits([str(a), str(b)], tmp_path / "out", tune=tmp_path / "rows.jsonl", tune_what=what)
    assert plain.tuning is None
    assert report.tuning is not None
    assert report.tuning.kept
    assert report.tuning.after < report.tuning.before
    ids = torch.tensor([[5, 6, 7, 8] * 3])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "out")]
    losses = [model(ids, labels=ids).loss.item() for model in models]
    assert losses == pytest.approx([report.tuning.before, report.tuning.after], abs=1e-4)
    assert ("head.weight" in open_checkpoint(tmp_path / "out").tensors) == (what == "head")
    assert verify(str(tmp_path / "out")).ok
    assert "held-out loss" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    unpack(str(tmp_path / "out"), tmp_path / "members")
    assert _same_files(a, tmp_path / "members" / "a")
    if what == "head":
        model = models[1]
        assert torch.equal(
            model.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8, use_cache=False)
        )
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(again(ids).logits, model(ids).logits)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_weights_become_a_mean_or_an_error(weights: list[float]) -> None:
    if math.fsum(weights) > 0:
        assert math.fsum(check_weights(weights, len(weights), "logits")) == pytest.approx(1)
    else:
        with pytest.raises(SurgeryError, match="expected one above 0"):
            check_weights(weights, len(weights), "logits")


@pytest.mark.parametrize(
    ("weights", "mode", "message"),
    [
        ([1.0], "logits", r"--weight: got 1 weight\(s\) for 2 models. Give one per model, or none"),
        ([1.0, -1.0], "logits", "--weight: got 1, -1, whose sum is 0, expected one above 0"),
        ([0.0, 0.0], "logits", "whose sum is 0, expected one above 0"),
        ([1.0, math.nan], "logits", "--weight: got 1, nan, expected finite numbers"),
        ([math.inf, 1.0], "logits", "--weight: got inf, 1, expected finite numbers"),
        ([2.0, -1.0], "probs", "--weight: got 2, -1; probabilities need weights of 0 or more"),
        (None, "median", "--mode: got 'median', expected one of logits, logprobs, probs"),
    ],
)
def test_weights_that_make_no_mean_are_refused(
    pair: tuple[str, str], tmp_path: Path, weights: list[float] | None, mode: str, message: str
) -> None:
    with pytest.raises(SurgeryError, match=message) as caught:
        average_logits(pair, tmp_path / "out", weights=weights, mode=mode)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_one_model_is_no_ensemble(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"got 1 model\(s\), expected two or more"):
        average_logits(pair[:1], tmp_path / "out")


def test_an_out_that_exists_is_refused(pair: tuple[str, str], out: Path) -> None:
    with pytest.raises(SurgeryError, match="exists already"):
        average_logits(pair, out)
    with pytest.raises(SurgeryError, match=r"lies inside the members\.0"):
        average_logits(pair, Path(pair[0]) / "out")


def test_different_tokens_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    other = architectures.add_tokenizer(architectures.build("llama", tmp_path / "other"), ["x", "y"])
    with pytest.raises(SurgeryError, match=r"tokens differ: .* tokens are only in .*use models of one tokenizer"):
        average_logits([pair[0], str(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "own.Own"}},
            r"needs code that is not in transformers \(model_type 'my_own'\), which is never run here",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is no causal language model, but LlamaForSequenceClassification",
        ),
        ({"model_type": "t5"}, r"is no causal language model \(model_type 't5'\)"),
        ({"model_type": "mamba", "architectures": None}, "keeps its state elsewhere than in a key-value cache"),
        ({"model_type": "logit_ensemble"}, "is an ensemble itself"),
        ({"rms_norm_eps": "many"}, "has a config.json that transformers refuses"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\)"),
    ],
)
def test_models_that_cannot_be_members_are_refused(
    pair: tuple[str, str], tmp_path: Path, config: dict[str, object], message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[0], other)
    values = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**values, **config}), encoding="utf-8")
    with pytest.raises(SurgeryError, match=message):
        average_logits([pair[0], str(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_alone_cannot_be_members(pair: tuple[str, str], tmp_path: Path) -> None:
    file = next(Path(pair[0]).glob("*.safetensors"))
    with pytest.raises(SurgeryError, match=r"has no config\.json, so nothing says how to run it"):
        average_logits([pair[0], str(file)], tmp_path / "out")


def test_what_cannot_be_unpacked_is_refused(pair: tuple[str, str], out: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="is no logit ensemble"):
        unpack(pair[0], tmp_path / "members")
    with pytest.raises(SurgeryError, match="exists already"):
        unpack(str(out), tmp_path)
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "saved")
    with pytest.raises(SurgeryError, match=r"0\.json: is missing, so the members' files cannot be restored"):
        unpack(str(tmp_path / "saved"), tmp_path / "members")
    assert not (tmp_path / "members").exists()


def test_the_commands_print_what_they_did(pair: tuple[str, str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(commands.logits)
    app.command()(commands.unpack)
    runner = CliRunner()
    arguments = ["logits", *pair, "--weight", "3", "--weight", "1", "-o", str(tmp_path / "out")]
    planned = runner.invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0
    assert "Nothing written" in planned.stderr
    done = runner.invoke(app, [*arguments, "--json"])
    assert json.loads(done.stdout)["members"][0]["weight"] == 0.75
    unpacked = runner.invoke(app, ["unpack", str(tmp_path / "out"), "-o", str(tmp_path / "members")])
    assert unpacked.exit_code == 0
    assert f"Wrote {tmp_path / 'members' / 'a'}" in unpacked.stderr
