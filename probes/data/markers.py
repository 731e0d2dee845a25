"""What a model writes around its thinking: the markers, and completions cut at them.

In comes a tokenizer, whose vocabulary and chat template tell which markers its model was trained with, and later the
texts that such a model wrote; out come `Markers`, and the thinking, closing template and response of each text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probes.data.examples import Example
from surgery.errors import SurgeryError, listing, usage_error

OPEN_OPTION, CLOSE_OPTION, NONE_OPTION = "--think-open", "--think-close", "--no-thinking"


@dataclass(frozen=True)
class Markers:
    """The texts that a model writes before and after its thinking.

    open, close: the markers alone. after_open, before_close, after_close: what stands beside them where a text is put
    together; mostly white space, and for some models the marker with which the answer begins.
    """

    open: str
    close: str
    after_open: str = "\n"
    before_close: str = "\n"
    after_close: str = "\n\n"

    @property
    def opening(self) -> str:
        """`"<think>\\n"`: what precedes the thinking."""
        return self.open + self.after_open

    @property
    def closing(self) -> str:
        """`"\\n</think>\\n\\n"`: the closing template, between thinking and answer."""
        return self.before_close + self.close + self.after_close


@dataclass(frozen=True)
class _Known:
    """Markers, and the texts by which a vocabulary or a chat template shows that its model uses them."""

    markers: Markers
    signs: tuple[str, ...]


def _known(open_: str, close: str, around: tuple[str, str, str] = ("\n", "\n", "\n\n"), *signs: str) -> _Known:
    return _Known(Markers(open_, close, *around), signs or (open_, close))


_BARE = ("", "", "")
KNOWN_FAMILIES: tuple[_Known, ...] = (
    _known("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, Nemotron, most others
    _known("<thinking>", "</thinking>"),
    _known("<reasoning>", "</reasoning>"),
    _known("<thought>", "</thought>"),  # EXAONE Deep
    _known("[THINK]", "[/THINK]", _BARE),  # Magistral
    _known("◁think▷", "◁/think▷", _BARE),  # Kimi
    _known("<seed:think>", "</seed:think>", _BARE),  # Seed-OSS
    # Command A Reasoning: the answer has an opening marker of its own.
    _known("<|START_THINKING|>", "<|END_THINKING|>", ("", "", "<|START_RESPONSE|>")),
    _known("<|channel>thought", "<channel|>", ("\n", "\n", ""), "<|channel>", "<channel|>"),  # Gemma 4
    # gpt-oss: the thinking is a message in one channel, the answer the next message, in another.
    _known(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        _BARE,
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
    ),
)


def find_markers(tokenizer: Any, *, opening: str | None = None, closing: str | None = None, where: str) -> Markers:
    """The thinking markers of the model that `tokenizer` belongs to.

    Without `opening` and `closing` the known pairs are looked for in the chat template, then among the tokens, then in
    both together. A marker that is given counts as it stands; what stands beside it is the known pair's, or for others
    a line break before the thinking, one before and two after the closing marker (arXiv 2510.06036). Where it is given
    with white space around it, that white space takes its place: `"\\n</t>\\n"`.

    Args:
        where: what errors call the model.

    Raises:
        SurgeryError: none of the known pairs is found, or several; one of two unknown markers is missing or blank.
    """
    if opening is not None or closing is not None:
        return _given(opening, closing)
    template, tokens = template_text(tokenizer), tokenizer.get_vocab()
    tests: tuple[Callable[[str], bool], ...] = (
        lambda sign: sign in template,
        lambda sign: sign in tokens,
        lambda sign: sign in template or sign in tokens,
    )
    for test in tests:
        found = [known.markers for known in KNOWN_FAMILIES if all(map(test, known.signs))]
        if len(found) > 1:
            raise usage_error(
                f"has several pairs of thinking markers: {listing(f'{each.open} … {each.close}' for each in found)}",
                where=where,
                hint=f"Name those that it uses with {OPEN_OPTION} and {CLOSE_OPTION}.",
            )
        if found:
            return found[0]
    raise usage_error(
        "no thinking markers are known from its tokens or its chat template",
        where=where,
        hint=f"Name them with {OPEN_OPTION} and {CLOSE_OPTION}, or give {NONE_OPTION} for a model that does not think.",
    )


def template_text(tokenizer: Any) -> str:
    """The tokenizer's chat template, `""` where it has none; of several by name, the default one."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def split_completion(text: str, markers: Markers) -> tuple[str, str, str]:
    """What a model wrote → (thinking, closing, response), cut at the first closing marker.

    The closing template keeps the white space that it stands in, so that thinking + closing + response is the text
    again, but for an opening marker at its beginning, which goes with what usually follows it. A text that never
    closes is all thinking: closing and response are `""`, as `never_closed` finds them.
    """
    body = text
    if starts_open(text, markers):
        body = text.lstrip()[len(markers.open) :].removeprefix(markers.after_open)
    at = body.find(markers.close)
    if at < 0:
        return body, "", ""
    thinking = body[:at].rstrip()
    response = body[at + len(markers.close) :].lstrip()
    if begin := markers.after_close.strip():
        response = response.removeprefix(begin).lstrip()
    return thinking, body[len(thinking) : len(body) - len(response)], response


def starts_open(text: str, markers: Markers) -> bool:
    """Whether `text` begins with the opening marker, white space apart."""
    return text.lstrip().startswith(markers.open)


def split_responses(examples: Sequence[Example], markers: Markers | None) -> list[Example]:
    """`examples` in which responses that hold their thinking (`<think>…</think>answer`) are cut into the parts.

    What has a thinking or closing of its own, or no marker in its response, stays as it is.
    """
    return [_split(example, markers) if markers else example for example in examples]


def never_closed(examples: Sequence[Example]) -> list[Example]:
    """Those that thought to the end of their text and never answered: closing and response are both `""`."""
    return [example for example in examples if example.closing == "" and example.response == ""]


def _split(example: Example, markers: Markers) -> Example:
    response = example.response
    if response is None or example.thinking is not None or example.closing is not None:
        return example
    if markers.close not in response and not starts_open(response, markers):
        return example
    thinking, closing, answer = split_completion(response, markers)
    return replace(example, thinking=thinking, closing=closing, response=answer)


def _given(opening: str | None, closing: str | None) -> Markers:
    for option, text in ((OPEN_OPTION, opening), (CLOSE_OPTION, closing)):
        if text is not None and not text.strip():
            raise usage_error(f"got {text!r}, expected a text that is not blank", where=option)
    open_, close = (opening or "").strip(), (closing or "").strip()
    # A marker that belongs to a known pair brings what stands beside it, and the other marker where it is not given.
    near = next(
        (
            each.markers
            for each in KNOWN_FAMILIES
            if open_ in ("", each.markers.open) and close in ("", each.markers.close)
        ),
        None,
    )
    if near is None and not (open_ and close):
        given, missing = (OPEN_OPTION, CLOSE_OPTION) if open_ else (CLOSE_OPTION, OPEN_OPTION)
        raise usage_error(f"{open_ or close} belongs to no known pair of markers", where=given, hint=f"Add {missing}.")
    if open_ == close:
        raise usage_error(f"{OPEN_OPTION} and {CLOSE_OPTION} are both {open_!r}, expected two different texts.")
    markers = near or Markers(open_, close)
    if opening and opening != open_:
        markers = replace(markers, after_open=opening[len(opening.rstrip()) :])
    if closing and closing != close:
        before, after = closing[: -len(closing.lstrip())], closing[len(closing.rstrip()) :]
        markers = replace(markers, before_close=before, after_close=after)
    return markers


def validate_split(example: Example, markers: Markers) -> None:
    """Raises SurgeryError where an example's thinking, closing and response do not fit its model's markers."""
    thinking, closing, response = example.thinking, example.closing, example.response
    if never_closed([example]):
        raise SurgeryError("its thinking was never closed, so that there is no answer", hint="Leave it out.")
    if thinking is not None and markers.close in thinking:
        raise usage_error(f"its thinking holds the closing marker {markers.close}", hint="Give the text before it.")
    if thinking is not None and starts_open(thinking, markers):
        raise usage_error(f"its thinking begins with the marker {markers.open}", hint="Give the text after it.")
    # An answer that comes inside the thinking, without a closing template, is one all the same.
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
