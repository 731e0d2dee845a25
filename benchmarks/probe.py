"""Probing against the forward passes that it needs: collection, attribution of heads, and the causal sweep.

A random Qwen3 or Llama in fp32 on the CPU (by default 54 M parameters, 12 layers × 8 heads), sequences of 512 tokens,
no logits on either side. Every table is made in a process of its own; medians of several rounds in which the
contestants take turns, with ratios taken round by round. Processor seconds stand beside those of the clock: where
other programs want the processors too, only they say what the work costs. Peak memory is that of a process that does
nothing else.
Usage:

    python benchmarks/probe.py [--only collection,memory,attribution,last,all] [--family qwen3] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch
from torch import Tensor
from transfer import machine

from probes.ablation import all_heads, sweep
from probes.activations import CPU_TOKENS, make_batches, states_at
from probes.examples import TokenSequence
from probes.heads import attribute
from probes.live import LiveModel, wrap
from probes.residual import read_stream
from surgery.refs import open_checkpoint
from surgery.scoring import Loaded

TOKENS = 512
SEQUENCES = 16
VOCABULARY = 32_000
POSITIONS = 4
BIAS = 0.3
# Threads that spin while they wait for each other take the processors from whatever else runs: on a machine that was
# shared, one row of 512 tokens took ten times as long. Both contestants wait in the same way.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# Where glibc hands freed memory back and fetches it anew, that takes up to a fifth of a forward pass, and whether it
# does is a matter of luck: 0 or 420,000 page faults in the same pass. While times are taken it keeps what it has.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}

LEAST_SPEED, MOST_EXTRA, MOST_ATTRIBUTION = 0.9, 200.0, 1.05  # of a bare forward; MB; of a bare forward
LEAST_LAST, LEAST_ALL, MOST_DIFFERENCE = 10.0, 1.7, 1e-5  # times as fast, twice; of the range of ablated logits

Times = list[tuple[float, float]]  # of every round: seconds by the clock, seconds of the processors


def make(folder: Path, family: str, hidden: int, layers: int) -> None:
    """Writes a model with random weights: 64-wide heads, half as many keys and values, an MLP three times as wide."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    config = kind(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def load(folder: Path) -> LiveModel:
    """The model in `folder`; it has no tokenizer, and none is needed."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return wrap(Loaded("random", model, None), open_checkpoint(str(folder)))


def draw(count: int) -> list[TokenSequence]:
    """Random sequences without an answer, so that everything reads the same tokens."""
    ids = torch.randint(VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    half = TOKENS // 2
    return [
        TokenSequence(str(at), tuple(row), (half, TOKENS - POSITIONS, TOKENS, TOKENS))
        for at, row in enumerate(ids.tolist())
    ]


def probe(live: LiveModel) -> Tensor:
    """A random direction on the final norm's output, (D,), of length 1."""
    direction = torch.randn(live.width, generator=torch.Generator().manual_seed(2))
    return direction / direction.norm()


def bare(live: LiveModel, sequences: list[TokenSequence], *, keep: bool = False) -> None:
    """The reference: forward passes over the same batches, without logits; with `keep`, all hidden states are made."""
    with torch.inference_mode():
        for batch in make_batches([sequence.ids for sequence in sequences], max_tokens=CPU_TOKENS):
            live.body(**batch.inputs(live.device), use_cache=False, output_hidden_states=keep)


def collect(live: LiveModel, sequences: list[TokenSequence]) -> Tensor:
    """States at the last positions, all depths."""
    return states_at(live, sequences, [range(TOKENS - POSITIONS, TOKENS)] * len(sequences))


def take_turns(plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[Times, Times]:
    """Runs both in every round, one after the other."""
    times: tuple[Times, Times] = ([], [])
    for _ in range(rounds):
        for contestant, found in zip((plain, ours), times, strict=True):
            start, begun = time.perf_counter(), time.process_time()
            contestant()
            found.append((time.perf_counter() - start, time.process_time() - begun))
    return times


def ratios(over: Times, under: Times) -> list[str]:
    """`over` ÷ `under` round by round: by the clock, and by the processors."""
    return [spread([a[clock] / b[clock] for a, b in zip(over, under, strict=True)]) for clock in (0, 1)]


def seconds(times: Times) -> list[str]:
    """Seconds by the clock, and of the processors."""
    return [spread([time[clock] for time in times]) for clock in (0, 1)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median (min–max)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def compare(title: str, names: tuple[str, str], times: tuple[Times, Times], found: Sequence[str], wanted: str) -> None:
    """Prints both contestants' times, and `found`: their ratio by the clock and by the processors."""
    header = ("", "seconds", "processor seconds", "ratio", "of processor seconds", "wanted")
    plain, ours = times
    table(title, header, [(names[0], *seconds(plain), "", "", ""), (names[1], *seconds(ours), *found, wanted)])


def collection(folder: Path, rounds: int) -> None:
    """`states_at` against the bare forward."""
    live, sequences = load(folder), draw(SEQUENCES)
    collect(live, sequences)
    times = take_turns(lambda: bare(live, sequences), lambda: collect(live, sequences), rounds)
    title = f"Collection at {POSITIONS} positions × {live.n_depths} depths of {SEQUENCES} × {TOKENS} tokens: speed"
    compare(title, ("bare forward", "states_at"), times, ratios(*times), f"≥ {LEAST_SPEED}")


def memory(folder: Path, rounds: int) -> None:
    """Peak memory of collection beyond that of the bare forward, each in a process of its own."""
    kinds = ("bare forward", "states_at", "output_hidden_states")
    peaks: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            peaks[kind].append(float(child("--peak", kind, "--model", str(folder))))
    rows = []
    for kind in kinds:
        extra = [a - b for a, b in zip(peaks[kind], peaks["bare forward"], strict=True)]
        wanted = f"≤ {MOST_EXTRA:.0f} MB" if kind == "states_at" else ""
        rows.append((kind, spread(peaks[kind], 0), spread(extra, 0), wanted))
    title = f"Peak memory while reading {SEQUENCES} × {TOKENS} tokens, in batches of {CPU_TOKENS}"
    table(title, ("", "MB in all", "extra MB", "wanted"), rows)


def peak(folder: Path, kind: str) -> float:
    """Peak resident MB of one pass, loading not counted. Linux only."""
    live, sequences = load(folder), draw(SEQUENCES)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    if kind == "states_at":
        collect(live, sequences)
    else:
        bare(live, sequences, keep=kind == "output_hidden_states")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def attribution(folder: Path, rounds: int) -> None:
    """`attribute`, exact form, against the bare forward; and whether its parts sum to the probe's logit."""
    live, sequences = load(folder), draw(SEQUENCES)
    weight, stream = probe(live), read_stream(live)
    found = attribute(live, sequences, weight, BIAS, stream=stream)
    plain, ours = take_turns(
        lambda: bare(live, sequences), lambda: attribute(live, sequences, weight, BIAS, stream=stream), rounds
    )
    worst, largest = float((found.total - found.logit).abs().max()), float(found.logit.abs().max())
    title = (
        f"Attribution of {live.n_heads} heads on {SEQUENCES} × {TOKENS} tokens: cost "
        f"(parts and logit differ by {worst:.0e} at most, logits reach {largest:.2f})"
    )
    compare(title, ("bare forward", "attribute"), (plain, ours), ratios(ours, plain), f"≤ {MOST_ATTRIBUTION}")


def causal(folder: Path, rounds: int, *, last: int | None, prompts: int) -> None:
    """`sweep` against one forward pass for every head."""
    live, sequences = load(folder), draw(prompts)
    weight, heads = probe(live), all_heads(live)
    found: dict[str, Tensor] = {}

    def fast() -> None:
        found["fast"] = (result := sweep(live, sequences, heads, weight, BIAS, last=last)).ablated
        methods.add(result.method)

    def plain() -> None:
        result = sweep(live, sequences, heads, weight, BIAS, last=last, method="one forward per head")
        found["plain"] = result.ablated

    methods: set[str] = set()
    bare(live, sequences)
    times = take_turns(plain, fast, rounds)
    width = float(found["plain"].max() - found["plain"].min())
    difference = float((found["plain"] - found["fast"]).abs().max()) / width
    title = (
        f"Sweep of {len(heads)} heads at {'all' if last is None else f'the last {last}'} positions of {prompts} × "
        f"{TOKENS} tokens: times as fast (difference ÷ range {difference:.1e}, allowed {MOST_DIFFERENCE:.0e})"
    )
    names = ("one forward per head", " ".join(sorted(methods)))
    compare(title, names, times, ratios(*times), f"≥ {LEAST_ALL if last is None else LEAST_LAST}")


def child(*arguments: str, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """What this program prints in a process of its own, with the same number of threads and `more` environment."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), *arguments]
    plain = {name: value for name, value in os.environ.items() if name not in KEEPING}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=plain | WAITING | more).stdout


def main() -> None:
    """Prints the tables."""
    tables = ("collection", "memory", "attribution", "last", "all")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(tables), help="tables, separated by commas")
    parser.add_argument("--family", default="qwen3", choices=("qwen3", "llama"))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep-rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    for hidden in ("--model", "--peak", "--table"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(Path(options.model), options.peak))
        return
    if options.table:
        run = {
            "collection": lambda folder: collection(folder, options.rounds),
            "memory": lambda folder: memory(folder, min(options.rounds, 3)),
            "attribution": lambda folder: attribution(folder, options.rounds),
            "last": lambda folder: causal(folder, options.sweep_rounds, last=POSITIONS, prompts=2),
            "all": lambda folder: causal(folder, options.sweep_rounds, last=None, prompts=1),
        }[options.table]
        run(Path(options.model))
        return
    print(
        f"{machine()}, {options.threads} threads, {options.family}, hidden {options.hidden}, {options.layers} layers, "
        f"{options.rounds} rounds ({options.sweep_rounds} of the sweeps)",
        flush=True,
    )
    with TemporaryDirectory() as folder:
        make(Path(folder), options.family, options.hidden, options.layers)
        chosen = ("--rounds", str(options.rounds), "--sweep-rounds", str(options.sweep_rounds))
        for name in options.only.split(","):
            print(child("--table", name, "--model", folder, *chosen, more=KEEPING), end="", flush=True)


if __name__ == "__main__":
    main()
