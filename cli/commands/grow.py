"""`surgery grow …`: grow transformers layer by layer on a frozen embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli import options as o
from surgery.checkpoint.dtypes import OutputDtype
from surgery.growth.choices import BaselineBudget, BaselineEmbedding, EmbeddingKind, LayerInit, LayerPosition
from surgery.recipes.types import NamesInput, NamesOutput

if TYPE_CHECKING:
    from surgery.growth.options import RunOptions
    from surgery.growth.prepare import PreparedRun
    from surgery.growth.results import Growth

app = typer.Typer(
    help="Grows transformers layer by layer on a frozen embedding, and deepens models that are there.",
    no_args_is_help=True,
)

PlanRef = Annotated[
    str, typer.Argument(metavar="PLAN", help="A YAML file; or small, one-by-one, three-by-three."), NamesInput("plan")
]
Embed = Annotated[
    str | None, typer.Option(metavar="EMB", help="A frozen embedding, in place of the plan's."), NamesInput("path")
]
Corpus = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="In place of the plan's: a file, folder, glob, or org/name:split; repeatable."),
    NamesInput("corpus"),
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Of every stage, in place of the plan's.")]
Seed = Annotated[int | None, typer.Option(help="In place of the plan's.")]
Run = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="RUN", help="The run's folder; what was stopped goes on in it."),
    NamesOutput("folder"),
]
SaveEvery = Annotated[float, typer.Option(min=0, metavar="MINUTES", help="Between two states to go on from.")]
Logs = Annotated[bool, typer.Option("--tensorboard", help="Write RUN/logs for TensorBoard (extra `logs`).")]
TrainDevice = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda[:N]; by default a GPU where there is one.")
]
Field = Annotated[str, typer.Option(help="The column of records that holds the text.")]
Texts = Annotated[
    list[str], typer.Argument(metavar="CORPUS…", help="Files, folders, globs, org/name:split."), NamesInput("corpus")
]


@app.command(epilog="Example: surgery grow embed tok --kind glyphs --width 256 -o emb")
def embed(
    tokenizer: Annotated[
        str,
        typer.Argument(metavar="TOKENIZER", help="A folder, org/name on the Hub, or lab:NAME."),
        NamesInput("tokenizer"),
    ],
    out: o.Out,
    kind: Annotated[
        EmbeddingKind, typer.Option(help="glyphs (pictures of the tokens), bits (of their ids), random, or table.")
    ] = "glyphs",
    width: Annotated[int | None, typer.Option(min=1, help="Entries of a row; a table keeps its own.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows; by default as many as the tokenizer has ids, more are unused.")
    ] = None,
    font: Annotated[
        Path | None,
        typer.Option(help="For glyphs: a .ttf, .otf, or Unifont's .hex; else DejaVu Sans Mono."),
        NamesInput("path"),
    ] = None,
    cell: Annotated[
        int, typer.Option(min=8, max=128, help="For glyphs: pixels along an edge of the picture; even.")
    ] = 32,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="For table: the model whose embedding is taken."),
        NamesInput("model"),
    ] = None,
    normalise: Annotated[
        bool | None, typer.Option(help="Give rows norm 1; by default for glyphs and random ones.")
    ] = None,
    unique: Annotated[bool, typer.Option("--unique", help="Break ties, so that no two tokens share a row.")] = False,
    seed: Annotated[int, typer.Option(help="Of random rows, and of broken ties.")] = 0,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Write a frozen embedding, a row per token, with its hash and a report on rows that tokens share."""
    from surgery.growth.embedding.build import make_embedding
    from surgery.runtime.progress import terminal

    report = make_embedding(
        tokenizer,
        out,
        kind=kind,
        width=width,
        rows=rows,
        font=font,
        cell=cell,
        source=source,
        normalise=normalise,
        unique=unique,
        seed=seed,
        overwrite=overwrite,
        progress=terminal,
    )
    if as_json:
        console.show_json(report)
    else:
        console.show(report.table())
        console.message(f"Wrote {out}")


@app.command(epilog="Example: surgery grow tokenizer lab:python/code lab:python/docs --vocab 4096 -o tok")
def tokenizer(
    corpus: Texts,
    out: o.Out,
    vocab: Annotated[int, typer.Option(min=1, help="Tokens in all, 256 bytes among them.")],
    special: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN", help="With a meaning of its own; the first ends texts; repeatable. [<|endoftext|>]"
        ),
    ] = None,
    field: Field = "text",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Train a BPE tokenizer that begins with characters and can spell every codepoint."""
    from surgery.growth.data.corpus import documents
    from surgery.growth.data.tokenizer_training import END, train_tokenizer
    from surgery.runtime.progress import terminal

    # One by one: a corpus may be larger than the memory.
    texts = (document.text for document in documents(corpus, field=field))
    report = train_tokenizer(
        texts,
        out,
        vocab=vocab,
        # Never none: the first one ends a text, and training needs such a token.
        special=special or (END,),
        refs=corpus,
        field=field,
        overwrite=overwrite,
        progress=terminal,
    )
    if as_json:
        console.show_json(report)
    else:
        console.show(report.table())
        console.message(f"Wrote {out}")


@app.command(epilog="Example: surgery grow init --embed emb --heads 8 --context 256 -o m0")
def init(
    out: o.Out,
    embed: Annotated[
        str, typer.Option(metavar="EMB", help="A folder that `surgery grow embed` wrote."), NamesInput("path")
    ],
    hidden: Annotated[int | None, typer.Option(min=1, help="The width, which must be the embedding's.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads; by default one per 64 of the width.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key-value heads; by default as many.")] = None,
    mlp: Annotated[int | None, typer.Option(min=1, help="The MLP's inner width; by default 8/3 of the width.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions; 1024 by default.")] = None,
    layers: Annotated[int, typer.Option(min=0, help="Random layers to begin with.")] = 0,
    config: Annotated[
        Path | None, typer.Option(metavar="JSON", help="A config.json to take the rest from."), NamesInput("path")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    dtype: Annotated[OutputDtype, typer.Option(help="Store weights as float32, bfloat16 or float16.")] = "float32",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Write the model that a growth begins with: a Llama, or any config, around a frozen embedding."""
    from surgery.growth.layers.initial_model import init_model
    from surgery.growth.plan import ModelShape
    from surgery.runtime.collectives import on_main

    given = {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp": mlp,
        "context": context,
        "layers": layers,
        "config": config,
    }
    # What is not given is left to the defaults of a plan, so that they are the same in both places.
    shape = ModelShape.model_validate({name: value for name, value in given.items() if value is not None})
    options = o.options(overwrite=overwrite)

    # Random weights are drawn in one process, whatever shares the writing.
    report = on_main(init_model, embed, out, shape=shape, seed=seed, dtype=dtype, dry_run=dry_run, options=options)
    if as_json:
        console.show_json(report)
    else:
        console.show_preflight(report.preflight, report.warnings)
        console.message("Nothing written (--dry-run)." if dry_run else f"Wrote {out}")


@app.command(epilog="Example: surgery grow add lab:sft --layers 1 --at middle --init identity -o deeper")
def add(
    model: o.Model,
    out: o.Out,
    layers: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    at: Annotated[str, typer.Option(metavar="top|middle|K", help="Where; K: before layer K.")] = "top",
    init: Annotated[
        LayerInit, typer.Option(help="identity (the model computes what it did), random, or copy (of those below).")
    ] = "identity",
    seed: Annotated[int, typer.Option(help="Of random layers.")] = 0,
    dtype: Annotated[
        OutputDtype | None, typer.Option(help="Store float tensors as float32, bfloat16, …; by default as in MODEL.")
    ] = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Write a model of any family with layers added; every other tensor keeps its bytes."""
    from surgery.growth.layers.add import add_layers
    from surgery.runtime.collectives import on_main

    place, options = _layer_position(at), o.options(threads, overwrite=overwrite)

    # Random layers are drawn in one process, whatever shares the writing.
    report = on_main(
        add_layers,
        model,
        out,
        layers=layers,
        at=place,
        init=init,
        seed=seed,
        dtype=dtype,
        dry_run=dry_run,
        options=options,
    )
    if as_json:
        console.show_json(report)
        return
    console.show_preflight(report.preflight, report.warnings)
    console.show(report.table())
    console.message("Nothing written (--dry-run)." if dry_run else f"Wrote {out}")


@app.command(
    epilog="Example: surgery grow run one-by-one --embed emb --corpus lab:python/code --tokens 500000 -o grown"
)
def run(
    plan: PlanRef,
    out: Run,
    embed: Embed = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    seed: Seed = None,
    device: TrainDevice = None,
    threads: o.Threads = None,
    save_every: SaveEvery = 5.0,
    tensorboard: Logs = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Grow a model stage by stage, each a checkpoint RUN/stage-k; the same command goes on where it was stopped."""
    from surgery.growth.run import grow

    prepared, options = _prepare_run(plan, out, embed, corpus, tokens, seed, device, threads, save_every, tensorboard)
    if dry_run:
        _show_dry_run(prepared, as_json=as_json)
    else:
        _show(grow(prepared, options), out, as_json=as_json)


@app.command(epilog="Example: surgery grow baseline plan.yml --budget tokens --embedding frozen -o grown")
def baseline(
    plan: PlanRef,
    out: Run,
    budget: Annotated[BaselineBudget, typer.Option(help="As in the growth: tokens, flops, or both.")] = "both",
    embedding: Annotated[BaselineEmbedding, typer.Option(help="frozen, trained, or both.")] = "both",
    embed: Embed = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    seed: Seed = None,
    device: TrainDevice = None,
    threads: o.Threads = None,
    save_every: SaveEvery = 5.0,
    tensorboard: Logs = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Train models of the final depth in one go, at the growth's tokens and at its operations, and compare."""
    from surgery.growth.baseline import train_baselines

    prepared, options = _prepare_run(plan, out, embed, corpus, tokens, seed, device, threads, save_every, tensorboard)
    if dry_run:
        _show_dry_run(prepared, as_json=as_json)
    else:
        _show(train_baselines(prepared, budget=budget, embedding=embedding, options=options), out, as_json=as_json)


def _layer_position(text: str) -> LayerPosition:
    from surgery.errors import did_you_mean, usage_error

    if text.isdecimal():
        return int(text)
    # Three returns, so that the type checker knows the Literal.
    if text == "top":
        return "top"
    if text == "middle":
        return "middle"
    raise usage_error(
        f"got {text!r}, expected top or middle, or a layer's number",
        where="--at",
        hint=did_you_mean(text, ("top", "middle")),
    )


def _prepare_run(
    plan: str,
    out: Path,
    embed: str | None,
    corpus: list[str] | None,
    tokens: int | None,
    seed: int | None,
    device: str | None,
    threads: int | None,
    save_every: float,
    tensorboard: bool,
) -> tuple[PreparedRun, RunOptions]:
    from surgery.growth.options import RunOptions
    from surgery.growth.prepare import load_plan, prepare_run
    from surgery.runtime.progress import terminal

    # Before training starts, and also in a dry run: every error of the plan is found here.
    prepared = prepare_run(load_plan(plan, embed=embed, corpus=corpus, tokens=tokens, seed=seed), out)
    return prepared, RunOptions(device, threads, save_every, tensorboard, terminal)


def _show_dry_run(prepared: PreparedRun, *, as_json: bool) -> None:
    if as_json:
        # The plan with all options applied: what the run would do, and not what the file says.
        console.show_json({"facts": prepared.facts, "plan": prepared.plan.model_dump(mode="json")})
    else:
        console.show_preflight(prepared.facts, ())
        console.message("Nothing written (--dry-run).")


def _show(growth: Growth, out: Path, *, as_json: bool) -> None:
    from surgery.growth.report import comparison_table, stage_table, verdicts
    from surgery.growth.results import REPORT

    if as_json:
        console.show_json(growth.model_dump(mode="json"))
        return
    console.show(stage_table(growth), comparison_table(growth))
    for sentence in verdicts(growth):
        console.message(sentence)
    console.message(f"Report: {out / REPORT}")
