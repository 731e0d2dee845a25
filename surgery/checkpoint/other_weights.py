"""Tell of weights that lie in a model's folder and are not read: a second copy, a pickle, an adapter, another index.

Nothing says that they are the same weights as those that count. Other programs may choose the others, and what is found
out about a model would then be about another.
"""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint
from surgery.checkpoint.side_files import INDEXES
from surgery.errors import SurgeryWarning, listing
from surgery.hub.file_selection import PICKLE_SUFFIXES, WEIGHTS_SUFFIX
from surgery.io.safe_paths import list_folder

# Of other formats: GGUF, TensorFlow, Flax, ONNX.
OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".onnx", ".npz")
OTHER_INDEXES = "*.bin.index.json"
# States of a training have a pickle's suffix and hold no model.
_NO_WEIGHTS = ("training_args*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")
_SHOWN = 3


def find_other_weights(checkpoint: Checkpoint) -> list[str]:
    """Return the names of files of weights in the folder of `checkpoint` that are not read for it, sorted."""
    if checkpoint.folder is None:
        return []
    read = {shard.path for shard in checkpoint.shards}
    # The files of an adapter that is applied lie in its own folder, or beside its base.
    applied = checkpoint.adapter == checkpoint.folder
    paths = list_folder(checkpoint.folder)
    names = []
    for path in paths:
        if path in read or path in checkpoint.files or (path.is_dir() and not path.is_symlink()):
            continue
        if _is_weights(path) or (path.name == ADAPTER_CONFIG and not applied):
            names.append(path.name)
    # Indexes list other files than those that are read, or a pickle's.
    names += [path.name for path in paths if fnmatchcase(path.name, OTHER_INDEXES)]
    return names + [path.name for path in paths if fnmatchcase(path.name, INDEXES) and path != checkpoint.index]


def warn_of_other_weights(checkpoint: Checkpoint) -> None:
    """Emit a `SurgeryWarning` where the folder of `checkpoint` holds weights that are not read."""
    names = find_other_weights(checkpoint)
    if names:
        used = listing(sorted(shard.name for shard in checkpoint.shards), _SHOWN)
        text = f"{checkpoint.folder}: only {used} counts here; not read: {listing(names, _SHOWN)}"
        warnings.warn(text, SurgeryWarning, stacklevel=2)


def _is_weights(path: Path) -> bool:
    if any(fnmatchcase(path.name, pattern) for pattern in _NO_WEIGHTS):
        return False
    return path.name.endswith((WEIGHTS_SUFFIX, *PICKLE_SUFFIXES, *OTHER_FORMATS))
