"""Find a model's side files: what lies beside its weights and is carried along unchanged.

Model card and manifest describe the weights that they came with, and so are written anew.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from surgery.io.atomic import MANIFEST
from surgery.io.safe_paths import check_contained, list_folder

INDEXES = "*.safetensors.index.json"
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
SIDE_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_CARRIED = (MANIFEST, "trainer_state.json", "training.json", "scores.json")


def find_side_files(folder: Path) -> list[Path]:
    """Return the side files in `folder` (config, tokenizer, chat template, licence), sorted; hidden ones do not count.

    Raises:
        SurgeryError: one is a link that leads out of the folder, or something else than a file.
    """
    paths = []
    for path in list_folder(folder):
        # Folders may have such names (LICENSES), and are not carried along. Whoever expects a file there will say so.
        if is_side_file(path.name) and (path.is_symlink() or not path.is_dir()):
            check_contained(folder, path)
            paths.append(path)
    return paths


def is_side_file(name: str) -> bool:
    """Return whether a file of this name is carried along."""
    if name in NOT_CARRIED or fnmatchcase(name, INDEXES):
        return False
    return name.endswith(SIDE_SUFFIXES) or name.startswith(SIDE_PREFIXES)
