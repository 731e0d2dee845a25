"""Small real models trained on the spot, in Hugging Face format, without a network: test material with known truth."""

from __future__ import annotations

from surgery.lab.builder import build, data_of, data_path, path_of, resolve
from surgery.lab.catalogue import PREFIX, describe, names

__all__ = ["PREFIX", "build", "data_of", "data_path", "describe", "names", "path_of", "resolve"]
