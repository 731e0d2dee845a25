"""Stage what transformers loads: a private folder with exactly the files that were inspected, and nothing else.

Given a model's own folder, transformers chooses for itself: weights by their name (a pickle where safetensors have
another one), an `adapter_config.json` that lies there, places that settings name. A staged folder leaves nothing to
choose: it has links to the shards that our reader opened, under the standard names and with an index of our own, the
config, and the tokenizer's files, with settings from `surgery.models.safe_settings`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, loadable_folder
from surgery.checkpoint.tokenizer_files import SPECIAL_TOKENS, list_tokenizer_files
from surgery.checkpoint.vocabulary import CONFIG as TOKENIZER_CONFIG
from surgery.errors import SurgeryError
from surgery.io.atomic import disk_error
from surgery.io.input_files import MAX_TEXT_BYTES
from surgery.io.json_io import read_json
from surgery.io.safe_paths import check_contained
from surgery.models.safe_settings import safe_config, safe_generation_settings, safe_tokenizer_settings

CONFIG, GENERATION = "config.json", "generation_config.json"
_SETTINGS = (TOKENIZER_CONFIG, SPECIAL_TOKENS)


def stage_model(checkpoint: Checkpoint) -> Path:
    """Return a new folder from which transformers loads the model, as opened, and the tokenizer beside it.

    Raises:
        SurgeryError: `checkpoint` is no whole model; a tensor is stored twice, which transformers could take for the
            other; as `safe_config`, and as `stage_tokenizer`.
    """
    folder = loadable_folder(checkpoint)
    config = safe_config(checkpoint)
    _check_single_copies(checkpoint)
    staged = _stage(folder, config)
    with _removed_on_error(staged):
        single = len(checkpoint.shards) == 1
        total = len(checkpoint.shards)
        names = {
            shard.path: SINGLE if single else f"model-{number:05d}-of-{total:05d}.safetensors"
            for number, shard in enumerate(checkpoint.shards, start=1)
        }
        for path, name in names.items():
            check_contained(folder, path)
            (staged / name).symlink_to(path.resolve())
        if not single:
            weight_map = {name: names[tensor.file] for name, tensor in checkpoint.tensors.items()}
            _write(staged / INDEX, {"metadata": {"total_size": checkpoint.n_bytes}, "weight_map": weight_map})
        if (settings := _read(folder, GENERATION)) is not None:
            _write(staged / GENERATION, safe_generation_settings(settings))
    return staged


def stage_tokenizer(folder: Path) -> Path:
    """Return a new folder from which transformers loads the tokenizer in `folder`.

    Raises:
        SurgeryError: a file is damaged, too large, or a link that leads out of `folder`.
    """
    # Its family decides which class reads the files; without weights its numbers cannot be wrong.
    config = _read(folder, CONFIG) or {}
    return _stage(folder, {key: value for key, value in config.items() if key in ("model_type", "tokenizer_class")})


def keep_while_used(owner: object, staged: Path) -> None:
    """Remove the folder `staged` once `owner`, loaded from it, is gone, or this process ends."""
    # Mapped weights and tables of slow tokenizers are read from it until then.
    weakref.finalize(owner, _remove_own, staged, os.getpid())


def remove(staged: Path) -> None:
    """Remove a staged folder; what its links lead to stays."""
    shutil.rmtree(staged, ignore_errors=True)


def _remove_own(staged: Path, process: int) -> None:
    # A forked child that ends runs its parent's finalizers too.
    if os.getpid() == process:
        remove(staged)


def _stage(folder: Path, config: dict[str, Any]) -> Path:
    try:
        staged = Path(tempfile.mkdtemp(prefix="surgery-"))
    except OSError as error:
        raise disk_error(error, Path(tempfile.gettempdir())) from error
    with _removed_on_error(staged):
        if config:
            _write(staged / CONFIG, config)
        for path in list_tokenizer_files(folder):
            name = path.relative_to(folder).as_posix()
            check_contained(folder, path)
            if path.suffix == ".py":
                continue
            if name in _SETTINGS:
                _write(staged / name, safe_tokenizer_settings(_read(folder, name) or {}))
                continue
            real = path.resolve()
            if real.stat().st_size > MAX_TEXT_BYTES:
                raise SurgeryError(f"is larger than the {MAX_TEXT_BYTES:,} bytes that a tokenizer may have", where=path)
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).symlink_to(real)
    return staged


def _check_single_copies(checkpoint: Checkpoint) -> None:
    """Raise SurgeryError where a shard holds a tensor that the index places in another one."""
    for shard in checkpoint.shards:
        for entry in shard.header.entries:
            tensor = checkpoint.tensors.get(entry.name)
            if tensor is None or tensor.file != shard.path:
                raise SurgeryError(
                    f'"{entry.name}" is in {shard.name} too, and the index says that the copy in another file counts',
                    where=checkpoint.folder,
                    hint="Remove the stale shards, so that what runs is what was read.",
                )


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    check_contained(folder, path)
    return read_json(path)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@contextmanager
def _removed_on_error(staged: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        remove(staged)
        if isinstance(error, OSError):
            raise disk_error(error, staged) from error
        raise
