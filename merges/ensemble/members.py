"""Check which models can be members of one ensemble, and with which weights, before anything is written."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from merges.choices import AveragingMode
from merges.ensemble.ensemble_model import MODEL_TYPE, member_config
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.vocabulary import Vocabulary, differences, read_vocabulary
from surgery.engine.preflight import Preflight
from surgery.errors import usage_error
from surgery.io.safe_paths import folded


@dataclass(frozen=True)
class EnsembleMember:
    """A model in the ensemble. `rows`: of its embedding; `config`: transformers' config object."""

    name: str
    checkpoint: Checkpoint
    config: Any
    rows: int
    vocabulary: Vocabulary | None


def check_weights(weights: Sequence[float] | None, count: int, mode: str) -> list[float]:
    """Return `weights` divided by their sum. Raises SurgeryError where they, or `mode`, define no mean of `count`."""
    if mode not in get_args(AveragingMode):
        raise usage_error(f"got {mode!r}, expected one of {', '.join(get_args(AveragingMode))}", where="--mode")
    if count < 2:
        raise usage_error(f"got {count} model(s), expected two or more", where="merge logits")
    given = [1.0] * count if not weights else [float(weight) for weight in weights]
    if len(given) != count:
        raise usage_error(
            f"got {len(given)} weight(s) for {count} models", where="--weight", hint="Give one per model, or none."
        )
    if not all(math.isfinite(weight) for weight in given):
        raise usage_error(f"got {_numbers(given)}, expected finite numbers", where="--weight")
    # Logits may be subtracted (contrastive decoding); a negative probability has no logarithm.
    if mode == "probs" and min(given) < 0:
        raise usage_error(f"got {_numbers(given)}; probabilities need weights of 0 or more", where="--weight")
    total = math.fsum(given)
    if not total > 0:
        raise usage_error(f"got {_numbers(given)}, whose sum is {total:g}, expected one above 0", where="--weight")
    return [weight / total for weight in given]


def check_vocabularies(preflight: Preflight, members: Sequence[EnsembleMember]) -> int:
    """Return the number of rows that every member has. Differing tokens, and missing rows, are errors."""
    known = [member for member in members if member.vocabulary is not None]
    # Rows beyond the shortest may only be padding; that no token has its row there is checked below.
    rows = min(member.rows for member in members)
    sizes = ", ".join(f"{member.name} {member.rows:,}" for member in members)
    differ = len({member.rows for member in members}) > 1
    for member in members:
        if member.vocabulary is None:
            preflight.warnings.append(
                f"{member.checkpoint.ref} has no tokenizer files: only its number of rows was compared."
            )
    if not known:
        if differ:
            preflight.errors.add(
                f"vocabularies have different sizes ({sizes}) and no model has a tokenizer to tell why. "
                "Put the tokenizer's files beside the weights."
            )
        preflight.facts["tokens"] = f"not compared: no tokenizer; {rows:,} rows each"
        return rows
    first = cast(Vocabulary, known[0].vocabulary)
    for member in known[1:]:
        difference = differences(first, cast(Vocabulary, member.vocabulary))
        if not difference.same:
            preflight.errors.add(
                f"tokens differ: {difference.describe(known[0].checkpoint.ref, member.checkpoint.ref)} "
                "Logits can only be averaged token by token: use models of one tokenizer."
            )
    for member in members:
        if member.rows < first.size:
            preflight.errors.add(
                f"{member.checkpoint.ref} has {member.rows:,} rows for tokens with ids up to {first.size - 1:,}: "
                "those beyond would be lost."
            )
    preflight.facts["tokens"] = f"{len(first.ids):,}, the same in {len(known)} tokenizers"
    if differ:
        preflight.facts["rows"] = f"{sizes}; cut to {rows:,}, which hold every token"
    return rows


def find_members(preflight: Preflight, checkpoints: Sequence[Checkpoint]) -> list[EnsembleMember]:
    """Return `checkpoints` as members, named after their references; each that cannot be one is an error."""
    names = _names([checkpoint.ref for checkpoint in checkpoints])
    members = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        reason, config = _native_config(checkpoint)
        if reason:
            preflight.errors.add(f"{checkpoint.ref} {reason}")
            continue
        folder = checkpoint.tokenizer_folder
        vocabulary = read_vocabulary(folder) if folder is not None else None
        members.append(
            EnsembleMember(name, checkpoint, config, config.get_text_config(decoder=True).vocab_size, vocabulary)
        )
    return members


def _native_config(checkpoint: Checkpoint) -> tuple[str | None, Any]:
    """Return why transformers' own code cannot run `checkpoint` as a causal language model, or None; and its config."""
    values = checkpoint.config
    if checkpoint.folder is None or not values:
        return "has no config.json, so nothing says how to run it. Give the whole folder.", None
    kind = values.get("model_type")
    if kind == MODEL_TYPE:
        return "is an ensemble itself. Write its members out with `surgery merge unpack` and name them.", None
    if kind not in CONFIG_MAPPING:
        return f"needs code that is not in transformers (model_type {kind!r}), which is never run here.", None
    try:
        config = member_config(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        return f"has a config.json that transformers refuses: {' '.join(str(error).split())}", None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"is no causal language model (model_type {kind!r}).", None
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = {one.__name__.lower(): one for one in (mapped if isinstance(mapped, tuple) else (mapped,))}
    # Sequence classifiers have the same model_type, and no head to generate with.
    named = values.get("architectures") or []
    if named and not any(str(name).lower() in classes for name in named):
        return f"is no causal language model, but {', '.join(map(str, named))}.", None
    if not all("past_key_values" in inspect.signature(one.forward).parameters for one in classes.values()):
        return f"({kind}) keeps its state elsewhere than in a key-value cache, which an ensemble shares.", None
    return None, config


def _names(refs: Sequence[str]) -> list[str]:
    """Return a folder name for each member: the end of its reference, made unique."""
    names: list[str] = []
    for ref in refs:
        # The name becomes a folder of the ensemble: no separators, no leading dot.
        stem = re.sub(r"[^\w.+-]", "-", ref.rstrip("/").rpartition("/")[2]).lstrip(".") or "member"
        number = 1
        name = stem
        # As `merge unpack` tells the folders apart, and as file systems that ignore case do.
        while folded(name) in map(folded, names):
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
