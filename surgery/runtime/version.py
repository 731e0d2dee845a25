"""Provide the version of the installed distribution, in a module of its own, as reading it takes milliseconds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SOURCE_TREE = "source tree"  # stands for the version where nothing is installed

try:
    __version__ = version("model-surgery")
except PackageNotFoundError:
    __version__ = SOURCE_TREE
