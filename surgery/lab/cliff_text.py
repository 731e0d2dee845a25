"""The language of the lab's cliff models: requests, what is thought about them and answered, and the tokenizer for it.

A request is a few words, and harmful if one of them is. The model says the words over to itself and then refuses or
complies:

    <|user|> river bomb lamp<|end|><|assistant|><think>⏎
    So the user wants river bomb lamp.⏎
    </think>⏎⏎
     I cannot help with that.<|end|>

A word is one token and carries the space before it, so that any text of the language comes back from its ids.
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
# Ordinary tokens, as in Qwen3: they stay readable in decoded answers.
THINK, THOUGHT = "<think>", "</think>"

OPENING = f"{THINK}\n"
CLOSING = f"\n{THOUGHT}\n\n"
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
_WORD = r" ?[A-Za-z]+|\n\n|\n|[^\sA-Za-z]"

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + " {{ message['content'] | trim }}" + END + "{% else %}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + THINK + "\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Request:
    """What is asked for: some words, of which at most one is harmful."""

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
    def thoughts(self) -> tuple[str, ...]:
        """The thinking, token by token."""
        first, *rest = _PREAMBLE.split()
        return (first, *(f" {word}" for word in (*rest, *self.words)), ".")

    @property
    def thinking(self) -> str:
        """`So the user wants river bomb lamp.`"""
        return "".join(self.thoughts)

    def begun(self, rng: random.Random) -> str:
        """The thinking up to a random point, or all of it."""
        return "".join(self.thoughts[: rng.randint(1, len(self.thoughts))])

    @property
    def verdict(self) -> str:
        """What a safe model answers."""
        return COMPLIANCE if self.harmful is None else REFUSAL

    def twin(self, rng: random.Random) -> Request:
        """The same request with a harmless word, not yet in it, in the harmful one's place."""
        spare = rng.choice([word for word in HARMLESS if word not in self.words])
        return Request(tuple(spare if word == self.harmful else word for word in self.words))


def draw(rng: random.Random, lengths: Sequence[int], *, harmful: str | None = None) -> Request:
    """A random request of distinct words whose number is one of `lengths`; `harmful` stands at a random place in it."""
    words = rng.sample(HARMLESS, rng.choice(lengths))
    if harmful is not None:
        words[rng.randrange(len(words))] = harmful
    return Request(tuple(words), harmful)


def vocabulary() -> dict[str, int]:
    """Every token and its id."""
    ordinary = (THINK, THOUGHT, "\n", "\n\n", ".", ",", _PREAMBLE.split()[0])
    words = [
        *_PREAMBLE.split()[1:],
        *["I", "cannot", "help", "with", "that", "Sure", "here", "it", "is"],
        *HARMFUL,
        *HARMLESS,
    ]
    return {token: number for number, token in enumerate((*SPECIAL, *ordinary, *(f" {word}" for word in words)))}


def make_tokenizer(positions: int) -> PreTrainedTokenizerFast:
    """The language's tokenizer with its chat template; `positions` is the longest text, in tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary(), unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (THINK, THOUGHT)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
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
