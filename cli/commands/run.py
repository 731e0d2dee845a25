"""`surgery run`: run pipelines from a YAML file; and list the commands that their steps may name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli import options as o
from cli.app import app
from cli.signatures import Signature, signatures
from surgery.recipes.types import Command, NamesInput, NamesOutput
from surgery.runtime.interrupts import stopped_exit_code

if TYPE_CHECKING:
    from surgery.recipes.run.preview import RunPreview
    from surgery.recipes.run.scheduler import RunReport

EPILOG = "Example: surgery run reasoning-vector --set scale=0.5 -o runs/half"
FILE = Path("recipes.yaml")
RUNS = Path("runs")

# Commands that are no steps: they run recipes, leave nothing behind, or leave this machine.
NO_STEPS = frozenset({"run", "push", "reproduce", "lab list", "lab build", "merge methods", "probe show"})
# Options that a run sets for its steps (whether results are replaced) or that are for people at a terminal: a step that
# sets one itself would break the run's bookkeeping. Nor does a step say where anything is written: `NamesOutput`.
ENGINES = frozenset({"json", "overwrite", "dry-run", "help"})
# Commands that change a folder that they are given, with the option that names it.
CHANGING = {"probe heads": "from", "grow baseline": "out"}
# Commands whose folder fills while they work, and that go on in it: that it exists does not mean that they are done.
FILLING = frozenset({"grow run", "grow baseline"})
FILE_SUFFIX = ".jsonl"  # of the results that are no folders


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A recipe of the file; without one, they are listed.")
    ] = None,
    file: Annotated[Path, typer.Option(metavar="YAML", help="The file with the recipes."), NamesInput("path")] = FILE,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A variable of the recipe; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="RUN", help="The run's folder; runs/NAME by default."),
        NamesOutput("folder"),
    ] = None,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Do this step again, and all that follow it.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Steps side by side at most; by default half the processors.")
    ] = None,
    allow_push: Annotated[
        list[str] | None,
        typer.Option(metavar="ORG/NAME", help="Push to this repository, which the file names; may be repeated."),
    ] = None,
    allow_write: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Write into this folder, which a file names; may be repeated."),
        NamesInput("path"),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="What goes to public repositories may be made from local files.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipe files.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show what would be done; do nothing.")] = False,
    as_json: o.Json = False,
) -> None:
    """Runs a recipe: its steps in order, side by side where they can be; the same command goes on where it was."""
    if schema:
        from surgery.recipes.parse.schema import json_schema

        console.show_json(json_schema(commands()))
        return
    if name is None:
        _list(file, as_json=as_json)
        return
    folder = RUNS / name if out is None else out
    # With --from the same command would do again what has just been done.
    again = "The same command" if from_step is None else "The same command without --from"
    try:
        report = run_recipe(
            file,
            name,
            folder,
            settings=dict(map(_setting, settings or ())),
            jobs=jobs,
            from_step=from_step,
            dry_run=dry_run,
            allow_push=allow_push or (),
            allow_write=allow_write or (),
            public=public,
            ask=console.ask if console.can_ask() else None,
            notify=console.message,
            bars=sys.stderr.isatty(),
            show=(lambda preview: None) if as_json else partial(_show, commands=dry_run),
        )
    except KeyboardInterrupt as stopped:
        console.error(f"stopped. {again} goes on where it was.")
        raise typer.Exit(stopped_exit_code()) from stopped
    if as_json:
        console.show_json(_record(report, folder))
    elif dry_run:
        console.message("Nothing done (--dry-run).")
    # Raised last: what was done is shown even where a step failed.
    error = report.error(folder, again=again)
    if report.report is not None:
        console.message(f"Report: {report.report}")
    if error is not None:
        raise error


def run_recipe(
    file: Path,
    name: str,
    out: Path | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    jobs: int | None = None,
    from_step: str | None = None,
    dry_run: bool = False,
    allow_push: Sequence[str] = (),
    allow_write: Sequence[Path] = (),
    public: bool = False,
    ask: Callable[[str], bool] | None = None,
    show: Callable[[RunPreview], None] = lambda preview: None,
    notify: Callable[[str], None] = lambda text: None,
    bars: bool = False,
) -> RunReport:
    """Check the recipe `name` of `file`, and run its steps as far as they are not done yet.

    This function is not in `surgery.recipes`, because steps are commands, and only the command line knows them all.

    Example:
        surgery.run_recipe(Path("recipes.yaml"), "reasoning-vector", settings={"task": "lab_sums"})

    Args:
        out: the run's folder; `runs/NAME` by default.
        settings: values of the recipe's variables, as typed after `--set`.
        jobs: the largest number of steps that run in parallel; None for half of the processors.
        from_step: a step that is done again, with all that depend on it.
        dry_run: stop after the checks and `show`; nothing is written.
        allow_push: repositories that may be pushed to though only the file names them.
        allow_write: folders outside of the run's that may be written to though only a file names them.
        public: whether everybody may have what was made from local files, where it goes to a public repository.
        ask: asks the user for what is not allowed so; returns yes or no. Without it that is an error.
        show: called with the preview before anything is done.
        notify: called with a line per event.
        bars: whether huggingface_hub draws its progress bars on stderr while results are pushed.

    Raises:
        SurgeryError: the file or a value in it is wrong (every error at once); as
            `surgery.recipes.run.scheduler.run_pipeline`. For a step that fails see `RunReport.error`.
        KeyboardInterrupt: Ctrl-C; all steps have ended then.
    """
    from surgery.recipes.parse.graph import build_pipeline
    from surgery.recipes.run.consent import Consent
    from surgery.recipes.run.scheduler import run_pipeline

    pipeline = build_pipeline(file, name, commands=commands(), settings=settings)
    return run_pipeline(
        pipeline,
        RUNS / name if out is None else out,
        jobs=jobs,
        from_step=from_step,
        dry_run=dry_run,
        consent=Consent(tuple(allow_push), tuple(allow_write), public, ask),
        show=show,
        notify=notify,
        bars=bars,
    )


def commands() -> dict[str, Command]:
    """Return the commands that a step may name, from the functions that the command line is made of."""
    return {each.name: _command(each) for each in signatures(app) if each.name not in NO_STEPS}


def _command(signature: Signature) -> Command:
    parameters = {each.name: each for each in signature.parameters}
    changes = CHANGING.get(signature.name)
    output = next((each for each in signature.parameters if each.writes in ("folder", "file")), None)
    flags = {each.writes: each.flag for each in signature.parameters if each.writes is not None}
    return Command(
        signature.name,
        signature.help,
        {
            key: each
            for key, each in parameters.items()
            if key == changes or (key not in ENGINES and each.writes is None)
        },
        writes=changes if output is None else output.name,
        changes=changes,
        goes_on=signature.name in FILLING,
        plots=flags.get("picture"),
        suffix=FILE_SUFFIX if output is not None and output.writes == "file" else "",
        cards=flags.get("cards"),
        output=output,
    )


def _setting(text: str) -> tuple[str, str]:
    from surgery.errors import usage_error

    # At the first sign: the value may hold more of them. It may be empty, the key may not.
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise usage_error(f"got {text!r}, expected KEY=VALUE", where="--set")
    return key, value


def _list(file: Path, *, as_json: bool) -> None:
    from surgery.recipes.parse.file import recipes_in
    from surgery.reporting.report import Column, Table

    recipes = recipes_in(file)
    if as_json:
        console.show_json({"recipes": [each._asdict() for each in recipes]})
        return
    rows = [(each.name, each.about, ", ".join(f"{key} {text}" for key, text in each.needs.items())) for each in recipes]
    console.show(Table(str(file), [Column("recipe"), Column("what it does"), Column("needs")], rows))


def _show(preview: RunPreview, *, commands: bool) -> None:
    console.show(*preview.tables(commands=commands))


def _record(report: RunReport, folder: Path) -> dict[str, Any]:
    preview = report.preview
    steps = {
        step.step.name: {
            "command": step.step.command.name,
            "line": preview.access.lines[step.step.name],
            "was_done": step.is_done,
            "memory": step.estimate.memory,
            "disk": step.estimate.disk,
            "state": report.statuses.get(step.step.name),
            # A step that was never started has neither.
            **(
                {"output": known.output, "seconds": known.seconds}
                if (known := report.steps.get(step.step.name))
                else {}
            ),
        }
        for step in preview.steps
    }
    return {
        "recipe": preview.pipeline.recipe,
        "run": folder,
        "steps": steps,
        "downloads": preview.downloads,
        "reads": preview.access.reads,
        "writes": preview.access.writes,
        "publishes": [
            {
                "to": each.push.repo_id,
                "revision": each.push.revision,
                "pull_request": each.push.pr,
                "step": each.push.node,
                "inside": each.push.inside,
                "visibility": each.visibility,
                "needs_consent": not each.push.is_allowed,
            }
            for each in preview.access.pushes
        ],
        "notes": preview.notes,
        "pushes": report.pushes,
        "report": report.report,
    }
