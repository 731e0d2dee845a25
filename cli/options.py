"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.checkpoint.dtypes import ComputeDtype, OutputDtype
from surgery.io.command_line import option_flag
from surgery.models.choices import SpecialTokens
from surgery.recipes.types import NamesInput, NamesOutput
from surgery.vectors.choices import VocabPolicy

# Not at run time, here and in all modules of commands: it imports torch, for which `--help` and Tab completion must not
# wait. Functions of commands import what they call themselves.
if TYPE_CHECKING:
    from surgery.engine.options import ExecutionOptions

# `NamesInput` is for recipes: it says what the text names, so that a run checks before its first step that all of it is
# there. `NamesOutput` says that something is written there: no recipe and no manifest may say where. Every parameter
# that is a path has one of the two, which a test asks for.
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder, .safetensors file, org/name[@revision], adapter or lab:NAME."),
    NamesInput("model"),
]
Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="OUT", help="The folder to write; it appears whole or not at all."),
    NamesOutput("folder"),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Edit only tensors whose name matches; may be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Leave tensors whose name matches as they are; may be repeated."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Copy tensors that only some models have from the base, or the first that has them, where their name "
        "matches; may be repeated.",
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Leave tensors whose name matches out of OUT; may be repeated."),
]
Scale = Annotated[float, typer.Option(help="α; negative subtracts.")]
ScaleFor = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB=α", help="α for the tensors that match; the last match counts; may be repeated."),
]
Vocab = Annotated[
    VocabPolicy,
    typer.Option(help="Where tokenizers differ: strict (refuse), by-token (align rows), skip-embeddings."),
]
Unrelated = Annotated[bool, typer.Option("--allow-unrelated", help="Go on where the models share no ancestor.")]
Dequantise = Annotated[
    bool, typer.Option("--dequantise", help="See weights in FP8 with scales, and MXFP4, as bf16; by default refused.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Stop after the checks; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
ReadSpecialTokens = Annotated[
    SpecialTokens,
    typer.Option(help="What special tokens and markers of thinking in given texts are: text, or those tokens (parse)."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Processors to work on; by default all.")]
Device = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu or cuda[:N].")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that surgery wrote.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Write NaN and infinite values instead of stopping.")
]
Dtype = Annotated[
    OutputDtype | None,
    typer.Option("--dtype", help="Store float tensors as float32, bfloat16, …; by default as in TARGET."),
]
ModelDtype = Annotated[
    ComputeDtype, typer.Option("--dtype", help="What the model computes in: auto (as stored), float32, bfloat16, …")
]


def options(
    threads: int | None = None, device: str = "cpu", *, overwrite: bool = False, allow_nonfinite: bool = False
) -> ExecutionOptions:
    """Return the library's `ExecutionOptions`, with a progress bar on stderr."""
    from surgery.engine.options import ExecutionOptions
    from surgery.runtime.progress import terminal

    return ExecutionOptions(threads, device, overwrite, allow_nonfinite, terminal)


def count(value: str, name: str) -> int:
    """Return `value` as a whole number from 1 on. Raises SurgeryError."""
    from surgery.errors import usage_error

    # `int` alone would also take ` 4`, `+4` and `1_000`.
    if not value.isdecimal() or int(value) < 1:
        raise usage_error(f"got {value!r}, expected a whole number from 1 on, or all", where=option_flag(name))
    return int(value)
