"""Benchmark reading cached prefix states against recomputing them, and decide whether to cache.

Times are in seconds for one window.
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
from surgery.growth.prefix_cache.prefix import autocasting, prefix_tensors
from surgery.io.atomic import disk_error
from surgery.io.private_files import make_private_folder
from surgery.models import forward_pass as splice
from surgery.models.loaded_model import LoadedModel
from surgery.reporting.report import format_value
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import n_processes

# Bytes that are written and read to time the disk: more than its own cache hides, few enough for slow disks.
BENCHMARK_BYTES = 64 * 10**6
REPEATS = 3
# Disk space left free for the run's own files, in sizes of its model: the trained one as transformers saves it and as
# it is stored, and two training states, of three values per parameter each.
RESERVED_MODELS = 8


@dataclass(frozen=True)
class CacheDecision:
    """Whether to cache, and why.

    reason: for people. bytes: size of the cache. seconds_read, seconds_write: for a window's state, from and to the
    disk. seconds_recompute: for running the whole prefix on a window. NaN: not measured.
    """

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
    cached_depth: int = 0,
    autocast: torch.dtype | None = None,
) -> CacheDecision:
    """Decide whether to cache the input of layer `depth` for `windows` windows.

    With c the time of the prefix, r and w those of reading and writing a state, and n passes, the cache is used where
    f + w + (n − 1)·r < n·c. The first pass costs f = c where it starts at the token ids, else
    r + c·(depth − cached_depth) / depth. That reading overlaps with training is not counted, nor that later stages save
    more.

    All processes call it, after `requires_grad` is set; the first one measures, and all get its decision. A read counts
    as often as there are processes, which share the disk. Space is left for the run's checkpoints, unless the plan
    demands the cache.

    Args:
        folder: of the cache; after measuring in it, it is as before.
        windows: that the cache has room for.
        passes: over the same windows, in this stage and those that build upon it.
        batch_tokens: (B, T), a batch's inputs as one process computes them.
        cached_depth: the depth at which the windows are cached already; 0 for none.
        autocast: the dtype that the prefix is computed in; None means that of the weights.

    Raises:
        SurgeryError: the plan demands the cache, and states would be wrong, or have no room; the disk cannot be used.
    """
    if settings.use == "off":
        return CacheDecision(False, "turned off in the plan")
    if depth == 0:
        return CacheDecision(False, "the prefix is the embedding alone")
    question = _Question(live, depth, settings, folder, windows, passes, batch_tokens, cached_depth, autocast)
    return on_main(_decide, question)


def why_not_cacheable(live: LoadedModel, depth: int, tokens: Tensor) -> str | None:
    """Return why states at `depth` must not be cached, tried on `tokens` (B, T); None where they may."""
    training = [name for name, tensor in prefix_tensors(live, depth).items() if tensor.requires_grad]
    if training:
        return f"{training[0]} below layer {depth} trains"
    ids, tupled = tokens[:1].to(live.device), splice.tupled_layers(live)
    if _is_random(live, depth, ids, tupled):
        return "its layers draw at random in training (dropout)"
    return splice.resume_obstacle(live, ids)


@dataclass(frozen=True)
class _Question:
    """The arguments of `decide_caching`. dtype: of the stored states. cache_bytes: size of the whole cache."""

    live: LoadedModel
    depth: int
    settings: CacheSettings
    folder: Path
    windows: int
    passes: float
    tokens: Tensor
    cached_depth: int
    autocast: torch.dtype | None

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.settings.dtype)
        return dtype

    @property
    def cache_bytes(self) -> int:
        return cache_bytes(self.windows, self.tokens.shape[1], self.live.width, self.dtype)


def _decide(question: _Question) -> CacheDecision:
    settings, folder, size = question.settings, question.folder, question.cache_bytes
    # A folder that is created only to measure its disk is removed again.
    is_new = not folder.exists()
    try:
        make_private_folder(folder)
        obstacle = why_not_cacheable(question.live, question.depth, question.tokens) or _no_room(question)
        if obstacle is not None:
            if settings.use == "on":
                raise SurgeryError(
                    f"the prefix cache cannot be used: {obstacle}", where=folder, hint="Set cache.use to auto or off."
                )
            return CacheDecision(False, obstacle, size)
        try:
            write, read = _disk_seconds(question.live, folder, question.tokens, question.dtype, question.windows)
        except SurgeryError as error:
            if settings.use == "on":  # with or without numbers
                return CacheDecision(True, f"cached as the plan asks; its disk could not be timed: {error.what}", size)
            return CacheDecision(False, f"not cached, as its disk could not be timed: {error.what}", size)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
    # All processes share one disk.
    read, write = read * n_processes(), write * n_processes()
    return _compare(question, read, write, _prefix_seconds(question))


def _compare(question: _Question, read: float, write: float, compute: float) -> CacheDecision:
    """Decide by the seconds of reading, writing and computing the state of a window."""
    settings, depth, cached_depth = question.settings, question.depth, question.cached_depth
    first_pass = read + compute * (depth - cached_depth) / depth if cached_depth else compute
    # A stage that sees only a part of the windows still has one pass over what it sees.
    n = max(question.passes, 1.0)
    pays = first_pass + write * (cached_depth != depth) + (n - 1) * read < n * compute
    window_bytes = question.tokens.shape[1] * question.live.width * question.dtype.itemsize
    speed = format_value(window_bytes / read, "bytes")
    layers = "1 layer" if depth == 1 else f"{depth} layers"
    costs = f"read at {speed}/s it costs {_ms(read)} a window, recomputing {layers} {_ms(compute)}"
    room = f"{format_value(question.cache_bytes, 'bytes')} of {format_value(settings.disk, 'bytes')} allowed"
    if pays or settings.use == "on":
        verdict = f"cached ({room})" if pays else f"cached as the plan asks ({room})"
    elif read >= compute:
        verdict = "not cached, as reading is slower"
    else:
        seen = "once" if n == 1 else f"{n:.3g} times"
        verdict = f"not cached, as writing costs {_ms(write)} and a window is seen {seen}"
    used = pays or settings.use == "on"
    return CacheDecision(used, f"{costs}: {verdict}", question.cache_bytes, read, write, compute)


def _n_bytes(live: LoadedModel) -> int:
    return sum(parameter.nbytes for parameter in live.model.parameters())


def _no_room(question: _Question) -> str | None:
    """Return why the cache is too large for the plan or the disk; None where it is not."""
    settings, size = question.settings, question.cache_bytes
    needed = format_value(size, "bytes")
    if size > settings.disk:
        return f"it needs {needed}, and the plan allows {format_value(settings.disk, 'bytes')}"
    spare = 0 if settings.use == "on" else max(BENCHMARK_BYTES, RESERVED_MODELS * _n_bytes(question.live))
    # The space of an existing cache counts as free: it is reused or deleted.
    states = question.folder / STATES
    free = shutil.disk_usage(question.folder).free + (states.stat().st_blocks * 512 if states.is_file() else 0)
    if size + spare <= free:
        return None
    beside = f" beside {format_value(spare, 'bytes')} for the run itself" if spare else ""
    return f"it needs {needed}{beside}, and {format_value(free, 'bytes')} are free"


@torch.no_grad()
def _is_random(live: LoadedModel, depth: int, ids: Tensor, tupled: tuple[bool, ...]) -> bool:
    """Return whether two runs in training mode differ."""
    modes = {module: module.training for module in live.body.modules()}
    # Dropout is active only in training mode, in which the prefix will run.
    live.body.train()
    try:
        with splice.isolated_rng(live):
            one, other = (splice.partial_forward(live, ids, 0, None, depth, tupled=tupled) for _ in range(2))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return not splice.is_close(live, one, other)


def _prefix_seconds(question: _Question) -> float:
    """Return the seconds of the prefix for one window: the median of some runs, after a warm-up run."""
    live, depth, tokens = question.live, question.depth, question.tokens
    ids, tupled = tokens.to(live.device), splice.tupled_layers(live)

    def run() -> None:
        splice.partial_forward(live, ids, 0, None, depth, tupled=tupled)

    with autocasting(live, question.autocast):
        return statistics.median([_seconds(live, run) for _ in range(REPEATS + 1)][1:]) / len(tokens)


def _disk_seconds(
    live: LoadedModel, folder: Path, tokens: Tensor, dtype: torch.dtype, windows: int
) -> tuple[float, float]:
    """Return the seconds of writing and of reading one window's state.

    Measured on a small cache in `folder`, of `BENCHMARK_BYTES` or of all windows.
    """
    rows, length = tokens.shape
    batches = min(-(-BENCHMARK_BYTES // (rows * length * live.width * dtype.itemsize)), -(-windows // rows))
    index_batches = [list(range(batch * rows, (batch + 1) * rows)) for batch in range(batches)]
    # Random, as some disks compress zeros.
    states = torch.randn(rows, length, live.width, generator=torch.Generator().manual_seed(0))
    scratch = folder / "measured.partial"

    def open_scratch() -> PrefixCache:
        cache = PrefixCache(
            scratch, windows=batches * rows, sequence=length, width=live.width, dtype=dtype, tokens="", alone=True
        )
        cache.start_depth(1, {1: ""})
        return cache

    try:
        cache = open_scratch()

        def write() -> None:
            for batch in index_batches:
                cache.write(batch, 1, states)
            cache.flush()

        write_seconds = _seconds(live, write)
        cache.close()
        _drop_page_cache(scratch / STATES)
        cache = open_scratch()

        def read() -> None:
            for batch in index_batches:
                read_states = cache.read(batch, 1)
                assert read_states is not None
                read_states.to(live.device)

        read_seconds = _seconds(live, read)
        cache.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return write_seconds / (batches * rows), read_seconds / (batches * rows)


def _drop_page_cache(path: Path) -> None:
    """Drop a file from the page cache where the system allows it: the benchmark must read from the disk."""
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
        # Kernels run asynchronously: without this only their launch would be timed.
        torch.cuda.synchronize(live.device)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.{1 if seconds >= 1e-3 else 2}f} ms"
