"""What lies below a growing layer is computed once and read back.

In come the tokens of a batch's windows and their numbers; out comes what enters the layer at a depth: from the cache,
from a shallower state in it that is run on, or from the token ids. What is computed is written down. Whether all that
is worth the disk is decided in `surgery.growth.prefix_cache.decide`.

A state that stands in the cache is never replaced by another one of the same depth. So a training that is resumed sees
the numbers that it would have seen uninterrupted, also where a batch meets windows of another one.

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
from surgery.models.loaded_model import LoadedModel
from surgery.models.parameters import parameter_hashes
from surgery.models.partial_forward import partial_forward, tupled_layers


@dataclass(frozen=True)
class Statistics:
    """Windows by how their states were come by, and the bytes that went through the cache.

    read: from the cache. extended: from a shallower state in it. computed: from the token ids. damaged: states that
    did not match their hash, and were computed anew.
    """

    read: int = 0
    extended: int = 0
    computed: int = 0
    damaged: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class Prefix:
    """The layers of `live` below `depth`, which must not change meanwhile.

    With several processes each makes its own, all of them at the same time.

    Args:
        depth: 1 to the number of layers; without a cache also 0.
        cache: None computes everything every time.
        autocast: the dtype that the layers are computed in (`torch.autocast`); None leaves it to the weights.

    Raises:
        SurgeryError: there is no such depth; the cache cannot be written.

    Later, a disk that cannot be written ends no training: `fault` then says why, and nothing more is written.
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
        self._done = Statistics()
        self.fault: str | None = None
        self._ahead: tuple[tuple[int, ...], Future[tuple[int, Tensor] | None]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        if cache is None:
            return
        cache.begin(depth, fingerprints(live, {depth, *(at for at in cache.prefixes if at < depth)}, autocast))
        if cache.dtype != live.model.dtype:
            # States were rounded at each of these: a window that is computed anew must be too.
            self._stops = tuple(sorted(cache.prefixes))

    @property
    def statistics(self) -> Statistics:
        """Of this process, from the start."""
        return replace(self._done, damaged=0 if self.cache is None else self.cache.damaged)

    def hidden(self, numbers: Sequence[int], tokens: Tensor) -> Tensor:
        """The input of layer `depth` for the windows `numbers`: (B, T, D), without gradients, on the model's device.

        The same batches in the same order give the same bits, however much of them was in the cache before. (But for
        the last digits of a window that was torn by a kill while it was extended, if another batch had computed it.)

        Args:
            tokens: (B, T), the windows' inputs.

        Raises:
            SurgeryError: the windows are not those that the cache has room for.
        """
        if self.cache is None:
            self._count(computed=len(numbers))
            return self._through(tokens, 0, None)
        if tuple(tokens.shape) != (len(numbers), self.cache.sequence):
            raise usage_error(
                f"got tokens of shape {tuple(tokens.shape)}, expected {(len(numbers), self.cache.sequence)}",
                where="tokens",
            )
        found = self._take(tuple(numbers))
        if found is None:
            return self._keep(numbers, self._through(tokens, 0, None), extended=False)
        at, states = found
        self._count(bytes_read=len(numbers) * self.cache.bytes_per_window)
        hidden = states.to(self.live.device, self.live.model.dtype, non_blocking=True)
        if at == self.depth:
            self._count(read=len(numbers))
            return hidden
        return self._keep(numbers, self._through(tokens, at, hidden), extended=True)

    def ahead(self, numbers: Sequence[int]) -> None:
        """Starts to read the states of the next batch, while this one is trained on."""
        if self.cache is None or self._ahead is not None:
            return
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="prefix")
        self._ahead = tuple(numbers), self._reader.submit(self._fetch, tuple(numbers))

    def close(self) -> None:
        """Ends reading ahead; the cache stays open."""
        if self._reader is not None:
            self._reader.shutdown()
        self._reader = self._ahead = None

    def _take(self, numbers: tuple[int, ...]) -> tuple[int, Tensor] | None:
        pending, self._ahead = self._ahead, None
        # Waited for even where it is of no use: nothing may be read while it is written.
        read = None if pending is None else pending[1].result()
        return read if pending is not None and pending[0] == numbers else self._fetch(numbers)

    def _fetch(self, numbers: tuple[int, ...]) -> tuple[int, Tensor] | None:
        """The one depth at which all of them stand, and their states."""
        assert self.cache is not None
        at, *others = set(self.cache.depths(numbers))
        states = None if others or at < 1 else self.cache.read(numbers, at)
        if states is None:
            return None
        return at, states.pin_memory() if self.live.device.type == "cuda" else states

    def _through(self, tokens: Tensor, start: int, hidden: Tensor | None) -> Tensor:
        """The input of layer `depth`, from that of layer `start`."""
        ids = tokens.to(self.live.device)
        with autocasting(self.live, self.autocast):
            for stop in [stop for stop in self._stops if stop > start or hidden is None]:
                hidden = partial_forward(self.live, ids, start, hidden, stop, tupled=self._tupled)
                hidden = hidden if self.cache is None else self.cache.rounded(hidden)
                start = stop
        assert hidden is not None
        return hidden

    def _keep(self, numbers: Sequence[int], hidden: Tensor, *, extended: bool) -> Tensor:
        """Writes down what is new, and gives for each window what stands in the cache."""
        cache, first = self.cache, {number: row for row, number in reversed(list(enumerate(numbers)))}
        assert cache is not None
        standing = {
            number: states
            for number in first
            if cache.depths([number]) == [self.depth] and (states := cache.read([number], self.depth)) is not None
        }
        new = [number for number in first if number not in standing]
        made = len(new)
        if self.fault is not None:
            new = []
        try:
            cache.write(new, self.depth, hidden[[first[number] for number in new]])
        except SurgeryError as error:
            self.fault, new = error.what, []
        for number, states in standing.items():
            hidden[first[number]] = states[0].to(hidden)
        self._count(
            read=len(standing),
            extended=extended * made,
            computed=(not extended) * made,
            bytes_read=len(standing) * cache.bytes_per_window,
            bytes_written=len(new) * cache.bytes_per_window,
        )
        return hidden if len(first) == len(numbers) else hidden[[first[number] for number in numbers]]

    def _count(self, **more: int) -> None:
        self._done = replace(self._done, **{name: getattr(self._done, name) + n for name, n in more.items()})


def autocasting(live: LoadedModel, dtype: torch.dtype | None) -> torch.autocast:
    """Inside, the model computes in `dtype`; with None in that of its weights, whatever is outside."""
    return torch.autocast(live.device.type, dtype=dtype, enabled=dtype is not None)


def below(live: LoadedModel, depth: int) -> dict[str, Tensor]:
    """The parameters and buffers of the model's body that can reach the input of layer `depth`, by name."""
    above: list[nn.Module] = [*live.layers[depth:], live.final_norm]
    other = {id(tensor) for module in above for tensor in module.state_dict(keep_vars=True).values()}
    every = live.body.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in every.items() if id(tensor) not in other}


def fingerprints(live: LoadedModel, depths: Iterable[int], autocast: torch.dtype | None = None) -> dict[int, str]:
    """Depth → a hash of all that decides the states there but the tokens: weights, configuration and `autocast`."""
    wanted = {at: below(live, at) for at in sorted(depths)}
    hashes = parameter_hashes(wanted[max(wanted)])
    about = hash_text(f"{_settings(live)} {live.model.dtype} {autocast}")
    return {at: hash_text(f"{about} {hash_tensors({n: hashes[n] for n in names})}") for at, names in wanted.items()}


def _settings(live: LoadedModel) -> str:
    """What the configuration says in numbers, words and tables; not how many layers there are, which grows."""
    config = live.model.config.get_text_config().to_dict()
    kept = {
        name: value
        for name, value in config.items()
        if not isinstance(value, list)
        and not ("layer" in name and type(value) is int)
        and name not in ("_name_or_path", "transformers_version", "dtype", "use_cache")
    }
    return json.dumps(kept, sort_keys=True, default=str)
