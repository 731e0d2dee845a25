"""`surgery.edits.heads.scale_heads` and `surgery.edits.undo_file.undo` against `cp -r` of the same checkpoint.

A random-weight bf16 checkpoint with the shapes of Qwen2.5-1.5B (as in `transfer.py`), 3 % of its heads set to zero,
page cache warm, whole processes from start to end, medians of several rounds in which the contestants take turns.
Usage:

    python benchmarks/edit.py [--rounds 3] [--models 1.5B] [--share 0.03]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path

from measuring import against_copying
from transfer import SHAPES, WORK, machine

ROLE = "base"


def edit(name: str, out: Path, share: float) -> None:
    """Sets a random share of the heads to zero."""
    from surgery.checkpoint.selectors import Head
    from surgery.edits.heads import scale_heads

    shape = SHAPES[name]
    heads = [Head(layer, index) for layer in range(shape.layers) for index in range(shape.heads)]
    chosen = random.Random(0).sample(heads, round(share * len(heads)))
    scale_heads(str(WORK / name / ROLE), out, scales=dict.fromkeys(chosen, 0.0))


def measure(name: str, rounds: int, share: float) -> None:
    """Prints medians and peak memory of the contestants."""
    # In a process of its own: a child's peak memory counts from its parent's, so this one must stay small.
    subprocess.run([sys.executable, __file__, "--make", name], check=True)
    change = [sys.executable, __file__, "--share", str(share), "--edit", name]
    against_copying("edit heads", f"{name}, {share:.0%} of the heads", WORK / name / ROLE, change, rounds)


def make(name: str) -> None:
    """Writes the first of `transfer.py`'s siblings, the others being of no use here."""
    import transfer

    transfer.ROLES = transfer.ROLES[:1]
    transfer.make(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="1.5B")
    parser.add_argument("--share", type=float, default=0.03)
    for hidden in ("--make", "--edit", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make)
    elif options.edit:
        edit(options.edit, Path(options.out), options.share)
    else:
        print(machine())
        for name in options.models.split(","):
            measure(name, options.rounds, options.share)


if __name__ == "__main__":
    main()
