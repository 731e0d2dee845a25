"""Tokenise examples as their model reads them: chat template, thinking markers, token ids, and the segments' ends.

A text is assembled once and tokenised once, as a whole, because tokens merge across the segments' borders: the ids are
those that the model saw when it wrote the text, or would have seen.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any

from probes.data.examples import MAX_REPORTED, Example, TokenSequence
from probes.data.literal_text import SpecialTokenMask, literal_spans, masked_messages
from probes.data.markers import (
    KNOWN_FAMILIES,
    NONE_OPTION,
    Markers,
    split_responses,
    template_text,
    validate_split,
)
from surgery.errors import ErrorList, usage_error
from surgery.io.hashing import hash_text
from surgery.models.chat_template import render_chat
from surgery.models.special_tokens import Span, acts, encode_literal, warn_of_special_tokens, without_special
from surgery.runtime.quiet_libraries import quiet

# Some templates write today's date by strftime_now. The same data must give the same ids tomorrow, so they always get
# this day. We cannot pass functions to templates, hence a macro that replaces each part of the format.
TODAY = datetime(2025, 1, 1)
STRFTIME_NOW = "strftime_now"
_PARTS = "".join(f"|replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "aAbBdejmyYHIMSp")
_SAME_DAY = "{% macro " + STRFTIME_NOW + "(format) %}{{ format" + _PARTS + " }}{% endmacro %}{{ '' }}"
# Characters before a border that a merge across it may reach, for tokenizers without offsets.
LONGEST_MERGE = 16
# Texts at a time: enough for every thread of the tokenizer, few enough that their offsets fit the memory.
CHUNK = 512

Offsets = Sequence[tuple[int, int]]
Cut = tuple[tuple[int, ...], tuple[int, int, int]]  # ids; how many end before prompt, thinking and closing end


@dataclass(frozen=True)
class _Text:
    """The text of an example in its four segments, and where in the whole of it special tokens are text."""

    prompt: str
    thinking: str
    closing: str
    answer: str
    literal: tuple[Span, ...] = ()

    @property
    def whole(self) -> str:
        return self.prompt + self.thinking + self.closing + self.answer

    @property
    def borders(self) -> tuple[int, int, int]:
        """The ends of prompt, thinking and closing, in characters."""
        first = len(self.prompt)
        second = first + len(self.thinking)
        return first, second, second + len(self.closing)


def render_prompt(tokenizer: Any, example: Example, markers: Markers | None) -> str:
    """Return the text before an example's thinking: the conversation in the chat template, and the opening marker.

    The template is applied with a generation prompt, and with thinking enabled, or without `markers` disabled
    (`enable_thinking`, `thinking`). The opening marker is added unless the prompt already ends with it. For a tokenizer
    without template the text is the bare prompt, to which `encode` adds the BOS.

    Raises:
        SurgeryError: the template rejects the conversation, or there is none and the conversation is more than a
            prompt; the template closes the thinking, or opens one although there are no markers.
    """
    return _prompt(tokenizer, example, markers)[0]


def _prompt(tokenizer: Any, example: Example, markers: Markers | None) -> tuple[str, tuple[Span, ...]]:
    """Return the text of `render_prompt`, and where special tokens in it are text."""
    mask = SpecialTokenMask(tokenizer)
    text = _conversation(tokenizer, masked_messages(mask, example), thinks=markers is not None)
    tail = text.rstrip()
    if markers is None:
        opened = next((f.markers.open for f in KNOWN_FAMILIES if tail.endswith(f.markers.open)), None)
        if opened:
            raise usage_error(f"the chat template begins a thinking with {opened}", hint=f"Drop {NONE_OPTION}.")
        return mask.reveal(text)
    # Some templates switch thinking off by an empty pair of markers, whatever they are asked for.
    if tail.endswith(markers.close):
        raise usage_error(
            f"the chat template ends the thinking before it begins, with {markers.close}",
            hint=f"Give {NONE_OPTION}, or a conversation that lets the model think.",
        )
    return mask.reveal(text if tail.endswith(markers.open) else text + markers.opening)


def text_before_answer(tokenizer: Any, example: Example, markers: Markers | None) -> str:
    """Return the text that the model continues: with thinking and closing template if the thinking is known."""
    return _before_answer(tokenizer, example, markers)[0]


def encode_before_answer(tokenizer: Any, example: Example, markers: Markers | None) -> tuple[str, tuple[int, ...]]:
    """Return the text that the model continues, and its ids.

    Where special tokens in the text are text it ends in the places of these, so that it says what its ids are.
    """
    text, literal = _before_answer(tokenizer, example, markers)
    ids = encode(tokenizer, text, literal)
    return (f"{text}\0{literal}" if acts(tokenizer, text, literal) else text), ids


def _before_answer(tokenizer: Any, example: Example, markers: Markers | None) -> tuple[str, tuple[Span, ...]]:
    prompt, literal = _prompt(tokenizer, example, markers)
    if example.thinking is None:
        return prompt, literal
    text = _segments(tokenizer, prompt, literal, example, markers, answer=False)
    return text.whole, text.literal


def build_sequences(
    tokenizer: Any,
    examples: Sequence[Example],
    markers: Markers | None,
    *,
    answer: bool = True,
    max_tokens: int | None = None,
    where: str,
) -> list[TokenSequence]:
    """Tokenise examples, and cut the ids into prompt, thinking, closing template and answer.

    The text is prompt (with the opening marker) + thinking + closing template + response. Responses that contain their
    thinking are split first. A token that spans a border belongs to the later segment: `.\\n` at the end of a thinking
    is part of the closing template. Before the answer this holds only for tokens of white space; a token with a part of
    the closing marker, or of the prompt, must not become the answer's. There the text is cut, and both sides are
    tokenised on their own, so that the last token before the answer always closes the thinking.

    Tokenizers without offsets are cut after the tokens that the text up to a border has in common with the whole.

    Args:
        markers: None for a model that does not think; a thinking is then an error, except with tokenizers without chat
            template, for which prompt, thinking, closing (if given) and response are concatenated.
        answer: False leaves the answer's tokens out; those before it are the same either way.
        max_tokens: the model's context. Longer sequences are errors.
        where: the name of the data in errors.

    Raises:
        SurgeryError: all examples that cannot be used, with the reason: thinking or response is missing, contains
            markers, was never closed; the chat template rejects it; it is too long, or its prompt has no tokens.
    """
    errors = ErrorList()
    # Of the conversations alone: thinking and response may be the model's own, with its own tokens in them.
    trusted = (example for example in examples if "messages" not in example.literal)
    contents = (message.get("content") for example in trusted for message in example.messages)
    warn_of_special_tokens(tokenizer, (text for text in contents if isinstance(text, str)), where=where)
    texts: list[tuple[Example, _Text]] = []
    for example in split_responses(examples, markers):
        with errors.collect(f"{where}: example {example.key}", usage=True):
            prompt, literal = _prompt(tokenizer, example, markers)
            texts.append((example, _segments(tokenizer, prompt, literal, example, markers, answer=answer)))
    # The same for all texts: what a tokenizer adds in front does not depend on the text.
    prefix = _prefix_of(tokenizer, texts[0][1]) if texts else ()
    sequences = []
    cuts = _cut_all(tokenizer, [text for _, text in texts])
    for (example, _), (ids, ends) in zip(texts, cuts, strict=True):
        place = f"{where}: example {example.key}"
        whole = (*prefix, *(ids if answer else ids[: ends[2]]))
        if ends[0] == 0:
            errors.add("its prompt has no tokens of its own", where=place, usage=True)
        elif max_tokens is not None and len(whole) > max_tokens:
            errors.add(f"has {len(whole):,} tokens, and the model reads {max_tokens:,}", where=place, usage=True)
        else:
            first, second, third = (end + len(prefix) for end in ends)
            sequences.append(TokenSequence(example.key, whole, (first, second, third, len(whole))))
    errors.raise_if_any(limit=MAX_REPORTED)
    return sequences


def encode(tokenizer: Any, text: str, literal: Sequence[Span] = ()) -> tuple[int, ...]:
    """Return the ids of a text from `render_prompt` or `text_before_answer`, with at most one BOS.

    Special tokens that have characters in the spans `literal` are text.
    """
    with quiet():  # the tokenizer's warning of long texts; callers raise an error that names the example
        if acts(tokenizer, text, literal):
            return (*_prefix(tokenizer, without_special(tokenizer, text)), *encode_literal(tokenizer, text, literal)[0])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*_prefix(tokenizer, text), *ids)


def template_hash(tokenizer: Any) -> str:
    """Return the hash of the tokenizer's chat template, of `""` if it has none."""
    return hash_text(template_text(tokenizer))


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of how the tokenizer cuts texts: its vocabulary, and its backend's rules if it has one."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The backend remembers padding and truncation of the last call, which are no part of its rules.
    rules = {} if backend is None else json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return hash_text(vocabulary + json.dumps(rules, sort_keys=True))


def _conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, thinks: bool) -> str:
    template = template_text(tokenizer)
    if not template:
        if len(messages) > 1:
            raise usage_error(
                f"is a conversation of {len(messages)} messages, and the tokenizer has no chat template",
                hint="Without one, give a single prompt.",
            )
        return str(messages[-1]["content"])
    return render_chat(
        tokenizer,
        messages,
        template=_SAME_DAY + template if STRFTIME_NOW in template else template,
        add_generation_prompt=True,
        # The first is Qwen3's, GLM's and Gemma 4's name, the second DeepSeek V3.1's and Granite's.
        settings={"enable_thinking": thinks, "thinking": thinks},
    )


def _segments(
    tokenizer: Any,
    prompt: str,
    literal: tuple[Span, ...],
    example: Example,
    markers: Markers | None,
    *,
    answer: bool,
) -> _Text:
    """Return the example's text after `prompt`, in which special tokens at `literal` are text.

    Raises:
        SurgeryError: a segment is missing, or does not fit the markers.
    """
    response = example.response
    if markers is not None:
        validate_split(example, markers)
        if example.thinking is None:
            raise usage_error("its thinking is not known yet", hint="Generate it first.")
        closing = markers.closing if example.closing is None else example.closing
    else:
        if (example.thinking or example.closing) and template_text(tokenizer):
            raise usage_error("has a thinking, and its model is said not to think", hint=f"Drop {NONE_OPTION}.")
        closing = example.closing or ""
    if answer and response is None:
        raise usage_error("its response is not known yet", hint="Generate it first.")
    spans = (*literal, *literal_spans(example, closing, markers, start=len(prompt)))
    return _Text(prompt, example.thinking or "", closing, response or "", spans)


def _prefix(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the special tokens before `text`; none with a chat template, which writes them into the text itself."""
    if template_text(tokenizer):
        return ()
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    # The bare ids are searched in the whole, because there may be special tokens behind them, too.
    for length in range(len(whole) - len(bare) + 1):
        if whole[length : length + len(bare)] == bare:
            return tuple(whole[:length])
    raise usage_error("cuts a text differently when it adds special tokens", where=tokenizer.name_or_path)


def _prefix_of(tokenizer: Any, text: _Text) -> tuple[int, ...]:
    acting = acts(tokenizer, text.whole, text.literal)
    return _prefix(tokenizer, without_special(tokenizer, text.whole) if acting else text.whole)


def _cut_all(tokenizer: Any, texts: Sequence[_Text]) -> Iterator[Cut]:
    """Yield the ids of each text, and how many of them are before the ends of prompt, thinking and closing."""
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        literal = [acts(tokenizer, text.whole, text.literal) for text in chunk]
        wholes = ["" if own else text.whole for text, own in zip(chunk, literal, strict=True)]
        if tokenizer.is_fast:
            with quiet():
                encoded = tokenizer(wholes, add_special_tokens=False, return_offsets_mapping=True)
            found = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for text, own, (ids, offsets) in zip(chunk, literal, found, strict=True):
                if own:
                    ids, offsets = encode_literal(tokenizer, text.whole, text.literal)
                yield _cut_by_offsets(tokenizer, text, tuple(ids), offsets)
        else:
            with quiet():
                encoded = tokenizer(wholes, add_special_tokens=False)
            for text, own, ids in zip(chunk, literal, encoded["input_ids"], strict=True):
                if own:
                    encode_literal(tokenizer, text.whole, text.literal)  # raises its error
                yield _cut_by_prefixes(tokenizer, text, tuple(ids))


def _cut_by_offsets(tokenizer: Any, text: _Text, ids: tuple[int, ...], offsets: Offsets) -> Cut:
    # The running maximum: bisection needs ends that ascend, and a token without text of its own may have the end 0.
    ends = list(accumulate((end for _, end in offsets), max))
    first, second, third = (bisect_right(ends, border) for border in text.borders)
    # The first token of the answer begins before the border, with more than white space.
    if third < len(ids) and text.whole[offsets[third][0] : text.borders[2]].strip():
        return _cut_apart(tokenizer, text)
    return ids, (first, second, third)


def _cut_by_prefixes(tokenizer: Any, text: _Text, ids: tuple[int, ...]) -> Cut:
    def n_before(border: int) -> int:
        most = 0
        # What is cut may merge with its end otherwise than the whole does (`>` `\n\n` is cut to `>\n`, which may be one
        # token): shorter beginnings then have more tokens in common with it.
        for end in range(border, max(border - LONGEST_MERGE, 0) - 1, -1):
            part = tokenizer(text.whole[:end], add_special_tokens=False)["input_ids"]
            shared = _common_prefix_length(ids, part)
            most = max(most, shared)
            if shared == len(part):
                break
        return most

    first, second, third = map(n_before, text.borders)
    # All tokens of the text before the answer must be before the cut, except for white space at its end.
    bare = tokenizer(text.whole[: text.borders[2]].rstrip(), add_special_tokens=False)["input_ids"]
    if text.answer and third < len(bare):
        return _cut_apart(tokenizer, text)
    return ids, (first, second, third)


def _cut_apart(tokenizer: Any, text: _Text) -> Cut:
    """Cut a text whose part before the answer and whose answer are tokenised each on its own."""
    border = text.borders[2]
    # No span crosses the border: that of the response begins there.
    before = _Text(
        text.prompt, text.thinking, text.closing, "", tuple(span for span in text.literal if span[1] <= border)
    )
    [(ids_before, ends)] = _cut_all(tokenizer, [before])
    own = tuple((start - border, end - border) for start, end in text.literal if start >= border)
    if acts(tokenizer, text.answer, own):
        return (*ids_before, *encode_literal(tokenizer, text.answer, own)[0]), ends
    answer_ids = tokenizer(text.answer, add_special_tokens=False)["input_ids"]
    return (*ids_before, *answer_ids), ends


def _common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
