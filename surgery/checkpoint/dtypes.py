"""The table of safetensors dtypes: width, kind, and the torch dtype that kernels see their bytes as.

Names of torch dtypes are text here, so that command-line options can be read without importing torch;
`checkpoint.reader.TORCH_DTYPES` has the dtypes themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from surgery.errors import usage_error

Kind = Literal["float", "integer", "boolean", "opaque"]
OutputDtype = Literal["float64", "float32", "bfloat16", "float16"]
"""Dtypes in which float tensors of an output can be stored, by torch's names."""
ComputeDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
"""Dtypes in which a model can compute; `auto` is the one that it is stored in."""


@dataclass(frozen=True)
class Dtype:
    """One safetensors dtype.

    bits: the width of a value.
    kind: kernels compute on "float" alone; tensors of all others are only ever copied.
    torch: the torch dtype as which bytes of this dtype are read, by name; None if they are never looked into.
    """

    name: str
    bits: int
    kind: Kind
    torch: str | None = None


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("F64", 64, "float", "float64"),
        Dtype("F32", 32, "float", "float32"),
        Dtype("F16", 16, "float", "float16"),
        Dtype("BF16", 16, "float", "bfloat16"),
        Dtype("F8_E4M3", 8, "float", "float8_e4m3fn"),
        Dtype("F8_E5M2", 8, "float", "float8_e5m2"),
        # Block scales and packed sub-byte values mean nothing without their partners: never computed on. Where a kernel
        # sees them, it sees whole numbers from 0 to 255.
        Dtype("F8_E8M0", 8, "opaque", "uint8"),
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
        Dtype("U8", 8, "integer", "uint8"),
        Dtype("BOOL", 8, "boolean"),
    )
}

# `OutputDtype` → its safetensors name.
TORCH_NAMES: dict[str, str] = {
    name: next(dtype.name for dtype in DTYPES.values() if dtype.torch == name) for name in get_args(OutputDtype)
}


# Names of these that torch and numpy, other programs and people have for them.
_OTHER_NAMES = {
    "float64": ("double", "f64", "fp64", "64"),
    "float32": ("f32", "float", "fp32", "full", "single", "32"),
    "bfloat16": ("b16", "bf", "bf16", "bfloat", "bfp16", "brain"),
    "float16": ("f16", "fp16", "half", "16"),
}
# Of 8 bits and fewer, however they are written: fp8, float8_e4m3fn, int8, nf4, 4bit, q4_k_m, mxfp4.
_NARROW = re.compile(r"(mx|nv)?[a-z]*?[ _-]*[2-8]([ _-]*bits?|_.*)?|e\dm\d.*|gptq|awq|gguf")


def dtype_guess(name: str) -> str | None:
    """Return what to do for someone who wrote `name` for one of `OutputDtype`, as a sentence; None for any word."""
    word = name.lower().removeprefix("torch.")
    for known, others in _OTHER_NAMES.items():
        if word == known or word in others:
            return f'Did you mean "{known}"?'
    if word in ("auto", "none", "same", "default"):
        return "Leave it out, and every tensor keeps the dtype that it has."
    if re.fullmatch(r"u?int(16|32|64)?|long|bool", word):
        return f"Float tensors are stored as floats: as {', '.join(TORCH_NAMES)}."
    if _NARROW.fullmatch(word):
        return "Narrower dtypes than 16 bits are a quantiser's work: write bfloat16, and quantise the result."
    return None


def is_float(dtype: str) -> bool:
    """Return whether kernels may compute on tensors of this dtype."""
    return DTYPES[dtype].kind == "float"


def n_elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape; 1 for a scalar ()."""
    return math.prod(shape)


def n_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor takes in a safetensors file. Raises ValueError if they are not whole."""
    bits = DTYPES[dtype].bits * n_elements(shape)
    if bits % 8:
        raise ValueError(f"{n_elements(shape)} values of {dtype} do not fill whole bytes")
    return bits // 8


def dtype_name(name: str) -> str:
    """Return the safetensors name of one of `OutputDtype`. Raises SurgeryError for any other."""
    if name not in TORCH_NAMES:
        raise usage_error(
            f"got {name!r}, expected one of {', '.join(TORCH_NAMES)}", where="--dtype", hint=dtype_guess(name)
        )
    return TORCH_NAMES[name]
