"""Derive the structure of a model from names and shapes: layers, heads, experts, routers, embeddings.

`model_structure` takes a `Checkpoint` (headers and config). No architecture is listed: the stack of layers is the
numbered part of the names whose members look alike, and `tensor_roles` finds out what its tensors are. The config's
numbers are checked against the shapes; disagreements become notes, and tensors without a role are listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import (
    EXPERTS_PER_TOKEN,
    HEAD_DIM,
    HIDDEN,
    N_EXPERTS,
    N_HEADS,
    N_KV_HEADS,
    language_config,
    layer_count,
    number,
    stated_tie,
)
from surgery.checkpoint.tensor_roles import (
    ATTENTION,
    NORM,
    NUMBER,
    ExpertLayer,
    HeadShape,
    Role,
    Shapes,
    experts_of,
    heads_of,
    parts_of,
    roles_of,
    roles_outside,
    tower_of,
    word_of,
)
from surgery.runtime.garbage import collector_paused

MOST_NOTES = 50  # real models have up to ten; names can be made that give one for each tensor
SIDE_WORDS = ("vision", "visual", "audio", "image", "encoder", "mtp")  # stacks beside the language model
# Classes of transformers that have an output head; others (LlamaModel) are bare backbones.
WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForImageTextToText")

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """One layer: its number in the names, its tensors, and the heads and experts found in them."""

    index: int
    names: tuple[str, ...]
    heads: HeadShape | None
    experts: ExpertLayer | None


@dataclass(frozen=True)
class ModelStructure:
    """The structure of a checkpoint. Numbers that differ between layers, or are not known, are None.

    stack: the prefix of the layers' names ("model.layers"); None without numbered layers.
    token_embeddings, lm_heads: tensors with one row per token.
    tied: the output head is the token embedding: no head is stored, and the config says so or, if it says nothing,
        names a class that has a head.
    groups: the parts that reports are grouped by, in the order of the forward pass.
    not_understood: the tensors without a role.
    notes: where config and shapes disagree, and what is missing.
    """

    stack: str | None
    blocks: tuple[Layer, ...]
    token_embeddings: tuple[str, ...]
    lm_heads: tuple[str, ...]
    tied: bool
    vocab_size: int | None
    hidden_size: int | None
    experts_per_token: int | None
    roles: Mapping[str, Role]
    groups: tuple[str, ...]
    not_understood: tuple[str, ...]
    notes: tuple[str, ...]
    group_by_name: Mapping[str, str] = field(repr=False)
    layer_by_name: Mapping[str, int] = field(repr=False)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.blocks)

    @property
    def heads(self) -> int | None:
        """Query heads per layer."""
        return _same(layer.heads.n_heads for layer in self.blocks if layer.heads)

    @property
    def kv_heads(self) -> int | None:
        """Key-value heads per layer."""
        return _same(layer.heads.n_kv_heads for layer in self.blocks if layer.heads)

    @property
    def head_dim(self) -> int | None:
        """The width of a head at the output projection's input."""
        return _same(layer.heads.head_dim for layer in self.blocks if layer.heads)

    @property
    def n_experts(self) -> int | None:
        """Routed experts in the layers that have any."""
        return _same(layer.experts.n_experts for layer in self.blocks if layer.experts)

    @property
    def output_projections(self) -> Mapping[int, HeadShape]:
        """Layer → its attention output projection; layers without a recognised one are absent."""
        return {layer.index: layer.heads for layer in self.blocks if layer.heads}

    @property
    def experts(self) -> Mapping[int, ExpertLayer]:
        """Layer → its routed experts; dense layers are absent."""
        return {layer.index: layer.experts for layer in self.blocks if layer.experts}

    @property
    def token_rows(self) -> tuple[str, ...]:
        """Every tensor whose first axis is the vocabulary: embeddings, heads, and the heads' biases."""
        return tuple(name for name, role in self.roles.items() if role in ("token embedding", "lm head"))

    @property
    def main_embedding(self) -> str | None:
        """The token embedding that a tied head is; None without one, or where several are not told apart."""
        names = _main(self.token_embeddings, self.stack)
        # T5's encoder and decoder may each have a copy of it.
        shared = [name for name in names if word_of(parts_of(name)) == "shared"] or names
        return shared[0] if len(shared) == 1 else None

    @property
    def main_head(self) -> str | None:
        """The output head; None without one, or where several are not told apart."""
        names = _main(self.lm_heads, self.stack)
        return names[0] if len(names) == 1 else None

    def layer_of(self, name: str) -> int | None:
        """Return the layer that tensor `name` belongs to, or None."""
        return self.layer_by_name.get(name)

    def group_of(self, name: str) -> str:
        """Return the part that a tensor is reported under: "embed", "layer 3", "final norm", "lm_head", the prefix
        of a tower ("model.visual"), or "other"."""
        return self.group_by_name.get(name, "other")

    def grouped(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Group `names` by part, in the order of the forward pass; parts without any of them are absent."""
        members: dict[str, list[str]] = {group: [] for group in (*self.groups, "other")}
        for name in names:
            members[self.group_of(name)].append(name)
        return {group: listed for group, listed in members.items() if listed}


@collector_paused()
def model_structure(checkpoint: Checkpoint) -> ModelStructure:
    """Derive the structure of `checkpoint`; what cannot be derived stays None or becomes a note."""
    tensors, config = checkpoint.tensors, language_config(checkpoint.config)
    notes: list[str] = []
    stack, others = layer_stacks(tensors, config)
    members, ahead = _members(tensors, stack, config, notes)
    roots = list(dict.fromkeys(root for other in others if (root := _tower_root(stack or "", other))))
    notes += [f"{root} is a stack of its own beside the layers counted here" for root in roots]
    towers = dict.fromkeys([*ahead, *roots])
    layer_of = {name: index for index, names in members.items() for name in names}
    outside = {name: tensors[name] for name in tensors if name not in layer_of}

    roles = roles_outside(outside, towers, config, notes)
    embeddings = tuple(name for name in outside if roles.get(name) == "token embedding")
    # A head's bias has a value per token as well, but is no matrix.
    lm_heads = tuple(n for n in outside if roles.get(n) == "lm head" and len(outside[n].shape) == 2)
    hidden = _hidden_size(tensors, embeddings, config, notes)
    blocks = []
    for index, names in members.items():
        parts = {name: parts_of(name.removeprefix(f"{stack}.") if stack else name)[1:] for name in names}
        experts = experts_of(parts, tensors, config)
        layer_roles = roles_of(parts, tensors, experts)
        roles |= layer_roles
        blocks.append(Layer(index, tuple(names), heads_of(parts, layer_roles, tensors, hidden, config), experts))
    notes += _disagreements(blocks, tensors, config)

    root = (stack or "").rpartition(".")[0]
    groups = {name: _outside_group(name, role, root, towers) for name, role in roles.items()}
    groups |= {name: f"layer {index}" for name, index in layer_of.items()}
    groups = {name: groups.get(name, "other") for name in tensors}
    numbered = [f"layer {layer.index}" for layer in blocks]
    order = ["embed", *numbered, "final norm", "lm_head", *towers, "other"]
    present = set(groups.values())
    return ModelStructure(
        stack=stack,
        blocks=tuple(blocks),
        token_embeddings=embeddings,
        lm_heads=lm_heads,
        tied=_tied(checkpoint.config, _main(embeddings, stack), _main(lm_heads, stack), notes),
        vocab_size=next((tensors[name].shape[0] for name in (*embeddings, *lm_heads)), None),
        hidden_size=hidden,
        experts_per_token=number(config, EXPERTS_PER_TOKEN),
        roles={name: roles[name] for name in tensors if name in roles},
        groups=tuple(group for group in order if group in present),
        not_understood=tuple(name for name in tensors if name not in roles),
        notes=_shown(notes),
        group_by_name=groups,
        layer_by_name=layer_of,
    )


def _shown(notes: Sequence[str]) -> tuple[str, ...]:
    more = len(notes) - MOST_NOTES
    return (*notes[:MOST_NOTES], f"… and {more:,} more") if more > 0 else tuple(notes)


def _same(values: Iterable[T]) -> T | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def layer_stacks(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return the prefix of the language model's layers ("model.layers"), and those of other stacks.

    Args:
        config: of the language model; see `language_config`.
    """
    numbers: dict[str, set[int]] = {}
    suffixes: dict[str, Counter[str]] = {}
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if NUMBER.fullmatch(part):
                prefix = ".".join(parts[:at])
                numbers.setdefault(prefix, set()).add(int(part))
                suffixes.setdefault(prefix, Counter())[".".join(parts[at + 1 :])] += 1
                break  # what is numbered inside a layer (experts) is not a stack of its own

    wanted = layer_count(config)

    def attends(prefix: str) -> bool:
        return any(ATTENTION.search(suffix.lower()) for suffix in suffixes[prefix])

    def is_stack(prefix: str) -> bool:
        n_members = len(numbers[prefix])
        # In more than half, not in all: in hybrid models few tensors are in every layer.
        shared = [suffix for suffix, count in suffixes[prefix].items() if 2 * count > n_members]
        # Layers of several kinds (Nemotron-H) may share nothing but their norm; as many as the config says are layers
        # all the same.
        return len(shared) > (0 if n_members == wanted else 1)

    def likelihood(prefix: str) -> tuple[bool, bool, bool, int]:
        # The name comes first: a vision tower may have as many layers as the language model, and attention in them.
        is_side = any(word in prefix.lower() for word in SIDE_WORDS)
        return (not is_side, len(numbers[prefix]) == wanted, attends(prefix), suffixes[prefix].total())

    stacks = [p for p in numbers if is_stack(p) and (attends(p) or len(numbers[p]) == wanted)]
    stacks.sort(key=likelihood, reverse=True)
    return (stacks[0], [p for p in stacks[1:] if attends(p)]) if stacks else (None, [])


def _members(
    tensors: Shapes, stack: str | None, config: Mapping[str, Any], notes: list[str]
) -> tuple[dict[int, list[str]], list[str]]:
    """Return layer number → its tensors, and the prefixes of layers that predict further tokens ahead (MTP)."""
    if stack is None:
        notes.append("no numbered stack of layers was found in the names")
        return {}, []
    members: dict[int, list[str]] = {}
    start = f"{stack}." if stack else ""
    for name in tensors:
        if name.startswith(start) and NUMBER.fullmatch(part := name[len(start) :].split(".")[0]):
            members.setdefault(int(part), []).append(name)
    members = {index: members[index] for index in sorted(members)}
    wanted = layer_count(config)
    extra: list[str] = []
    # DeepSeek-V3 numbers them on from its last layer; taken for layers, they would be cut and merged as such. Tunes
    # often lack the count of them, and transformers loads as many layers as the config says, whatever follows.
    if wanted is not None and _has_all(members, wanted) and not _has_two_stacks(config):
        extra = [f"{start}{index}" for index in members if index >= wanted]
    if extra and wanted is not None:
        members = {index: names for index, names in members.items() if index < wanted}
        notes.append(
            f"{', '.join(extra)} come after the {wanted} layers of the config (to predict further tokens ahead, say) "
            "and are not counted"
        )
    if wanted is not None and len(members) != wanted:
        notes.append(f"the config says {wanted} layers, the names hold {len(members)}")
    if list(members) != list(range(len(members))):
        numbers = f"{len(members)} layers from {min(members)} to {max(members)}"
        notes.append(f"the names hold {numbers}: this is part of a model")
    return members, extra


def _has_all(members: Mapping[int, object], wanted: int) -> bool:
    return all(index in members for index in range(wanted))


def _has_two_stacks(config: Mapping[str, Any]) -> bool:
    """Return whether an encoder and a decoder may be of different depth, so that one number does not hold for both."""
    return bool(config.get("is_encoder_decoder")) or any(
        key in config for key in ("decoder_layers", "num_decoder_layers", "encoder_layers")
    )


def _tower_root(stack: str, other: str) -> str | None:
    """Return the prefix of `other` up to where it leaves `stack`: "model.visual" for model.visual.blocks."""
    ours, theirs = stack.split("."), other.split(".")
    for depth, part in enumerate(theirs):
        if depth >= len(ours) or part != ours[depth]:
            return ".".join(theirs[: depth + 1]) or None
    return None


def _outside_group(name: str, role: Role, root: str, towers: Container[str]) -> str:
    if role == "lm head":
        return "lm_head"
    if "embedding" in role or (role == "norm" and "embed" in name):
        return "embed"
    # Directly below the root, as "model.norm.weight" is below "model"; deeper ones belong to a tower.
    depth = root.count(".") + 2 if root else 1
    at_root = not root or name.startswith(f"{root}.")
    if role == "norm" and at_root and name.count(".") == depth:
        return "final norm"
    return tower_of(name, towers) or "other"


def _hidden_size(tensors: Shapes, embeddings: Sequence[str], config: Mapping[str, Any], notes: list[str]) -> int | None:
    stated = number(config, HIDDEN)
    # The most common width: norms of queries and keys have that of a head.
    norms = Counter(
        tensor.shape[0]
        for name, tensor in tensors.items()
        if len(tensor.shape) == 1 and NORM.search(word_of(parts_of(name)))
    )
    measured = [tensors[name].shape[1] for name in embeddings] + [width for width, _ in norms.most_common(1)]
    if stated is None or not measured or stated in measured:
        return stated or next(iter(measured), None)
    notes.append(f"the config says hidden size {stated:,}, the shapes {measured[-1]:,}")
    return measured[-1]


def _disagreements(blocks: Sequence[Layer], tensors: Shapes, config: Mapping[str, Any]) -> list[str]:
    """Return notes on disagreements of config and shapes, and on layers that lack what others have."""
    notes = []
    known = [layer.heads for layer in blocks if layer.heads]
    if missing := [layer.index for layer in blocks if layer.heads is None]:
        notes.append(
            f"{len(missing)} of {len(blocks)} layers have no attention output projection that is recognised; "
            f"the first is layer {missing[0]}"
        )
    n = number(config, N_HEADS)
    if uneven := [heads for heads in known if heads.n_heads is None]:
        shape = list(tensors[uneven[0].name].shape)
        reason = f"which {n} heads do not divide" if n else "and nothing says how many heads that is"
        notes.append(f"{uneven[0].name} has shape {shape}, {reason}")
    checks = (
        ("head width", number(config, HEAD_DIM), [heads.head_dim for heads in known]),
        ("key-value heads", number(config, N_KV_HEADS), [heads.n_kv_heads for heads in known]),
        ("experts", number(config, N_EXPERTS), [b.experts.n_experts for b in blocks if b.experts]),
    )
    for what, stated, measured in checks:
        others = sorted({value for value in measured if value is not None and value != stated})
        if stated is not None and others:
            notes.append(f"the config says {what} {stated}, the shapes {', '.join(map(str, others))}")
    return notes


def _main(names: Iterable[str], stack: str | None) -> list[str]:
    """Return those of `names` that are no copies of an end in layers that predict further tokens ahead."""
    ahead = [f"{stack}."] if stack else []
    return [
        name
        for name in names
        if not any(name.startswith(start) for start in ahead)
        and not any(part.startswith("mtp") for part in parts_of(name))
    ]


def _tied(config: Mapping[str, Any], embeddings: Sequence[str], lm_heads: Sequence[str], notes: list[str]) -> bool:
    stated = stated_tie(config)
    if lm_heads:
        if stated is True and embeddings:
            notes.append(f"{lm_heads[0]} is stored although the config ties it to {embeddings[0]}")
        return False
    if not embeddings or stated is True:
        return bool(embeddings)
    if stated is False:
        notes.append("the config says that the output head is not tied, but none is stored")
    elif not config:
        notes.append("no output head is stored; without a config.json nothing says whether it is tied")
    # A class with a head, of which none is stored: it can only be the embedding.
    return stated is None and any(WITH_HEAD.search(str(name)) for name in config.get("architectures") or ())
