"""Complete a model card for the Hub: the README.md of an output folder, with the metadata that the Hub reads.

Values and text that the card has already are kept, and the folder's file is not written to. The fields are those of
https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import SurgeryError, first_line
from surgery.evaluation.scorecard import read_scores
from surgery.evaluation.scoring import Score
from surgery.hub import datasets as hub_data
from surgery.hub.settings import cache_dir
from surgery.io.atomic import MANIFEST
from surgery.io.escaping import markdown_block, markdown_code, markdown_text, yaml_text
from surgery.io.input_files import MAX_TEXT_BYTES, read_given_text
from surgery.io.yaml_models import MAX_YAML_BYTES
from surgery.io.yaml_nodes import UNREADABLE, read_documents
from surgery.publish.package import CARD, UploadPackage
from surgery.reporting.report import format_value

TAG = "model-surgery"
TASK = "text-generation"
# By the manifest's kind. The Hub shows a loading snippet of the library; vectors and embeddings have none.
LIBRARIES = {"model": "transformers", "ensemble": "transformers", "adapter": "peft"}
# The Hub knows adapter, merge, quantized and finetune. A vector is, like an adapter, no model but what is added to one.
RELATIONS = {"vector": "adapter", "adapter": "adapter", "ensemble": "merge"}
MERGE_COMMANDS = ("merge", "vector transfer", "vector apply")
# The key of a plan with the texts that a model is measured on: it was not trained on those.
EVALUATE = "evaluate"
LICENSE_KEYS = ("license", "license_name", "license_link")

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?P<yaml>.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class HubCard:
    """A README.md: its whole `text`, and the `metadata` of its YAML."""

    text: str
    metadata: Mapping[str, Any]


def build_hub_card(package: UploadPackage, name: str, *, recipe: tuple[str, str] | None = None) -> HubCard:
    """Return the card that is uploaded with `package` to a repository called `name` (without its owner).

    Args:
        recipe: name and YAML text of the recipe that it is a step of; the card ends with it.

    Raises:
        SurgeryError: the README.md's metadata are no YAML or not what the Hub can read; scores.json is damaged.
    """
    existing, body = _read_card(package, name)
    completed = {key: value for key, value in _known_metadata(package, name).items() if value and key not in existing}
    tags = list(dict.fromkeys([*_as_list(existing.get("tags")), TAG]))
    # Existing keys first, in their order, so that a card completed twice is the same text.
    metadata = {**existing, **completed, "tags": tags}
    if recipe is not None:
        body = f"{body.rstrip()}\n{_recipe_section(*recipe)}"
    text = f"---\n{yaml_text(metadata, width=1000).strip()}\n---\n{body}"
    _check_metadata(text, package)
    return HubCard(text, metadata)


def _recipe_section(name: str, text: str) -> str:
    return (
        "\n## The recipe\n\nOf the pipeline that this is a result of. Save it as recipe.yaml, then "
        f"{markdown_code(f'surgery run {shlex.quote(name)} --file recipe.yaml')} does all of it again.\n\n"
        f"{markdown_block(text.rstrip(), 'yaml')}\n"
    )


def _read_card(package: UploadPackage, name: str) -> tuple[dict[str, Any], str]:
    """Return the metadata of the folder's card, and the text below them."""
    path = package.folder / CARD
    if CARD not in package.names:
        line = package.command.get("line")
        origin = f"Made by model-surgery:\n\n{markdown_block(str(line))}\n" if line else "Made by model-surgery.\n"
        return {}, f"\n# {markdown_text(name)}\n\n{origin}"
    text = read_given_text(path, limit=MAX_TEXT_BYTES)
    front_matter = _FRONT_MATTER.match(text)
    if not front_matter:
        return {}, f"\n{text}"
    try:
        documents = _load_yaml(front_matter["yaml"], path)
    except SurgeryError as error:
        raise _metadata_error(package, "are no YAML") from error
    metadata = (documents[0] if documents else None) or {}
    if not isinstance(metadata, dict):
        raise _metadata_error(package, "are no YAML mapping")
    return metadata, text[front_matter.end() :]


def _known_metadata(package: UploadPackage, name: str) -> dict[str, Any]:
    """Return what manifest, scores and cached cards say, by the Hub's keys, in the order of the card."""
    has_base = package.kind != "embedding"  # rows of numbers for a tokenizer's tokens: no model it was made from
    bases = package.hub_ids if has_base else []
    return {
        "base_model": bases,
        "base_model_relation": _relation(package) if bases else None,
        "datasets": _dataset_ids(package),
        **_licence(package if has_base else None),
        "library_name": LIBRARIES.get(package.kind),
        "pipeline_tag": TASK if package.kind in LIBRARIES else None,
        "model-index": _model_index(package, name),
    }


def _load_yaml(text: str, where: object) -> list[Any]:
    """Return the values of the documents in `text`. Raises SurgeryError where it is no YAML, or too large or deep."""
    if len(text) > MAX_YAML_BYTES:
        raise SurgeryError(f"has {len(text):,} characters of YAML, more than {MAX_YAML_BYTES:,}", where=where)
    # It bounds nodes and depth, which PyYAML does not.
    read_documents(text, str(where))
    try:
        return list(yaml.safe_load_all(text))
    except UNREADABLE as error:
        raise SurgeryError(f"is no YAML ({first_line(error)})", where=where) from error


def _relation(package: UploadPackage) -> str:
    if package.kind in RELATIONS:
        return RELATIONS[package.kind]
    command = str(package.command.get("name", ""))
    merged = len(package.hub_ids) > 1 or any(
        command == each or command.startswith(f"{each} ") for each in MERGE_COMMANDS
    )
    return "merge" if merged else "finetune"


def _dataset_ids(package: UploadPackage) -> list[str]:
    """Return the Hub data sets that are named in the manifest, or in a plan that it has a copy of."""
    named = [package.manifest]
    for name, text in (package.command.get("files") or {}).items():
        if name.endswith((".yml", ".yaml")):
            try:
                named += _load_yaml(text, package.folder / MANIFEST)
            except SurgeryError as error:
                raise SurgeryError(f"its copy of {name} is no YAML", where=package.folder / MANIFEST) from error
    return sorted({name for each in named for name in _iter_dataset_ids(each)})


def _iter_dataset_ids(value: Any) -> Iterator[str]:
    """Yield the repository of each Hub data set that is named anywhere in `value`."""
    if isinstance(value, str):
        if dataset := hub_data.parse_dataset_ref(value):
            yield dataset.repo_id
    elif isinstance(value, Mapping):
        for key, item in value.items():
            # The table of tensors is long, and its names are no references.
            if key not in ("tensors", EVALUATE):
                yield from _iter_dataset_ids(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_dataset_ids(item)


def _licence(package: UploadPackage | None) -> dict[str, Any]:
    """Return the licence on which the cached cards of all inputs agree; nothing where a card names none."""
    if package is None or not all(entry.get("repo_id") for entry in package.inputs):
        return {}
    # Only the cache is read: a preview must not ask the Hub.
    licences = [_cached_licence(entry["repo_id"], entry.get("revision")) for entry in package.inputs]
    return licences[0] if licences and all(each == licences[0] for each in licences) else {}


def _cached_licence(repo_id: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, CARD, cache_dir=cache_dir(), revision=revision)
    if not isinstance(path, str):
        return {}
    try:
        front_matter = _FRONT_MATTER.match(read_given_text(Path(path), limit=MAX_TEXT_BYTES))
        documents = _load_yaml(front_matter["yaml"], path) if front_matter else []
    except SurgeryError:
        return {}  # somebody else's card: it is as good as none
    metadata = documents[0] if documents else None
    return {key: metadata[key] for key in LICENSE_KEYS if metadata.get(key)} if isinstance(metadata, dict) else {}


def _model_index(package: UploadPackage, name: str) -> list[dict[str, Any]] | None:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    card_scores = read_scores(package.folder)
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=score.value,
            metric_name=_metric_name(score),
        )
        for score in (card_scores.scores if card_scores else ())
        if math.isfinite(score.value)
    ]
    return eval_results_to_model_index(name, results) if results else None


def _metric_name(score: Score) -> str:
    """Return the metric with its interval and sample size, for which the Hub's format has no field."""
    interval = "" if math.isnan(score.low) else f", 95 % interval {score.low:.4g} to {score.high:.4g}"
    return f"{score.metric}{interval}, n = {format_value(score.n, 'count')}"


def _as_list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _check_metadata(text: str, package: UploadPackage) -> None:
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise _metadata_error(package, "are not what the Hub can read") from error


def _metadata_error(package: UploadPackage, what: str) -> SurgeryError:
    return SurgeryError(
        f"its metadata {what}", where=package.folder / CARD, hint="Mend what stands between the two lines of ---."
    )
