"""What every kind of findings shares: a folder with results.json, the examples, and the model that all of it is of.

In go pydantic records, out come files that appear whole or not at all; reading checks version, kind and every field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from probes.data.examples import Example
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.statistics import EstimateWithInterval
from surgery.io.atomic import MANIFEST, write_file
from surgery.io.json_io import read_json, to_json
from surgery.io.json_records import Strict, record_text
from surgery.io.json_records import read_record as read_file
from surgery.reporting.report import MISSING

SCHEMA = 1
RESULTS, EXAMPLES, REPORT = "results.json", "examples.jsonl", "report.html"


class FindingsRecord(Strict):
    """Part of a results.json: checked when it is read, never changed."""


class IntervalRecord(FindingsRecord):
    """A value with its 95 % interval; None where the data allow no number."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def estimate(self) -> EstimateWithInterval:
        """The same for pictures: NaN for what is not known."""
        known = [math.nan if number is None else number for number in (self.value, self.low, self.high)]
        return EstimateWithInterval(known[0], known[1], known[2])

    def text(self, form: str = ".3f") -> str:
        """`0.998 [0.997, 0.999]`, by the format `form`; a dash where nothing is known."""
        if self.value is None:
            return MISSING
        if self.low is None or self.high is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


class ModelRecord(FindingsRecord):
    """Which model: `xxh3` is the hash of all its weights (`surgery.engine.verification`)."""

    ref: str
    repo_id: str | None
    revision: str | None
    xxh3: str
    tokenizer: str
    template: str
    dtype: str


class DataRecord(FindingsRecord):
    """Which data: the hash of its rows, and the commit of a Hub data set."""

    ref: str
    revision: str | None
    xxh3: str


class ModelFindings(Protocol):
    """Findings of some kind."""

    @property
    def model(self) -> ModelRecord: ...


R = TypeVar("R", bound=FindingsRecord)


def read_record(run: Path, kind: str, record: type[R]) -> R:
    """The findings of `kind` in the folder `run`.

    Raises:
        SurgeryError: there is no such folder, it holds something else, or findings of another version.
    """
    path = run / RESULTS
    if not path.is_file():
        raise usage_error(
            f"has no {RESULTS}", where=run, hint=f"Give a folder that `surgery probe {kind} … -o RUN` wrote."
        )
    return read_file(path, kind, SCHEMA, record, again="Probe the model again")


def write_record(folder: Path, kind: str, record: FindingsRecord, model: ModelRecord) -> None:
    """Writes results.json, whole or not at all, and the manifest that marks the folder as ours."""
    write_file(folder / RESULTS, record_text(kind, SCHEMA, record))
    write_file(folder / MANIFEST, to_json({"schema": SCHEMA, "kind": kind, "model": model.model_dump(mode="json")}))


def findings_kind(run: Path) -> str | None:
    """The kind of findings in `run`; None where there are none."""
    held = read_json(run / RESULTS, missing={})
    kind = held.get("kind")
    return kind if isinstance(kind, str) else None


def check_model(findings: ModelFindings, checkpoint: Checkpoint, run: Path, *, options: ExecutionOptions) -> None:
    """Raises SurgeryError where `checkpoint` is not the model that `findings` are of."""
    found = weights_hash(checkpoint, options=options)
    if found != findings.model.xxh3:
        raise usage_error(
            f"its findings are of {findings.model.ref} with the weights {findings.model.xxh3[:12]}…, but "
            f"{checkpoint.ref} has the weights {found[:12]}…",
            where=run,
            hint="Probe this model first; findings of another one say nothing about it.",
        )


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Writes examples.jsonl."""
    rows = [json.dumps(asdict(example), ensure_ascii=False, default=str) for example in examples]
    write_file(folder / EXAMPLES, "\n".join(rows) + "\n")


def read_examples(run: Path) -> list[Example]:
    """The examples that a run probed. Raises SurgeryError."""
    path = run / EXAMPLES
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Example(**{**row, "messages": tuple(row["messages"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SurgeryError(f"cannot be read ({error})", where=path, hint="Probe the model again.") from error


def interval_record(estimate: Any, n: int | None = None) -> IntervalRecord:
    """An estimate (value, low, high) as it is stored: NaN as None."""
    known = [None if number != number else float(number) for number in (estimate.value, estimate.low, estimate.high)]
    return IntervalRecord(value=known[0], low=known[1], high=known[2], n=n)


def parse_top(text: str, of: int, *, where: str = "--top") -> int:
    """`3 %` of `of`, rounded up, or a count: `5`. Raises SurgeryError where that is none of them, or none at all."""
    word = text.strip()
    try:
        # Rounded first: 7 % of 100 is 7.000000000000001 in floating point.
        count = math.ceil(round(float(word[:-1]) / 100 * of, 9)) if word.endswith("%") else int(word)
    except (ValueError, OverflowError) as error:
        raise usage_error(f"got {text!r}, expected a share such as 3% or a count", where=where) from error
    if not 0 < count <= of:
        raise usage_error(f"got {text!r}, which is {count} of {of}, expected 1 to {of}", where=where)
    return count
