"""YAML is read as PyYAML reads it, and every value knows its line and path."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.io.yaml_nodes import MAX_NODES, YamlNode, plain_scalars, read_documents, to_node

TEXT = """\
# a comment first
base: &shared
  weight: 0.5
  density: [1, 0.7]
models:
  - name: a
    <<: *shared
  - name: b
    <<: [{weight: 2}, *shared]
    density: yes
"""


def read(text: str) -> YamlNode:
    (node,), faults = read_documents(text, "c.yml")
    faults.raise_if_any()
    return node


def failure(text: str) -> str:
    with pytest.raises(SurgeryError) as caught:
        read_documents(text, "c.yml")[1].raise_if_any()
    assert caught.value.exit_code == WRONG_USAGE
    return str(caught.value)


def places(node: YamlNode) -> dict[str, int | None]:
    found = {node.path: node.line}
    children = node.value.values() if isinstance(node.value, dict) else node.value
    if isinstance(children, str) or not hasattr(children, "__iter__"):
        return found
    for child in children:
        found |= places(child)
    return found


def test_values_are_those_of_the_safe_loader() -> None:
    assert read(TEXT).plain == yaml.safe_load(TEXT)


def test_every_value_knows_its_line_and_path() -> None:
    found = places(read(TEXT))
    assert found["base"] == 2
    assert found["base.density[1]"] == 4
    assert found["models[1].name"] == 8
    assert found["models[1].density"] == 10
    # What an anchor brings in is found in the anchor: there it must be mended.
    assert found["models[0].weight"] == 3
    assert found["models[1].weight"] == 9


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=6), VALUES, min_size=1, max_size=5), st.booleans())
def test_any_text_is_read_as_the_safe_loader_reads_it(value: dict[str, object], flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow)
    assert read(text).plain == yaml.safe_load(text) == to_node(value).plain


def test_documents_that_are_empty_are_left_out() -> None:
    nodes, faults = read_documents("---\n# nothing\n---\na: 1\n---\n---\nb: 2\n...\n", "c.yml")
    assert [(node.plain, node.line) for node in nodes] == [({"a": 1}, 4), ({"b": 2}, 7)]
    assert faults.n_documents == 2


def test_all_faults_are_named_with_lines_and_documents() -> None:
    text = (
        "a: 1\nb: {c: 1, c: 2}\na: 3\n---\n7: x\n? [q]\n: y\nd: 2001-99-99\ne: !!python/name:os.system\nf: !mine {}\n"
    )
    assert failure(text).splitlines() == [
        "c.yml:2: document 1: b.c: stands here a second time; the first is in line 2",
        "c.yml:3: document 1: a: stands here a second time; the first is in line 1",
        "c.yml:5: document 2: the key 7 is not text",
        "c.yml:6: document 2: the key […] is not text",
        'c.yml:8: document 2: d: cannot be read as timestamp: "2001-99-99"',
        'c.yml:9: document 2: e: cannot be read as python/name:os.system: ""',
        "c.yml:10: document 2: f: has the tag !mine, which means nothing here",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", "c.yml:2: is not YAML: while parsing a flow sequence, expected ',' or ']', but got ':'."),
        ("a: \t- 1\n  b", "c.yml:1: is not YAML:"),
        ("a: *nowhere\n", "c.yml:1: is not YAML: found undefined alias 'nowhere'."),
        ("a: \x00\n", "c.yml: is not YAML: unacceptable character #x0000"),
        ("a: &x [*x]\n", "c.yml:1: a[0]: contains itself"),
        ("a: {<<: 3}\n", "c.yml:1: a: << takes a mapping, or a list of them"),
        (f"a: {2**64}\n", "c.yml:1: a: is a whole number of more than 64 bits"),
        (f"a: 0x{'f' * 9999}\n", "c.yml:1: a: is a whole number of more than 64 bits"),
        (f"a: {'9' * 9999}\n", 'c.yml:1: a: cannot be read as int: "9'),
        ('a: "\\ud83d"\n', "c.yml:1: a: cannot be read as str"),
        ('"\\ude00": 1\n', "c.yml:1: cannot be read as str"),
        (f"a:\n  {'[' * 60}{']' * 60}", "c.yml:2: is nested too deeply"),
        ("[" * 5000, "c.yml:1: is nested too deeply"),
    ],
)
def test_what_is_no_config_is_said_in_one_line(text: str, message: str) -> None:
    assert failure(text).startswith(message)


def test_aliases_that_multiply_are_stopped() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    expected = f"c.yml: holds more than {MAX_NODES} values, aliases counted each time"
    assert failure("\n".join(lines)) == expected


def test_surrogate_pairs_as_json_escapes_them_are_characters() -> None:
    ((root,), _) = read_documents('{"\\ud83d\\ude00": "\\ud83d\\ude00é"}', "c.yml")
    assert root.plain == {"😀": "😀é"}


def test_keys_that_hold_anchors_for_others_are_known() -> None:
    text = """\
scalar: &s 1
nested: {deep: [0, {deeper: &d x}]}
merged: &m {a: 2}
only_inside: {a: &z 1, b: *z}
unused: &u 3
chain: &c {<<: *m}
user: [*s, *d, *c]
alias_of_a_whole_key: *s
"""
    (document,), errors = read_documents(text, "c.yml")
    holders = {key for key, child in document.children.items() if child.holds_anchor}
    assert holders == {"scalar", "nested", "merged", "chain"} and not errors.found
    (document,), errors = read_documents("endless: &e [*e]\nother: &o {again: *o}\n", "c.yml")
    assert not any(child.holds_anchor for child in document.children.values())
    assert [error.what for error in errors.found] == ["contains itself"] * 2


@pytest.mark.parametrize(
    "kind", ["timestamp", "bool", "int", "float", "binary", "null", "str", "set", "omap", "python/x"]
)
@pytest.mark.parametrize("text", ["noon", '""', "maybe", "0x", "-", "1:2:x", "é"])
def test_a_text_that_is_not_what_its_tag_says_is_refused_or_read(kind: str, text: str) -> None:
    for document in (f"a: !!{kind} {text}", f"!!{kind} {text}: 1", f"[!!{kind} {text}]"):
        try:
            read(document)
        except SurgeryError as error:
            assert "c.yml" in str(error)


def test_bytes_are_refused() -> None:
    with pytest.raises(SurgeryError, match="is binary, which means nothing here"):
        read("run: !!binary aGk=")


def test_scalars_without_quotes_are_found_wherever_the_text_can_be_read() -> None:
    text = 'a: 010\nb: "011"\nc: [012, x]\n'
    assert [(line, scalar) for line, scalar in plain_scalars(text) if scalar[0] == "0"] == [(1, "010"), (3, "012")]
    # A mark of the byte order inside of a text is white space to libyaml and a character to PyYAML's own parser.
    marked = "a: 010\n\ufeff\n"
    read_documents(marked, "c.yml")
    assert (1, "010") in list(plain_scalars(marked))
