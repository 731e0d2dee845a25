"""Hash, gather and assign parameters of a model in memory, whole or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.checkpoint.reader import digest, segments
from surgery.io.hashing import hash_parts


def parameter_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the hash of each tensor, the same as that of its bytes on disk (`surgery.checkpoint.reader.hash_tensor`).

    Collective under FSDP2: all processes must call it.
    """
    return {name: _hash(gather_full(tensor)) for name, tensor in tensors.items()}


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor in this process: the tensor itself, or under FSDP2 its shard."""
    # By attribute, so that DTensor need not be imported. Not `to_local()`, whose result is tracked by autograd.
    shard = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(shard, Tensor)
    return shard


def gather_full(tensor: Tensor) -> Tensor:
    """Return the whole tensor. Collective under FSDP2: all processes must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Copy `values` into `target`, rounded to its dtype; into a DTensor, the shard of this process."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    values = values.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        # Every process has all values, so nothing need be sent: without src_data_rank=None rank 0 would scatter them.
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def _hash(tensor: Tensor) -> str:
    # Cut like the engine's segments: the hash is taken over theirs.
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hash_parts(digest(flat[begin:end]) for begin, end in segments(len(flat)))
