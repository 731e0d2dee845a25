"""Write `surgery/checkpoint/config_defaults.json`: what the config classes of the installed transformers fill in.

    PYTHONPATH=.:tests python -m support.config_defaults

Defaults are read from the classes. Values that follow from others are found by trying the rules of
`surgery.checkpoint.config.config_rules` on configs made by the classes themselves; a key that no rule gives is listed
as unknown. Run it when the pinned transformers changes; `tests/surgery/checkpoint/test_config_defaults.py` compares.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgery.checkpoint.config.config_defaults import DEFAULTS, ConfigClass
from surgery.checkpoint.config.config_rope import PARAMETERS, SPELLINGS, THETA, normalise_rope
from surgery.checkpoint.config.config_rules import UNSAID, apply_rule
from surgery.checkpoint.config.normalised_config import part_values

# The tasks whose models are, or hold, language models.
TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM")
_BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}
# Set by transformers for itself, or read back by nobody.
_OWN = _BASE | {"model_type", "transformers_version", "name_or_path", "output_attentions", "per_layer_config"}
_READ = re.compile(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"")
# Words in the names of keys from which the kinds of layers follow.
_COUNTS = ("pattern", "interval", "every", "dense", "replace", "freq", "period", "group_size", "layers", "step")
Sample = tuple[dict[str, Any], dict[str, Any]]


def config_classes() -> dict[str, type[PreTrainedConfig]]:
    """Return the config classes of language models and of what is inside them, by name in the file."""
    names: set[str] = set()
    for task in TASKS:
        names |= set(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
    found: dict[str, type[PreTrainedConfig]] = {}
    for name in sorted(names):
        if name in CONFIG_MAPPING:
            _collect(CONFIG_MAPPING[name], found)
    return found


def class_name(cls: type[PreTrainedConfig]) -> str:
    """Return the name of a class in the file: its `model_type`, unless that is another class's."""
    named = cls.model_type and cls.model_type in CONFIG_MAPPING and CONFIG_MAPPING[cls.model_type] is cls
    return cls.model_type if named else cls.__name__


def _collect(cls: type[PreTrainedConfig], found: dict[str, type[PreTrainedConfig]]) -> None:
    if class_name(cls) in found:
        return
    found[class_name(cls)] = cls
    for inner, _, _ in _nested(cls).values():
        _collect(inner, found)


@cache
def _nested(cls: type[PreTrainedConfig]) -> dict[str, tuple[type[PreTrainedConfig], bool, dict[str, Any] | None]]:
    """Return the configs inside a class: their class, whether the file may name another one, and what is in them where
    the file has none; None for those that are left out then.
    """
    inside: dict[str, tuple[type[PreTrainedConfig], bool, dict[str, Any] | None]] = {}
    for key, spec in cls.sub_configs_defaults.items():
        content = None if spec.optional else dict(_json(spec.init_kwargs))
        fixed = isinstance(spec.config_class, type) and issubclass(spec.config_class, PreTrainedConfig)
        if fixed:
            inside[key] = (spec.config_class, False, content)
        elif spec.model_type in CONFIG_MAPPING:
            inside[key] = (CONFIG_MAPPING[spec.model_type], True, content)
    # Some classes make them without saying so (DBRX).
    with contextlib.suppress(Exception):
        made = cls()
        others = {key: value for key, value in vars(made).items() if isinstance(value, PreTrainedConfig)}
        inside |= {key: (type(value), False, {}) for key, value in others.items() if key not in inside}
        for key, (inner, any_class, content) in inside.items():
            if isinstance(part := getattr(made, key), PreTrainedConfig) and content is not None:
                inside[key] = (inner, any_class, content | _set_by_whole(part, inner, content))
    return inside


def _set_by_whole(part: PreTrainedConfig, inner: type[PreTrainedConfig], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config sets in one inside it, beyond what that one has of itself (PaliGemma)."""
    alone = {key: _json(value) for key, value in inner(**copy.deepcopy(dict(content))).to_dict().items()}
    whole = {key: _json(value) for key, value in part.to_dict().items()}
    changed = {key: value for key, value in whole.items() if value != alone.get(key)}
    plain = (bool, int, float, str)
    return {key: value for key, value in changed.items() if key not in _OWN and isinstance(value, plain)}


def describe_class(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the entry of one class."""
    nested = _nested(cls)
    defaults = {
        field.name: _json(field.default)
        for field in dataclasses.fields(cls)
        if field.name not in _OWN and field.name not in nested
    }
    entry: dict[str, Any] = {
        "defaults": {key: value for key, value in defaults.items() if key != PARAMETERS},
        "aliases": dict(cls.attribute_map),
        "nested": {key: [class_name(inner), *rest] for key, (inner, *rest) in nested.items()},
    }
    samples = list(_samples(cls, defaults))
    entry["aliases"] |= _legacy_names(defaults, samples)
    entry |= _derived(cls, defaults, samples)
    if PARAMETERS in defaults:
        entry["rope"] = _rope(cls, entry, samples)
    every = [*samples, *_rope_samples(cls, defaults)]
    wrong, missing = _wrong(entry, every)
    for key in wrong:
        entry["derived"].pop(key, None)
        entry["forced"].pop(key, None)
    entry["unknown"] = sorted(wrong | missing)
    return {key: value for key, value in entry.items() if value or key == "defaults"}


def made(cls: type[PreTrainedConfig], keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the whole config that transformers makes of `keys`, without the configs inside it, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            whole = cls(**copy.deepcopy(dict(keys))).to_dict()
        except Exception:
            return None
    return {key: _json(value) for key, value in whole.items() if key not in _OWN and key not in _nested(cls)}


def _samples(cls: type[PreTrainedConfig], defaults: Mapping[str, Any]) -> Iterator[Sample]:
    for keys in _variants(cls, defaults):
        whole = made(cls, keys)
        if whole is not None:
            yield keys, whole


def _variants(cls: type[PreTrainedConfig], defaults: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield configs that differ in what others may follow from: sizes, and what the class reads on its own."""

    def own(name: str) -> str:
        return cls.attribute_map.get(name, name)

    layers, width = own("num_hidden_layers"), own("hidden_size")
    heads, groups = own("num_attention_heads"), own("num_key_value_heads")

    def of(**keys: Any) -> dict[str, Any]:
        names = {"layers": layers, "width": width, "heads": heads, "groups": groups}
        return {names.get(k, k): v for k, v in keys.items() if names.get(k, k) in defaults}

    yield {}
    for count in (5, 12, 31):
        yield of(layers=count)
    yield of(width=96, heads=6, groups=None, head_dim=None)
    yield of(width=128, heads=8, groups=2, head_dim=None, layers=9)
    yield of(width=192, heads=4, groups=None, head_dim=24, layers=3, sliding_window=None)
    source = "".join(inspect.getsource(f) for name in ("__post_init__",) if (f := cls.__dict__.get(name)))
    legacy = set(_READ.findall(source)) - SPELLINGS - {"per_layer_config", "num_labels"}
    fields = {name for name in re.findall(r"self\.(\w+)", source) if name in defaults}
    numbers = sorted(key for key in fields | legacy if type(defaults.get(key, 1)) is int)
    for key, number in itertools.product(numbers, (2, 3)):
        if key not in (layers, width, heads, groups):
            yield of(layers=11) | {key: number}
    flags = sorted(key for key in fields if type(defaults.get(key)) is bool)
    for key in flags:
        for more in ({}, of(sliding_window=64, max_window_layers=3), of(sliding_window=None)):
            yield of(layers=9) | more | {key: not defaults[key]}


def _legacy_names(defaults: Mapping[str, Any], samples: Sequence[Sample]) -> dict[str, str]:
    """Return the names that a class reads a key under besides its own (`n_embed`)."""
    names = {}
    for old in sorted({key for keys, _ in samples for key in keys if key not in defaults}):
        cases = [(keys[old], whole) for keys, whole in samples if old in keys]
        taken = [key for key in defaults if cases and all(whole.get(key) == value for value, whole in cases)]
        if len(taken) == 1 and old not in cases[0][1]:
            names[old] = taken[0]
    return names


def _derived(cls: type[PreTrainedConfig], defaults: Mapping[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the rules for all keys that the class fills in itself."""
    forced: dict[str, Any] = {}
    derived: dict[str, Any] = {}
    layers = cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    filled = {
        key
        for keys, whole in samples
        for key, value in whole.items()
        if key != PARAMETERS
        and not key.endswith("_config")
        and not key.startswith("_")
        and value != {**defaults, **keys}.get(key)
    }
    for key in sorted(filled):
        # Where the file says something else, and the class does not take it.
        always = [(k, w) for k, w in samples if key in w and w[key] != {**defaults, **k}.get(key)]
        overridden = any({**defaults, **keys}.get(key) not in UNSAID for keys, _ in always)
        cases = [(k, w) for k, w in samples if key in w and (overridden or {**defaults, **k}.get(key) in UNSAID)]
        rule = _fitting(key, defaults, cases, layers)
        flags = {name: default for name, default in sorted(defaults.items()) if type(default) is bool}
        plain = [(k, w) for k, w in cases if not k.keys() & flags.keys()]
        if rule is None and plain and not overridden:
            rule = _fitting(key, defaults, plain, layers)
            turned = sorted({name for k, _ in cases for name in k if name in flags})
            rule = rule and ["unless", {name: flags[name] for name in turned}, rule]
        if rule is not None:
            (forced if overridden else derived)[key] = rule
    return {"forced": forced, "derived": derived}


def _fitting(key: str, defaults: Mapping[str, Any], cases: Sequence[Sample], layers: str) -> list[Any] | None:
    """Return the first rule that gives what the class gives, in all cases."""
    for rule in _candidates(key, defaults, cases):
        if all(
            apply_rule(rule, {**keys, **whole, key: {**defaults, **keys}.get(key)}, whole.get(layers) or 0)
            == whole[key]
            for keys, whole in cases
        ):
            return list(rule)
    return None


def _candidates(key: str, defaults: Mapping[str, Any], cases: Sequence[Sample]) -> Iterator[Sequence[Any]]:
    whole = cases[0][1]
    numbers = [name for name in whole if type(whole[name]) in (int, float) and name != key]
    # What values usually follow from comes first: another may agree by chance.
    first = ("num_attention_heads", "hidden_size", "n_head", "n_embd", "num_heads", "d_model", "intermediate_size")
    numbers.sort(key=lambda name: first.index(name) if name in first else len(first))
    if all(other[key] == whole[key] for _, other in cases):
        yield ("value", whole[key])
    if isinstance(whole[key], list):
        yield from _lists(key, cases)
    for name in sorted(whole):
        if type(defaults.get(name)) is bool:
            yield ("gated", name, key, None)
            yield ("gated", name, key, 0)
    yield ("last",)
    yield from (("copy", name) for name in numbers)
    # Of any two numbers some quotient fits by chance.
    by = [name for name in numbers if "head" in name]
    yield from (("quotient", a, b) for a in numbers for b in by if a != b)
    yield from (("over", name, divisor) for divisor in (2, 4, 8, 16) for name in numbers)
    yield from (("product", factor, name) for factor in (2, 3, 4) for name in numbers)
    yield from (("sum", a, b) for a, b in itertools.combinations([n for n in numbers if "head_dim" in n], 2))


def _lists(key: str, cases: Sequence[Sample]) -> Iterator[Sequence[Any]]:
    yield from (("window",), ("alternate_window",), ("nope_window",))
    longest = max((whole[key] for _, whole in cases), key=len)
    kinds = [kind for i, kind in enumerate(longest) if kind not in longest[:i]]
    if len(kinds) > 8:
        kinds = []  # numbers of layers
    for period in range(1, 9):
        yield ("cycle", longest[:period])
        yield ("cycle", longest[:period], longest[-1])
    names = sorted({name for keys, whole in cases for name, v in {**whole, **keys}.items() if type(v) is int})
    # The empty name is of no key: the number is the family's own.
    names = ["", *(name for name in names if not name.startswith("_") and any(word in name for word in _COUNTS))]
    yield from (("places", name, longest[0] + 1) for name in names if longest and type(longest[0]) is int)
    for name, kind, others in itertools.product(names, kinds, kinds):
        if kind != others:
            default = next((i + 1 for i, one in enumerate(longest) if one == kind), 1)
            yield ("every", name, default, kind, others)
            yield ("every", name, _period(longest, kind), kind, others, 0)
            leading = next((i for i, one in enumerate(longest) if one != kind), 0)
            yield ("leading", name, leading, kind, others)


def _period(kinds: Sequence[Any], kind: Any) -> int:
    """Return how far the second layer of a kind is behind the first."""
    places = [i for i, one in enumerate(kinds) if one == kind]
    return places[1] - places[0] if len(places) > 1 else 1


def _rope(cls: type[PreTrainedConfig], entry: Mapping[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what the class fills in of rotary embeddings: of several descriptions the one that fits most samples."""
    base = samples[0][1].get(PARAMETERS) if samples else None
    if not isinstance(base, dict) or not base:
        return {"theta": None}
    nested = {kind: params for kind, params in base.items() if isinstance(params, dict)}
    theta = cls.default_theta
    options: list[dict[str, Any]] = []
    if nested and isinstance(theta, dict | float | int):
        rest = {kind: {k: v for k, v in params.items() if k != THETA} for kind, params in nested.items()}
        thetas = {kind: params.get(THETA) for kind, params in nested.items()}
        keys: list[dict[str, str]] = [{}, {"full_attention": "rope_theta"}]
        keys.append({"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"})
        keys.append({"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"})
        options += [{"theta": thetas, "default": rest, "theta_keys": one} for one in keys]
    else:
        rest = {key: value for key, value in base.items() if key != THETA}
        plain = theta if not isinstance(theta, dict) else None
        own = entry["defaults"].get(THETA, plain)
        options += [
            {"theta": given, "default": default, "partial": partial}
            for given in (own, base.get(THETA))
            for default in (base, rest, {})
            for partial in (base.get("partial_rotary_factor"), None)
        ]
    tries = [*samples, *_rope_samples(cls, entry["defaults"] | {PARAMETERS: None})]

    def misses(spec: Mapping[str, Any]) -> int:
        return sum(
            normalise_rope(keys, entry["defaults"] | whole, spec) != normalise_rope(whole, whole, spec)
            for keys, whole in tries
            if PARAMETERS in whole
        )

    options += [{**option, "legacy": False} for option in options]
    options += [{**option, "old_names": ["rotary_emb_base", "rotary_pct"]} for option in options]
    return min(options, key=misses)


def _rope_samples(cls: type[PreTrainedConfig], defaults: Mapping[str, Any]) -> list[Sample]:
    """Return configs whose rotary embeddings are spelled in every way."""
    if PARAMETERS not in defaults:
        return []
    linear = {"rope_type": "linear", "factor": 2.0}
    variants: list[dict[str, Any]] = [
        {"rope_theta": 12345.0},
        {"rope_scaling": linear},
        {"rope_theta": 12345.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_theta": 12345.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 12345.0, "rope_scaling": None},
        {"rope_theta": 12345.0, "partial_rotary_factor": 0.5},
        {"rope_local_base_freq": 54321.0, "rope_theta": 12345.0},
        {"rotary_emb_base": 12345.0, "rotary_pct": 0.5},
        {"global_rope_theta": 54321.0, "local_rope_theta": 12345.0},
    ]
    nested = isinstance(cls.default_theta, dict)
    if not nested:
        variants.append({PARAMETERS: {"rope_type": "default", "rope_theta": 777.0}})
    return [(keys, whole) for keys in variants if (whole := made(cls, keys)) is not None]


def _wrong(entry: Mapping[str, Any], samples: Sequence[Sample]) -> tuple[set[str], set[str]]:
    """Return the keys that a normalised config has otherwise than transformers makes them, and those that it lacks."""
    known = ConfigClass(**{**entry, "nested": {}})
    wrong, missing = set(), set()
    for keys, whole in samples:
        ours, theirs = part_values(keys, known)[0], part_values(whole, known)[0]
        wrong |= {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key] and ours[key] not in UNSAID}
        missing |= {key for key in theirs if theirs[key] is not None and ours.get(key) in UNSAID and key[0] != "_"}
    return wrong, missing


def _json(value: Any) -> Any:
    """Return a value as it lies in a config.json."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return None


def main() -> None:
    """Write the file."""
    transformers.logging.set_verbosity_error()
    classes = {name: describe_class(cls) for name, cls in sorted(config_classes().items())}
    head = f'{{"transformers": "{transformers.__version__}", "classes": {{\n'
    # A class a line: what changes with a new version can be read in a diff.
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in classes.items())
    DEFAULTS.write_text(f"{head}{lines}\n}}}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
