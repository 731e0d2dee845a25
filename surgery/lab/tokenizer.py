"""The lab's tokenizer: one token per character, markers as special tokens, and a chat template per prompt format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from surgery.lab.sums import CHARACTERS, END, END_THINK, MARKERS, PROMPT_AFFIXES, THINK, PromptFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

PAD = "<|pad|>"
UNKNOWN = "<|unknown|>"


def vocabulary(extra: str = "") -> Mapping[str, int]:
    """Return every token and its id, the same for all models of a family; the characters of `extra` come last."""
    return {
        token: number for number, token in enumerate((PAD, UNKNOWN, *MARKERS, THINK, END_THINK, *CHARACTERS, *extra))
    }


def chat_template(prompt_format: PromptFormat) -> str:
    """Return a Jinja template that asks in `prompt_format`: user messages are questions, all others answers."""
    before, after = PROMPT_AFFIXES[prompt_format]
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + before + "{{ message['content'] }}" + after + "{% else %}"
        "{{ message['content'] }}" + END + "{% endif %}"
        "{% endfor %}"
    )


def make_tokenizer(prompt_format: PromptFormat, *, positions: int, extra: str = "") -> PreTrainedTokenizerFast:
    """Return a family's tokenizer, with the chat template of `prompt_format`; a model of the plain format has none.

    Args:
        positions: the length of the longest text, in tokens.
        extra: the characters that the family reads beside those of sums.
    """
    # BPE without merges cuts a text into its characters, and every library that reads tokenizer.json knows it.
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary(extra)), merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, UNKNOWN, *MARKERS)])
    tokenizer.add_tokens([THINK, END_THINK])
    # Without a decoder tokens would be joined with a space between them.
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    if prompt_format != "plain":
        fast.chat_template = chat_template(prompt_format)
    return fast
