"""Describe a checkpoint: the result of `surgery inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint, dtypes_of
from surgery.checkpoint.other_weights import find_other_weights
from surgery.checkpoint.quantised.quantisation import find_quantisation
from surgery.checkpoint.structure import model_structure
from surgery.io.escaping import one_line
from surgery.io.json_io import read_json
from surgery.reporting.report import Column, Table, format_value


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a description of `checkpoint` for JSON: files, sizes in bytes, dtypes, structure, and what is wrong."""
    structure = model_structure(checkpoint)
    found = find_quantisation(checkpoint)
    tensors = checkpoint.tensors.values()
    dtypes = {}
    for dtype in dtypes_of(checkpoint):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        dtypes[dtype] = {
            "tensors": len(group),
            "parameters": sum(tensor.n_elements for tensor in group),
            "bytes": sum(tensor.n_bytes for tensor in group),
        }
    side_files = set(checkpoint.side_files)
    return {
        "ref": checkpoint.ref,
        "revision": checkpoint.revision,
        "adapter_base": checkpoint.named_base,
        "architectures": list(checkpoint.config.get("architectures") or ()),
        "files": [str(path) for path in checkpoint.files],
        "bytes": checkpoint.n_bytes,
        "parameters": checkpoint.n_parameters,
        "tensors": len(checkpoint.tensors),
        "dtypes": dtypes,
        "layers": structure.layers,
        "hidden_size": structure.hidden_size,
        "vocab_size": structure.vocab_size,
        "heads": structure.heads,
        "kv_heads": structure.kv_heads,
        "head_dim": structure.head_dim,
        "experts": structure.n_experts,
        "experts_per_token": structure.experts_per_token,
        "tied": structure.tied,
        "tokenizer": bool(side_files & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}),
        "chat_template": _has_chat_template(checkpoint, side_files),
        "quantization_config": checkpoint.config.get("quantization_config"),
        "quantisation": found and {"scheme": found.scheme, "evidence": found.evidence},
        "not_understood": list(structure.not_understood),
        "not_read": find_other_weights(checkpoint),
        "notes": list(structure.notes),
    }


def _has_chat_template(checkpoint: Checkpoint, side_files: set[str]) -> bool:
    folder = checkpoint.tokenizer_folder
    if folder is None or side_files & {"chat_template.jinja", "chat_template.json"}:
        return folder is not None
    settings = read_json(folder / "tokenizer_config.json", missing={})
    return bool(settings.get("chat_template"))


def inspect_tables(description: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the tables of an `inspect_checkpoint` description: facts, dtypes and, if any, tensors without a role."""
    facts = [
        ("architecture", ", ".join(description["architectures"]) or None),
        ("revision", description["revision"]),
        *([("base that the adapter names", base)] if (base := description["adapter_base"]) else []),
        ("files", len(description["files"])),
        ("size", format_value(description["bytes"], "bytes")),
        ("weights not read", ", ".join(description["not_read"]) or None),
        ("parameters", description["parameters"]),
        ("tensors", description["tensors"]),
        ("layers", description["layers"]),
        ("hidden size", description["hidden_size"]),
        ("heads × width", f"{format_value(description['heads'])} × {format_value(description['head_dim'])}"),
        ("key-value heads", description["kv_heads"]),
        ("experts, per token", f"{description['experts']:,}, {format_value(description['experts_per_token'])}")
        if description["experts"]
        else ("experts", None),
        ("vocabulary rows", description["vocab_size"]),
        ("output head tied", description["tied"]),
        ("tokenizer", description["tokenizer"]),
        ("chat template", description["chat_template"]),
        ("quantisation", (description["quantisation"] or {}).get("scheme")),
    ]
    dtypes = [(name, row["tensors"], row["parameters"], row["bytes"]) for name, row in description["dtypes"].items()]
    tables = [
        Table(description["ref"], ("", ""), facts, note="\n".join(map(one_line, description["notes"])) or None),
        Table("Dtypes", ("dtype", "tensors", "parameters", Column("size", "bytes")), dtypes),
    ]
    if description["not_understood"]:
        # What is not understood is so in every layer: a row per layer would hide the few different names.
        patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in description["not_understood"])
        tables.append(Table("Not understood", ("tensors", "count"), list(patterns.items())))
    return tuple(tables)
