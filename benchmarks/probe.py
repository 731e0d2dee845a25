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
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch
from measuring import KEEPING, child, compare, peak_of, ratios, spread, table, take_turns
from passes import bare, draw, load, make_random
from torch import Tensor
from transfer import machine

from probes.data.examples import TokenSequence
from probes.model.ablation import ablate_each_head, all_heads
from probes.model.activations import CPU_TOKENS, hidden_states_at
from probes.model.residual_stream import trace_residual_stream
from probes.refusal.heads.attribution import attribute_heads
from surgery.models.loaded_model import LoadedModel

TOKENS = 512
SEQUENCES = 16
VOCABULARY = 32_000
POSITIONS = 4
BIAS = 0.3
LEAST_SPEED, MOST_EXTRA, MOST_ATTRIBUTION = 0.9, 200.0, 1.05  # of a bare forward; MB; of a bare forward
LEAST_LAST, LEAST_ALL, MOST_DIFFERENCE = 10.0, 1.7, 1e-5  # times as fast, twice; of the range of ablated logits


def make(folder: Path, family: str, hidden: int, layers: int) -> None:
    """Writes a model with random weights: 64-wide heads, half as many keys and values, an MLP three times as wide."""
    from transformers import LlamaConfig, Qwen3Config

    kind = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    config = kind(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=True,
    )
    make_random(folder, config)


def texts(count: int) -> list[TokenSequence]:
    """Random sequences without an answer, so that everything reads the same tokens."""
    return draw(count, VOCABULARY, (TOKENS // 2, TOKENS - POSITIONS, TOKENS, TOKENS))


def probe(live: LoadedModel) -> Tensor:
    """A random direction on the final norm's output, (D,), of length 1."""
    direction = torch.randn(live.width, generator=torch.Generator().manual_seed(2))
    return direction / direction.norm()


def collect(live: LoadedModel, sequences: list[TokenSequence]) -> Tensor:
    """States at the last positions, all depths."""
    return hidden_states_at(live, sequences, [range(TOKENS - POSITIONS, TOKENS)] * len(sequences))


def collection(folder: Path, rounds: int) -> None:
    """`hidden_states_at` against the bare forward."""
    live, sequences = load(folder), texts(SEQUENCES)
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
            peaks[kind].append(float(own("--peak", kind, "--model", str(folder))))
    rows = []
    for kind in kinds:
        extra = [a - b for a, b in zip(peaks[kind], peaks["bare forward"], strict=True)]
        wanted = f"≤ {MOST_EXTRA:.0f} MB" if kind == "states_at" else ""
        rows.append((kind, spread(peaks[kind], 0), spread(extra, 0), wanted))
    title = f"Peak memory while reading {SEQUENCES} × {TOKENS} tokens, in batches of {CPU_TOKENS}"
    table(title, ("", "MB in all", "extra MB", "wanted"), rows)


def peak(folder: Path, kind: str) -> float:
    """Peak resident MB of one pass, loading not counted."""
    live, sequences = load(folder), texts(SEQUENCES)
    if kind == "states_at":
        return peak_of(lambda: collect(live, sequences))
    return peak_of(lambda: bare(live, sequences, keep=kind == "output_hidden_states"))


def attribution(folder: Path, rounds: int) -> None:
    """`attribute_heads`, exact form, against the bare forward; and whether its parts sum to the probe's logit."""
    live, sequences = load(folder), texts(SEQUENCES)
    weight, stream = probe(live), trace_residual_stream(live)
    found = attribute_heads(live, sequences, weight, BIAS, stream=stream)
    plain, ours = take_turns(
        lambda: bare(live, sequences), lambda: attribute_heads(live, sequences, weight, BIAS, stream=stream), rounds
    )
    worst, largest = float((found.total - found.logit).abs().max()), float(found.logit.abs().max())
    title = (
        f"Attribution of {live.n_heads} heads on {SEQUENCES} × {TOKENS} tokens: cost "
        f"(parts and logit differ by {worst:.0e} at most, logits reach {largest:.2f})"
    )
    compare(title, ("bare forward", "attribute"), (plain, ours), ratios(ours, plain), f"≤ {MOST_ATTRIBUTION}")


def causal(folder: Path, rounds: int, *, last: int | None, prompts: int) -> None:
    """`ablate_each_head` against one forward pass for every head."""
    live, sequences = load(folder), texts(prompts)
    weight, heads = probe(live), all_heads(live)
    found: dict[str, Tensor] = {}

    def fast() -> None:
        found["fast"] = (result := ablate_each_head(live, sequences, heads, weight, BIAS, last=last)).ablated
        methods.add(result.method)

    def plain() -> None:
        result = ablate_each_head(live, sequences, heads, weight, BIAS, last=last, method="one forward per head")
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


def own(*arguments: str, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """What this program prints in a process of its own, with the same number of threads and `more` environment."""
    return child(__file__, "--threads", str(torch.get_num_threads()), *arguments, more=more)


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
            print(own("--table", name, "--model", folder, *chosen, more=KEEPING), end="", flush=True)


if __name__ == "__main__":
    main()
