"""Open files that may be a stranger's: regular files only, and no more of them than memory holds.

A pipe in the place of a file would make a command wait for ever, a device would never end, and a text of a gigabyte
would take tens of gigabytes once it is parsed. Whatever reads a whole file reads it by way of this module.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from surgery.errors import SurgeryError, usage_error
from surgery.io.safe_paths import kind_of

MB = 1_000_000
MAX_TEXT_BYTES = 64 * MB  # what is parsed whole: the largest tokenizer.json in use has 35 MB
MAX_DATA_BYTES = 2_000 * MB  # of a file of examples or texts, which its user knows the size of


def open_regular(path: Path) -> BinaryIO:
    """Open `path` for reading if it is a regular file, or a link to one.

    Raises:
        SurgeryError: it is a folder, a pipe, a socket or a device, or cannot be opened.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """Open `path` for reading as `open_regular`, and return the file descriptor. Raises SurgeryError."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    try:
        # Not blocking, or opening a pipe would wait for somebody who writes into it; for files it means nothing.
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SurgeryError(f"cannot be read ({getattr(error, 'strerror', error)})", where=path) from error
    # After opening: what was looked at before may have been replaced in between.
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise SurgeryError(
        f"is {kind_of(mode)}, expected a file", where=path, hint="Put the file itself in its place, or remove it."
    )


def read_bytes(path: Path, *, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of the regular file `path`, of at most `limit` bytes.

    Raises:
        SurgeryError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        try:
            # A byte more than it has: it may grow while it is read, so that its size alone proves nothing. Not all that
            # is allowed: a reader makes room for what it is asked for, and the limits of data are gigabytes.
            known = os.fstat(file.fileno()).st_size
            content = b"" if known > limit else file.read(known + 1)
            if len(content) > known:
                content += file.read(limit + 1 - len(content))
        except OSError as error:
            raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
        size = max(known, len(content))
        if size > limit:
            raise SurgeryError(
                f"has {size:,} bytes, more than the {limit:,} that such a file may have",
                where=path,
                hint="It is damaged, or not what its name says.",
            )
    return content


def read_utf8(path: Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the UTF-8 text in `path`, without a byte order mark; line ends stay as they are.

    Raises:
        SurgeryError: as `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SurgeryError(f"is not UTF-8 text (byte {error.start:,})", where=path) from error


def read_given_text(path: Path, *, limit: int = MAX_DATA_BYTES) -> str:
    """Return the UTF-8 text in a file that the user named, without a byte order mark; its lines end in `\\n`.

    Raises:
        SurgeryError: as `read_utf8`, as an error of usage.
    """
    try:
        text = read_bytes(path, limit=limit).decode("utf-8-sig")
    except SurgeryError as error:
        raise usage_error(error.what, where=error.where, hint=error.hint) from error
    except UnicodeDecodeError as error:
        raise usage_error(f"is not UTF-8 (byte {error.start:,})", where=path, hint="Convert it first.") from error
    # As Python's text files: what was written on Windows is the same text.
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
