"""`surgery inspect`, `diff`, `verify`, `eval`: looking at models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli import options as o


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    app.command(epilog="Example: surgery inspect lab:grpo")(inspect)
    app.command(epilog="Example: surgery diff lab:sft lab:grpo --plot moved.png")(diff)
    app.command(epilog="Example: surgery verify reasoning-instruct")(verify)
    app.command(name="eval", epilog="Example: surgery eval lab:instruct reasoning-instruct --task lab_sums")(evaluate)


def inspect(model: o.Model, as_json: o.Json = False) -> None:
    """Tensors, dtypes, parameters, layers, heads, experts, tied weights, and what was not understood."""
    from surgery.describe import describe, describe_tables
    from surgery.refs import open_checkpoint

    description = describe(open_checkpoint(model))
    if as_json:
        console.show_json(description)
    else:
        console.show(*describe_tables(description))


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model; see `surgery --help` for what that can be.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare with it.")],
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw how far each layer moved.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Print the tensors that moved most.")] = 20,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Per tensor: ‖A−B‖/‖A‖, cosine, share of changed values; and which layers moved."""
    from surgery import compare

    report = compare.diff(a, b, options=o.options(threads))
    if plot:
        report.figure().save(plot)
        console.tell(f"Picture: {plot}")
    if as_json:
        console.show_json(report)
    else:
        console.show(*report.tables(top))


def verify(model: o.Model, threads: o.Threads = None, as_json: o.Json = False) -> None:
    """Every tensor readable, finite, and hashed as its manifest says; exit code 1 where one is not."""
    from surgery.verify import verify as check

    report = check(model, options=o.options(threads))
    if as_json:
        console.show_json({"ok": report.ok, **vars(report)})
    else:
        console.tell(report.sentence())
    if not report.ok:
        raise typer.Exit(1)


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Models to score, side by side.")],
    task: Annotated[list[str], typer.Option(help="An lm-evaluation-harness task, or lab_sums; may be repeated.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 64,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Scores of models on lm-evaluation-harness tasks, with 95 % intervals."""
    from surgery.checkpoint import loadable_folder
    from surgery.evaluate import evaluate as score
    from surgery.evaluate import score_table
    from surgery.refs import open_checkpoint

    folders = {model: loadable_folder(open_checkpoint(model)) for model in models}
    scores = score(folders, task, limit=limit, batch_size=batch_size, device=device)
    if as_json:
        console.show_json({"scores": scores})
    else:
        console.show(score_table(scores))
