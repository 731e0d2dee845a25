"""Load models and tokenizers with transformers, and save tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.vocabulary import CONFIG, FETCH_AGAIN, TOKENIZER
from surgery.engine.work.computation import torch_device
from surgery.errors import SurgeryError, first_line, usage_error
from surgery.io.json_io import read_json
from surgery.runtime.quiet_libraries import quiet

AUTO = "auto"  # as a device: wherever accelerate's device map puts the layers; as a dtype: the stored one


@dataclass(frozen=True)
class ModelAndTokenizer:
    """A transformers model in memory and its tokenizer; `name` is what tables call it."""

    name: str
    model: Any
    tokenizer: Any


def load_model(folder: Path | str, name: str, *, device: str = "cpu", dtype: str = "auto") -> ModelAndTokenizer:
    """Load the transformers model in `folder` with its tokenizer, in evaluation mode.

    Args:
        device: cpu, cuda[:N], or auto, which spreads the layers over all devices.

    Raises:
        SurgeryError: it cannot be loaded; there is no such device or dtype.
    """
    # Here, not above: transformers takes seconds to import, and most commands never load a model.
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype, None)
    if dtype != AUTO and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise usage_error(f"got {dtype!r}, expected auto, float32, bfloat16 or float16", where="--dtype")
    # A missing device is an error before the weights are read.
    if device != AUTO:
        torch_device(device)

    # Before the weights: where it is missing or damaged, that shows in a second.
    tokenizer = load_tokenizer(folder, name)
    with quiet():
        try:
            spread = {"device_map": AUTO} if device == AUTO else {}
            # Left out, transformers would ask on the terminal whether to run a stranger's code.
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, **spread
            ).eval()
            model = model if spread else model.to(device)
        except (OSError, ValueError) as error:
            raise SurgeryError(f"cannot be loaded: {error}", where=name) from error
    return ModelAndTokenizer(name, model, tokenizer)


def load_tokenizer(folder: Path | str, name: str) -> Any:
    """Load the tokenizer in `folder`. Raises SurgeryError if it cannot be loaded, or needs code of its own."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises nothing narrower
            if "AutoTokenizer" in (read_json(Path(folder) / CONFIG, missing={}).get("auto_map") or {}):
                raise SurgeryError(
                    "its tokenizer needs code of its own, which is not run",
                    where=name,
                    hint=f"Give a folder with its {TOKENIZER}, and a {CONFIG} without auto_map.",
                ) from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SurgeryError(f"its tokenizer cannot be loaded ({reason})", where=name, hint=FETCH_AGAIN) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a transformers tokenizer to `folder` with `save_pretrained`. Raises SurgeryError where it cannot be."""
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower for a full disk
        raise SurgeryError(f"the tokenizer cannot be written ({first_line(error)})", where=folder) from error
