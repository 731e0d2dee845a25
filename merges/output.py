"""The files beside the merged weights: config, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merges.layout import LM_HEAD, Layout
from merges.tokenizer.chat_template import AUTO, set_chat_template
from merges.tokenizer.files import read_tokenizer_files
from merges.tokenizer.plan import TokenPlan
from merges.tokenizer.token_ids import remap_ids
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.config_layers import inexpressible_layers, resize_vocabulary, untied, with_layers
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.tokenizer_files import is_tokenizer_file
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.engine.preflight import Preflight
from surgery.errors import SurgeryError
from surgery.io.escaping import json_text
from surgery.io.json_io import read_json
from surgery.io.output_files import write_output

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class SideFiles:
    """The output's files beside the weights: `copied` from the template, `written` with new content."""

    copied: Mapping[str, Path | bytes]
    written: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files that are not copies."""
        for name, content in self.written.items():
            write_output(folder, name, content)


def side_files(
    preflight: Preflight,
    layout: Layout,
    tokens: TokenPlan | None,
    checkpoints: Mapping[str, Checkpoint],
    *,
    chat_template: str | None,
) -> SideFiles:
    """Return the output's files; layers that no config can describe, and a missing chat template, are errors.

    Args:
        checkpoints: every model of the merge, and the one that `tokens` has its tokenizer from.
        chat_template: as in the merge's config; None for the template's own.
    """
    template = layout.template
    shape = model_structure(template)
    for error in inexpressible_layers(template.config, layout.layers, shape):
        preflight.errors.add(error)
    config = with_layers(template.config, layout.layers, shape)
    # Merging a tied with an untied model: the head's values then differ from the embedding's.
    if shape.tied and any(slot.group == LM_HEAD for slot in layout.slots):
        config = untied(config)
        preflight.warnings.append("a model has an output head of its own, so the result has one: it is not tied")
    copied = dict(template.side_files)
    written: dict[str, bytes] = {}
    if tokens is not None:
        # The template's configs name tokens by ids of its own tokenizer, which may stand for others in the output's.
        renumber = _Renumbering(preflight, template, tokens, checkpoints[tokens.donor])
        config = renumber(resize_vocabulary(config, tokens.size), CONFIG)
        generation = read_json(template.folder / GENERATION, missing={}) if template.folder else {}
        if generation:
            written[GENERATION] = _json(renumber(generation, GENERATION))
    if config and config != template.config:  # else it is copied, to the byte
        written[CONFIG] = _json(config)
    tokenizer = None if tokens is None else tokens.files
    if chat_template is not None:
        tokenizer = _with_chat_template(preflight, chat_template, template, tokens, checkpoints)
    # All files of a tokenizer come from one place: a table of another one would contradict them.
    if tokenizer is not None:
        copied = {name: path for name, path in copied.items() if not is_tokenizer_file(name)}
        written |= tokenizer
    return SideFiles({name: path for name, path in copied.items() if name not in written}, written)


def _with_chat_template(
    preflight: Preflight,
    wanted: str,
    template: Checkpoint,
    tokens: TokenPlan | None,
    checkpoints: Mapping[str, Checkpoint],
) -> Mapping[str, bytes] | None:
    """Return the tokenizer's files with the chat template `wanted`; None where that is an error, or has no effect."""
    folders = {ref: found for ref, one in checkpoints.items() if (found := one.tokenizer_folder) is not None}
    own = template.tokenizer_folder
    vocabulary = tokens.vocabulary if tokens else own and read_vocabulary(own)
    if not vocabulary or own is None:
        if wanted == AUTO:
            preflight.warnings.append(f"chat_template: {AUTO} has no effect, as {template.ref} has no tokenizer")
            return None
        preflight.errors.add(f"chat_template: {template.ref} has no tokenizer to put it beside. Leave it out.")
        return None
    files = tokens.files if tokens else read_tokenizer_files(own)
    try:
        files, warnings = set_chat_template(files, wanted, folders=folders, vocabulary=vocabulary)
    except SurgeryError as error:
        preflight.errors.add(str(error))
        return None
    preflight.warnings += warnings
    return files


class _Renumbering:
    """Renumbers token ids in the template's configs for the output's vocabulary."""

    def __init__(self, preflight: Preflight, template: Checkpoint, tokens: TokenPlan, donor: Checkpoint) -> None:
        self._preflight = preflight
        folder = template.tokenizer_folder
        self._before = read_vocabulary(folder) if folder else None
        self._after = tokens.vocabulary
        # For the template's own tokenizer its own special ids are right already.
        self._donor = donor.folder if donor.ref != template.ref else None

    def __call__(self, config: Mapping[str, Any], name: str) -> dict[str, Any]:
        if self._before is None:
            return dict(config)
        donor = read_json(self._donor / name, missing={}) if self._donor else None
        changed, warnings = remap_ids(config, before=self._before, after=self._after, donor=donor)
        self._preflight.warnings += warnings
        return changed


def _json(value: Mapping[str, Any]) -> bytes:
    return (json_text(json.dumps(value, indent=2, ensure_ascii=False)) + "\n").encode()
