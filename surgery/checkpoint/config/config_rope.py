"""Bring the spellings of rotary embeddings into one: `rope_theta` and `rope_scaling` of transformers 4, and
`rope_parameters` of transformers 5, for the whole model or for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# What the normalised config has instead of every spelling.
THETA, SCALING, PARTIAL = "rope_theta", "rope_scaling", "partial_rotary_factor"
PARAMETERS = "rope_parameters"
SPELLINGS = frozenset(
    {THETA, SCALING, PARTIAL, PARAMETERS, "rope_local_base_freq", "global_rope_theta", "local_rope_theta"}
    | {"rotary_emb_base", "rotary_pct"}
)
# Types that stretch a context of some length, which is the whole of it where nothing is said.
_WITH_LENGTH = ("llama3", "yarn", "longrope")
_LENGTH, _MAX_LENGTH = "original_max_position_embeddings", "max_position_embeddings"


def normalise_rope(config: Mapping[str, Any], values: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `partial_rotary_factor` as transformers fills them in.

    A value that differs between kinds of layers is a dict by kind. `rope_scaling` is None where nothing is scaled.

    Args:
        config: the file's own keys.
        values: the keys besides, defaults filled in.
        spec: `theta`, one or by kind of layer; `default`, the parameters where the file has none; `theta_keys`, by kind
            the key of older files; `partial`, of the head's width; `legacy`, false where only `rope_parameters` is
            read; `old_names`, of theta and of the part.
    """
    if spec.get("legacy") is False:
        config = {key: value for key, value in config.items() if key == PARAMETERS}
    elif "old_names" in spec:
        config = _renamed(config, spec["old_names"])
    given = _table(config.get(SCALING)) or _table(config.get(PARAMETERS))
    present = values.get("layer_types")
    kinds = list(dict.fromkeys(map(str, present))) if isinstance(present, list) else []
    if isinstance(spec.get("theta"), Mapping):
        params = _by_kind(config, spec)
    else:
        nested = {kind: given[kind] for kind in given if kind in kinds}
        params = {kind: _filled(_table(entry), config, spec) for kind, entry in nested.items() if entry is not None}
        params |= {kind: None for kind, entry in nested.items() if entry is None}
        params = params or {"": _filled(given or dict(spec.get("default") or {}), config, spec)}
    # Files carry entries for kinds of layers that the model does not have.
    used = {kind: entry for kind, entry in params.items() if kind in kinds} or params
    parts = {kind: _parts(entry, config, values) for kind, entry in used.items()}
    return {key: _joined({kind: part[key] for kind, part in parts.items()}) for key in (THETA, SCALING, PARTIAL)}


def _renamed(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a config with the old names of theta and of the part, the only ones that such a family reads."""
    rest = {key: value for key, value in config.items() if key not in (THETA, PARTIAL)}
    return rest | {new: config[old] for old, new in zip(names, (THETA, PARTIAL), strict=True) if old in config}


def _by_kind(config: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of each kind of layer of a family that has several (Gemma 3)."""
    written = _table(config.get(PARAMETERS))
    params = {}
    for kind, theta in spec["theta"].items():
        entry = dict(_table(written.get(kind)) or _table((spec.get("default") or {}).get(kind)))
        # Older files scale the layers that see the whole text, and no others.
        if kind == "full_attention":
            entry |= _table(config.get(SCALING))
        key = spec.get("theta_keys", {}).get(kind)
        entry.setdefault(THETA, config.get(key, theta) if key else theta)
        params[kind] = entry
    return params


def _filled(params: Mapping[str, Any], config: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with what stands beside them in older files, and the family's defaults."""
    filled = dict(params)
    # Not where it is null: transformers then takes the key's own value, whatever it is.
    filled.setdefault(THETA, config.get(THETA, spec.get("theta")))
    partial = config.get(PARTIAL, spec.get("partial"))
    if partial is not None:
        filled.setdefault(PARTIAL, partial)
    return filled


def _parts(entry: Mapping[str, Any] | None, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Split the parameters of one kind of layer; None stands for layers without positions."""
    if entry is None:
        return {THETA: None, SCALING: {"rope_type": "none"}, PARTIAL: None}
    rest = {key: value for key, value in entry.items() if value is not None and key not in ("type", THETA, PARTIAL)}
    kind = entry.get("rope_type", entry.get("type", "default"))
    # Several positions per token; where they agree, as in text, the angles are the usual ones.
    rest["rope_type"] = kind = "default" if kind in ("mrope", "axial", None) else kind
    if kind in _WITH_LENGTH:
        length = values.get(_LENGTH) or rest.get(_LENGTH) or values.get(_MAX_LENGTH)
        rest |= {} if length is None else {_LENGTH: length}
    if kind == "default":
        # Nothing is scaled: what else is said is for several positions per token.
        rest = {key: value for key, value in rest.items() if key.startswith("mrope")}
    partial = entry.get(PARTIAL)
    return {THETA: entry.get(THETA), SCALING: rest or None, PARTIAL: 1.0 if partial is None else partial}


def _joined(by_kind: Mapping[str, Any]) -> Any:
    """Return the one value of all kinds of layers, or a dict by kind."""
    values = list(by_kind.values())
    return values[0] if all(value == values[0] for value in values) else dict(by_kind)


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def spelled(config: Iterable[str]) -> bool:
    """Return whether any spelling of rotary embeddings is among the keys of a config."""
    return any(key in SPELLINGS for key in config)
