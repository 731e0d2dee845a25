"""Counting where experts fire against the forward passes that it needs, and scaling experts against copying.

Counting: a random Qwen3-MoE in fp32 on the CPU (87 M parameters, 6 layers × 32 experts, 4 per token), 8 sequences of
512 tokens, three markers of one to three tokens, no logits on either side. Seconds of counting are those of the whole
call, marker search included. Memory: what the counters hold, and how far the peak of a process that does nothing else
goes beyond that of bare passes, for few and for many tokens, on a narrow model with as many layers and experts as
Qwen3-30B-A3B (48 × 128, 8 per token), for the counters grow with these.

Scaling: a random bf16 checkpoint with a tensor per expert and the widths of Qwen3-30B-A3B, 2 of its 48 layers × 128
experts, of which two are scaled; page cache warm, whole processes from start to end.
Usage:

    python benchmarks/experts.py [--only speed,memory,scaling] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from measuring import KEEPING, WEIGHTS, against_copying, child, compare, peak_of, ratios, spread, table, take_turns
from transfer import WORK, machine

from surgery.checkpoint.safetensors_header import build_header

if TYPE_CHECKING:  # torch is left to the processes that need it: see `measuring`
    from probes.data.examples import TokenSequence
    from probes.model.routing import Marker, RoutingCounts
    from surgery.models.loaded_model import LoadedModel

TOKENS, SEQUENCES, FEW_SEQUENCES = 512, 8, 2
VOCABULARY = 32_000
SPELLINGS = {"<one>": ((11,),), "<two>": ((12, 13), (14, 13)), "<three>": ((15, 16, 17),)}
EVERY = 97  # positions from one marker to the next
MOST_TIME, MOST_MEMORY = 1.05, 10.0  # of a bare forward; MB

FEW_ROUNDS = 2  # of what takes long

SOURCE = WORK / "experts" / "base"
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 2048, 768, 32, 4, 128
STORED_LAYERS, STORED_EXPERTS, STORED_VOCABULARY = 2, 128, 151_936
SCALES = {(0, 45): 64.0, (1, 7): 64.0}  # (layer, expert) → β


@dataclass(frozen=True)
class Counted:
    """A model that is counted on, by its sizes."""

    layers: int
    experts: int
    chosen: int
    hidden: int
    inner: int


COUNTED = {"speed": Counted(6, 32, 4, 512, 224), "memory": Counted(48, 128, 8, 32, 16)}


def make_model(folder: Path, kind: str) -> None:
    """Writes a model that is counted on."""
    from passes import make_random
    from transformers import Qwen3MoeConfig

    of = COUNTED[kind]
    config = Qwen3MoeConfig(
        hidden_size=of.hidden,
        intermediate_size=3 * of.hidden,
        moe_intermediate_size=of.inner,
        num_hidden_layers=of.layers,
        num_experts=of.experts,
        num_experts_per_tok=of.chosen,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=of.hidden // 8,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=True,
        norm_topk_prob=True,
    )
    make_random(folder, config)


def texts(count_routing: int) -> list[TokenSequence]:
    """Random prompts, thinking and answers in which all markers occur."""
    from passes import draw

    found = []
    spelled = [spelling for spellings in SPELLINGS.values() for spelling in spellings]
    for sequence in draw(count_routing, VOCABULARY, (TOKENS // 4, TOKENS - 68, TOKENS - 64, TOKENS)):
        ids = list(sequence.ids)
        for number, start in enumerate(range(EVERY, TOKENS - 3, EVERY)):
            chosen = spelled[number % len(spelled)]
            ids[start : start + len(chosen)] = chosen
        found.append(replace(sequence, ids=tuple(ids)))
    return found


def markers() -> list[Marker]:
    from probes.model.routing import Marker

    return [Marker(text, 1.0, spellings) for text, spellings in SPELLINGS.items()]


def counting(live: LoadedModel, sequences: list[TokenSequence]) -> Callable[[], RoutingCounts]:
    """What is measured: `count_routing` with all markers."""
    from probes.model.routers import find_routers
    from probes.model.routing import count_routing

    routers, held = find_routers(live), markers()
    return lambda: count_routing(live, routers, sequences, held)


def speed(folder: Path, rounds: int) -> None:
    """`count_routing` against the bare forward."""
    from passes import bare, load

    live, sequences = load(folder), texts(SEQUENCES)
    work = counting(live, sequences)
    bare(live, sequences)
    work()
    plain, ours = take_turns(lambda: bare(live, sequences), work, rounds)
    size = sum(parameter.numel() for parameter in live.model.parameters())
    of, text = COUNTED["speed"], f"{SEQUENCES} × {TOKENS} tokens"
    title = f"Counting of {of.layers} × {of.experts} experts ({size / 1e6:.0f} M parameters) on {text}"
    compare(title, ("bare forward", "count"), (plain, ours), ratios(ours, plain, 3), f"≤ {MOST_TIME}")


def memory(folder: Path, rounds: int, threads: int) -> None:
    """What the counters hold, and the peak of counting beyond that of the bare forward, for few and many tokens."""
    found: dict[str, list[list[float]]] = {"bare": [], "count": []}
    for _ in range(rounds):
        for kind, lines in found.items():
            printed = child(__file__, "--peak", kind, "--model", str(folder), "--threads", str(threads))
            lines.append([float(mb) for mb in printed.split()])
    rows = []
    for at, sequences in enumerate((FEW_SEQUENCES, SEQUENCES)):
        bare, count_routing = ([line[2 * at] for line in lines] for lines in found.values())
        extra = [a - b for a, b in zip(count_routing, bare, strict=True)]
        held = f"{found['count'][0][2 * at + 1]:.2f}"
        rows.append((f"{sequences * TOKENS:,}", held, *(spread(values, 0) for values in (bare, count_routing, extra))))
    of = COUNTED["memory"]
    title = f"Memory of counting {of.layers} × {of.experts} experts; wanted: < {MOST_MEMORY:.0f} MB of counters"
    table(title, ("tokens", "MB of counters", "peak MB, bare forward", "peak MB, count", "extra MB"), rows)


def peak(folder: Path, kind: str) -> None:
    """Prints, for few and for many tokens, the peak resident MB of bare passes or of counting, loading not counted, and
    the MB of the counters."""
    from passes import bare, load

    live = load(folder)
    for sequences in (texts(FEW_SEQUENCES), texts(SEQUENCES)):
        found: list[RoutingCounts] = []
        work = partial(bare, live, sequences) if kind == "bare" else partial(_keep, found, counting(live, sequences))
        print(peak_of(work), sum(counts.hits.nbytes + counts.positions.nbytes for counts in found) / 1e6)


def _keep(found: list[RoutingCounts], work: Callable[[], RoutingCounts]) -> None:
    found.append(work())


def stored() -> dict[str, tuple[int, ...]]:
    """Name → shape of the checkpoint that is edited, as Qwen3-30B-A3B has them on the Hub; its head is tied."""
    h, q, kv = HIDDEN, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    table: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (STORED_VOCABULARY, h),
        "model.norm.weight": (h,),
    }
    for layer in range(STORED_LAYERS):
        p = f"model.layers.{layer}."
        table |= {p + f"{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        table |= {p + f"self_attn.{name}_proj.weight": (n, h) for name, n in (("q", q), ("k", kv), ("v", kv))}
        table |= {p + f"self_attn.{name}_norm.weight": (HEAD_DIM,) for name in ("q", "k")}
        table |= {p + "self_attn.o_proj.weight": (h, q), p + "mlp.gate.weight": (STORED_EXPERTS, h)}
        for expert in range(STORED_EXPERTS):
            e = f"{p}mlp.experts.{expert}."
            table |= {e + f"{name}_proj.weight": (INNER, h) for name in ("gate", "up")}
            table |= {e + "down_proj.weight": (h, INNER)}
    return dict(sorted(table.items()))


def make_stored() -> None:
    """Writes the checkpoint that is edited, unless it is there."""
    import torch

    if (SOURCE / WEIGHTS).exists():
        return
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": STORED_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 6144,
        "moe_intermediate_size": INNER,
        "num_experts": STORED_EXPERTS,
        "num_experts_per_tok": 8,
        "vocab_size": STORED_VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    SOURCE.mkdir(parents=True, exist_ok=True)
    (SOURCE / "config.json").write_text(json.dumps(config))
    tensors, generator = stored(), torch.Generator().manual_seed(0)
    unfinished = (SOURCE / WEIGHTS).with_suffix(".partial")
    with unfinished.open("wb") as out:
        out.write(build_header(((name, "BF16", shape) for name, shape in tensors.items()), {"format": "pt"}).raw)
        for shape in tensors.values():
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
            out.write(values.view(torch.uint8).numpy().tobytes())
    unfinished.rename(SOURCE / WEIGHTS)


def scale(out: Path) -> None:
    """The edit that is timed."""
    from surgery.checkpoint.selectors import Expert
    from surgery.edits.experts import scale_experts

    scale_experts(str(SOURCE), out, scales={Expert(*place): scale for place, scale in SCALES.items()})


def scaling(rounds: int) -> None:
    """`scale_experts` and undoing it against copying."""
    subprocess.run([sys.executable, __file__, "--make"], check=True)
    what = f"{len(SCALES)} of {STORED_LAYERS} × {STORED_EXPERTS} experts"
    against_copying("edit experts", what, SOURCE, [sys.executable, __file__, "--scale"], rounds)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="speed,memory,scaling", help="tables, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="of speed; memory and scaling take 2 at most")
    parser.add_argument("--threads", type=int, default=2)
    for hidden in ("--model", "--peak", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=COUNTED, help=argparse.SUPPRESS)
    for hidden in ("--make", "--scale", "--speed"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        import torch

        torch.set_num_threads(options.threads)
    if options.make and options.model:
        make_model(Path(options.model), options.kind)
    elif options.make:
        make_stored()
    elif options.scale:
        scale(Path(options.out))
    elif options.speed:
        speed(Path(options.model), options.rounds)
    elif options.peak:
        peak(Path(options.model), options.peak)
    else:
        few = min(options.rounds, FEW_ROUNDS)
        print(
            f"{machine()}, {options.threads} threads, {options.rounds} rounds (memory and scaling: {few})", flush=True
        )
        chosen = options.only.split(",")
        for kind in (kind for kind in COUNTED if kind in chosen):
            with TemporaryDirectory() as folder:
                given = ("--model", folder, "--threads", str(options.threads), "--rounds", str(options.rounds))
                child(__file__, "--make", "--kind", kind, *given)
                if kind == "speed":
                    print(child(__file__, "--speed", *given, more=KEEPING), end="", flush=True)
                else:
                    memory(Path(folder), few, options.threads)
        if "scaling" in chosen:
            scaling(few)


if __name__ == "__main__":
    main()
