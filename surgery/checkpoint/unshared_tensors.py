"""Tell what a tensor is that only some of several models have: computed, ignored on loading, or learnt.

`computed`: a buffer that the architecture computes from its config (rotary frequencies, causal masks, position ids),
by its name and by its shape or dtype; old versions of libraries saved them. `ignored`: weights that transformers leaves
unread where a model has no place for them, so that tunes lack them: multi-token prediction, layers past the config's
last, heads for other tasks, towers for other media. Everything else is `learnt`: to be without it is a fault.

No list of families: `_keys_to_ignore_on_load_unexpected` of transformers' classes names the same tensors one by one,
and a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import language_config, layer_count, number
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import WITH_HEAD, ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import ATTENTION, NUMBER, POSITION_WORDS, parts_of

UnsharedKind = Literal["computed", "ignored", "learnt"]

_ROTARY = re.compile(r"rope|rot")
_FILTERS = re.compile(r"featurizer|feature_extractor|mel|spectrogram")
# Components of names outside the layers: heads for other tasks than the next token.
_TASK_HEADS = re.compile(
    r"v_head|score|summary|pooler|classifier|classification_head|regression_head|qa_outputs|cls|reward|"
    r"(value|critic|rm|reward|depth|normals|segmentation|mask|nsp|text_lm|shared)_head|mask_predictions|"
    r"lm_predictions|final_logits_bias|masked_spec_embed"
)
# Parts of a name that say that it belongs to a tower for other media, or to another half of a model.
_TOWER_WORDS = re.compile(
    r"vision|visual|image|audio|video|speech|talker|(token|code)2wav|multi_?modal|^mm_|perceiver|^detector|^tracker|"
    r"^encoder|^decoder|^text_encoder|^mimi$|quantizer|downsample|upsample|latent_proj|perception"
)
# What some classes of transformers leave unread although it lies in a layer, or in a tower that the model has.
_LEFTOVERS = re.compile(
    r"EncDecAttention\.relative_attention_bias\.|\.shared_head\.|mlp\.post_mlp_layernorm|vision_model\.head\.|"
    r"packing_position_embedding"
)
_SHARED_KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")  # of layers that use another layer's keys and values


@dataclass(frozen=True)
class UnsharedModel:
    """A model as a holder, or as one that lacks a tensor."""

    checkpoint: Checkpoint
    structure: ModelStructure

    @cached_property
    def roots(self) -> frozenset[str]:
        """Every prefix of the tensors' names that ends before a dot."""
        found = set()
        for name in self.checkpoint.tensors:
            parts = name.split(".")
            found |= {".".join(parts[:end]) for end in range(1, len(parts))}
        return frozenset(found)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config of the language model."""
        return language_config(self.checkpoint.config)

    @property
    def has_no_head_class(self) -> bool:
        """Whether its config names classes, and none of them has an output head."""
        names = self.checkpoint.config.get("architectures") or ()
        return bool(names) and not any(WITH_HEAD.search(str(name)) for name in names)


def unshared_model(checkpoint: Checkpoint) -> UnsharedModel:
    """Return `checkpoint` with its structure."""
    return UnsharedModel(checkpoint, model_structure(checkpoint))


def unshared_kind(tensor: StoredTensor, holder: UnsharedModel, lacking: Sequence[UnsharedModel]) -> UnsharedKind:
    """Return what `tensor` of `holder` is, which the models `lacking` do not have."""
    if is_computed(tensor):
        return "computed"
    return "ignored" if _is_ignored(tensor, holder, lacking) else "learnt"


def is_computed(tensor: StoredTensor) -> bool:
    """Return whether `tensor` is a buffer that the architecture computes: by its name, and its shape or dtype."""
    *parents, leaf = parts_of(tensor.name)
    return any(
        words.fullmatch(leaf) is not None and is_it(tensor, ".".join(parents)) for words, is_it in _COMPUTED.items()
    )


def _is_mask(tensor: StoredTensor, parents: str) -> bool:
    shape = tensor.shape
    square = len(shape) > 1 and shape[-1] == shape[-2] and set(shape[:-2]) <= {1}
    # A matrix of floats could be a learnt bias of relative positions; masks in floats have axes for batch and heads.
    return square and (len(shape) > 2 or tensor.dtype in ("BOOL", "U8"))


def _is_attention_mask(tensor: StoredTensor, parents: str) -> bool:
    return ATTENTION.search(parents) is not None and _is_mask(tensor, parents)


def _is_single(tensor: StoredTensor, parents: str) -> bool:
    return tensor.n_elements == 1


def _is_list(tensor: StoredTensor, parents: str) -> bool:
    return len(tensor.shape) == 1


def _is_rotary(tensor: StoredTensor, parents: str) -> bool:
    return _ROTARY.search(parents) is not None


def _is_table(tensor: StoredTensor, parents: str) -> bool:
    return len(tensor.shape) > 1


def _is_integer(tensor: StoredTensor, parents: str) -> bool:
    return tensor.dtype in ("I64", "I32", "I16", "U8", "I8") and set(tensor.shape[:-2]) <= {1}


def _is_row(tensor: StoredTensor, parents: str) -> bool:
    return _is_integer(tensor, parents) and set(tensor.shape[:-1]) <= {1}


# Last component of a name → what its shape, dtype and parents must be.
_COMPUTED: dict[re.Pattern[str], Callable[[StoredTensor, str], bool]] = {
    re.compile(words): is_it
    for words, is_it in (
        (r".*inv_freq|inv_timescales|rope_freqs", _is_list),
        (r"freqs|periods", lambda tensor, parents: _is_list(tensor, parents) and _is_rotary(tensor, parents)),
        (r"_?(cos|sin|cos_sin|rope|freqs)_?cached?|freqs_(cis|cos|sin|complex)", _is_table),
        (r"cos|sin", _is_rotary),
        (r"bias", _is_attention_mask),
        (r"masked_bias|embed_scale|version|_float_tensor", _is_single),
        (r"(causal|attn|attention|local_causal_valid|bias)?_?mask|tril|triu", _is_mask),
        (r"position_ids|token_type_ids|pos_ids", _is_row),
        (r"relative_position_index|relative_position_buckets?|rp_bucket", _is_integer),
        (r"relative_coords_table", _is_table),
        (r"num_batches_tracked", lambda tensor, parents: _is_single(tensor, parents) and not tensor.is_float),
        (r"alibi", _is_table),
        (r"alibi_slopes|slope_rate|query_decay|key_decay|diagonal_decay", lambda tensor, parents: tensor.is_float),
        # GPT-J's table of sines lies in the attention; a learnt one is an embedding, and has a `weight`.
        (r"embed_positions", lambda t, parents: _is_table(t, parents) and ATTENTION.search(parents) is not None),
        (r"weights", lambda tensor, parents: _is_table(tensor, parents) and parents.endswith("embed_positions")),
        (r"fb|window|hann_window|mel_filters|mel_fb", lambda tensor, parents: _FILTERS.search(parents) is not None),
        (r"_extra_state", lambda tensor, parents: True),
    )
}


def _is_ignored(tensor: StoredTensor, holder: UnsharedModel, lacking: Sequence[UnsharedModel]) -> bool:
    name = tensor.name
    parts = parts_of(name)
    # Qwen's `mtp.`, Ernie's `mtp_block.`, MiMo's `model.mtp_layers.`: further tokens ahead.
    if any(part.startswith("mtp") or "nextn" in part for part in parts) or _LEFTOVERS.search(name):
        return True
    if _is_beyond(name, (holder, *lacking)) or _has_shared_keys(name, parts, holder):
        return True
    if name in holder.structure.roles and holder.structure.roles[name] == "lm head":
        return all(model.has_no_head_class for model in lacking)
    if _is_of_tower(name, holder, lacking):
        return True
    if any(part in POSITION_WORDS for part in parts):
        return all(_has_no_positions(model.config) for model in lacking)
    return holder.structure.layer_of(name) is None and any(_TASK_HEADS.fullmatch(part) for part in parts)


def _is_beyond(name: str, models: Sequence[UnsharedModel]) -> bool:
    """Return whether `name` is in a numbered layer past the last of every config that states their number."""
    found = []
    stacks = {model.structure.stack for model in models if model.structure.stack}
    for model in models:
        wanted = layer_count(model.config)
        number_of = [n for stack in stacks if (n := _layer_number(name, stack)) is not None]
        if wanted is not None:
            found.append(bool(number_of) and min(number_of) >= wanted)
    return bool(found) and all(found)


def _layer_number(name: str, stack: str) -> int | None:
    start = f"{stack}."
    if not name.startswith(start):
        return None
    part = name[len(start) :].partition(".")[0]
    return int(part) if NUMBER.fullmatch(part) else None


def _has_shared_keys(name: str, parts: Sequence[str], holder: UnsharedModel) -> bool:
    """Return whether `name` is of keys or values in one of the last layers, which use another layer's (Gemma 3n)."""
    shared, layers = number(holder.config, ("num_kv_shared_layers",)), layer_count(holder.config)
    at = None if holder.structure.stack is None else _layer_number(name, holder.structure.stack)
    if shared is None or layers is None or at is None:
        return False
    return at >= layers - shared and "self_attn" in parts and any(part in _SHARED_KEYS for part in parts)


def _is_of_tower(name: str, holder: UnsharedModel, lacking: Sequence[UnsharedModel]) -> bool:
    """Return whether `name` is in a tower of which the other models have nothing at all."""
    parts = name.split(".")
    ends = [at + 1 for at, part in enumerate(parts) if _TOWER_WORDS.search(part.lower())]
    roots = [".".join(parts[: ends[0]])] if ends else []
    # A stack of its own beside the language model's, whatever it is called.
    if holder.structure.roles.get(name) == "tower":
        roots.append(holder.structure.group_of(name))
    # The language model's own layers lie in no tower, even where a part of their name sounds like one.
    in_stack = holder.structure.layer_of(name) is not None and holder.structure.roles.get(name) != "tower"
    return not in_stack and any(all(root not in model.roots for model in lacking) for root in roots)


def _has_no_positions(config: Mapping[str, Any]) -> bool:
    kind = config.get("position_embedding_type")
    return config.get("position_biased_input") is False or kind in ("rotary", "rope", "alibi", "none")
