"""`surgery vector …`: extract task vectors from a pair of models and add them to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli import options as o
from surgery.checkpoint.dtypes import OutputDtype
from surgery.recipes.types import NamesInput, NamesOutput

if TYPE_CHECKING:
    from surgery.engine.edit_report import EditReport
    from surgery.vectors.extraction import ExtractReport
    from surgery.vectors.to_lora import AdapterReport

app = typer.Typer(
    help="Task vectors: θ_tuned − θ_base out of one pair of models, into another (arXiv 2509.01363).",
    no_args_is_help=True,
)

Tuned = Annotated[
    str,
    typer.Argument(metavar="TUNED", help="The model that was trained, by reinforcement learning say."),
    NamesInput("model"),
]
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model it was trained from."), NamesInput("model")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="The model to add the vector to."), NamesInput("model")]
VectorFolder = Annotated[
    str, typer.Argument(metavar="V", help="A folder that `vector extract` wrote."), NamesInput("path")
]


@app.command(epilog="Example: surgery vector extract lab:grpo lab:sft -o reasoning")
def extract(
    tuned: Tuned,
    base: Base,
    out: o.Out,
    dtype: Annotated[
        OutputDtype, typer.Option(help="float32 restores TUNED bit for bit; bfloat16 halves the size.")
    ] = "float32",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Write the best approximation of this rank as a PEFT LoRA adapter."),
    ] = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    vocab: o.Vocab = "strict",
    allow_unrelated: o.Unrelated = False,
    keep: o.Keep = None,
    drop: o.Drop = None,
    dequantise: o.Dequantise = False,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    allow_nonfinite: o.AllowNonfinite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Write the vector v = θ_tuned − θ_base."""
    from surgery.vectors import extraction, to_lora

    settings: dict[str, Any] = {
        "include": include or (),
        "exclude": exclude or (),
        "allow_unrelated": allow_unrelated,
        "keep": keep or (),
        "drop": drop or (),
        "dequantise": dequantise,
        "dry_run": dry_run,
        "options": o.options(threads, device, overwrite=overwrite, allow_nonfinite=allow_nonfinite),
    }
    report: AdapterReport | ExtractReport
    if rank is not None:
        report = to_lora.extract_adapter(tuned, base, out, rank=rank, **settings)
    else:
        report = extraction.extract(tuned, base, out, dtype=dtype, vocab=vocab, **settings)
    _show_vector(report, as_json=as_json)


@app.command(epilog="Example: surgery vector apply reasoning lab:instruct -o out --scale 0.75 --exclude '*embed*'")
def apply(
    vector: VectorFolder,
    target: Target,
    out: o.Out,
    scale: o.Scale = 1.0,
    include: o.Include = None,
    exclude: o.Exclude = None,
    scale_for: o.ScaleFor = None,
    vocab: o.Vocab = "strict",
    dtype: o.Dtype = None,
    allow_unrelated: o.Unrelated = False,
    keep: o.Keep = None,
    drop: o.Drop = None,
    dequantise: o.Dequantise = False,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    allow_nonfinite: o.AllowNonfinite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Write θ_target + α·(m ⊙ v)."""
    from surgery.vectors import application as vectors
    from surgery.vectors.selection import parse_scale_globs

    report = vectors.apply(
        vector,
        target,
        out,
        scale=scale,
        include=include or (),
        exclude=exclude or (),
        scale_for=parse_scale_globs(scale_for or ()),
        vocab=vocab,
        dtype=dtype,
        allow_unrelated=allow_unrelated,
        keep=keep or (),
        drop=drop or (),
        dequantise=dequantise,
        dry_run=dry_run,
        options=o.options(threads, device, overwrite=overwrite, allow_nonfinite=allow_nonfinite),
    )
    _show_edit(report, as_json=as_json)


@app.command(epilog="Example: surgery vector transfer lab:grpo lab:sft lab:instruct -o out")
def transfer(
    tuned: Tuned,
    base: Base,
    target: Target,
    out: o.Out,
    scale: o.Scale = 1.0,
    include: o.Include = None,
    exclude: o.Exclude = None,
    scale_for: o.ScaleFor = None,
    vocab: o.Vocab = "strict",
    dtype: o.Dtype = None,
    allow_unrelated: o.Unrelated = False,
    keep: o.Keep = None,
    drop: o.Drop = None,
    dequantise: o.Dequantise = False,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    allow_nonfinite: o.AllowNonfinite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Write θ_target + α·m ⊙ (θ_tuned − θ_base) in one pass, with no vector on disk."""
    from surgery.vectors import application as vectors
    from surgery.vectors.selection import parse_scale_globs

    report = vectors.transfer(
        tuned,
        base,
        target,
        out,
        scale=scale,
        include=include or (),
        exclude=exclude or (),
        scale_for=parse_scale_globs(scale_for or ()),
        vocab=vocab,
        dtype=dtype,
        allow_unrelated=allow_unrelated,
        keep=keep or (),
        drop=drop or (),
        dequantise=dequantise,
        dry_run=dry_run,
        options=o.options(threads, device, overwrite=overwrite, allow_nonfinite=allow_nonfinite),
    )
    _show_edit(report, as_json=as_json)


@app.command(epilog="Example: surgery vector compare math-vector code-vector --plot similarity.png")
def compare(
    vectors: Annotated[
        list[str], typer.Argument(metavar="V1 V2 …", help="Folders that `vector extract` wrote."), NamesInput("path")
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the cosines per layer."), NamesOutput("picture")
    ] = None,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Cosine and norm of vectors, per layer and as a whole."""
    from surgery.vectors import comparison

    report = comparison.compare(vectors, options=o.options(threads))
    if plot:
        console.draw(report.figure(), plot)
    if as_json:
        console.show_json(report)
    else:
        console.show_preflight({}, report.configs)
        console.show(report.table())


@app.command(
    epilog="Example: surgery vector sweep reasoning lab:instruct --scale -1,0,0.25,0.5,1 --task lab_sums -o sweep"
)
def sweep(
    vector: VectorFolder,
    target: Target,
    task: Annotated[
        list[str], typer.Option(help="An lm-evaluation-harness task, or lab_sums; may be repeated."), NamesInput("task")
    ],
    # 0 is the target itself, and −1 the opposite: both show whether it is the vector's direction that helps.
    scale: Annotated[str, typer.Option(metavar="α,α,…", help="The grid.")] = "-1,0,0.25,0.5,0.75,1",
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="RUN", help="Folder for results.json, the picture and report.html."),
        NamesOutput("folder"),
    ] = None,
    controls: Annotated[int, typer.Option(min=0, help="Norm-matched random vectors, tried at the best α.")] = 3,
    include: o.Include = None,
    exclude: o.Exclude = None,
    scale_for: o.ScaleFor = None,
    vocab: o.Vocab = "strict",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random vectors.")] = 0,
    allow_unrelated: o.Unrelated = False,
    keep: o.Keep = None,
    drop: o.Drop = None,
    overwrite: o.Overwrite = False,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Score TARGET + α·v over a grid of α, with norm-matched random vectors as the control."""
    from surgery.vectors import scale_sweep as sweeps
    from surgery.vectors.selection import parse_scale_globs

    report = sweeps.sweep(
        vector,
        target,
        scales=sweeps.parse_grid(scale),
        tasks=task,
        out=out,
        controls=controls,
        include=include or (),
        exclude=exclude or (),
        scale_for=parse_scale_globs(scale_for or ()),
        vocab=vocab,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        allow_unrelated=allow_unrelated,
        keep=keep or (),
        drop=drop or (),
        options=o.options(device=device, overwrite=overwrite),
    )
    if as_json:
        console.show_json(report)
        return
    console.show(*report.tables())
    if out:
        console.message(f"Report: {out / 'report.html'}")


def _show_vector(report: AdapterReport | ExtractReport, *, as_json: bool) -> None:
    if as_json:
        console.show_json(report)
        return
    console.show_preflight(report.preflight, report.warnings)
    if not report.dry_run:
        console.show(report.table())
    console.message(_ending(report.out, dry_run=report.dry_run))


def _show_edit(report: EditReport, *, as_json: bool) -> None:
    from surgery.engine.edit_report import edit_table

    if as_json:
        # A property, which `vars` leaves out.
        console.show_json({**vars(report), "delivered_fraction": report.delivered_fraction})
        return
    console.show_preflight(report.preflight, report.warnings)
    if not report.dry_run:
        console.show(edit_table(report))
    console.message(_ending(report.out, dry_run=report.dry_run))


def _ending(out: Path, *, dry_run: bool) -> str:
    return "Nothing written (--dry-run)." if dry_run else f"Wrote {out}"
