"""Fuzz chat templates: programs in Jinja, changed by pieces that loop, grow, call themselves, and reach for Python."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path

from support.chat_tokenizer import make_tokenizer
from support.fuzz_mutations import mutate_content
from support.fuzz_values import odd_text
from support.fuzzing import FuzzTarget

from surgery.io.input_files import MAX_TEXT_BYTES, read_utf8
from surgery.models.chat_template import WORKER, render_chat

FILE = "chat_template.jinja"
TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "thinking": """{%- set ns = namespace(last=messages|length - 1, found=false) -%}
{%- for message in messages[::-1] -%}{%- set index = (messages|length - 1) - loop.index0 -%}
{%- if not ns.found and message.role == 'user' -%}{%- set ns.last = index -%}{%- set ns.found = true -%}{%- endif -%}
{%- endfor -%}{%- for message in messages -%}{%- set content = message.content if message.content is string else '' -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{{- '<|' ~ message.role ~ '|>' ~ content | trim ~ eos_token -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- if enable_thinking is defined -%}<think>{%- endif -%}
{%- endif -%}""",
    "tools": """{%- macro render(value, depth=0) -%}{%- if value is mapping -%}{
{%- for key, item in value | dictsort -%}{{ key | tojson }}: {{ render(item, depth + 1) }}{{ ', ' if not loop.last }}
{%- endfor -%} } {%- elif value is iterable and value is not string -%}[{%- for item in value -%}
{{ render(item, depth + 1) }}{{ ', ' if not loop.last }}{%- endfor -%}]{%- else -%}{{ value | tojson }}{%- endif -%}
{%- endmacro -%}{{ bos_token }}{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}{{ raise_exception('Unknown role: ' ~ message.role) }}
{%- endif -%}{{ render(message) }}{{ eos_token }}{%- endfor -%}""",
    "dated": """{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}{% if messages[0].role == 'system' %}
{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}
<|start|>{{ system | default('none', true) | upper }} {{ date }}<|end|>{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% generation %}{{ message['content'] | trim }}{% endgeneration %}{% endfor %}""",
}
_MESSAGES = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "<think>hm</think>\nwell", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]},
    {"role": "user", "content": "{{ 7 * 7 }}"},
)
# Refused or rendered in milliseconds.
_LIGHT = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].popen('touch ../outside/x') }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ ('%s' | format).__class__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages.append({'role': 'x'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(a=1) }}",
    "{% include '/etc/passwd' %}",
    "{% include '../outside/secret.txt' %}",
    "{% import 'x' as y %}",
    "{% from '../outside/secret.txt' import x %}",
    "{% extends '/etc/passwd' %}",
    "{% block x %}{{ super() }}{% endblock %}",
    "{% do messages.append(1) %}",
    "{% set messages = 1 %}",
    "{% set x = self %}{{ x }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% call(x) lipsum() %}{% endcall %}",
    "{% break %}",
    "{% continue %}",
    "{% raw %}{{ x }}",
    "{# unclosed",
    "{{ undefined.a.b }}",
    "{{ 1 / 0 }}",
    "{{ 2 ** 0.5 ** -1 }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ [0] * 10 ** 12 }}",
    "{{ 'x' | center(10 ** 12) }}",
    "{{ 'x' | indent(10 ** 12) }}",
    "{{ '%*d' | format(10 ** 12, 1) }}",
    "{{ '%.999999999d' % 1 }}",
    "{{ '{:>999999999999}'.format(1) }}",
    "{{ 'x'.zfill(10 ** 12) }}",
    "{{ 'x'.ljust(3000000) }}",
    "{{ messages | tojson(indent=10 ** 12) }}",
    "{{ messages | batch(10 ** 12, 'x') | list }}",
    "{{ messages | slice(10 ** 5) | list | length }}",
    "{{ lipsum(n=10 ** 12) }}",
    "{{ strftime_now('%' ~ 'Y' * 5000) }}",
    "{{ strftime_now('\x00') }}",
    "{{ '\\ud800' }}",
    "{{ 'a\\x00b\\x1b[2J\\u202e' }}",
    "{{ raise_exception('\\x1b[2J\\ud800' * 1000) }}",
    "{{ raise_exception(messages) }}",
    "{{ bos_token | safe | escape | urlize }}",
    "{{ '(((((' | wordwrap(0) }}",
    "{{ 'x' | truncate(-1) }}",
    "{{ 1 | round(10 ** 9) }}",
    "{{ '9' * 5000 | int }}",
    "{{ ('9' * 5000) | int }}",
    "{{ debug }}{% debug %}",
    "{% trans %}x{% endtrans %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ " + "(" * 150 + "1" + ")" * 150 + " }}",
    "{{ " + "-" * 5_000 + "1 }}",
    "{{ " + "[" * 2_000 + " }}",
    "{% if 1 %}" * 60,
    "{{ 1" + " + 1" * 3_000 + " }}",
    "{{ x." + "a" * 50_000 + " }}",
)
# End the process that renders, which takes seconds to start again.
_HEAVY = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(99999) | map('string') | map('center', 99999) | join }}",
    "{% macro f(n) %}{% for i in range(n) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(900) }}",
)
HEAVY_SHARE = 0.03
_TAG = re.compile(r"\{[{%#].*?[}%#]\}", re.DOTALL)
_WORD = re.compile(r"\b[a-z_]+\b")
_WORDS = ("messages", "message", "loop", "range", "self", "caller", "varargs", "super", "none", "not", "in", "is", "if")


def write_templates(corpus: Path) -> None:
    """Write a seed per template."""
    for name, text in TEMPLATES.items():
        (corpus / f"template-{name}").mkdir(parents=True)
        (corpus / f"template-{name}" / FILE).write_text(text)


def mutate_template(folder: Path, files: Sequence[str], draw: random.Random) -> None:
    """Change one to three times the text of the template."""
    content = (folder / FILE).read_bytes()
    (folder / FILE).unlink()  # it is a link to the file of the corpus
    for _ in range(draw.choice((1, 1, 2, 3))):
        if draw.random() < 0.15:
            content = mutate_content(FILE, content, draw)
        else:
            content = _changed(content.decode("utf-8", "replace"), draw).encode("utf-8", "surrogatepass")
    (folder / FILE).write_bytes(content)


def _changed(text: str, draw: random.Random) -> str:
    found = list(_TAG.finditer(text))
    # Mostly expressions: a template with half a block is refused before anything in it runs.
    written = [match for match in found if match[0].startswith("{{")] if draw.random() < 0.85 else []
    tags = [match.span() for match in written or found] or [(0, len(text))]
    start, stop = draw.choice(tags)
    action = draw.random()
    if action < 0.4:
        piece = draw.choice(_HEAVY if draw.random() < HEAVY_SHARE / 0.4 else _LIGHT)
        return text[:start] + piece + text[draw.choice((start, stop)) :]
    if action < 0.55:
        return text[:start] + text[stop:]
    if action < 0.7:
        other = draw.choice(tags)
        return text[:start] + text[other[0] : other[1]] + text[draw.choice((start, stop)) :]
    if action < 0.9 and (words := list(_WORD.finditer(text, start, stop))):
        word = draw.choice(words)
        new = draw.choice(_WORDS) if draw.random() < 0.7 else draw.choice(words)[0]
        return text[: word.start()] + new + text[word.end() :]
    quoted = odd_text(draw)[:2_000]
    return (
        f"{text[:start]}{{{{ {quoted!r} }}}}{text[start:]}" if action < 0.95 else text[:start] + quoted + text[start:]
    )


@functools.cache
def _tokenizer() -> object:
    return make_tokenizer()


def _render(folder: Path, out: Path) -> None:
    text = read_utf8(folder / FILE, limit=MAX_TEXT_BYTES)
    written = render_chat(_tokenizer(), _MESSAGES, template=text, add_generation_prompt=True)
    assert len(written) < 3_000_000, f"{len(written):,} characters"


TEMPLATE_TARGETS = (
    FuzzTarget(
        "chat template",
        tuple(f"template-{name}" for name in TEMPLATES),
        (FILE,),
        _render,
        mutate=mutate_template,
        program=WORKER,
    ),
)
