"""Options of steps: values of the right kind, and references to what other steps make."""

from __future__ import annotations

from typing import Any

import pytest
from support.recipe_texts import COMMANDS, Read, note, only_fault, steps_of

from surgery.errors import SurgeryError
from surgery.recipes.types import StepOutput


@pytest.mark.parametrize(
    ("command", "option", "written", "value"),
    [
        ("vector apply", "scale", "1e-3", 0.001),
        ("vector apply", "scale", 1, 1.0),
        ("vector apply", "scale", "-.5", -0.5),
        ("vector apply", "rescale", False, False),
        ("vector apply", "config", 5, "5"),
        ("vector apply", "scale-for", "a=1", ("a=1",)),
        ("vector apply", "scale-for", ["a=1", 0.5], ("a=1", "0.5")),
        ("vector apply", "scale-for", "$$x", ("$x",)),
        ("vector extract", "rank", "1e1", 10),
        ("vector extract", "rank", 8.0, 8),
        ("vector extract", "rank", 2**60 + 1, 2**60 + 1),
        ("vector extract", "dtype", "bfloat16", "bfloat16"),
    ],
)
def test_values_are_converted_to_what_the_option_takes(
    read: Read, command: str, option: str, written: object, value: object
) -> None:
    needed = {name: "m" for name, one in COMMANDS[command].parameters.items() if one.required}
    (node,) = read(steps_of({"a": {"run": command, "with": {**needed, option: written}}})).nodes
    assert node.given == {**needed, option: value}
    assert type(node.given[option]) is type(value)


@pytest.mark.parametrize(
    ("option", "written", "what"),
    [
        ("scale", "nan", "got 'nan', expected a number from -10 to 10"),
        ("scale", float("inf"), "got inf, expected a finite number"),
        ("scale", "1_0", "got '1_0', expected a number"),
        ("scale", 10.5, "got 10.5, expected a number from -10 to 10"),
        ("scale", True, "got true, expected a number"),
        ("scale", None, "got nothing, expected a number"),
        ("scale", "$l", "got a list ($l), expected a number"),
        ("scale", "$t/x", "got 'text/x' ($t), expected a number"),
        ("config", "$n/x", "got 3 ($n), expected a path before /x"),
        ("rescale", "yes", "got 'yes', expected true or false"),
        ("rescale", 1, "got 1, expected true or false"),
        ("config", "a\0b", "expected text without NUL"),
        ("config", "\ud800", "cannot be read as str"),
        ("config", "${HOME}", "got '${HOME}', expected $name or $name/inside/path"),
        ("config", "$t/../../etc", "expected a path that stays inside $t"),
        ("scale-for", [["a"]], "got a list, expected text"),
        ("json", True, "is not for a recipe to say: the run keeps what a step prints"),
        ("dry_run", True, "is not for a recipe to say"),
        ("--scale", 1, "is no option of `vector apply`; did you mean scale?"),
        ("scale_for", ["a=1"], "is no option of `vector apply`; did you mean scale-for?"),
    ],
)
def test_values_that_an_option_does_not_take_are_refused(read: Read, option: str, written: object, what: str) -> None:
    given = {"vector": "v", "target": "t", option: written}
    text = steps_of(
        {"a": {"run": "vector apply", "with": given}, "b": note("$l", "$t", "$n")},
        vars={"l": [1, 2], "t": "text", "n": 3},
    )
    fault = only_fault(read, text)
    assert what in fault
    assert fault.partition(" ")[2].startswith(f"recipes.r.steps.a.with.{option}")


def test_a_variable_without_a_value_is_asked_for_where_a_kept_step_uses_it(read: Read) -> None:
    def text(go: bool) -> str:
        return steps_of({"a": note("$v", when={"go": True}), "b": note("x")}, vars={"v": None, "go": go})

    fault = only_fault(read, text(True))
    assert fault.endswith("recipes.r.steps.a.with.of[0]: $v has no value; give it one: --set v=…")
    assert [node.name for node in read(text(False)).nodes] == ["b"]
    assert read(text(True), v="1").nodes[0].given == {"of": ("1",)}


def test_lists_are_put_into_lists(read: Read) -> None:
    (node,) = read(steps_of({"a": note("first", "$v", "$v/x")}, vars={"v": ["p", "q"]})).nodes
    assert node.given["of"] == ("first", "p", "q", "p/x", "q/x")


def test_references_between_matrices_agree_on_what_they_share(read: Read) -> None:
    text = steps_of(
        {
            "a": note("$s", "$t", matrix={"s": [1, "1e-3"], "t": ["x", "y"]}),
            "b": note("$a", matrix={"s": [0.001, 1]}),
            "c": note("$a", matrix={"s": [1], "t": ["y"], "u": [1, 2]}),
        }
    )
    given = {node.name: node.given["of"] for node in read(text).nodes if node.step != "a"}
    assert given == {
        "b.s=0.001": (StepOutput("a.s=1e-3.t=x"), StepOutput("a.s=1e-3.t=y")),
        "b.s=1": (StepOutput("a.s=1.t=x"), StepOutput("a.s=1.t=y")),
        "c.s=1.t=y.u=1": (StepOutput("a.s=1.t=y"),),
        "c.s=1.t=y.u=2": (StepOutput("a.s=1.t=y"),),
    }


def test_where_one_folder_is_wanted_a_matrix_must_agree(read: Read) -> None:
    def text(matrix: dict[str, Any]) -> str:
        apply = {"run": "vector apply", "with": {"vector": "$a/v", "target": "t"}, "matrix": matrix}
        return steps_of({"a": note("$s", matrix={"s": [1, 2]}), "b": apply})

    assert [node.given["vector"] for node in read(text({"s": [2, 1]})).nodes[2:]] == [
        StepOutput("a.s=2", "v"),
        StepOutput("a.s=1", "v"),
    ]
    assert "got $a, which is 2 folders (a.s=1, a.s=2), expected one" in only_fault(read, text({"x": [1]}))
    assert "got $a, of which there is none for s=3" in only_fault(read, text({"s": [1, 3]}))


def test_a_step_may_make_a_file_which_holds_nothing(read: Read) -> None:
    file = {"run": "list"}
    assert read(steps_of({"a": file, "b": note("$a")})).nodes[1].given == {"of": (StepOutput("a"),)}
    fault = only_fault(read, steps_of({"a": file, "b": note("$a/x")}))
    assert fault.endswith("with.of[0]: got $a, but `list` makes a file, and no folder")


def test_what_a_step_changes_may_be_the_output_of_another(read: Read) -> None:
    text = steps_of({"a": note(), "b": {"run": "probe heads", "with": {"from": "$a"}}, "c": note("$b/heads.json")})
    a, b, c = read(text).nodes
    assert (a.after, b.given, c.given) == ((), {"from": StepOutput("a")}, {"of": (StepOutput("b", "heads.json"),)})


def test_a_recipe_that_would_fill_the_memory_is_stopped(read: Read) -> None:
    text = steps_of({"a": {"run": "note", "matrix": {"s": list(range(400))}}, "b": note(*["$a"] * 1000)})
    with pytest.raises(
        SurgeryError, match=r"recipes\.r: stands for more than 200,000 values, once matrices are expanded"
    ):
        read(text)


def test_a_step_that_is_left_out_takes_nothing_with_it_unseen(read: Read) -> None:
    def text(wanted: object, user: dict[str, Any]) -> str:
        return steps_of({"a": note("x", when={"go": wanted}), "b": user}, vars={"go": 2})

    alone = {"run": "vector apply", "with": {"vector": "$a", "target": "t"}}
    assert "got $a, which `when` leaves out" in only_fault(read, text(1, alone))
    assert [node.name for node in read(text([1, 2.0], alone)).nodes] == ["a", "b"]
    assert [node.name for node in read(text("2", alone)).nodes] == ["a", "b"]
    assert "leaves out every step" in only_fault(read, text(1, {**alone, "when": {"go": 1}}))
    listed = {"run": "eval", "with": {"models": ["m", "$a"]}}
    assert read(text(1, listed)).nodes[0].given == {"models": ("m",)}
    assert "`when` leaves out every step in it" in only_fault(
        read, text(1, {"run": "eval", "with": {"models": ["$a"]}})
    )
    assert read(text(1, note("$a"))).nodes[0].given == {}


def test_steps_that_are_left_out_are_checked_all_the_same(read: Read) -> None:
    text = steps_of({"a": note("$b", "$nix", when={"go": 1}), "b": note("x")}, vars={"go": 2})
    assert "got $nix, which is neither" in only_fault(read, text)
