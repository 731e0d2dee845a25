"""Give the tensors of a model names that do not depend on who saved it, so that those of two models can be matched.

No architecture is listed. Wrappers of training frameworks carry no meaning anywhere in a name; what stands before the
stack of layers ("model.language_model.layers", "layers", "bert.encoder.layer") is where a class happens to keep it;
and some modules are called by an old and a new word, of which transformers knows both. Canonical names are for
matching alone and never shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgery.checkpoint.config.model_config import language_config
from surgery.checkpoint.structure import layer_stacks

STACK = "#"  # stands for the layers' prefix: no module is called so

# What torch.compile, (F)SDP, activation checkpointing, Lightning and PEFT put around a module.
WRAPPERS = frozenset(
    (
        *("_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
        *("_forward_module", "_dp_wrapped_module", "_fpw_module", "base_layer"),
    )
)
# Components that a class of a tower adds around all that it has.
_INNER_MODELS = ("vision_model", "text_model")

# Old spelling → the one used here, which need not be the newer. Each rewrites whole components.
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?<![^.]){old}(?![^.])"), new)
    for old, new in (
        (r"(block_sparse_moe|feed_forward)", "mlp"),
        (r"router\.layer", "router"),
        (r"mlp\.router", "mlp.gate"),
        (r"mlp\.(gate|moe_statics|gate\.moe_statics)\.e_score_correction_bias", "mlp.e_score_correction_bias"),
        (r"mlp\.input_linear\.weight", "mlp.experts.gate_up_proj"),
        (r"mlp\.output_linear\.weight", "mlp.experts.down_proj"),
        (r"experts\.fc1\.weight", "experts.gate_up_proj"),
        (r"experts\.fc2\.weight", "experts.down_proj"),
        (r"experts\.(gate_up_proj|gate_proj|up_proj|down_proj)\.weight", r"experts.\1"),
        (r"experts\.(gate_up_proj|gate_proj|up_proj|down_proj)\.bias", r"experts.\1_bias"),
        (r"experts(\.[0-9]+)?\.w1", r"experts\1.gate_proj"),
        (r"experts(\.[0-9]+)?\.w3", r"experts\1.up_proj"),
        (r"experts(\.[0-9]+)?\.w2", r"experts\1.down_proj"),
        (r"embed_out", "lm_head"),
        (r"LayerNorm\.gamma", "LayerNorm.weight"),
        (r"LayerNorm\.beta", "LayerNorm.bias"),
        (r"weight_g", "parametrizations.weight.original0"),
        (r"weight_v", "parametrizations.weight.original1"),
    )
)


@dataclass(frozen=True)
class CanonicalNames:
    """The canonical names of a model's tensors.

    stack: the layers' prefix as it is stored, with all wrappers; None without layers.
    by_name: stored name → canonical name; names whose canonical one is not theirs alone are absent.
    """

    stack: str | None
    by_name: Mapping[str, str]

    @cached_property
    def stored(self) -> dict[str, str]:
        """Canonical name → stored name."""
        return {canonical: name for name, canonical in self.by_name.items()}

    @property
    def root(self) -> str:
        """What names directly beside the layers begin with: "model." or nothing."""
        return "" if self.stack is None else self.stack[: self.stack.rfind(".") + 1]

    def place(self, canonical: str) -> str:
        """Return the stored name that a further tensor of the layers would have here."""
        return f"{self.stack}{canonical.removeprefix(STACK)}"


def canonical_names(names: Collection[str], config: Mapping[str, Any], *, like: str | None = None) -> CanonicalNames:
    """Return the canonical names of `names`.

    Args:
        config: the model's, which helps to tell the language model's layers from others.
        like: the layers' prefix in another model, to recognise them by where names alone tell another one.
    """
    plain = {name: _without_wrappers(name) for name in names}
    stack, _ = layer_stacks(plain.values(), language_config(config))
    if like is not None and (stack is None or not _is_similar(stack, like)):
        # Too few names to recognise layers by, or another number before them (`0.auto_model.encoder.layer`).
        stack = _similar_stack(plain.values(), _without_wrappers(like)) or stack
    canonical = {name: _canonical(text, stack) for name, text in plain.items()}
    count = Counter(canonical.values())
    unique = {name: text for name, text in canonical.items() if count[text] == 1}
    return CanonicalNames(_stored_stack(plain, stack), unique)


def _without_wrappers(name: str) -> str:
    if not any(word in name for word in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _stored_stack(plain: Mapping[str, str], stack: str | None) -> str | None:
    """Return the stack's prefix with its wrappers, as the first name that is in it has them."""
    if not stack:
        return stack
    wanted = stack.split(".")
    for name, text in plain.items():
        if not text.startswith(f"{stack}."):
            continue
        at, parts = 0, name.split(".")
        for index, part in enumerate(parts):
            at += part not in WRAPPERS
            if at == len(wanted):
                return ".".join(parts[: index + 1])
    return stack


def _is_similar(stack: str, like: str) -> bool:
    return stack.rpartition(".")[2] == like.rpartition(".")[2]


def _similar_stack(names: Collection[str], like: str) -> str | None:
    """Return the most frequent prefix that ends in the last component of `like` and stands before a number."""
    last = re.escape(like.rpartition(".")[2])
    numbered = re.compile(rf"((?:[^.]+\.)*?{last})\.[0-9]+\.", re.ASCII)
    found = Counter(match[1] for name in names if (match := numbered.match(name)))
    return found.most_common(1)[0][0] if found else None


def _canonical(name: str, stack: str | None) -> str:
    if stack is not None and (not stack or name.startswith(f"{stack}.")):
        inside = name[len(stack) :].removeprefix(".")
        if not stack and not inside.split(".")[0].isdigit():
            return _respelled(name)
        return _respelled(f"{STACK}.{inside}")
    root = (stack or "").split(".")[:-1]
    parts = name.split(".")
    # Up to where the name leaves the layers' path: "lm_head" of language_model.lm_head beside language_model.model.
    depth = 0
    while depth < min(len(root), len(parts) - 1) and parts[depth] == root[depth]:
        depth += 1
    parts = parts[depth:]
    if len(parts) > 2 and parts[1] in _INNER_MODELS:
        del parts[1]
    return _respelled(".".join(parts))


def _respelled(name: str) -> str:
    for pattern, new in _SPELLINGS:
        name = pattern.sub(new, name)
    return name
