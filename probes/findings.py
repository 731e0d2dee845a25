"""What probing a model found, as a folder: RUN/results.json, the tensors beside it, the examples, the report.

    results.json         `Findings`: everything that tables are made of
    probes.safetensors   one probe per depth (`linear.Probes`)
    traces.safetensors   `scores`: the last depth's refusal score of every token, one example after the other (fp32);
                         `all`: the same at every depth (fp16, tokens × depths); `ends`: (N, 4) ends of the segments
    heads.safetensors    `exact` and `paper`: (N, layers, heads), NaN where a layer has none; `layer.{l}`: (heads,
                         head_dim) the mean input of the output projection at the last token before the answer
    examples.jsonl       the examples with thinking, response and verdict, in the order of all tensors
    report.html          tables and pictures

Findings are of one model: its weights' hash is among them, and an edit of another model refuses them.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from probes.examples import Example
from surgery.checkpoint import MANIFEST, Checkpoint, read_json
from surgery.errors import SurgeryError, usage_error
from surgery.execute import Options
from surgery.heads import Head
from surgery.identity import weights_hash
from surgery.jsonable import to_json
from surgery.writer import disk_error, sync

SCHEMA = 1
KIND = "refusal"
RESULTS, PROBES, TRACES, HEADS, EXAMPLES, REPORT = (
    "results.json", "probes.safetensors", "traces.safetensors", "heads.safetensors", "examples.jsonl", "report.html",
)  # fmt: skip


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Record):
    """A value with its 95 % interval; None where the data allow no number."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


class ModelRecord(_Record):
    """Which model: `xxh3` is the hash of all its weights (`surgery.identity`)."""

    ref: str
    repo_id: str | None
    revision: str | None
    xxh3: str
    tokenizer: str
    template: str
    dtype: str


class DataRecord(_Record):
    """Which data: the hash of its rows, and the commit of a Hub data set."""

    ref: str
    revision: str | None
    xxh3: str


class ProbeRecord(_Record):
    """How well the probe of one depth tells refusals from answers, out of fold."""

    depth: int
    auroc: Interval
    accuracy: Interval
    balanced_accuracy: float | None
    ece: float | None
    brier: float | None
    selectivity: float | None


class CliffRecord(_Record):
    """The cliffs of one cell; see `cliffs.CellCliffs`."""

    cell: str
    n: int
    plateau: Interval
    p90: Interval
    last: Interval
    final: Interval
    misalignment: Interval
    onset: float | None


class HeadRecord(_Record):
    """A head's attribution: mean over the examples that heads were scored on, with a bootstrap interval.

    exact: in units of the probe's logit. paper: along the unit probe direction, norm not folded in.
    """

    layer: int
    head: int
    exact: Interval | None
    paper: Interval

    @property
    def name(self) -> Head:
        return Head(self.layer, self.head)


class StepRecord(_Record):
    """A set of ablated heads: what it does to the probe, to answers, and to harmless text."""

    heads: list[str]
    score: Interval
    refusal: Interval | None = None
    harmless_refusal: Interval | None = None
    kl: Interval | None = None
    perplexity: float | None = None


class EffectRecord(_Record):
    """One head's causal effect on the probe's logit."""

    layer: int
    head: int
    effect: Interval


class CausalRecord(_Record):
    """The causal proof: single heads, greedy sets, and random sets of the same sizes as the control."""

    ablation: str
    positions: str
    method: str
    cell: str
    n: int
    effects: list[EffectRecord]
    spearman: Interval
    candidates: list[str]
    base: StepRecord
    steps: list[StepRecord]
    stopped: str
    control: list[list[StepRecord]]
    kl_budget: float


class Findings(_Record):
    """Everything that one probing run found. `settings` are the options it ran with."""

    model: ModelRecord
    data: DataRecord
    settings: dict[str, Any]
    markers: dict[str, str] | None
    cells: dict[str, int]
    never_closed: int
    generated: int
    warnings: list[str]
    folds: int
    probes: list[ProbeRecord]
    transfer: list[ProbeRecord] | None
    transfer_data: DataRecord | None
    depth: int
    cliffs: list[CliffRecord]
    onset_cell: str | None
    heads_cell: str
    heads_n: int
    heads: list[HeadRecord]
    attribution: Literal["exact", "paper"]
    unexplained: float | None
    skipped_layers: list[int]
    causal: CausalRecord | None = None

    @property
    def ranked(self) -> list[HeadRecord]:
        """The heads, those that most suppress refusal first."""
        return sorted(self.heads, key=lambda row: (self.score_of(row), row.name))

    def score_of(self, row: HeadRecord) -> float:
        """The attribution that heads are ranked by: below 0 it writes against refusal."""
        chosen = row.exact if self.attribution == "exact" else row.paper
        assert chosen is not None and chosen.value is not None
        return chosen.value


def read_findings(run: Path) -> Findings:
    """The findings in the folder `run`.

    Raises:
        SurgeryError: there is no such folder, it holds something else, or findings of another version.
    """
    path = run / RESULTS
    if not path.is_file():
        raise usage_error(
            f"has no {RESULTS}", where=run, hint="Give a folder that `surgery probe refusal … -o RUN` wrote."
        )
    record = read_json(path)
    if record.get("kind") != KIND or record.get("schema") != SCHEMA:
        raise usage_error(
            f"holds {record.get('kind')!r} of schema {record.get('schema')!r}, expected {KIND!r} of schema {SCHEMA}",
            where=path,
            hint="Probe the model again with this version.",
        )
    try:
        return Findings.model_validate({key: value for key, value in record.items() if key not in ("schema", "kind")})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SurgeryError(f"{place}: {first['msg']}", where=path, hint="Probe the model again.") from error


def write_findings(folder: Path, findings: Findings) -> None:
    """Writes results.json, whole or not at all, and the manifest that marks the folder as ours."""
    _replace(folder / RESULTS, to_json({"schema": SCHEMA, "kind": KIND} | findings.model_dump(mode="json")))
    model = findings.model
    _replace(folder / MANIFEST, to_json({"schema": SCHEMA, "kind": KIND, "model": model.model_dump(mode="json")}))


def check_model(findings: Findings, checkpoint: Checkpoint, run: Path, *, options: Options) -> None:
    """Raises SurgeryError where `checkpoint` is not the model that `findings` are of."""
    found = weights_hash(checkpoint, options=options)
    if found != findings.model.xxh3:
        raise usage_error(
            f"its findings are of {findings.model.ref} with the weights {findings.model.xxh3[:12]}…, but "
            f"{checkpoint.ref} has the weights {found[:12]}…",
            where=run,
            hint="Probe this model first; findings of another one say nothing about its heads.",
        )


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Writes examples.jsonl."""
    rows = [json.dumps(asdict(example), ensure_ascii=False, default=str) for example in examples]
    _replace(folder / EXAMPLES, "\n".join(rows) + "\n")


def read_examples(run: Path) -> list[Example]:
    """The examples that a run probed. Raises SurgeryError."""
    path = run / EXAMPLES
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Example(**{**row, "messages": tuple(row["messages"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SurgeryError(f"cannot be read ({error})", where=path, hint="Probe the model again.") from error


def interval(estimate: Any, n: int | None = None) -> Interval:
    """An estimate (value, low, high) as it is stored: NaN as None."""
    known = [None if number != number else float(number) for number in (estimate.value, estimate.low, estimate.high)]
    return Interval(value=known[0], low=known[1], high=known[2], n=n)


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


def _replace(path: Path, text: str) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)  # mkstemp's file is for its owner alone
        sync(Path(name))
        Path(name).replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
