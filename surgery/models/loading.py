"""Models and tokenizers loaded with transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.vocabulary import CONFIG, FETCH_AGAIN, TOKENIZER
from surgery.engine.computation import torch_device
from surgery.errors import SurgeryError, usage_error
from surgery.hub.datasets import first_line
from surgery.io.json_io import read_json
from surgery.runtime.quiet import quiet

AUTO = "auto"  # as a device: wherever accelerate's device map puts the layers; as a dtype: the stored one


@dataclass(frozen=True)
class ModelAndTokenizer:
    """A transformers model in memory, where it is, and its tokenizer; `name` is what tables call it."""

    name: str
    model: Any
    tokenizer: Any


def load_model(folder: Path | str, name: str, *, device: str = "cpu", dtype: str = "auto") -> ModelAndTokenizer:
    """The transformers model in `folder`, ready to be run.

    Args:
        device: cpu, cuda[:N], or auto, which spreads the layers over the devices that there are.

    Raises:
        SurgeryError: it cannot be loaded; there is no such device or dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype, None)
    if dtype != AUTO and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise usage_error(f"got {dtype!r}, expected auto, float32, bfloat16 or float16", where="--dtype")
    if device != AUTO:
        torch_device(device)

    tokenizer = load_tokenizer(folder, name)
    with quiet():
        try:
            spread = {"device_map": AUTO} if device == AUTO else {}
            # Unsaid, transformers would ask on the terminal whether to run a stranger's code.
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, **spread
            ).eval()
            model = model if spread else model.to(device)
        except (OSError, ValueError) as fault:
            raise SurgeryError(f"cannot be loaded: {fault}", where=name) from fault
    return ModelAndTokenizer(name, model, tokenizer)


def load_tokenizer(folder: Path | str, name: str) -> Any:
    """The tokenizer in `folder`. Raises SurgeryError where it cannot be loaded, or needs code of its own."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as fault:  # the tokenizers library raises nothing narrower
            if "AutoTokenizer" in (read_json(Path(folder) / CONFIG, missing={}).get("auto_map") or {}):
                raise SurgeryError(
                    "its tokenizer needs code of its own, which is not run",
                    where=name,
                    hint=f"Give a folder with its {TOKENIZER}, and a {CONFIG} without auto_map.",
                ) from fault
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise SurgeryError(f"its tokenizer cannot be loaded ({reason})", where=name, hint=FETCH_AGAIN) from fault


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a transformers tokenizer to `folder` with `save_pretrained`. Raises SurgeryError where it cannot be."""
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower for a full disk
        raise SurgeryError(f"the tokenizer cannot be written ({first_line(error)})", where=folder) from error
