"""`surgery merge …`: merge models on their weights, by a mergekit config or by the name of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cli import console
from cli import options as o
from cli.method_options import with_method_options
from merges.choices import AveragingMode, Compat, TuneWhat
from surgery.checkpoint.dtypes import OutputDtype
from surgery.io.command_line import option_flag, option_words
from surgery.recipes.types import NamesInput, NamesOutput

if TYPE_CHECKING:
    from merges.config.schema import MergeConfig
    from merges.report import MergeReport

WEIGHTS = "weights"  # the command behind `surgery merge CONFIG.yml` and `surgery merge METHOD A B`
CONFIGS = (".yml", ".yaml", ".json")

TokenizerSource = Annotated[
    str | None, typer.Option(metavar="union|base|MODEL", help="Align tokens."), NamesInput("tokenizer source")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="PNG", help="Draw how far OUT is from each model."), NamesOutput("picture")
]


class _Group(TyperGroup):
    """A group whose first word may also be a config file or a method, which stands for the command `weights`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # Also a word that is neither: `weights` knows the methods, and says which one is nearest.
        if args and args[0] not in self.commands:
            return WEIGHTS, self.commands[WEIGHTS], args
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        # People type the short forms, which the group's help describes.
        return [name for name in super().list_commands(ctx) if name != WEIGHTS]


app = typer.Typer(
    cls=_Group,
    help="Merges models: on their weights (arithmetic in fp32, rounded once), or by averaging their logits.\n\n"
    "**surgery merge CONFIG.yml -o OUT**: a mergekit config, unchanged; OUT appears whole or not at all.\n\n"
    "**surgery merge METHOD A B … [--base X] [--weight …] -o OUT**: the common cases without a file.\n\n"
    "`surgery merge weights --help` lists the options of both; `surgery merge methods` lists the methods.",
    no_args_is_help=True,
    # Options may come before the config or the method; they are not the group's, and go on to `weights`.
    context_settings={"ignore_unknown_options": True},
    epilog="Example: surgery merge ties lab:sft lab:grpo --base lab:base --weight 0.5 --density 0.4 -o merged",
)


@app.command(
    name=WEIGHTS,
    epilog="Example: surgery merge weights slerp lab:grpo --base lab:sft --t '[0, 0.5, 1]' --dtype bfloat16 -o out",
)
@with_method_options
def weights(
    what: Annotated[
        str, typer.Argument(metavar="CONFIG.yml | METHOD", help="See `surgery merge methods`."), NamesInput("merge")
    ],
    out: o.Out,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="A B …", help="The models, after a METHOD."), NamesInput("model")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The base model."), NamesInput("model")] = None,
    *,
    parameters: dict[str, Any],
    dtype: Annotated[OutputDtype | None, typer.Option(help="Store float tensors as float32, bfloat16, …")] = None,
    tokenizer_source: TokenizerSource = None,
    chat_template: Annotated[str | None, typer.Option(help="auto, chatml, llama3, … or a Jinja text.")] = None,
    compat: Annotated[Compat | None, typer.Option(help="Whose arithmetic, where they differ.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of methods that draw at random; 0 by default.")] = None,
    keep: o.Keep = None,
    drop: o.Drop = None,
    plot: Plot = None,
    dequantise: o.Dequantise = False,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    allow_nonfinite: o.AllowNonfinite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Write the merge of models' weights, from a mergekit config or by a method's name."""
    from merges.run import merge

    settings: dict[str, Any] = {
        "base": base,
        "dtype": dtype,
        "tokenizer_source": tokenizer_source,
        "chat_template": chat_template,
        "compat": compat,
        "seed": seed,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    options = o.options(threads, device, overwrite=overwrite, allow_nonfinite=allow_nonfinite)
    configs, text = _configs(what, models or (), parameters, settings)
    # Without what changes no byte, so that the line in OUT is the same for every run.
    globs = {"keep": keep or [], "drop": drop or []}
    words = option_words({**settings, **parameters, **globs, "dequantise": dequantise or None})
    line = ["surgery", "merge", what, *(models or ()), *words, "-o", "OUT"]
    report = merge(configs, out, line=line, text=text, **globs, dequantise=dequantise, dry_run=dry_run, options=options)
    if plot and not dry_run:
        _draw(report, plot)
    _show(report, as_json=as_json)


@app.command(epilog="Example: surgery merge methods")
def methods(as_json: o.Json = False) -> None:
    """Every method: its parameters, what it does, where it comes from."""
    from merges.report import methods_table

    specs = _specs()
    if as_json:
        console.show_json(specs)
    else:
        console.show(methods_table(specs.values()))


@app.command(epilog="Example: surgery merge logits lab:sft lab:grpo -o ensemble")
def logits(
    models: Annotated[
        list[str], typer.Argument(metavar="A B …", help="Models with one and the same tokenizer."), NamesInput("model")
    ],
    out: o.Out,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One per model, in order; divided by their sum. By default all are equal."),
    ] = None,
    mode: Annotated[AveragingMode, typer.Option(help="What is averaged: logits, logprobs or probs.")] = "logits",
    tune: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Fit the combination on its `text`, or `prompt` and `response`."),
        NamesInput("path"),
    ] = None,
    tune_what: Annotated[
        TuneWhat, typer.Option(help="What --tune fits: weights, or head (a matrix on all hidden states).")
    ] = "weights",
    special_tokens: o.ReadSpecialTokens = "text",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Write one model whose logits are the mean of the models' logits (arXiv 2507.07129)."""
    from merges.ensemble import average as ensembles

    report = ensembles.average_logits(
        models,
        out,
        weights=weight,
        mode=mode,
        tune=tune,
        tune_what=tune_what,
        special_tokens=special_tokens,
        dry_run=dry_run,
        options=o.options(threads, device, overwrite=overwrite),
    )
    if as_json:
        console.show_json(report)
        return
    console.show_preflight(report.preflight, report.warnings)
    if report.tuning:
        console.message(f"  {'tuning':<14} {report.tuning.sentence()}")
    console.show(report.table())
    console.message("Nothing written (--dry-run)." if report.dry_run else f"Wrote {report.out}")


@app.command(epilog="Example: surgery merge unpack ensemble -o members")
def unpack(
    ensemble: Annotated[
        str, typer.Argument(metavar="ENSEMBLE", help="A folder that `merge logits` wrote."), NamesInput("model")
    ],
    out: o.Out,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Write an ensemble's members back, each to OUT/NAME, bit for bit as they were."""
    from merges.ensemble.unpacking import unpack as restore

    report = restore(ensemble, out, options=o.options(threads))
    if as_json:
        console.show_json(report)
    else:
        console.message(f"Wrote {', '.join(str(report.out / name) for name in report.members)}")


def _show(report: MergeReport, *, as_json: bool) -> None:
    if as_json:
        console.show_json(report)
        return
    console.show_preflight(report.preflight, report.warnings)
    if report.models:
        console.show(report.table())
    console.message("Nothing written (--dry-run)." if report.dry_run else f"Wrote {report.out}")


def _specs() -> dict[str, Any]:
    # Imported here, as the kernels beside the specifications bring torch along.
    from merges.methods.registry import METHODS

    return {name: method.spec for name, method in METHODS.items()}


def _configs(
    what: str, models: Sequence[str], parameters: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[tuple[MergeConfig, ...], str]:
    """Return the documents of a config and its text, or the command line as a config, without a text."""
    from merges.config.parse import parse_configs
    from surgery.io.yaml_models import read_text

    # A method's name wins over a file of the same name; a missing config is reported as a file, not as a method.
    if what.endswith(CONFIGS) or (what not in _specs() and Path(what).is_file()):
        _refuse_beside_config(what, models, [*parameters, *settings])
        text = read_text(Path(what))
        return parse_configs(text, what, methods=_specs()), text
    return (_config(what, models, parameters, settings),), ""


def _refuse_beside_config(config: str, models: Sequence[str], names: Sequence[str]) -> None:
    """Raise SurgeryError for options beside a config: they would have to override it, or be ignored in silence."""
    from surgery.errors import listing, usage_error

    stray = [*models, *map(option_flag, names)]
    if stray:
        raise usage_error(f"a config says all of this itself: {listing(stray)}", where=config, hint="Edit the config.")


def _config(
    method: str, models: Sequence[str], parameters: Mapping[str, Any], settings: Mapping[str, Any]
) -> MergeConfig:
    """Return the command line as a config; values are read as YAML, so that a list is a gradient."""
    from merges.config.command_line import config_for_method

    # A repeated option is one value per model; a flag is one for all.
    values = {
        name: [_value(option_flag(name), text) for text in given] if isinstance(given, list) else [given]
        for name, given in parameters.items()
    }
    return config_for_method(
        method,
        models,
        methods=_specs(),
        parameters=values,
        base=settings.get("base"),
        dtype=settings.get("dtype"),
        tokenizer_source=settings.get("tokenizer_source"),
        chat_template=settings.get("chat_template"),
        seed=settings.get("seed", 0),
        compat=settings.get("compat", "mergekit"),
    )


def _value(option: str, text: str) -> object:
    from surgery.errors import usage_error
    from surgery.io.yaml_nodes import read_documents

    nodes, errors = read_documents(text, option)
    errors.raise_if_any()
    if len(nodes) != 1:
        raise usage_error(f"got {text!r}, expected a number, or a list", where=option)
    return nodes[0].plain


def _draw(report: MergeReport, path: Path) -> None:
    if report.models:
        console.draw(report.figure(), path)
    else:
        console.message("No picture: every tensor is a copy, so there are no distances to draw.")
