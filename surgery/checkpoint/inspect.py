"""What a checkpoint is, in one table of facts: the answer of `surgery inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint, dtypes_of
from surgery.checkpoint.structure import model_structure
from surgery.io.json_io import read_json
from surgery.reporting.report import Column, Table, format_value


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `checkpoint` is, JSON-able: files, sizes in bytes, dtypes, structure, and what is amiss."""
    body = model_structure(checkpoint)
    tensors = checkpoint.tensors.values()
    dtypes = {}
    for dtype in dtypes_of(checkpoint):
        held = [tensor for tensor in tensors if tensor.dtype == dtype]
        dtypes[dtype] = {
            "tensors": len(held),
            "parameters": sum(tensor.n_elements for tensor in held),
            "bytes": sum(tensor.n_bytes for tensor in held),
        }
    side_files = {path.name for path in checkpoint.side_files}
    return {
        "ref": checkpoint.ref,
        "revision": checkpoint.revision,
        "architectures": list(checkpoint.config.get("architectures") or ()),
        "files": [str(path) for path in checkpoint.files],
        "bytes": checkpoint.n_bytes,
        "parameters": checkpoint.n_parameters,
        "tensors": len(checkpoint.tensors),
        "dtypes": dtypes,
        "layers": body.layers,
        "hidden_size": body.hidden_size,
        "vocab_size": body.vocab_size,
        "heads": body.heads,
        "kv_heads": body.kv_heads,
        "head_dim": body.head_dim,
        "experts": body.n_experts,
        "experts_per_token": body.experts_per_token,
        "tied": body.tied,
        "tokenizer": bool(side_files & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}),
        "chat_template": _has_chat_template(checkpoint, side_files),
        "quantization_config": checkpoint.config.get("quantization_config"),
        "not_understood": list(body.not_understood),
        "notes": list(body.notes),
    }


def _has_chat_template(checkpoint: Checkpoint, side_files: set[str]) -> bool:
    if checkpoint.folder is None or side_files & {"chat_template.jinja", "chat_template.json"}:
        return checkpoint.folder is not None
    settings = read_json(checkpoint.folder / "tokenizer_config.json", missing={})
    return bool(settings.get("chat_template"))


def inspect_tables(description: Mapping[str, Any]) -> tuple[Table, ...]:
    """What `inspect_checkpoint` gives, for people: facts, dtypes and, where there are any, tensors without a role."""
    told = description
    facts = [
        ("architecture", ", ".join(told["architectures"]) or None),
        ("revision", told["revision"]),
        ("files", len(told["files"])),
        ("size", format_value(told["bytes"], "bytes")),
        ("parameters", told["parameters"]),
        ("tensors", told["tensors"]),
        ("layers", told["layers"]),
        ("hidden size", told["hidden_size"]),
        ("heads × width", f"{format_value(told['heads'])} × {format_value(told['head_dim'])}"),
        ("key-value heads", told["kv_heads"]),
        ("experts, per token", f"{told['experts']:,}, {format_value(told['experts_per_token'])}")
        if told["experts"]
        else ("experts", None),
        ("vocabulary rows", told["vocab_size"]),
        ("output head tied", told["tied"]),
        ("tokenizer", told["tokenizer"]),
        ("chat template", told["chat_template"]),
        ("quantisation", (told["quantization_config"] or {}).get("quant_method")),
    ]
    dtypes = [(name, row["tensors"], row["parameters"], row["bytes"]) for name, row in told["dtypes"].items()]
    shown = [
        Table(told["ref"], ("", ""), facts, note="\n".join(told["notes"]) or None),
        Table("Dtypes", ("dtype", "tensors", "parameters", Column("size", "bytes")), dtypes),
    ]
    if told["not_understood"]:
        patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in told["not_understood"])
        shown.append(Table("Not understood", ("tensors", "count"), list(patterns.items())))
    return tuple(shown)
