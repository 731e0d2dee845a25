"""`surgery merge logits` and `surgery merge unpack`: models whose logits are averaged, in one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from cli import console
from cli import options as o


def logits(
    models: Annotated[list[str], typer.Argument(metavar="A B …", help="Models with one and the same tokenizer.")],
    out: o.Out,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One per model, in order; divided by their sum. By default all are equal."),
    ] = None,
    mode: Annotated[str, typer.Option(help="What is averaged: logits, logprobs or probs.")] = "logits",
    tune: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Fit the combination on its `text`, or `prompt` and `response`."),
    ] = None,
    tune_what: Annotated[
        str, typer.Option(help="What --tune fits: weights, or head (a matrix on all hidden states).")
    ] = "weights",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Write one model whose logits are the mean of the models' logits (arXiv 2507.07129)."""
    from merges import logits as ensembles
    from merges.members import Mode
    from merges.tune import TuneWhat

    report = ensembles.average(
        models, out, weights=weight, mode=cast("Mode", mode), tune=tune,
        tune_what=cast("TuneWhat", tune_what), dry_run=dry_run,
        options=o.options(threads, device, overwrite=overwrite),
    )  # fmt: skip
    if as_json:
        console.show_json(report)
        return
    console.show_preflight(report.preflight, report.warnings)
    if report.tuning:
        console.tell(f"  {'tuning':<14} {report.tuning.sentence()}")
    console.show(report.table())
    console.tell("Nothing written (--dry-run)." if report.dry_run else f"Wrote {report.out}")


def unpack(
    ensemble: Annotated[str, typer.Argument(metavar="ENSEMBLE", help="A folder that `merge logits` wrote.")],
    out: o.Out,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Write an ensemble's members back, each to OUT/NAME, bit for bit as they were."""
    from merges.unpack import unpack as restore

    report = restore(ensemble, out, options=o.options(threads))
    if as_json:
        console.show_json(report)
    else:
        console.tell(f"Wrote {', '.join(str(report.out / name) for name in report.members)}")
