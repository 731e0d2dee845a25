"""Assign roles to tensors by the words in their names and by their shapes; find the heads and experts of a layer.

Names alone never decide what is computed on: rows must be those of a vocabulary, a projection must fit the hidden size,
experts must agree on their number. A tensor without a known word in its name gets no role.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from surgery.checkpoint.config.model_config import N_EXPERTS, N_HEADS, N_KV_HEADS, number
from surgery.checkpoint.stored_tensor import StoredTensor

Role = Literal[
    "token embedding",
    "position embedding",
    "lm head",
    "norm",
    "attention query",
    "attention key",
    "attention value",
    "attention key-value",
    "attention query-key-value",
    "attention output",
    "attention other",
    "mlp in",
    "mlp out",
    "router",
    "expert",
    "shared expert",
    "tower",
]

# The last word of a module's name → its role: inside an attention module, and elsewhere in a layer. Two tables, since
# c_proj and wo are in both.
ATTENTION_WORDS: dict[str, Role] = {
    **dict.fromkeys(("q_proj", "wq", "query", "q", "q_lin", "q_a_proj", "q_b_proj"), "attention query"),
    **dict.fromkeys(("k_proj", "wk", "key", "k", "k_lin"), "attention key"),
    **dict.fromkeys(("v_proj", "wv", "value", "v", "v_lin"), "attention value"),
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_b_proj", "kv_proj"), "attention key-value"),
    **dict.fromkeys(
        ("qkv_proj", "query_key_value", "c_attn", "wqkv", "qkv", "att_proj", "in_proj"),
        "attention query-key-value",
    ),
    **dict.fromkeys(("o_proj", "out_proj", "c_proj", "wo", "dense", "o", "out_lin", "attn_out"), "attention output"),
    **dict.fromkeys(
        ("sinks", "rotary_emb", "inv_freq", "bias", "masked_bias", "relative_attention_bias"),
        "attention other",
    ),
}
MLP_WORDS: dict[str, Role] = {
    **dict.fromkeys(
        ("gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "w1", "w3", "wi", "wi_0", "wi_1"),
        "mlp in",
    ),
    **dict.fromkeys(("dense_h_to_4h", "up_gate_proj", "input_linear", "lin1", "ff_proj"), "mlp in"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "c_proj", "w2", "wo", "lin2", "ff_out"), "mlp out"),
    **dict.fromkeys(("dense_4h_to_h", "output_linear"), "mlp out"),
}
TOKEN_WORDS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "tok_embeddings",
    "token_embedding",
    "shared",
)
POSITION_WORDS = ("wpe", "position_embeddings", "embed_positions", "position_embedding", "pos_embed")
HEAD_WORDS = ("lm_head", "embed_out")
WEAK_HEAD_WORDS = ("output", "head", "decoder")  # count only with exactly the rows and width of the embedding
ROUTER_WORDS = ("gate", "router", "e_score_correction_bias")

# Last components of names that denote the values of a module, not the module itself; quantised forms included.
LEAVES = (
    *("weight", "bias", "qweight", "qzeros", "scales", "g_idx", "blocks", "absmax", "input_scale"),
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point"),
)
# The leaves that hold values; the rest are scales and the like, which must not be taken for a projection.
VALUES = ("weight", "qweight", "weight_packed", "blocks")
NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")  # six digits at most: no stack is deeper, and int() stays cheap
NORM = re.compile(r"norm|^ln(_|\d|$)")
ATTENTION = re.compile(r"attn|attention|^att_")
CROSS_ATTENTION = re.compile(r"cross|encdec")

Shapes = Mapping[str, StoredTensor]
Parts = Sequence[str]


@dataclass(frozen=True)
class HeadShape:
    """The heads of a layer, as slices of its attention output projection's input.

    name: the output projection, (hidden, n·d), or (n·d, hidden) if `transposed` (GPT-2's Conv1D).
    head_dim: d, the projection's input width / n; that of values, if keys have another width (DeepSeek's MLA).

    Query head h owns the input slice [h·d, (h+1)·d). Numbers are None if neither config nor shapes determine them.
    """

    name: str
    transposed: bool
    n_heads: int | None
    n_kv_heads: int | None
    head_dim: int | None


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of a layer, their routers, and the experts that every token passes (`shared`).

    down: the matrices that compute the experts' outputs: one per expert, in order; or one tensor of all, if they are
        fused into 3-D tensors (n, …, …) or stacked into 2-D ones (n·…, …).
    """

    layout: Literal["per-expert", "fused"]
    n_experts: int
    names: tuple[str, ...]
    down: tuple[str, ...]
    routers: tuple[str, ...]
    shared: tuple[str, ...]


def parts_of(name: str) -> list[str]:
    """Return the components of a name, in lower case."""
    return name.lower().split(".")


def word_of(parts: Parts) -> str:
    """Return the module's last word: "q_proj" of self_attn.q_proj.weight, "bias" of GPT-2's mask attn.bias."""
    module = list(parts)
    while len(module) > 1 and module[-1] in LEAVES:
        leaf = module.pop()
    return leaf if len(module) < len(parts) and ATTENTION.fullmatch(module[-1]) else module[-1]


def tower_of(name: str, towers: Container[str]) -> str | None:
    """Return the one of `towers` (prefixes) that `name` is under; of nested ones the outermost."""
    # Looked up prefix by prefix: names may be many, and so may towers.
    end = name.find(".")
    while end >= 0:
        if (prefix := name[:end]) in towers:
            return prefix
        end = name.find(".", end + 1)
    return None


def roles_outside(
    tensors: Shapes, towers: Container[str], config: Mapping[str, Any], notes: list[str]
) -> dict[str, Role]:
    """Return the roles of the tensors outside the layers, as far as they have one.

    A tensor counts as having a row per token only where both its name and its number of rows say so.
    """
    words = {name: word_of(parts_of(name)) for name in tensors}
    vocabulary = number(config, ("vocab_size",))
    named = [n for n in tensors if words[n] in TOKEN_WORDS + HEAD_WORDS and len(tensors[n].shape) == 2]
    rows_seen = Counter(tensors[name].shape[0] for name in named)

    def per_token(rows: int) -> bool:
        # Padded vocabularies have more rows than the config says; without enough rows, a second matrix of the same
        # size (an output head beside the embedding) still shows that they are tokens.
        return vocabulary is None or rows >= vocabulary or rows_seen[rows] > 1

    roles: dict[str, Role] = {}
    embedding_shapes = set()
    for name in named:
        rows = tensors[name].shape[0]
        if per_token(rows):
            roles[name] = "lm head" if words[name] in HEAD_WORDS else "token embedding"
            embedding_shapes.add(tensors[name].shape)
        if rows != vocabulary and vocabulary is not None and tower_of(name, towers) is None:
            verdict = "" if per_token(rows) else ", so its rows are not taken for tokens"
            notes.append(f"{name} has {rows:,} rows, the config a vocab_size of {vocabulary:,}{verdict}")
    token_counts = {rows for rows, _ in embedding_shapes}
    for name, tensor in tensors.items():
        if name in roles:
            continue
        is_head = words[name] in HEAD_WORDS and tensor.shape[:1] and tensor.shape[0] in token_counts
        if (words[name] in WEAK_HEAD_WORDS and tensor.shape in embedding_shapes) or (
            is_head and len(tensor.shape) == 1
        ):
            roles[name] = "lm head"
        elif tower_of(name, towers) is not None:
            roles[name] = "tower"
        elif words[name] in POSITION_WORDS:
            roles[name] = "position embedding"
        elif NORM.search(words[name]) and len(tensor.shape) < 2:
            roles[name] = "norm"
    return roles


def experts_of(parts: Mapping[str, Parts], tensors: Shapes, config: Mapping[str, Any]) -> ExpertLayer | None:
    """Return the experts of one layer, whose tensors' names are given in `parts`; None if it is dense.

    Experts of attention (JetMoE's) are left out: they are not feed-forward experts, and have routers of their own.
    """
    parts = {name: words for name, words in parts.items() if not any(ATTENTION.search(word) for word in words)}
    inside: dict[int, list[str]] = {}
    fused: list[str] = []
    for name, words in parts.items():
        after = words[words.index("experts") + 1] if "experts" in words[:-1] else ""
        if NUMBER.fullmatch(after):
            inside.setdefault(int(after), []).append(name)
        elif "experts" in words:
            fused.append(name)
    layout: Literal["per-expert", "fused"] = "per-expert" if inside else "fused"
    if inside:
        # With gaps, as in a part of a model, a number in a name would not be the router's.
        if sorted(inside) != list(range(len(inside))):
            return None
        n = len(inside)
        names = [name for index in sorted(inside) for name in inside[index]]
        down = [name for name in names if _is_down(parts[name]) and len(tensors[name].shape) == 2]
    else:
        # Without the word "experts", only 3-D tensors with as many parts as the config has experts qualify.
        stated = number(config, N_EXPERTS)
        solid = [name for name in fused or parts if len(tensors[name].shape) > 2]
        counts = Counter(tensors[name].shape[0] for name in solid if fused or tensors[name].shape[0] == stated)
        if counts:
            ((n, _),) = counts.most_common(1)
            names = [name for name in fused or solid if tensors[name].shape[:1] == (n,)]
            down = [name for name in names if _is_down(parts[name]) and len(tensors[name].shape) > 2]
        elif stated is not None and (stacked := _stacked(fused, tensors, stated)):
            n, names = stated, stacked
            down = [name for name in names if _is_down(parts[name])]
        else:
            return None
    own = frozenset(names)
    routers = [
        name
        for name, words in parts.items()
        if name not in own and any(word in ROUTER_WORDS for word in words) and n in tensors[name].shape
    ]
    shared = [n for n, words in parts.items() if any("shared_expert" in w or "shared_mlp" in w for w in words)]
    return ExpertLayer(layout, n, tuple(names), tuple(down), tuple(routers), tuple(shared))


def _stacked(names: Sequence[str], tensors: Shapes, n: int) -> list[str]:
    """Return those of `names` that are matrices of n experts' rows, one expert after the other (DBRX)."""
    shapes = {name: tensors[name].shape for name in names}
    return [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] > n and shape[0] % n == 0]


def _is_down(parts: Parts) -> bool:
    word = word_of(parts)
    values = parts[-1] in VALUES or parts[-1] == word
    return values and MLP_WORDS.get(word.removesuffix("_blocks").removesuffix("_weight")) == "mlp out"


def roles_of(parts: Mapping[str, Parts], tensors: Shapes, experts: ExpertLayer | None) -> dict[str, Role]:
    """Return the role of every tensor of one layer that has one."""
    roles: dict[str, Role] = {}
    for name, words in parts.items():
        word = word_of(words)
        if NORM.search(word) and len(tensors[name].shape) < 3:
            roles[name] = "norm"
        elif any(ATTENTION.search(part) for part in words):
            if word in ATTENTION_WORDS:
                roles[name] = ATTENTION_WORDS[word]
        elif word in MLP_WORDS and "experts" not in words:
            roles[name] = MLP_WORDS[word]
    if experts:
        roles |= dict.fromkeys(experts.names, "expert")
        roles |= dict.fromkeys(experts.routers, "router")
        roles |= dict.fromkeys(experts.shared, "shared expert")
    return roles


def heads_of(
    parts: Mapping[str, Parts],
    roles: Mapping[str, Role],
    tensors: Shapes,
    hidden: int | None,
    config: Mapping[str, Any],
) -> HeadShape | None:
    """Return the heads of one layer; None unless exactly one matrix is its self-attention's output projection."""
    matrices: dict[Role, str] = {}
    outputs = []
    for name, role in roles.items():
        plain = parts[name][-1] in ("weight", word_of(parts[name]))  # scales of quantised weights are 2-D too
        crossing = any(CROSS_ATTENTION.search(part) for part in parts[name])
        if plain and len(tensors[name].shape) == 2 and tensors[name].is_float and not crossing:
            matrices[role] = name
            outputs += [name] if role == "attention output" else []
    queries = matrices.keys() & {"attention query", "attention query-key-value"}
    # An output projection writes to the residual stream, so one side has its width.
    if len(outputs) != 1 or not queries or hidden not in tensors[outputs[0]].shape:
        return None
    shapes = {role: tensors[name].shape for role, name in matrices.items()}
    transposed = _is_transposed(shapes, hidden)
    width = shapes["attention output"][0 if transposed else 1]
    n = number(config, N_HEADS) or _heads_by_shape(parts, roles, tensors, width)
    if n is None or width % n:
        return HeadShape(outputs[0], transposed, None, None, None)
    kv = _kv_heads(shapes, transposed, n, width // n, config)
    return HeadShape(outputs[0], transposed, n, kv, width // n)


def _is_transposed(shapes: Mapping[Role, tuple[int, ...]], hidden: int | None) -> bool:
    """Return whether matrices are stored (in, out); if the projection is square, by those beside it."""
    reads: tuple[Role, ...] = ("attention query-key-value", "mlp in", "attention key", "attention value")
    writes: tuple[Role, ...] = ("attention output", "mlp out")
    # The first matrix that is not square decides: a square one fits both ways.
    for role in (*writes, *reads):
        if role in shapes and (shapes[role][0] == hidden) != (shapes[role][1] == hidden):
            return (shapes[role][0] == hidden) == (role in reads)
    return False


def _heads_by_shape(parts: Mapping[str, Parts], roles: Mapping[str, Role], tensors: Shapes, width: int) -> int | None:
    """Return the number of heads without a config: sinks have a value per head, query norms one head's width."""
    for name in roles:
        word, size = word_of(parts[name]), tensors[name].n_elements
        if word == "sinks" and size:
            return size
        if word in ("q_norm", "q_layernorm") and 0 < size < width and width % size == 0:
            return width // size
    return None


def _kv_heads(
    shapes: Mapping[Role, tuple[int, ...]], transposed: bool, n: int, d: int, config: Mapping[str, Any]
) -> int | None:
    out = 1 if transposed else 0
    stated = number(config, N_KV_HEADS)
    for role in ("attention value", "attention key"):
        if role in shapes:
            count, left = divmod(shapes[role][out], d)
            return count if count and not left and n % count == 0 else None
    # n heads of queries, and as many of values as of keys.
    if "attention query-key-value" in shapes:
        count, left = divmod(shapes["attention query-key-value"][out] - n * d, 2 * d)
        return count if count > 0 and not left and n % count == 0 else None
    return stated
