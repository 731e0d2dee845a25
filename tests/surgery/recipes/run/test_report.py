"""Promises of recipes.run.report and display: what every step printed and drew on one page; lines while it runs."""

from __future__ import annotations

import base64
import html
import io
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from support.recipe_runs import Fakes, make, node, program, write_output

from surgery.recipes.run.progress_display import MOST_ROWS, BarDisplay, LineDisplay, format_progress
from surgery.recipes.run.report import _wrap
from surgery.recipes.run.scheduler import run_pipeline
from surgery.recipes.run.subprocesses import StepProcess
from surgery.recipes.types import StepOutput
from surgery.reporting.report import Figure, Report
from surgery.runtime.progress import FILE, ProgressEvent, read_progress, terminal

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
OTHER = PNG + b"other"


def work(job: StepProcess) -> None:
    write_output(job)
    job.paths.log.write_text("said\n")
    if job.step.name == "a":
        (job.paths.out / "curve.png").write_bytes(PNG)
        Report("Own", "").add(Figure("again", "", PNG)).add(Figure("heads", "", OTHER)).write(
            job.paths.out / "report.html"
        )
    if job.step.command.plots:
        job.paths.picture.write_bytes(PNG)


@pytest.fixture
def page(tmp_path: Path) -> str:
    drawing = make("diff", writes=None, plots="--plot")
    what = program(
        node("a", {"text": "<b>"}), node("b", {"inputs": (StepOutput("a"),)}, command=drawing), node("c", {"count": 3})
    )
    report = run_pipeline(what, tmp_path / "run", runner=Fakes(work=work, codes={"c": 1}), jobs=1)
    assert report.report == tmp_path / "run" / "report.html"
    return report.report.read_text(encoding="utf-8")


def test_every_step_is_there_with_its_line_and_what_it_printed(page: str) -> None:
    lines = re.findall(r'<pre class="line">([^<]*)</pre>', page)
    words = shlex.split(html.unescape(lines[0]).replace("\\\n", ""))
    assert words[:-1] == ["surgery", "make", "--text", "<b>", "--out"] and words[-1].endswith("steps/a/out")
    assert "<pre>make --text &lt;b&gt;" in page
    assert page.index("<h2>a</h2>") < page.index("<h2>b</h2>") < page.index("<h2>c</h2>")


def test_pictures_of_the_folder_of_its_report_and_of_the_command_are_inside_once(page: str) -> None:
    titles = re.findall(r'<img alt="([^"]*)"', page)
    assert titles == ["a: curve", "a: heads", "b"]
    assert page.count(base64.b64encode(OTHER).decode()) == 1


def test_a_steps_own_report_is_a_link_beside_the_page(page: str) -> None:
    assert '<a href="steps/a/out/report.html">its own report</a>' in page
    assert 'href="steps/c/log.txt"' in page


def test_what_failed_is_told_with_its_reason(page: str) -> None:
    assert "Failed. looked<br>error: it is broken" in page


def test_what_was_done_before_is_told(tmp_path: Path) -> None:
    for _ in range(2):
        report = run_pipeline(program(node("a")), tmp_path / "run", runner=Fakes(), jobs=1)
    assert report.report is not None
    assert "Done before, and unchanged since: not done again." in report.report.read_text(encoding="utf-8")


def test_the_recipe_ends_the_page(page: str) -> None:
    assert page.rindex("recipes: {tried: {}}") > page.index("<h2>c</h2>")


def test_a_long_line_is_wrap_as_a_shell_reads_it() -> None:
    words = ["make", "x" * 60, "--text", "two words", "y" * 120, "z"]
    text = _wrap(words)
    assert shlex.split(text.replace("\\\n", "")) == ["surgery", *words]
    assert [len(line) > 107 for line in text.split("\n")] == [False, True, False]


def test_what_a_step_told_people_stands_below_what_it_printed(tmp_path: Path) -> None:
    def telling(job: StepProcess) -> None:
        write_output(job)
        job.paths.text.write_text("a table\n" if job.step.name == "a" else "")
        job.paths.log.write_text("\n".join(f"line {n}" for n in range(30)))

    report = run_pipeline(program(node("a"), node("b")), tmp_path / "run", runner=Fakes(work=telling), jobs=1)
    assert report.report is not None
    page = report.report.read_text(encoding="utf-8")
    assert "<pre>a table\n\nline 10\n" in page and page.count("line 29</pre>") == 2


def test_a_table_of_many_steps_shows_those_that_matter(tmp_path: Path) -> None:
    rows = BarDisplay([f"s{n}" for n in range(MOST_ROWS + 9)], Console(file=io.StringIO()))
    for n, state in enumerate([*["done"] * 20, "failed", "left out", "unchanged"]):
        rows.ended(f"s{n}", state, 1.0)
    rows.started("s30", tmp_path)
    console = Console(file=io.StringIO(), width=120)
    console.print(rows.render())
    shown = console.file.getvalue()
    assert all(f"s{n} " in shown for n in (20, 21, 30)) and "s22 " not in shown
    assert "and 9 more: 1 running, 1 failed, 1 left out, 15 waiting, 20 done, 1 unchanged" in " ".join(shown.split())


def test_where_no_table_can_be_drawn_each_beginning_and_end_is_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    lines = LineDisplay(said.append)
    lines.started("a", tmp_path)
    lines.ended("a", "done", 1.25)
    lines.ended("b", "unchanged", 0.0)
    assert said == ["a: started", "a: done (1.2 s)", "b: unchanged"]


def test_a_step_that_runs_long_has_a_line_every_half_minute(tmp_path: Path) -> None:
    said: list[str] = []
    now = [0.0]
    lines = LineDisplay(said.append, clock=lambda: now[0])
    (tmp_path / "a.json").write_text(
        '{"label": "Writing", "done": 30, "total": 120, "unit": "steps", "note": "loss 2"}'
    )
    lines.started("a", tmp_path / "a.json")
    now[0] = 20.0
    lines.started("b", tmp_path / "none.json")
    for second in range(20, 95):
        now[0] = float(second)
        lines.refresh()
    lines.ended("a", "done", 94.0)
    now[0] = 120.0
    lines.refresh()
    far = "Writing: 30 of 120 (25 %), loss 2"
    assert said == [
        "a: started",
        "b: started",
        f"a: running for 30 s, {far}",
        "b: running for 30 s",
        f"a: running for 1 min 00 s, {far}",
        "b: running for 1 min 00 s",
        f"a: running for 1 min 30 s, {far}",
        "a: done (94.0 s)",
        "b: running for 1 min 40 s",
    ]


def test_a_child_tells_its_progress_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.json"
    monkeypatch.setenv(FILE, str(file))
    with terminal("Writing", 10, "steps") as advance:
        assert read_progress(file) == ProgressEvent("Writing", 0, 10, "steps")
        advance(4, "loss 2.0")
        advance(6)
        assert read_progress(file) == ProgressEvent("Writing", 10, 10, "steps", "loss 2.0")
    assert format_progress(read_progress(file)) == f"{'━' * 20} 10 of 10 Writing loss 2.0"
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_a_child_that_nobody_listens_to_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    with terminal("Writing", 10, "steps") as advance:
        advance(10)
    assert not list(tmp_path.iterdir())


def test_a_file_that_says_nothing_readable_is_no_progress(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"label": ')
    assert read_progress(tmp_path / "progress.json") is None
    assert format_progress(None) == ""
