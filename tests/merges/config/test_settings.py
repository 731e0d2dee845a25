"""What a parameter may be, and what a setting gives one tensor."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merges.config.settings import (
    INT8_MASK,
    MethodSpec,
    ParameterSpec,
    Rule,
    Scalar,
    Setting,
    as_written,
    layer_position,
    resolve,
)

NUMBERS = st.floats(-1e6, 1e6)
POSITIONS = st.floats(0, 1)
DENSITY = ParameterSpec("density", "number", 1.0, low=0, high=1, low_open=True)


def one(*values: Scalar, t: float) -> Scalar | None:
    return resolve((Rule(values),), "model.norm.weight", t)


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ((0.25,), 0.7, 0.25),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0, 0.0), 0.25, 0.5),
        ((0.0, 1.0, 0.0), 1.0, 0.0),
        ((10, 20), 0.24, 12),
        ((False, False, True), 0.99, False),
        ((False, False, True), 1.0, True),
        (("a", "b"), 0.99, "a"),
    ],
)
def test_numbers_are_interpolated_and_other_values_picked(
    values: tuple[Scalar, ...], t: float, expected: Scalar
) -> None:
    found = one(*values, t=t)
    assert found == expected and type(found) is type(expected)


@given(st.lists(NUMBERS, min_size=1, max_size=9), POSITIONS)
def test_a_gradient_stays_between_its_neighbours(values: list[float], t: float) -> None:
    found = one(*values, t=t)
    assert isinstance(found, float)
    below = int(t * (len(values) - 1))
    near = values[below], values[min(below + 1, len(values) - 1)]
    assert min(near) - 1e-9 <= found <= max(near) + 1e-9


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.integers(0, 8))
def test_a_gradient_passes_through_each_of_its_values(values: list[float], i: int) -> None:
    i = min(i, len(values) - 1)
    t = i / (len(values) - 1) if len(values) > 1 else 1.0
    assert one(*values, t=t) == pytest.approx(values[i], abs=1e-8)


@given(NUMBERS, NUMBERS, POSITIONS, POSITIONS)
def test_a_gradient_of_two_values_is_monotonic(first: float, last: float, s: float, t: float) -> None:
    low, high = one(first, last, t=min(s, t)), one(first, last, t=max(s, t))
    assert isinstance(low, float) and isinstance(high, float)
    assert (low <= high + 1e-9) if first <= last else (low >= high - 1e-9)


@given(st.lists(NUMBERS, min_size=1, max_size=9), POSITIONS)
def test_a_gradient_read_backwards_gives_the_same_from_the_other_end(values: list[float], t: float) -> None:
    assert one(*values, t=t) == pytest.approx(one(*reversed(values), t=1 - t), abs=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=9), POSITIONS)
def test_lists_of_booleans_give_one_of_their_values(values: list[bool], t: float) -> None:
    assert one(*values, t=t) is values[int(t * (len(values) - 1))]


def test_first_rule_that_applies_counts() -> None:
    setting: Setting = (Rule((1.0,), "mlp"), Rule((2.0,), "layers.0."), Rule((3.0, 5.0), "*"), Rule((9.0,)))
    assert resolve(setting, "model.layers.0.mlp.up_proj.weight", 0.5) == 1.0
    assert resolve(setting, "model.layers.0.self_attn.q_proj.weight", 0.5) == 2.0
    assert resolve(setting, "lm_head.weight", 0.5) == 4.0
    assert resolve(setting[:2], "lm_head.weight", 0.5) is None
    assert resolve((), "lm_head.weight", 0.5) is None


def test_layers_stand_from_0_to_1_and_the_only_one_at_1() -> None:
    assert [layer_position(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert layer_position(0, 1) == 1


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (DENSITY, "a number in (0, 1]"),
        (ParameterSpec("t", "number", low=0, high=1, high_open=True), "a number in [0, 1)"),
        (ParameterSpec("tol", "number", low=0, low_open=True), "a number > 0"),
        (ParameterSpec("max_iter", "integer", low=1), "a whole number ≥ 1"),
        (ParameterSpec("x", "number", high=0.5), "a number ≤ 0.5"),
        (ParameterSpec("x", "number", high=0.5, high_open=True), "a number < 0.5"),
        (ParameterSpec("weight", "number"), "a number"),
        (ParameterSpec("normalize", "boolean"), "true or false"),
        (ParameterSpec("mode", "text"), "text"),
    ],
)
def test_rules_read_as_a_sentence_wants_them(spec: ParameterSpec, rule: str) -> None:
    assert spec.rule == rule


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (DENSITY, 1, 1.0),
        (DENSITY, "1e-5", 1e-5),
        (ParameterSpec("n", "integer"), 10.0, 10),
        (ParameterSpec("n", "integer"), "10", 10),
        (ParameterSpec("n", "integer"), 2**60 + 1, 2**60 + 1),
        (INT8_MASK, 1, True),
        (INT8_MASK, 0.0, False),
        (INT8_MASK, "No", False),
        (INT8_MASK, "true", True),
        (ParameterSpec("mode", "text"), "1", "1"),
    ],
)
def test_values_are_read_as_their_kind(spec: ParameterSpec, value: object, expected: Scalar) -> None:
    found = spec.read(value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("spec", "value", "text"),
    [
        (DENSITY, 1.5, "got 1.5, expected a number in (0, 1]"),
        (DENSITY, 0, "got 0, expected a number in (0, 1]"),
        (DENSITY, True, "got true, expected a number in (0, 1]"),
        (DENSITY, "half", 'got "half", expected a number in (0, 1]'),
        (DENSITY, math.nan, "got nan, expected a finite number"),
        (DENSITY, -math.inf, "got -inf, expected a finite number"),
        (DENSITY, "inf", 'got "inf", expected a number in (0, 1]'),
        (DENSITY, 10**400, f"got {'1' + '0' * 58}…, expected a number in (0, 1]"),
        (DENSITY, None, "got nothing, expected a number in (0, 1]"),
        (DENSITY, [0.5, [1]], "got [0.5, [1]], expected a number in (0, 1]"),
        (ParameterSpec("n", "integer", low=1), 1.5, "got 1.5, expected a whole number ≥ 1"),
        (ParameterSpec("n", "integer", low=1), False, "got false, expected a whole number ≥ 1"),
        (INT8_MASK, 2, "got 2, expected true or false"),
        (INT8_MASK, "maybe", 'got "maybe", expected true or false'),
        (ParameterSpec("mode", "text"), 1, "got 1, expected text"),
    ],
)
def test_wrong_values_are_named_with_their_rule(spec: ParameterSpec, value: object, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        spec.read(value)
    assert str(caught.value) == text


def test_long_values_are_cut_and_stay_on_one_line() -> None:
    assert as_written("a\nb") == '"a b"'
    assert len(as_written("x" * 1000)) == 60


def test_every_method_takes_int8_mask() -> None:
    method = MethodSpec("linear", (DENSITY,))
    assert method.parameter("density") is DENSITY
    assert method.parameter("int8_mask") is INT8_MASK
    assert method.parameter("weight") is None
