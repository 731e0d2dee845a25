"""What the fuzzer runs on mutated files: a function per kind of file, as the command that reads such files calls it."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path

from support.fuzz_answers import HUB_TARGETS
from support.fuzz_corpus import FAMILIES, MERGES, ONE_THREAD
from support.fuzz_run_records import RECORD_TARGETS
from support.fuzz_run_targets import RUN_TARGETS
from support.fuzz_templates import TEMPLATE_TARGETS
from support.fuzzing import FuzzTarget

from cli import main
from cli.commands.reproduce import reproduce
from cli.commands.run import run_recipe
from merges.run import merge
from surgery.checkpoint.inspect import inspect_checkpoint, inspect_tables
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.edits.heads import scale_heads
from surgery.edits.undo_file import undo
from surgery.engine.verification import verify
from surgery.errors import FAILED, WRONG_USAGE, SurgeryError
from surgery.evaluation import harness
from surgery.publish.upload import preview_push
from surgery.vectors.application import apply, transfer
from surgery.vectors.comparison import compare

_SHOWN = "\n\t"  # control characters that a terminal may get


def command(*arguments: object) -> None:
    """Run a command in this process; raise SurgeryError where it refuses, AssertionError where it breaks a promise."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["surgery", *map(str, arguments)]
    code: object = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main.run()
        except SystemExit as left:
            code = left.code or 0
    text = out.getvalue() + err.getvalue()
    assert code in (0, FAILED, WRONG_USAGE), f"exit code {code}: {text[-500:]}"
    assert "internal error" not in text and "out of memory" not in text, text[-500:]
    controls = sorted({ascii(c) for c in text if not c.isprintable() and c not in _SHOWN})
    assert not controls, f"prints {controls[:9]}"
    if code:
        raise SurgeryError(err.getvalue(), exit_code=FAILED)


def prepare_targets() -> None:
    """Set up this process before workers are forked from it."""
    # A name that is no task has lm-eval read its thousands of own files, once in a process. They are no input.
    import urllib3.util.connection  # noqa: F401 - it tries once whether this machine has IPv6, by opening a socket

    index = harness._index
    harness._index = lru_cache(lambda defaults: index(False))  # type: ignore[assignment]


# Checkpoints


def _inspect(folder: Path, out: Path) -> None:
    inspect_tables(inspect_checkpoint(open_checkpoint(folder)))


def _inspect_command(folder: Path, out: Path) -> None:
    command("inspect", folder)


def _verify(folder: Path, out: Path) -> None:
    verify(str(folder), options=ONE_THREAD).sentence()


def _edit(folder: Path, out: Path) -> None:
    scale_heads(str(folder), out, scales={Head(0, 1): 0.0}, options=ONE_THREAD)


def _tokenizer(folder: Path, out: Path) -> None:
    read_vocabulary(folder)
    inspect_checkpoint(open_checkpoint(folder))


def _adapter(folder: Path, out: Path) -> None:
    checkpoint = open_checkpoint(folder / "lora")
    inspect_tables(inspect_checkpoint(checkpoint))


# Merges, vectors, edits


def _merge_plan(folder: Path, out: Path) -> None:
    merge(Path("merge.yml"), out, dry_run=True, options=ONE_THREAD)


def _merge(folder: Path, out: Path) -> None:
    merge(Path("merge.yml"), out, options=ONE_THREAD)


def _apply_vector(folder: Path, out: Path) -> None:
    apply(str(folder / "vector"), str(folder / "target"), out, options=ONE_THREAD)


def _compare_vectors(folder: Path, out: Path) -> None:
    compare([str(folder / "vector"), str(folder / "vector")], options=ONE_THREAD).table()


def _transfer(folder: Path, out: Path) -> None:
    tuned, base, target = (str(folder / name) for name in ("a", "base", "other"))
    transfer(tuned, base, target, out, vocab="by-token", dry_run=True, options=ONE_THREAD)


def _undo(folder: Path, out: Path) -> None:
    undo(str(folder / "out"), out, options=ONE_THREAD)


# Results


def _verify_result(folder: Path, out: Path) -> None:
    verify(str(folder / "out"), options=ONE_THREAD).sentence()


def _reproduce(folder: Path, out: Path) -> None:
    def run(words: Sequence[str]) -> int:
        # As the real one: a command is parsed, and none may write elsewhere than into the temporary folder.
        outputs = [words[at + 1] for at in range(len(words) - 1) if words[at] in ("-o", "--out")]
        tmp = str(folder.parent / "tmp")
        assert len(outputs) == 1 and outputs[0].startswith(tmp), f"{words} writes elsewhere"
        assert not any(word.startswith(("--overwrite", "--plot", "--out=")) for word in words), words
        shutil.copytree(folder / "again", outputs[0])
        return 0

    reproduce(str(folder / "out"), run=run).table()


def _push(folder: Path, out: Path) -> None:
    preview_push(folder / "out", "lab/out")


# Recipes


def _recipe(folder: Path, out: Path) -> None:
    run_recipe(Path("recipes.yaml"), "main", out, dry_run=True)


def _recipe_command(folder: Path, out: Path) -> None:
    command("run", "main", "--file", "recipes.yaml", "-o", out, "--dry-run")


WEIGHTS, CONFIG = "*.safetensors", "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_RECIPE = ("recipes.yaml", "merge.yml")
_MERGES = tuple(f"merge-{name}" for name in MERGES)

TARGETS = (
    FuzzTarget("header", ("model", "gpt2", "mixtral"), (WEIGHTS,), _inspect, weight=3),
    FuzzTarget("index", ("sharded",), ("*.index.json", WEIGHTS), _inspect, weight=2),
    FuzzTarget("config", ("model", *FAMILIES), (CONFIG,), _inspect, weight=3),
    FuzzTarget("inspect", ("model", "sharded", *FAMILIES), (CONFIG, WEIGHTS, "*.json"), _inspect_command, every=2),
    FuzzTarget("verify", ("model", "sharded"), (WEIGHTS, "*.json"), _verify),
    FuzzTarget("edit", ("model", "gpt2", "sharded"), (WEIGHTS, "*.json"), _edit),
    FuzzTarget("tokenizer", ("model",), TOKENIZERS, _tokenizer, weight=2),
    FuzzTarget("adapter", ("merge",), ("lora/*.json", "lora/*.safetensors"), _adapter, weight=3, follows=True),
    FuzzTarget("merge config", _MERGES, ("merge.yml",), _merge_plan, weight=3, named=("merge.yml",), follows=True),
    FuzzTarget("merge models", _MERGES, ("*/*.json", "*/*.safetensors"), _merge_plan, weight=2, follows=True),
    FuzzTarget(
        "merge", _MERGES, ("merge.yml", "*/*.json", "*/*.safetensors"), _merge, named=("merge.yml",), follows=True
    ),
    FuzzTarget("transfer", ("merge",), ("a/*", "base/*", "other/*"), _transfer),
    FuzzTarget("vector", ("vector",), ("vector/*", "vector/donor/*", "target/*"), _apply_vector, weight=2),
    FuzzTarget("compare", ("vector",), ("vector/*",), _compare_vectors),
    FuzzTarget("undo", ("edited",), ("out/undo/*", "out/*"), _undo, weight=2),
    FuzzTarget("verify result", ("result",), ("out/surgery.json", "out/*"), _verify_result),
    FuzzTarget("reproduce", ("result", "edited"), ("out/surgery.json",), _reproduce, weight=3),
    FuzzTarget("push", ("result", "edited"), ("out/surgery.json", "out/README.md", "out/*"), _push, weight=2),
    FuzzTarget("recipe", ("recipes",), ("recipes.yaml",), _recipe, weight=3, named=_RECIPE, follows=True),
    FuzzTarget("recipe command", ("recipes",), _RECIPE, _recipe_command, named=_RECIPE, follows=True, every=2),
    *RUN_TARGETS,
    *HUB_TARGETS,
    *TEMPLATE_TARGETS,
    *RECORD_TARGETS,
)
