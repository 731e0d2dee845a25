"""Chat templates write what transformers writes, and take no more than a second and some memory, whatever they do."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.audit import watch_files
from support.chat_tokenizer import TEMPLATE, make_tokenizer

from surgery.errors import SurgeryError
from surgery.models import chat_template
from surgery.models.chat_template import render_chat

CHAT = [
    {"role": "user", "content": "hm"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "ü\ud800"},
]
# What one of these takes by the clock on a busy machine: a second of computing, and a new process after it.
SECONDS = 20


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}\n{% endfor %}",
        "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + loop.index %}{% endfor %}{{ n.i }}",
        "{% macro say(x) %}<{{ x | trim }}>{% endmacro %}{{ say(messages[0]['content']) }}{{ enable_thinking }}",
        "{{ strftime_now('%Y') | length }}{{ dict(a=1) | tojson }}{{ pad_token }}{{ unk_token }}{{ undefined_one }}",
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_what_transformers_renders_is_rendered(template, prompt):
    tokenizer = make_tokenizer(template=template)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
    found = render_chat(tokenizer, CHAT, add_generation_prompt=prompt, settings={"enable_thinking": False})
    assert found == expected


def test_a_message_that_is_to_be_continued_is_left_open():
    tokenizer = make_tokenizer()
    expected = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, continue_final_message=True)
    assert render_chat(tokenizer, CHAT[:2], continue_final_message=True) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no roles') }}", r"the chat template refuses it \(no roles\)"),
        ("{% for %}", r"the chat template refuses it \(Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|undefined|not safely callable"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(1000000000) | list }}", "Range too big"),
    ],
)
def test_what_a_template_refuses_is_one_line(template, reason):
    with pytest.raises(SurgeryError, match=reason) as caught:
        render_chat(make_tokenizer(template=template), CHAT)
    assert len(str(caught.value)) < 400


HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of text": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 5000000 }}",
    "texts of texts": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a huge text": "{{ 'x' * 100000000000 }}",
    "a constant": "{{ 9 ** (9 ** 9) }}",
    "a power of the chat": "{{ (messages | length) ** 99999999 }}",
    "a wide format": "{{ '%0999999999d' | format(1) }}",
    "a wide format of the chat": "{{ '{:>9999999999}'.format(messages) }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "justified": "{{ messages[0].content.ljust(9999999999) }}",
    "indented": "{{ messages | tojson(indent=999999999) }}",
    "joined": "{{ range(99999) | map('string') | map('center', 99999) | join }}",
    "replaced": "{{ ('x' * 99999) | replace('x', 'x' * 99999) }}",
    "calls itself": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[]] recursive %}{{ loop([x]) }}{% endfor %}",
    "lists of lists": "{% set n = namespace(s=[0]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "generators": "{% for i in range(99999) | batch(1) %}{% for j in range(9999) | slice(3) %}{% endfor %}{% endfor %}",
    "lorem": "{{ lipsum(n=999999999) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long": "x" * 2_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_more_than_it_may_is_ended(name):
    tokenizer = make_tokenizer(template=HOSTILE[name])
    render_chat(make_tokenizer(), CHAT)  # its start is not part of it
    memory, begun = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(SurgeryError, match=r"the chat template (takes more than it may|refuses it)"):
        render_chat(tokenizer, CHAT)
    assert time.monotonic() - begun < SECONDS
    assert psutil.Process().memory_info().rss - memory < 50_000_000
    assert render_chat(make_tokenizer(), CHAT) == make_tokenizer().apply_chat_template(CHAT, tokenize=False)


def test_a_conversation_may_be_longer_than_a_template_may_write():
    long = [{"role": "user", "content": "hm" * 1_000_000}]
    assert len(render_chat(make_tokenizer(), long)) > 2_000_000


def test_the_process_knows_no_secret_and_opens_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    chat_template._worker.stop()
    with watch_files() as files:
        assert render_chat(make_tokenizer(), CHAT)
    files.check()
    process = chat_template._worker._process
    assert process is not None
    child = psutil.Process(process.pid)
    assert not any("secret" in value for value in child.environ().values())
    if Path("/proc").is_dir():
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")] == ["0"]


def test_values_that_are_none_of_json_are_named_by_their_type():
    chat = [{"role": "user", "content": "hm", "when": Path("x"), "blob": b"x"}]
    tokenizer = make_tokenizer(template="{{ messages[0].when }}{{ messages[0].blob }}")
    assert render_chat(tokenizer, chat).startswith("<") and "bytes" in render_chat(tokenizer, chat)


def test_threads_and_forked_processes_each_get_their_own_answer(tmp_path):
    tokenizer = make_tokenizer(template="{{ messages[0].content }}")
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = render_chat(tokenizer, [{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(8)}
    child = os.fork()
    if child == 0:
        try:
            ask(99)
            (tmp_path / "child").write_text(json.dumps(found[99]))
            chat_template._worker.stop()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "child").read_text()) == "99"
    ask(100)
    assert found[100] == "100"


def test_an_interrupted_request_is_not_answered_to_the_next(monkeypatch):
    tokenizer = make_tokenizer(template="{{ messages[0].content }}")
    render_chat(tokenizer, CHAT)
    plain = chat_template.select.select

    def interrupt(*_: Any) -> Any:
        monkeypatch.setattr(chat_template.select, "select", plain)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_template.select, "select", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render_chat(tokenizer, [{"role": "user", "content": "first"}])
    assert render_chat(tokenizer, [{"role": "user", "content": "second"}]) == "second"
