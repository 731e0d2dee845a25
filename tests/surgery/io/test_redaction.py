"""Promises of surgery.io.redaction: no token or password that the user has is in a text that leaves the program."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from huggingface_hub import constants

from surgery.io.atomic import write_file
from surgery.io.escaping import html_text, json_text, markdown_block, markdown_text, one_line, visible, yaml_text
from surgery.io.json_io import to_json
from surgery.io.output_files import write_output
from surgery.io.redaction import holds_secret, redact

TOKEN = "hf_short-But9Secret"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_tokens_of_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    assert redact(f"a {TOKEN} b") == f"a {TOKEN} b"
    monkeypatch.setenv(variable, f" {TOKEN}\n")
    assert redact(f"a {TOKEN} b{TOKEN}") == "a hf_… bhf_…"
    assert holds_secret(f"Bearer {TOKEN}") and not holds_secret("Bearer hf_other")


def test_stored_tokens(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    assert redact(TOKEN) == "hf_…"
    (tmp_path / "stored_tokens").write_text(
        "[work]\nhf_token = another-login-123\n\n[home]\nhf_token = third-login-45\n"
    )
    assert redact("another-login-123, third-login-45") == "hf_…, hf_…"
    (tmp_path / "token").write_text("hf_replaced-meanwhile")
    assert redact("hf_replaced-meanwhile") == "hf_…"
    (tmp_path / "token").write_bytes(b"\xff\xfe" + b"x" * 100)
    assert redact("plain") == "plain"


def test_passwords_in_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact("at https://ann:pass@hub.test/x.") == "at https://…@hub.test/x."
    assert redact("mail ann@hub.test, http://hub.test/@x:1@") == "mail ann@hub.test, http://hub.test/@x:1@"
    monkeypatch.setenv("HF_ENDPOINT", "https://ann:pass%40word@hub.test")
    sent = base64.b64encode(b"ann:pass@word").decode()
    assert redact(f"pass%40word pass@word Basic {sent}") == "hf_… hf_… Basic hf_…"


def test_what_looks_like_a_token_whosever_it_is() -> None:
    assert redact("hf_" + "aB3" * 11 + "x, api_org_" + "x" * 34) == "hf_…, hf_…"
    assert redact("hf_internal_testing/tiny, hf_hub 2.4") == "hf_internal_testing/tiny, hf_hub 2.4"


def test_short_words_are_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "no")
    assert redact("no model") == "no model"


def test_of_two_tokens_the_longer_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_12345")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_1234567890")
    assert redact("hf_1234567890") == "hf_…"


@pytest.mark.parametrize(
    "outlet", [visible, one_line, html_text, markdown_text, markdown_block, json_text, yaml_text, to_json]
)
def test_every_medium_leaves_them_out(monkeypatch: pytest.MonkeyPatch, outlet) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shown = outlet(f"said {TOKEN}")
    assert TOKEN not in shown and "hf_" in shown


def test_every_written_text_leaves_them_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert write_file(tmp_path / "a", f"x {TOKEN}").read_text() == "x hf_…"
    assert write_output(tmp_path, "b", f"x {TOKEN}").read_text() == "x hf_…"
