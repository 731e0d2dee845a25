"""Closed choices of the probing commands, as `Literal` types.

This module imports nothing heavy: the command line reads its options, and recipes their checks, from these types
without loading torch.
"""

from __future__ import annotations

from typing import Literal

Engine = Literal["transformers", "vllm"]
"""What generates answers."""

TrainingCells = Literal["all", "paper"]
"""What a refusal probe trains on: all four cells, or harmful and refused against harmless and complied."""

AttributionForm = Literal["exact", "paper"]
"""How heads are scored: with the final norm folded in, or as the paper does."""

AblationKind = Literal["scale", "mean", "resample"]
"""What takes the place of a head's output: a multiple of it, its mean, or that of a harmless example."""

EditMode = Literal["scale", "mean"]
"""What an edit does to heads in the weights."""

RowStyle = Literal["trl", "llama-factory"]
"""The layout of chosen training examples."""

ScalingMethod = Literal["weight", "renormalised", "logit", "forced"]
"""How a router is changed to reinforce experts."""

Phase = Literal["all", "generated"]
"""At which positions experts are reinforced."""
