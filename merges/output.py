"""What lies beside the merged weights: config, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merges.layout import Layout
from merges.structure import language_part, uneven_dense_layers, with_layers
from merges.token_ids import remap_ids, resized
from merges.tokenizer_files import is_tokenizer_file
from merges.tokens import TokenPlan
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint, read_json
from surgery.fit import side
from surgery.preflight import Preflight
from surgery.vocab import read_vocabulary

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Side:
    """The output's files beside the weights: `copied` from the template, `written` with new content."""

    copied: Mapping[str, Path]
    written: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes what is not copied."""
        for name, content in self.written.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def output_side(
    preflight: Preflight, layout: Layout, tokens: TokenPlan | None, checkpoints: Mapping[str, Checkpoint]
) -> Side:
    """The files of a merge's output; what its config cannot say goes to the faults."""
    template = layout.template
    shape = anatomy(template)
    copied = {path.name: path for path in template.side_files}
    written: dict[str, bytes] = {}
    config = with_layers(template.config, layout.layers, shape)
    if "first_k_dense_replace" in language_part(config) and uneven_dense_layers(layout.layers, shape):
        preflight.faults.append(
            "a dense layer would follow one with experts, which this architecture's config cannot say. "
            "Choose other layer ranges."
        )
    if shape.tied and any(slot.group == "lm_head" for slot in layout.slots):
        config["tie_word_embeddings"] = False
        preflight.warnings.append("a model has an output head of its own, so the result has one: it is not tied")
    if tokens is not None:
        config = resized(config, tokens.size)
        config = _renumbered(preflight, config, CONFIG, layout, tokens, checkpoints)
        generation = read_json(template.folder / GENERATION, missing={}) if template.folder else {}
        if generation:
            generation = _renumbered(preflight, generation, GENERATION, layout, tokens, checkpoints)
            written[GENERATION] = _json(generation)
        copied = {name: path for name, path in copied.items() if not is_tokenizer_file(name)}
        written |= tokens.files
    if config and config != template.config:
        written[CONFIG] = _json(config)
    return Side({name: path for name, path in copied.items() if name not in written}, written)


def _renumbered(
    preflight: Preflight,
    config: Mapping[str, Any],
    name: str,
    layout: Layout,
    tokens: TokenPlan,
    checkpoints: Mapping[str, Checkpoint],
) -> dict[str, Any]:
    """`config` with the ids that its tokens have in the output."""
    folder = layout.template.folder
    before = read_vocabulary(folder) if folder else None
    if before is None:
        return dict(config)
    donor = checkpoints.get(tokens.donor)
    other = None
    if donor is not None and donor is not layout.template and (home := side(donor).tokenizer) is not None:
        other = read_json(home / name, missing={})
    changed, warnings = remap_ids(config, before=before, after=tokens.vocabulary, donor=other)
    preflight.warnings.extend(warnings)
    return changed


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
