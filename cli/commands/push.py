"""`surgery push`: send what surgery wrote to the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli import options as o
from surgery.recipes.types import NamesInput

if TYPE_CHECKING:
    from surgery.publish.upload import PushPreview

EPILOG = "Example: surgery push reasoning-instruct org/reasoning-instruct"


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that surgery wrote."), NamesInput("path")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; it is made where there is none.")],
    private: Annotated[
        bool, typer.Option("--private", help="Refuse a repository that is public; one that is made is private anyway.")
    ] = False,
    public: Annotated[
        bool,
        typer.Option("--public", help="Everybody may have it: make the repository public, or push to one that is."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="R", help="A branch, made where there is none; or refs/pr/N, an open pull request."),
    ] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(metavar="M", help="Of the commit.")] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Compare names and sizes with surgery.json, but not every hash.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent, with the card's metadata; ask the Hub nothing.")
    ] = False,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Sends OUT to the Hub as one commit, with a completed model card; a push that broke off goes on where it was."""
    from surgery.publish import upload as pushing

    if dry_run:
        _show(pushing.preview_push(out, repo, revision=revision, pr=pr), as_json=as_json)
        return
    pushed = pushing.push(
        out,
        repo,
        private=private,
        public=public,
        revision=revision,
        pr=pr,
        message=message,
        verify=not no_verify,
        options=o.options(threads),
        notify=console.message,
        # huggingface_hub draws its bars into files and pipes too.
        bars=sys.stderr.isatty(),
    )
    # The address is printed even so, since a script asks for where OUT is, and not for what was sent.
    if not pushed.changed:
        console.message(f"{repo} has all of it already: nothing was committed.")
    if as_json:
        console.show_json(pushed)
    else:
        # Alone on stdout, so that a script can take it.
        console.result(pushed.url)


def _show(preview: PushPreview, *, as_json: bool) -> None:
    from surgery.io.escaping import yaml_text
    from surgery.reporting.report import Column, Table, Value

    if as_json:
        card = preview.card.metadata
        console.show_json(
            {"repo_id": preview.repo_id, "files": preview.files, "n_bytes": preview.n_bytes, "card": card}
        )
        return
    rows: list[list[Value]] = [[name, size] for name, size in {**preview.files, "all": preview.n_bytes}.items()]
    console.show(Table(f"What would go to {preview.repo_id}", [Column("file"), Column("size", "bytes")], rows))
    console.document(yaml_text(dict(preview.card.metadata)))
