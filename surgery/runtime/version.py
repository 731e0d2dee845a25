"""The version of this tool, as its distribution says; reading it takes milliseconds, so it is a module of its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SOURCE_TREE = "source tree"  # stands for the version where nothing is installed

try:
    __version__ = version("model-surgery")
except PackageNotFoundError:
    __version__ = SOURCE_TREE
