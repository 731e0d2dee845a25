"""Silence libraries on the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the logs, progress bars and warnings of libraries off the terminal in the block; errors are still logged."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Progress bars are drawn on stderr by each library in its own way: redirecting it silences them all.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
