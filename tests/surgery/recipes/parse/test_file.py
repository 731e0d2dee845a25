"""Recipe files as they are built: names, keys, references, and what YAML reads otherwise than one means."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.io.yaml_models import n_bytes
from surgery.recipes.parse.file import Reference, escaped, meaning, read, recipes_in

TWO = """recipes:
  one:
    about: The first.
    needs: {disk: 10 MB, time: 3 minutes}
    steps: {a: {run: note}}
  two.b-c_d:
    steps: {a: {run: note, memory: 1.5 GB}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipes.yaml"


def faults_of(file: Path, text: str) -> list[str]:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SurgeryError) as caught:
        recipes_in(file)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{file}:", "").split("\n")


def test_recipes_are_listed_in_the_order_of_the_file(file: Path) -> None:
    file.write_text(TWO)
    assert recipes_in(file) == [
        ("one", "The first.", {"disk": "10 MB", "time": "3 minutes"}),
        ("two.b-c_d", "", {}),
    ]


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name(file: Path) -> None:
    file.write_text(TWO)
    with pytest.raises(SurgeryError, match=r"recipes\.yaml: holds no recipe 'onne'\. did you mean one\?"):
        read(file).recipe("onne")
    with pytest.raises(SurgeryError, match=r"holds no recipe 'xyz'\. It holds one, two\.b-c_d\."):
        read(file).recipe("xyz")


def test_every_fault_in_how_a_file_is_built_is_told_with_line_and_key(file: Path) -> None:
    text = """recipes:
  one:
    abuot: x
    needs: {gpus: none}
    vars: [a]
    steps:
      a: {runs: note}
      b: {run: note, memory: 2 gigs}
    push: {form: $a, to: $repo}
  .two: {steps: {}}
  three: {steps: {s/t: {run: note}, A: {run: note}, a: {run: note}}}
"""
    assert faults_of(file, text) == [
        "3: recipes.one.abuot: is not known here; did you mean about?",
        "4: recipes.one.needs.gpus: is not known here; did you mean gpu?",
        "5: recipes.one.vars: got a list, expected a mapping",
        "7: recipes.one.steps.a: run: is missing",
        "7: recipes.one.steps.a.runs: is not known here; did you mean run?",
        "8: recipes.one.steps.b.memory: got '2 gigs', expected a number of bytes, or such as 2 GB",
        "9: recipes.one.push: from: is missing",
        "9: recipes.one.push.form: is not known here; did you mean from?",
        "10: recipes..two.steps: holds no step",
        "10: recipes..two: got '.two' as the name of a recipe, expected letters, digits, `.`, `_` and `-`, the first a "
        "letter or digit",
    ]


@pytest.mark.parametrize("text", ["", "a: 1\n---\nb: 2\n", "# nothing\n"])
def test_a_file_is_one_document(file: Path, text: str) -> None:
    assert "expected one" in faults_of(file, text)[0]


def test_a_key_that_stands_twice_is_refused(file: Path) -> None:
    text = "recipes:\n  a: {steps: {s: {run: note}}}\n  a: {steps: {s: {run: eval}}}\n"
    assert faults_of(file, text) == ["3: recipes.a: stands here a second time; the first is in line 2"]


@pytest.mark.parametrize(("written", "number"), [("4:8", "248"), ("007", "7"), ("1:30.5", "90.5")])
def test_numbers_to_other_bases_are_told_from_texts(file: Path, written: str, number: str) -> None:
    text = f"recipes:\n  a:\n    steps:\n      s: {{run: note, with: {{of: [{written}]}}}}\n"
    assert faults_of(file, text) == [
        f"4: YAML reads {written} as the number {number}; put it in quotes if it is a text"
    ]
    file.write_text(text.replace(written, f'"{written}"'))
    assert len(recipes_in(file)) == 1


def test_anchors_and_merged_mappings_are_read(file: Path) -> None:
    file.write_text("""recipes:
  a:
    vars: &common {x: 1}
    steps: &steps {s: {run: note, with: {of: $x}}}
  b:
    vars: {<<: *common, y: 2}
    steps: *steps
""")
    assert [one.name for one in recipes_in(file)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("plain", "plain"),
        ("a$b", "a$b"),
        ("$name", Reference("name")),
        ("$scale-for.x_1", Reference("scale-for.x_1")),
        ("$run/ablations/heads.json", Reference("run", "ablations/heads.json")),
        ("$$name", "$name"),
        ("$$", "$"),
    ],
)
def test_what_texts_mean(text: str, meant: str | Reference) -> None:
    assert meaning(text) == meant


@pytest.mark.parametrize("text", ["$", "$ a", "${a}", "$(ls)", "$.a", "$a b", "$a\n"])
def test_other_texts_with_a_sign_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected \$name or"):
        meaning(text)


@pytest.mark.parametrize(
    "inside", ["..", "../x", "a/../../x", "a/..", ".", "", "/etc/passwd", "a//b", "a/", "a\\..\\b"]
)
def test_no_path_leaves_the_folder_it_begins_in(inside: str) -> None:
    with pytest.raises(ValueError, match="stays inside"):
        meaning(f"$step/{inside}")


@given(st.text())
def test_what_is_escaped_means_itself(text: str) -> None:
    assert meaning(escaped(text)) == text


def test_sizes_in_words() -> None:
    assert [n_bytes("2 GB"), n_bytes("1.5 kB"), n_bytes("3 TB")] == [2 * 10**9, 1500, 3 * 10**12]
    for text in ("2GB", "GB", "nan GB", "1 GiB", "inf MB"):
        with pytest.raises(ValueError, match="such as 2 GB"):
            n_bytes(text)
