"""`surgery merge` against mergekit with its best flags, method by method, in one run.

Random-weight bf16 siblings with the shapes of Qwen2.5-0.5B and 1.5B (as in `transfer.py`), page cache warm, whole
processes from start to end, medians of several rounds in which the two take turns. Usage:

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml [--rounds 3] [--models 0.5B,1.5B] [--methods ties,…]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from transfer import SETTLE, SHAPES, WORK, machine, remove, timed

# Method → (how many models beside the base, parameters, how many times as fast as mergekit it must be).
METHODS: dict[str, tuple[int, dict[str, float], float]] = {
    "linear": (3, {"weight": 0.3}, 3),
    "task_arithmetic": (2, {"weight": 0.5}, 3),
    "slerp": (1, {"t": 0.4}, 3),
    "ties": (2, {"weight": 0.5, "density": 0.5}, 15),
    "dare_ties": (2, {"weight": 0.5, "density": 0.5}, 8),
    "della": (2, {"weight": 0.5, "density": 0.5}, 8),
    "breadcrumbs": (2, {"weight": 0.5, "density": 0.5}, 8),
}
MEMORY_LIMIT = 700.0  # MB, or three times the largest tensor where that is more
BEST_FLAGS = ("--async-write", "--out-shard-size", "200M")


def config_of(method: str, folder: Path) -> Path:
    """A config that both read."""
    count, parameters, _ = METHODS[method]
    base, *others = (str(folder / role) for role in ("base", "tuned", "target"))
    chosen = [base, *others] if count == 3 else others[:count]
    config: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": model} for model in chosen],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    if count < 3:
        config["base_model"] = base
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(config))
    return path


def measure(method: str, folder: Path, rounds: int, mergekit: str | None) -> dict[str, object]:
    """Medians of both, peak memory, and the median of the rounds' ratios."""
    config = str(config_of(method, folder))
    ours, theirs = folder / "out", folder / "merged"
    commands = {"surgery": ([str(Path(sys.executable).parent / "surgery"), "merge", config, "-o", str(ours)], ours)}
    if mergekit:
        commands["mergekit"] = ([mergekit, config, str(theirs), *BEST_FLAGS], theirs)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (command, output) in commands.items():
            remove(output)
            time.sleep(SETTLE)
            runs[name].append(timed(command))
            remove(output)
    found: dict[str, object] = {"method": method, "model": folder.name}
    for name, results in runs.items():
        found[f"{name} s"] = round(statistics.median(seconds for seconds, _ in results), 2)
        found[f"{name} MB"] = round(max(memory for _, memory in results))
    if mergekit:
        pairs = zip(runs["mergekit"], runs["surgery"], strict=True)
        found["times as fast"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 1)
        found["wanted"] = METHODS[method][2]
    return found


def main() -> None:
    """Prints one JSON line per method and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="0.5B")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"))
    arguments = parser.parse_args()
    print(f"{machine()}, {arguments.rounds} rounds", flush=True)
    for name in arguments.models.split(","):
        # In a process of its own: a child's peak memory counts from its parent's, so this one must stay small.
        subprocess.run([sys.executable, str(Path(__file__).with_name("transfer.py")), "--make", name], check=True)
        largest = max(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in SHAPES[name].tensors().values())
        limit = max(MEMORY_LIMIT, 3 * largest / 1e6)
        for method in arguments.methods.split(","):
            result = measure(method, WORK / name, arguments.rounds, arguments.mergekit)
            print(json.dumps({**result, "memory limit MB": round(limit)}), flush=True)


if __name__ == "__main__":
    main()
