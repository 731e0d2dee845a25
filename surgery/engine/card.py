"""Write README.md, the model card of an output, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.io.atomic import MANIFEST
from surgery.io.hashing import KEY
from surgery.io.output_files import write_output


@dataclass(frozen=True)
class CardContent:
    """The parts of a model card that no manifest has: title, a sentence on the method, tags, tables in Markdown."""

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
    metadata = yaml.safe_dump({key: value for key, value in data.items() if value}, sort_keys=False).strip()
    inputs = "\n".join(_input_line(role, entry) for role, entry in manifest["inputs"].items())
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    text = f"""---
{metadata}
---

# {card.title}

{card.method}

## Made from

| role | model | revision | hash of what was read |
|---|---|---|---|
{inputs}

{card.body}

## How to make it again

```
{manifest["command"]["line"]}
```

With {versions}. `{MANIFEST}` in this folder has every option and the hash of every tensor; `surgery verify` checks
them.
"""
    write_output(folder, "README.md", text)


def _input_line(role: str, entry: Mapping[str, Any]) -> str:
    name = entry["repo_id"] or entry["ref"]
    return f"| {role} | {name} | {entry['revision'] or '–'} | `{entry[KEY]}` |"
