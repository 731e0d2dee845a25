"""The number formats of safetensors: how wide each is, and which of them arithmetic may touch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surgery.errors import usage_error

Kind = Literal["float", "integer", "boolean", "opaque"]
OutputDtype = Literal["float64", "float32", "bfloat16", "float16"]
"""What float tensors of an output can be stored in, by the names that torch and users give them."""
ComputeDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
"""What a model computes in; `auto` is the dtype that it is stored in."""


@dataclass(frozen=True)
class Dtype:
    """One safetensors dtype. `kind` "float" is what kernels compute on; the rest is only ever copied."""

    name: str
    bits: int
    kind: Kind


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("F64", 64, "float"),
        Dtype("F32", 32, "float"),
        Dtype("F16", 16, "float"),
        Dtype("BF16", 16, "float"),
        Dtype("F8_E4M3", 8, "float"),
        Dtype("F8_E5M2", 8, "float"),
        # Block scales and packed sub-byte values mean nothing without their partners: never computed on.
        Dtype("F8_E8M0", 8, "opaque"),
        Dtype("F8_E4M3FNUZ", 8, "opaque"),
        Dtype("F8_E5M2FNUZ", 8, "opaque"),
        Dtype("F6_E2M3", 6, "opaque"),
        Dtype("F6_E3M2", 6, "opaque"),
        Dtype("F4", 4, "opaque"),
        Dtype("C64", 64, "opaque"),
        Dtype("I64", 64, "integer"),
        Dtype("I32", 32, "integer"),
        Dtype("I16", 16, "integer"),
        Dtype("I8", 8, "integer"),
        Dtype("U64", 64, "integer"),
        Dtype("U32", 32, "integer"),
        Dtype("U16", 16, "integer"),
        Dtype("U8", 8, "integer"),
        Dtype("BOOL", 8, "boolean"),
    )
}

# `OutputDtype` → its safetensors name.
TORCH_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def is_float(dtype: str) -> bool:
    """Whether kernels may compute on tensors of this dtype."""
    return DTYPES[dtype].kind == "float"


def n_elements(shape: Sequence[int]) -> int:
    """Number of elements of a shape; 1 for a scalar ()."""
    return math.prod(shape)


def n_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in a safetensors file. Raises ValueError where bits do not fill a byte."""
    bits = DTYPES[dtype].bits * n_elements(shape)
    if bits % 8:
        raise ValueError(f"{n_elements(shape)} values of {dtype} do not fill whole bytes")
    return bits // 8


def dtype_name(name: str) -> str:
    """The safetensors name of a dtype as torch and users write it. Raises SurgeryError."""
    if name not in TORCH_NAMES:
        raise usage_error(f"got {name!r}, expected one of {', '.join(TORCH_NAMES)}", where="--dtype")
    return TORCH_NAMES[name]
