"""Load models and tokenizers with transformers, and save tokenizers.

What transformers loads is what our reader opened: it gets a staged folder (`surgery.models.staging`), reads safetensors
only, runs no code of the model's, applies no adapter and asks no server; and afterwards every weight must have come
from the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint, read_folder
from surgery.checkpoint.vocabulary import CONFIG, FETCH_AGAIN, TOKENIZER
from surgery.engine.work.computation import torch_device
from surgery.errors import SurgeryError, first_line, listing, usage_error
from surgery.io.atomic import disk_error
from surgery.io.json_io import read_json
from surgery.models import staging
from surgery.runtime.progress import lines
from surgery.runtime.quiet_libraries import quiet

AUTO = "auto"  # as a device: wherever accelerate's device map puts the layers; as a dtype: the stored one
# Settings of transformers and torch that protect the user; their messages advise to switch them off.
_PROTECTIONS = re.compile(
    r"trust_remote_code|weights_only|use_safetensors|torch\.load|pickle|OFFLINE|ignore_mismatch", re.I
)
_LONGEST = 300  # characters of another library's message
# A model may have weights that its checkpoint does not hold (tied ones, buffers): by far fewer than it holds.
_ROOM = 2


@dataclass(frozen=True)
class ModelAndTokenizer:
    """A transformers model in memory and its tokenizer; `name` is what tables call it."""

    name: str
    model: Any
    tokenizer: Any


def load_model(
    source: Checkpoint | Path | str, name: str, *, device: str = "cpu", dtype: str = AUTO
) -> ModelAndTokenizer:
    """Load the model `source`, an opened checkpoint or its folder, with its tokenizer, in evaluation mode.

    Args:
        device: cpu, cuda[:N], or auto, which spreads the layers over all devices.

    Raises:
        SurgeryError: it cannot be loaded; there is no such device or dtype.
    """
    checkpoint = _opened(source)
    dtype_of(dtype)
    # A missing device is an error before the weights are read.
    if device != AUTO:
        torch_device(device)
    # Before the weights: where it is missing or damaged, that shows in a second.
    folder = checkpoint.folder if checkpoint.folder is not None else checkpoint.ref
    tokenizer = load_tokenizer(folder, name)
    return ModelAndTokenizer(name, load_weights(checkpoint, name, device=device, dtype=dtype), tokenizer)


def load_weights(
    source: Checkpoint | Path | str,
    name: str,
    *,
    device: str = "cpu",
    dtype: str = AUTO,
    attention: str | None = None,
) -> Any:
    """Load the transformers model `source`, as `load_model`, without a tokenizer.

    Args:
        attention: the implementation of attention; transformers' own choice by default.

    Raises:
        SurgeryError: as `load_model`.
    """
    # Here, not above: transformers takes seconds to import, and most commands never load a model.
    from transformers import AutoModelForCausalLM

    checkpoint = _opened(source)
    staged = staging.stage_model(checkpoint)
    try:
        # Before all is silent: lines go to where stderr is then.
        with lines(f"Loading {name}"), quiet(), _offline(), _translated(name, staged):
            _check_config(staged, checkpoint, name)
            asked = {"dtype": dtype_of(dtype)} | ({"attn_implementation": attention} if attention else {})
            asked |= {"device_map": AUTO} if device == AUTO else {}
            model, info = AutoModelForCausalLM.from_pretrained(
                str(staged),
                use_safetensors=True,
                # Reported then, and refused below with their names.
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **asked,
            )
            model = model.eval() if device == AUTO else model.eval().to(device)
        _check_loaded(model, info, name)
    except BaseException:
        staging.remove(staged)
        raise
    staging.keep_while_used(model, staged)
    # transformers keeps the place that it loaded from; what looks for more of the model looks in its own folder.
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    return model


def load_tokenizer(folder: Path | str, name: str) -> Any:
    """Load the tokenizer in `folder`. Raises SurgeryError if it cannot be loaded, or needs code of its own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    staged = staging.stage_tokenizer(Path(folder))
    try:
        with quiet(), _offline():
            tokenizer = AutoTokenizer.from_pretrained(str(staged), trust_remote_code=False, local_files_only=True)
        # A class of transformers by that name may be anything else, such as a model.
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is no tokenizer")
    except BaseException as error:  # the tokenizers library raises nothing narrower; its panics are no Exceptions
        staging.remove(staged)
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise _tokenizer_error(error, Path(folder), name, staged) from error
    staging.keep_while_used(tokenizer, staged)
    tokenizer.name_or_path = str(folder)
    tokenizer.init_kwargs["name_or_path"] = str(folder)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a transformers tokenizer to `folder` with `save_pretrained`. Raises SurgeryError where it cannot be."""
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower for a full disk
        raise disk_error(error, folder) from error


def dtype_of(name: str) -> Any:
    """Return the torch dtype called `name`, or "auto" itself. Raises SurgeryError if there is no such float dtype."""
    import torch

    kind = getattr(torch, name, None)
    if name != AUTO and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise usage_error(f"got {name!r}, expected auto, float32, bfloat16 or float16", where="--dtype")
    return name if name == AUTO else kind


def _opened(source: Checkpoint | Path | str) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else read_folder(Path(source))


def _check_config(staged: Path, checkpoint: Checkpoint, name: str) -> None:
    """Raise SurgeryError where the config is not that of a language model of the weights' size."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if checkpoint.config.get("auto_map"):
            raise SurgeryError("needs code of its own, which is not run", where=name)
        raise SurgeryError(f"transformers knows no model of type {str(kind)[:40]!r}", where=name)
    config = AutoConfig.from_pretrained(str(staged), trust_remote_code=False, local_files_only=True)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise SurgeryError(f"is no language model: transformers has none of type {kind!r}", where=name)
    if "quantization_config" not in checkpoint.config:  # whose packed weights are counted otherwise
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        needed = sum(parameter.numel() for parameter in model.parameters())
        if needed > _ROOM * checkpoint.n_parameters:
            raise SurgeryError(
                f"its config describes {needed:,} parameters, and it holds {checkpoint.n_parameters:,}",
                where=name,
                hint="Config and weights do not belong together: fetch both again.",
            )


def _check_loaded(model: Any, info: Mapping[str, Any], name: str) -> None:
    """Raise SurgeryError where a weight of `model` is not from its checkpoint."""
    # An ensemble has one report for each member.
    reports = info.values() if info and all(isinstance(value, Mapping) for value in info.values()) else [info]
    missing = {key for report in reports for key in _names(report, "missing_keys") | _names(report, "mismatched_keys")}
    if missing:
        raise SurgeryError(
            f"lacks {len(missing):,} weights of the model that its config describes, or has them in another shape: "
            f"{listing(sorted(missing), 3)}",
            where=name,
            hint="Transformers would draw them at random: fetch config and weights again.",
        )
    if errors := [str(text) for report in reports for text in _names(report, "error_msgs")]:
        raise SurgeryError(f"cannot be loaded: {errors[0][:_LONGEST]}", where=name)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SurgeryError("an adapter was applied to it while it was loaded", where=name)


def _names(report: Any, key: str) -> set[str]:
    found = report.get(key) if isinstance(report, Mapping) else getattr(report, key, None)
    # What has another shape is listed with both shapes.
    return {each[0] if isinstance(each, tuple) else str(each) for each in found or ()}


@contextmanager
def _offline() -> Iterator[None]:
    """Have the Hub's library ask no server in the block, whatever a model's files name."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _translated(name: str, staged: Path) -> Iterator[None]:
    """Raise what transformers raises in the block, of whatever type, as SurgeryError."""
    try:
        yield
    except (SurgeryError, MemoryError):
        raise
    except Exception as error:  # the code of some hundred families, fed with a stranger's config
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise SurgeryError(f"cannot be loaded: {_reason(error, staged)}", where=name) from error


def _tokenizer_error(error: BaseException, folder: Path, name: str, staged: Path) -> SurgeryError:
    if isinstance(error, SurgeryError):
        return error
    if "AutoTokenizer" in (read_json(folder / CONFIG, missing={}).get("auto_map") or {}):
        return SurgeryError(
            "its tokenizer needs code of its own, which is not run",
            where=name,
            hint=f"Give a folder with its {TOKENIZER}, and a {CONFIG} without auto_map.",
        )
    return SurgeryError(f"its tokenizer cannot be loaded ({_reason(error, staged)})", where=name, hint=FETCH_AGAIN)


def _reason(error: BaseException, staged: Path) -> str:
    """Return another library's message without the staged place, and without advice to switch a protection off."""
    text = first_line(error).replace(str(staged), "its folder")
    if _PROTECTIONS.search(text):
        return f"transformers does not accept its files ({type(error).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
