"""Resolve references to models: `open_checkpoint(ref)` returns a `Checkpoint`.

A reference is a local folder, a single `.safetensors` file, `org/name[@revision]` on the Hub, a PEFT LoRA adapter
folder, `BASE+ADAPTER` (the adapter on a base of your choice), or `lab:NAME`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from surgery import lab
from surgery.checkpoint.adapters.adapted_checkpoint import add_adapter, base_of
from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint, existing_path, is_adapter, read_file, read_folder
from surgery.checkpoint.other_weights import warn_of_other_weights
from surgery.errors import SurgeryError, usage_error
from surgery.hub import download as hub
from surgery.io.safe_paths import find_file


def open_checkpoint(ref: str | Path, *, dequantise: bool = False) -> Checkpoint:
    """Open `ref` by its headers alone; no tensor is loaded. A Hub model is fetched first, a lab model trained.

    Example:
        checkpoint = surgery.open_checkpoint("lab:grpo")
        print(len(checkpoint.tensors), checkpoint.config["model_type"])

    A `SurgeryWarning` tells where other weights lie beside those that count.

    Args:
        dequantise: see weights in FP8 with scales, and MXFP4, as bf16 (`surgery.checkpoint.quantised.dequantise`).

    Raises:
        SurgeryError: the reference names nothing, or the model is damaged or not safetensors.
    """
    checkpoint = _open(str(ref), dequantise=dequantise)
    warn_of_other_weights(checkpoint)
    return checkpoint


def _open(text: str, *, is_base: bool = False, dequantise: bool = False) -> Checkpoint:
    """Open `text`; `is_base`: as the base of an adapter, which may not be an adapter itself."""
    # The last +, and only where no such path exists: folders, the base among them, may have one in their names.
    base, _, adapter = text.rpartition("+")
    path = existing_path(text)
    if path is not None:
        if path.is_dir():
            return replace(_open_folder(path, is_base=is_base, dequantise=dequantise), ref=text)
        return replace(_seen(read_file(path), dequantise=dequantise), ref=text)
    if base and adapter:
        # A tensor has room for one update only.
        if is_base:
            raise _adapter_on_adapter(text)
        return replace(_open_adapter(_adapter_folder(adapter), base, dequantise=dequantise), ref=text)
    if text.startswith(lab.PREFIX):
        return replace(read_folder(lab.resolve(text.removeprefix(lab.PREFIX))), ref=text)
    if hub.is_repo_id(text):
        snapshot = hub.fetch(*hub.parse_repo_ref(text))
        opened = _open_folder(snapshot.folder, is_base=is_base, is_local=False, dequantise=dequantise)
        return replace(opened, ref=text, revision=snapshot.revision, repo_id=snapshot.repo_id)
    raise usage_error(
        "no such folder or file, and not a Hub id (org/name[@revision]) or lab:NAME",
        where=text or '""',
        hint="Check the spelling; `surgery lab list` names the lab models.",
    )


def _open_folder(folder: Path, *, is_base: bool, is_local: bool = True, dequantise: bool) -> Checkpoint:
    if not is_adapter(folder):
        return _seen(read_folder(folder), dequantise=dequantise)
    if is_base:
        raise _adapter_on_adapter(folder)
    base = base_of(folder, is_local=is_local)
    # Kept to be shown: nobody typed it, and it may be any model of this machine.
    return replace(_open_adapter(folder, base, dequantise=dequantise), named_base=base)


def _open_adapter(folder: Path, base: str, *, dequantise: bool) -> Checkpoint:
    return add_adapter(_open(base, is_base=True, dequantise=dequantise), folder)


def _seen(checkpoint: Checkpoint, *, dequantise: bool) -> Checkpoint:
    """Return a model as it lies on disk, or dequantised: before an adapter's update, which is one of the weights."""
    if not dequantise:
        return checkpoint
    # It imports torch, which looking at headers does without.
    from surgery.checkpoint.quantised.dequantise import dequantised

    return dequantised(checkpoint)


def _adapter_folder(ref: str) -> Path:
    folder = existing_path(ref)
    if folder is None and hub.is_repo_id(ref):
        folder = hub.fetch(*hub.parse_repo_ref(ref)).folder
    if folder is None or not folder.is_dir():
        raise usage_error("no such adapter folder, and not a Hub id", where=ref)
    if find_file(folder, ADAPTER_CONFIG) is None:
        raise usage_error(f"is not an adapter: it has no {ADAPTER_CONFIG}", where=ref)
    return folder


def _adapter_on_adapter(where: object) -> SurgeryError:
    return SurgeryError(
        "is an adapter, and so cannot be the base of another",
        where=where,
        hint="Merge it into its base first, and name the result: BASE+ADAPTER.",
    )
