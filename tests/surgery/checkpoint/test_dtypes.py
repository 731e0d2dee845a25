"""Dtypes by other names than torch's."""

from __future__ import annotations

import pytest

from surgery.checkpoint.dtypes import TORCH_NAMES, dtype_guess, dtype_name
from surgery.errors import SurgeryError

QUANTISE = "Narrower dtypes than 16 bits are a quantiser's work: write bfloat16, and quantise the result."
NARROW = [
    "float8",
    "fp8",
    "float8_e4m3fn",
    "float8_e5m2",
    "torch.float8_e4m3fnuz",
    "e4m3",
    "int8",
    "int4",
    "uint8",
    "nf4",
    "fp4",
    "mxfp4",
    "nvfp4",
    "4bit",
    "8-bit",
    "q4_k_m",
    "q8_0",
    "Q6_K",
    "gptq",
    "awq",
    "gguf",
]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *((word, "float16") for word in ("fp16", "half", "f16", "FP16", "Float16", "torch.half", "16")),
        *((word, "bfloat16") for word in ("bf16", "BF16", "bfloat", "torch.bf16")),
        *((word, "float32") for word in ("fp32", "float", "torch.float", "f32", "single", "32")),
        *((word, "float64") for word in ("fp64", "double", "f64")),
    ],
)
def test_other_names_lead_to_torchs(word: str, meant: str) -> None:
    assert dtype_guess(word) == f'Did you mean "{meant}"?'


@pytest.mark.parametrize(
    "word",
    NARROW,
)
def test_narrow_dtypes_are_a_quantisers_work(word: str) -> None:
    assert dtype_guess(word) == QUANTISE


def test_the_dtype_that_is_there_is_had_by_naming_none() -> None:
    assert dtype_guess("auto") == "Leave it out, and every tensor keeps the dtype that it has."
    assert dtype_guess("int64") == "Float tensors are stored as floats: as float64, float32, bfloat16, float16."


@pytest.mark.parametrize("word", ["", "flot16", "bflaot16", "float", "gold", "x" * 100_000, "_" * 100_000])
def test_other_words_are_left_to_their_spelling(word: str) -> None:
    assert dtype_guess(word) == ('Did you mean "float32"?' if word == "float" else None)


def test_options_guess_too() -> None:
    assert dtype_name("bfloat16") == "BF16"
    with pytest.raises(SurgeryError) as caught:
        dtype_name("half")
    names = ", ".join(TORCH_NAMES)
    assert str(caught.value) == f"--dtype: got 'half', expected one of {names}. Did you mean \"float16\"?"
