"""The Typer application with every command except `run`, `push` and `reproduce`, which `cli.main` adds.

`cli.commands.run` reads the commands that a recipe's step may name from here, so it must not be imported by this
module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from cli.commands import edit, grow, lab, merge, models, probe, vector
from surgery.checkpoint.dtypes import TORCH_NAMES, dtype_guess
from surgery.errors import SurgeryError, did_you_mean, usage_error
from surgery.io.escaping import one_line


class StoppedError(Exception):
    """Ctrl-C, as an exception that Typer lets pass; at a KeyboardInterrupt it would exit without a message."""


@contextmanager
def _escaped_usage_errors() -> Iterator[None]:
    """Escape what Typer says of words that it cannot use: it prints that by itself, past `cli.console`."""
    try:
        yield
    # All of Typer's own errors have these two; their common class is not public.
    except Exception as error:
        if hasattr(error, "format_message") and isinstance(message := getattr(error, "message", None), str):
            error.message = one_line(message)  # type: ignore[attr-defined]
        raise


class _Commands(TyperGroup):
    def make_context(self, *args: Any, **settings: Any) -> Any:
        try:
            with _escaped_usage_errors():
                return super().make_context(*args, **settings)
        except KeyboardInterrupt as stopped:
            raise StoppedError from stopped

    def invoke(self, ctx: Any) -> Any:
        try:
            with _escaped_usage_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise StoppedError from stopped
        # Raised while the command line is parsed; Typer itself would print it with a usage text of several lines.
        except typer.BadParameter as error:
            raise _wrong_choice(error) or error from error


# What Typer says of a value that is none of a `Literal`'s; all of its versions have these words.
_WRONG_CHOICE = re.compile(r"'(?P<value>.*)' is not one of (?P<allowed>'.*')")


def _wrong_choice(error: typer.BadParameter) -> SurgeryError | None:
    """Return `error` in the words of our own errors, with the nearest value, if it is about one of a few choices."""
    match = _WRONG_CHOICE.search(error.message)
    if match is None or error.param is None:
        return None
    # The message ends with the allowed values, quoted and in the order of the Literal.
    allowed = re.findall("'(.*?)'", match["allowed"])
    value = match["value"]
    # Dtypes have other names that are spelt quite differently: half, double.
    hint = dtype_guess(value) if set(TORCH_NAMES) <= set(allowed) else None
    return usage_error(
        f"got {value!r}, expected {', '.join(allowed[:-1])} or {allowed[-1]}",
        # The long form: `--out`, not `-o`.
        where=max(error.param.opts, key=len),
        hint=hint or did_you_mean(value, allowed),
    )


app = typer.Typer(
    name="surgery",
    cls=_Commands,
    help="Takes language-model checkpoints apart and puts them together better, on the weights themselves.\n\n"
    "MODEL is a local folder, a single .safetensors file, org/name[@revision] on the Hub, a PEFT LoRA adapter "
    "folder, BASE+ADAPTER, or lab:NAME.\n\n"
    "Example: surgery vector transfer lab:grpo lab:sft lab:instruct -o reasoning-instruct",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    # Errors are one line (see `cli.main.run`); Typer's own tracebacks would print the values of all locals too.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# These four are commands by themselves: `surgery diff`, not `surgery models diff`.
models.register(app)
app.add_typer(vector.app, name="vector")
app.add_typer(merge.app, name="merge")
app.add_typer(probe.app, name="probe")
app.add_typer(edit.app, name="edit")
app.add_typer(grow.app, name="grow")
app.add_typer(lab.app, name="lab")
