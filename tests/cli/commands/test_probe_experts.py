"""`surgery probe experts`, `edit experts`, `eval --reinforce` as a user meets them, and a line for every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.architectures import build
from support.chat_tokenizer import make_tokenizer
from support.cli import Surgery, commands_in, contents, run_command
from support.moe import AT_M, AT_THINK, COLLAPSING, make_thinker, no_pictures, rows, stub_tasks, write_rows

PROBE = ("probe", "experts", "m", "--data", "d.jsonl", "--token", "hm", "--token=-</think>", "--threads", "1")


@pytest.fixture
def surgery(bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    """Runs a command in this process, in the folder `bench`, without pictures."""
    no_pictures(monkeypatch)
    return commands_in(bench, monkeypatch, capsys, columns=160)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `m`, data, `run`, its findings, and models and runs that do not belong to it."""
    folder = tmp_path_factory.mktemp("bench")
    make_thinker(folder / "m")
    write_rows(folder / "d.jsonl", rows(60))
    (folder / "text.txt").write_text("ABC<think>hm</think>S\nhmhm, hm? S")
    build("llama", folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    shutil.copytree(folder / "m", folder / "other")
    tensors = load_file(folder / "other/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "other/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "m", folder / "mute", ignore=shutil.ignore_patterns("token*", "chat*"))
    shutil.copytree(folder / "m", folder / "plain")
    make_tokenizer(marks=()).save_pretrained(folder / "plain")
    (folder / "refusal").mkdir()
    (folder / "refusal/results.json").write_text('{"schema": 1, "kind": "refusal"}')
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.chdir(folder)
        assert run_command(patch, *PROBE, "-o", "run", "--json") == 0
    return folder


# The whole way


def test_from_counts_to_a_reinforced_model_and_back(surgery: Surgery, bench: Path, tmp_path: Path) -> None:
    shown = surgery("probe", "show", "run")
    assert shown.code == 0 and "Experts by nPMI with the markers" in shown.out
    assert f"{AT_M} goes most with the markers: nPMI 2.000 as published" in shown.err
    assert "Report: run/report.html" in shown.err

    edited = surgery(
        "edit",
        "experts",
        "m",
        "--from",
        "run",
        "--top",
        "1",
        "--scale",
        "4",
        "-o",
        tmp_path / "out",
        "--examples",
        "4",
        "--threads",
        "1",
    )
    assert edited.code == 0 and "answers that end in a loop" in edited.out
    assert f"Scaled {AT_M}. Wrote {tmp_path / 'out'}" in edited.err

    undone = surgery("edit", "undo", tmp_path / "out", "-o", tmp_path / "back", "--threads", "1")
    assert undone.code == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (bench / "m/model.safetensors").read_bytes()


def test_json_is_one_object_on_stdout(surgery: Surgery, tmp_path: Path) -> None:
    probed = surgery(*PROBE, "-o", tmp_path / "run", "--json")
    assert probed.code == 0
    first = probed.json["experts"][0]
    assert (first["layer"], first["expert"], first["rank"]) == (AT_M.layer, AT_M.index, 1)
    stored = json.loads((tmp_path / "run/results.json").read_text())
    assert stored == {"schema": 1, "kind": "experts", **probed.json}
    assert surgery("probe", "show", tmp_path / "run", "--json").json == probed.json
    edited = surgery("edit", "experts", "m", "--expert", "L1E6=2", "-o", tmp_path / "out", "--json")
    assert edited.json["experts"] == {"L1E6": 2.0} and edited.json["measured"] is None


def test_a_warning_is_told(surgery: Surgery, tmp_path: Path) -> None:
    result = surgery("probe", "experts", "m", "--data", "d.jsonl", "--token", "<think>", "-o", tmp_path / "run")
    assert result.code == 0 and "Every '<think>' stands in the prompt" in " ".join(result.err.split())
    assert str(AT_THINK) in result.out


def test_a_sweep_is_shown(surgery: Surgery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub_tasks(monkeypatch, lambda asked: 0.8 if asked.scales.get(AT_M) == 8 else 0.5)
    result = surgery(
        *PROBE,
        "-o",
        tmp_path / "run",
        "--sweep",
        "1,2,…,8",
        "--task",
        "t",
        "--top",
        "1",
        "--controls",
        "1",
        "--max-new-tokens",
        "8",
    )
    assert result.code == 0 and "β, chosen and tested" in result.out
    assert "β = 8, chosen on one half of t, takes the other from 50.0%" in " ".join(result.err.split())
    assert [next(iter(a.scales.values())) for a in asked] == [1, 2, 4, 8, 1, 8, 8]


def test_an_edit_that_is_not_measured_warns(surgery: Surgery, tmp_path: Path) -> None:
    result = surgery("edit", "experts", "m", "--expert", "L0E1", "--scale", "2", "-o", tmp_path / "out")
    assert result.code == 0 and "was not measured: give --from RUN or --data DATA." in result.err
    again = surgery("edit", "experts", "m", "--from", "run", "--top", "1", "--no-measure", "-o", tmp_path / "other")
    assert again.code == 0 and "was not measured: as --no-measure asks." in again.err
    assert f"Scaled {AT_M}" in again.err  # by 64, where nobody says


def test_a_dry_run_names_the_experts_and_writes_nothing(surgery: Surgery, tmp_path: Path) -> None:
    words = ("edit", "experts", "m", "--from", "run", "--top", "1", "-o", tmp_path / "out", "--dry-run")
    result = surgery(*words)
    assert result.code == 0 and f"Experts: {AT_M}. Nothing written (--dry-run)." in result.err
    assert not list(tmp_path.iterdir())


def test_force_keeps_a_result_that_collapses(surgery: Surgery, tmp_path: Path) -> None:
    words = ("edit", "experts", "m", "--from", "run", "--top", "1", "--scale", str(COLLAPSING), "--examples", "2")
    assert surgery(*words, "-o", tmp_path / "out").code == 1 and not list(tmp_path.iterdir())
    result = surgery(*words, "-o", tmp_path / "out", "--force", "--json")
    assert result.code == 0 and [rate["value"] for rate in result.json["measured"]["loops"]] == [0, 1]


def test_eval_scores_a_model_as_it_is_and_reinforced(surgery: Surgery, tmp_path: Path) -> None:
    words = ("eval", "m", "--reinforce", "run", "--top", "1", "--scale", "1048576", "--perplexity", "text.txt")
    scores = surgery(*words, "--json").json["scores"]
    values = {(s["model"], s["metric"]): s["value"] for s in scores if s["metric"] == "perplexity"}
    plain, reinforced = "m", f"m + {AT_M} × 1.04858e+06"
    assert list(values) == [(plain, "perplexity"), (reinforced, "perplexity")]
    assert values[plain, "perplexity"] != values[reinforced, "perplexity"]
    alone = surgery("eval", "m", "--perplexity", "text.txt", "--json").json["scores"]
    assert alone == [s for s in scores if s["model"] == plain]
    shown = surgery(*words)
    assert shown.code == 0 and "m + " in shown.out


# Bad input

EDIT = ["edit", "experts", "m", "-o", "X"]
BARE = ["probe", "experts", "m", "--data", "d.jsonl", "-o", "X"]
EVAL = ["eval", "m", "--perplexity", "text.txt", "--reinforce"]
SWEEP = [*PROBE, "-o", "X", "--task", "t", "--sweep"]
WRONG: list[tuple[Sequence[str], str]] = [
    (["probe", "experts", "dense", "--data", "d.jsonl", "--token", "hm", "-o", "X"], "dense: no layer routes tokens"),
    (["probe", "experts", "nowhere", "--data", "d.jsonl", "--token", "hm", "-o", "X"], "nowhere: no such folder"),
    (["probe", "experts", "m", "--data", "no.jsonl", "--token", "hm", "-o", "X"], "no.jsonl: no such file"),
    (BARE, "Missing option '--token'"),
    ([*BARE, "--token", "漢"], "--token: '漢' is not in the model's vocabulary"),
    ([*BARE, "--token", "Zebra"], "--token: 'Zebra' never occurs in 60 texts. Check its spelling"),
    ([*BARE, "--token", "-"], "--token: got '-', expected a marker such as"),
    ([*BARE, "--token=-hm"], "expected finite weights, one of them above 0"),
    ([*BARE, "--token", "nan*hm"], "expected finite weights"),
    ([*BARE, "--token", "hm", "--token=-hm"], "--token: 'hm' is given twice"),
    ([*PROBE, "-o", "run"], "run: exists already"),
    ([*PROBE, "-o", "m", "--overwrite"], "m: was not written by"),
    ([*PROBE, "-o", "X", "--sweep", "1,2"], "give both --sweep and --task"),
    ([*PROBE, "-o", "X", "--task", "t"], "give both --sweep and --task"),
    ([*SWEEP, "1,two"], "--sweep: got '1,two', expected numbers such as 1,2,4,…,64"),
    ([*SWEEP, "1,-2"], "--sweep: got '1,-2', expected finite numbers from 0 on"),
    ([*SWEEP, "nan"], "--sweep: got 'nan', expected finite numbers"),
    ([*SWEEP, "1,inf"], "expected finite numbers from 0 on"),
    ([*SWEEP, "0,2", "--way", "logit"], "--sweep: got β = 0, which has no logarithm"),
    ([*SWEEP, "2", "--way", "loud"], "--way: got 'loud', expected weight, renormalised, logit or forced"),
    ([*SWEEP, "2", "--phase", "prompt"], "--phase: got 'prompt', expected all or generated"),
    ([*SWEEP, "2", "--top", "0"], "'--top'"),
    ([*SWEEP, "2", "--top", "99"], "were asked for. Ask for fewer"),
    (["probe", "show", "m"], "m: has no results.json"),
    (["probe", "heads", "m", "--from", "run"], "run/results.json: holds 'experts' of schema 1, expected 'refusal'"),
    (["edit", "heads", "m", "-o", "X", "--from", "run", "--top", "1"], "holds 'experts' of schema 1, expected"),
    ([*EDIT, "--from", "refusal"], "refusal/results.json: holds 'refusal' of schema 1, expected 'experts'"),
    (EDIT, "no experts were given. Name them (--expert L12E45), or give --from RUN --top 2."),
    ([*EDIT, "--top", "1"], "no experts were given"),
    (["edit", "experts", "mute", "-o", "X", "--expert", "L0E0", "--data", "d.jsonl"], "mute: has no tokenizer"),
    (
        ["edit", "experts", "plain", "-o", "X", "--expert", "L0E0", "--data", "d.jsonl"],
        "plain: no thinking markers are known from its tokens or its chat template. Give --from RUN, which says how",
    ),
    ([*EDIT, "--from", "m"], "m: has no results.json. Give a folder that `surgery probe experts"),
    ([*EDIT, "--from", "run", "--top", "99"], "experts have evidence enough to be ranked, 99 were asked for"),
    ([*EDIT, "--from", "run", "--top", "0"], "'--top'"),
    ([*EDIT, "--from", "run", "--top", "1", "--expert", "L0E0"], "--expert names experts, --top chooses them"),
    ([*EDIT, "--expert", "L1E8"], "L1E8: layer 1 has the experts 0 to 7"),
    ([*EDIT, "--expert", "L9E0"], "L9E0: there is no layer 9"),
    ([*EDIT, "--expert", "x"], "--expert: got 'x', expected LAYER and EXPERT such as L12E45"),
    ([*EDIT, "--expert", "L0E0", "--scale", "-1"], "L0E0: got β = -1, expected a finite number from 0 on"),
    ([*EDIT, "--expert", "L0E0", "--scale", "nan"], "L0E0: got β = nan, expected a finite number from 0 on"),
    ([*EDIT, "--expert", "L0E0", "--scale", "inf"], "L0E0: got β = inf, expected a finite number from 0 on"),
    ([*EDIT, "--expert", "L0E0", "--scale", "1"], "nothing to do: every β is 1"),
    ([*EDIT, "--expert", "L0E0", "--data", "no.jsonl"], "no.jsonl: no such file"),
    ([*EDIT, "--expert", "L0E0", "--data", "d.jsonl", "--no-measure"], "--no-measure not to measure: give one of them"),
    (["edit", "experts", "other", "-o", "X", "--from", "run"], "run: its findings are of m"),
    (["edit", "experts", "m", "-o", "run", "--expert", "L0E0"], "run: exists already"),
    ([*EVAL, "m"], "m: has no results.json"),
    ([*EVAL, "refusal"], "holds 'refusal' of schema 1, expected 'experts'"),
    ([*EVAL, "run", "--top", "99"], "99 were asked for"),
    ([*EVAL, "run", "--scale", "-1"], "got β = -1, expected a finite number from 0 on"),
    ([*EVAL, "run", "--scale", "inf"], "got β = inf"),
    ([*EVAL, "run", "--phase", "prompt"], "--phase: got 'prompt', expected all or generated"),
    ([*EVAL, "run", "--phase", "generated"], "so that --phase generated changed nothing"),
    (["eval", "other", "--perplexity", "text.txt", "--reinforce", "run"], "run: its findings are of m"),
    (["eval", "m", "--reinforce", "run"], "nothing to score the models on"),
    (["eval", "m", "--perplexity", "text.txt", "--scale", "2"], "--scale: goes with --reinforce RUN"),
    ([*PROBE, "-o", "X", "--top", "3"], "--top: goes with --sweep"),
    ([*PROBE, "-o", "X", "--task-limit", "3"], "--task-limit: goes with --sweep"),
]
FAILED: list[tuple[Sequence[str], str]] = [
    (
        [*EDIT, "--from", "run", "--top", "1", "--scale", "1048576", "--examples", "2"],
        "100.0% of its answers end in a loop, 0.0% of the original's (n = 2), so the result is not kept",
    ),
    (["edit", "experts", "dense", "-o", "X", "--expert", "L0E0"], "dense has no routed experts that are recognised"),
]


@pytest.mark.parametrize(
    ("arguments", "text", "code"), [*((*case, 2) for case in WRONG), *((*case, 1) for case in FAILED)]
)
def test_bad_input_is_told_in_a_line_and_leaves_nothing(
    arguments: list[str], text: str, code: int, surgery: Surgery, bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_tasks(monkeypatch, lambda asked: 0.5)
    before = contents(bench)
    result = surgery(*arguments)
    said = " ".join(result.err.split())
    assert result.code == code and text in said, result.err
    assert result.out == "" and "Traceback" not in said and "internal error" not in said
    assert contents(bench) == before


def test_an_edit_without_measuring_is_arithmetic_on_files(bench: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys\nfrom cli.main import run\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['surgery', *words]\n"
        "    try: run()\n    except SystemExit as left: assert not left.code, words\n"
        "print(sorted({'transformers', 'accelerate', 'sklearn', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    commands = [
        ["edit", "experts", "m", *choice, "--scale", "2", "--no-measure", "-o", str(tmp_path / str(number))]
        for number, choice in enumerate((["--expert", "L1E2"], ["--from", "run", "--top", "2"]))
    ]
    commands.append(["probe", "show", "run", "--json"])
    command = [sys.executable, "-c", script, json.dumps(commands)]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
