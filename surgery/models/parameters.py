"""Parameters of models in memory: whole, hashed, and set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.checkpoint.reader import digest, segments
from surgery.io.hashing import hash_parts


def parameter_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hash of each tensor's bytes in memory, as they are on disk (`surgery.checkpoint.reader.hash_tensor`).

    Under FSDP2 all processes call it.
    """
    return {name: _hash_of(gather_full(tensor)) for name, tensor in tensors.items()}


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: the tensor itself, or under FSDP2 a shard."""
    shard = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(shard, Tensor)
    return shard


def gather_full(tensor: Tensor) -> Tensor:
    """The tensor itself, or, where FSDP2 holds a shard of it (all processes call this), all of it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Copies `values` into `target`, rounded to its dtype; where `target` is a DTensor, its own shard of them."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    values = values.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        # Every process has all the values: there is nothing to send.
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def _hash_of(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hash_parts(digest(flat[begin:end]) for begin, end in segments(len(flat)))
