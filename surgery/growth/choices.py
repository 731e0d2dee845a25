"""Closed choices of the growing commands, as `Literal` types; imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from typing import Literal

EmbeddingKind = Literal["glyphs", "bits", "random", "table"]
"""What a frozen embedding is made from: pictures of the tokens, bits of their ids, noise, or another model's table."""

LayerInit = Literal["identity", "random", "copy"]
"""How added layers begin: the model computes what it did, random weights, or copies of the layers below."""

LayerPosition = Literal["top", "middle"] | int
"""Where layers are added; a number K stands for before layer K."""

BaselineBudget = Literal["tokens", "flops", "both"]
"""What a baseline shares with the growth that it is compared with."""

BaselineEmbedding = Literal["frozen", "trained", "both"]
"""Whether a baseline trains its token embedding."""
