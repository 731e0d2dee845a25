"""Read and write what all kinds of findings share: results.json, the examples, and the record of the model.

Records are pydantic models. Files are written atomically; reading checks version, kind and every field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter

from probes.data.examples import Example
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.statistics import EstimateWithInterval
from surgery.io.atomic import MANIFEST, write_file
from surgery.io.escaping import json_text
from surgery.io.input_files import MAX_DATA_BYTES, read_bytes
from surgery.io.json_io import read_json, to_json
from surgery.io.json_records import Strict, record_text
from surgery.io.json_records import read_record as read_file
from surgery.io.safe_paths import contained_file, find_file
from surgery.models.choices import SpecialTokens
from surgery.reporting.report import MISSING

SCHEMA = 1
RESULTS, EXAMPLES, REPORT = "results.json", "examples.jsonl", "report.html"


class FindingsRecord(Strict):
    """Base of the records in a results.json: validated when read, immutable."""


class IntervalRecord(FindingsRecord):
    """A value with its 95 % interval; None where the data do not determine it."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def estimate(self) -> EstimateWithInterval:
        """The same for plots: NaN for None."""
        known = [math.nan if number is None else number for number in (self.value, self.low, self.high)]
        return EstimateWithInterval(known[0], known[1], known[2])

    def text(self, form: str = ".3f") -> str:
        """Return `0.998 [0.997, 0.999]`, in the format `form`; a dash without a value."""
        if self.value is None:
            return MISSING
        if self.low is None or self.high is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


class ModelRecord(FindingsRecord):
    """The probed model; `xxh3` is the hash of all its weights (`surgery.engine.verification`)."""

    ref: str
    repo_id: str | None
    revision: str | None
    xxh3: str
    tokenizer: str
    template: str
    dtype: str


class DataRecord(FindingsRecord):
    """A data set: `xxh3` is the hash of its rows, `revision` the commit of a Hub data set."""

    ref: str
    revision: str | None
    xxh3: str


class ModelFindings(Protocol):
    """Findings of any kind: they have a record of the model."""

    @property
    def model(self) -> ModelRecord: ...


R = TypeVar("R", bound=FindingsRecord)


def read_record(run: Path, kind: str, record: type[R]) -> R:
    """Read the findings of `kind` in the folder `run`.

    Raises:
        SurgeryError: there is no such folder, or it contains something else, or findings of another version.
    """
    path = find_file(run, RESULTS)
    if path is None:
        raise usage_error(
            f"has no {RESULTS}", where=run, hint=f"Give a folder that `surgery probe {kind} … -o RUN` wrote."
        )
    return read_file(path, kind, SCHEMA, record, again="Probe the model again")


def write_record(folder: Path, kind: str, record: FindingsRecord, model: ModelRecord) -> None:
    """Write results.json and the manifest that marks the folder as an output of this tool."""
    write_file(folder / RESULTS, record_text(kind, SCHEMA, record))
    write_file(folder / MANIFEST, to_json({"schema": SCHEMA, "kind": kind, "model": model.model_dump(mode="json")}))


def findings_kind(run: Path) -> str | None:
    """Return the kind of findings in `run`; None if there are none."""
    path = find_file(run, RESULTS)
    kind = None if path is None else read_json(path).get("kind")
    return kind if isinstance(kind, str) else None


def check_model(findings: ModelFindings, checkpoint: Checkpoint, run: Path, *, options: ExecutionOptions) -> None:
    """Raise SurgeryError if `checkpoint` is not the model that `findings` are of."""
    actual = weights_hash(checkpoint, options=options)
    if actual != findings.model.xxh3:
        raise usage_error(
            f"its findings are of {findings.model.ref} with the weights {findings.model.xxh3[:12]}…, but "
            f"{checkpoint.ref} has the weights {actual[:12]}…",
            where=run,
            hint="Probe this model first; findings of another one say nothing about it.",
        )


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write examples.jsonl."""
    records = [asdict(example) for example in examples]
    for record in records:
        # Only where it says something: most data hold no special tokens.
        if not record["literal"]:
            del record["literal"]
    rows = [json_text(json.dumps(record, ensure_ascii=False, default=str)) for record in records]
    write_file(folder / EXAMPLES, "\n".join(rows) + "\n")


def read_examples(run: Path) -> list[Example]:
    """Read the examples that a run probed. Raises SurgeryError."""
    path = contained_file(run, EXAMPLES)
    try:
        # Not splitlines: JSON strings may contain line separators of Unicode.
        rows = [json.loads(line) for line in read_bytes(path, limit=MAX_DATA_BYTES).decode().split("\n") if line]
        for row in rows:
            Example(**row)  # a key that is not known is an error
        return TypeAdapter(list[Example]).validate_python(rows)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SurgeryError(f"cannot be read ({error})", where=path, hint="Probe the model again.") from error


def interval_record(estimate: Any, n: int | None = None) -> IntervalRecord:
    """Return the record of an estimate (value, low, high), with None for NaN, which JSON does not have."""
    value, low, high = (None if math.isnan(x) else float(x) for x in (estimate.value, estimate.low, estimate.high))
    return IntervalRecord(value=value, low=low, high=high, n=n)


def special_tokens_record(special_tokens: SpecialTokens) -> dict[str, str]:
    """Return the entry of a run's settings; none for text, the default."""
    return {} if special_tokens == "text" else {"special_tokens": special_tokens}


def parse_top(text: str, of: int, *, where: str = "--top") -> int:
    """Return the number that `3 %` of `of` (rounded up) or a count such as `5` means. Raises SurgeryError."""
    word = text.strip()
    try:
        # Rounded first: 7 % of 100 is 7.000000000000001 in floating point, which would be rounded up to 8.
        count = math.ceil(round(float(word[:-1]) / 100 * of, 9)) if word.endswith("%") else int(word)
    except (ValueError, OverflowError) as error:
        raise usage_error(f"got {text!r}, expected a share such as 3% or a count", where=where) from error
    if not 0 < count <= of:
        raise usage_error(f"got {text!r}, which is {count} of {of}, expected 1 to {of}", where=where)
    return count
