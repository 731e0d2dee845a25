"""`surgery vector transfer` against `cat` + `cp` of the same bytes, and against mergekit where it is installed.

Random-weight bf16 siblings with the shapes of Qwen2.5-0.5B and 1.5B, page cache warm, whole processes from start to
end, medians of several rounds in which the contestants take turns. Usage:

    python benchmarks/transfer.py [--rounds 5] [--models 0.5B,1.5B] [--mergekit PATH/TO/mergekit-yaml]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from surgery.checkpoint.safetensors_header import build_header

WORK = Path(__file__).parent / "work"
ROLES = ("base", "tuned", "target")
START_UP = 2.0  # seconds allowed beyond 1.5 × the copying
LIMIT = 1.5
# Seconds between removing an output and the next run. A virtual machine hands freed pages back to its host meanwhile,
# and fetching them again is slow: without the pause, whoever runs first after a removal looks fast.
SETTLE = 4.0


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 by its sizes; 64-wide heads in 0.5B, 128-wide ones in 1.5B; the head is tied to the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = 151_936

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, as the checkpoint on the Hub has them."""
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        table: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, h),
            "model.norm.weight": (h,),
        }
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            table |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
            table |= {p + f"mlp.{m}_proj.weight": (self.mlp, h) for m in ("gate", "up")}
            table |= {p + "mlp.down_proj.weight": (h, self.mlp), p + "self_attn.o_proj.weight": (h, h)}
            for m, width in (("q", h), ("k", kv), ("v", kv)):
                table |= {p + f"self_attn.{m}_proj.weight": (width, h), p + f"self_attn.{m}_proj.bias": (width,)}
        return dict(sorted(table.items()))


SHAPES = {"0.5B": Shape(896, 24, 14, 2, 4864), "1.5B": Shape(1536, 28, 12, 2, 8960)}


def make(name: str) -> None:
    """Writes base, tuned and target: siblings a percent apart."""
    import torch

    shape, folder = SHAPES[name], WORK / name
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    tensors = shape.tensors()
    header = build_header(((n, "BF16", s) for n, s in tensors.items()), {"format": "pt"})
    for number, role in enumerate(ROLES):
        file = folder / role / "model.safetensors"
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "config.json").write_text(json.dumps(config))
        common, own = (torch.Generator().manual_seed(seed) for seed in (0, number + 1))
        with file.with_suffix(".partial").open("wb") as out:
            out.write(header.raw)
            for size in map(torch.Size, tensors.values()):
                base = torch.randn(size.numel(), generator=common).mul_(0.02)
                moved = base.addcmul_(base, torch.randn(size.numel(), generator=own), value=0.01 * (number > 0))
                out.write(moved.bfloat16().view(torch.uint8).numpy().tobytes())
        file.with_suffix(".partial").rename(file)


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of a whole process; what its forks hold is counted, shared pages once."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: list[int] = []
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, ended, peaks))
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    ended.set()
    watch.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, max([usage.ru_maxrss, *peaks]) / 1024


def _watch(process: int, ended: threading.Event, held: list[int]) -> None:
    """Adds what a process and its children hold to `held`, five times a second until `ended`."""
    while not ended.wait(0.2):
        held.append(_together(process))


def _together(parent: int) -> int:
    """kB held by a process and its children."""
    held = 0
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for process in (parent, *children):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            held += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):  # one of them has just ended
        pass
    return held


def contestants(folder: Path, mergekit: str | None) -> dict[str, tuple[list[str], Path]]:
    """Name → (command, what it writes)."""
    inputs = [str(folder / role / "model.safetensors") for role in ROLES]
    base, tuned, target = (str(folder / role) for role in ROLES)
    surgery = str(Path(sys.executable).parent / "surgery")
    found = {
        "cat": (["sh", "-c", f"cat {' '.join(inputs)} > /dev/null"], folder / "none"),
        "cp": (["cp", inputs[2], str(folder / "copy")], folder / "copy"),
        "surgery": ([surgery, "vector", "transfer", tuned, base, target, "-o", str(folder / "out")], folder / "out"),
    }
    if mergekit:
        config = folder / "mergekit.yml"
        models = [{"model": m, "parameters": {"weight": w}} for m, w in ((target, 1.0), (tuned, 1.0))]
        recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "bfloat16"}
        config.write_text(json.dumps(recipe))
        command = [mergekit, str(config), str(folder / "merged"), "--async-write", "--out-shard-size", "200M"]
        found["mergekit"] = (command, folder / "merged")
    return found


def measure(name: str, rounds: int, mergekit: str | None) -> dict[str, object]:
    """Medians, peak memory and the ratio that the project promises."""
    # In a process of its own: a child's peak memory counts from its parent's, so this one must stay small.
    subprocess.run([sys.executable, __file__, "--make", name], check=True)
    folder = WORK / name
    runs: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        for contestant, (command, output) in contestants(folder, mergekit).items():
            remove(output)
            time.sleep(SETTLE)
            result = timed(command)
            if number:  # the first round warms the page cache
                runs.setdefault(contestant, []).append(result)
            remove(output)
    seconds = {c: statistics.median(s for s, _ in results) for c, results in runs.items()}
    memory = {c: max(m for _, m in results) for c, results in runs.items()}
    copying = seconds["cat"] + seconds["cp"]
    ratios = [
        (s - START_UP) / (a + b)
        for (s, _), (a, _), (b, _) in zip(runs["surgery"], runs["cat"], runs["cp"], strict=True)
    ]
    return {
        "model": name,
        "seconds": seconds,
        "all_seconds": {c: [round(s, 2) for s, _ in results] for c, results in runs.items()},
        "peak_mb": memory,
        "allowed_seconds": LIMIT * copying + START_UP,
        "ratio_to_copying_after_start_up": statistics.median(ratios),
    }


def remove(path: Path) -> None:
    """Deletes a file or folder, outside of what is timed."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def machine() -> str:
    """What the figures were taken on."""
    return f"{platform.machine()}, {os.cpu_count()} processors, torch {version('torch')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="0.5B,1.5B")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"))
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return
    print(f"{machine()}, {options.rounds} rounds")
    help_time = statistics.median(timed([str(Path(sys.executable).parent / "surgery"), "--help"])[0] for _ in range(7))
    print(f"surgery --help: {help_time:.2f} s (allowed 0.3 s)")
    for name in options.models.split(","):
        result = measure(name, options.rounds, options.mergekit)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
