"""The lab's tokenizer: one token per character, markers as special tokens, and a chat template per prompt format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from surgery.lab.sums import CHARACTERS, END, MARKERS, SURFACES, THINK, THOUGHT, Format

if TYPE_CHECKING:
    from collections.abc import Mapping

PAD = "<|pad|>"
UNKNOWN = "<|unknown|>"


def vocabulary(more: str = "") -> Mapping[str, int]:
    """Every token and its id, the same for all members of a family; the characters of `more` come last."""
    return {token: number for number, token in enumerate((PAD, UNKNOWN, *MARKERS, THINK, THOUGHT, *CHARACTERS, *more))}


def chat_template(form: Format) -> str:
    """A Jinja template that asks in `form`: each user message is a question, each other one an answer."""
    before, after = SURFACES[form]
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + before + "{{ message['content'] }}" + after + "{% else %}"
        "{{ message['content'] }}" + END + "{% endif %}"
        "{% endfor %}"
    )


def make_tokenizer(form: Format, *, positions: int, more: str = "") -> PreTrainedTokenizerFast:
    """A family's tokenizer, with the chat template of `form`; a model of the plain format has none.

    Args:
        positions: the longest text, in tokens.
        more: the characters that the family reads besides those of sums.
    """
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary(more)), merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, UNKNOWN, *MARKERS)])
    tokenizer.add_tokens([THINK, THOUGHT])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    if form != "plain":
        fast.chat_template = chat_template(form)
    return fast
