"""`surgery probe …`: find the heads by which models lose their refusals, and the experts that go with thinking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cli import console
from cli import options as o
from probes.data.choices import AblationKind, AttributionForm, Engine, Phase, RowStyle, ScalingMethod, TrainingCells
from surgery.io.command_line import option_flag
from surgery.models.choices import SpecialTokens
from surgery.recipes.types import NamesInput, NamesOutput

if TYPE_CHECKING:
    from probes.experts.findings import ExpertFindings
    from probes.experts.sweep import BetaGrid
    from probes.refusal.findings import Findings
    from surgery.engine.options import ExecutionOptions
    from surgery.reporting.report import Table

F = TypeVar("F", "Findings", "ExpertFindings")

app = typer.Typer(
    help="Looks into models: refusal cliffs of reasoning models and the heads that make them (arXiv 2510.06036), and "
    "the experts that go with thinking (arXiv 2505.14681).\n\n"
    "What concerns refusal is for repairing safety: heads are ranked by how much they write against refusal of harmful "
    "requests, and side effects are measured.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Run = Annotated[
    Path, typer.Option("--from", metavar="RUN", help="A folder that `surgery probe refusal` wrote."), NamesInput("path")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N examples.")]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a batch, padding included; by default what fits.")
]
ThinkOpen = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the model writes before its thinking; found by default.")
]
ThinkClose = Annotated[str | None, typer.Option(metavar="TEXT", help="What it writes after it; found by default.")]
NoThinking = Annotated[bool, typer.Option("--no-thinking", help="The model does not think: answers follow the prompt.")]
NewTokens = Annotated[
    int | None, typer.Option(min=1, help="Of thinking and answer, where they are generated; 1024, or what fits.")
]
GenerationBatch = Annotated[int, typer.Option(min=1, help="Prompts that are completed at a time.")]
# The help of every option that takes data.
DATA = "A .jsonl, .json, .csv, .parquet or .txt file, org/name[@revision]:split[a:b] on the Hub, or lab:NAME."


FindingsOut = Annotated[
    Path | None,
    typer.Option("-o", "--out", metavar="RUN", help="The folder for results, report and pictures."),
    NamesOutput("folder"),
]
ProbesTransfer = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="A second data set that the probes are tested on."),
    NamesInput("data"),
]
Cells = Annotated[
    TrainingCells,
    typer.Option(help="Train on all four cells, or paper: harmful/refused against harmless/complied."),
]
Attribution = Annotated[
    AttributionForm, typer.Option(help="How heads are scored: exact (final norm folded in), or paper.")
]
RefusalPhrases = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="One phrase per line that marks a refusal, for the built-in list."),
    NamesInput("path"),
]
Guard = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A guard model that judges answers, given prompt and whole answer."),
    NamesInput("model"),
]
LivePrompt = Annotated[
    str | None,
    typer.Option(metavar="PROMPT", help="Watch one prompt being answered, with the probe of --from RUN."),
]
LiveRun = Annotated[
    Path | None, typer.Option("--from", metavar="RUN", help="With --live: whose probe."), NamesInput("path")
]


@app.command(epilog="Example: surgery probe refusal lab:cliff --data lab:cliff -o cliff")
def refusal(
    model: o.Model,
    data: Annotated[str | None, typer.Option(metavar="DATA", help=DATA), NamesInput("data")] = None,
    out: FindingsOut = None,
    transfer: ProbesTransfer = None,
    cells: Cells = "all",
    attribution: Attribution = "exact",
    folds: Annotated[int, typer.Option(min=2, help="Of the grouped cross-validation.")] = 5,
    strength: Annotated[float, typer.Option(help="C of the logistic regression: inverse penalty.")] = 1.0,
    special_tokens: o.ReadSpecialTokens = "text",
    limit: Limit = None,
    think_open: ThinkOpen = None,
    think_close: ThinkClose = None,
    no_thinking: NoThinking = False,
    max_new_tokens: NewTokens = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of generation; 0 is greedy.")] = 0.0,
    generation_batch: GenerationBatch = 16,
    engine: Annotated[Engine, typer.Option(help="What generates: transformers or vllm.")] = "transformers",
    refusal_phrases: RefusalPhrases = None,
    guard: Guard = None,
    live: LivePrompt = None,
    run: LiveRun = None,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, bootstrap and draws.")] = 0,
    dtype: o.ModelDtype = "auto",
    batch_tokens: BatchTokens = None,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Train refusal probes, trace every token, measure the cliffs, score all heads; one run, one report."""
    from surgery.errors import usage_error

    options = o.options(threads, device, overwrite=overwrite)
    # Watching one answer needs a finished run's probe and writes nothing.
    if live is not None:
        if run is None or data is not None or out is not None:
            raise usage_error("--live takes the probe of a run: give --from RUN, and neither --data nor -o.")
        _watch(model, run, live, max_new_tokens, special_tokens, dtype, options, as_json=as_json)
        return
    if run is not None:
        raise usage_error("--from RUN goes with --live PROMPT: a new run is named by -o.")
    if data is None or out is None:
        raise usage_error(
            "what is to be probed, and where do the findings go?", hint="Add --data DATA and -o RUN (or --live PROMPT)."
        )
    from probes.data.preparation import GenerationOptions
    from probes.refusal.fitted_probes import ProbeTraining
    from probes.refusal.run import probe_refusal

    asking = GenerationOptions(
        think_open=think_open,
        think_close=think_close,
        no_thinking=no_thinking,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=generation_batch,
        engine=engine,
        phrases=refusal_phrases,
        guard=guard,
    )
    training = ProbeTraining(cells=cells, folds=folds, strength=strength, seed=seed)
    findings = probe_refusal(
        model,
        data,
        out,
        transfer=transfer,
        asking=asking,
        training=training,
        attribution=attribution,
        special_tokens=special_tokens,
        limit=limit,
        dtype=dtype,
        batch_tokens=batch_tokens,
        options=options,
    )
    _show(findings, out, as_json=as_json)


@app.command(epilog="Example: surgery probe heads lab:cliff --from cliff --top 10%")
def heads(
    model: o.Model,
    run: Run,
    top: Annotated[
        str,
        typer.Option(
            metavar="SHARE|COUNT",
            help="Candidates for sets: the lowest of the screen; at least 6, at most half of all.",
        ),
    ] = "5%",
    ablate: Annotated[
        AblationKind, typer.Option(help="z ← γ·z (scale), its mean (mean), or a harmless example's (resample).")
    ] = "scale",
    scale: Annotated[float, typer.Option(help="γ of --ablate scale; 0 removes.")] = 0.0,
    positions: Annotated[
        str, typer.Option(metavar="K|all", help="Where single heads are ablated: the last K before the answer, or all.")
    ] = "4",
    kl_budget: Annotated[
        float, typer.Option(min=0, help="KL on harmless answers that no set may exceed, in nats per token.")
    ] = 0.1,
    controls: Annotated[int, typer.Option(min=0, help="Random sets as the control.")] = 5,
    examples: Annotated[int, typer.Option(min=1, help="Examples of each kind at most.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the random sets.")] = 0,
    dtype: o.ModelDtype = "auto",
    batch_tokens: BatchTokens = None,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Prove by ablation which of the screened heads suppress refusal: alone, in sets, and against random sets."""
    from probes.refusal.heads.ablation_study import ProofOptions
    from probes.refusal.heads.causal_proof import prove_heads

    proof = ProofOptions(
        top=top,
        kind=ablate,
        scale=scale,
        positions=None if positions == "all" else o.count(positions, "positions"),
        budget=kl_budget,
        controls=controls,
        examples=examples,
        seed=seed,
    )
    findings = prove_heads(
        model, run, proof=proof, dtype=dtype, batch_tokens=batch_tokens, options=o.options(threads, device)
    )
    # Only the proof: the tables before it were shown when RUN was written.
    _show(findings, run, as_json=as_json, last=1)


@app.command(
    epilog="Example: surgery probe judge lab:cliff --from cliff --data lab:cliff/pool --top 5% -o subset.jsonl"
)
def judge(
    model: o.Model,
    run: Run,
    data: Annotated[str, typer.Option(metavar="POOL", help=DATA), NamesInput("data")],
    top: Annotated[str, typer.Option(metavar="SHARE|COUNT", help="How many of the pool to keep.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The .jsonl file to write."), NamesOutput("file")
    ],
    style: Annotated[RowStyle, typer.Option(help="Rows for trl (messages) or llama-factory (alpaca).")] = "trl",
    special_tokens: o.ReadSpecialTokens = "text",
    limit: Limit = None,
    dtype: o.ModelDtype = "auto",
    batch_tokens: BatchTokens = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Choose the few examples worth training on: those with the deepest cliffs (Cliff-as-a-Judge)."""
    from probes.refusal import cliff_judge

    selection = cliff_judge.judge(
        model,
        run,
        data,
        out,
        top=top,
        style=style,
        special_tokens=special_tokens,
        limit=limit,
        dtype=dtype,
        batch_tokens=batch_tokens,
        options=o.options(threads, device, overwrite=overwrite),
    )
    if as_json:
        console.show_json(selection)
        return
    console.show(selection.table())
    console.message(f"Wrote {selection.out}")


MarkerTokens = Annotated[
    list[str],
    typer.Option(metavar="[±][w*]TEXT", help="A marker of thinking, -TEXT for one that ends it; may be repeated."),
]
RankingTransfer = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="A second data set, to hold the ranking against."),
    NamesInput("data"),
]
BetaSweep = Annotated[
    str | None, typer.Option(metavar="β,β,…", help="A grid such as 1,2,4,…,512 to try on --task, with controls.")
]
SweepTasks = Annotated[
    list[str] | None,
    typer.Option(help="An lm-evaluation-harness task for --sweep; may be repeated."),
    NamesInput("task"),
]
SweepTop = Annotated[
    int | None,
    typer.Option(min=1, help="With --sweep: how many of the ranked experts are reinforced; 2 by default."),
]
SweepMethod = Annotated[
    ScalingMethod | None,
    typer.Option(help="With --sweep: weight (the default), renormalised, logit or forced; only weight can be baked."),
]
SweepPhase = Annotated[
    Phase | None, typer.Option(help="With --sweep: all positions (the default), or only generated ones.")
]
SweepControls = Annotated[
    int | None,
    typer.Option(min=0, help="With --sweep: random sets, matched on layer and firing rate; 5 by default."),
]
SweepTaskLimit = Annotated[int | None, typer.Option(min=1, help="With --sweep: only the first N samples of each task.")]
MinimumFires = Annotated[int, typer.Option(min=0, help="Support: positions at which a ranked expert fires, at least.")]


@app.command(
    epilog="Example: surgery probe experts lab:moe --data lab:moe --token '<think>' --token=-'</think>' -o experts"
)
def experts(
    model: o.Model,
    data: Annotated[str, typer.Option(metavar="DATA", help=DATA), NamesInput("data")],
    token: MarkerTokens,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="RUN", help="The folder for results, report, pictures."),
        NamesOutput("folder"),
    ],
    transfer: RankingTransfer = None,
    sweep: BetaSweep = None,
    task: SweepTasks = None,
    top: SweepTop = None,
    way: SweepMethod = None,
    phase: SweepPhase = None,
    controls: SweepControls = None,
    task_limit: SweepTaskLimit = None,
    fires: MinimumFires = 50,
    at_marker: Annotated[int, typer.Option(min=0, help="Support: of these, at the markers, at least.")] = 10,
    special_tokens: o.ReadSpecialTokens = "text",
    limit: Limit = None,
    think_open: ThinkOpen = None,
    think_close: ThinkClose = None,
    no_thinking: NoThinking = False,
    max_new_tokens: NewTokens = None,
    generation_batch: GenerationBatch = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and the controls.")] = 0,
    dtype: o.ModelDtype = "auto",
    batch_tokens: BatchTokens = None,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Count which experts fire at the markers of thinking, rank them by nPMI, try how strongly to reinforce them."""
    from probes.data.preparation import GenerationOptions
    from probes.experts.run import probe_experts
    from probes.experts.scoring import Support

    grid = _sweep_grid(
        sweep,
        task or (),
        {"top": top, "way": way, "phase": phase, "controls": controls, "task_limit": task_limit},
        batch_size=generation_batch,
        seed=seed,
    )
    findings = probe_experts(
        model,
        data,
        token,
        out,
        transfer=transfer,
        support=Support(fires=fires, at_marker=at_marker),
        grid=grid,
        asking=GenerationOptions(
            think_open=think_open,
            think_close=think_close,
            no_thinking=no_thinking,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=generation_batch,
        ),
        special_tokens=special_tokens,
        limit=limit,
        dtype=dtype,
        batch_tokens=batch_tokens,
        seed=seed,
        options=o.options(threads, device, overwrite=overwrite),
    )
    _show_experts(findings, out, as_json=as_json)


def _sweep_grid(
    sweep: str | None, tasks: Sequence[str], given: Mapping[str, Any], *, batch_size: int, seed: int
) -> BetaGrid | None:
    """Return the grid that `--sweep` asks for; None without it. given: the options that need it, by their names."""
    from probes.experts.sweep import BetaGrid, parse_betas
    from surgery.errors import usage_error

    if (sweep is None) != (not tasks):
        raise usage_error("a sweep needs a grid and a task to score it on: give both --sweep and --task.")
    # What is not given is left to BetaGrid's own defaults.
    chosen = {name: value for name, value in given.items() if value is not None}
    if sweep is None:
        if chosen:
            raise usage_error("goes with --sweep", where=option_flag(next(iter(chosen))))
        return None
    # `--limit` is for the data of the probe, so the sweep's own has another name.
    limit = chosen.pop("task_limit", None)
    return BetaGrid(parse_betas(sweep), tasks, **chosen, limit=limit, batch_size=batch_size, seed=seed)


@app.command(epilog="Example: surgery probe show cliff")
def show(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A folder that `surgery probe refusal` or `experts` wrote."),
        NamesInput("path"),
    ],
    as_json: o.Json = False,
) -> None:
    """The tables of a run; its report.html has the pictures."""
    from probes.data.records import findings_kind
    from probes.experts.findings import KIND, read_expert_findings
    from probes.refusal.findings import read_findings

    if findings_kind(run) == KIND:
        _show_experts(read_expert_findings(run), run, as_json=as_json)
    else:
        _show(read_findings(run), run, as_json=as_json)


def _show_experts(findings: ExpertFindings, run: Path, *, as_json: bool) -> None:
    from probes.experts.report import expert_sentences, expert_tables

    _print_findings(findings, run, expert_tables, expert_sentences, as_json=as_json)


def _show(findings: Findings, run: Path, *, as_json: bool, last: int = 0) -> None:
    """Print the tables, or only the `last` ones."""
    from probes.refusal.tables import refusal_sentences, refusal_tables

    _print_findings(findings, run, refusal_tables, refusal_sentences, as_json=as_json, last=last)


def _print_findings(
    findings: F,
    run: Path,
    tables: Callable[[F], Sequence[Table]],
    sentences: Callable[[F], Sequence[str]],
    *,
    as_json: bool,
    last: int = 0,
) -> None:
    from probes.data.records import REPORT

    if as_json:
        console.show_json(findings.model_dump(mode="json"))
        return
    for warning in findings.warnings:
        console.warn(warning)
    # With `last` = 0 the slice is the whole list.
    console.show(*tables(findings)[-last:])
    for sentence in sentences(findings)[-last:]:
        console.message(sentence)
    console.message(f"Report: {run / REPORT}")


def _watch(
    model: str,
    run: Path,
    prompt: str,
    max_new_tokens: int | None,
    special_tokens: SpecialTokens,
    dtype: str,
    options: ExecutionOptions,
    *,
    as_json: bool,
) -> None:
    from probes.refusal.live_trace import live_probe

    trace = live_probe(
        model,
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        special_tokens=special_tokens,
        dtype=dtype,
        options=options,
        # Tokens are printed as they come, unless stdout is to hold one JSON object and nothing else.
        on_token=(lambda text, score: None) if as_json else console.scored_token,
    )
    if as_json:
        console.show_json(trace)
        return
    console.message("")
    console.message(trace.sentence())
