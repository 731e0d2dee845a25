"""Write the files of an output folder: inside of it only, and never through a link that lies there.

What is written into OUT, or into the folder that becomes OUT, is opened here. The modes of new files are those that the
user's umask allows.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.io.atomic import disk_error
from surgery.io.input_files import open_regular
from surgery.io.redaction import redact
from surgery.io.safe_paths import kind_of, output_path

NEW_FILE = 0o666  # the mode of which the umask takes away what its user does not want


def open_output(folder: Path, name: str, flags: int) -> int:
    """Open the file `name` of `folder`, whose folders are created with it; return the file descriptor.

    Args:
        flags: of `os.open`, such as `os.O_WRONLY | os.O_CREAT`.

    Raises:
        SurgeryError: the name leads out of `folder` or through a link; there is something else than a file; the disk
            is full.
    """
    path = output_path(folder, name)
    # Links and pipes could have been put there since: the first fail to open, the second do not block.
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        if flags & os.O_CREAT:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags | safe, NEW_FILE)
    except OSError as error:
        raise disk_error(error, path) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise SurgeryError(f"is {kind_of(mode)}, expected a file", where=path, hint="Remove it.")
    return descriptor


def use_new_file_mode(path: Path) -> None:
    """Give `path` the mode of new files, where a library (safetensors) made it for its owner alone."""
    path.chmod(NEW_FILE & ~_umask())


def _umask() -> int:
    # The kernel says it without a change: set to be read, as `os.umask` needs it, another thread could use that.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def write_output(folder: Path, name: str, content: bytes | str) -> Path:
    """Write `content` to the file `name` of `folder`, and return its path; text as UTF-8, without tokens of the Hub.

    Not atomic by itself: the commit of a staging folder makes its files durable.

    Raises:
        SurgeryError: as `open_output`.
    """
    data = redact(content).encode() if isinstance(content, str) else content
    path = folder / name
    try:
        with os.fdopen(open_output(folder, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(data)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def copy_output(source: Path, folder: Path, name: str) -> Path:
    """Copy the content of the regular file `source` to the file `name` of `folder`, and return its path.

    Not atomic by itself, as `write_output`. Of `source` the content alone is taken: with the mode of a read-only file
    the output could not be edited or replaced.

    Raises:
        SurgeryError: as `open_output`; `source` cannot be read.
    """
    path = folder / name
    with open_regular(source) as content:
        try:
            with os.fdopen(open_output(folder, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                shutil.copyfileobj(content, file)
        except OSError as error:
            raise disk_error(error, path) from error
    return path
