"""Keys that mergekit passes over, and that are read here without effect too: each with what to use in its place.

mergekit ignores every key that it does not know, misspelt ones included. Here a key is passed over, with a warning,
where it cannot be a mistake: it holds what aliases refer to, begins with `x-`, is an option of mergekit's command line,
or stood or stands in configs without effect. All others are errors, with the nearest known key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

from merges.config.settings import INT8_MASK, MethodSpec, ParameterSpec
from surgery.io.yaml_nodes import YamlNode

_PRIVATE = "x-"  # of Compose, OpenAPI and others: keys that are for people and their own programs
_NEAR = 0.85  # how alike a key and its misspelling are, as difflib measures it: one letter more or less in six

# The options of mergekit-yaml (those of `MergeOptions` in mergekit 0.1.5, and older ones) that people put into configs.
_STREAMED = "Tensors are streamed in pieces, whatever the memory"
OPTIONS: Mapping[str, str] = {
    "allow_crimes": "Models are matched by the names and shapes of their tensors",
    "unsafe_truncate_embeddings": "Give tokenizer_source, by which tokens are matched by their text",
    "transformers_cache": "Set HF_HOME to say where downloads lie",
    "lora_merge_cache": "Adapters are merged while they are read, without a copy",
    "lora_merge_dtype": "Adapters are merged in fp32",
    "cuda": "Use --device cuda",
    "device": "Use --device",
    "low_cpu_memory": _STREAMED,
    "read_to_gpu": "Use --device cuda",
    "multi_gpu": "Use --device cuda",
    "gpu_rich": "Use --device cuda",
    "out_shard_size": "OUT has shards of 5 GB at most, or those of the model it is like",
    "copy_tokenizer": "OUT always has a tokenizer where the models have one",
    "clone_tensors": "A layer that stands in OUT twice is written twice",
    "trust_remote_code": "No code of models is run",
    "random_seed": "Write seed: NUMBER",
    "lazy_unpickle": "Only safetensors are read, in pieces",
    "write_model_card": "OUT always has a README.md",
    "safe_serialization": "OUT is always safetensors",
    "verbosity": "Use --json for all that is known",
    "verbose": "Use --json for all that is known",
    "quiet": "Redirect stderr",
    "num_threads": "Use --threads",
    "write_threads": "Use --threads",
    "async_write": "OUT is written while it is computed",
    "out_path": "Use -o OUT",
}
# What a document has at its top, and nothing inside it.
_AT_TOP = ("merge_method", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "base_model")
_EMBEDDINGS = "has no effect, as in mergekit: embeddings are merged by the merge method too"
_ONE_METHOD = (
    "has no effect, as in mergekit: a document has one method, that at its top. For another one give these layers a "
    "document of their own, with a name"
)
# Parameters that mergekit once had, or takes without effect.
_DEAD_PARAMETERS: Mapping[str, str] = {
    "embed_slerp": _EMBEDDINGS,
    "consensus_method": "has no effect, as in mergekit: the sum decides on signs",
    "residual_weight": "has no effect, as in mergekit",
}


def why_ignored(
    key: str,
    mapping: YamlNode,
    *,
    known: Mapping[str, set[type]],
    dead: Mapping[str, str],
    method: MethodSpec | None,
    methods: Mapping[str, MethodSpec],
    is_document: bool,
) -> str | None:
    """Return the warning to give of a key that is not known; None where it is an error.

    Args:
        mapping: in which the key stands.
        known: the keys that it may have → which values they take: `dict`, `tuple`, or `str` for every scalar.
        dead: keys without effect in this mapping → the warning of each.
        method: the document's merge method, one of `methods`; None where it names none of them.
        is_document: whether the mapping is a whole document.
    """
    if (helper := _why_helper(key, mapping, known)) is not None:
        return helper
    if key in dead:
        return dead[key]
    if (option := _why_option(key)) is not None:
        return option
    if not is_document and key in _AT_TOP:
        return _ONE_METHOD if key == "merge_method" else _belongs_to_top(key)
    if key == "parameters":
        return "has no effect here, as in mergekit: parameters belong to a document, a slice or a model"
    return _why_parameter(key, mapping, method, methods, is_document)


def why_parameter_ignored(key: str, mapping: YamlNode, known: Iterable[str]) -> str | None:
    """Return the warning to give of a key under `parameters` that no merge method knows; None where it is an error."""
    everything: dict[str, set[type]] = {name: {str, tuple, dict} for name in known}
    if (helper := _why_helper(key, mapping, everything)) is not None:
        return helper
    if key in _AT_TOP:
        return _belongs_to_top(key)
    return _DEAD_PARAMETERS.get(key) or _why_option(key)


def dead_keys(**extra: str) -> dict[str, str]:
    """Return the keys without effect of one kind of mapping, beside those of every kind."""
    return {**_DEAD_PARAMETERS, **extra}


def _why_helper(key: str, mapping: YamlNode, known: Mapping[str, set[type]]) -> str | None:
    node = mapping.children[key]
    if key.lower().startswith(_PRIVATE):
        return "has no effect, as every key that begins with x-"
    if node.holds_anchor and not any(_may_mean(key, node, name, known[name], mapping) for name in known):
        return "has no effect by itself: what it holds counts where it is referred to"
    return None


def _may_mean(key: str, node: YamlNode, name: str, values: set[type], mapping: YamlNode) -> bool:
    """Return whether `key` may be a misspelling of `name`: it is like it, and `name` is missing and takes such values.

    Helpers are often called like what they hold (`base`, `model_a`, `weights`), and are no mistakes.
    """
    kind = type(node.value) if isinstance(node.value, (dict, tuple)) else str
    missing = mapping.children.get(name) is None or mapping.children[name].is_empty
    return missing and kind in values and _is_near(key, name)


def _is_near(key: str, name: str) -> bool:
    # Letters that changed places are no less a slip of the fingers, but count as two differences.
    return sorted(key) == sorted(name) or SequenceMatcher(None, key, name).ratio() >= _NEAR


def _why_option(key: str) -> str | None:
    # As on the command line, `--out-shard-size` and `--no-lazy-unpickle`.
    name = key.lstrip("-").replace("-", "_")
    instead = OPTIONS.get(name) or OPTIONS.get(name.removeprefix("no_"))
    return f"has no effect, as it is an option of mergekit's command line. {instead}" if instead else None


def _belongs_to_top(key: str) -> str:
    return f"has no effect here, as in mergekit: {key} belongs to the top of a document"


def _why_parameter(
    key: str, mapping: YamlNode, method: MethodSpec | None, methods: Mapping[str, MethodSpec], is_document: bool
) -> str | None:
    """Return the warning of a parameter outside of `parameters`, where it makes no difference that it stands there."""
    if key == INT8_MASK.name:
        return "has no effect, as masks are never kept"
    if method is None or not any(other.parameter(key) for other in methods.values()):
        return None
    spec = method.parameter(key)
    if spec is None:
        return f"has no effect: {method.name} does not take it"
    if not is_document:
        return None
    own = mapping.children.get("parameters")
    if own is not None and key in own.children:
        return "has no effect here, as in mergekit: the one under parameters counts"
    if _is_default(spec, mapping.children[key]):
        return f"has no effect outside of parameters, and {key} is that anyway"
    return None


def _is_default(spec: ParameterSpec, node: YamlNode) -> bool:
    try:
        return spec.default is not None and spec.read(node.plain) == spec.read(spec.default)
    except ValueError:  # no scalar, or no value of this parameter
        return False
