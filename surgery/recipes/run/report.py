"""Write RUN/report.html: every step's command line, output, log and pictures, on one self-contained page.

A step's own report is a link, relative to the page, and its pictures are repeated here.
"""

from __future__ import annotations

import base64
import binascii
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.io.atomic import write_file
from surgery.recipes.run.paths import STEPS, RunPaths, StepPaths, cli_arguments
from surgery.recipes.run.state import RunRecord, last_lines
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.reporting.report import Column, Figure, PreformattedText, Report, Table, Value, format_value

PICTURES = "*.png"
STEP_REPORT = "report.html"
MOST_CHARACTERS = 200_000  # characters of what a step printed that the page shows
LOG_LINES = 20  # last lines of its log that the page shows
LINE_WIDTH = 105  # characters that fit on the page
MOST_PICTURES = 24  # pictures of a step that the page shows
LARGEST_PICTURE = 8_000_000  # bytes; the page holds them all, in base64
_IMAGE = re.compile(r'<img alt="(?P<alt>[^"]*)" src="data:image/png;base64,(?P<data>[A-Za-z0-9+/=]+)">')
STATUS_NOTES = {
    "done": "Done in this run.",
    "unchanged": "Done before, and unchanged since: not done again.",
    "failed": "Failed.",
    "left out": "Left out, because a step that it needs failed.",
}


def write_report(
    pipeline: Pipeline, paths: RunPaths, record: RunRecord, statuses: Mapping[str, str], path: Path
) -> Path:
    """Write the page to `path`, and return it. Raises SurgeryError if it cannot be written."""
    report = Report(pipeline.recipe, pipeline.about)
    report.add(_table(pipeline, record, statuses))
    for step in pipeline.nodes:
        step_paths, known = paths.of(step.name), record.steps[step.name]
        note = " ".join(part for part in (STATUS_NOTES[statuses[step.name]], known.error or "") if part)
        line, text = _wrap(cli_arguments(step, paths)), _output_text(step_paths, paths.run)
        report.add(PreformattedText(step.name, line, text, note, dict(_links(step_paths, path.parent))))
        for figure in _figures(step, step_paths):
            report.add(figure)
    report.add(PreformattedText("The recipe, with the values of this run", text=pipeline.text))
    return write_file(path, report.to_html().encode())


def _table(pipeline: Pipeline, record: RunRecord, statuses: Mapping[str, str]) -> Table:
    rows: list[list[Value]] = []
    for step in pipeline.nodes:
        known = record.steps[step.name]
        rows.append([step.name, step.command.name, statuses[step.name], known.seconds, known.output])
    columns = [
        Column("step"),
        Column("command"),
        Column("state"),
        Column("seconds", "number"),
        Column("hash of its output"),
    ]
    seconds = sum(record.steps[step.name].seconds or 0.0 for step in pipeline.nodes)
    note = f"All steps together took {format_value(float(seconds), 'number')} s when they were done."
    return Table("Steps", columns, rows, note=note)


def _wrap(arguments: Sequence[str]) -> str:
    """Return a command line as a person would type it, broken into lines that fit on the page."""
    lines = ["surgery"]
    for word in map(shlex.quote, arguments):
        if len(lines[-1]) + len(word) >= LINE_WIDTH and lines[-1].strip():
            lines[-1] += " \\"
            lines.append(f"   {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _output_text(step_paths: StepPaths, run: Path) -> str:
    """Return what a step printed, then the end of its log, with paths relative to RUN."""
    log = last_lines(step_paths.log, LOG_LINES).replace(f"{run}/{STEPS}/", f"{STEPS}/")
    return "\n\n".join(part for part in (_printed(step_paths).rstrip(), log) if part)


def _printed(step_paths: StepPaths) -> str:
    try:
        text = step_paths.text.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return (
        text
        if len(text) <= MOST_CHARACTERS
        else f"{text[:MOST_CHARACTERS]}\n… ({len(text):,} characters in {step_paths.text.name})"
    )


def _links(step_paths: StepPaths, root: Path) -> Iterator[tuple[str, str]]:
    reports = _reports(step_paths)
    for each in reports:
        inside = each.relative_to(step_paths.out).as_posix()
        yield "its own report" if len(reports) == 1 else inside, each.relative_to(root).as_posix()
    if step_paths.log.is_file() and step_paths.log.stat().st_size:
        yield "log", step_paths.log.relative_to(root).as_posix()


def _reports(step_paths: StepPaths) -> list[Path]:
    return sorted(step_paths.out.rglob(STEP_REPORT)) if step_paths.out.is_dir() else []


def _figures(step: RecipeStep, step_paths: StepPaths) -> Iterator[Figure]:
    """Yield the pictures of a step: its command's, those in its output, and those inside its own reports."""
    shown: set[bytes] = set()
    count = 0
    for title, png in _pictures(step_paths):
        # A step's own report holds the pictures of its folder once more.
        if png in shown or len(png) > LARGEST_PICTURE or count == MOST_PICTURES:
            continue
        shown.add(png)
        count += 1
        what = f"{step.name}: {title}" if title else step.name
        yield Figure(what, what, png)


def _pictures(step_paths: StepPaths) -> Iterator[tuple[str, bytes]]:
    files = [step_paths.picture] if step_paths.picture.is_file() else []
    files += sorted(step_paths.out.rglob(PICTURES)) if step_paths.out.is_dir() else []
    for path in files:
        title = "" if path == step_paths.picture else path.stem.replace("-", " ").replace("_", " ")
        try:
            yield title, path.read_bytes()
        except OSError as error:
            raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    for path in _reports(step_paths):
        # By a pattern, not a parser: these pages are our own, and their pictures always written like this.
        for image in _IMAGE.finditer(path.read_text(encoding="utf-8", errors="replace")):
            try:
                yield image["alt"], base64.b64decode(image["data"], validate=True)
            except binascii.Error:
                continue
