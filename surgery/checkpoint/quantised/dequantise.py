"""See a quantised checkpoint dequantised: its weights in bf16, computed from codes and scales when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import CONFIG
from surgery.checkpoint.dtypes import DTYPES, n_bytes, n_elements
from surgery.checkpoint.quantised.block_scaled import MX_GROUP, BlockScaled, TransposedMxfp4
from surgery.checkpoint.quantised.quantisation import (
    ACTIVATION,
    CACHE,
    CONFIG_KEYS,
    FLOAT8,
    FP4,
    MARKER,
    MXFP4,
    WHOLE_FILE,
    QuantisedTensor,
    find_quantisation,
    quantisation_settings,
    quantised_tensors,
)
from surgery.checkpoint.side_files import QUANTISATION_FILES
from surgery.checkpoint.stored_tensor import Derivation, StoredTensor
from surgery.errors import SurgeryError
from surgery.io.escaping import json_text

DTYPE, DTYPE_NAME = "BF16", "bfloat16"
USUAL_BLOCK = 128  # of DeepSeek's models, and of the tools that write such weights since
# Keys under which configs state the size of blocks.
_BLOCK_KEYS = ("weight_block_size", "block_structure")
FETCH_AGAIN = "The checkpoint is damaged, or of a format that is not known: use the unquantised model."


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` with its quantised weights in bf16, without scales, and with a config that names none.

    Itself where it is not quantised, or in a way that is not understood: `check_quantised` then says so.

    Raises:
        SurgeryError: scales are missing, or do not fit their weights.
    """
    found = find_quantisation(checkpoint)
    if found is None or not found.readable:
        return checkpoint
    blocks = _stated_blocks(checkpoint.config)
    is_partial = any(name.rpartition(".")[2] == WHOLE_FILE for name in checkpoint.tensors)
    tensors = dict(checkpoint.tensors)
    codes: set[str] = set()
    for quantised in quantised_tensors(checkpoint):
        weight = _weight(quantised, blocks, checkpoint.ref, may_lack_scale=is_partial)
        codes.add(quantised.codes.name)
        for name in (quantised.codes.name, *(scale.name for scale in quantised.scales)):
            del tensors[name]
        if weight.name in tensors:
            raise SurgeryError(f'holds "{weight.name}" both quantised and not', where=checkpoint.ref, hint=FETCH_AGAIN)
        tensors[weight.name] = weight
    modules = {name.rpartition(".")[0] for name in codes}
    for name, tensor in list(tensors.items()):
        if _belongs_to_codes(tensor, modules):
            del tensors[name]
        elif tensor.dtype in FLOAT8 and tensor.derivation is None:
            # A scale got lost: a model that is quantised has no such matrix otherwise.
            if len(tensor.shape) >= 2:
                raise SurgeryError(
                    f'"{name}" is FP8, and its scale is not there', where=checkpoint.ref, hint=FETCH_AGAIN
                )
            tensors[name] = _plain(tensor, checkpoint.ref)
    config = _plain_config(checkpoint.config)
    # What describes codes is left out of outputs, which have none.
    files: dict[str, Path | bytes | None] = {**checkpoint.file_overrides, **dict.fromkeys(QUANTISATION_FILES)}
    if config != checkpoint.config:
        files[CONFIG] = (json_text(json.dumps(config, indent=2, ensure_ascii=False)) + "\n").encode()
    return replace(
        checkpoint,
        tensors=dict(sorted(tensors.items())),
        config=config,
        dequantised=found.scheme,
        file_overrides=files,
    )


@dataclass(frozen=True)
class _Shaped:
    """A weight to be: its name, its shape, and how its values are computed."""

    name: str
    shape: tuple[int, ...]
    derivation: Derivation


def _weight(
    quantised: QuantisedTensor, blocks: Sequence[tuple[int, ...]], ref: str, *, may_lack_scale: bool
) -> StoredTensor:
    """Return the bf16 weight that `quantised` holds the codes of. Raises SurgeryError where its scales do not fit."""
    codes, scales = quantised.codes, quantised.scales
    if not scales and may_lack_scale:
        return _plain(codes, ref)
    if len(scales) != 1:
        found = ", ".join(f'"{scale.name}"' for scale in scales) or "none"
        raise SurgeryError(f'"{codes.name}" needs one scale, and has {found}', where=ref, hint=FETCH_AGAIN)
    scale = scales[0]
    shaped = _mxfp4(codes, scale) if quantised.scheme == MXFP4 else _scaled(codes, scale, blocks, quantised.scheme)
    if shaped is None:
        raise SurgeryError(
            f'"{scale.name}", {scale.dtype} {list(scale.shape)}, does not fit "{codes.name}", {codes.dtype} '
            f"{list(codes.shape)}",
            where=ref,
            hint=FETCH_AGAIN,
        )
    return replace(
        codes,
        name=shaped.name,
        dtype=DTYPE,
        shape=shaped.shape,
        n_bytes=n_bytes(DTYPE, shaped.shape),
        derivation=shaped.derivation,
        stored_as=codes.name_in_file,
    )


def _scaled(codes: StoredTensor, scale: StoredTensor, stated: Sequence[tuple[int, ...]], scheme: str) -> _Shaped | None:
    packed = scheme == FP4
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if packed else codes.shape
    block = _block(shape, scale.shape, stated)
    if block is None or not (packed or _is_read(codes)) or not _is_scale(scale):
        return None
    return _Shaped(codes.name, shape, BlockScaled(codes, scale, block, packed))


def _mxfp4(blocks: StoredTensor, scales: StoredTensor) -> _Shaped | None:
    """Return weights of blocks (…, rows, groups, 16) and exponents (…, rows, groups).

    gpt-oss's `_blocks` are transposed against the weights (experts, columns, rows) that transformers loads them into;
    those of its original format, `.blocks`, are not.
    """
    if len(blocks.shape) < 3 or blocks.shape[-1] != MX_GROUP // 2 or scales.shape != blocks.shape[:-1]:
        return None
    if scales.dtype not in ("U8", "F8_E8M0"):
        return None
    *lead, rows, groups = scales.shape
    shape = (*lead, rows, groups * MX_GROUP)
    if blocks.name.endswith(".blocks"):
        block = (*(1 for _ in shape[:-1]), MX_GROUP)
        return _Shaped(blocks.name.removesuffix(".blocks"), shape, BlockScaled(blocks, scales, block, packed=True))
    transposed = (*lead, groups * MX_GROUP, rows)
    return _Shaped(blocks.name.removesuffix("_blocks"), transposed, TransposedMxfp4(blocks, scales))


def _plain(tensor: StoredTensor, ref: str) -> StoredTensor:
    """Return an FP8 tensor that has no scale in bf16. Raises SurgeryError where torch has no such dtype."""
    if not _is_read(tensor):
        raise SurgeryError(f'"{tensor.name}" is {tensor.dtype}, which is not read', where=ref, hint=FETCH_AGAIN)
    block = (1,) * len(tensor.shape)
    return replace(
        tensor,
        dtype=DTYPE,
        n_bytes=n_bytes(DTYPE, tensor.shape),
        derivation=BlockScaled(tensor, None, block),
        stored_as=tensor.name_in_file,
    )


def _is_read(tensor: StoredTensor) -> bool:
    return DTYPES[tensor.dtype].torch is not None


def _is_scale(tensor: StoredTensor) -> bool:
    return tensor.is_float or tensor.dtype in ("U8", "F8_E8M0")


def _block(shape: tuple[int, ...], scale: tuple[int, ...], stated: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the values along each axis that share a scale; None where the shapes do not fit.

    A scale is one for all, one for each entry of the first axes (experts, outputs), or one per block.
    """
    if n_elements(scale) == 1:
        return tuple(max(size, 1) for size in shape)
    if len(scale) < len(shape) and shape[: len(scale)] == scale:
        scale = (*scale, *(1 for _ in shape[len(scale) :]))
    if len(scale) != len(shape) or 0 in shape:
        return None
    # With blocks at the edge that are smaller, the numbers of blocks do not tell how large the others are.
    for size in (*stated, (USUAL_BLOCK, USUAL_BLOCK)):
        if len(size) <= len(shape) and (block := _tiling(shape, scale, size)) is not None:
            return block
    if any(n % count for n, count in zip(shape, scale, strict=True)):
        return None
    return tuple(n // count for n, count in zip(shape, scale, strict=True))


def _tiling(shape: tuple[int, ...], scale: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return blocks of `size` along the last axes, if they are as many as there are scales."""
    first = len(shape) - len(size)
    lead = (n if count == 1 else 1 for n, count in zip(shape[:first], scale[:first], strict=True))
    block = (*lead, *size)
    fits = all(-(-n // b) == count for n, count, b in zip(shape, scale, block, strict=True))
    return block if fits else None


def _stated_blocks(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the sizes of blocks that the config states, wherever in its settings."""
    return list(dict.fromkeys(size for settings in quantisation_settings(config).values() for size in _sizes(settings)))


def _sizes(value: object) -> Iterator[tuple[int, ...]]:
    if not isinstance(value, Mapping):
        return
    for key, each in value.items():
        # `type … is int`: true would pass for 1.
        if key in _BLOCK_KEYS and isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each):
            if min(each) > 0:
                yield tuple(each)
        else:
            yield from _sizes(each)


def _belongs_to_codes(tensor: StoredTensor, modules: set[str]) -> bool:
    """Return whether a tensor only serves a model that computes with codes: scales of activations, marks of tools."""
    module, _, leaf = tensor.name.rpartition(".")
    if MARKER.fullmatch(leaf) or CACHE.fullmatch(leaf):
        return tensor.n_elements <= 2 or MARKER.fullmatch(leaf) is not None
    return ACTIVATION.fullmatch(leaf) is not None and module in modules


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without settings of quantisation, nested ones included, and with a dtype of the weights."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in CONFIG_KEYS and key in quantisation_settings({key: value}):
            continue
        # fp32 beside bf16 weights loses nothing; fp16 would overflow, and 8 bits are no longer what is stored.
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value not in ("float32", DTYPE_NAME):
            value = DTYPE_NAME
        plain[key] = _plain_config(value) if isinstance(value, Mapping) else value
    return plain
