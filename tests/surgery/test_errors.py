"""Promises of surgery.errors: one exception type with what, where and what to do; many errors raised as one."""

from __future__ import annotations

import pickle

import pytest

from surgery.errors import FAILED, WRONG_USAGE, ErrorList, SurgeryError, closest, did_you_mean, listing, usage_error


def raised(errors: ErrorList, where: object | None = None, limit: int | None = None) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        errors.raise_if_any(where, limit=limit)
    return caught.value


def test_an_error_says_where_what_and_what_to_do() -> None:
    error = SurgeryError("ends at byte 9,412 of 9,000", where="model.safetensors", hint="Fetch it again.")
    assert str(error) == "model.safetensors: ends at byte 9,412 of 9,000. Fetch it again."


def test_an_error_is_the_same_after_it_was_pickled() -> None:
    error = usage_error("is wrong", where="x", hint="Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exit_code, again.hint) == (str(error), WRONG_USAGE, "Mend it.")


def test_an_empty_list_raises_nothing() -> None:
    errors = ErrorList()
    assert not errors
    errors.raise_if_any("anywhere")


def test_all_errors_are_raised_as_one_in_their_order_each_once() -> None:
    errors = ErrorList()
    for what in ("first", "second", "first"):
        errors.add(what, where="row 1")
    error = raised(errors, "data.jsonl")
    assert str(error) == "data.jsonl: row 1: first\n  row 1: second"
    assert error.exit_code == FAILED


def test_errors_of_the_request_come_first_and_decide_the_exit_code() -> None:
    errors = ErrorList()
    errors.add("the model is broken")
    errors.add("there is no layer 9", usage=True)
    error = raised(errors)
    assert str(error) == "there is no layer 9\n  the model is broken"
    assert error.exit_code == WRONG_USAGE


def test_tensors_with_the_same_error_become_one_sentence() -> None:
    errors = ErrorList()
    for number in range(5):
        errors.add_tensor(f"w{number}", "has NaN", "Look at the inputs.")
    errors.add_tensor("v", "has another shape", "Leave it out.")
    assert list(errors) == [
        '5 tensors: "w0", "w1", "w2" and 2 more: has NaN. Look at the inputs.',
        '"v": has another shape. Leave it out.',
    ]


def test_an_error_raised_in_a_block_is_collected_and_others_pass() -> None:
    errors = ErrorList()
    with errors.collect("row 3"):
        raise usage_error("is no number")
    with pytest.raises(KeyError), errors.collect("row 4"):
        raise KeyError("x")
    error = raised(errors)
    assert str(error) == "row 3: is no number"
    assert error.exit_code == WRONG_USAGE


def test_lists_can_be_joined() -> None:
    errors, others = ErrorList(), ErrorList()
    errors.add("a")
    others.add("b")
    others.add("a")
    errors.extend(others)
    assert list(errors) == ["a", "b"]


def test_more_errors_than_the_limit_are_counted() -> None:
    errors = ErrorList()
    for number in range(25):
        errors.add(f"error {number}")
    lines = str(raised(errors, limit=20)).split("\n  ")
    assert lines[:2] + lines[-2:] == ["error 0", "error 1", "error 19", "… and 5 more."]


def test_the_nearest_names_are_offered() -> None:
    known = ["strict", "by-token", "skip-embeddings"]
    assert closest("strikt", known) == "strict"
    assert did_you_mean("strikt", known) == "Did you mean strict?"
    assert did_you_mean("gsm8", ["gsm8k", "gsm8k_cot", "mmlu"], most=2) == "Did you mean gsm8k, gsm8k_cot?"
    assert closest("zebra", known) is did_you_mean("zebra", known) is None


def test_a_long_listing_says_how_much_is_left_out() -> None:
    assert listing(map(str, range(3))) == "0, 1, 2"
    assert listing(map(str, range(30)), 2) == "0, 1 and 28 more"
