"""Surfaces: what each token looks like in text, whatever scheme its tokenizer spells it in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery.checkpoint.tokenizer_files import list_tokenizer_files
from surgery.errors import SurgeryError
from surgery.growth.embedding.token_text import open_tokenizer, token_strings


def fast(vocab: list[str], *, special: tuple[str, ...] = ("<s>",), scheme: str = "plain") -> Any:
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocab)}, merges=[]))
    if scheme == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if scheme == "pieces":
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if scheme == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def test_byte_level_tokens_are_decoded() -> None:
    found = token_strings(fast(["Ġpainted", "painted", "Ċ", "ĠÃ©t", "ä¸Ń", "<s>"], scheme="bytes"))
    assert found == [" painted", "painted", "\n", " ét", "中", "<s>"]


def test_bytes_that_are_no_character_stay_apart() -> None:
    found = token_strings(fast(["â", "ã", "Ġâľ", "Ńa", "<s>"], scheme="bytes"))
    assert found == ["<0xE2>", "<0xE3>", " <0xE2><0x9C>", "<0xAD>a", "<s>"]


@pytest.mark.parametrize("scheme", ["pieces", "metaspace"])
def test_pieces_have_spaces_and_literal_bytes(scheme: str) -> None:
    found = token_strings(fast(["▁the", "the", "<0x0A>", "▁", "▁▁", "<s▁>"], special=("<s▁>",), scheme=scheme))
    assert found == [" the", "the", "<0x0A>", " ", "  ", "<s▁>"]


def test_a_tokenizer_of_characters_keeps_its_tokens() -> None:
    assert token_strings(fast(["a", "▁", "Ġ", "<s>"])) == ["a", "▁", "Ġ", "<s>"]


def test_ids_without_a_token_are_called_unused_and_empty_ones_empty() -> None:
    found = token_strings(fast(["a", "", "<s>"]), rows=5)
    assert found == ["a", "<empty 1>", "<s>", "<unused 3>", "<unused 4>"]


def test_fewer_rows_than_ids_are_refused() -> None:
    with pytest.raises(SurgeryError, match=r"--rows: got 2 rows, expected 3 or more: as many as tok has"):
        token_strings(fast(["a", "b", "<s>"]), rows=2, where="tok")


def test_a_tokenizer_without_tokens_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"tok: has no tokens"):
        token_strings(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={}, merges=[]))), where="tok")


def test_a_folder_gives_the_tokenizer_and_its_files(tmp_path: Path) -> None:
    fast(["a", "b", "<s>"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("")
    opened = open_tokenizer(str(tmp_path))
    assert token_strings(opened.tokenizer) == ["a", "b", "<s>"]
    assert {path.name for path in opened.files} == {"tokenizer.json", "tokenizer_config.json", "rag.jinja"}
    assert list_tokenizer_files(tmp_path) == opened.files


def test_of_a_model_on_the_hub_no_weights_are_fetched(server: HubServer, tmp_path: Path) -> None:
    fast(["a", "b", "<s>"]).save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "model" / name).write_text('{"model_type": "llama"}')
    commit = server.add("lab/tiny", tmp_path / "model")
    opened = open_tokenizer("lab/tiny")
    assert token_strings(opened.tokenizer) == ["a", "b", "<s>"]
    assert (opened.repo_id, opened.revision) == ("lab/tiny", commit)
    assert {path.name for path in opened.files} == {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in opened.folder.iterdir()} == {path.name for path in opened.files} | {"config.json"}
    server.add("lab/none", tmp_path / "model" / "..")
    with pytest.raises(SurgeryError, match="lab/none: has none of the files that are needed"):
        open_tokenizer("lab/none")


def test_a_tokenizers_own_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(["a", "<s>"]).save_pretrained(tmp_path)
    code = "raise SystemExit('was run')\nclass Mine: pass\n"
    (tmp_path / "tokenization_mine.py").write_text(code)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    mine = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | mine))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SurgeryError, match="needs code of its own, which is not run"):
        open_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="holds no tokenizer"):
        open_tokenizer(tmp_path)
    with pytest.raises(SurgeryError, match="no such folder or file"):
        open_tokenizer(str(tmp_path / "nowhere"))
    fast(["a", "<s>"]).save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="is a file, expected the folder"):
        open_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(SurgeryError, match="its tokenizer cannot be loaded"):
        open_tokenizer(tmp_path)
