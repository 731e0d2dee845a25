"""Versions of installed distributions; reading one takes milliseconds, so this is a module of its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SOURCE_TREE = "source tree"  # stands for the version where nothing is installed


def installed_version(distribution: str) -> str:
    """Return the version of `distribution`, or `SOURCE_TREE` where it is run without being installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return SOURCE_TREE


__version__ = installed_version("model-surgery")
