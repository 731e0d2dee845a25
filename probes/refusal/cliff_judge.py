"""Cliff-as-a-Judge (arXiv 2510.06036): choose the examples of a pool with the largest misalignment, for training.

They are written as JSONL rows that trainers load. A row keeps the fields that it has in the pool; its scores are added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from probes.data.choices import RowStyle
from probes.data.examples import DataSet, Example
from probes.data.markers import Markers, split_responses
from probes.data.preparation import PreparedData, options_from_findings, prepare, resolve_markers
from probes.data.reader import read_data
from probes.data.records import parse_top
from probes.model.activations import project_hidden_states
from probes.refusal.cliffs import RefusalCliff, count_cells, measure_cliff, most_misaligned
from probes.refusal.findings import read_findings
from probes.refusal.probed_model import ProbedModel, open_probed_model
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import atomic_replace
from surgery.io.escaping import json_text
from surgery.io.hashing import hash_text
from surgery.models.choices import SpecialTokens
from surgery.reporting.report import Column, Table
from surgery.runtime.collectives import on_main

TABLE_ROWS = 10


@dataclass(frozen=True)
class JudgedSelection:
    """The chosen examples, largest misalignment first.

    n: examples in the pool. threshold: the smallest misalignment among the chosen.
    left_out: examples without thinking, or whose thinking never closed.
    without_response: how many of the chosen have no response in the pool.
    """

    out: Path
    pool: str
    n: int
    chosen: tuple[RefusalCliff, ...]
    threshold: float
    left_out: int
    without_response: int

    def table(self) -> Table:
        """Return the first of the chosen as a table."""
        columns = [
            Column("example"),
            Column("cell"),
            Column("misalignment", "score"),
            Column("plateau", "score"),
            Column("final", "score"),
        ]
        rows = [(c.key, c.cell, c.misalignment, c.plateau, c.final) for c in self.chosen[:TABLE_ROWS]]
        cells = ", ".join(f"{n} {cell}" for cell, n in count_cells([c.cell for c in self.chosen]).items())
        note = f"{len(self.chosen)} of {self.n} examples, with a misalignment of {self.threshold:.3f} or more: {cells}."
        if self.left_out:
            note += f" {self.left_out} without a thinking that ends could not be scored."
        if self.without_response:
            note += f" {self.without_response} of the chosen have no response in the pool: prompts only."
        return Table("Chosen by their cliffs", columns, rows, note=note)


def judge(
    model: str,
    run: Path,
    data: str,
    out: Path,
    *,
    top: str,
    style: RowStyle = "trl",
    special_tokens: SpecialTokens = "text",
    limit: int | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    options: ExecutionOptions = ExecutionOptions(),
) -> JudgedSelection:
    """Score a pool by MS(x) = plateau − final, and write the `top` of it to the file `out`.

    Where an example has no thinking the model generates it. That thinking is scored but never written: the rows to
    train on have the pool's own responses.

    Example:
        judge("lab:cliff", Path("RUN"), "lab:cliff/pool", Path("subset.jsonl"), top="5%")

    Args:
        run: a folder that `probe_refusal` wrote for the same model.
        top: a share such as 1.7%, or a count.
        style: `trl` rows have `messages` with the response as the assistant's; without a response, `prompt`.
            `llama-factory` rows have `instruction`, `input`, `output` (alpaca), the last null without a response.
        special_tokens: what special tokens in the pool are while it is scored, see `probes.data.reader.read_data`.

    Raises:
        SurgeryError: findings of another model; `out` exists; the pool is empty or none of it can be scored.
    """
    if out.is_dir():
        raise usage_error("is a folder, expected the name of a file", where=out)
    if out.exists() and not options.overwrite:
        raise usage_error("exists already", where=out, hint="Choose another file, or add --overwrite.")
    # All that can be wrong in the request is checked before the model is loaded.
    findings = read_findings(run)
    pool = read_data(data, limit=limit, special_tokens=special_tokens)
    count = parse_top(top, len(pool.examples))
    probed = open_probed_model(model, findings, run, dtype=dtype, options=options)
    cache = out.with_name(f"{out.name}.partial")
    prepared = _prepare_pool(probed, pool, cache, options)
    cliffs = _measure_cliffs(probed, prepared, batch_tokens, options)
    chosen = most_misaligned(cliffs, count)
    if not chosen:
        raise SurgeryError("no example has any thinking, and so no cliff", where=data)
    by_key = {example.key: example for example in pool.examples}
    rows = [_to_row(by_key[cliff.key], cliff, style, prepared.markers) for cliff in chosen]
    on_main(_write_rows, out, rows, cache)
    return JudgedSelection(
        out,
        data,
        len(pool.examples),
        tuple(chosen),
        chosen[-1].misalignment,
        # Unfinished examples have no cliff at all, and those without thinking one without a plateau.
        left_out=len(pool.examples) - sum(cliff.thinking > 0 for cliff in cliffs),
        without_response=sum(by_key[cliff.key].response is None for cliff in chosen),
    )


def _prepare_pool(probed: ProbedModel, pool: DataSet, cache: Path, options: ExecutionOptions) -> PreparedData:
    """Prepare the pool as the run's own data was; a run that was killed continues with the completions in `cache`."""
    live, findings = probed.live, probed.findings
    generation = options_from_findings(findings.settings)
    examples = _without_unthought_responses(pool.examples, resolve_markers(live, generation))
    return prepare(
        live,
        replace(pool, examples=examples),
        generation,
        # The cache lies beside `out`, where the next pool may find it: completions are bound to the pool as well.
        model_id=f"{findings.model.xxh3} {live.model.dtype} {hash_text(pool.digest)[:12]}",
        cache=cache,
        device=options.device,
        progress=options.progress,
    )


def _without_unthought_responses(examples: Sequence[Example], markers: Markers | None) -> tuple[Example, ...]:
    """Return the examples without responses that have no thinking, so that the model generates both."""
    if markers is None:
        return tuple(examples)
    return tuple(
        replace(example, response=None, closing=None) if example.thinking is None else example
        for example in split_responses(examples, markers)
    )


def _measure_cliffs(
    probed: ProbedModel, prepared: PreparedData, batch_tokens: int | None, options: ExecutionOptions
) -> list[RefusalCliff]:
    probes = probed.probes
    logits = project_hidden_states(
        probed.live,
        prepared.sequences,
        probes.weights,
        probes.biases,
        max_tokens=batch_tokens,
        progress=options.progress,
    )
    depth = probed.findings.depth
    return [
        measure_cliff(sequence, torch.sigmoid(rows[:, depth].double()).numpy(), cell=example.cell, group=example.group)
        for example, sequence, rows in zip(prepared.examples, prepared.sequences, logits, strict=True)
    ]


def _to_row(example: Example, cliff: RefusalCliff, style: RowStyle, markers: Markers | None) -> dict[str, Any]:
    scores = {"misalignment": cliff.misalignment, "plateau": cliff.plateau, "final": cliff.final}
    thinking = ""
    if example.thinking is not None and markers is not None:
        thinking = f"{markers.opening}{example.thinking}{example.closing or markers.closing}"
    answer = None if example.response is None else f"{thinking}{example.response}"
    # What the pool has under these names is replaced by `messages`, or by the fields of alpaca.
    pool_fields = {key: value for key, value in example.row.items() if key not in ("prompt", "messages")}
    messages = [dict(message) for message in example.messages]
    if style == "llama-factory":
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        system_field = {} if system is None else {"system": system}
        return {**pool_fields, "instruction": example.prompt, "input": "", "output": answer, **system_field, **scores}
    if answer is None:
        return {**pool_fields, "prompt": messages, **scores}
    return {**pool_fields, "messages": [*messages, {"role": "assistant", "content": answer}], **scores}


def _write_rows(out: Path, rows: Sequence[dict[str, Any]], cache: Path) -> None:
    with atomic_replace(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json_text(json.dumps(row, ensure_ascii=False, default=str)) + "\n" for row in rows)
    # Only once the file is there: until then a killed run needs the completions.
    cache.unlink(missing_ok=True)
