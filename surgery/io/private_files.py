"""Keep what is nobody else's business readable by its owner alone: caches of texts, of private models and of tokens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600


def make_private_folder(path: Path) -> None:
    """Create the folder `path` so that only its owner may enter it, whatever the umask; close it where it is open.

    Folders on the way to it follow the umask. A folder of somebody else is left as it is.

    Raises:
        OSError: it cannot be created.
    """
    path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != FOLDER_MODE:
        path.chmod(FOLDER_MODE)
