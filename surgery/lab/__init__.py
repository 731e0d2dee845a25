"""Small real models made on the spot: a reasoning family in Hugging Face format that needs no network."""

from __future__ import annotations

from surgery.lab.builder import PREFIX, build, data_of, data_path, describe, names, path_of, resolve

__all__ = ["PREFIX", "build", "data_of", "data_path", "describe", "names", "path_of", "resolve"]
