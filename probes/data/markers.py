"""The markers around a model's thinking: find them by its tokenizer, and split completions at them.

The vocabulary and the chat template show which markers a model was trained with. A completion is split into thinking,
closing template and response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probes.data.examples import Example, LiteralText
from surgery.errors import SurgeryError, listing, usage_error

OPEN_OPTION, CLOSE_OPTION, NONE_OPTION = "--think-open", "--think-close", "--no-thinking"


@dataclass(frozen=True)
class Markers:
    """The texts that a model writes before and after its thinking.

    open, close: the markers alone.
    after_open, before_close, after_close: the text next to them in a complete text; mostly white space, and for some
    models the marker with which the answer begins.
    """

    open: str
    close: str
    after_open: str = "\n"
    before_close: str = "\n"
    after_close: str = "\n\n"

    @property
    def opening(self) -> str:
        """`"<think>\\n"`: the text before the thinking."""
        return self.open + self.after_open

    @property
    def closing(self) -> str:
        """`"\\n</think>\\n\\n"`: the closing template, between thinking and answer."""
        return self.before_close + self.close + self.after_close


@dataclass(frozen=True)
class _MarkerFamily:
    """Markers, and the texts whose presence in a vocabulary or a chat template shows that the model uses them."""

    markers: Markers
    signs: tuple[str, ...]


def _family(open_: str, close: str, around: tuple[str, str, str] = ("\n", "\n", "\n\n"), *signs: str) -> _MarkerFamily:
    return _MarkerFamily(Markers(open_, close, *around), signs or (open_, close))


_BARE = ("", "", "")  # these models write no white space around their markers
KNOWN_FAMILIES: tuple[_MarkerFamily, ...] = (
    _family("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, Nemotron, most others
    _family("<thinking>", "</thinking>"),
    _family("<reasoning>", "</reasoning>"),
    _family("<thought>", "</thought>"),  # EXAONE Deep
    _family("[THINK]", "[/THINK]", _BARE),  # Magistral
    _family("◁think▷", "◁/think▷", _BARE),  # Kimi
    _family("<seed:think>", "</seed:think>", _BARE),  # Seed-OSS
    # Command A Reasoning: the answer has an opening marker of its own.
    _family("<|START_THINKING|>", "<|END_THINKING|>", ("", "", "<|START_RESPONSE|>")),
    _family("<|channel>thought", "<channel|>", ("\n", "\n", ""), "<|channel>", "<channel|>"),  # Gemma 4
    # gpt-oss: the thinking is a message in one channel, the answer the next message, in another.
    _family(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        _BARE,
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
    ),
)


def find_markers(tokenizer: Any, *, opening: str | None = None, closing: str | None = None, where: str) -> Markers:
    """Return the thinking markers of the model that `tokenizer` belongs to.

    Without `opening` and `closing` the known pairs are searched in the chat template, then among the tokens, then in
    both together. A given marker is taken as it is. The text next to it is the known pair's, or for other markers a
    line break before the thinking, one before and two after the closing marker (arXiv 2510.06036). White space around
    a given marker replaces that: `"\\n</t>\\n"`.

    Args:
        where: the name of the model in errors.

    Raises:
        SurgeryError: none of the known pairs is found, or several; one of two unknown markers is missing or blank.
    """
    if opening is not None or closing is not None:
        return _given_markers(opening, closing)
    template, tokens = template_text(tokenizer), tokenizer.get_vocab()
    # The template first: vocabularies may have unused tokens of other models, which a template does not write.
    tests: tuple[Callable[[str], bool], ...] = (
        lambda sign: sign in template,
        lambda sign: sign in tokens,
        lambda sign: sign in template or sign in tokens,
    )
    for test in tests:
        matches = [family.markers for family in KNOWN_FAMILIES if all(map(test, family.signs))]
        if len(matches) > 1:
            raise usage_error(
                f"has several pairs of thinking markers: {listing(f'{each.open} … {each.close}' for each in matches)}",
                where=where,
                hint=f"Name those that it uses with {OPEN_OPTION} and {CLOSE_OPTION}.",
            )
        if matches:
            return matches[0]
    raise usage_error(
        "no thinking markers are known from its tokens or its chat template",
        where=where,
        hint=f"Name them with {OPEN_OPTION} and {CLOSE_OPTION}, or give {NONE_OPTION} for a model that does not think.",
    )


def template_text(tokenizer: Any) -> str:
    """Return the tokenizer's chat template, `""` if it has none; of several named ones, the default."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def split_completion(text: str, markers: Markers) -> tuple[str, str, str]:
    """Split generated text at the first closing marker into (thinking, closing, response).

    The closing template includes the white space around it, so that thinking + closing + response is the text again,
    except for an opening marker at its beginning, which is removed with the text that usually follows it. A text
    without closing marker is all thinking: closing and response are `""`, as `never_closed` expects.
    """
    body = text
    if starts_open(text, markers):
        body = text.lstrip()[len(markers.open) :].removeprefix(markers.after_open)
    position = body.find(markers.close)
    if position < 0:
        return body, "", ""
    thinking = body[:position].rstrip()
    response = body[position + len(markers.close) :].lstrip()
    # Some models open their answer by a marker of its own, which belongs to the closing template.
    if answer_marker := markers.after_close.strip():
        response = response.removeprefix(answer_marker).lstrip()
    return thinking, body[len(thinking) : len(body) - len(response)], response


def starts_open(text: str, markers: Markers) -> bool:
    """Return whether `text` begins with the opening marker, ignoring white space before it."""
    return text.lstrip().startswith(markers.open)


def split_responses(examples: Sequence[Example], markers: Markers | None) -> list[Example]:
    """Split responses that contain their thinking (`<think>…</think>answer`).

    Examples with a thinking or closing of their own, or without marker in the response, are returned unchanged.
    """
    return [_split(example, markers) if markers else example for example in examples]


def never_closed(examples: Sequence[Example]) -> list[Example]:
    """Return the examples whose text ended within the thinking: closing and response are both `""`."""
    return [example for example in examples if example.closing == "" and example.response == ""]


def _split(example: Example, markers: Markers) -> Example:
    response = example.response
    if response is None or example.thinking is not None or example.closing is not None:
        return example
    if markers.close not in response and not starts_open(response, markers):
        return example
    thinking, closing, answer = split_completion(response, markers)
    # The parts are of the kind that the whole was.
    names: tuple[LiteralText, ...] = ("messages", "thinking", "closing", "response")
    literal = names if "response" in example.literal else example.literal
    return replace(example, thinking=thinking, closing=closing, response=answer, literal=literal)


def _given_markers(opening: str | None, closing: str | None) -> Markers:
    for option, text in ((OPEN_OPTION, opening), (CLOSE_OPTION, closing)):
        if text is not None and not text.strip():
            raise usage_error(f"got {text!r}, expected a text that is not blank", where=option)
    open_, close = (opening or "").strip(), (closing or "").strip()
    # A marker of a known pair implies the text next to it, and the other marker if that is not given.
    known = next(
        (
            each.markers
            for each in KNOWN_FAMILIES
            if open_ in ("", each.markers.open) and close in ("", each.markers.close)
        ),
        None,
    )
    if known is None and not (open_ and close):
        given, missing = (OPEN_OPTION, CLOSE_OPTION) if open_ else (CLOSE_OPTION, OPEN_OPTION)
        raise usage_error(f"{open_ or close} belongs to no known pair of markers", where=given, hint=f"Add {missing}.")
    if open_ == close:
        raise usage_error(f"{OPEN_OPTION} and {CLOSE_OPTION} are both {open_!r}, expected two different texts.")
    markers = known or Markers(open_, close)
    if opening and opening != open_:
        markers = replace(markers, after_open=opening[len(opening.rstrip()) :])
    if closing and closing != close:
        before, after = closing[: -len(closing.lstrip())], closing[len(closing.rstrip()) :]
        markers = replace(markers, before_close=before, after_close=after)
    return markers


def validate_split(example: Example, markers: Markers) -> None:
    """Raise SurgeryError if an example's thinking, closing and response do not fit the model's markers."""
    thinking, closing, response = example.thinking, example.closing, example.response
    if never_closed([example]):
        raise SurgeryError("its thinking was never closed, so that there is no answer", hint="Leave it out.")
    if thinking is not None and markers.close in thinking:
        raise usage_error(f"its thinking holds the closing marker {markers.close}", hint="Give the text before it.")
    if thinking is not None and starts_open(thinking, markers):
        raise usage_error(f"its thinking begins with the marker {markers.open}", hint="Give the text after it.")
    # An empty closing is allowed: a model may answer within its thinking, without a closing template.
    if closing and markers.close not in closing:
        raise usage_error(f"its closing {closing!r} lacks the marker {markers.close}")
    if thinking is None and response is not None:
        raise usage_error(
            f"has a response, but no thinking, in the field or between {markers.open} and {markers.close}",
            hint=f'Add "thinking" (it may be ""), or give {NONE_OPTION}.',
        )
    if thinking is None and closing is not None:
        raise usage_error("has a closing, but no thinking", hint='Add "thinking", or leave "closing" out.')
    if response is not None and markers.close in response and closing is None:
        raise usage_error(f"has its thinking apart, and {markers.close} in its response too", hint="Give it once.")
