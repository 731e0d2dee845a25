"""Open the prefix cache of one training: decide whether to cache, remember the decision, and count what was read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from pydantic import ValidationError

from surgery.errors import SurgeryError
from surgery.growth.prefix_cache.cache import PrefixCache, cached_prefixes
from surgery.growth.prefix_cache.decide import CacheDecision, decide_caching
from surgery.growth.prefix_cache.prefix import Prefix
from surgery.growth.results import CacheUse
from surgery.growth.training.accelerator import autocast_dtype, is_sharded
from surgery.growth.training.job import RunContext, TrainingJob
from surgery.growth.training.stage_model import StageModel
from surgery.io.atomic import write_file
from surgery.io.json_io import read_json
from surgery.io.json_records import invalid_record
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import is_main

DECISION = "cache.json"


@dataclass(frozen=True)
class OpenPrefix:
    """The prefix of one training, with its cache.

    prefix: gives the input of the first layer that trains; None where every step computes the whole model. use: whether
    the cache is used, and why.
    """

    use: CacheUse
    prefix: Prefix | None = None
    cache: PrefixCache | None = None

    def close(self) -> CacheUse:
        """Close prefix and cache, and return `use` with the counts of windows read and computed."""
        use = self.use
        if self.prefix is not None:
            counts, error = self.prefix.statistics, self.prefix.write_error
            self.prefix.close()
            use = use.model_copy(
                update={
                    "read": counts.read,
                    "extended": counts.extended,
                    "computed": counts.computed,
                    "reason": use.reason if error is None else f"{use.reason}; then its disk failed: {error}",
                }
            )
        if self.cache is not None:
            self.cache.close()
        return use


def open_prefix_cache(context: RunContext, job: TrainingJob, model: StageModel, folder: Path) -> OpenPrefix:
    """Open the cache of what lies below the first layer that trains, if caching is possible and pays.

    Args:
        model: with everything frozen that does not train; all processes call this.
        folder: of the training's own files. The decision is kept in it, so that a resumed training does as it did:
            cached states that were rounded to bfloat16 and computed ones are not the same to the bit.

    Raises:
        SurgeryError: as `decide_caching`; the plan demands a cache and there is no room for it.
    """
    if job.passes is None:
        return OpenPrefix(CacheUse(used=False, reason="no prefix cache: all layers train"))
    # No process has whole layers to run, or whole weights to hash.
    if is_sharded():
        return OpenPrefix(CacheUse(used=False, reason="no prefix cache: FSDP shards the model"))
    record = folder / DECISION
    use = on_main(_read_decision, record)
    if use is None:
        decision = _decide(context, job, model)
        use = CacheUse(used=decision.use, reason=decision.reason, bytes=decision.bytes if decision.use else 0)
        # Before the first step: a training that is killed later must find the decision.
        if is_main():
            write_file(record, use.model_dump_json())
    if not use.used:
        return OpenPrefix(use)
    try:
        cache = PrefixCache(context.cache_folder, **_layout(context, model))
    except SurgeryError as error:
        # There was room when it was decided. All processes get the error of the one that reserves the room.
        if context.plan.cache.use == "on":
            raise
        return OpenPrefix(CacheUse(used=False, reason=f"no prefix cache: {error.what}"))
    prefix = Prefix(model.live, model.depth, cache, autocast=autocast_dtype(model.live.device))
    return OpenPrefix(use, prefix, cache)


class _CacheLayout(TypedDict):
    """The arguments by which `PrefixCache` recognises a cache on disk."""

    windows: int
    sequence: int
    width: int
    dtype: torch.dtype
    tokens: str


def _layout(context: RunContext, model: StageModel) -> _CacheLayout:
    return {
        "windows": context.cached_windows,
        "sequence": context.plan.sequence,
        "width": model.live.width,
        "dtype": getattr(torch, context.plan.cache.dtype),
        "tokens": context.store.identity,
    }


def _read_decision(path: Path) -> CacheUse | None:
    """Return what was decided when this training started, if it is resumed."""
    if not path.is_file():
        return None
    try:
        return CacheUse.model_validate(read_json(path))
    except ValidationError as error:
        raise invalid_record(error, path, hint="Remove it, and it is decided anew.") from error


def _decide(context: RunContext, job: TrainingJob, model: StageModel) -> CacheDecision:
    store, depth = context.store, model.depth
    depths = cached_prefixes(context.cache_folder, **_layout(context, model)) or {}
    first = store.windows([store.window_at(job.first_window)])
    # Timed with the batch size of training, on which the speed of a layer depends.
    rows = max(1, job.schedule(context.plan).micro_batch)
    return decide_caching(
        model.live,
        depth,
        settings=context.plan.cache,
        folder=context.cache_folder,
        windows=context.cached_windows,
        passes=job.passes or 0.0,
        batch_tokens=first[:, :-1].expand(rows, -1),
        cached_depth=max((at for at in depths if at <= depth), default=0),
        autocast=autocast_dtype(model.live.device),
    )
