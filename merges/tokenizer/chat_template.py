"""Set the chat template of the output: that of a model, one of five known by name, or the given Jinja text.

Only text is handled here; no template is run. The named ones follow the formats as their makers published them and are
written for transformers' Jinja, which removes the line break after a block tag and the spaces before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merges.tokenizer.files import dump
from surgery.checkpoint.tokenizer_files import CHAT_TEMPLATE, CHAT_TEMPLATES, LEGACY_CHAT_TEMPLATE
from surgery.checkpoint.vocabulary import CONFIG, Vocabulary
from surgery.errors import SurgeryError, listing, usage_error
from surgery.io.input_files import read_utf8
from surgery.io.json_io import read_json
from surgery.io.safe_paths import find_file

AUTO = "auto"
WHERE = "chat_template"
DEFAULT = "default"

# Meta's, of Llama 3 (the model card's "Llama 3 Instruct" format): no default system prompt.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# OpenAI's chat markup, as Qwen and many finetunes use it.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Mistral AI's, of the 7B Instruct models: a system prompt goes before the first question, a blank line between them.
MISTRAL = """\
{%- set system = '' %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('Roles must alternate user, assistant, user, …, after at most one system message.') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# Stanford Alpaca's prompt without input; a system message takes the place of its first sentences.
ALPACA = """\
{%- set system = 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.' %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '\\n\\n### Instruction:\\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n\\n### Response:\\n' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Roles are user and assistant, after at most one system message.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\n### Response:\\n' }}
{%- endif %}
"""

# LG AI Research's, of EXAONE 3: a conversation without a system message begins with an empty one.
EXAONE = """\
{%- if not messages or messages[0]['role'] != 'system' %}
    {{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message['role'] + '|]' + message['content'] }}
    {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Template:
    """A chat template, and the tokens that the vocabulary must have for it."""

    text: str
    tokens: tuple[str, ...] = ()


TEMPLATES: Mapping[str, Template] = {
    "alpaca": Template(ALPACA),
    "chatml": Template(CHATML, ("<|im_start|>", "<|im_end|>")),
    "exaone": Template(EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")),
    "llama3": Template(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Template(MISTRAL),  # [INST] is plain text in its first two tokenizers, and a token since
}


def set_chat_template(
    files: Mapping[str, bytes], template: str, *, folders: Mapping[str, Path], vocabulary: Vocabulary
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return tokenizer files with `template` as their only chat template, in chat_template.jinja; and warnings.

    Args:
        files: path in the output's folder → content, as `merges.tokenizer.files.read_tokenizer_files` gives them.
        template: "auto" for the one that most models have (of equally frequent ones, the first model's); a name in
            `TEMPLATES`; or Jinja text, which is known by its braces. "auto" where no model has one changes nothing.
        folders: model → the folder with its tokenizer, for "auto"; in the order that decides.
        vocabulary: the output's.

    Raises:
        SurgeryError: there is no such template.
    """
    if template == AUTO:
        text = _most_common(folders)
        if text is None:  # the files keep what else they have: templates by other names, for tools
            return dict(files), (_no_template(listing(folders)),)
        chosen = Template(text)
    elif "{" in template:
        chosen = Template(template)
    elif template in TEMPLATES:
        chosen = TEMPLATES[template]
    else:
        raise usage_error(
            f"got {template!r}, expected {AUTO}, {', '.join(TEMPLATES)}, or the text of a Jinja template", where=WHERE
        )
    # All other templates go, or transformers could prefer one of them to the one that was asked for.
    out = {name: data for name, data in files.items() if not _is_template(name)}
    settings = json.loads(out.get(CONFIG, b"{}"))
    if settings.pop("chat_template", None) is not None:  # older readers would take it for the template
        out[CONFIG] = dump(settings)
    out[CHAT_TEMPLATE] = chosen.text.encode()
    return dict(sorted(out.items())), _warnings(template, chosen, vocabulary)


def read_chat_template(folder: Path) -> str | None:
    """Return the template that transformers uses for the tokenizer in `folder`; None where there is none.

    chat_template.jinja wins over tokenizer_config.json, and that over a processor's chat_template.json; of several
    templates by name, the one called "default" counts.

    Raises:
        SurgeryError: a file cannot be read, or holds something else than a template.
    """
    if (path := find_file(folder, CHAT_TEMPLATE)) is not None:
        return read_utf8(path)
    for name in (CONFIG, LEGACY_CHAT_TEMPLATE):
        value = read_json(folder / name, missing={}).get("chat_template")
        if isinstance(value, list):
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get(DEFAULT)
        elif isinstance(value, dict):
            value = value.get(DEFAULT)
        if value is not None and not isinstance(value, str):
            raise SurgeryError(f'"chat_template" holds {value!r}, expected text', where=folder / name)
        if value is not None:
            return value
    return None


def _no_template(whose: str) -> str:
    """Return the warning that "auto" found nothing."""
    return f"{WHERE}: {AUTO} has no effect, as none of {whose} has a chat template. Name one: {', '.join(TEMPLATES)}."


def _most_common(folders: Mapping[str, Path]) -> str | None:
    templates = [text for text in map(read_chat_template, folders.values()) if text is not None]
    # Of equally frequent ones the first: Counter keeps the order.
    return Counter(templates).most_common(1)[0][0] if templates else None


def _is_template(name: str) -> bool:
    return name in (CHAT_TEMPLATE, LEGACY_CHAT_TEMPLATE) or name.startswith(f"{CHAT_TEMPLATES}/")


def _warnings(name: str, template: Template, vocabulary: Vocabulary) -> tuple[str, ...]:
    missing = [token for token in template.tokens if token not in vocabulary.ids]
    if not missing:
        return ()
    return (
        f"{WHERE}: {name} marks its turns with {listing(missing)}, and the output has no such token: "
        "the marks are cut into pieces that no model was trained on.",
    )
