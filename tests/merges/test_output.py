"""What lies beside the merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.merges import config_of, files_of, run

from merges.tokenizer.chat_template import CHATML
from surgery.checkpoint.tokenizer_files import is_tokenizer_file
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.errors import SurgeryError

LINEAR = """\
merge_method: linear
models: [{model: ⟨a⟩, parameters: {weight: 1}}, {model: ⟨b⟩, parameters: {weight: 1}}]
"""
UNION = LINEAR.replace("⟨b⟩", "⟨other⟩") + "tokenizer_source: union\n"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def test_side_files_are_the_template_s_to_the_byte(llama: Path, tmp_path: Path) -> None:
    run(LINEAR, llama, tmp_path / "out")
    theirs, ours = files_of(llama / "a"), files_of(tmp_path / "out")
    for name in ("config.json", "generation_config.json", *TOKENIZER):
        assert ours[name] == theirs[name], name
    assert ours.keys() - theirs.keys() == {"README.md", "surgery.json"}


def test_config_says_what_the_weights_are_stored_in(llama: Path, tmp_path: Path) -> None:
    run(f"{LINEAR}dtype: float32\nout_dtype: bfloat16\n", llama, tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_another_tokenizer_brings_its_files_ids_and_size(own: Path, tmp_path: Path) -> None:
    settings = json.loads((own / "a/generation_config.json").read_text())
    (own / "a/generation_config.json").write_text(json.dumps({**settings, "suppress_tokens": [10, 95]}))
    (own / "a/added_tokens.json").write_text("{}")
    text = UNION.replace("union", "⟨other⟩").replace("tokenizer_source:", "tokenizer_source: ").replace("  ", " ")
    run(text, own, tmp_path / "out")
    out = files_of(tmp_path / "out")
    for name in TOKENIZER:
        assert out[name] == files_of(own / "other")[name]
    assert "added_tokens.json" not in out, "of the tokenizer that went"
    vocabulary = read_vocabulary(own / "other")
    assert vocabulary is not None
    assert config_of(tmp_path / "out")["vocab_size"] == vocabulary.size == 90
    generation = json.loads(out["generation_config.json"])
    assert generation["suppress_tokens"] == [vocabulary.ids["w10"]]


def test_a_lost_id_is_a_warning(own: Path, tmp_path: Path) -> None:
    settings = json.loads((own / "a/generation_config.json").read_text())
    (own / "a/generation_config.json").write_text(json.dumps({**settings, "suppress_tokens": [95]}))
    report = run(UNION.replace("union", "⟨other⟩"), own, tmp_path / "out")
    assert "suppress_tokens: the output has no token 'w95', so it stands there no more" in report.warnings


@pytest.mark.parametrize("text", [LINEAR, UNION])
def test_a_chat_template_by_name(text: str, llama: Path, tmp_path: Path) -> None:
    report = run(f"{text}chat_template: chatml\n", llama, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHATML
    assert any("<|im_start|>" in warning for warning in report.warnings)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_the_most_common_chat_template(own: Path, tmp_path: Path) -> None:
    for name, text in (("a", "{{ 1 }}"), ("b", "{{ 2 }}"), ("other", "{{ 2 }}")):
        (own / name / "chat_template.jinja").write_text(text)
    three = LINEAR.replace("]\n", ", {model: ⟨other⟩, parameters: {weight: 1}}]\ntokenizer_source: union\n")
    run(f"{three}chat_template: auto\n", own, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 2 }}"
    run(three, own, tmp_path / "plain")
    assert (tmp_path / "plain/chat_template.jinja").read_text() == "{{ 1 }}"


def test_auto_that_finds_no_chat_template_is_a_warning(own: Path, tmp_path: Path) -> None:
    for text in (LINEAR, UNION):
        report = run(f"{text}chat_template: auto\n", own, tmp_path / "out")
        assert any(f"as none of {own / 'a'}" in warning for warning in report.warnings)
        plain = run(text, own, tmp_path / "plain")
        assert list(plain.warnings) == [text for text in report.warnings if "chat_template" not in text]
        assert tokenizer_files(tmp_path / "out") == tokenizer_files(tmp_path / "plain")
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "plain")
    for name in TOKENIZER:
        (own / "a" / name).unlink()
    report = run(f"{LINEAR}chat_template: auto\n", own, tmp_path / "out")
    assert f"chat_template: auto has no effect, as {own / 'a'} has no tokenizer" in report.warnings


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if is_tokenizer_file(path.name)}


def test_a_chat_template_without_a_tokenizer_is_a_fault(own: Path, tmp_path: Path) -> None:
    for name in TOKENIZER:
        (own / "a" / name).unlink()
    with pytest.raises(SurgeryError, match="a has no tokenizer to put it beside"):
        run(f"{LINEAR}chat_template: chatml\n", own, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
