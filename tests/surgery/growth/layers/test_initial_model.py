"""The model that a growth begins with: the embedding to the bit, everything else as transformers begins it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.architectures import ARCHITECTURES, add_tokenizer
from support.merges import config_of, files_of, logits_of, tensors_of
from torch import Tensor

import surgery.engine.storage.journal
from surgery.checkpoint.reader import SourceFiles, TensorReader, hash_tensor
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.growth.layers.add import add_layers
from surgery.growth.layers.initial_model import init_model, llama_config
from surgery.growth.plan import ModelShape
from surgery.io.hashing import KEY

VOCABULARY, WIDTH = 96, 32


def embedding(folder: Path, *, width: int = WIDTH, rows: int = VOCABULARY, tokens: int | None = VOCABULARY) -> Path:
    """A frozen embedding as `surgery grow embed` writes it, with a tokenizer of `tokens` tokens."""
    folder.mkdir(parents=True)
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    save_file({"embedding": table}, folder / "embedding.safetensors", metadata={"format": "pt"})
    stored = open_checkpoint(folder).tensors["embedding"]
    with SourceFiles([stored.file]) as files:
        entry = {"dtype": "F32", "shape": [rows, width], KEY: hash_tensor(TensorReader(files), stored), "edited": False}
    (folder / "surgery.json").write_text(
        json.dumps({"schema": 1, "kind": "embedding", "tensors": {"embedding": entry}})
    )
    return add_tokenizer(folder, tokens) if tokens else folder


def begin(folder: Path, name: str = "m0", *, embed: Path | None = None, **shape: Any) -> Path:
    """A model on the embedding of `folder`."""
    at = embed or folder / "emb"
    init_model(str(at if at.exists() else embedding(at)), folder / name, shape=ModelShape(**shape))
    return folder / name


def table_of(folder: Path) -> Tensor:
    return tensors_of(folder)["embedding"]


def config_file(folder: Path, family: str, **values: Any) -> Path:
    config = ARCHITECTURES[family]().to_dict() | values
    path = folder / f"{family}.json"
    path.write_text(json.dumps(config))
    return path


def test_a_model_without_layers_loads_and_speaks(tmp_path: Path) -> None:
    report = init_model(str(embedding(tmp_path / "emb")), tmp_path / "m0", shape=ModelShape())
    tensors = tensors_of(tmp_path / "m0")
    assert list(tensors) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], table_of(tmp_path / "emb"))
    assert (tensors["model.norm.weight"] == 1).all()
    assert tensors["lm_head.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert logits_of(tmp_path / "m0").shape == (4, VOCABULARY)
    assert (report.layers, report.frozen, report.trainable) == (0, 96 * 32, 96 * 32 + 32)
    assert verify(str(tmp_path / "m0")).ok
    assert "to the bit, is not tied" in (tmp_path / "m0/README.md").read_text()


def test_the_embedding_is_in_the_model_by_its_hash(tmp_path: Path) -> None:
    m0 = begin(tmp_path)
    made, given = read_manifest(m0), read_manifest(tmp_path / "emb")
    frozen = given["tensors"]["embedding"][KEY]
    assert made["tensors"]["model.embed_tokens.weight"][KEY] == frozen
    assert made["report"]["frozen_embedding"] == frozen
    assert made["versions"]["transformers"] == transformers.__version__
    assert made["inputs"]["embedding"]["ref"] == str(tmp_path / "emb")
    assert made["command"]["line"].startswith(f"surgery grow init -o OUT --embed {tmp_path / 'emb'}")


def test_the_tokenizer_comes_along_and_gives_its_special_tokens(tmp_path: Path) -> None:
    m0 = begin(tmp_path)
    assert (m0 / "tokenizer.json").read_bytes() == (tmp_path / "emb/tokenizer.json").read_bytes()
    config = config_of(m0)
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, 3, 1]
    model = transformers.AutoModelForCausalLM.from_pretrained(m0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(m0)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 3


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    report = init_model(str(embedding(tmp_path / "emb", tokens=None)), tmp_path / "m0", shape=ModelShape())
    assert report.warnings == ["no tokenizer lies beside the embedding, so the model has none either"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    emb = str(embedding(tmp_path / "emb"))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_model(emb, tmp_path / name, shape=ModelShape(layers=1), seed=seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    a, c = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c")
    same = {name for name, x in a.items() if torch.equal(x, c[name])}
    assert same == {name for name in a if "norm" in name or "embed" in name}


def test_layers_are_those_that_adding_gives(tmp_path: Path) -> None:
    at_once = begin(tmp_path, "at once", layers=2)
    add_layers(str(begin(tmp_path)), tmp_path / "grown", layers=2, init="random")
    one, other = tensors_of(at_once), tensors_of(tmp_path / "grown")
    assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
    assert config_of(at_once) == config_of(tmp_path / "grown")
    assert logits_of(at_once).isfinite().all()


def test_a_model_without_layers_gets_identities_that_change_nothing(tmp_path: Path) -> None:
    m0 = begin(tmp_path)
    report = add_layers(str(m0), tmp_path / "m1", layers=2)
    assert (report.layers_before, report.new, report.origins) == (0, (0, 1), (None, None))
    assert torch.equal(logits_of(tmp_path / "m1"), logits_of(m0))
    tensors = tensors_of(tmp_path / "m1")
    zero = {name for name, x in tensors.items() if not x.any()}
    assert zero == {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    add_layers(str(tmp_path / "m1"), tmp_path / "m2", at="middle", init="copy")
    assert config_of(tmp_path / "m2")["num_hidden_layers"] == 3


def test_a_model_without_layers_has_none_to_copy(tmp_path: Path) -> None:
    m0 = begin(tmp_path)
    with pytest.raises(SurgeryError, match=r"has no layers that could be copied\. Begin with random ones"):
        add_layers(str(m0), tmp_path / "m1", init="copy")
    with pytest.raises(SurgeryError, match="got 1, expected top, middle, or 0 to 0"):
        add_layers(str(m0), tmp_path / "m1", at=1)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe", "gpt_oss"])
def test_a_config_gives_another_family(family: str, tmp_path: Path) -> None:
    """Beside others one with positions that are added, and one whose layers are of two kinds."""
    config = config_file(tmp_path, family)
    m0 = begin(tmp_path, config=config)
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert torch.equal(tensors_of(m0)[name], table_of(tmp_path / "emb"))
    assert config_of(m0)["tie_word_embeddings"] is False
    assert logits_of(m0).isfinite().all()
    add_layers(str(m0), tmp_path / "m2", layers=2)
    assert torch.equal(logits_of(tmp_path / "m2"), logits_of(m0))
    made = begin(tmp_path, "made", config=config, layers=2)
    assert config_of(made).get("layer_types") == config_of(tmp_path / "m2").get("layer_types")
    assert logits_of(made).isfinite().all()


def refused(folder: Path, match: str, *, embed: Mapping[str, Any] | None = None, **shape: Any) -> None:
    emb = embedding(folder / f"emb {len(list(folder.iterdir()))}", **(embed or {}))
    with pytest.raises(SurgeryError, match=match):
        init_model(str(emb), folder / "out", shape=ModelShape(**shape))
    assert not list(folder.glob("out*"))


def test_configs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    qwen = config_file(tmp_path, "qwen3")
    refused(tmp_path, "says a width of 32, the embedding is 48 wide", embed={"width": 48}, config=qwen)
    refused(tmp_path, "heads, mlp cannot be given beside a config", config=qwen, heads=2, mlp=64)
    refused(tmp_path, "nowhere.json: no such file", config=tmp_path / "nowhere.json")
    gemma = config_file(tmp_path, "gemma2")
    refused(tmp_path, "a gemma2 scales or normalises its token embeddings", config=gemma)
    other = config_file(tmp_path, "llama", model_type="homemade")
    refused(tmp_path, "transformers knows no family 'homemade'", config=other)


def test_shapes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "heads: 3 heads do not divide a width of 32 into even parts", heads=3)
    refused(tmp_path, "kv_heads: 3 key-value heads cannot be shared by 4 heads", heads=4, kv_heads=3)
    refused(tmp_path, "the embedding is 33 wide: rotary positions turn pairs", embed={"width": 33})
    refused(tmp_path, "the tokenizer has ids up to 95, the embedding only 90 rows", embed={"rows": 90})


def test_the_defaults_of_a_llama() -> None:
    config = llama_config(768, ModelShape())
    assert (config["num_attention_heads"], config["head_dim"], config["intermediate_size"]) == (12, 64, 2048)
    assert llama_config(1000, ModelShape())["intermediate_size"] == 2688  # 8/3 · 1000 = 2,666.7, up to 42 · 64
    assert llama_config(1000, ModelShape())["num_attention_heads"] == 10, "15 heads of 64 do not divide it"
    asked = llama_config(768, ModelShape(heads=6, kv_heads=2, mlp=100, context=77, layers=3))
    assert [asked[key] for key in ("head_dim", "num_key_value_heads", "intermediate_size", "num_hidden_layers")] == [
        128,
        2,
        100,
        3,
    ]
    assert asked["max_position_embeddings"] == 77
    read = transformers.LlamaConfig.from_dict(asked).to_dict()
    assert {key: read[key] for key in asked} == asked, "transformers reads it as it is written"


def test_another_dtype_rounds_everything_and_says_so(tmp_path: Path) -> None:
    init_model(str(embedding(tmp_path / "emb")), tmp_path / "m0", shape=ModelShape(layers=1), dtype="bfloat16")
    tensors = tensors_of(tmp_path / "m0")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["model.embed_tokens.weight"], table_of(tmp_path / "emb").bfloat16())
    assert config_of(tmp_path / "m0")["dtype"] == "bfloat16"
    assert "rounded to BF16" in (tmp_path / "m0/README.md").read_text()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = init_model(str(embedding(tmp_path / "emb")), tmp_path / "m0", shape=ModelShape(layers=2), dry_run=True)
    assert report.dry_run and report.layers == 2
    assert [path.name for path in tmp_path.iterdir()] == ["emb"]
    assert "needed" in report.preflight["disk"]


def test_interrupted_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emb, shape = str(embedding(tmp_path / "emb")), ModelShape(layers=2)
    init_model(emb, tmp_path / "whole", shape=shape)
    add = surgery.engine.storage.journal.Journal.append
    left = 12

    def killed(journal: Any, record: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        add(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(surgery.engine.storage.journal.Journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            init_model(emb, tmp_path / "out", shape=shape, options=ExecutionOptions(threads=1))
    report = init_model(emb, tmp_path / "out", shape=shape)
    assert report.resumed_bytes > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
