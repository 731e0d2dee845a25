"""Set up accelerate as the launcher asks for: one process, DDP (a copy of the model each), or FSDP2 (a shard each)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from surgery.errors import SurgeryError
from surgery.growth.training.stage_model import StageModel
from surgery.models.forward_pass import TRIAL_TOKENS
from surgery.runtime.collectives import barrier
from surgery.runtime.environment import n_processes


def is_sharded() -> bool:
    """Return whether the launcher asked for FSDP."""
    return n_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products: bf16 on a GPU; None means that of the weights, which are fp32."""
    return torch.bfloat16 if device.type == "cuda" else None


def accelerator_for(model: StageModel, sequence: int) -> Any:
    """Return accelerate's `Accelerator` for this process: bf16 on a GPU, fp32 on a CPU.

    Raises:
        SurgeryError: accelerate cannot do what the launcher asked for, or not on the model's device.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    device = model.live.device
    copies = n_processes() > 1 and not is_sharded()
    unused = copies and model.has_unused_parameters(min(sequence, TRIAL_TOKENS))
    ours = DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=unused)
    if copies:
        # Buffers, such as rotary frequencies, never change: else the first process would send its own at every step.
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)  # type: ignore[no-untyped-call]
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="bf16" if autocast_dtype(device) else "no", kwargs_handlers=[ours]
        )
    except ValueError as error:
        raise SurgeryError(f"accelerate cannot train on {device}: {error}") from error
    barrier()  # also sees to it that the connection is taken down in time
    if accelerator.num_processes != n_processes():
        raise SurgeryError(
            f"the launcher started {n_processes()} processes, and accelerate knows of {accelerator.num_processes}",
            hint="Each would train on its own.",
        )
    # Others (DeepSpeed, Megatron, TPUs) change optimizer and weights in ways that the saved state does not cover.
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if accelerator.distributed_type not in known:
        raise SurgeryError(
            f"growth trains in one process, with DDP or with FSDP2, not with {accelerator.distributed_type.value}"
        )
    if is_sharded() and not accelerator.is_fsdp2:
        raise SurgeryError(
            "FSDP was asked for, and accelerate would not do it in version 2 here",
            where="ACCELERATE_USE_FSDP",
            hint="It needs FSDP_VERSION=2 (fsdp_version: 2 in accelerate's config) and GPUs; else leave FSDP out.",
        )
    if accelerator.device.type != device.type:
        raise SurgeryError(f"accelerate works on {accelerator.device}, the model lies on {device}")
    return accelerator
