"""The report of a run: one page with every step's line, what it printed and told, and the pictures that it made.

In come the program, the record of its run and what became of each step; out comes RUN/report.html, complete in itself.
A step's own report is a link, relative to the page, and its pictures stand here too.
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
from surgery.recipes.run.paths import STEPS, RunPaths, StepPaths, words
from surgery.recipes.run.state import RunRecord, last_lines
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.reporting.report import Column, Figure, PreformattedText, Report, Table, Value, format_value

PICTURES = "*.png"
OWN = "report.html"
PRINTED = 200_000  # characters of what a step printed that the page shows
TOLD = 20  # lines of what it told people that the page shows
LINE = 105  # characters of a line that fit on the page
MANY = 24  # pictures of a step that the page shows
LARGEST = 8_000_000  # bytes of one
_IMAGE = re.compile(r'<img alt="(?P<alt>[^"]*)" src="data:image/png;base64,(?P<data>[A-Za-z0-9+/=]+)">')
SAID = {
    "done": "Done in this run.",
    "unchanged": "Done before, and unchanged since: not done again.",
    "failed": "Failed.",
    "left out": "Left out, because a step that it needs failed.",
}


def write_report(
    program: Pipeline, places: RunPaths, record: RunRecord, endings: Mapping[str, str], path: Path
) -> Path:
    """Writes the page. Raises SurgeryError where it cannot be written."""
    report = Report(program.recipe, program.about)
    report.add(_table(program, record, endings))
    for node in program.nodes:
        place, known = places.of(node.name), record.steps[node.name]
        note = " ".join(part for part in (SAID[endings[node.name]], known.error or "") if part)
        line, text = _folded(words(node, places)), _said(place, places.run)
        report.add(PreformattedText(node.name, line, text, note, dict(_links(place, path.parent))))
        for figure in _figures(node, place):
            report.add(figure)
    report.add(PreformattedText("The recipe, with the values of this run", text=program.text))
    return write_file(path, report.to_html().encode())


def _table(program: Pipeline, record: RunRecord, endings: Mapping[str, str]) -> Table:
    rows: list[list[Value]] = []
    for node in program.nodes:
        known = record.steps[node.name]
        rows.append([node.name, node.command.name, endings[node.name], known.seconds, known.output])
    columns = [
        Column("step"),
        Column("command"),
        Column("state"),
        Column("seconds", "number"),
        Column("hash of its output"),
    ]
    seconds = sum(record.steps[node.name].seconds or 0.0 for node in program.nodes)
    note = f"All steps together took {format_value(float(seconds), 'number')} s when they were done."
    return Table("Steps", columns, rows, note=note)


def _folded(words: Sequence[str]) -> str:
    """A step as a person would type it, over as many lines as the page needs."""
    lines = ["surgery"]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) >= LINE and lines[-1].strip():
            lines[-1] += " \\"
            lines.append(f"   {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _said(place: StepPaths, run: Path) -> str:
    """What a step printed, and then what it told people (warnings, and what the tables amount to) with paths in RUN."""
    told = last_lines(place.log, TOLD).replace(f"{run}/{STEPS}/", f"{STEPS}/")
    return "\n\n".join(part for part in (_printed(place).rstrip(), told) if part)


def _printed(place: StepPaths) -> str:
    try:
        text = place.text.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if len(text) <= PRINTED else f"{text[:PRINTED]}\n… ({len(text):,} characters in {place.text.name})"


def _links(place: StepPaths, root: Path) -> Iterator[tuple[str, str]]:
    own = _reports(place)
    for each in own:
        inside = each.relative_to(place.out).as_posix()
        yield "its own report" if len(own) == 1 else inside, each.relative_to(root).as_posix()
    if place.log.is_file() and place.log.stat().st_size:
        yield "log", place.log.relative_to(root).as_posix()


def _reports(place: StepPaths) -> list[Path]:
    return sorted(place.out.rglob(OWN)) if place.out.is_dir() else []


def _figures(node: RecipeStep, place: StepPaths) -> Iterator[Figure]:
    """The pictures that a step drew: its command's, those in its folder, and those inside its own reports."""
    seen: set[bytes] = set()
    count = 0
    for title, png in _pictures(place):
        if png in seen or len(png) > LARGEST or count == MANY:
            continue
        seen.add(png)
        count += 1
        what = f"{node.name}: {title}" if title else node.name
        yield Figure(what, what, png)


def _pictures(place: StepPaths) -> Iterator[tuple[str, bytes]]:
    files = [place.picture] if place.picture.is_file() else []
    files += sorted(place.out.rglob(PICTURES)) if place.out.is_dir() else []
    for path in files:
        title = "" if path == place.picture else path.stem.replace("-", " ").replace("_", " ")
        try:
            yield title, path.read_bytes()
        except OSError as error:
            raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    for path in _reports(place):
        for image in _IMAGE.finditer(path.read_text(encoding="utf-8", errors="replace")):
            try:
                yield image["alt"], base64.b64decode(image["data"], validate=True)
            except binascii.Error:
                continue
