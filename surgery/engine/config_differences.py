"""Compare the configs of models that are computed with together: one line for each key that changes the function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.config.normalised_config import SHAPE_KEYS, TIED, NormalisedConfig, normalise_config
from surgery.engine.config_effects import NOT_TOLD, UNKNOWN, effect_of
from surgery.errors import listing

_TEXT = 80  # characters of a value in a message
_NAMES = {"rope_scaling": "rope_scaling (rope_parameters)"}
_OUT = ". OUT gets "
_DEPTH = "num_hidden_layers"
_MROPE = "mrope_section"


@dataclass(frozen=True)
class NamedConfig:
    """A model's name, for messages, and what its config says."""

    name: str
    config: NormalisedConfig


def shape_differences(reference: NamedConfig, other: NamedConfig, *, any_depth: bool) -> list[str]:
    """Return the keys that shapes follow from and that differ, as `hidden_size 64 / 96`."""
    different = []
    for key in SHAPE_KEYS:
        if any_depth and key == _DEPTH:
            continue
        ours, theirs = (named.config.language.get(key) for named in (reference, other))
        # Where a family is not known its defaults are not either: only what both files say is compared.
        if ours is not None and theirs is not None and _comparable(ours) != _comparable(theirs):
            different.append(f"{key} {_text(ours)} / {_text(theirs)}")
    return different


def compared_configs(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each key in which models differ that are only looked at; empty if one has no config."""
    named = [NamedConfig(name, normalise_config(config)) for name, config in models if config]
    return told_differences(named[0], named[1:], has_out=False) if len(named) == len(models) else []


def told_differences(reference: NamedConfig, others: Sequence[NamedConfig], *, has_out: bool = True) -> list[str]:
    """Return a sentence for each key in which models differ and that changes what they compute.

    Models are grouped by value.

    Args:
        has_out: something is written, with the config of `reference`.
    """
    named = [reference, *others]
    # Beside a text model only the language part of a multimodal one counts.
    text_only = len({one.config.is_multimodal for one in named}) > 1
    views = [one.config.language if text_only else one.config.values for one in named]
    lines = []
    for key in dict.fromkeys(key for view in views for key in view):
        effect = effect_of(key)
        if effect in NOT_TOLD:
            continue
        if text_only and effect == UNKNOWN and any(key not in view for view in views):
            continue  # a key of the one family that the other does not have
        values = [_value(one.config, view, key, text_only) for one, view in zip(named, views, strict=True)]
        if (line := _line(key, effect, named, values)) is not None:
            lines.append(line if has_out else line.partition(_OUT)[0])
    return lines


def _value(config: NormalisedConfig, view: Mapping[str, Any], key: str, text_only: bool) -> Any:
    value = view.get(key)
    if text_only and key == "rope_scaling" and isinstance(value, Mapping) and _MROPE in value:
        # Of text alone all positions of a token agree, so that it does not matter how they are shared out.
        value = {name: entry for name, entry in value.items() if not name.startswith("mrope")}
        value = None if value in ({}, {"rope_type": "default"}) else value
    if value is None and key in config.undetermined:
        return _UNDETERMINED
    return value


def _line(key: str, effect: str, named: Sequence[NamedConfig], values: Sequence[Any]) -> str | None:
    # Models of other depths have other layers: the first ones are compared.
    lists = [len(value) for value in values if isinstance(value, list)]
    depths = {_comparable(one.config.language.get(_DEPTH)) for one in named}
    per_layer = len(lists) == len(values) and len(set(lists)) > 1 and len(depths) > 1
    compared = [_comparable(value[: min(lists)] if per_layer else value) for value in values]
    if len(set(compared)) == 1:
        return None
    groups: dict[str, tuple[Any, list[str]]] = {}
    for one, value, text in zip(named, values, compared, strict=True):
        groups.setdefault(text, (value, []))[1].append(one.name)
    shown = _shown([value for value, _ in groups.values()])
    said = "; ".join(f"{text} in {listing(names, 5)}" for text, (_, names) in zip(shown, groups.values(), strict=True))
    may = "may differ" if _UNDETERMINED in values else "differs"
    what = effect if effect == UNKNOWN else f"changes {effect}"
    gets = f"{_OUT}{shown[0]}, as {named[0].name} has it"
    # Decided by the matrices themselves, in `surgery.engine.tied_embeddings`.
    gets += ", unless the stored heads say otherwise" if key == TIED else ""
    return f"{_NAMES.get(key, key)} {may} ({what}): {said}{gets}."


class _Undetermined:
    def __repr__(self) -> str:
        return "the family's default"


_UNDETERMINED = _Undetermined()


def _comparable(value: Any) -> str:
    """Return a text that is equal for equal values: 1e6, 1000000 and 1000000.0 are; absent is null or false."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is _UNDETERMINED:
        return repr(value)
    return None if value is False else int(value) if value is True else value


def _shown(values: Sequence[Any]) -> list[str]:
    """Return the values as texts; of long lists where they begin to differ."""
    texts = [_text(value) for value in values]
    if len(set(texts)) == len(texts) and all(len(text) < _TEXT for text in texts):
        return texts
    if all(isinstance(value, list) for value in values):
        at = next((i for i, column in enumerate(zip(*values, strict=False)) if len({*map(_comparable, column)}) > 1), 0)
        if all(at < len(value) for value in values):
            return [f"{_text(value[at])} at {at}" for value in values]
    return texts


def _text(value: Any) -> str:
    if value is None or value is _UNDETERMINED:
        return "none" if value is None else repr(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Numbers of people: 1,000,000 and 1e-06.
        whole = value if isinstance(value, int) else int(value) if value.is_integer() else None
        return f"{whole:,}" if whole is not None and abs(whole) < 10**15 else f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"
