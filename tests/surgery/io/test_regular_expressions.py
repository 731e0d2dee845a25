"""Regular expressions from files: the answers of `re` on what PEFT writes, and no pattern that takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.io.regular_expressions import Expression, StepCounter

NAMES = [
    "model.layers.3.self_attn.q_proj",
    "model.layers.31.mlp.down_proj",
    "model.decoder.layers.0.fc1",
    "lm_head",
    "a",
    "a\n",
    "",
]
# Keys of alpha_pattern and rank_pattern, and target_modules, of PEFT's documentation and of adapters on the Hub.
REAL = [
    r".*\.(0|1|2)\.self_attn\.q_proj",
    r"^model\.layers\.\d+\.mlp\..*",
    r"layers\.(?:[0-9]|1[0-9]|3[01])\..*_proj$",
    r"^model.decoder.layers.0.encoder_attn.k_proj",
    r"[^.]+\.q_proj",
    r"(?P<which>q|k|v)_proj",
    r".*self_attn.*(q|v)_proj$",
    r"model\.layers\.[0-9]{1,2}\.mlp\.(gate|up|down)_proj",
    r"lm_head|a?",
    r"",
]
HOSTILE = [
    "(a+)+$",
    "(a|aa)+$",
    "(.*)*x",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(a*)*b",
    "(x+x+)+y",
    ".*" * 400,
    "(.*a){300}",
    "(a?){300}a{300}",
]
REFUSED = [
    r"(a)\1",
    "(?P<x>a)(?P=x)",
    "(?=a)a",
    "(?!b)a",
    "(?<=a)b",
    "(?i)a",
    "(?(1)a|b)",
    "a++",
    "a**",
    r"\ba",
    "a{1000000}",
    "(a{1000}){1000}",
    "(){1000}" * 30,
    "((((){999}){999}){999}){999}",
    "(" * 400 + ")" * 400,
    "[" * 900,
    "[z-a]",
    "(",
    ")",
    "*",
    "{2}",
    "\\",
    "(?",
]


def matches(pattern: str, text: str) -> bool:
    return Expression(pattern, StepCounter("adapter_config.json")).matches(text)


@pytest.mark.parametrize("pattern", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_real_patterns_match_as_in_re(pattern: str, name: str) -> None:
    assert matches(pattern, name) == bool(re.match(f"(?:{pattern})$", name))
    assert matches(rf"(.*\.)?({pattern})", name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


PIECES = [*"ab.(|)*+?^$", "[ab]", "[^a]", r"\w", r"\.", "{2}", "{1,}", "{,2}", "(?:"]


@settings(max_examples=2_000, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text("ab.\n", max_size=6))
def test_every_pattern_that_is_read_matches_as_in_re(pattern: str, text: str) -> None:
    try:
        reference = re.compile(pattern), re.compile(f"(?:{pattern})$")
    except re.error:
        reference = None
    try:
        answer = matches(pattern, text)
    except SurgeryError as error:
        # Only what repeats a place or a repetition is an expression for `re` and none for us.
        assert reference is None or "repeats a" in str(error)
        return
    assert reference is not None
    assert answer == bool(reference[1].match(text))


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_that_makes_re_hang_is_answered_or_refused_at_once(pattern: str) -> None:
    expression = Expression(pattern, StepCounter("adapter_config.json"))
    begin = time.perf_counter()
    try:
        for length in (30, 200, 2_000):
            expression.matches("a" * length + "!")
    except SurgeryError as error:
        assert "adapter_config.json: its patterns take too long to match" in str(error)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_cannot_be_matched_in_bounded_time_is_refused(pattern: str) -> None:
    with pytest.raises(SurgeryError, match="Write it as plain names"):
        matches(pattern, "a")


def test_the_steps_of_all_expressions_together_are_bounded() -> None:
    counter = StepCounter("f", most=1_000)
    expressions = [Expression(f"a{number}.*b", counter) for number in range(100)]
    with pytest.raises(SurgeryError, match="f: its patterns take too long"):
        [each.matches("a" * 100) for each in expressions * 100]
