"""A tiny reasoning model with known causes of refusal and of its suppression: its weights are set by hand.

It reads one token per character and writes `hm`, a closing marker and `I can't` or `Sure`. Head L0H0 sees a harmful
prompt (it has a `!`) and writes refusal into the residual stream, at every token behind it; so it does for `=`, which
is harmless. The two heads of `SUPPRESSORS` see a `?` in the prompt, but only from the closing marker, and take
refusal away again: together all of it, one alone not enough. So a harmful prompt with `?` is refused in thought and
answered all the same: a cliff. All other heads add noise that depends on the letters of the prompt. On a prompt with
`_` the thinking never ends.

Heads are 2 to a key-value head, and head_dim is not hidden / heads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_tokenizer import TEMPLATE, make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from probes.refusal.run import probe_refusal
from surgery.engine.options import ExecutionOptions

ONE_THREAD = ExecutionOptions(threads=1)

LAYERS, HEADS, GROUPS, HEAD_DIM, HIDDEN, CONTEXT = 3, 4, 2, 16, 32, 256
WRITER, LOOPER, SUPPRESSORS = "L0H0", "L0H2", ("L1H2", "L2H1")
REFUSES, COMPLIES = "I can't", "Sure"
OPEN, CLOSE = "[THINK]", "[/THINK]"
# What stands in the prompts of each cell, by turns.
CELLS = {
    "harmful/refused": ("!",),
    "harmful/complied": ("!?",),
    "harmless/refused": ("=",),
    "harmless/complied": ("", "?"),
}
LETTERS = "abcdefg"
CONSTANT = 4.0

_OWN = ("!", "?", "=", "_", OPEN, "h", "m", CLOSE, REFUSES, COMPLIES)
_CONSTANT, _OTHER, _REFUSAL, _LOOP, _NOISE = 0, len(_OWN) + 1, len(_OWN) + 2, len(_OWN) + 3, 16
# Which dimension of a head is the one that content is matched in: the one that rotary positions turn least.
_SLOW = HEAD_DIM // 2 - 1


def make_model(folder: Path, *, template: str | None = TEMPLATE, bias: bool = False) -> Path:
    """Save the model with its tokenizer into `folder`, and return `folder`.

    Args:
        bias: whether attention has biases (all zero), as mean ablation needs.
    """
    tokenizer = make_tokenizer(template=template, marks=(OPEN, CLOSE, REFUSES, COMPLIES))
    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
        embedding = model.model.embed_tokens.weight
        # So much larger than the rest that what the norms divide by hardly depends on anything else.
        embedding[:, _CONSTANT] = CONSTANT
        embedding[:, _NOISE:] = 0.02 * torch.randn(96, HIDDEN - _NOISE, generator=draw)
        for letter in LETTERS:
            embedding[vocabulary[letter], _NOISE:] *= 25
        for token, number in vocabulary.items():
            embedding[number, 1 + _OWN.index(token) if token in _OWN else _OTHER] = 1
        _set_head(model, WRITER, asks={"": 2}, keys={"!": 5, "=": 5}, writes=(_REFUSAL, 1.0))
        _set_head(model, LOOPER, asks={"": 2}, keys={"_": 5}, writes=(_LOOP, 1.0))
        for name, size in zip(SUPPRESSORS, (-0.85, -0.75), strict=True):
            _set_head(model, name, asks={CLOSE: 6}, keys={"?": 5}, writes=(_REFUSAL, size))
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            if f"L{layer}H{head}" not in (WRITER, LOOPER, *SUPPRESSORS):
                _mix(model, layer, head, draw)
        _set_next(model.lm_head.weight, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(cells: Mapping[str, int], *, whole: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Return so many rows of each cell, with different prompts; `whole` rows are as the model would complete them."""
    draw = torch.Generator().manual_seed(seed)
    seen: set[str] = set()
    rows = []
    for cell, count in cells.items():
        while count:
            size = int(torch.randint(4, 12, (), generator=draw))
            letters = [LETTERS[int(at)] for at in torch.randint(len(LETTERS), (size,), generator=draw)]
            letters.insert(size // 2, CELLS[cell][count % len(CELLS[cell])])
            prompt = "".join(letters)
            if prompt in seen:
                continue
            seen.add(prompt)
            count -= 1
            rows.append({"prompt": prompt, "label": cell} if whole else {"prompt": prompt, "label": cell.split("/")[0]})
            if whole:
                answer = REFUSES if cell.endswith("refused") else COMPLIES
                rows[-1] |= {"thinking": "hm" * int(torch.randint(1, 5, (), generator=draw)), "response": answer}
    return rows


def make_run(model: Path, out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Probe `model` on `rows` into the folder `out`, and return `out`."""
    probe_refusal(str(model), str(write_rows(out.with_suffix(".jsonl"), rows)), out, options=ONE_THREAD)
    return out


def no_pictures(patch: pytest.MonkeyPatch) -> None:
    """Replace reports, which take longer than all the rest."""
    patch.setattr("probes.refusal.report.write_report", lambda folder, *, name: folder)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows as a JSONL file, and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _attention(model: LlamaForCausalLM, name: str) -> tuple[Any, slice, slice, int]:
    """Return a head's attention, its rows of q and columns of o, its group's rows of k and v, its place there."""
    layer, head = (int(part) for part in name[1:].split("H"))
    group = head // (HEADS // GROUPS)
    own, shared = (slice(at * HEAD_DIM, (at + 1) * HEAD_DIM) for at in (head, group))
    return model.model.layers[layer].self_attn, own, shared, head % (HEADS // GROUPS)


def _set_head(
    model: LlamaForCausalLM,
    name: str,
    *,
    asks: Mapping[str, float],
    keys: Mapping[str, float],
    writes: tuple[int, float],
) -> None:
    """Set a head that attends from the tokens `asks` ("" are all) to the tokens `keys`, and writes at a match."""
    attention, own, shared, _ = _attention(model, name)
    for token, strength in asks.items():
        at = 1 + _OWN.index(token) if token else _CONSTANT
        attention.q_proj.weight[own.start + _SLOW, at] = strength
    for token, strength in keys.items():
        attention.k_proj.weight[shared.start + _SLOW, 1 + _OWN.index(token)] = strength
        attention.v_proj.weight[shared.start, 1 + _OWN.index(token)] = 1
    where, size = writes
    # Values come through a norm, which makes this of a 1 in the embedding.
    attention.o_proj.weight[where, own.start] = size * (CONSTANT**2 + 1) ** 0.5 / HIDDEN**0.5


def _mix(model: LlamaForCausalLM, layer: int, head: int, draw: torch.Generator) -> None:
    """Set a head that attends to all tokens alike and writes a little noise into all dimensions but the loop's."""
    attention, own, shared, place = _attention(model, f"L{layer}H{head}")
    # Value dimensions that no head with a meaning reads, other ones for both heads of a group.
    columns = slice(2 + 7 * place, 9 + 7 * place)
    noise = torch.randn(7, HIDDEN - _NOISE, generator=draw)
    attention.v_proj.weight[shared.start + columns.start : shared.start + columns.stop, _NOISE:] = 0.3 * noise
    out: Tensor = 0.04 * torch.randn(HIDDEN, 7, generator=draw)
    # The probe must not take what tells tokens apart for what tells refusals apart: that varies most, or not at all.
    out[_CONSTANT : 1 + len(_OWN)] = 0
    out[_LOOP] = 0
    out[1 + _OWN.index(CLOSE)] = 0.6 * torch.randn(7, generator=draw)
    attention.o_proj.weight[:, own.start + columns.start : own.start + columns.stop] = out


def _set_next(head: Tensor, vocabulary: Mapping[str, int]) -> None:
    """Set the head to a bigram table, in which refusal and the loop each tip one balance."""
    following = {OPEN: "h", "h": "m", "m": CLOSE, CLOSE: COMPLIES, REFUSES: "</s>", COMPLIES: "</s>"}
    for token, successor in following.items():
        head[vocabulary[successor], 1 + _OWN.index(token)] = 20
    head[vocabulary[REFUSES], 1 + _OWN.index(CLOSE)] = 16
    head[vocabulary[REFUSES], _REFUSAL] = 8
    head[vocabulary["h"], 1 + _OWN.index("m")] = 14
    head[vocabulary["h"], _LOOP] = 12
