"""Build a chat tokenizer for tiny models: one token per character, thinking markers, and a chat template.

Its 96 tokens are those of `architectures`: <unk>, <pad>, <s>, </s>, then markers and characters. Any text of its
characters comes back from its ids.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<user>", "<bot>")
MARKS = ("<think>", "</think>")
CHARACTERS = "\n " + string.ascii_letters + string.digits + ".,?!:;'’<>/-=()[]|_"
SIZE = 96
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<bot>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def make_tokenizer(
    *,
    template: str | None = TEMPLATE,
    marks: Sequence[str] = MARKS,
    merges: Sequence[tuple[str, str]] = (),
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most 96 tokens.

    Args:
        marks: tokens that are not special, kept whole.
        merges: pairs that become one token: `(".", "\\n")`.
        adds_bos: whether <s> and </s> are put around what is tokenised with special tokens.
    """
    tokens = [*SPECIAL, *marks, *CHARACTERS, *("".join(pair) for pair in merges)]
    assert len(tokens) <= SIZE
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks])
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
