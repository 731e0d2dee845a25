"""Recipes as programs: the order of nodes, pushes, texts that stand by themselves, and every fault at once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recipe_texts import COMMANDS, RECIPE, Read, faults_of, note, only_fault, read_text, steps_of

from surgery.errors import SurgeryError
from surgery.recipes.types import Pipeline, Push, StepOutput


def test_a_recipe_becomes_nodes_with_everything_filled_in(read: Read) -> None:
    found = read(RECIPE)
    assert [node.name for node in found.nodes] == ["vector", "moved.scale=0.5", "moved.scale=1.0", "scores"]
    vector, half, _, scores = found.nodes
    assert (vector.given, vector.after) == ({"tuned": "lab:grpo", "base": "lab:sft"}, ())
    assert (vector.memory, vector.line, vector.command) == (2 * 10**9, 11, COMMANDS["vector extract"])
    assert half.given == {"vector": StepOutput("vector"), "target": "lab:instruct", "scale": 0.5}
    assert (half.step, half.after) == ("moved", ("vector",))
    made = (StepOutput("moved.scale=0.5"), StepOutput("moved.scale=1.0"))
    assert scores.given == {"models": ("lab:instruct", *made), "task": ("lab_sums",), "limit": 200}
    assert scores.after == ("moved.scale=0.5", "moved.scale=1.0")
    assert (found.recipe, found.about, found.needs, found.pushes) == ("r", "One line.", {"disk": "10 MB"}, ())
    assert found.settings["repo"] is None


def test_settings_are_read_as_yaml(read: Read) -> None:
    found = read(RECIPE, task="[a, b]", measure="yes", repo="org/name", tuned="'$$5'", base="1e-3")
    assert found.settings == {
        "tuned": "$5",
        "base": "1e-3",
        "target": "lab:instruct",
        "task": ("a", "b"),
        "measure": True,
        "repo": "org/name",
    }
    assert found.nodes[-1].given["task"] == ("a", "b")
    assert found.pushes == (Push("vector", "org/name", "sub", private=True, is_allowed=True),)


def test_every_fault_is_told_at_once_with_line_key_and_nearest_name(read: Read) -> None:
    text = """recipes:
  r:
    needs: {gpus: none}
    vars: {tuned: lab:grpo, spare: 1, repo: org/name}
    steps:
      vector:
        run: vector extract
        with: {tuned: $tunde, base: 1, rank: 0, dtype: bflot16}
      moved:
        run: vector aply
        with: {vector: $vektor}
      other:
        run: vector apply
        with: {vector: $vector, skale: 3, no-rescale: true, out: x, scale: [1], config: {a: b}}
      third:
        run: vector apply
        with: {vector: $scores, target: on, scale: fast}
      scores:
        run: eval
        with: {models: [$tuned, 2024-01-01], limit: 1.5}
        when: {mesure: true}
      round: {run: note, with: {of: [$trip]}}
      trip: {run: note, with: {of: [$round]}}
    push: {from: $tuned, to: $repo, private: maybe}
"""
    told = """
--set tuend: is no variable of this recipe; did you mean tuned?
3: recipes.r.needs.gpus: is not known here; did you mean gpu?
4: recipes.r.vars.spare: is used nowhere in this recipe
8: recipes.r.steps.vector.with.tuned: got $tunde, which is neither a variable nor a step; did you mean $tuned?
8: recipes.r.steps.vector.with.rank: got 0, expected a whole number from 1 on
8: recipes.r.steps.vector.with.dtype: got 'bflot16', expected float32 or bfloat16; did you mean bfloat16?
10: recipes.r.steps.moved.run: got 'vector aply', expected a command; did you mean vector apply?
11: recipes.r.steps.moved.with.vector: got $vektor, which is neither a variable nor a step; did you mean $vector?
12: recipes.r.steps.other.with.target: is missing, and `vector apply` needs it: text
14: recipes.r.steps.other.with.skale: is no option of `vector apply`; did you mean scale?
14: recipes.r.steps.other.with.no-rescale: is no option of `vector apply`; write rescale: false
14: recipes.r.steps.other.with.out: is not for a recipe to say: the run says where a step writes: \
steps/STEP/out in its folder
14: recipes.r.steps.other.with.scale: got a list, expected a number from -10 to 10
14: recipes.r.steps.other.with.config: got a mapping, expected a path
17: recipes.r.steps.third.with.vector: got $scores, but `eval` only prints, and makes no folder
17: recipes.r.steps.third.with.target: got true, expected text; YAML takes on, yes and true for the same: put a \
text in quotes
17: recipes.r.steps.third.with.scale: got 'fast', expected a number from -10 to 10
20: recipes.r.steps.scores.with.models[1]: got 2024-01-01 (date, without quotes), expected text, a number, true \
or false
20: recipes.r.steps.scores.with.limit: got 1.5, expected a whole number from 1 on
21: recipes.r.steps.scores.when.mesure: is no variable; there are tuned, spare, repo
22: recipes.r.steps.round: needs itself: round needs trip needs round
24: recipes.r.push.private: got 'maybe', expected true or false
24: recipes.r.push.from: got 'lab:grpo', expected the output of a step: $STEP
"""
    assert faults_of(read, text, tuend="x") == told.strip().split("\n")


BASE = steps_of(
    {
        "a": {"run": "vector extract", "with": {"tuned": "$x", "base": "y", "rank": 4}},
        "b": {"run": "vector apply", "with": {"vector": "$a", "target": "$x", "scale": "$s", "rescale": True}},
        "c": {"run": "eval", "with": {"models": ["$b"]}, "when": {"go": True}},
        "d": {"run": "probe heads", "with": {"from": "$a/in"}},
    },
    vars={"x": "lab:x", "s": 1, "go": True},
)


FAULTS = {
    "tuned: $x": "tuned: $xx",
    "base: y": "bsae: y",
    "rank: 4": "rank: four",
    "vector: $a": "vector: $a/../y",
    "scale: $s": "scale: 1e2",
    "rescale: true": "rescale: $a",
    "run: eval": "run: evil",
    "go: true\n      d": "og: true\n      d",
    "from: $a/in": "from: $a/in/",
    "x: lab:x": "x: {}",
}


@settings(deadline=None, max_examples=50)
@given(st.sets(st.sampled_from(sorted(FAULTS)), min_size=1))
def test_each_fault_of_many_is_told_with_its_line(folder: Path, chosen: set[str]) -> None:
    """Faults put into lines of a recipe that has none are all told, where they stand."""
    text = BASE
    for old in chosen:
        assert BASE.count(old) == 1
        text = text.replace(old, FAULTS[old])
    changed = {i for i, (a, b) in enumerate(zip(BASE.split("\n"), text.split("\n"), strict=True), start=1) if a != b}
    told = faults_of(lambda given: read_text(folder, given), text)
    lines = {int(line.partition(":")[0]) for line in told}
    assert changed <= lines
    # Beside them stand only what follows: an option that is missing now, and variables that nothing names any more.
    rest = [line for line in told if int(line.partition(":")[0]) not in changed]
    assert all("is missing" in line or "is used nowhere" in line for line in rest)


graphs = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.permutations(range(n)),
        st.lists(st.sets(st.integers(0, n - 1)), min_size=n, max_size=n),
    )
)


def _steps(order: list[int], needs: list[set[int]]) -> str:
    return steps_of({f"s{i}": note(*(f"$s{need}" for need in sorted(needs[i]))) for i in order})


@settings(deadline=None, max_examples=50)
@given(graphs)
def test_nodes_come_after_those_they_need(folder: Path, graph: tuple[list[int], list[set[int]]]) -> None:
    order, edges = graph
    needs = [{need for need in found if need < i} for i, found in enumerate(edges)]
    nodes = read_text(folder, _steps(order, needs)).nodes
    assert {node.name: set(node.after) for node in nodes} == {
        f"s{i}": {f"s{need}" for need in needs[i]} for i in range(len(needs))
    }
    place = {node.name: index for index, node in enumerate(nodes)}
    assert all(place[need] < place[node.name] for node in nodes for need in node.after)
    # Where the file's own order is right, it stays.
    file_order = [f"s{i}" for i in order]
    if all(file_order.index(f"s{need}") < file_order.index(f"s{i}") for i in order for need in needs[i]):
        assert [node.name for node in nodes] == file_order


@settings(deadline=None, max_examples=50)
@given(graphs)
def test_circles_are_found_where_there_are_any(folder: Path, graph: tuple[list[int], list[set[int]]]) -> None:
    order, needs = graph
    reached = [set(found) for found in needs]
    for middle, i in itertools.product(range(len(needs)), repeat=2):
        if middle in reached[i]:
            reached[i] |= reached[middle]
    if not any(i in found for i, found in enumerate(reached)):
        assert len(read_text(folder, _steps(order, needs)).nodes) == len(needs)
        return
    for fault in faults_of(lambda text: read_text(folder, text), _steps(order, needs)):
        names = fault.partition("needs itself: ")[2].split(" needs ")
        assert names[0] == names[-1]
        assert all(int(b[1:]) in needs[int(a[1:])] for a, b in itertools.pairwise(names))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.sampled_from(["1e-3", "$x", "$$", "yes", "null", "~", "4:8", "007", "2024-01-01", "- a", "", " ", "\x85"]),
)


junk = st.recursive(
    st.one_of(scalars, st.none(), st.dates(), st.sampled_from(["$a", "$b/x", "$s", "$x", "vector apply"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_file_that_is_anything_is_a_program_or_refused_with_a_reason(folder: Path, data: st.DataObject) -> None:
    """Something in a good recipe is replaced by something else: what is told is always told as ours."""
    root = {"recipes": yaml.safe_load(RECIPE)["recipes"]}
    root["recipes"]["r"]["steps"] |= yaml.safe_load(BASE)["recipes"]["r"]["steps"]
    place: Any = root
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(junk)
    try:
        found = read_text(folder, yaml.safe_dump(root, allow_unicode=True))
    except SurgeryError as error:
        assert error.exit_code == 2
    else:
        names = [node.name for node in found.nodes]
        assert all(need in names[:index] for index, node in enumerate(found.nodes) for need in node.after)


def test_a_step_that_needs_its_own_folder_is_a_circle(read: Read) -> None:
    assert only_fault(read, steps_of({"a": note("$a")})).endswith("recipes.r.steps.a: needs itself: a needs a")


def test_pushes_are_done_where_they_have_a_place_to_go_to(read: Read) -> None:
    text = steps_of(
        {"a": note(), "b": note("$s", matrix={"s": [1]})},
        vars={"repo": None, "branch": "x"},
        push=[
            {"from": "$a", "to": "$repo", "message": "Hello", "revision": "$branch"},
            {"from": "$b/in", "to": "org/b", "pr": True},
            {"from": "$a", "to": None},
        ],
    )
    second = Push("b.s=1", "org/b", "in", pr=True)
    assert read(text).pushes == (second,)
    assert read(text, repo="org/a").pushes == (
        Push("a", "org/a", revision="x", message="Hello", is_allowed=True),
        second,
    )


@pytest.mark.parametrize(
    ("push", "what"),
    [
        ({"from": "$only", "to": "o/n"}, "push.from: got $only, but `eval` only prints"),
        ({"from": "$file", "to": "o/n"}, "push.from: got $file, but `list` makes a file, and no folder"),
        ({"from": "$two", "to": "o/n"}, "push.from: got $two, which is 2 folders"),
        ({"from": "$out", "to": "o/n"}, "push.from: got $out, which `when` leaves out"),
        ({"from": "a", "to": "o/n"}, "push.from: got 'a', expected the output of a step"),
        ({"from": ["$a"], "to": "o/n"}, "push.from: got a list"),
        ({"from": "$nix", "to": None}, "push.from: got $nix, which is neither"),
        ({"from": "$a", "to": "nowhere"}, "push.to: Hub id: got 'nowhere', expected org/name"),
        ({"from": "$a", "to": "$a"}, "push.to: got the folder of a step ($a), expected text"),
        ({"from": "$a", "to": "o/n", "pr": "maybe"}, "push.pr: got 'maybe', expected true or false"),
        ({"from": "$a", "to": "o/n", "pr": True, "revision": "x"}, "push.to: o/n: --pr opens a pull request"),
        ([{"from": "$a", "to": "o/n"}, {"from": "$a", "to": "o/n"}], "push[1]: goes to o/n too"),
    ],
)
def test_pushes_that_cannot_be_are_refused_before_anything_runs(read: Read, push: object, what: str) -> None:
    steps = {
        "a": note(),
        "only": {"run": "eval", "with": {"models": "$a"}},
        "file": {"run": "list"},
        "two": note("$s", matrix={"s": [1, 2]}),
        "out": note(when={"go": 2}),
    }
    assert what in only_fault(read, steps_of(steps, vars={"go": 1}, push=push))


def test_the_text_of_a_program_is_the_recipe_with_its_values(read: Read) -> None:
    found = read(RECIPE + "  other: {steps: {a: {run: note}}}\n", task="[a, b]", repo="org/name")
    assert yaml.safe_load(found.text)["recipes"].keys() == {"r"}
    assert "    vars:\n      tuned: lab:grpo\n" in found.text
    assert "      task:\n      - a\n      - b\n" in found.text
    assert "    needs:\n      disk: 10 MB\n" in found.text


def test_a_recipe_from_anchors_stands_by_itself(read: Read) -> None:
    text = """recipes:
  first: {vars: &vars {x: 1, y: [1, 2]}, steps: {s: {run: note, with: {of: [$x, $y]}}}}
  r:
    vars: {<<: *vars, z: 3}
    steps: {a: &a {run: note, with: {of: [$x, $y, $z]}}, b: *a}
"""
    found = read(text)
    assert "&" not in found.text and "*" not in found.text
    assert [node.given["of"] for node in found.nodes] == [("1", "1", "2", "3")] * 2


@settings(deadline=None, max_examples=50)
@given(scalars, st.lists(scalars.filter(lambda value: not isinstance(value, bool)), max_size=3))
def test_the_program_of_a_programs_text_is_the_same(folder: Path, value: Any, values: list[Any]) -> None:
    plain = yaml.safe_load(RECIPE)
    recipe = plain["recipes"]["r"]
    recipe["vars"] |= {"repo": "org/name", "v": escaped_value(value), "w": [escaped_value(one) for one in values]}
    recipe["steps"] |= {"one": note("x", when={"v": [escaped_value(value), None]}), "many": note("$w")}
    first = read_text(folder, yaml.safe_dump(plain, sort_keys=False))
    assert first.settings["v"] == value
    assert first.settings["w"] == tuple(values)
    assert {"one", "many"} <= {node.step for node in first.nodes}
    again = read_text(folder, first.text)
    assert again.text == first.text
    assert _without_lines(again) == _without_lines(first)


def escaped_value(value: Any) -> Any:
    return f"${value}" if isinstance(value, str) and value.startswith("$") else value


def _without_lines(found: Pipeline) -> Pipeline:
    return replace(found, nodes=tuple(replace(node, line=None) for node in found.nodes))


def test_an_empty_command_is_told_and_not_left_to_the_graph(read: Read) -> None:
    assert "got '', expected a command" in note_of_fault(read, RECIPE.replace("run: vector extract", "run: ''"))


def note_of_fault(read: Read, text: str) -> str:
    with pytest.raises(SurgeryError) as caught:
        read(text)
    return str(caught.value)
