"""Promises of merges.tokenizer.chat_template; transformers renders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from merges.config.keys import CHAT_TEMPLATES
from merges.tokenizer.chat_template import TEMPLATES, read_chat_template, set_chat_template
from surgery.checkpoint.vocabulary import Vocabulary
from surgery.errors import SurgeryError

VOCABULARY = Vocabulary({"<s>": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3}, Path("tokenizer.json"))
FILES = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"chat_template": "{{ old }}", "model_max_length": 9}'}

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SECOND = {"role": "user", "content": "Bye"}


def render(text: str, *messages: dict[str, str], ask: bool = True) -> str:
    """The text of a chat, as transformers makes it."""
    bare = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    rendered = tokenizer.apply_chat_template(
        list(messages), chat_template=text, add_generation_prompt=ask, tokenize=False
    )
    assert isinstance(rendered, str)
    return rendered


ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@pytest.mark.parametrize(
    ("name", "chat", "short"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
            "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
        ),
        (
            "mistral",
            "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
            "<s>[INST] Hi [/INST] Hello</s>",
        ),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
            f"{ALPACA_SYSTEM}\n\n### Instruction:\nHi\n\n### Response:\nHello</s>",
        ),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
            "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n",
        ),
    ],
)
def test_known_formats_to_the_letter(name: str, chat: str, short: str) -> None:
    assert render(TEMPLATES[name].text, SYSTEM, FIRST, ANSWER, SECOND) == chat
    assert render(TEMPLATES[name].text, FIRST, ANSWER, ask=False) == short


def test_templates_refuse_what_their_format_cannot_say() -> None:
    with pytest.raises(Exception, match="Roles must alternate"):
        render(TEMPLATES["mistral"].text, FIRST, SECOND)
    with pytest.raises(Exception, match="Roles are user and assistant"):
        render(TEMPLATES["alpaca"].text, FIRST, {"role": "tool", "content": "4"})


def test_every_name_that_a_config_may_use_is_known() -> None:
    assert tuple(TEMPLATES) == CHAT_TEMPLATES


def test_a_named_template_becomes_the_only_one() -> None:
    files = {**FILES, "chat_template.json": b"{}", "additional_chat_templates/tool_use.jinja": b"{{ tools }}"}
    got, warnings = set_chat_template(files, "chatml", folders={}, vocabulary=VOCABULARY)
    assert list(got) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert got["chat_template.jinja"].decode() == TEMPLATES["chatml"].text
    assert json.loads(got["tokenizer_config.json"]) == {"model_max_length": 9}
    assert warnings == ()


def test_text_with_a_brace_is_taken_as_it_stands() -> None:
    got, _ = set_chat_template(
        {"tokenizer.json": b"{}"}, "{{ messages[0].content }} é", folders={}, vocabulary=VOCABULARY
    )
    assert got == {"chat_template.jinja": "{{ messages[0].content }} é".encode(), "tokenizer.json": b"{}"}


def test_tokens_that_the_template_needs_and_the_output_lacks_are_named() -> None:
    _, warnings = set_chat_template(FILES, "llama3", folders={}, vocabulary=VOCABULARY)
    assert warnings == (
        "chat_template: llama3 marks its turns with <|start_header_id|>, <|end_header_id|>, <|eot_id|>, and the output "
        "has no such token: the marks are cut into pieces that no model was trained on.",
    )


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SurgeryError) as caught:
        set_chat_template(FILES, "chatmll", folders={}, vocabulary=VOCABULARY)
    assert str(caught.value) == (
        "chat_template: got 'chatmll', expected auto, alpaca, chatml, exaone, llama3, mistral, "
        "or the text of a Jinja template"
    )


def folders(root: Path, *templates: str | None) -> dict[str, Path]:
    found = {}
    for i, text in enumerate(templates):
        found[f"m{i}"] = root / f"m{i}"
        found[f"m{i}"].mkdir()
        if text is not None:
            (root / f"m{i}" / "chat_template.jinja").write_text(text, encoding="utf-8")
    return found


def test_auto_takes_what_most_models_have_and_the_first_of_equals(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    many = folders(tmp_path / "one", None, "{{ b }}", "{{ a }}", "{{ a }}")
    got, _ = set_chat_template(FILES, "auto", folders=many, vocabulary=VOCABULARY)
    assert got["chat_template.jinja"] == b"{{ a }}"
    (tmp_path / "two").mkdir()
    even = folders(tmp_path / "two", "{{ b }}", "{{ a }}")
    got, _ = set_chat_template(FILES, "auto", folders=even, vocabulary=VOCABULARY)
    assert got["chat_template.jinja"] == b"{{ b }}"


def test_auto_without_any_template_changes_nothing_and_says_so(tmp_path: Path) -> None:
    got, warnings = set_chat_template(FILES, "auto", folders=folders(tmp_path, None, None), vocabulary=VOCABULARY)
    assert got == FILES
    assert warnings == (
        "chat_template: auto has no effect, as none of m0, m1 has a chat template. "
        "Name one: alpaca, chatml, exaone, llama3, mistral.",
    )


@pytest.mark.parametrize(
    "value",
    [
        '"{{ a }}"',
        '[{"name": "tool_use", "template": "{{ t }}"}, {"name": "default", "template": "{{ a }}"}]',
        '{"default": "{{ a }}"}',
    ],
)
def test_templates_are_found_where_transformers_finds_them(tmp_path: Path, value: str) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ old }}"}', encoding="utf-8")
    assert read_chat_template(tmp_path) == "{{ old }}"
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {value}}}', encoding="utf-8")
    assert read_chat_template(tmp_path) == "{{ a }}"
    (tmp_path / "chat_template.jinja").write_text("{{ new }}", encoding="utf-8")
    assert read_chat_template(tmp_path) == "{{ new }}"


def test_damaged_templates_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}', encoding="utf-8")
    with pytest.raises(SurgeryError, match=r'tokenizer_config\.json: "chat_template" holds 5, expected text'):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SurgeryError, match=r"chat_template\.jinja: is not UTF-8 text"):
        read_chat_template(tmp_path)
