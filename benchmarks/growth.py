"""Growing layer by layer: what the prefix cache saves in every stage, that losses stay what they were, and memory.

Speed: a Llama of width 256 grows from 1 to 8 layers, each stage on 32 windows of 256 tokens, 8 at a time, as
`train_stage` trains them. Every stage is timed with its prefix recomputed in each step, with a cache in which the last
stage's states stand (the first pass, which runs the layer that was frozen last, and writes), and with its own states
there (later passes, which only read, from the page cache); and beside it stage 1, each time anew. The first step after
a start is left out. A round goes through all stages; ratios are taken inside it, of neighbours. One thread computes;
another reads ahead, as it always does, and what it takes is in the processor seconds.

Losses: a growth that recomputes and one that caches, both from the same start, fp32, every step compared; windows come
in another order in each pass. Memory: a process for each depth of a wide model, which trains three steps with the
cache.
Usage:

    python benchmarks/growth.py [--only speed,losses,memory] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from measuring import KEEPING, child, peak_of, ratios, spread, table
from substrate import make_tokenizer
from transfer import machine

if TYPE_CHECKING:  # torch is left to the processes that need it: see `measuring`
    from torch import Tensor

    from surgery.growth.training.loop import StageResult, TrainingStep
    from surgery.models.loaded_model import LoadedModel

VOCABULARY, STAGES, SEED = 512, 8, 0
FLAT, OF_BOUND, AGREEMENT = 1.25, 0.8, 1e-6  # what is wanted
SETTLED = 1  # steps after a start that are not timed: memory is fetched in them

DEPTHS = (1, 2, 4, 8)  # of the models whose memory is taken
FEW_ROUNDS = 2  # of what takes long

ONE, RECOMPUTED, FIRST, LATER = "stage 1 beside it", "recomputed", "first pass", "later passes"
KINDS = (ONE, RECOMPUTED, FIRST, LATER)
Taken = dict[str, tuple[float, float]]  # by these: seconds of a step, by the clock and of the processors


@dataclass(frozen=True)
class Sizes:
    """A growth by its sizes. steps: of a pass over all windows."""

    width: int
    heads: int
    sequence: int
    batch: int
    steps: int

    @property
    def windows(self) -> int:
        return self.steps * self.batch


SPEED = Sizes(256, 4, 256, 8, 4)
LOSSES = Sizes(96, 4, 64, 8, 6)
MEMORY = Sizes(768, 12, 64, 2, 3)
PASSES = 3  # of every stage, where losses are compared


class Windows:
    """Windows of a stream in which each id mostly tells the next one; in another order in each pass."""

    identity = "benchmark"

    def __init__(self, sizes: Sizes) -> None:
        import torch

        draw = torch.Generator().manual_seed(SEED)
        self.sizes, follows, ids = sizes, torch.randperm(VOCABULARY, generator=draw).tolist(), [7]
        for chance in torch.rand(sizes.windows * sizes.sequence, generator=draw).tolist():
            ids.append(follows[ids[-1]] if chance < 0.8 else int(chance * 1e5) % VOCABULARY)
        self.stream = torch.tensor(ids)

    def require(self, n_windows: int) -> None:
        """All are there."""

    def window_at(self, drawn: int) -> int:
        """The number of the window that is drawn as the `drawn`-th."""
        again, at = divmod(drawn, self.sizes.windows)
        return random.Random(again).sample(range(self.sizes.windows), self.sizes.windows)[at]

    def windows(self, numbers: Sequence[int]) -> Tensor:
        """(n, sequence + 1)"""
        import torch

        length = self.sizes.sequence
        return torch.stack([self.stream[n * length : (n + 1) * length + 1] for n in numbers])


def train(
    live: LoadedModel,
    sizes: Sizes,
    *,
    steps: int,
    cache: Path | None,
    log: Callable[[TrainingStep], None] | None = None,
) -> StageResult:
    """Trains the last layer, the final norm and the head of `live` in place; `cache` keeps in fp32 what is below."""
    import torch

    from surgery.growth.plan import GrowthStage, StageTraining
    from surgery.growth.prefix_cache.cache import PrefixCache
    from surgery.growth.prefix_cache.prefix import Prefix
    from surgery.growth.training.loop import train_stage, trainable_model
    from surgery.growth.training.schedule import TrainingSchedule

    stage = GrowthStage(tokens=steps * sizes.batch * sizes.sequence)
    schedule = TrainingSchedule(stage, StageTraining(), 0, sizes.sequence, sizes.batch, SEED)
    with (
        TemporaryDirectory() as states,
        ExitStack() as stack,
        trainable_model(live, schedule, [len(live.layers) - 1]) as model,
    ):
        prefix = None
        if cache is not None and model.depth > 0:
            open_cache = PrefixCache(
                cache,
                windows=sizes.windows,
                sequence=sizes.sequence,
                width=sizes.width,
                dtype=torch.float32,
                tokens=Windows.identity,
            )
            stack.callback(open_cache.close)
            prefix = Prefix(live, model.depth, open_cache)
            stack.callback(prefix.close)
        return train_stage(model, schedule, store=Windows(sizes), prefix=prefix, folder=Path(states) / "state", log=log)


def begin(folder: Path, sizes: Sizes, *, layers: int = 0) -> Path:
    """Writes a random embedding, and the model that grows on it; returns the latter's folder."""
    from surgery.growth.embedding.build import make_embedding
    from surgery.growth.layers.initial_model import init_model
    from surgery.growth.plan import ModelShape

    make_tokenizer(folder / "tok", VOCABULARY)
    make_embedding(str(folder / "tok"), folder / "emb", kind="random", width=sizes.width)
    shape = ModelShape(heads=sizes.heads, layers=layers, context=sizes.sequence)
    init_model(str(folder / "emb"), folder / "begin", shape=shape, seed=SEED)
    return folder / "begin"


def start_of(folder: Path, stage: int) -> Path:
    """The model that a stage trains."""
    return folder / f"start-{stage}"


def grow(folder: Path, begun: Path, sizes: Sizes, *, steps: int, cached: bool) -> list[StageResult]:
    """Grows the model `begun` to `STAGES` layers, as a plan does."""
    from transformers.utils.logging import disable_progress_bar

    from surgery.growth.layers.add import add_layers
    from surgery.models.loaded_model import load_with_structure

    disable_progress_bar()
    before, results = begun, []
    for stage in range(1, STAGES + 1):
        start, done = start_of(folder, stage), folder / f"stage-{stage}"
        add_layers(str(before), start, layers=1, init="identity", seed=stage)
        live = load_with_structure(start, dtype="float32")
        results.append(train(live, sizes, steps=steps, cache=folder / "cache" if cached else None))
        live.model.save_pretrained(done)
        live.tokenizer.save_pretrained(done)
        before = done
    return results


@dataclass
class Clock:
    """Seconds between the ends of steps: by the clock, and of the processors."""

    ends: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, step: TrainingStep) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def median(self, begin: int, end: int) -> tuple[float, float]:
        """Of steps `begin` to `end` − 1; the first is 1, for nothing tells when step 0 began."""
        wall, used = (
            statistics.median(after[clock] - before[clock] for before, after in pairwise(self.ends[begin - 1 : end]))
            for clock in (0, 1)
        )
        return wall, used


def one_round(folder: Path, cache: Path) -> tuple[list[Taken], list[float]]:
    """What each stage takes; the optimizer's bytes over those of two fp32 moments for each number that trains."""
    from surgery.models.loaded_model import load_with_structure

    times, memory, steps = [], [], SPEED.steps
    for stage in range(1, STAGES + 1):
        one, plain, ours = Clock(), Clock(), Clock()
        for at, clock in ((1, one), (stage, plain)):
            train(load_with_structure(start_of(folder, at), dtype="float32"), SPEED, steps=steps, cache=None, log=clock)
        live = load_with_structure(start_of(folder, stage), dtype="float32")
        result = train(live, SPEED, steps=2 * steps, cache=cache, log=ours)
        if stage > 1:
            check_passes(result, SPEED, passes=2)
        times.append(
            {
                ONE: one.median(SETTLED, steps),
                RECOMPUTED: plain.median(SETTLED, steps),
                FIRST: ours.median(SETTLED, steps),
                LATER: ours.median(steps, 2 * steps),
            }
        )
        memory.append(result.optimizer_bytes / (8 * result.n_trained))
    return times, memory


def check_passes(result: StageResult, sizes: Sizes, *, passes: int) -> int:
    """How many windows were read from the cache: all but in the first pass, or nothing was measured."""
    done = result.prefix
    if (done.read, done.extended + done.computed) != ((passes - 1) * sizes.windows, sizes.windows):
        raise SystemExit(f"the cache was not used as expected: {done}")
    return int(done.read)


def speed(rounds: int) -> None:
    """Every stage with its prefix recomputed, cached on the way, and read."""
    import torch

    torch.set_num_threads(1)
    found, memory = [], list[float]()
    with TemporaryDirectory() as name:
        folder = Path(name)
        grow(folder, begin(folder, SPEED), SPEED, steps=SPEED.steps, cached=True)  # also warms what is to be warmed
        for number in range(rounds):
            times, memory = one_round(folder, folder / f"cache-{number}")
            found.append(times)
        bounds = {stage: bounds_of(start_of(folder, stage)) for stage in range(1, STAGES + 1)}
    report(found, bounds)
    each = ", ".join(f"{ratio:.4f}" for ratio in memory)
    print(f"\nOptimizer's bytes ÷ (8 · numbers that train), stages 1 to {STAGES}: {each}; wanted: 1.")


@dataclass(frozen=True)
class Bounds:
    """What operations say. saved: recomputed ÷ later passes. first: first pass ÷ later passes. attended: `saved` with
    attention's products counted too, which no parameters stand for. layer, head: parameters, those in matrices."""

    saved: float
    first: float
    attended: float
    layer: int
    head: int


def bounds_of(model: Path) -> Bounds:
    """From `surgery.growth.training.flops`, with 2·P for a forward pass: P_new is the new layer and the head."""
    from surgery.checkpoint.resolve import open_checkpoint
    from surgery.checkpoint.structure import model_structure
    from surgery.growth.training.flops import FORWARD, forward_cost, training_cost

    checkpoint = open_checkpoint(model)
    matrices, whole = (
        forward_cost(checkpoint, model_structure(checkpoint), sequence=length) for length in (0, SPEED.sequence)
    )
    depth, block = len(matrices.layers) - 1, matrices.layers[-1]
    plain, attended = (training_cost(size, depth=depth, trained={depth}, head=True) for size in (matrices, whole))
    return Bounds(
        plain.whole / plain.above,
        1 + block / plain.above,
        attended.whole / attended.above,
        int(block / FORWARD),
        int(matrices.head / FORWARD),
    )


def report(found: Sequence[Sequence[Taken]], bounds: Mapping[int, Bounds]) -> None:
    """Prints what stages take, and what was wanted beside what came out."""
    per_token = 1e6 / (SPEED.batch * SPEED.sequence)
    stages = [{kind: [times[at][kind] for times in found] for kind in KINDS} for at in range(STAGES)]
    rows = []
    for number, taken in enumerate(stages, start=1):
        shown = [spread([wall * per_token for wall, _ in taken[kind]], 0) for kind in KINDS]
        pairs = ((FIRST, ONE), (LATER, ONE), (RECOMPUTED, LATER))
        found_ratios = [ratios(taken[over], taken[under])[0] for over, under in pairs]
        limit = f"{bounds[number].saved:.2f} ({bounds[number].attended:.2f})"
        # Nothing lies below the layer of stage 1, so that nothing is cached.
        rows.append((str(number), *shown, *found_ratios, limit) if number > 1 else ("1", *shown[:2], *[""] * 6))
    bound = bounds[STAGES]
    title = (
        f"Width {SPEED.width}, {bound.layer / 1e6:.2f} M parameters in a layer, {bound.head / 1e6:.2f} M in the head, "
        f"{SPEED.batch} × {SPEED.sequence} tokens in a step, one thread; µs per token, and ratios"
    )
    header = (
        "stage",
        *KINDS,
        "first ÷ stage 1",
        "later ÷ stage 1",
        "recomputed ÷ later",
        "bound (attention counted)",
    )
    table(title, header, rows)
    one, recomputed, first, later = (stages[-1][kind] for kind in KINDS)
    wanted = {
        f"later passes, stage {STAGES} ÷ stage 1": (later, one, f"≤ {FLAT}"),
        f"first pass, stage {STAGES} ÷ stage 1": (first, one, f"{bound.first:.2f} by operations"),
        f"stage {STAGES}, recomputed ÷ later": (recomputed, later, f"≥ {OF_BOUND} × {bound.saved:.2f}"),
    }
    rows = [(what, *ratios(over, under), goal) for what, (over, under, goal) in wanted.items()]
    shares = [[a[clock] / b[clock] / bound.saved for a, b in zip(recomputed, later, strict=True)] for clock in (0, 1)]
    rows.append(("the same ÷ its bound", *(spread(share) for share in shares), f"≥ {OF_BOUND}"))
    table("What is wanted", ("", "ratio", "of processor seconds", "wanted"), rows)


def losses() -> None:
    """The largest difference between the losses of a growth with the cache and of one without."""
    import torch

    torch.set_num_threads(1)
    steps = PASSES * LOSSES.steps
    with TemporaryDirectory() as name:
        begun = begin(Path(name), LOSSES)
        plain, ours = (
            grow(Path(name) / str(cached), begun, LOSSES, steps=steps, cached=cached) for cached in (False, True)
        )
    read = sum(check_passes(result, LOSSES, passes=PASSES) for result in ours[1:])
    pairs = [pair for a, b in zip(plain, ours, strict=True) for pair in zip(a.losses, b.losses, strict=True)]
    furthest = max(abs(a - b) for a, b in pairs)
    title = f"Losses of a growth to {STAGES} layers of width {LOSSES.width}, {PASSES} passes in each stage, fp32"
    header = ("steps", "windows read from the cache", "first loss", "last loss", "largest difference", "wanted")
    ends = [f"{loss:.3f}" for loss in (pairs[0][0], pairs[-1][0])]
    table(title, header, [(str(len(pairs)), str(read), *ends, f"{furthest:.1e}", f"≤ {AGREEMENT:g}")])


def memory(rounds: int) -> None:
    """Peaks of processes that train one layer on top of more and more frozen ones."""
    peaks: dict[int, list[dict[str, float]]] = {depth: [] for depth in DEPTHS}
    with TemporaryDirectory() as name:
        for depth in DEPTHS:
            child(__file__, "--begin", str(depth), "--folder", f"{name}/{depth}")
        for _ in range(rounds):
            for depth in DEPTHS:
                peaks[depth].append(json.loads(child(__file__, "--peak", "--folder", f"{name}/{depth}")))
    low, rows = DEPTHS[1], []  # in the first stage nothing is cached
    for depth, found in peaks.items():
        frozen, trained, most = found[0]["frozen"], found[0]["trained"], [line["peak"] for line in found]
        more = [2**20 * (line["peak"] - base["peak"]) for line, base in zip(found, peaks[low], strict=True)]
        each = spread([b / (frozen - peaks[low][0]["frozen"]) for b in more]) if depth > low else ""
        moments = f"{found[0]['optimizer'] / (8 * trained):.4f}"
        rows.append((str(depth), f"{frozen / 1e6:.1f} M", f"{trained / 1e6:.1f} M", moments, spread(most, 0), each))
    header = (
        "stage",
        "frozen parameters",
        "trained",
        "optimizer's bytes ÷ (8 · trained)",
        "peak MB of the process",
        f"bytes per parameter frozen since stage {low}",
    )
    table(f"Memory of a stage by its depth, width {MEMORY.width}; wanted: 1, and 4 bytes", header, rows)


def peak(folder: Path) -> None:
    """Prints the peak resident MB of loading a stage's model and training it, and what trains, as JSON."""
    import torch

    from surgery.models.loaded_model import load_with_structure

    torch.set_num_threads(1)
    done: list[tuple[LoadedModel, StageResult]] = []

    def work() -> None:
        live = load_with_structure(folder / "begin", dtype="float32")
        done.append((live, train(live, MEMORY, steps=MEMORY.steps, cache=folder / "cache")))

    most = peak_of(work)
    [(live, result)] = done
    frozen = sum(parameter.numel() for parameter in live.model.parameters()) - result.n_trained
    found = {"peak": most, "frozen": frozen, "trained": result.n_trained, "optimizer": result.optimizer_bytes}
    print(json.dumps(found))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="speed,losses,memory", help="tables, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="of speed; memory takes 2 at most")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)
    for hidden in ("--speed", "--losses", "--peak"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.speed:
        speed(options.rounds)
    elif options.losses:
        losses()
    elif options.begin:
        begin(options.folder, MEMORY, layers=options.begin)
    elif options.peak:
        peak(options.folder)
    else:
        chosen, few = options.only.split(","), min(options.rounds, FEW_ROUNDS)
        print(f"{machine()}, {options.rounds} rounds (memory: {few})", flush=True)
        if "speed" in chosen:
            print(child(__file__, "--speed", "--rounds", str(options.rounds), more=KEEPING), end="", flush=True)
        if "losses" in chosen:
            print(child(__file__, "--losses"), end="", flush=True)
        if "memory" in chosen:
            memory(few)


if __name__ == "__main__":
    main()
