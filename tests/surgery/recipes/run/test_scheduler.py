"""Promises of recipes.run.scheduler: each step is done once for its inputs, in order, as many side by side as fit; and
whatever stops a run, the same command goes on and ends with the same hashes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.processes import run_ranks
from support.publish import REPO, copy_of, files_at
from support.recipe_runs import (
    Fakes,
    hold_step,
    make,
    make_models,
    node,
    outputs,
    program,
    surgery_run,
    wait_for_held_step,
    write_output,
    write_recipe,
)

from surgery.errors import SurgeryError
from surgery.recipes.run import scheduler as engine
from surgery.recipes.run.preview import RunPreview
from surgery.recipes.run.scheduler import RunReport, run_pipeline
from surgery.recipes.run.state import locked
from surgery.recipes.run.subprocesses import StepProcess, child_environment, start
from surgery.recipes.run.subprocesses import surgery_command as line_of
from surgery.recipes.types import Pipeline, Push, StepOutput

GB = 10**9
# What a run of the command line may take before it counts as hanging, on a machine with ten others at work.
SECONDS = 600

CHAIN = program(
    node("a"),
    node("b", {"inputs": (StepOutput("a"),)}),
    node("c", {"inputs": (StepOutput("b"),)}),
    node("d", {"text": "alone"}),
)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up children are done at once: there is nothing to wait for."""
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(engine, "free_memory", lambda: 100 * GB)


def go(run: Path, what: Pipeline = CHAIN, fakes: Fakes | None = None, **more: object) -> tuple[RunReport, Fakes]:
    fakes = fakes or Fakes()
    return run_pipeline(what, run, runner=fakes, jobs=more.pop("jobs", 8), **more), fakes  # type: ignore[arg-type]


def test_steps_run_after_those_they_need_and_beside_the_others(tmp_path: Path) -> None:
    report, fakes = go(tmp_path / "run")
    assert set(report.statuses.values()) == {"done"}
    assert [fakes.ended.index(name) for name in "abc"] == sorted(fakes.ended.index(name) for name in "abc")
    assert fakes.beside["d"] == {"a"}
    assert "a" not in fakes.beside["b"] and "b" not in fakes.beside["c"]


def test_a_step_is_given_where_the_others_output_lies(tmp_path: Path) -> None:
    _, fakes = go(tmp_path / "run")
    out = tmp_path / "run" / "steps"
    assert list(fakes.words["b"]) == ["make", str(out / "a" / "out"), "--out", str(out / "b" / "out")]


def test_an_unchanged_step_is_not_done_again(tmp_path: Path) -> None:
    first, _ = go(tmp_path / "run")
    again, fakes = go(tmp_path / "run")
    assert fakes.started == []
    assert set(again.statuses.values()) == {"unchanged"}
    assert {n: s.output for n, s in again.steps.items()} == {n: s.output for n, s in first.steps.items()}


def test_a_changed_option_does_the_step_and_what_follows_again(tmp_path: Path) -> None:
    go(tmp_path / "run")
    changed = program(
        node("a"),
        node("b", {"inputs": (StepOutput("a"),), "count": 2}),
        node("c", {"inputs": (StepOutput("b"),)}),
        CHAIN.nodes[3],
    )
    _, fakes = go(tmp_path / "run", changed)
    assert fakes.started == ["b", "c"]


@pytest.mark.parametrize("harm", ["change", "remove", "empty"])
def test_an_output_that_was_damaged_is_made_again_and_nothing_else(tmp_path: Path, harm: str) -> None:
    before, _ = go(tmp_path / "run")
    file = tmp_path / "run" / "steps" / "a" / "out" / "result.txt"
    if harm == "change":
        file.write_text("something else, longer")
    elif harm == "remove":
        file.unlink()
    else:
        file.unlink()
        file.parent.rmdir()
    after, fakes = go(tmp_path / "run")
    assert fakes.started == ["a"]
    assert before.steps["a"].output == after.steps["a"].output


def test_from_does_a_step_and_what_follows_again(tmp_path: Path) -> None:
    go(tmp_path / "run")
    _, fakes = go(tmp_path / "run", from_step="b")
    assert fakes.started == ["b", "c"]
    with pytest.raises(SurgeryError, match="no step is called 'bb'"):
        go(tmp_path / "run", from_step="bb")


def test_from_takes_all_of_a_matrix(tmp_path: Path) -> None:
    grid = program(node("a.x=1", {"count": 1}), node("a.x=2", {"count": 2}), node("b"))
    go(tmp_path / "run", grid)
    assert go(tmp_path / "run", grid, from_step="a")[1].started == ["a.x=1", "a.x=2"]
    assert go(tmp_path / "run", grid, from_step="a.x=2")[1].started == ["a.x=2"]


def test_no_more_run_side_by_side_than_jobs(tmp_path: Path) -> None:
    wide = program(*(node(f"s{n}", {"count": n}) for n in range(6)))
    _, fakes = go(tmp_path / "run", wide, jobs=2)
    assert max(len(beside) for beside in fakes.beside.values()) == 1
    assert len(fakes.ended) == 6


def test_steps_run_side_by_side_only_while_their_memory_fits(tmp_path: Path) -> None:
    sizes = {"a": 50, "b": 20, "c": 20, "huge": 500, "d": 1}
    wide = program(*(node(n, {"text": n}, memory=size * GB) for n, size in sizes.items()))
    _, fakes = go(tmp_path / "run", wide)
    for name, beside in fakes.beside.items():
        assert not beside or sum(sizes[each] for each in (name, *beside)) <= 80
    assert fakes.beside["huge"] == set()
    assert not any("huge" in beside for beside in fakes.beside.values())
    assert sorted(fakes.ended) == sorted(sizes)


def test_two_that_write_scores_into_one_folder_do_not_run_side_by_side(tmp_path: Path) -> None:
    scoring = make("eval", writes=None)
    steps = [node(n, {"inputs": (StepOutput("a"),), "text": n}, command=scoring) for n in ("one", "two")]
    _, fakes = go(tmp_path / "run", program(node("a"), *steps))
    assert fakes.beside["two"] == set()


def test_scores_are_measured_again_when_the_folder_that_holds_them_is_new(tmp_path: Path) -> None:
    what = program(node("a"), node("s", {"inputs": (StepOutput("a"),)}, command=make("eval", writes=None)))
    go(tmp_path / "run", what)
    (tmp_path / "run" / "steps" / "a" / "out" / "result.txt").unlink()
    seen: list[RunPreview] = []
    _, fakes = go(tmp_path / "run", what, show=seen.append)
    assert fakes.started == ["a", "s"]
    assert [step.is_done for step in seen[0].steps] == [False, False]


def test_what_does_not_depend_on_a_failed_step_goes_on(tmp_path: Path) -> None:
    report, _ = go(tmp_path / "run", fakes=Fakes(codes={"b": 1}))
    assert dict(report.statuses) == {"a": "done", "b": "failed", "c": "left out", "d": "done"}
    fault = report.error(tmp_path / "run")
    assert fault is not None and fault.exit_code == 1
    assert "step b failed:\n  looked\n  it is broken" in str(fault)
    assert str(tmp_path / "run" / "steps" / "b" / "log.txt") in str(fault)
    assert "Left out, because they need it: c." in str(fault)
    _, again = go(tmp_path / "run")
    assert again.started == ["b", "c"]


def test_a_step_that_writes_nothing_fails(tmp_path: Path) -> None:
    report, _ = go(tmp_path / "run", program(node("a")), Fakes(work=lambda job: job.paths.text.write_text("")))
    assert report.statuses["a"] == "failed"
    assert "wrote nothing" in (report.steps["a"].error or "")


def test_a_step_that_failed_goes_on_from_its_partial_work_but_not_from_that_of_other_options(tmp_path: Path) -> None:
    seen: list[bool] = []

    def work(job: StepProcess) -> None:
        seen.append((job.paths.folder / "out.partial").exists())
        write_output(job)

    class Half(Fakes):
        def __call__(self, job: StepProcess):  # type: ignore[no-untyped-def]
            (job.paths.folder / "out.partial").mkdir(exist_ok=True)
            return super().__call__(job)

    go(tmp_path / "run", program(node("a")), Half(codes={"a": 1}))
    go(tmp_path / "run", program(node("a")), Fakes(work=work))
    go(tmp_path / "other", program(node("a")), Half(codes={"a": 1}))
    go(tmp_path / "other", program(node("a", {"count": 5})), Fakes(work=work))
    assert seen == [True, False]


def test_a_command_that_changes_a_folder_works_on_a_copy(tmp_path: Path) -> None:
    def work(job: StepProcess) -> None:
        job.paths.out.mkdir(exist_ok=True)
        for name in ("m.safetensors", "log.jsonl"):
            path = job.paths.out / name
            if not path.exists():
                path.write_bytes(b"first\n")
            elif name == "log.jsonl":
                with path.open("ab") as file:
                    file.write(b"second\n")
        job.paths.text.write_text("")

    changing = make("change", writes="from", changes="from")
    what = program(node("a"), node("b", {"from": StepOutput("a")}, command=changing))
    _, fakes = go(tmp_path / "run", what, Fakes(work=work))
    a, b = (tmp_path / "run" / "steps" / name / "out" for name in "ab")
    assert (a / "log.jsonl").read_text() == "first\n"
    assert (b / "log.jsonl").read_text() == "first\nsecond\n"
    assert (a / "m.safetensors").stat().st_ino == (b / "m.safetensors").stat().st_ino
    assert fakes.words["b"] == ["change", "--from", str(b)]


def test_a_folder_to_be_changed_that_is_not_there_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    changing = make("change", writes="from", changes="from")
    what = program(node("a"), node("b", {"from": "gone"}, command=changing))
    fakes = Fakes()
    with pytest.raises(SurgeryError, match="b: from: got gone, expected a folder that is there"):
        go(tmp_path / "run", what, fakes)
    assert fakes.started == []


def test_a_step_does_not_take_its_files_for_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("KEPT", "1")
    assert "FORCE_COLOR" not in child_environment() and child_environment()["KEPT"] == "1"


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path: Path) -> None:
    seen: list[RunPreview] = []
    report, fakes = go(tmp_path / "run", dry_run=True, show=seen.append)
    assert not (tmp_path / "run").exists()
    assert fakes.started == [] and report.statuses == {}
    assert [(each.step.name, each.is_done) for each in seen[0].steps] == [(name, False) for name in "abcd"]


def test_too_small_a_disk_is_an_error_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.recipes.run.preview._free", lambda run: 1000)
    fakes = Fakes()
    with pytest.raises(SurgeryError, match=r"write about 200 MB, and 1,?\.?0* kB are free"):
        go(tmp_path / "run", fakes=fakes)
    assert fakes.started == []


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(SurgeryError, match=r"another run is at work here \(process \d+\)"):
        go(tmp_path / "run")


def test_the_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SurgeryError, match="is not empty, and no run of a recipe"):
        go(tmp_path)
    go(tmp_path / "run")
    with pytest.raises(SurgeryError, match="holds a run of the recipe 'tried', not of 'other'"):
        go(tmp_path / "run", program(node("a"), recipe="other"))


def test_what_a_step_made_stays_known_while_the_recipe_leaves_it_out(tmp_path: Path) -> None:
    go(tmp_path / "run")
    go(tmp_path / "run", program(CHAIN.nodes[0]))
    assert go(tmp_path / "run")[1].started == []


def test_ctrl_c_stops_the_children_and_the_next_run_goes_on(tmp_path: Path) -> None:
    class Pressed(Fakes):
        def __call__(self, job: StepProcess):  # type: ignore[no-untyped-def]
            child = super().__call__(job)
            if job.step.name == "c":
                raise KeyboardInterrupt
            return child

    fakes = Pressed(turns=3)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", program(*CHAIN.nodes[:3], node("slow", {"text": "x"})), fakes)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["steps"]
    assert record["a"]["state"] == record["b"]["state"] == "done"
    assert record["c"]["state"] == "waiting"
    assert go(tmp_path / "run")[1].started[0] in ("c", "d")


@pytest.mark.usefixtures("writable")
def test_what_the_recipe_pushes_goes_up_with_the_recipe_once_all_is_done(
    server: HubServer, out: Path, tmp_path: Path
) -> None:
    def work(job: StepProcess) -> None:
        write_output(job)
        if job.step.name == "a":
            shutil.rmtree(job.paths.out)
            copy_of(out, job.paths.out)

    what = program(node("a"), node("b"), pushes=[Push("a", REPO, message="made", is_allowed=True)])
    failing, _ = go(tmp_path / "run", what, Fakes(work=work, codes={"b": 1}))
    assert failing.pushes == ()
    report, _ = go(tmp_path / "run", what, Fakes(work=work))
    assert [push["url"] for push in report.pushes] == [f"{server.url}/{REPO}"]
    card = files_at(server)["README.md"].decode()
    assert "`surgery run tried --file recipe.yaml`" in card
    assert f"```yaml\n{what.text.rstrip()}\n```" in card
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["pushes"][0]["commit"] == report.pushes[0]["commit"]


# From here on with the command line itself.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run that nothing disturbs makes."""
    folder = tmp_path_factory.mktemp("calm")
    write_recipe(folder, models)
    process = surgery_run(folder, "reasoning", "-o", "run")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert "Report: run/report.html" in err
    return outputs(folder / "run")


@pytest.mark.slow
def test_runs_that_are_killed_at_random_end_with_the_same_hashes(
    models: dict[str, Path], expected: dict[str, str], tmp_path: Path
) -> None:
    write_recipe(tmp_path, models)
    rng = random.Random(7)
    kills = 0
    for _ in range(6):
        process = surgery_run(tmp_path, "reasoning", "-o", "run", "--jobs", 2)
        try:
            process.communicate(timeout=rng.uniform(0.8, 3.5))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=SECONDS)
            kills += 1
    process = surgery_run(tmp_path, "reasoning", "-o", "run")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert kills >= 2
    assert outputs(tmp_path / "run") == expected


@pytest.mark.slow
def test_children_die_with_the_run_that_started_them(models: dict[str, Path], tmp_path: Path) -> None:
    write_recipe(tmp_path, models)
    process = surgery_run(tmp_path, "reasoning", "-o", "run", environment=hold_step(tmp_path / "held", "extract"))
    child = wait_for_held_step(tmp_path / "held", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    assert _gone(child)


@pytest.mark.slow
def test_ctrl_c_and_termination_say_that_the_same_command_goes_on(
    models: dict[str, Path], expected: dict[str, str], tmp_path: Path
) -> None:
    write_recipe(tmp_path, models)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        held = tmp_path / f"held {code}"
        process = surgery_run(tmp_path, "reasoning", "-o", "run", environment=hold_step(held, "extract"))
        child = wait_for_held_step(held, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == code
        assert "The same command goes on where it was." in err
        assert _gone(child)
    again = surgery_run(tmp_path, "reasoning", "-o", "run")
    _, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    assert outputs(tmp_path / "run") == expected


@pytest.mark.slow
def test_two_processes_of_a_launcher_make_what_one_makes(
    models: dict[str, Path], expected: dict[str, str], tmp_path: Path
) -> None:
    write_recipe(tmp_path, models)
    codes, said, printed = run_ranks(line_of(["run", "reasoning", "-o", "run"]), cwd=tmp_path)
    assert codes == [0, 0], said
    assert outputs(tmp_path / "run") == expected
    assert printed[1] == ""
    assert said[0].count("vector: done") == 1


def test_a_real_child_gets_no_shell_no_input_and_its_own_files(tmp_path: Path) -> None:
    odd = "$(touch gone); *"
    what = program(node("a", {"inputs": (odd,)}, command=make("inspect", writes=None)))
    report = run_pipeline(what, tmp_path / "run", runner=start, jobs=1)
    assert report.statuses["a"] == "failed"
    assert odd in (report.steps["a"].error or "")
    assert not (tmp_path / "gone").exists()


def _gone(process: int) -> bool:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in ("Z", "X"):
            return True
    return False
