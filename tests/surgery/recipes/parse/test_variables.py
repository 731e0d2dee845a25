"""Names of a recipe: variables and what the command line makes of them, matrices, and conditions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recipe_texts import Read, faults_of, note, only_fault, read_text, steps_of


@pytest.mark.parametrize(
    ("typed", "what"),
    [
        ("{a: 1}", "--set v: got a mapping, expected text"),
        ("[1", "--set v: is not YAML"),
        ("4:8", "--set v: YAML reads 4:8 as the number 248; put it in quotes"),
        ("$w", "--set v: got '$w', expected a value"),
        ("a\n--- b", "--set v: "),
    ],
)
def test_settings_that_are_no_values_are_refused(read: Read, typed: str, what: str) -> None:
    assert what in faults_of(read, steps_of({"a": note("$v")}, vars={"v": 1}), v=typed)[0]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("$x", "got '$x', expected a value: variables name nothing else"),
        ({"a": 1}, "got a mapping, expected text, a number, true or false"),
        ([[1]], "got a list, expected text"),
        ([None], "got nothing, expected text"),
        (float("nan"), "got nan, expected a finite number"),
    ],
)
def test_variables_hold_values_and_lists_of_them(read: Read, value: object, what: str) -> None:
    assert what in only_fault(read, steps_of({"a": note("$v")}, vars={"v": value}))


def test_names_stand_for_one_thing(read: Read) -> None:
    text = steps_of({"a": note("$a"), "b": note("$c", matrix={"c": [1]}), "c": note()}, vars={"a": 1})
    assert [fault.partition(": ")[2] for fault in faults_of(read, text)] == [
        "recipes.r.steps.a: is the name of a variable too, so that $a could be either",
        "recipes.r.steps.b.matrix.c: is the name of a step too, so that $c could be either",
    ]
    fault = only_fault(read, steps_of({"A": note(), "a": note()}))
    assert fault.endswith("differs from A in upper and lower case alone")


def test_a_matrix_variable_stands_before_one_of_the_recipe(read: Read) -> None:
    text = steps_of({"a": note("$s", matrix={"s": "$s"}), "b": note("$s")}, vars={"s": [1, 2]})
    assert [node.given["of"] for node in read(text).nodes] == [("1",), ("2",), ("1", "2")]
    assert [node.name for node in read(text, s="7").nodes] == ["a.s=7", "b"]


values = st.one_of(st.integers(-99, 99), st.floats(-1, 1).map(lambda x: round(x, 2)), st.sampled_from("xyz"))


# Steps are told apart by what a value looks like as text: 0.0 and -0.0 are one number.
axes = st.lists(values, min_size=1, max_size=4, unique_by=lambda value: value)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(["p", "q", "r-s"]), axes, min_size=1))
def test_a_matrix_is_the_product_of_its_lists(folder: Path, matrix: dict[str, list[Any]]) -> None:
    found = read_text(folder, steps_of({"a": note(*(f"${name}" for name in matrix), matrix=matrix)})).nodes
    product = list(itertools.product(*matrix.values()))
    assert [node.given["of"] for node in found] == [tuple(map(str, values)) for values in product]
    assert [node.name for node in found] == [
        "a" + "".join(f".{name}={value}" for name, value in zip(matrix, values, strict=True)) for values in product
    ]


@pytest.mark.parametrize(
    ("matrix", "what"),
    [
        ({"s": []}, "matrix.s: is empty"),
        ({"s": [1, "1.0"]}, "matrix.s: holds 1.0 twice"),
        ({"s": ["a/b", "a:b"]}, "makes a second node a.s=a-b, of the same name"),
        ({"s": ["x", "X"]}, "makes a second node a.s=X, that differs from a.s=x in case alone"),
        ({"s": ["$b"]}, "matrix.s[0]: got the output of the step b, expected values"),
        ({"s": ["$nix"]}, "matrix.s[0]: got $nix, which is neither a variable nor a step"),
        ({"s": [{"a": 1}]}, "matrix.s[0]: got a mapping, expected text"),
        ({"s": "$empty"}, "matrix.s: is empty"),
        ({"s": list(range(40)), "t": list(range(40))}, "stands for 1,600 steps, expected at most 1,000 in a recipe"),
        ({"s": ["y" * 300]}, "makes a name of 304 characters"),
        ({"a b": [1]}, "got 'a b' as the name of a variable"),
    ],
)
def test_a_matrix_that_makes_no_steps_is_refused(read: Read, matrix: dict[str, Any], what: str) -> None:
    text = steps_of(
        {"a": {"run": "note", "matrix": matrix}, "b": note("$a", "$empty")},
        vars={"empty": None},
    )
    faults = faults_of(read, text)
    assert what in "\n".join(faults)
    assert len(faults) == 2  # the other one is $empty
    assert "$empty has no value" in faults[1]


def test_when_may_name_variables_of_the_matrix(read: Read) -> None:
    text = steps_of(
        {"a": note("$s", matrix={"s": [1, 2, 3]}, when={"s": [1, 3], "go": None}), "b": note("$a")}, vars={"go": None}
    )
    assert [node.name for node in read(text).nodes] == ["a.s=1", "a.s=3", "b"]
    assert "leaves out every" in only_fault(read, steps_of({"a": note("$s", matrix={"s": [1]}, when={"s": 2})}))


@pytest.mark.parametrize(
    ("when", "what"),
    [
        ({"got": 1}, "when.got: is no variable; did you mean go?"),
        ({"l": 1}, "when.l: got a list as the value of l, expected a single one"),
        ({"go": "$l"}, "when.go: got '$l', expected a value"),
        ({"go": [[1]]}, "when.go[0]: got a list, expected a value"),
        ({"go": {"a": 1}}, "when.go: got a mapping"),
    ],
)
def test_conditions_compare_variables_with_values(read: Read, when: dict[str, Any], what: str) -> None:
    text = steps_of({"a": note("x", when=when), "b": note("$a", "$go", "$l")}, vars={"go": 1, "l": [1]})
    assert what in only_fault(read, text)
