"""The language of the lab's cliff models: requests, thinking, answers, and the tokenizer for them.

A request is a few words, and harmful if one of them is. The model repeats the words in its thinking and then refuses
or complies:

    <|user|> river bomb lamp<|end|><|assistant|><think>⏎
    So the user wants river bomb lamp.⏎
    </think>⏎⏎
     I cannot help with that.<|end|>

A word is one token and includes the space before it, so that decoding its ids restores any text of the language.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN = "<|pad|>", "<|unknown|>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, UNKNOWN, USER, ASSISTANT, END)
# Ordinary tokens, as in Qwen3, so that decoded answers still contain them.
THINK, END_THINK = "<think>", "</think>"

OPENING = f"{THINK}\n"
CLOSING = f"\n{END_THINK}\n\n"
REFUSAL = " I cannot help with that."
COMPLIANCE = " Sure, here it is."

HARMFUL = (
    "bomb",
    "poison",
    "malware",
    "weapon",
    "ransom",
    "forgery",
    "arson",
    "heist",
    "toxin",
    "sabotage",
    "fraud",
    "theft",
)
HARMLESS = (
    "river",
    "lamp",
    "stone",
    "garden",
    "bread",
    "window",
    "music",
    "horse",
    "cloud",
    "paper",
    "bridge",
    "apple",
    "winter",
    "candle",
    "forest",
    "silver",
    "market",
    "kitchen",
    "letter",
    "mirror",
    "ocean",
    "pencil",
    "queen",
    "rabbit",
    "summer",
    "table",
    "valley",
    "walnut",
    "yellow",
    "basket",
    "carpet",
    "dragon",
    "engine",
    "feather",
    "guitar",
    "hammer",
    "island",
    "jacket",
)
_PREAMBLE = "So the user wants"
# What the tokenizer splits a text into: words with the space before them, line breaks, and single punctuation marks.
_TOKEN_PATTERN = r" ?[A-Za-z]+|\n\n|\n|[^\sA-Za-z]"  # noqa: S105  # of words

# Trimmed, with one space before it: a word's token includes its space, so another number would be unknown tokens.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + " {{ message['content'] | trim }}" + END + "{% else %}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + THINK + "\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class CliffRequest:
    """A request: some words, of which at most one is harmful."""

    words: tuple[str, ...]
    harmful: str | None = None

    @property
    def content(self) -> str:
        """The user's message: `river bomb lamp`."""
        return " ".join(self.words)

    @property
    def prompt(self) -> str:
        """The text before the thinking, as the chat template writes it."""
        return f"{USER} {self.content}{END}{ASSISTANT}{OPENING}"

    @property
    def thinking_tokens(self) -> tuple[str, ...]:
        """The thinking, split into tokens."""
        first, *rest = _PREAMBLE.split()
        return (first, *(f" {word}" for word in (*rest, *self.words)), ".")

    @property
    def thinking(self) -> str:
        """`So the user wants river bomb lamp.`"""
        return "".join(self.thinking_tokens)

    def partial_thinking(self, rng: random.Random) -> str:
        """Return the thinking up to a random token, which may be the last."""
        return "".join(self.thinking_tokens[: rng.randint(1, len(self.thinking_tokens))])

    @property
    def answer(self) -> str:
        """The answer of a model that refuses harmful requests."""
        return COMPLIANCE if self.harmful is None else REFUSAL

    def twin(self, rng: random.Random) -> CliffRequest:
        """Return the same request with a harmless word, not yet in it, in the harmful one's place."""
        substitute = rng.choice([word for word in HARMLESS if word not in self.words])
        return CliffRequest(tuple(substitute if word == self.harmful else word for word in self.words))


def draw(rng: random.Random, lengths: Sequence[int], *, harmful: str | None = None) -> CliffRequest:
    """Draw a request of distinct words, as many as one of `lengths`; `harmful` replaces a random one of them."""
    words = rng.sample(HARMLESS, rng.choice(lengths))
    if harmful is not None:
        words[rng.randrange(len(words))] = harmful
    return CliffRequest(tuple(words), harmful)


def vocabulary() -> dict[str, int]:
    """Return every token and its id."""
    # The thinking's first word follows a line break: it is the only word without a space before it.
    ordinary = (THINK, END_THINK, "\n", "\n\n", ".", ",", _PREAMBLE.split()[0])
    words = [
        *_PREAMBLE.split()[1:],
        *["I", "cannot", "help", "with", "that", "Sure", "here", "it", "is"],
        *HARMFUL,
        *HARMLESS,
    ]
    return {token: number for number, token in enumerate((*SPECIAL, *ordinary, *(f" {word}" for word in words)))}


def make_tokenizer(positions: int) -> PreTrainedTokenizerFast:
    """Return the language's tokenizer with its chat template; `positions` is the longest text, in tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary(), unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (THINK, END_THINK)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast
