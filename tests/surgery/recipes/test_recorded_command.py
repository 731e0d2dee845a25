"""Commands of hostile manifests: what is in them stays the value of a parameter, or is refused; and nothing is written
outside of the scratch folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from support.architectures import add_tokenizer, build, sibling
from support.audit import tree, watch_files
from support.cli import commands_in
from support.hub_server import HubServer

from cli.commands.reproduce import reproduce
from cli.commands.run import commands
from cli.main import app
from surgery.errors import SurgeryError
from surgery.growth.plan import GrowthPlan
from surgery.io.yaml_models import parse_model
from surgery.recipes.recorded_command import REPRODUCIBLE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    base = add_tokenizer(build("llama", folder / "base"))
    sibling(base, folder / "a", seed=1)
    return folder


def hostile(folder: Path, command: object, **more: Any) -> str:
    """A folder with a stranger's manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x": {"dtype": "F32", "shape": [1], "xxh3": "0"}}
    manifest = {"schema": 1, "kind": "model", "tensors": tensors, "command": command, **more}
    (folder / "surgery.json").write_text(json.dumps(manifest))
    return str(folder)


def words_of(ref: str, scratch: Path) -> list[list[str]]:
    """The commands that would be run for the manifest in `ref`; each fails, so that only the first is asked for."""
    asked: list[list[str]] = []

    def run(words: Any) -> int:
        asked.append(
            [str(word).replace(str(Path(words[words.index("--out") + 1]).parent), "SCRATCH") for word in words]
        )
        return 7

    with pytest.raises(SurgeryError, match="exit code 7"):
        reproduce(ref, run=run, scratch=scratch)
    return asked


@pytest.fixture
def at(bench: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(bench)
    return bench


LINES = [
    # Options that write, in every form that a command line knows.
    "surgery vector extract a base -o OUT -o /nowhere/x",
    "surgery vector extract a base -o OUT --out /nowhere/x",
    "surgery vector extract a base -o OUT --out=/nowhere/x",
    "surgery vector extract a base -o/nowhere/x -o OUT",
    "surgery vector extract a base -o /nowhere/x",
    "surgery vector extract a base --out=../OUT",
    "surgery merge linear a base -o OUT --plot=/nowhere/x",
    "surgery merge linear a base -o OUT --plot /nowhere/x",
    "surgery merge linear a base -o OUT --overwrite",
    "surgery merge linear a base -o OUT --json",
    "surgery merge linear a base -o OUT --help",
    "surgery merge linear a base -o OUT --debug",
    "surgery merge linear a base -o OUT --config=/etc/passwd",
    # Arguments that begin with a dash are options to the command line, and unknown ones here.
    "surgery vector extract --plot=/nowhere/x base -o OUT",
    "surgery vector extract -x base -o OUT",
    # Wrong counts and values.
    "surgery vector extract a -o OUT",
    "surgery vector extract a base base -o OUT",
    "surgery vector extract a base -o",
    "surgery vector extract a base -o OUT --rank",
    "surgery vector extract a base -o OUT --rank 1.5",
    "surgery vector extract a base -o OUT --rank=-1",
    "surgery vector extract a base -o OUT --rank 1 --rank 2",
    "surgery vector extract a base -o OUT --dtype int4",
    "surgery vector transfer a base a -o OUT --scale nan",
    "surgery vector transfer a base a -o OUT --allow-unrelated=1",
    "surgery vector extract 'a\nb' base -o OUT",
    "surgery vector extract 'a\x1b[2J' base -o OUT",
    "surgery vector extract 'a\x00' base -o OUT",
    # Commands that are none to run again.
    "surgery --debug vector extract a base -o OUT",
    "surgery 'vector extract --plot=/nowhere/x' a base -o OUT",
    "surgery vector 'extract --plot=/nowhere/x' a base -o OUT",
    "surgery push a org/b -o OUT",
    "surgery run recipe -o OUT",
    "surgery reproduce a -o OUT",
    "surgery vector sweep a base --task lab_sums -o OUT",
    "surgery probe refusal a --data lab:cliff -o OUT",
    "surgery grow tokenizer a --vocab 300 -o OUT",
    "surgery merge methods -o OUT",
    "surgery merge unpack a -o OUT",
    "/bin/sh -c true -o OUT",
    "surgery",
    "",
    " ",
]


@pytest.mark.parametrize("line", LINES)
def test_what_a_manifest_may_not_ask_for_is_refused(at: Path, tmp_path: Path, line: str) -> None:
    ref = hostile(tmp_path / "stranger", {"line": line})
    with watch_files() as watched, pytest.raises(SurgeryError) as caught:
        reproduce(ref, run=lambda words: pytest.fail(f"ran {words}"), scratch=tmp_path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    watched.check(reads=[tmp_path, at], writes=[tmp_path])


@pytest.mark.parametrize(
    "entry",
    [
        {"ref": "a", "repo_id": "-o", "revision": "/nowhere/x"},
        {"ref": "a", "repo_id": "--plot=/nowhere/x", "revision": COMMIT},
        {"ref": "a", "repo_id": "--plot=/nowhere", "revision": COMMIT},
        {"ref": "a", "repo_id": "org/name", "revision": "-o"},
        {"ref": "a", "repo_id": "org/name", "revision": "../../x"},
        {"ref": "a", "repo_id": "org/name", "revision": "x y"},
        {"ref": "a", "repo_id": "org/name", "revision": ["main"]},
        {"ref": "a", "repo_id": "org/../name", "revision": COMMIT},
        {"ref": "a", "repo_id": "/etc/passwd", "revision": COMMIT},
        {"ref": "a", "repo_id": "org/name@x", "revision": COMMIT},
        {"ref": "a", "repo_id": {"x": 1}, "revision": COMMIT},
        "no table",
    ],
)
def test_inputs_are_repositories_and_revisions_or_refused(at: Path, tmp_path: Path, entry: object) -> None:
    ref = hostile(tmp_path / "stranger", {"line": "surgery vector extract a base -o OUT"}, inputs={"tuned": entry})
    with pytest.raises(SurgeryError):
        reproduce(ref, run=lambda words: pytest.fail(f"ran {words}"), scratch=tmp_path)


def test_inputs_take_the_place_of_models_and_of_nothing_else(at: Path, tmp_path: Path) -> None:
    """The words `-o`, `OUT`, options and their values were once replaced by what the manifest calls its inputs."""
    line = "surgery vector transfer a base base --exclude a --scale 0.5 -o OUT"
    names = ("a", "-o", "OUT", "--exclude", "0.5", "--scale", "vector", "surgery")
    inputs = {name: {"ref": name, "repo_id": "org/name", "revision": COMMIT} for name in names}
    [words] = words_of(hostile(tmp_path / "stranger", {"line": line}, inputs=inputs), tmp_path)
    assert words == [
        *("vector", "transfer", f"org/name@{COMMIT}", "base", "base", "--scale", "0.5", "--exclude", "a"),
        *("--out", "SCRATCH/OUT"),
    ]


def test_a_value_stays_one_whatever_it_looks_like(at: Path, tmp_path: Path) -> None:
    odd = ["--plot=/nowhere/x", "-o", "@file", "~", "$HOME", "$(touch /nowhere/x)", "; rm -rf /", "*", "a\nb", "", "--"]
    line = "surgery vector extract a base -o OUT " + " ".join(f"--exclude={_quoted(text)}" for text in odd)
    [words] = words_of(hostile(tmp_path / "stranger", {"line": line}), tmp_path)
    assert words[:4] == ["vector", "extract", "a", "base"] and words[-2:] == ["--out", "SCRATCH/OUT"]
    assert not {"-o", "--", "--plot=/nowhere/x"} & set(words)
    # What the command line itself, by Click, makes of these words.
    parser = typer.main.get_command(app).commands["vector"].commands["extract"]  # type: ignore[attr-defined]
    read = parser.make_context("extract", words[2:]).params
    assert tuple(read["exclude"]) == tuple(odd) and str(read["out"]) == "SCRATCH/OUT"
    assert (read["tuned"], read["base"]) == ("a", "base")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def test_a_model_may_begin_with_a_dash_behind_two(at: Path, tmp_path: Path, bench: Path) -> None:
    (bench / "-odd").symlink_to(bench / "a")
    try:
        line = "surgery vector extract -o OUT -- -odd base"
        [words] = words_of(hostile(tmp_path / "stranger", {"line": line}), tmp_path)
    finally:
        (bench / "-odd").unlink()
    assert words[-3:] == ["--", "-odd", "base"] and "SCRATCH/OUT" in words[:-3]


@pytest.mark.parametrize(
    "command",
    [
        ["surgery"],
        {"line": ["surgery", "merge"]},
        {"line": {"a": 1}},
        {"line": 7},
        {"line": "surgery merge linear a base -o OUT", "first": "surgery push"},
        {"line": "surgery merge linear a base -o OUT", "first": [["x"]]},
        {"line": "surgery merge linear a base -o OUT", "first": ["surgery vector extract a base -o /nowhere/x"]},
        {"line": "surgery merge linear a base -o OUT", "first": ["surgery merge linear a base -o OUT"] * 10},
        {"line": "surgery merge linear a base -o OUT", "files": ["x"]},
        {"line": "surgery merge linear a base -o OUT", "files": {"x": 1}},
        {"line": "surgery merge linear a base -o OUT", "files": {str(n): "x" for n in range(100)}},
        *(
            {"line": "surgery merge linear a base -o OUT", "inside": inside}
            for inside in (
                "..",
                "../..",
                "/etc",
                "a/../..",
                "a\x00",
                ".",
                "a//b",
                ".hidden",
                ["a"],
                "x" * 5000,
                "a\n",
            )
        ),
    ],
)
def test_damaged_records_are_one_line(at: Path, tmp_path: Path, command: object) -> None:
    ref = hostile(tmp_path / "stranger", command)
    with pytest.raises(SurgeryError) as caught:
        reproduce(ref, run=lambda words: pytest.fail(f"ran {words}"), scratch=tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 2000


@pytest.mark.parametrize("tensors", [{"x": "0"}, {"x": None}, ["x"], "x", {"x": ["0"]}])
def test_damaged_tables_are_one_line(at: Path, tmp_path: Path, tensors: object) -> None:
    ref = hostile(tmp_path / "stranger", {"line": "surgery merge linear a base -o OUT"}, tensors=tensors)
    with pytest.raises(SurgeryError, match="tensors"):
        reproduce(ref, run=lambda words: pytest.fail(f"ran {words}"), scratch=tmp_path)


@pytest.mark.parametrize(
    "name", ["../../escaped.yml", "/nowhere/escaped.yml", "c.yml/../../x.yml", "-o.yml", "~/x.yml", "x." + "y" * 5000]
)
def test_files_of_a_manifest_are_written_into_the_scratch_folder(at: Path, tmp_path: Path, name: str) -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    ref = hostile(
        tmp_path / "stranger", {"line": f"surgery merge weights -o OUT -- {_quoted(name)}", "files": {name: text}}
    )
    before = tree(tmp_path), tree(at)
    with watch_files() as watched:
        [words] = words_of(ref, tmp_path)
    # Bare names are those that the scratch folder was emptied by, in which they lay.
    bare = {at / "0.yml", at / "0", at / "OUT"}
    assert all(path in bare or path.is_relative_to(tmp_path) for path in watched.written)
    assert (tree(tmp_path), tree(at)) == before
    assert words[:2] == ["merge", "weights"]
    assert words[2] == ("SCRATCH/0.yml" if name.endswith(".yml") else "SCRATCH/0")


def test_the_plan_of_a_growth_keeps_its_cache_in_the_run(at: Path, tmp_path: Path) -> None:
    """A plan may name a folder for its cache, of gigabytes: that of a stranger's manifest may not."""
    plan = "embed: emb\ncorpus: c.txt\nstages: [{tokens: 100}]\ncache: {use: 'on', folder: /home/victim}\n"
    record = {"line": "surgery grow run plan.yml -o OUT", "files": {"plan.yml": plan}}
    seen: list[GrowthPlan] = []

    def run(words: Any) -> int:
        seen.append(parse_model(Path(words[2]).read_text(), "plan.yml", GrowthPlan))
        return 7

    with pytest.raises(SurgeryError, match="exit code 7"):
        reproduce(hostile(tmp_path / "stranger", record), run=run, scratch=tmp_path)
    assert seen[0].cache.folder is None and seen[0].cache.use == "on" and seen[0].corpus == ("c.txt",)


def test_what_a_manifest_reads_is_told_before_it_is_read(at: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    config = f"merge_method: linear\nmodels: [{{model: {tmp_path}/private}}, {{model: org/name}}, {{model: lab:sft}}]\n"
    told: list[str] = []
    for record in (
        {"line": "surgery vector extract ~/../tmp base -o OUT"},
        {"line": "surgery merge c.yml -o OUT", "files": {"c.yml": config}},
    ):
        with pytest.raises(SurgeryError, match="exit code 7"):
            ref = hostile(tmp_path / "stranger", record)
            reproduce(ref, run=lambda words: 7, scratch=tmp_path, notify=told.append)
    named = [line.partition(", as")[0].removeprefix("reads ") for line in told]
    assert named == [
        str(Path("~/../tmp").expanduser().resolve()),
        str(at / "base"),
        str(tmp_path / "private"),
        "org/name",
        "lab:sft",
    ]


def test_the_command_line_writes_nowhere_but_into_the_scratch_folder(
    at: Path, tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack as it was first run: a manifest on the Hub whose inputs are named as the words of its command."""
    line = "surgery merge linear a base --weight X -o OUT"
    inputs = {
        "one": {"ref": "X", "repo_id": "-o", "revision": f"{tmp_path}/anywhere"},
        "two": {"ref": "a", "repo_id": f"--plot={tmp_path}/picture.png", "revision": "x"},
    }
    server.add("org/hostile", Path(hostile(tmp_path / "stranger", {"line": line}, inputs=inputs)))
    surgery = commands_in(at, monkeypatch, capsys)
    said = surgery("reproduce", tmp_path / "stranger", "--scratch", tmp_path)
    assert said.code and "expected org/name" in said.err
    assert not (tmp_path / "anywhere").exists() and not (tmp_path / "picture.png").exists()


def test_the_closed_list_holds_commands_that_write_a_folder() -> None:
    known = commands()
    assert set(known) >= REPRODUCIBLE
    for name in REPRODUCIBLE:
        output = known[name].output
        assert output is not None and (output.short, output.flag, output.writes) == ("-o", "--out", "folder")
