"""Compute the frozen layers below a growing one once, and read their output from a cache afterwards.

For a batch of windows, `Prefix` returns the hidden states that enter the layer at a depth: from the cache, from a
shallower state in it that is run through the layers between, or from the token ids. What is computed is cached.
`surgery.growth.prefix_cache.decide` decides whether caching pays.

A cached state is never replaced by another one of the same depth. So a resumed training sees the numbers that it would
have seen uninterrupted, also where a batch contains windows of another one.

Shapes: B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, usage_error
from surgery.growth.prefix_cache.cache import PrefixCache
from surgery.io.hashing import hash_tensors, hash_text
from surgery.models.forward_pass import partial_forward, tupled_layers
from surgery.models.loaded_model import LoadedModel
from surgery.models.parameters import parameter_hashes


@dataclass(frozen=True)
class PrefixStatistics:
    """Counts of windows by the source of their states, and the bytes read from and written to the cache.

    read: from the cache. extended: from a shallower state in it. computed: from the token ids. damaged: states that
    did not match their hash, and were computed again.
    """

    read: int = 0
    extended: int = 0
    computed: int = 0
    damaged: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class Prefix:
    """The frozen layers of `live` below `depth`, whose weights must not change while this is used.

    With several processes each creates its own, all of them at the same time.

    Args:
        depth: 1 to the number of layers; without a cache also 0.
        cache: None computes everything every time.
        autocast: the dtype that the layers are computed in (`torch.autocast`); None means that of the weights.

    Raises:
        SurgeryError: there is no such depth; the cache cannot be written.

    A later failure to write does not stop training: `write_error` then says why, and nothing more is written.
    """

    def __init__(
        self,
        live: LoadedModel,
        depth: int,
        cache: PrefixCache | None = None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        least = 0 if cache is None else 1
        if not least <= depth <= len(live.layers):
            raise usage_error(f"got {depth}, expected {least} to {len(live.layers)}", where="depth")
        self.live, self.depth, self.cache, self.autocast = live, depth, cache, autocast
        self._tupled = tupled_layers(live)
        self._stops: tuple[int, ...] = (depth,)
        self._counts = PrefixStatistics()
        self.write_error: str | None = None
        self._pending: tuple[tuple[int, ...], Future[tuple[int, Tensor] | None]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        if cache is None:
            return
        cache.start_depth(depth, fingerprints(live, {depth, *(at for at in cache.prefixes if at < depth)}, autocast))
        if cache.dtype != live.model.dtype:
            # Cached states were rounded at each of these depths: a window that is computed again must be too.
            self._stops = tuple(sorted(cache.prefixes))

    @property
    def statistics(self) -> PrefixStatistics:
        """The counts of this process so far."""
        return replace(self._counts, damaged=0 if self.cache is None else self.cache.damaged)

    def hidden(self, indices: Sequence[int], tokens: Tensor) -> Tensor:
        """Return the input of layer `depth` for the windows `indices`: (B, T, D), no gradient, on the model's device.

        The same batches in the same order give the same bits, however much of them was in the cache before. (Except
        for the last digits of a window that was torn by a kill while it was extended, if another batch had computed
        it.)

        Args:
            tokens: (B, T), the windows' inputs.

        Raises:
            SurgeryError: the windows are not those that the cache has room for.
        """
        if self.cache is None:
            self._count(computed=len(indices))
            return self._compute(tokens, 0, None)
        if tuple(tokens.shape) != (len(indices), self.cache.sequence):
            raise usage_error(
                f"got tokens of shape {tuple(tokens.shape)}, expected {(len(indices), self.cache.sequence)}",
                where="tokens",
            )
        cached = self._read_or_await(tuple(indices))
        if cached is None:
            return self._store(indices, self._compute(tokens, 0, None), extended=False)
        at, states = cached
        self._count(bytes_read=len(indices) * self.cache.bytes_per_window)
        hidden = states.to(self.live.device, self.live.model.dtype, non_blocking=True)
        if at == self.depth:
            self._count(read=len(indices))
            return hidden
        return self._store(indices, self._compute(tokens, at, hidden), extended=True)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start reading the states of the next batch in another thread, while this one is trained on."""
        if self.cache is None or self._pending is not None:
            return
        # One thread: reads happen one after the other, and never beside a write.
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="prefix")
        self._pending = tuple(indices), self._reader.submit(self._read, tuple(indices))

    def close(self) -> None:
        """Stop prefetching; the cache stays open."""
        if self._reader is not None:
            self._reader.shutdown()
        self._reader = self._pending = None

    def _read_or_await(self, indices: tuple[int, ...]) -> tuple[int, Tensor] | None:
        """Return what `_read` does, from the prefetching thread if it was asked for these windows."""
        pending, self._pending = self._pending, None
        # Awaited even where it is useless: nothing may be read while it is written.
        states = None if pending is None else pending[1].result()
        return states if pending is not None and pending[0] == indices else self._read(indices)

    def _read(self, indices: tuple[int, ...]) -> tuple[int, Tensor] | None:
        """Return the depth at which all these windows are cached, and their states; None without a common depth."""
        assert self.cache is not None
        at, *others = set(self.cache.depths(indices))
        states = None if others or at < 1 else self.cache.read(indices, at)
        if states is None:
            return None
        # Pinned memory can be copied to the GPU asynchronously.
        return at, states.pin_memory() if self.live.device.type == "cuda" else states

    def _compute(self, tokens: Tensor, start: int, hidden: Tensor | None) -> Tensor:
        """Return the input of layer `depth`, from `hidden`, that of layer `start`, or from the tokens."""
        ids = tokens.to(self.live.device)
        with autocasting(self.live, self.autocast):
            for stop in [stop for stop in self._stops if stop > start or hidden is None]:
                hidden = partial_forward(self.live, ids, start, hidden, stop, tupled=self._tupled)
                hidden = hidden if self.cache is None else self.cache.round_to_stored(hidden)
                start = stop
        assert hidden is not None
        return hidden

    def _store(self, indices: Sequence[int], hidden: Tensor, *, extended: bool) -> Tensor:
        """Cache the states of windows that are not cached at this depth; return for every window its cached state."""
        # A window may occur twice in a batch; its first row counts.
        cache, row_of = self.cache, {index: row for row, index in reversed(list(enumerate(indices)))}
        assert cache is not None
        cached = {
            index: states
            for index in row_of
            if cache.depths([index]) == [self.depth] and (states := cache.read([index], self.depth)) is not None
        }
        new = [index for index in row_of if index not in cached]
        n_computed = len(new)
        if self.write_error is not None:
            new = []
        try:
            cache.write(new, self.depth, hidden[[row_of[index] for index in new]])
        except SurgeryError as error:
            self.write_error, new = error.what, []
        for index, states in cached.items():
            hidden[row_of[index]] = states[0].to(hidden)
        self._count(
            read=len(cached),
            extended=extended * n_computed,
            computed=(not extended) * n_computed,
            bytes_read=len(cached) * cache.bytes_per_window,
            bytes_written=len(new) * cache.bytes_per_window,
        )
        return hidden if len(row_of) == len(indices) else hidden[[row_of[index] for index in indices]]

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})


def autocasting(live: LoadedModel, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context in which the model computes in `dtype`; None disables any outer autocast."""
    return torch.autocast(live.device.type, dtype=dtype, enabled=dtype is not None)


def prefix_tensors(live: LoadedModel, depth: int) -> dict[str, Tensor]:
    """Return the parameters and buffers of the model's body that can affect the input of layer `depth`, by name."""
    above: list[nn.Module] = [*live.layers[depth:], live.final_norm]
    excluded = {id(tensor) for module in above for tensor in module.state_dict(keep_vars=True).values()}
    tensors = live.body.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in excluded}


def fingerprints(live: LoadedModel, depths: Iterable[int], autocast: torch.dtype | None = None) -> dict[int, str]:
    """Return for each depth a hash of everything but the tokens that decides the states there.

    That is the weights below it, the configuration and `autocast`.
    """
    tensors = {at: prefix_tensors(live, at) for at in sorted(depths)}
    hashes = parameter_hashes(tensors[max(tensors)])  # the deepest prefix contains the others
    settings = hash_text(f"{_settings(live)} {live.model.dtype} {autocast}")
    return {at: hash_text(f"{settings} {hash_tensors({n: hashes[n] for n in names})}") for at, names in tensors.items()}


def _settings(live: LoadedModel) -> str:
    """Return the configuration as JSON, without lists and layer counts, which change as the model grows."""
    config = live.model.config.get_text_config().to_dict()
    settings = {
        name: value
        for name, value in config.items()
        if not isinstance(value, list)
        # num_hidden_layers and the like; True is an int as well, hence `type`.
        and not ("layer" in name and type(value) is int)
        and name not in ("_name_or_path", "transformers_version", "dtype", "use_cache")
    }
    return json.dumps(settings, sort_keys=True, default=str)
