"""Tables and figures of scores of models side by side, and the scores stored beside a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import SurgeryError
from surgery.evaluation.perplexity import BITS, PERPLEXITY
from surgery.evaluation.scoring import Score
from surgery.io.atomic import MANIFEST, disk_error, write_file
from surgery.io.escaping import markdown_block
from surgery.io.hashing import KEY, hash_tensors
from surgery.io.input_files import MAX_TEXT_BYTES, read_given_text
from surgery.io.json_io import read_json, to_json
from surgery.io.safe_paths import contained_file, find_file
from surgery.reporting.report import Column, Figure, Table, Value, format_value

CARD = "README.md"
SCORES = "scores.json"
SCHEMA = 1
BEGIN, END = "<!-- surgery eval: begin -->", "<!-- surgery eval: end -->"
BEST, WORSE = "★", "▽"
ARROWS = {True: " ↑", False: " ↓", None: ""}


def score_table(scores: Sequence[Score]) -> Table:
    """Return a table of `value [95 % interval]`: one row per task and metric, one column per model.

    ★: the best value of the row. ▽: worse than that, with intervals that do not touch. Neither is given where the
    metric's good direction is not known, or where all values are equal.
    """
    models = list(dict.fromkeys(score.model for score in scores))
    rows: list[list[Value]] = []
    for (task, metric), row in _rows(scores).items():
        arrow = ARROWS[next(iter(row.values())).higher_is_better]
        counts = list(dict.fromkeys(score.n for score in row.values()))
        cells = [_cell(row[model], row) if model in row else None for model in models]
        rows.append([task, metric + arrow, *cells, " / ".join(format_value(n, "count") for n in counts)])
    columns = [Column("task"), Column("metric"), *map(Column, models), Column("n")]
    return Table("Scores", columns, rows, note=_note(scores))


def score_figure(scores: Sequence[Score]) -> Figure:
    """Return the table as a bar chart with a panel per task and metric."""
    from surgery.reporting.plots import plot_score_bars

    panels, best = {}, {}
    for (task, metric), row in _rows(scores).items():
        panel = f"{task}, {metric}{ARROWS[next(iter(row.values())).higher_is_better]}"
        panels[panel] = row
        if (winner := _best(row)) is not None:
            best[panel] = [model for model, score in row.items() if score.value == winner.value]
    return plot_score_bars("Scores with 95 % intervals", panels, best=best)


def losses(scores: Sequence[Score], model: str) -> list[str]:
    """Return a sentence for each row of the table in which `model` is marked as worse than the best."""
    sentences = []
    for (task, metric), row in _rows(scores).items():
        best = _best(row)
        if best is not None and model in row and _is_worse(row[model], best):
            rule = _rule(row)
            sentences.append(
                f"{model} is worse than {best.model} on {task}: {metric} {format_value(row[model].value, rule)} "
                f"against {format_value(best.value, rule)}, and their 95 % intervals do not touch."
            )
    return sentences


def is_result(checkpoint: Checkpoint) -> bool:
    """Whether `checkpoint` is a local folder that this tool wrote, whose card may be changed."""
    return checkpoint.folder is not None and checkpoint.repo_id is None and (checkpoint.folder / MANIFEST).is_file()


def write_scores(folder: Path, scores: Sequence[Score], command: str) -> Path:
    """Write the table of `scores`, and the `command` that made it, under `## Scores` in the folder's README.md.

    An existing section is replaced and nothing else is touched; the file changes whole or not at all. The numbers are
    stored beside it, in scores.json, for `read_scores`. Returns the path of the card.

    Raises:
        SurgeryError: the folder has no surgery.json; the markers around the section are damaged; the file cannot be
            read or written.
    """
    if not (folder / MANIFEST).is_file():
        raise SurgeryError(f"has no {MANIFEST}: only cards of folders that this tool wrote are changed", where=folder)
    path = folder / CARD
    _, _, table = score_table(scores).to_markdown().partition("\n\n")  # its title is the section's
    section = f"{BEGIN}\n## Scores\n\n{table}\n\n{markdown_block(command)}\n{END}\n"
    try:
        card = "" if find_file(folder, CARD) is None else read_given_text(path, limit=MAX_TEXT_BYTES)
        write_file(path, _with_section(card, section, path))
    except UnicodeDecodeError as error:
        raise SurgeryError("is not UTF-8", where=path) from error
    except OSError as error:
        raise disk_error(error, path) from error
    # Which of the models is the folder's own must be stored now: their names are paths, which mean something else
    # later or in another working directory.
    own = next((score.model for score in scores if Path(score.model).expanduser().resolve() == folder.resolve()), None)
    record = {"schema": SCHEMA, "command": command, "model": own, "weights": _weights(folder), "scores": scores}
    write_file(folder / SCORES, to_json(record))
    return path


@dataclass(frozen=True)
class OwnScores:
    """The scores of a result itself, and the command that measured them."""

    command: str
    scores: tuple[Score, ...]


def read_scores(folder: Path) -> OwnScores | None:
    """Read the scores of the model in `folder` from scores.json; None if there are none for its present weights.

    Raises:
        SurgeryError: scores.json is damaged, or of another schema.
    """
    path = folder / SCORES
    record = {} if find_file(folder, SCORES) is None else read_json(path)
    if not record:
        return None
    if record.get("schema") != SCHEMA:
        raise SurgeryError(
            f"has schema {record.get('schema')!r}, this version reads {SCHEMA}", where=path, hint="Score it again."
        )
    if record.get("weights") != _weights(folder):
        return None  # copied from the source model: they are not scores of these weights
    try:
        scores = [_score(entry) for entry in record["scores"]]
        own = tuple(score for score in scores if score.model == record["model"])
        return OwnScores(str(record["command"]), own) if own else None
    except (KeyError, TypeError, AttributeError) as error:
        raise SurgeryError("is damaged", where=path, hint="Score the model again, or remove the file.") from error


def _score(entry: Mapping[str, Any]) -> Score:
    # JSON has no NaN.
    known = {name: math.nan if entry[name] is None else entry[name] for name in ("value", "low", "high")}
    return Score(**{**{field.name: entry[field.name] for field in fields(Score)}, **known})


def _weights(folder: Path) -> str:
    """Return the hash of all tensors that the folder's manifest lists."""
    path = contained_file(folder, MANIFEST)
    tensors = read_json(path).get("tensors") or {}
    try:
        return hash_tensors({name: entry[KEY] for name, entry in tensors.items()})
    except (AttributeError, KeyError, TypeError) as error:
        raise SurgeryError('"tensors" names no hashes', where=path, hint="Fetch the file again.") from error


def _rows(scores: Sequence[Score]) -> dict[tuple[str, str], dict[str, Score]]:
    """Group scores: (task, metric) → model → score."""
    rows: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault((score.task, score.metric), {})[score.model] = score
    return rows


def _best(row: Mapping[str, Score]) -> Score | None:
    """Return the best of a row; None if all are equal, or it is not known what is better."""
    known = [score for score in row.values() if not math.isnan(score.value)]
    # With one value, or equal ones, a star would claim a difference that is not there.
    if len({score.value for score in known}) < 2 or known[0].higher_is_better is None:
        return None
    choose = max if known[0].higher_is_better else min
    return choose(known, key=lambda score: score.value)


def _is_worse(score: Score, best: Score) -> bool:
    """Whether the two intervals do not touch; False if one is not known."""
    return score.high < best.low if best.higher_is_better else score.low > best.high


def _cell(score: Score, row: Mapping[str, Score]) -> str:
    rule, best = _rule(row), _best(row)
    interval = "" if math.isnan(score.low) else f" [{format_value(score.low, rule)}, {format_value(score.high, rule)}]"
    mark = ""
    if best is not None and score.value == best.value:
        mark = f" {BEST}"
    elif best is not None and _is_worse(score, best):
        mark = f" {WORSE}"
    return f"{format_value(score.value, rule)}{interval}{mark}"


def _rule(row: Mapping[str, Score]) -> Literal["score", "number"]:
    """Three decimals for shares; four digits for numbers of any size."""
    return "number" if any(abs(score.value) > 1 for score in row.values()) else "score"


def _note(scores: Sequence[Score]) -> str:
    note = "In brackets: 95 % intervals. ↑ higher is better, ↓ lower."
    if len({score.model for score in scores}) > 1:
        note += f" {BEST} the best of the row; {WORSE} worse than that, and the intervals do not touch."
    if any(score.metric == PERPLEXITY for score in scores):
        note += f" {PERPLEXITY.capitalize()} compares only between models of one tokenizer, {BITS} between all."
    return note


def _with_section(card: str, section: str, path: Path) -> str:
    """Return `card` with `section` in place of the one it has, else at its end."""
    # Markers that are missing or doubled leave open what belongs to the section: replacing it could delete text.
    begins, ends = card.count(BEGIN), card.count(END)
    if (begins, ends) == (0, 0):
        return f"{card.rstrip()}\n\n{section}" if card.strip() else section
    before, _, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if (begins, ends) != (1, 1) or not end:
        raise SurgeryError(
            f"does not have each of {BEGIN} and {END} once, in this order",
            where=path,
            hint="Remove what is left of the section, or leave the card alone with --no-card.",
        )
    return before + section.rstrip("\n") + after
