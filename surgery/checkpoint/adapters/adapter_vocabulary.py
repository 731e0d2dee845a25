"""What an adapter does to the vocabulary: it may part a tied output head from the embedding, and bring new tokens."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery.checkpoint.adapters.adapter_config import AdapterConfig
from surgery.checkpoint.adapters.adapter_weights import AdapterWeights
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.config_layers import resize_vocabulary, untied
from surgery.checkpoint.config.model_config import CONFIG, stated_tie
from surgery.checkpoint.structure import ModelStructure
from surgery.checkpoint.tokenizer_files import TOKENIZER_FILES, is_tokenizer_file, list_tokenizer_files
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.io.escaping import json_text

# Output heads by name: a tied base stores none, so a name is all there is to recognise one by.
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|head)\.weight$")
# Families whose head is not called lm_head.
_HEAD_NAMES = {"gpt_neox": "embed_out.weight"}
_TOKENS = "trainable_tokens_delta"


@dataclass(frozen=True)
class TiedPair:
    """The names of a tied pair. `is_stored`: the base stores the head as well, though its config ties it."""

    embedding: str
    head: str
    is_stored: bool = False

    @classmethod
    def find(cls, base: Checkpoint, structure: ModelStructure, names: Iterable[str]) -> TiedPair | None:
        """Return the pair of `base`, or None; `names`: the adapter's, which may name the head."""
        embedding, head = structure.main_embedding, structure.main_head
        if embedding is not None and head is not None and stated_tie(base.config):
            return cls(embedding, head, is_stored=True)
        if embedding is None or not structure.tied:
            return None
        default = _HEAD_NAMES.get(str(base.config.get("model_type")), "lm_head.weight")
        known = (name for name in names if _HEAD.search(name) and name not in base.tensors)
        return cls(embedding, next(known, default))

    @property
    def names(self) -> tuple[str, str]:
        """Both names."""
        return self.embedding, self.head

    def is_parted(self, targets: Mapping[str, str], weights: AdapterWeights, config: AdapterConfig) -> bool:
        """Return whether the adapter makes the two differ; else what it has for the embedding is for both.

        Args:
            targets: name in the adapter → the tensor that it is about.
        """
        saved = {targets.get(name) for name in weights.whole if config.saves(name.rpartition(".")[0])}
        rows: dict[str, np.ndarray | None] = {}
        factors = set()
        for name, (module, *_) in weights.by_module.items():
            target = targets.get(f"{name}.weight")
            if target in self.names and _TOKENS in module.parts:
                rows[str(target)] = config.token_rows(name)
            elif target in self.names:
                factors.add(target)
        if self.embedding in rows:
            # Rows of tokens are trained for both, unless the config names other tokens for the head.
            own = rows.get(self.head)
            return own is not None and not np.array_equal(own, _or_none(rows[self.embedding]))
        if self.embedding in saved | factors:
            return not config.has_tied_weights
        return self.head in saved | factors or self.head in rows


def with_adapter_files(
    adapted: Checkpoint, base: Checkpoint, structure: ModelStructure, parted: TiedPair | None
) -> Checkpoint:
    """Return `adapted` with the config and the tokenizer that its tensors need.

    Args:
        adapted: with the adapter's folder, whose tokenizer counts where it has tokens that the base's has not.
        parted: the pair that was tied in `base` and is no more.

    Raises:
        SurgeryError: the embedding and the output head have different numbers of rows; the tokenizer needs more rows.
    """
    folder = adapted.adapter
    assert folder is not None
    # A head that was tied had the embedding's rows.
    source = {name: name for name in structure.token_rows if base.tensors[name].shape}
    if parted is not None:
        source.setdefault(parted.head, parted.embedding)
    rows = {name: adapted.tensors[name].shape[0] for name in source}
    before = {base.tensors[name].shape[0] for name in source.values()}
    changed = [name for name, count in rows.items() if count != base.tensors[source[name]].shape[0]]
    if changed and len(set(rows.values())) > 1:
        counts = ", ".join(f'"{name}" {count:,}' for name, count in rows.items())
        raise SurgeryError(
            f"has rows for another vocabulary, but not in every tensor with a row per token: {counts}",
            where=folder,
            hint="Save it again with save_embedding_layers=True.",
        )
    config = dict(adapted.config)
    if parted is not None:
        config = untied(config)
    if changed:
        config = resize_vocabulary(config, rows[changed[0]])
    files: dict[str, Path | bytes | None] = {}
    if config and config != adapted.config:
        text = json_text(json.dumps(config, indent=2, ensure_ascii=False)) + "\n"
        files[CONFIG] = text.encode()
    touched = [name for name in rows if adapted.tensors[name] is not base.tensors.get(name)]
    count = min(rows.values(), default=0)
    if touched and _has_new_tokens(base, folder, count, is_resized=bool(changed)):
        files |= dict.fromkeys(filter(is_tokenizer_file, base.side_files))
        files |= {path.relative_to(folder).as_posix(): path for path in list_tokenizer_files(folder)}
        adapted = replace(adapted, tokenizer_from=folder)
    elif changed and count > max(before):
        warnings.warn(
            f"{folder}: has {count:,} rows for tokens, {count - max(before):,} more than the base, and no tokenizer "
            "that says which tokens they are: the base's is kept",
            SurgeryWarning,
            stacklevel=2,
        )
    return replace(adapted, config=config, file_overrides={**base.file_overrides, **files})


def _has_new_tokens(base: Checkpoint, folder: Path, rows: int, *, is_resized: bool) -> bool:
    """Return whether the tokenizer beside the adapter has other tokens than the base's, and rows for all of them."""
    if not _has_tokenizer(path.name for path in list_tokenizer_files(folder)):
        return False
    own = read_vocabulary(folder)
    theirs = read_vocabulary(base.tokenizer_folder) if base.tokenizer_folder else None
    if own is None or (theirs is not None and own.ids == theirs.ids):
        return is_resized and own is not None
    if own.size <= rows:
        return True
    if is_resized:
        raise SurgeryError(
            f"has a tokenizer with ids up to {own.size - 1:,}, and {rows:,} rows for tokens",
            where=folder,
            hint="Put the tokenizer beside it that it was trained with.",
        )
    return False


def _has_tokenizer(names: Iterable[str]) -> bool:
    wanted: Collection[str] = TOKENIZER_FILES
    return any(name in wanted for name in names)


def _or_none(rows: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, dtype=np.int64) if rows is None else rows
