"""`surgery inspect`, `diff`, `verify` and `eval`: look at models and score them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli import options as o
from probes.data.choices import Phase
from surgery.io.command_line import option_flag
from surgery.recipes.types import NamesInput, NamesOutput
from surgery.runtime.environment import is_main

if TYPE_CHECKING:
    from surgery.checkpoint.checkpoint import Checkpoint
    from surgery.evaluation.evaluation_report import EvaluationVariant


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: surgery inspect lab:grpo")(inspect)
    app.command(epilog="Example: surgery diff lab:sft lab:grpo --plot moved.png")(diff)
    app.command(epilog="Example: surgery verify reasoning-instruct")(verify)
    app.command(name="eval", epilog="Example: surgery eval lab:instruct reasoning-instruct --task lab_sums")(evaluate)


def inspect(model: o.Model, as_json: o.Json = False) -> None:
    """Tensors, dtypes, parameters, layers, heads, experts, tied weights, and what was not understood."""
    from surgery.checkpoint.inspect import inspect_checkpoint, inspect_tables
    from surgery.checkpoint.resolve import open_checkpoint

    description = inspect_checkpoint(open_checkpoint(model))
    if as_json:
        console.show_json(description)
    else:
        console.show(*inspect_tables(description))


def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A model; see `surgery --help` for what that can be."),
        NamesInput("model"),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare with it."), NamesInput("model")],
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw how far each layer moved."), NamesOutput("picture")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Print the tensors that moved most.")] = 20,
    dequantise: o.Dequantise = False,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Per tensor: ‖A−B‖/‖A‖, cosine, share of changed values; and which layers moved."""
    from surgery.vectors import comparison

    report = comparison.diff(a, b, dequantise=dequantise, options=o.options(threads))
    if plot:
        console.draw(report.figure(), plot)
    if as_json:
        console.show_json(report)
    else:
        console.show_preflight({}, report.configs)
        console.show(*report.tables(top))


def verify(model: o.Model, threads: o.Threads = None, as_json: o.Json = False) -> None:
    """Every tensor readable, finite, and hashed as its manifest says; exit code 1 where one is not."""
    from surgery.engine.verification import verify as check

    report = check(model, options=o.options(threads))
    if as_json:
        console.show_json({"ok": report.ok, **vars(report)})
    else:
        console.message(report.sentence())
    # After the report, so that a program reading --json gets both.
    if not report.ok:
        raise typer.Exit(1)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Models to score, side by side."), NamesInput("model")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(help="An lm-evaluation-harness task, or lab_sums, or lab_sorting; may be repeated."),
        NamesInput("task"),
    ] = None,
    perplexity: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help='A text to predict: a file, or a .jsonl with "text"; may be repeated.'),
        NamesInput("text"),
    ] = None,
    special_tokens: o.ReadSpecialTokens = "text",
    reinforce: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Score each model also with the experts of RUN reinforced, without writing."),
        NamesInput("path"),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="With --reinforce: how many of RUN's ranked experts; 2 by default.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="With --reinforce: β; 64 by default.")] = None,
    phase: Annotated[
        Phase | None,
        typer.Option(help="With --reinforce: all positions (the default), or only generated ones."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N examples of each task or text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 64,
    device: o.Device = "cpu",
    no_card: Annotated[
        bool, typer.Option("--no-card", help="Leave the model cards of folders that surgery wrote as they are.")
    ] = False,
    cards_in: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Change no model card outside of this folder; by default any."),
        NamesOutput("cards"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the scores as bars."), NamesOutput("picture")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Scores of models on tasks and texts, side by side with 95 % intervals; a result's model card gets them too."""
    from surgery.evaluation.evaluation_report import evaluate
    from surgery.runtime.progress import terminal

    report = evaluate(
        models,
        tasks=task or (),
        texts=perplexity or (),
        special_tokens=special_tokens,
        limit=limit,
        batch_size=batch_size,
        device=device,
        prepare=_register_ensembles,
        variant=_reinforced(reinforce, top, scale, phase),
        progress=terminal,
    )
    if as_json:
        console.show_json({"scores": report.scores})
    else:
        console.show(report.table())
    if plot:
        console.draw(report.figure(), plot)
    # After the table: a damaged card must not cost the scores.
    for model, folder in report.folders.items():
        for sentence in report.losses(model):
            console.message(f"warning: {sentence}")
        if no_card or not is_main():
            continue
        if cards_in is None or folder.resolve().is_relative_to(cards_in.resolve()):
            console.message(f"Scores are in {report.write_card(model)}")
        else:
            console.message(f"The card of {model} stays as it is: it is not in {cards_in}")


def _register_ensembles(opened: Mapping[str, Checkpoint]) -> None:
    """Let transformers load logit ensembles, where there is one: their class is ours."""
    if any(checkpoint.config.get("model_type") == "logit_ensemble" for checkpoint in opened.values()):
        from merges.ensemble.ensemble_model import register

        register()


def _reinforced(
    run: Path | None, top: int | None, scale: float | None, phase: Phase | None
) -> EvaluationVariant | None:
    """Return the variant that scores each model also with experts of `run` reinforced; None without `--reinforce`."""
    from surgery.errors import usage_error

    given = {"top": top, "scale": scale, "phase": phase}
    if run is None:
        # To ignore them would leave people to believe that they had been applied.
        if stray := [name for name, value in given.items() if value is not None]:
            raise usage_error("goes with --reinforce RUN", where=option_flag(stray[0]))
        return None
    from probes.experts.evaluate import add_scaled_models
    from surgery.evaluation.evaluation_report import EvaluationVariant

    # Defaults are None in the signature, to tell whether an option was given: these are the real ones.
    strength: dict[str, Any] = {
        "top": 2 if top is None else top,
        "scale": 64.0 if scale is None else scale,
        "phase": phase or "all",
    }
    extend = partial(add_scaled_models, run=run, options=o.options(), **strength)
    return EvaluationVariant(extend, {"reinforce": run, **strength})
