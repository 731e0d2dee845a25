"""OUT's model card as the Hub wants it: the README.md as it is, below metadata that are completed.

In comes a `UploadPackage`, out comes a `HubCard`. What the card says already stays; the folder's file is not touched.
The fields are those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import SurgeryError
from surgery.evaluation.scorecard import read_scores
from surgery.evaluation.scoring import Score
from surgery.hub import datasets as hub_data
from surgery.hub.settings import cache
from surgery.io.atomic import MANIFEST
from surgery.publish.package import CARD, UploadPackage
from surgery.reporting.report import format_value

TAG = "model-surgery"
TASK = "text-generation"
LIBRARIES = {"model": "transformers", "ensemble": "transformers", "adapter": "peft"}
# The Hub knows adapter, merge, quantized and finetune. A vector is, like an adapter, no model but what is added to one.
RELATIONS = {"vector": "adapter", "adapter": "adapter", "ensemble": "merge"}
MERGING = ("merge", "vector transfer", "vector apply")
# The key of a plan under which stands what a model is measured on: it has learned nothing from that.
EVALUATE = "evaluate"
LICENCE = ("license", "license_name", "license_link")

_FRONT = re.compile(r"\A---[ \t]*\n(?P<yaml>.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class HubCard:
    """A README.md: `text` is all of it, `metadata` what its YAML says."""

    text: str
    metadata: Mapping[str, Any]


def hub_card(parcel: UploadPackage, name: str, *, recipe: tuple[str, str] | None = None) -> HubCard:
    """The card that goes up with `parcel` as the repository `name`.

    Args:
        recipe: name and YAML text of the recipe that it is a step of; the card ends with it.

    Raises:
        SurgeryError: the README.md's metadata are no YAML or not what the Hub can read; scores.json is damaged.
    """
    written, body = _read(parcel, name)
    completed = {key: value for key, value in _known(parcel, name).items() if value and key not in written}
    tags = list(dict.fromkeys([*_listed(written.get("tags")), TAG]))
    metadata = {**written, **completed, "tags": tags}
    if recipe is not None:
        body = f"{body.rstrip()}\n{_recipe(*recipe)}"
    text = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000).strip()}\n---\n{body}"
    _check(text, parcel)
    return HubCard(text, metadata)


def _recipe(name: str, text: str) -> str:
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return (
        "\n## The recipe\n\nOf the pipeline that this is a result of. Save it as recipe.yaml, then "
        f"`surgery run {name} --file recipe.yaml` does all of it again.\n\n"
        f"{fence}yaml\n{text.rstrip()}\n{fence}\n"
    )


def _read(parcel: UploadPackage, name: str) -> tuple[dict[str, Any], str]:
    """The metadata that the folder's card has, and what is below them."""
    path = parcel.folder / CARD
    if CARD not in parcel.names:
        line = parcel.command.get("line")
        made = f"Made by model-surgery:\n\n```\n{line}\n```\n" if line else "Made by model-surgery.\n"
        return {}, f"\n# {name}\n\n{made}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SurgeryError("is not UTF-8", where=path) from error
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    front = _FRONT.match(text)
    if not front:
        return {}, f"\n{text}"
    try:
        metadata = yaml.safe_load(front["yaml"]) or {}
    except yaml.YAMLError as error:
        raise _unreadable(parcel, "are no YAML") from error
    if not isinstance(metadata, dict):
        raise _unreadable(parcel, "are no YAML mapping")
    return metadata, text[front.end() :]


def _known(parcel: UploadPackage, name: str) -> dict[str, Any]:
    """What the manifest, the scores and the cache tell, by the Hub's names, in the order of the card."""
    has_base = parcel.kind != "embedding"  # rows of numbers for a tokenizer's tokens: no model it was made from
    bases = parcel.hub_ids if has_base else []
    return {
        "base_model": bases,
        "base_model_relation": _relation(parcel) if bases else None,
        "datasets": _all_data_sets(parcel),
        **_licence(parcel if has_base else None),
        "library_name": LIBRARIES.get(parcel.kind),
        "pipeline_tag": TASK if parcel.kind in LIBRARIES else None,
        "model-index": _model_index(parcel, name),
    }


def _relation(parcel: UploadPackage) -> str:
    if parcel.kind in RELATIONS:
        return RELATIONS[parcel.kind]
    command = str(parcel.command.get("name", ""))
    merged = len(parcel.hub_ids) > 1 or any(command == each or command.startswith(f"{each} ") for each in MERGING)
    return "merge" if merged else "finetune"


def _all_data_sets(parcel: UploadPackage) -> list[str]:
    """The data sets on the Hub that the manifest names, or a plan of which it has the text."""
    named = [parcel.manifest]
    for name, text in (parcel.command.get("files") or {}).items():
        if name.endswith((".yml", ".yaml")):
            try:
                named += yaml.safe_load_all(text)
            except yaml.YAMLError as error:
                raise SurgeryError(f"its copy of {name} is no YAML", where=parcel.folder / MANIFEST) from error
    return sorted({name for each in named for name in _data_sets(each)})


def _data_sets(value: Any) -> Iterator[str]:
    """The data sets on the Hub that are named anywhere in `value`, by their references."""
    if isinstance(value, str):
        if asked := hub_data.parse(value):
            yield asked.repo
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("tensors", EVALUATE):
                yield from _data_sets(item)
    elif isinstance(value, list):
        for item in value:
            yield from _data_sets(item)


def _licence(parcel: UploadPackage | None) -> dict[str, Any]:
    """The licence that the cached cards of all models it was made from agree on; nothing where one says nothing."""
    if parcel is None or not all(entry.get("repo_id") for entry in parcel.inputs):
        return {}
    found = [_cached_licence(entry["repo_id"], entry.get("revision")) for entry in parcel.inputs]
    return found[0] if found and all(each == found[0] for each in found) else {}


def _cached_licence(repo_id: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, CARD, cache_dir=cache(), revision=revision)
    if not isinstance(path, str):
        return {}
    try:
        front = _FRONT.match(Path(path).read_text(encoding="utf-8"))
        metadata = yaml.safe_load(front["yaml"]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # somebody else's card: it is as good as none
    return {key: metadata[key] for key in LICENCE if metadata.get(key)} if isinstance(metadata, dict) else {}


def _model_index(parcel: UploadPackage, name: str) -> list[dict[str, Any]] | None:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    own = read_scores(parcel.folder)
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=score.value,
            metric_name=_described(score),
        )
        for score in (own.scores if own else ())
        if math.isfinite(score.value)
    ]
    return eval_results_to_model_index(name, results) if results else None


def _described(score: Score) -> str:
    """The metric with what its number is worth, for which the Hub's format has no field."""
    interval = "" if math.isnan(score.low) else f", 95 % interval {score.low:.4g} to {score.high:.4g}"
    return f"{score.metric}{interval}, n = {format_value(score.n, 'count')}"


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _check(text: str, parcel: UploadPackage) -> None:
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise _unreadable(parcel, "are not what the Hub can read") from error


def _unreadable(parcel: UploadPackage, what: str) -> SurgeryError:
    return SurgeryError(
        f"its metadata {what}", where=parcel.folder / CARD, hint="Mend what stands between the two lines of ---."
    )
