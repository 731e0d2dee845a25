"""`surgery probe …` and `surgery edit …` as a user meets them: the whole way, and a clear line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import refusal as refusing
from support.architectures import build
from support.chat_tokenizer import make_tokenizer
from support.cli import Surgery, commands_in, contents, run_command
from support.forks import Fork
from support.refusal import SUPPRESSORS, make_model, no_pictures, rows_of, write_rows

ROOT = Path(__file__).parents[3]
TENSORS = ("probes.safetensors", "traces.safetensors", "heads.safetensors")


@pytest.fixture
def surgery(bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    """Runs a command in this process, in the folder `bench`, without pictures."""
    no_pictures(monkeypatch)
    return commands_in(bench, monkeypatch, capsys, columns=120)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `m`, data and `run`, the findings of the one on the other, with a proof."""
    folder = tmp_path_factory.mktemp("bench")
    make_model(folder / "m")
    rows = rows_of(dict.fromkeys(refusing.CELLS, 6))
    write_rows(folder / "d.jsonl", rows)
    write_rows(folder / "complied.jsonl", [row for row in rows if row["label"].endswith("complied")])
    write_rows(folder / "bare.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows(folder / "evil.jsonl", [{**rows[0], "label": "evil"}, {"thinking": "hm"}])
    write_rows(folder / "endless.jsonl", [{"prompt": "ab_", "label": "harmful"}])
    (folder / "empty.jsonl").write_text("")
    shutil.copytree(folder / "m", folder / "mute", ignore=shutil.ignore_patterns("token*", "chat*"))
    build("llama", folder / "plain")  # its tokenizer knows no thinking markers
    make_tokenizer(marks=()).save_pretrained(folder / "plain")
    shutil.copytree(folder / "m", folder / "theirs")
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.chdir(folder)
        for words in (["refusal", "m", "--data", "d.jsonl", "-o", "run"], ["heads", "m", "--from", "run"]):
            assert run_command(patch, "probe", *words, "--threads", "1", "--json") == 0
    return folder


# The whole way


def test_from_a_probe_to_a_repaired_model_and_back(surgery: Surgery, bench: Path, tmp_path: Path) -> None:
    shown = surgery("probe", "show", "run")
    assert shown.code == 0 and "Heads that write against refusal" in shown.out
    assert "Report: run/report.html" in shown.err
    assert "takes refusal from 0% to 100%" in shown.err

    edited = surgery("edit", "heads", "m", "--from", "run", "--top", "2", "-o", tmp_path / "out", "--threads", "1")
    assert edited.code == 0 and "refusal of harmful prompts" in edited.out
    assert f"Scaled L1H2, L2H1. Wrote {tmp_path / 'out'}" in edited.err

    undone = surgery("edit", "undo", tmp_path / "out", "-o", tmp_path / "back", "--threads", "1")
    assert undone.code == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (bench / "m/model.safetensors").read_bytes()


def test_json_is_one_object_on_stdout(surgery: Surgery, tmp_path: Path) -> None:
    show = surgery("probe", "show", "run", "--json").json
    assert show["causal"]["steps"][1]["heads"] == list(SUPPRESSORS)
    assert show["cells"] == dict.fromkeys(refusing.CELLS, 6)
    small = ("--threads", "1", "--json")
    probed = surgery("probe", "refusal", "m", "--data", "d.jsonl", "-o", tmp_path / "run", *small)
    assert probed.code == 0 and probed.json["heads"] == show["heads"]
    stored = json.loads((tmp_path / "run/results.json").read_text())
    assert stored == {"schema": 1, "kind": "refusal", **probed.json}
    judged = surgery(
        "probe", "judge", "m", "--from", "run", "--data", "d.jsonl", "--top", "2", "-o", tmp_path / "s.jsonl", *small
    )
    assert [cliff["key"] for cliff in judged.json["chosen"]] and judged.json["n"] == 24
    watched = surgery("probe", "refusal", "m", "--from", "run", "--live", "ab!?cd", "--json")
    assert watched.json["tokens"] == ["h", "m", refusing.CLOSE, "Sure"] and len(watched.json["scores"]) == 4
    edited = surgery("edit", "heads", "m", "--head", "L1H2=0.5", "-o", tmp_path / "out", *small)
    assert edited.json["heads"] == {"L1H2": 0.5} and edited.json["measured"] is None
    undone = surgery("edit", "undo", tmp_path / "out", "-o", tmp_path / "back", *small)
    assert undone.json["edited"] == 1


def test_live_writes_the_answer_to_stdout_and_its_scores_in_words(surgery: Surgery) -> None:
    result = surgery("probe", "refusal", "m", "--from", "run", "--live", "ab!?cd")
    assert result.code == 0 and result.out == f"hm{refusing.CLOSE}Sure"
    assert "just before the answer; misalignment 0." in result.err


def test_judge_shows_what_it_chose(surgery: Surgery, tmp_path: Path) -> None:
    result = surgery(
        "probe", "judge", "m", "--from", "run", "--data", "d.jsonl", "--top", "5%", "-o", tmp_path / "s.jsonl"
    )
    assert result.code == 0 and "Chosen by their cliffs" in result.out and "2 of 24 examples" in result.out
    assert f"Wrote {tmp_path / 's.jsonl'}" in result.err


def test_a_gpt_without_chat_template_is_probed_on_plain_text(surgery: Surgery, tmp_path: Path) -> None:
    build("gpt2", tmp_path / "gpt")
    make_tokenizer(template=None, marks=()).save_pretrained(tmp_path / "gpt")
    result = surgery(
        "probe",
        "refusal",
        tmp_path / "gpt",
        "--data",
        "d.jsonl",
        "--no-thinking",
        "-o",
        tmp_path / "run",
        "--threads",
        "1",
        "--json",
    )
    assert result.code == 0, result.err
    assert result.json["markers"] is None and len(result.json["heads"]) == 8
    # Thinking and answer follow the prompt, and are told apart all the same.
    assert {row["cell"] for row in result.json["cliffs"]} == set(refusing.CELLS)


def test_overwrite_replaces_a_run(surgery: Surgery, bench: Path, tmp_path: Path) -> None:
    shutil.copytree(bench / "run", tmp_path / "run")
    words = ("probe", "refusal", "m", "--data", "d.jsonl", "-o", tmp_path / "run", "--threads", "1")
    assert surgery(*words).code == 2
    assert surgery(*words, "--overwrite", "--cells", "paper").code == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["settings"]["training"]["cells"] == "paper"


def test_an_edit_that_is_not_measured_warns(surgery: Surgery, tmp_path: Path) -> None:
    result = surgery("edit", "heads", "m", "--head", "L0H1", "-o", tmp_path / "out")
    assert result.code == 0 and "was not measured: give --from RUN or --data DATA." in result.err
    again = surgery("edit", "heads", "m", "--from", "run", "--top", "1", "--no-measure", "-o", tmp_path / "other")
    assert "was not measured: as --no-measure asks." in again.err


# Bad input

REFUSAL = ["probe", "refusal", "m", "--data", "d.jsonl", "-o", "X"]
PROVE = ["probe", "heads", "m", "--from", "run"]
JUDGE = ["probe", "judge", "m", "--from", "run", "--data", "d.jsonl", "-o", "X.jsonl"]
EDIT = ["edit", "heads", "m", "-o", "X"]
WRONG: list[tuple[Sequence[str], str]] = [
    (["probe", "refusal", "m", "--data", "nowhere.jsonl", "-o", "X"], "nowhere.jsonl: no such file, and not a Hub"),
    (["probe", "refusal", "m", "--data", "empty.jsonl", "-o", "X"], "empty.jsonl: has no rows"),
    (["probe", "refusal", "m", "--data", "evil.jsonl", "-o", "X"], "evil.jsonl:1: label is 'evil', expected a topic"),
    (["probe", "refusal", "m", "--data", "evil.jsonl", "-o", "X"], "evil.jsonl:2: has neither prompt nor messages"),
    (["probe", "refusal", "plain", "--data", "d.jsonl", "-o", "X"], "plain: no thinking markers are known"),
    (["probe", "refusal", "mute", "--data", "d.jsonl", "-o", "X"], "mute: has no tokenizer beside its weights"),
    (["probe", "refusal", "nowhere", "--data", "d.jsonl", "-o", "X"], "nowhere: no such folder or file"),
    (["probe", "refusal", "m", "--data", "d.jsonl"], "Add --data DATA and -o RUN"),
    (["probe", "refusal", "m", "-o", "X"], "Add --data DATA and -o RUN"),
    (["probe", "refusal", "m", "--data", "d.jsonl", "-o", "run"], "run: exists already"),
    (["probe", "refusal", "m", "--data", "d.jsonl", "-o", "theirs", "--overwrite"], "theirs: was not written by"),
    (["probe", "refusal", "m", "--live", "abc"], "--live takes the probe of a run: give --from RUN"),
    (["probe", "refusal", "m", "--live", "abc", "--from", "m"], "m: has no results.json"),
    (["probe", "refusal", "plain", "--live", "abc", "--from", "run"], "run: its findings are of"),
    ([*REFUSAL, "--from", "run"], "--from RUN goes with --live PROMPT"),
    ([*REFUSAL, "--cells", "papr"], "--cells: got 'papr', expected all or paper. Did you mean paper?"),
    ([*REFUSAL, "--attribution", "x"], "--attribution: got 'x', expected exact or paper"),
    ([*REFUSAL, "--engine", "x"], "--engine: got 'x', expected transformers or vllm"),
    ([*REFUSAL, "--strength", "0"], "--strength: got 0, expected a positive number"),
    ([*REFUSAL, "--folds", "1"], "'--folds'"),
    ([*REFUSAL, "--dtype", "float33"], "--dtype: got 'float33'"),
    ([*REFUSAL, "--device", "gpu"], "--device: got 'gpu', expected cpu or cuda[:N]"),
    ([*REFUSAL, "--think-open", "<a>"], "--think-open: <a> belongs to no known pair of markers. Add --think-close."),
    ([*REFUSAL, "--no-thinking"], "d.jsonl: example 0: has a thinking, and its model is said not to think"),
    ([*REFUSAL, "--no-thinking", "--think-open", "<a>"], "--no-thinking says that there are no markers"),
    ([*REFUSAL, "--guard", "nowhere"], "nowhere: no such folder or file"),
    ([*REFUSAL, "--refusal-phrases", "empty.jsonl"], "empty.jsonl: has no phrases. Give one a line."),
    ([*REFUSAL, "--guard", "m", "--refusal-phrases", "d.jsonl"], "--guard and --refusal-phrases are two ways to judge"),
    ([*REFUSAL, "--transfer", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["probe", "heads", "m", "--from", "nowhere"], "nowhere: has no results.json. Give a folder that"),
    (["probe", "heads", "plain", "--from", "run"], "findings of another one say nothing about it"),
    ([*PROVE, "--top", "0"], "--top: got '0', which is 0 of 12, expected 1 to 12"),
    ([*PROVE, "--top", "200%"], "--top: got '200%', which is 24 of 12, expected 1 to 12"),
    ([*PROVE, "--top", "abc"], "--top: got 'abc', expected a share such as 3% or a count"),
    ([*PROVE, "--positions", "0"], "--positions: got '0', expected a whole number from 1 on, or all"),
    ([*PROVE, "--positions", "some"], "--positions: got 'some'"),
    ([*PROVE, "--ablate", "kill"], "--ablate: got 'kill', expected scale, mean or resample"),
    ([*PROVE, "--ablate", "resample", "--positions", "all"], "--ablate resample: resampling takes"),
    ([*PROVE, "--scale", "nan"], "--scale: got nan, expected a finite number"),
    ([*PROVE, "--kl-budget", "-1"], "'--kl-budget'"),
    (JUDGE, "Missing option '--top'"),
    ([*JUDGE, "--top", "0"], "--top: got '0', which is 0 of 24"),
    ([*JUDGE, "--top", "1", "--style", "alpaca"], "--style: got 'alpaca', expected trl or llama-factory"),
    (["probe", "judge", "m", "--from", "run", "--data", "d.jsonl", "--top", "1", "-o", "d.jsonl"], "d.jsonl: exists"),
    (["probe", "judge", "m", "--from", "run", "--data", "d.jsonl", "--top", "1", "-o", "m"], "m: is a folder"),
    (["probe", "judge", "plain", "--from", "run", "--data", "d.jsonl", "--top", "1", "-o", "X"], "run: its findings"),
    (["probe", "show", "m"], "m: has no results.json"),
    (["edit", "heads", "m", "--head", "L0H0"], "Missing option '-o'"),
    (EDIT, "no heads were given. Name them (--head L12H7), or give --from RUN --top 3%."),
    ([*EDIT, "--from", "run"], "run: how many heads?"),
    ([*EDIT, "--from", "m", "--top", "1"], "m: has no results.json"),
    ([*EDIT, "--from", "run", "--top", "200%"], "--top: got '200%'"),
    ([*EDIT, "--from", "run", "--top", "100%"], "of the 12 lowest heads do not write against refusal"),
    ([*EDIT, "--from", "run", "--top", "1", "--mode", "mean"], "has no bias to hold it. Use --scale 0"),
    ([*EDIT, "--from", "run", "--top", "1", "--mode", "median"], "--mode: got 'median', expected scale or mean"),
    ([*EDIT, "--from", "run", "--top", "1", "--head", "L0H0"], "--head and --top all choose heads"),
    ([*EDIT, "--top", "1"], "--top: chooses among the heads of a run. Add --from RUN."),
    ([*EDIT, "--head", "L99H0"], "L99H0: there is no layer 99, expected 0 to 2."),
    ([*EDIT, "--head", "L0H9"], "L0H9: layer 0 has the heads 0 to 3."),
    ([*EDIT, "--head", "x"], "--head: got 'x', expected LAYER and HEAD such as L12H7"),
    ([*EDIT, "--head", "L0H0", "--scale", "inf"], "L0H0: got γ = inf, expected a finite number"),
    ([*EDIT, "--head", "L0H0", "--data", "bare.jsonl"], "bare.jsonl: no example is harmful"),
    ([*EDIT, "--head", "L0H0", "--data", "d.jsonl", "--no-measure"], "--no-measure not to measure: give one of them"),
    (["edit", "heads", "plain", "-o", "X", "--from", "run", "--top", "1"], "run: its findings are of"),
    (["edit", "heads", "m", "-o", "run", "--head", "L0H0"], "run: exists already"),
    (["edit", "undo", "m", "-o", "X"], "m: has no undo/undo.safetensors, so nothing can be undone"),
]
FAILED: list[tuple[Sequence[str], str]] = [
    (["probe", "refusal", "m", "--data", "complied.jsonl", "-o", "X"], "no example is refused"),
    ([*REFUSAL, "--transfer", "complied.jsonl"], "no example is refused"),
    ([*EDIT, "--head", "L0H0", "--data", "d.jsonl"], "refusal of harmful prompts fell from 50.0% to 0.0%"),
]


@pytest.mark.parametrize(
    ("arguments", "text", "code"), [*((*case, 2) for case in WRONG), *((*case, 1) for case in FAILED)]
)
def test_bad_input_is_told_in_a_line_and_leaves_nothing(
    arguments: list[str], text: str, code: int, surgery: Surgery, bench: Path
) -> None:
    before = contents(bench)
    result = surgery(*arguments)
    said = " ".join(result.err.split())
    assert result.code == code and text in said, result.err
    assert result.out == "" and "Traceback" not in said and "internal error" not in said
    assert contents(bench) == before


def test_thinking_that_never_closes_is_kept_for_the_next_try(surgery: Surgery, bench: Path) -> None:
    words = ["probe", "refusal", "m", "--data", "endless.jsonl", "-o", "Y", "--max-new-tokens", "20"]
    result = surgery(*words)
    assert result.code == 1 and "endless.jsonl: none of its 1 examples came to an answer" in result.err
    assert [path.name for path in (bench / "Y.partial").iterdir()] == ["generations.jsonl"]
    shutil.rmtree(bench / "Y.partial")


# Processes of their own


@pytest.mark.slow
def test_two_processes_find_what_one_does(bench: Path, tmp_path: Path) -> None:
    # Rows are completed, too, so that all phases are shared.
    rows = rows_of(dict.fromkeys(refusing.CELLS, 5), whole=False)
    data = write_rows(tmp_path / "d.jsonl", rows)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [
        "probe",
        "refusal",
        str(bench / "m"),
        "--data",
        str(data),
        "--generation-batch",
        "4",
        "--batch-tokens",
        "60",
    ]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launch, "-m", "cli.main", *words, "-o", "two", "--threads", "1", "--json"]
    one = Fork("from cli.main import run; run()", *words, "-o", "one", "--threads", "1", cwd=tmp_path)
    code, _, complaints = one.wait()
    assert code == 0, complaints
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated"] == 20  # one of them talks
    for name in ("results.json", *TENSORS, "examples.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert not list(tmp_path.glob("*.partial"))


def test_an_edit_without_measuring_is_arithmetic_on_files(bench: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys\nfrom cli.main import run\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['surgery', *words]\n"
        "    try: run()\n    except SystemExit as left: assert not left.code, words\n"
        "print(sorted({'transformers', 'accelerate', 'sklearn', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    commands = [
        ["edit", "heads", "m", *choice, "--no-measure", "-o", str(tmp_path / choice[0])]
        for choice in (["--head", "L1H2"], ["--from", "run", "--top", "2"])
    ]
    command = [sys.executable, "-c", script, json.dumps(commands)]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
