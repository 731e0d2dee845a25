"""Promises of data.read and probes.data.sources: what counts as data, and what is said about data that does not."""

from __future__ import annotations

import builtins
import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.data.reader import read_data
from surgery import lab
from surgery.errors import WRONG_USAGE, SurgeryError


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def failure(source, **asked):
    with pytest.raises(SurgeryError) as caught:
        read_data(source, **asked)
    assert caught.value.exit_code == WRONG_USAGE
    return str(caught.value)


FULL = {"prompt": "How?", "thinking": "Hm.", "closing": "\n</t>\n", "response": "So.", "label": "harmful/complied"}


def test_a_row_says_what_is_known_and_nothing_else(tmp_path):
    data = read_data(jsonl(tmp_path / "d.jsonl", {**FULL, "source": "me"}, {"prompt": "Why?"}))
    full, bare = data.examples
    assert (full.key, full.prompt, full.thinking, full.closing, full.response) == (
        "0",
        "How?",
        "Hm.",
        "\n</t>\n",
        "So.",
    )
    assert (full.topic, full.refused, full.cell, full.group) == ("harmful", False, "harmful/complied", "How?")
    assert full.row == {**FULL, "source": "me"}
    assert (bare.key, bare.thinking, bare.closing, bare.response, bare.cell) == (
        "1",
        None,
        None,
        None,
        "unknown/unknown",
    )
    assert data.revision is None and data.ref.endswith("d.jsonl")


def test_every_format_gives_the_same_examples(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [FULL, {**dict.fromkeys(FULL), "prompt": "Why,\nthen? \u2028 “Ä”", "group": "g"}]
    lines = [{name: value for name, value in row.items() if value is not None} for row in rows]
    sources = [jsonl(tmp_path / "d.jsonl", *lines), str(tmp_path / "d.json"), str(tmp_path / "d.csv")]
    (tmp_path / "d.json").write_text(json.dumps(lines))
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [*FULL, "group"])
        writer.writeheader()
        writer.writerows(rows)
    write_table(Table.from_pylist([{"group": None, **row} for row in rows]), tmp_path / "d.parquet")
    sources.append(str(tmp_path / "d.parquet"))
    found = [read_data(source).examples for source in sources]
    parts = [[(e.key, e.messages, e.thinking, e.closing, e.response, e.cell, e.group) for e in each] for each in found]
    assert parts[0] == parts[1] == parts[2] == parts[3]


def test_a_text_file_is_a_prompt_per_line(tmp_path):
    (tmp_path / "d.txt").write_bytes("One\r\n\n  Two \u2028 still\n".encode())
    assert [(e.key, e.prompt) for e in read_data(str(tmp_path / "d.txt")).examples] == [
        ("0", "One"),
        ("1", "  Two \u2028 still"),
    ]


def test_the_last_answer_of_a_conversation_is_the_response_and_its_reasoning_the_thinking(tmp_path):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How?"},
    ]
    answer = {"role": "assistant", "content": "<think>x</think>So.", "reasoning_content": "Hm."}
    open_, closed = read_data(jsonl(tmp_path / "d.jsonl", {"messages": turns}, {"messages": [*turns, answer]})).examples
    assert (open_.prompt, len(open_.messages), open_.response, open_.thinking) == ("How?", 4, None, None)
    assert open_.messages[1] == {"role": "user", "content": "Hi"}
    assert closed.messages == open_.messages and closed.group == "How?"
    # Markers are the model's: the response is not cut here.
    assert (closed.response, closed.thinking) == ("<think>x</think>So.", "Hm.")


def test_messages_in_csv_are_json_and_cells_may_be_longer_than_the_module_allows(tmp_path):
    thinking = "a" * 200_000
    messages = json.dumps([{"role": "user", "content": "How?"}])
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "thinking"], [messages, thinking]])
    before = csv.field_size_limit()
    [example] = read_data(str(tmp_path / "d.csv")).examples
    assert (example.prompt, example.thinking) == ("How?", thinking)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("label", "cell"),
    [
        ("harmful", "harmful/unknown"),
        ("Unsafe", "harmful/unknown"),
        ("benign", "harmless/unknown"),
        ("refusal", "unknown/refused"),
        ("complied", "unknown/complied"),
        ("compliance", "unknown/complied"),
        ("harmful/refused", "harmful/refused"),
        (" complied / safe ", "harmless/complied"),
        ("", "unknown/unknown"),
        (None, "unknown/unknown"),
    ],
)
def test_a_label_is_a_topic_a_verdict_or_both(tmp_path, label, cell):
    assert read_data(jsonl(tmp_path / "d.jsonl", {"prompt": "p", "label": label})).examples[0].cell == cell


@pytest.mark.parametrize(
    "label", ["true", True, 1, "0", "yes", "jailbreak", "harmful/safe", "refused/complied", "harmful/refused/x", "/"]
)
def test_a_label_that_says_neither_is_an_error_that_lists_what_does(tmp_path, label):
    said = failure(jsonl(tmp_path / "d.jsonl", {"prompt": "p", "label": label}))
    assert f"d.jsonl:1: label is {label!r}, expected a topic (harmful, " in said
    assert "a verdict (refused, " in said and said.endswith("or both as harmful/refused")


def test_the_key_is_the_row_and_the_digest_the_rows(tmp_path):
    rows = [{"prompt": f"p{i}", "group": i % 2} for i in range(5)]
    whole = read_data(jsonl(tmp_path / "d.jsonl", *rows))
    assert [e.key for e in whole.examples] == ["0", "1", "2", "3", "4"]
    assert [e.group for e in whole.examples] == ["0", "1", "0", "1", "0"]
    part = read_data(str(tmp_path / "d.jsonl"), limit=2)
    assert [e.key for e in part.examples] == ["0", "1"]
    (tmp_path / "e.json").write_text(json.dumps(rows[:2], indent=3))
    assert part.digest == read_data(str(tmp_path / "e.json")).digest != whole.digest


def test_all_faults_of_a_file_are_reported_with_their_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        '{"prompt": "fine"}',
        "",
        '{"thinking": "x"}',
        '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
        '{"prompt": "  "}',
        '{"prompt": 3}',
        '{"prompt": "p", "response": ["x"]}',
        "{",
        "[1]",
        '{"prompt": "p", "response": ""}',
        '{"prompt": "p", "thinking": "\\ud800"}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": [1]}, {"role": "you", "content": ""}]}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], "response": "y"}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "x"}]}',
    ]
    path.write_text("\n".join(rows))
    lines = failure(str(path)).split("\n  ")
    expected = [
        (8, "is not valid JSON"),
        (9, "holds a list, expected an object"),
        (3, "has neither prompt nor messages"),
        (4, "has both prompt and messages"),
        (5, "has an empty prompt"),
        (6, "prompt is 3, expected text"),
        (7, "response is ['x'], expected text"),
        (10, "has an empty response: leave it out"),
        (11, "thinking holds half of a surrogate pair"),
        (12, "messages are [], expected a list of {role, content}"),
        (13, "messages[0].content is [1], expected text"),
        (13, "messages[1].role is 'you', expected one of system"),
        (14, "messages do not end with a user's message"),
        (15, "has both response and the content of a last"),
        (16, "messages do not end with a user's message"),
    ]
    assert len(lines) == len(expected)
    for line, (number, what) in zip(lines, expected, strict=True):
        assert line.startswith(f"{path}:{number}: ") and what in line


def test_many_faults_are_cut_at_twenty(tmp_path):
    said = failure(jsonl(tmp_path / "d.jsonl", *[{"prompt": ""}] * 23)).split("\n  ")
    assert len(said) == 21 and said[-1] == "… and 3 more."


def test_a_thinking_that_never_closed_may_have_an_empty_response(tmp_path):
    row = {"prompt": "p", "thinking": "Hm", "closing": "", "response": ""}
    [example] = read_data(jsonl(tmp_path / "d.jsonl", row)).examples
    assert (example.thinking, example.closing, example.response) == ("Hm", "", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "d.jsonl: has no rows"),
        ("d.csv", b"prompt\n", "d.csv: has no rows"),
        ("d.txt", b"\n \n", "d.txt: has no rows"),
        ("d.json", b"{}", "d.json: holds an object, expected a list of objects"),
        ("d.json", b'{"a": 1}\n{"a": 1}', "One object per line is a .jsonl file: rename it."),
        ("d.jsonl", b'{"prompt": "\xff"}', "d.jsonl: is not UTF-8 (byte 12). Convert it first."),
        ("d.parquet", b"PAR1 no", "d.parquet: cannot be read as Parquet ("),
        ("d.csv", b'prompt\n"a', "is not valid CSV (unexpected end of data)"),
        ("d.csv", b"prompt\na,b\n", "d.csv:2: has more cells than the header has names"),
        ("d.xlsx", b"x", "d.xlsx: is no .jsonl, .json, .csv, .parquet, .txt file"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    said = failure(str(tmp_path / name))
    assert message in said and "\n" not in said


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no such file, and not a Hub data set (org/name[/config][@revision]:split[a:b])"),
        ("org/name.jsonl", "org/name.jsonl: no such file"),
        ("org/name", "names no split. Give it as org/name[/config][@revision]:split[a:b], e.g. org/name:train"),
        ("org/name:train[-5:]", "Slices count rows from 0"),
        ("org/name:train[:10%]", "no such file"),
        ("", '"": no such file'),
    ],
)
def test_a_reference_that_leads_nowhere_gets_one_line(source, message):
    said = failure(source)
    assert message in said and "\n" not in said


def test_a_folder_and_a_limit_of_none_are_wrong_usage(tmp_path):
    assert "is a folder, expected a file" in failure(str(tmp_path))
    assert "limit: got 0, expected 1 or more" in failure(jsonl(tmp_path / "d.jsonl", {"prompt": "p"}), limit=0)


def test_the_lab_has_data_of_its_own(tmp_path, monkeypatch):
    asked = []

    def data_of(ref):
        asked.append(ref)
        return tmp_path / "d.jsonl"

    monkeypatch.setattr(lab, "data_of", data_of)
    jsonl(tmp_path / "d.jsonl", {"prompt": "bomb"})
    assert read_data("lab:cliff").ref == "lab:cliff"
    assert read_data("lab:cliff/pool").examples[0].prompt == "bomb"
    assert asked == ["lab:cliff", "lab:cliff/pool"]


@pytest.mark.parametrize("source", ["d.parquet", "org/name:train"])
def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch, source):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.parquet").write_bytes(b"")
    said = failure(source)
    assert said == f"{source}: needs the extra `data`. Install it: pip install 'model-surgery[data]'"


@given(st.lists(st.text().filter(lambda text: text.strip()), min_size=1, max_size=5))
def test_any_text_comes_back_from_a_file_as_it_was_written(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    assert [e.prompt for e in read_data(jsonl(path, *[{"prompt": p} for p in prompts])).examples] == prompts


@pytest.fixture
def hub(data_server, tmp_path):
    folder = tmp_path / "lab-data"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *[{"prompt": f"p{i}", "label": "harmful"} for i in range(6)])
    jsonl(folder / "test.jsonl", {"prompt": "t"})
    (folder / "README.md").write_text("# data\n")
    data_server.add("datasets/lab/data", folder)
    return data_server


def test_a_hub_data_set_is_read_at_one_commit(hub, tmp_path):
    first = hub.repos["datasets/lab/data"].revisions["main"]
    data = read_data("lab/data:train[2:5]")
    assert [(e.key, e.prompt, e.topic) for e in data.examples] == [
        ("2", "p2", "harmful"),
        ("3", "p3", "harmful"),
        ("4", "p4", "harmful"),
    ]
    assert data.revision == first
    # All that was fetched is of that commit, the probing of names by the library apart.
    fetched = [request.path for request in hub.asked(".jsonl", method="GET")]
    assert fetched and all(f"/resolve/{first}/" in path for path in fetched)
    jsonl(tmp_path / "lab-data" / "train.jsonl", {"prompt": "new"})
    hub.add("datasets/lab/data", tmp_path / "lab-data")
    assert [e.prompt for e in read_data(f"lab/data@{first}:train[4:]", limit=1).examples] == ["p4"]
    assert [e.prompt for e in read_data("lab/data:train").examples] == ["new"]
    assert [e.prompt for e in read_data("lab/data@main:test[:7]").examples] == ["t"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("lab/data:train[9:12]", "lab/data:train[9:12]: the slice is empty: the split has 6 rows"),
        ("lab/data:train[3:3]", "the slice is empty"),
        ("lab/data:valid", "cannot be loaded (Unknown split \"valid\". Should be one of ['train', 'test'])"),
        ("lab/other:train", "lab/other:train: no such data set on the Hub, or it is private and needs a token."),
        ("lab/data@v9:train", "lab/data@v9:train: has no revision 'v9'"),
        ("lab/data/big:train", "lab/data/big:train: cannot be loaded (BuilderConfig 'big' not found."),
    ],
)
def test_what_the_hub_lacks_is_named(hub, source, message):
    said = failure(source)
    assert message in said and "\n" not in said
