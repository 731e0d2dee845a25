"""Normalise configs: one spelling for every key, nested configs entered, defaults filled in as transformers does.

Two files say the same of a model exactly where their normalised configs are equal in what counts
(`surgery.engine.config_effects`). Keys of the language model have no prefix, those of other parts theirs, as
`vision_config.hidden_size`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.config.config_defaults import ConfigClass, NestedConfig, config_class
from surgery.checkpoint.config.config_rope import SPELLINGS, normalise_rope, spelled
from surgery.checkpoint.config.config_rules import UNSAID, apply_rule, keys_of
from surgery.checkpoint.config.model_config import EXPERTS_PER_TOKEN, HIDDEN, N_EXPERTS, N_HEADS, N_KV_HEADS, N_LAYERS

LANGUAGE = ("text_config", "llm_config", "language_config", "thinker_config")
_NO_PARTS = ("quantization_config", "compression_config", "per_layer_config")
TIED = "tie_word_embeddings"
# What shapes follow from: models that differ in one of these have different tensors.
SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_MORE_SHAPES = ("intermediate_size", "num_experts", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank")
# Other names of keys, of all families.
SYNONYMS = {
    **dict.fromkeys(N_LAYERS, "num_hidden_layers"),
    **dict.fromkeys(HIDDEN, "hidden_size"),
    **dict.fromkeys(N_HEADS, "num_attention_heads"),
    **dict.fromkeys(N_KV_HEADS, "num_key_value_heads"),
    **dict.fromkeys(N_EXPERTS, "num_experts"),
    **dict.fromkeys(EXPERTS_PER_TOKEN, "num_experts_per_tok"),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), "hidden_act"),
    **dict.fromkeys(("layer_types", "layers_block_type"), "layer_types"),
    **dict.fromkeys(("n_positions", "max_position_embeddings"), "max_position_embeddings"),
    **dict.fromkeys(("torch_dtype", "dtype"), "dtype"),
}
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
}
# Names of before transformers 5, which it renames on reading.
_LAYER_KINDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
_FAMILY = re.compile(r"[a-z]+\d*")


@dataclass(frozen=True)
class NormalisedConfig:
    """What a config says of a model, in one spelling.

    Args:
        model_type: of the whole; None where the file does not say.
        text_type: of the language model.
        values: key → value; keys of other parts than the language model have a prefix.
        language: those of the language model.
        known: whether transformers knows its defaults.
        said: the keys that the file itself has.
        undetermined: keys that the file leaves to a default which is not known.
    """

    model_type: str | None
    text_type: str | None
    values: Mapping[str, Any]
    language: Mapping[str, Any]
    known: bool
    said: frozenset[str]
    undetermined: frozenset[str]

    @property
    def is_multimodal(self) -> bool:
        """Whether the language model is a part of it."""
        return self.model_type != self.text_type


def normalise_config(config: Mapping[str, Any]) -> NormalisedConfig:
    """Return what `config` says of its model, defaults filled in."""
    model_type = _name(config.get("model_type"))
    parts = _Parts()
    parts.enter(config, model_type, "", language=True)
    values = {**parts.others, **parts.language}
    return NormalisedConfig(
        model_type,
        parts.text_type,
        values,
        parts.language,
        parts.known,
        frozenset(parts.said),
        frozenset(parts.undetermined),
    )


def is_text_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Return whether one of two configs is of the language model of the other, a multimodal one.

    It is where both are of one family and agree in everything that shapes follow from; the names of the tensors differ.
    """
    one, other = normalise_config(a), normalise_config(b)
    if one.is_multimodal == other.is_multimodal or one.text_type is None or other.text_type is None:
        return False
    families = [_FAMILY.match(text_type.removesuffix("_text")) for text_type in (one.text_type, other.text_type)]
    if one.text_type != other.text_type and len({found and found[0].removesuffix("v") for found in families}) > 1:
        return False
    keys = (*SHAPE_KEYS, *_MORE_SHAPES)
    return all(one.language.get(key) == other.language.get(key) for key in keys)


class _Parts:
    """Collects the values of a config and of those inside it."""

    def __init__(self) -> None:
        self.language: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.said: set[str] = set()
        self.undetermined: set[str] = set()
        self.text_type: str | None = None
        self.known = True

    def enter(self, config: Mapping[str, Any], class_name: str | None, prefix: str, *, language: bool) -> None:
        """Add the values of `config`, whose keys get `prefix` unless they are the language model's."""
        known = config_class(class_name) if class_name else None
        nested = dict(known.nested) if known else {}
        nested |= {key: NestedConfig("", True) for key, value in config.items() if _is_config(key, value, nested)}
        text = next((key for key in LANGUAGE if language and key in nested), None)
        flat = text is not None and not isinstance(config.get(text), Mapping)
        for key, part in nested.items():
            inside = config.get(key)
            # Of some families older files have the language model's keys beside the others (Qwen2-VL).
            if key == text and flat:
                moved = {name: value for name, value in config.items() if name not in nested and _moves(name, known)}
                inside = moved or None
            if not isinstance(inside, Mapping) and (inside is not None or part.content is None):
                continue
            named = _name((inside or {}).get("model_type"))
            # Defaults of the place are those of the class that usually stands there.
            usual = named is None or named == part.class_name or not part.any_class
            inside = {**((usual and part.content) or {}), **(inside or {})}
            name = (named if part.any_class else None) or part.class_name or named
            self.enter(inside, name, f"{prefix}{key}.", language=key == text)
        own = {key: value for key, value in config.items() if key not in nested and not (flat and _moves(key, known))}
        self._add(own, known, prefix, language=language and text is None, has_text=text is not None)
        if language and text is None:
            self.text_type, self.known = class_name, known is not None

    def _add(
        self, own: Mapping[str, Any], known: ConfigClass | None, prefix: str, *, language: bool, has_text: bool
    ) -> None:
        values, said, undetermined = part_values(own, known)
        # The keys of a config around the language model have no prefix either: they are read beside it.
        prefix = "" if language or has_text else prefix
        if has_text and TIED in values:
            tied = values.pop(TIED)
            # The outer one counts, unless only the inner one is written down.
            if TIED in said or TIED not in self.said:
                self.language[TIED] = tied
        target = self.language if language else self.others
        target |= {f"{prefix}{key}": value for key, value in values.items()}
        self.said |= {f"{prefix}{key}" for key in said}
        self.undetermined |= {f"{prefix}{key}" for key in undetermined}


def part_values(config: Mapping[str, Any], known: ConfigClass | None) -> tuple[dict[str, Any], set[str], set[str]]:
    """Return the values of one config without those inside it, the keys that it has itself, and those not known."""
    if known is None:
        return _unknown_values(config)
    values, said = dict(known.defaults), set()
    rope = SPELLINGS if known.rope is not None else frozenset()
    aliases = _aliases(known)
    # Other names last: they count where a file has both.
    for key in sorted(config, key=lambda name: name in aliases):
        name = aliases.get(key, key)
        values[name] = _plain(config[key])
        if config[key] is not None:
            said.add(name)
    n_layers = _count(values.get(known.aliases.get("num_hidden_layers", "num_hidden_layers")))
    for key, rule in known.forced.items():
        values[key] = apply_rule(rule, values, n_layers)
    read: set[str] = set()
    # Twice, for what follows from what follows.
    for key, rule in (*known.derived.items(), *known.derived.items()):
        if values.get(key) in UNSAID:
            values[key] = apply_rule(rule, values, n_layers)
        read |= set(keys_of(rule)) if values[key] is not None else set()
    if known.rope is not None:
        values |= normalise_rope(config, values, known.rope)
    undetermined = {key for key in known.unknown if values.get(key) is None}
    # What the kinds of layers follow from is said by their list.
    dropped = (rope - {"rope_theta", "rope_scaling", "partial_rotary_factor"}) | read | aliases.keys()
    fields = known.defaults.keys() | known.derived.keys() | known.forced.keys()
    named = {SYNONYMS.get(key, key) for key in fields if key in SYNONYMS}
    kept = {
        key: value
        for key, value in values.items()
        # A synonym that the family does not read says nothing.
        if key not in dropped and (key in fields or SYNONYMS.get(key, key) not in named)
    }
    names = {key: SYNONYMS[key] for key in kept if key in SYNONYMS and SYNONYMS[key] not in kept}
    return (
        {names.get(key, key): _canonical(value, names.get(key, key)) for key, value in kept.items()},
        {names.get(key, key) for key in said},
        {names.get(key, key) for key in undetermined},
    )


def _aliases(known: ConfigClass) -> dict[str, str]:
    """Return the other names of keys → those that the defaults have.

    Some classes have a field and save it under another name (`num_experts` of Qwen3-MoE as `num_local_experts`).
    """
    pairs = known.aliases.items()
    turned = {real: name for name, real in pairs if name in known.defaults and real not in known.defaults}
    return {name: real for name, real in pairs if real not in turned} | turned


def _unknown_values(config: Mapping[str, Any]) -> tuple[dict[str, Any], set[str], set[str]]:
    """Return as `part_values` those of a family that transformers does not know: nothing is filled in."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = SYNONYMS.get(key, key)
        if key not in SPELLINGS and value is not None:
            values.setdefault(name, _canonical(_plain(value), name))
    said = set(values)
    if spelled(config):
        rope = normalise_rope(config, values, {})
        values |= rope
        said |= {key for key, value in rope.items() if value is not None}
    return values, said, set()


def _is_config(key: str, value: Any, nested: Mapping[str, Any]) -> bool:
    """Return whether a key that transformers does not know holds a config of a part."""
    if key in nested or not isinstance(value, Mapping) or key in _NO_PARTS:
        return False
    return key in LANGUAGE or key.endswith("_config")


def _moves(key: str, known: ConfigClass | None) -> bool:
    """Return whether a key beside the nested configs is the language model's."""
    return known is not None and key not in known.defaults and key not in known.aliases and key != "model_type"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: transformers writes infinities as objects."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(value["__float__"]), value)
    return value


def _canonical(value: Any, key: str) -> Any:
    if key == "hidden_act" and isinstance(value, str):
        return _ACTIVATIONS.get(value, value)
    if key == "per_layer_config" and isinstance(value, Mapping):
        # By layer, what it has otherwise than the others; sizes show in the tensors.
        layers = {str(i): one for i, one in value.items() if isinstance(one, Mapping)}
        rest = {str(i): {k: v for k, v in one.items() if k not in SHAPE_KEYS} for i, one in layers.items()}
        return {i: one for i, one in rest.items() if one} or None
    if key.endswith("layer_types") and isinstance(value, list):
        return [_LAYER_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in value]
    return value


def _count(value: Any) -> int:
    # Bounded: a damaged file would have lists of any length made.
    return min(value, 10_000) if type(value) is int and value > 0 else 0


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None
