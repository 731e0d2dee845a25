"""Whether a prefix cache is worth its disk: states are read from there and made anew, and both are timed.

In come the model, the depth at which the next stage's prefix ends, the plan's `CacheSettings` and a batch; out comes a
`CacheDecision` with its reason in a sentence. Times are in seconds for one window.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.growth.plan import CacheSettings
from surgery.growth.prefix_cache.cache import STATES, PrefixCache, cache_bytes
from surgery.growth.prefix_cache.prefix import autocasting, below
from surgery.io.atomic import disk_error
from surgery.models import partial_forward as splice
from surgery.models.loaded_model import LoadedModel
from surgery.reporting.report import format_value
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import n_processes

# Bytes that are written and read to time the disk: enough for its cache not to hide it, read in seconds by the slowest.
SCRATCH = 64 * 10**6
REPEATS = 3
# What is left free for the run's own files, in sizes of its model: the trained one as it is saved and as it is kept,
# and two states of what trains, of three numbers each.
MODELS = 8


@dataclass(frozen=True)
class CacheDecision:
    """use: whether to cache. reason: for people. bytes: that the cache takes. seconds_read, _write: of a window's
    state, from and to the disk. seconds_recompute: of running the whole prefix on a window. NaN: not measured."""

    use: bool
    reason: str
    bytes: int = 0
    seconds_read: float = float("nan")
    seconds_write: float = float("nan")
    seconds_recompute: float = float("nan")


def decide_caching(
    live: LoadedModel,
    depth: int,
    *,
    settings: CacheSettings,
    folder: Path,
    windows: int,
    passes: float,
    batch_tokens: Tensor,
    held: int = 0,
    autocast: torch.dtype | None = None,
) -> CacheDecision:
    """Whether the input of layer `depth` is to be cached for `windows` windows.

    With c the time of the prefix, r and w those of reading and writing a state, and n passes, the cache is used where
    f + w + (n − 1)·r < n·c. The first pass costs f = c where it begins at the token ids, else r + c·(depth − held) /
    depth. That reading goes on behind training is not counted, nor that later stages save more.

    All processes call it, with what trains set already; the first one measures, and all get its decision. A read
    counts as often as there are processes, which share the disk. Room is left for the run's checkpoints, unless the
    cache is to be on.

    Args:
        folder: where the cache is to lie; after measuring there it is as it was.
        windows: that the cache has room for.
        passes: over the same windows, in this stage and those that build upon it.
        batch_tokens: (B, T), a batch's inputs as one process computes them.
        held: the depth at which the windows stand in the cache already; 0 for none.
        autocast: the dtype that the prefix is computed in; None leaves it to the weights.

    Raises:
        SurgeryError: the cache is to be on, and states would be wrong, or have no room; the disk cannot be used.
    """
    if settings.use == "off":
        return CacheDecision(False, "turned off in the plan")
    if depth == 0:
        return CacheDecision(False, "the prefix is the embedding alone")
    return on_main(_decide, live, depth, settings, folder, windows, passes, batch_tokens, held, autocast)


def why_not_cacheable(live: LoadedModel, depth: int, tokens: Tensor) -> str | None:
    """Why states at `depth` must never be cached, tried on `tokens` (B, T); None where they may."""
    training = [name for name, tensor in below(live, depth).items() if tensor.requires_grad]
    if training:
        return f"{training[0]} below layer {depth} trains"
    ids, tupled = tokens[:1].to(live.device), splice.tupled_layers(live)
    if _draws(live, depth, ids, tupled):
        return "its layers draw at random in training (dropout)"
    return splice.fault(live, ids)


def _decide(
    live: LoadedModel,
    depth: int,
    settings: CacheSettings,
    folder: Path,
    windows: int,
    passes: float,
    tokens: Tensor,
    held: int,
    autocast: torch.dtype | None,
) -> CacheDecision:
    dtype: torch.dtype = getattr(torch, settings.dtype)
    size = cache_bytes(windows, tokens.shape[1], live.width, dtype)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spare = 0 if settings.use == "on" else max(SCRATCH, MODELS * _n_bytes(live))
        obstacle = why_not_cacheable(live, depth, tokens) or _no_room(folder, size, spare, settings.disk)
        if obstacle is not None:
            if settings.use == "on":
                raise SurgeryError(
                    f"the prefix cache cannot be used: {obstacle}", where=folder, hint="Set cache.use to auto or off."
                )
            return CacheDecision(False, obstacle, size)
        try:
            write, read = _disk_seconds(live, folder, tokens, dtype, windows)
        except SurgeryError as error:
            if settings.use == "on":  # with or without numbers
                return CacheDecision(True, f"cached as the plan asks; its disk could not be timed: {error.what}", size)
            return CacheDecision(False, f"not cached, as its disk could not be timed: {error.what}", size)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
    read, write = read * n_processes(), write * n_processes()
    computed = _prefix_seconds(live, depth, tokens, autocast)
    first = read + computed * (depth - held) / depth if held else computed
    n = max(passes, 1.0)
    worth = first + write * (held != depth) + (n - 1) * read < n * computed
    speed = format_value(tokens.shape[1] * live.width * dtype.itemsize / read, "bytes")
    layers = "1 layer" if depth == 1 else f"{depth} layers"
    costs = f"read at {speed}/s it costs {_ms(read)} a window, recomputing {layers} {_ms(computed)}"
    room = f"{format_value(size, 'bytes')} of {format_value(settings.disk, 'bytes')} allowed"
    if worth or settings.use == "on":
        verdict = f"cached ({room})" if worth else f"cached as the plan asks ({room})"
    elif read >= computed:
        verdict = "not cached, as reading is slower"
    else:
        seen = "once" if n == 1 else f"{n:.3g} times"
        verdict = f"not cached, as writing costs {_ms(write)} and a window is seen {seen}"
    return CacheDecision(worth or settings.use == "on", f"{costs}: {verdict}", size, read, write, computed)


def _n_bytes(live: LoadedModel) -> int:
    return sum(parameter.nbytes for parameter in live.model.parameters())


def _no_room(folder: Path, size: int, spare: int, allowed: int) -> str | None:
    needed = format_value(size, "bytes")
    if size > allowed:
        return f"it needs {needed}, and the plan allows {format_value(allowed, 'bytes')}"
    # A cache that lies here already is taken over, or gives way.
    states = folder / STATES
    free = shutil.disk_usage(folder).free + (states.stat().st_blocks * 512 if states.is_file() else 0)
    if size + spare <= free:
        return None
    beside = f" beside {format_value(spare, 'bytes')} for the run itself" if spare else ""
    return f"it needs {needed}{beside}, and {format_value(free, 'bytes')} are free"


@torch.no_grad()
def _draws(live: LoadedModel, depth: int, ids: Tensor, tupled: tuple[bool, ...]) -> bool:
    """Whether two runs in training mode differ."""
    modes = {module: module.training for module in live.body.modules()}
    live.body.train()
    try:
        with splice.own_draws(live):
            one, other = (splice.partial_forward(live, ids, 0, None, depth, tupled=tupled) for _ in range(2))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return not splice.is_near(live, one, other)


def _prefix_seconds(live: LoadedModel, depth: int, tokens: Tensor, autocast: torch.dtype | None) -> float:
    """Seconds of the prefix for one window: the median of some runs, after one that warms up."""
    ids, tupled = tokens.to(live.device), splice.tupled_layers(live)

    def run() -> None:
        splice.partial_forward(live, ids, 0, None, depth, tupled=tupled)

    with autocasting(live, autocast):
        return statistics.median([_seconds(live, run) for _ in range(REPEATS + 1)][1:]) / len(tokens)


def _disk_seconds(
    live: LoadedModel, folder: Path, tokens: Tensor, dtype: torch.dtype, windows: int
) -> tuple[float, float]:
    """Seconds of writing and of reading one window's state, measured on a small cache in `folder`: one of `SCRATCH`
    bytes, or of as many windows as there are."""
    rows, length = tokens.shape
    batches = min(-(-SCRATCH // (rows * length * live.width * dtype.itemsize)), -(-windows // rows))
    numbers = [list(range(batch * rows, (batch + 1) * rows)) for batch in range(batches)]
    states = torch.randn(rows, length, live.width, generator=torch.Generator().manual_seed(0))
    scratch = folder / "measured.partial"

    def opened() -> PrefixCache:
        cache = PrefixCache(
            scratch, windows=batches * rows, sequence=length, width=live.width, dtype=dtype, tokens="", alone=True
        )
        cache.begin(1, {1: ""})
        return cache

    try:
        cache = opened()

        def write() -> None:
            for batch in numbers:
                cache.write(batch, 1, states)
            cache.flush()

        written = _seconds(live, write)
        cache.close()
        _forget(scratch / STATES)
        cache = opened()

        def read() -> None:
            for batch in numbers:
                found = cache.read(batch, 1)
                assert found is not None
                found.to(live.device)

        seconds = _seconds(live, read)
        cache.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return written / (batches * rows), seconds / (batches * rows)


def _forget(path: Path) -> None:
    """Has the system drop what it holds of a file in memory, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _seconds(live: LoadedModel, run: Callable[[], None]) -> float:
    _synchronise(live)
    start = time.perf_counter()
    run()
    _synchronise(live)
    return time.perf_counter() - start


def _synchronise(live: LoadedModel) -> None:
    if live.device.type == "cuda":
        torch.cuda.synchronize(live.device)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.{1 if seconds >= 1e-3 else 2}f} ms"
