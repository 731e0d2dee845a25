"""`surgery edit …`: scale parts of one model in its weights, and undo that."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli import options as o
from probes.data.choices import EditMode
from surgery.checkpoint.dtypes import ComputeDtype
from surgery.recipes.types import NamesInput

if TYPE_CHECKING:
    from probes.experts.edit import ExpertEditResult
    from probes.refusal.edit import HeadEditResult

app = typer.Typer(
    help="Edits one model's weights in place of hooks: only the tensors that must change do.", no_args_is_help=True
)


NoMeasure = Annotated[
    bool, typer.Option("--no-measure", help="Keep the result without measuring what it does; the card says so.")
]
MeasureDtype = Annotated[ComputeDtype, typer.Option(help="What models compute in while measuring: auto, float32, …")]


@app.command(epilog="Example: surgery edit heads lab:cliff --from cliff --top 3 -o repaired")
def heads(
    model: o.Model,
    out: o.Out,
    run: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Findings of this model, by `surgery probe refusal`."),
        NamesInput("path"),
    ] = None,
    top: Annotated[
        str | None, typer.Option(metavar="SHARE|COUNT", help="The heads of RUN that write most against refusal.")
    ] = None,
    proven: Annotated[bool, typer.Option("--proven", help="The set that `surgery probe heads` grew in RUN.")] = False,
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="L12H7[=γ]", help="A query head by layer and number, both from 0; may be repeated."),
    ] = None,
    scale: Annotated[float, typer.Option(help="γ: what the heads' outputs are multiplied by; 0 removes them.")] = 0.0,
    mode: Annotated[
        EditMode, typer.Option(help="scale, or mean: RUN's mean outputs in place of the heads' (needs biases).")
    ] = "scale",
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Labelled prompts to measure on; by default those of RUN."),
        NamesInput("data"),
    ] = None,
    special_tokens: o.ReadSpecialTokens = "text",
    no_measure: NoMeasure = False,
    examples: Annotated[int, typer.Option(min=1, help="Prompts of each topic to measure on, at most.")] = 64,
    force: Annotated[
        bool, typer.Option("--force", help="Keep a result in which refusal of harmful prompts fell.")
    ] = False,
    dtype: MeasureDtype = "auto",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Scale attention heads in the checkpoint, exactly, and measure refusals, KL and perplexity before keeping it."""
    from probes.refusal.edit import EffectOptions, HeadSelection, edit_heads

    repair = edit_heads(
        model,
        out,
        choice=HeadSelection(run=run, top=top, proven=proven, heads=head or (), scale=scale, mode=mode),
        measuring=EffectOptions(
            data=data, wanted=not no_measure, examples=examples, force=force, special_tokens=special_tokens
        ),
        dtype=dtype,
        dry_run=dry_run,
        options=o.options(threads, device, overwrite=overwrite),
    )
    # A mean is a bias in place of the heads' outputs, so nothing was scaled.
    done = "Put means in the place of" if mode == "mean" else "Scaled"
    _show(repair, "Heads", repair.heads, done, out, no_measure=no_measure, as_json=as_json)


@app.command(epilog="Example: surgery edit experts lab:moe --from experts --top 2 --scale 4 -o reinforced")
def experts(
    model: o.Model,
    out: o.Out,
    run: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Findings of this model, by `surgery probe experts`."),
        NamesInput("path"),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="The first experts of RUN's ranking; 2 by default.")] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="L12E45[=β]", help="An expert by layer and number, both from 0; may be repeated."),
    ] = None,
    scale: Annotated[
        float,
        typer.Option(help="β: what the experts' outputs are multiplied by; 0 removes them; powers of two are exact."),
    ] = 64.0,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Prompts to measure on; by default those of RUN."),
        NamesInput("data"),
    ] = None,
    special_tokens: o.ReadSpecialTokens = "text",
    no_measure: NoMeasure = False,
    examples: Annotated[int, typer.Option(min=1, help="Prompts to measure on, at most.")] = 64,
    force: Annotated[bool, typer.Option("--force", help="Keep a result whose answers collapse into loops.")] = False,
    dtype: MeasureDtype = "auto",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Scale experts in the checkpoint, so that any engine runs them so; also on prompts, which a hook could spare."""
    from probes.experts.edit import ExpertSelection, edit_experts

    boost = edit_experts(
        model,
        out,
        choice=ExpertSelection(run=run, top=top, experts=expert or (), scale=scale),
        data=data,
        special_tokens=special_tokens,
        wanted=not no_measure,
        examples=examples,
        force=force,
        dtype=dtype,
        dry_run=dry_run,
        options=o.options(threads, device, overwrite=overwrite),
    )
    _show(boost, "Experts", boost.experts, "Scaled", out, no_measure=no_measure, as_json=as_json)


@app.command(epilog="Example: surgery edit undo repaired -o original")
def undo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder that `surgery edit heads` or `experts` wrote."),
        NamesInput("model"),
    ],
    out: o.Out,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Write the model as it was before the edit, bit for bit."""
    from surgery.edits.undo_file import undo as restore

    report = restore(model, out, options=o.options(threads, overwrite=overwrite))
    if as_json:
        console.show_json(report)
    else:
        console.message(f"Wrote {report.out}")


def _show(
    edited: HeadEditResult | ExpertEditResult,
    what: str,
    names: Iterable[str],
    done: str,
    out: Path,
    *,
    no_measure: bool,
    as_json: bool,
) -> None:
    """Print what an edit of `names` did to the weights and to the model."""
    from surgery.engine.edit_report import edit_table

    if as_json:
        console.show_json(edited)
        return
    console.show_preflight(edited.report.preflight, edited.report.warnings)
    # The names are worth showing even so: `--top` and `--from` leave open which ones they are.
    if edited.report.dry_run:
        console.message(f"{what}: {', '.join(names)}. Nothing written (--dry-run).")
        return
    console.show(edit_table(edited.report))
    # An edit that nobody measured must say so: side effects are the rule, not the exception.
    if edited.measured is None:
        hint = "as --no-measure asks" if no_measure else "give --from RUN or --data DATA"
        console.warn(f"what the edit does to the model was not measured: {hint}.")
    else:
        console.show(edited.measured.table())
    console.message(f"{done} {', '.join(names)}. Wrote {out}; `surgery edit undo {out} -o …` leads back.")
