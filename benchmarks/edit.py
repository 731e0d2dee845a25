"""`surgery.edits.scale_heads` and `surgery.undo.undo` against `cp -r` of the same checkpoint.

A random-weight bf16 checkpoint with the shapes of Qwen2.5-1.5B (as in `transfer.py`), 3 % of its heads set to zero,
page cache warm, whole processes from start to end, medians of several rounds in which the contestants take turns.
Usage:

    python benchmarks/edit.py [--rounds 3] [--models 1.5B] [--share 0.03]
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from transfer import SETTLE, SHAPES, START_UP, WORK, machine, remove, timed

MEMORY_LIMIT = 600.0  # MB
ROLE = "base"


def edit(name: str, out: Path, share: float) -> None:
    """Sets a random share of the heads to zero."""
    from surgery.edits import scale_heads
    from surgery.heads import Head

    shape = SHAPES[name]
    heads = [Head(layer, index) for layer in range(shape.layers) for index in range(shape.heads)]
    chosen = random.Random(0).sample(heads, round(share * len(heads)))
    scale_heads(str(WORK / name / ROLE), out, scales=dict.fromkeys(chosen, 0.0))


def restore(model: str, out: Path) -> None:
    """Undoes the edit in `model`."""
    from surgery.undo import undo

    undo(model, out)


def measure(name: str, rounds: int, share: float) -> None:
    """Prints medians and peak memory of the contestants."""
    # In a process of its own: a child's peak memory counts from its parent's, so this one must stay small.
    subprocess.run([sys.executable, __file__, "--make", name], check=True)
    source, folder = WORK / name / ROLE, WORK / name
    here = [sys.executable, __file__, "--share", str(share)]
    contestants = {
        "cp -r": (["cp", "-r", str(source), str(folder / "copy")], folder / "copy"),
        # What surgery writes is on the disk when it ends; what cp alone writes is not.
        "cp -r, fsync": (
            ["sh", "-c", f"cp -r {source} {folder / 'kept'} && sync {folder / 'kept' / 'model.safetensors'}"],
            folder / "kept",
        ),
        "edit heads": ([*here, "--edit", name, "--out", str(folder / "cut")], None),
        "edit undo": ([*here, "--undo", str(folder / "cut"), "--out", str(folder / "back")], folder / "back"),
    }
    runs: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        remove(folder / "cut")
        for contestant, (command, output) in contestants.items():
            if contestant == "edit undo":
                warm(folder / "cut")  # large files are written past the page cache
            time.sleep(SETTLE)
            result = timed(command)
            if contestant == "edit undo":
                compare(source, folder / "back")
            if number:  # the first round warms the page cache
                runs.setdefault(contestant, []).append(result)
            if output is not None:
                remove(output)
    remove(folder / "cut")
    seconds = {c: statistics.median(s for s, _ in results) for c, results in runs.items()}
    size = (source / "model.safetensors").stat().st_size
    print(f"\n{name}, {size / 1e9:.2f} GB, {share:.0%} of the heads, {rounds} rounds\n")
    print("| | median | rounds | (median − start-up) ÷ cp | peak memory |")
    print("|---|---|---|---|---|")
    for contestant, results in runs.items():
        every = ", ".join(f"{s:.2f}" for s, _ in results)
        ratio = (seconds[contestant] - (0 if contestant.startswith("cp") else START_UP)) / seconds["cp -r"]
        peak = max(m for _, m in results)
        print(f"| {contestant} | {seconds[contestant]:.2f} s | {every} | {ratio:.2f} | {peak:.0f} MB |")
    print(f"\nAllowed: {MEMORY_LIMIT:.0f} MB. Start-up: {START_UP:.0f} s.")


def warm(model: Path) -> None:
    """Brings a model's weights into the page cache."""
    subprocess.run(["cat", model / "model.safetensors"], stdout=subprocess.DEVNULL, check=True)


def compare(one: Path, other: Path) -> None:
    """Stops where the restored weights are not the original's to the byte."""
    subprocess.run(["cmp", one / "model.safetensors", other / "model.safetensors"], check=True)


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
    for hidden in ("--make", "--edit", "--undo", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make)
    elif options.edit:
        edit(options.edit, Path(options.out), options.share)
    elif options.undo:
        restore(options.undo, Path(options.out))
    else:
        print(machine())
        for name in options.models.split(","):
            measure(name, options.rounds, options.share)


if __name__ == "__main__":
    main()
