"""Every file beside the weights, damaged at every place: a result or a `SurgeryError`, never "internal error"."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build, sibling
from support.damage import failures_of
from support.merges import add_lora

from surgery.checkpoint.config.config_layers import inexpressible_layers, untied, with_count, with_layers
from surgery.checkpoint.inspect import inspect_checkpoint, inspect_tables
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Expert, Head
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.edits.experts import scale_experts
from surgery.edits.heads import scale_heads
from surgery.edits.undo_file import undo
from surgery.engine.manifest import read_manifest
from surgery.engine.preflight import Preflight, check_config, check_quantised
from surgery.engine.storage.journal import Journal, SegmentRecord
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.evaluation.scorecard import read_scores, write_scores
from surgery.evaluation.scoring import Score
from surgery.publish.model_card import build_hub_card
from surgery.publish.package import collect_files
from surgery.vectors.application import apply
from surgery.vectors.extraction import extract
from surgery.vectors.task_vector import open_vector


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model tuned from it, their vector, an adapter, and an edit of the base that can be undone."""
    folder = tmp_path_factory.mktemp("models")
    base = add_tokenizer(build("mixtral", folder / "base", max_shard_size="20KB"))
    sibling(base, folder / "tuned", seed=1)
    add_tokenizer(folder / "tuned")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.5}')
    add_lora(folder / "lora", base)
    extract(str(folder / "tuned"), str(base), folder / "vector")
    scale_heads(str(base), folder / "edited", scales={Head(0, 1): 0.5})
    score = Score("m", "task", "acc", 0.5, 0.4, 0.6, 10, True)
    write_scores(folder / "edited", [score], "surgery eval m")
    return folder


@pytest.fixture
def copies(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


def look(folder: Path) -> None:
    """What `surgery inspect` does, and what plans of other layers ask a config."""
    checkpoint = open_checkpoint(folder)
    for table in inspect_tables(inspect_checkpoint(checkpoint)):
        table.to_markdown()
    structure = model_structure(checkpoint)
    inexpressible_layers(checkpoint.config, [0, 0, 1], structure)
    with_layers(checkpoint.config, [0, 0, 1], structure)
    with_count(checkpoint.config, 1)
    untied(checkpoint.config)


def check(path: Path, use: Callable[[], object]) -> None:
    assert failures_of(path, use) == []


def test_config_of_a_model(copies: Path) -> None:
    check(copies / "base" / "config.json", lambda: look(copies / "base"))


def test_config_of_a_target(copies: Path) -> None:
    tuned = open_checkpoint(copies / "tuned")

    def use() -> None:
        target, preflight = open_checkpoint(copies / "base"), Preflight()
        check_config(preflight, target, tuned.config, "tuned")
        check_config(preflight, tuned, target.config, "base")
        check_quantised(preflight, [target])

    check(copies / "base" / "config.json", use)


def test_config_of_a_model_to_edit(copies: Path) -> None:
    ref, out = str(copies / "base"), copies / "out"

    def use() -> None:
        scale_heads(ref, out, scales={Head(0, 1): 0.5}, dry_run=True)
        scale_experts(ref, out, scales={Expert(0, 1): 0.5}, dry_run=True)

    check(copies / "base" / "config.json", use)


def test_index_of_a_model(copies: Path) -> None:
    check(copies / "base" / "model.safetensors.index.json", lambda: open_checkpoint(copies / "base"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"])
def test_files_of_a_tokenizer(name: str, copies: Path) -> None:
    base = copies / "base"
    if name in ("vocab.json", "added_tokens.json"):
        (base / "tokenizer.json").unlink()
        (base / "vocab.json").write_text('{"a": 0, "b": 1, "c": 2}')
        (base / "added_tokens.json").write_text('{"d": 3}')

    def use() -> None:
        read_vocabulary(base)
        inspect_checkpoint(open_checkpoint(base))

    check(base / name, use)


def test_config_of_an_adapter(copies: Path) -> None:
    check(copies / "lora" / "adapter_config.json", lambda: open_checkpoint(copies / "lora"))


def test_manifest_of_a_model(copies: Path) -> None:
    edited = copies / "edited"

    def use() -> None:
        verify(str(edited))
        read_scores(edited)
        build_hub_card(collect_files(edited), "name")

    check(edited / "surgery.json", use)


def test_manifest_of_a_vector(copies: Path) -> None:
    check(copies / "vector" / "surgery.json", lambda: open_vector(copies / "vector").sketch())


def test_config_of_a_vectors_donor(copies: Path) -> None:
    check(copies / "vector" / "donor" / "config.json", lambda: open_vector(copies / "vector"))


def test_scores_of_a_model(copies: Path) -> None:
    edited = copies / "edited"
    package = collect_files(edited)

    def use() -> None:
        read_scores(edited)
        build_hub_card(package, "name")

    check(edited / "scores.json", use)


SKETCHES: dict[str, dict[str, torch.Tensor] | bytes | None] = {
    "missing": None,
    "empty": b"",
    "of another kind": b"PK\x03\x04" + bytes(1_000),
    "of integers": {"model.embed_tokens.weight": torch.ones(8, dtype=torch.int64)},
    "of matrices": {"model.embed_tokens.weight": torch.ones(8, 8)},
    "too long": {"model.embed_tokens.weight": torch.ones(100_000)},
}


@pytest.mark.parametrize("kind", SKETCHES)
def test_a_damaged_sketch_is_named(kind: str, copies: Path) -> None:
    sketch = copies / "vector" / "donor" / "sketch.safetensors"
    content = SKETCHES[kind]
    sketch.unlink()
    if isinstance(content, bytes):
        sketch.write_bytes(content)
    elif content is not None:
        save_file(content, sketch)
    with pytest.raises(SurgeryError, match=r"donor/sketch\.safetensors: "):
        apply(str(copies / "vector"), str(copies / "base"), copies / "out", dry_run=True)


def test_record_of_an_undo_file(copies: Path) -> None:
    path = copies / "edited" / "undo" / "undo.safetensors"
    record = copies / "edits.json"
    metadata, tensors = dict(open_checkpoint(path).metadata), load_file(path)
    record.write_text(metadata["edits"])

    def use() -> None:
        save_file(tensors, path, metadata | {"edits": record.read_bytes().decode(errors="replace")})
        undo(str(copies / "edited"), copies / "out", dry_run=True)

    check(record, use)


def test_journal_of_an_unfinished_output(tmp_path: Path) -> None:
    fingerprint = "x"
    with Journal(tmp_path, fingerprint) as journal:
        journal.append(SegmentRecord(0, 0, "0" * 32, ("1" * 32, ""), (0.5, 1.0)))
    path = tmp_path / "journal.jsonl"
    first, line = path.read_bytes().splitlines()
    record = tmp_path.with_name("line.json")
    record.write_bytes(line)

    def use() -> None:
        path.write_bytes(first + b"\n" + record.read_bytes() + b"\n")
        with Journal(tmp_path, fingerprint) as journal:
            assert all(bytes.fromhex(each.digest) for each in journal.records.values())

    check(record, use)


def test_what_is_wrong_is_told_with_file_key_value_and_rule(copies: Path) -> None:
    def message(path: str, change: Callable[[dict[str, object]], object], use: Callable[[], object]) -> str:
        file = copies / path
        before = file.read_text()
        record = json.loads(before)
        change(record)
        file.write_text(json.dumps(record))
        with pytest.raises(SurgeryError) as caught:
            use()
        file.write_text(before)
        assert str(caught.value).startswith(f"{file}: ")
        return str(caught.value).removeprefix(f"{file}: ")

    def set_to(key: str, value: object) -> Callable[[dict[str, object]], object]:
        return lambda record: record.update({key: value})

    config = [
        ("num_hidden_layers", "many", "\"num_hidden_layers\": got 'many', expected a whole number from 0"),
        ("num_hidden_layers", -1, '"num_hidden_layers": got -1, expected a whole number'),
        ("num_hidden_layers", 2**70, '"num_hidden_layers": got a whole number of 71 bits'),
        ("num_hidden_layers", float("inf"), '"num_hidden_layers": got inf'),
        ("hidden_size", True, '"hidden_size": got true'),
        ("vocab_size", 1.5, '"vocab_size": got 1.5'),
        ("architectures", [1], '"architectures": got a list of 1, expected a list of texts'),
        ("architectures", "x" * 1_000, '"architectures": got \'xxx'),
        ("model_type", {}, '"model_type": got a table of 0, expected text'),
        ("text_config", "x", "\"text_config\": got 'x', expected a table"),
        ("text_config", {"n_layer": "x"}, "\"text_config.n_layer\": got 'x'"),
        ("layer_types", "x", "\"layer_types\": got 'x', expected a list"),
        ("quantization_config", "x", "\"quantization_config\": got 'x', expected a table"),
    ]
    for key, value, expected in config:
        text = message("base/config.json", set_to(key, value), lambda: open_checkpoint(copies / "base"))
        assert text.startswith(expected)

    def change_tensor(key: str, value: object) -> Callable[[dict[str, object]], object]:
        def change(record: dict[str, object]) -> None:
            tensors = record["tensors"]
            assert isinstance(tensors, dict)
            tensors["lm_head.weight"][key] = value

        return change

    manifest = [
        (change_tensor("shape", None), "tensors.lm_head.weight.shape: got nothing, expected a valid list"),
        (change_tensor("shape", [-1]), "tensors.lm_head.weight.shape.0: got -1, expected greater than"),
        (change_tensor("dtype", "F33"), "tensors.lm_head.weight.dtype: got 'F33', expected a dtype"),
        (change_tensor("xxh3", 5), "tensors.lm_head.weight.xxh3: got 5, expected a valid string"),
        (set_to("tensors", []), "tensors: got a list of 0, expected a valid dictionary"),
        (set_to("inputs", [1]), "inputs: got a list of 1, expected a valid dictionary"),
        (set_to("command", "x"), "command: got 'x', expected a valid dictionary"),
        (set_to("versions", None), "versions: got nothing, expected a valid dictionary"),
        (lambda record: record.pop("tensors"), "has no tensors"),
    ]
    for change, expected in manifest:
        text = message("edited/surgery.json", change, lambda: read_manifest(copies / "edited", needs=["tensors"]))
        assert text.startswith(expected), text


def test_a_name_too_long_for_the_file_system_is_no_model() -> None:
    with pytest.raises(SurgeryError, match="no such folder or file"):
        open_checkpoint("x" * 5_000)
    with pytest.raises(SurgeryError):
        open_vector("x" * 5_000)
