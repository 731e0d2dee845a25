"""Write README.md, the model card of an output, as the Hub reads it.

Names in a card come from files and the command line: they stand in code spans wherever they are more than plain words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.io.atomic import MANIFEST
from surgery.io.escaping import markdown_block, markdown_code, markdown_text, yaml_text
from surgery.io.hashing import KEY
from surgery.io.output_files import write_output


@dataclass(frozen=True)
class CardContent:
    """The parts of a model card that no manifest has: title, a sentence on the method, tags, tables in Markdown.

    The method and the body are Markdown: names in them have passed `surgery.io.escaping.markdown_text`.
    """

    title: str
    method: str
    tags: tuple[str, ...] = ()
    body: str = ""


def write_card(folder: Path, manifest: Mapping[str, Any], sources: Mapping[str, Checkpoint], card: CardContent) -> None:
    """Write README.md into `folder`: metadata for the Hub, the method, the inputs, and how to repeat the command."""
    # Once each: a model that is both target and base is one parent on the Hub.
    hub_ids = list(dict.fromkeys(c.repo_id for c in sources.values() if c.repo_id))
    # Vectors and the like cannot be loaded by transformers, and the Hub would show code that tries it.
    library = "transformers" if manifest["kind"] in ("model", "ensemble") else None
    # In the form of huggingface_hub's ModelCardData, whose import would take longer than the rest of this function.
    data = {"base_model": hub_ids or None, "library_name": library, "tags": ["model-surgery", *card.tags]}
    metadata = yaml_text({key: value for key, value in data.items() if value}).strip()
    inputs = "\n".join(_input_line(role, entry) for role, entry in manifest["inputs"].items())
    versions = ", ".join(f"{name} {markdown_text(str(number))}" for name, number in manifest["versions"].items())
    text = f"""---
{metadata}
---

# {markdown_text(card.title)}

{card.method}

## Made from

| role | model | revision | hash of what was read |
|---|---|---|---|
{inputs}

{card.body}

## How to make it again

{markdown_block(manifest["command"]["line"])}

With {versions}. `{MANIFEST}` in this folder has every option and the hash of every tensor; `surgery verify` checks
them.
"""
    write_output(folder, "README.md", text)


def _input_line(role: str, entry: Mapping[str, Any]) -> str:
    cells = (role, entry["repo_id"] or entry["ref"], entry["revision"] or "–")
    return f"| {' | '.join(map(markdown_text, cells))} | {markdown_code(entry[KEY])} |"
