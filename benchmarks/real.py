"""Real models through every capability, against transformers: `make test-real`.

SmolLM2-135M-Instruct and Gemma 3 270M (see `real_models.py`), and two tunes of each, made on the spot: a few steps on
the code and on the documentation of Python's standard library. Every claim is checked, and the run ends with exit code
1 where one does not hold; perplexities, seconds and memory are printed as tables. Usage:

    python benchmarks/real.py [--models smollm2,gemma3] [--only vectors,methods,…] [--mergekit PATH/TO/mergekit-yaml]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import table
from merge import BEST_FLAGS
from real_models import GEMMA3, SMOLLM2, RealModel, fetch, tune
from safetensors.torch import load_file
from torch import Tensor
from transfer import machine, remove

from merges.methods import METHODS
from surgery.evaluation.perplexity import read_text

MODELS: dict[str, RealModel] = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
STEPS = 12
TEXTS = {"code": "lab:python/code-held", "docs": "lab:python/docs-held"}
HELD_TOKENS = 1024  # of each text, in one window
CONTEXT = 96  # tokens of the sequences that logits are compared on
# Parameters without a default, and those that do nothing by default.
WEIGHTED = (
    *("linear", "nuslerp", "multislerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
)
SPARSE = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
OTHER_PARAMETERS: dict[str, dict[str, float]] = {
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.001},
    "sce": {"select_topk": 0.5},
}
# Other random numbers than mergekit's, or an order of sums that decides between equal candidates.
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@dataclass
class Family:
    """A real model and its tunes: name → folder."""

    name: str
    base: Path
    code: Path
    docs: Path
    tokens: Mapping[str, list[int]]
    failures: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Where outputs go."""
        return self.base.parent / f"{self.base.name}-work"

    def check(self, claim: str, *, holds: bool, found: str = "") -> None:
        """Prints a claim and whether it holds."""
        print(f"- {'yes' if holds else 'NO '} {claim}{f': {found}' if found else ''}", flush=True)
        if not holds:
            self.failures.append(f"{self.name}: {claim}: {found}")

    def close(self, claim: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        """Checks that the largest difference is at most `tolerance` of the largest value."""
        difference = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        self.check(
            claim, holds=difference <= tolerance, found=f"{difference:.1e} of the largest, allowed {tolerance:.0e}"
        )

    def load(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
        """The model in `folder`, by transformers alone."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def logits(self, model: Any) -> Tensor:
        """On the first tokens of both texts, (2, tokens, vocabulary) in fp32."""
        with torch.inference_mode():
            rows = torch.tensor([tokens[:CONTEXT] for tokens in self.tokens.values()])
            return model(input_ids=rows).logits.float()

    def perplexities(self, model: Any) -> tuple[float, ...]:
        """Of each held-out text, by transformers alone."""
        found = []
        for tokens in self.tokens.values():
            ids = torch.tensor([tokens])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, :-1].float()
            found.append(math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()))
        return tuple(found)


def surgery(*words: object) -> tuple[float, float]:
    """Seconds and peak MB of a command."""
    return timed_apart([str(Path(sys.executable).parent / "surgery"), *map(str, words)])


def timed_apart(command: list[str]) -> tuple[float, float]:
    """`timed` in a small process: a child's peak memory counts from its parent's, and this one holds models."""
    line = [sys.executable, "-c", _TIMED, str(Path(__file__).parent), *command]
    seconds, memory = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(seconds), float(memory)


_TIMED = "import sys; sys.path.insert(0, sys.argv[1]); from transfer import timed; print(*timed(sys.argv[2:]))"


def make_family(name: str) -> Family:
    """The models, and the tokens of the held-out texts."""
    from transformers import AutoTokenizer

    base = fetch(MODELS[name])
    tunes = {}
    for number, kind in enumerate(TEXTS):
        documents = read_text(Path(f"lab:python/{kind}")).documents
        tunes[kind] = tune(base, documents[:400], base.with_name(f"{base.name}-{kind}"), steps=STEPS, seed=number)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = {}
    for kind, ref in TEXTS.items():
        ids = tokenizer("\n\n".join(read_text(Path(ref)).documents))["input_ids"]
        tokens[kind] = ids[:HELD_TOKENS]
    family = Family(name, base, tunes["code"], tunes["docs"], tokens)
    shutil.rmtree(family.work, ignore_errors=True)
    family.work.mkdir()
    return family


def perplexity(family: Family) -> None:
    """`surgery eval --perplexity` against a loop over transformers' logits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.base)
    text = family.work / "held.txt"
    text.write_text(tokenizer.decode(family.tokens["docs"][1:700]), encoding="utf-8")
    program = str(Path(sys.executable).parent / "surgery")
    line = [program, "eval", str(family.base), "--perplexity", str(text), "--json"]
    answer = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    score = next(row for row in answer["scores"] if row["metric"] == "perplexity")
    ids = torch.tensor([tokenizer(text.read_text(encoding="utf-8"))["input_ids"]])
    model = family.load(family.base, dtype=torch.bfloat16)  # as eval loads it: in the dtype that it is stored in
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1].float()
    exact = math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    family.check(
        "eval --perplexity is what transformers' logits give",
        holds=math.isclose(score["value"], exact, rel_tol=1e-4),
        found=f"{score['value']:.4f} / {exact:.4f}",
    )


def vectors(family: Family) -> None:
    """extract, apply and transfer against the formula in float64."""
    base, code, docs = (load_file(folder / "model.safetensors") for folder in (family.base, family.code, family.docs))
    vector, back, moved = (family.work / name for name in ("vector", "back", "moved"))
    spent = [surgery("vector", "extract", family.code, family.base, "-o", vector)]
    spent.append(surgery("vector", "apply", vector, family.base, "-o", back))
    spent.append(surgery("vector", "transfer", family.code, family.base, family.docs, "-o", moved))
    restored = load_file(back / "model.safetensors")
    counted = json.loads((vector / "surgery.json").read_text())["report"]["inexact_elements"]
    lost = sum(int((restored[name] != code[name]).sum()) for name in code)
    # In fp32 a difference cannot hold a value that is 2¹⁶ times smaller than what it is taken from.
    family.check(
        "base + (code − base) is the code model, but for the values that the report counts",
        holds=lost <= counted <= 1e-4 * sum(tensor.numel() for tensor in code.values()),
        found=f"{lost} differ, {counted} counted",
    )
    found = load_file(moved / "model.safetensors")
    exact = {n: (docs[n].double() + code[n].double() - base[n].double()).to(torch.bfloat16) for n in docs}
    family.check(
        "docs + (code − base) is the formula in float64", holds=all(torch.equal(found[n], exact[n]) for n in exact)
    )
    rows = [("base", *family.perplexities(family.load(family.base)), "", "")]
    rows += [
        (n, *family.perplexities(family.load(f)), "", "") for n, f in (("code", family.code), ("docs", family.docs))
    ]
    seconds, memory = spent[2]
    rows.append(("docs + (code − base)", *family.perplexities(family.load(moved)), f"{seconds:.1f}", f"{memory:.0f}"))
    _perplexity_table(f"{family.name}: vectors", rows)
    for folder in (vector, back, moved):
        remove(folder)


def methods(family: Family, mergekit: str | None) -> None:
    """All methods of merging, each loaded by transformers; mergekit beside where it is given."""
    rows = []
    for name in METHODS:
        config = _config(family, name)
        out, theirs = family.work / "merged", family.work / "mergekit"
        seconds, memory = surgery("merge", config, "-o", out)
        model = family.load(out)
        values = family.perplexities(model)
        family.check(f"{name} loads and computes", holds=all(map(math.isfinite, values)))
        row = [name, *values, f"{seconds:.1f}", f"{memory:.0f}"]
        if mergekit:
            seconds, memory = timed_apart([mergekit, str(config), str(theirs), *BEST_FLAGS])
            ours, other = _weights(out), _weights(theirs)
            worst = max(_difference(ours[n], other[n]) for n in ours)
            if name not in RANDOM:
                # An ulp of bf16 where both round the same number from two sides.
                family.check(f"{name} agrees with mergekit", holds=worst <= 2**-7, found=f"{worst:.1e}")
            row += [f"{seconds:.1f}", f"{memory:.0f}", f"{worst:.0e}"]
            remove(theirs)
        rows.append(tuple(row))
        remove(out)
    more = ("mergekit s", "mergekit MB", "largest difference") if mergekit else ()
    _perplexity_table(f"{family.name}: merges of code and docs", rows, more)


def ensemble(family: Family) -> None:
    """`merge logits` against the mean of the members' logits."""
    from transformers import AutoModelForCausalLM

    out = family.work / "ensemble"
    surgery("merge", "logits", family.code, family.docs, "-o", out)
    members = [family.logits(family.load(folder)) for folder in (family.code, family.docs)]
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    family.close("an ensemble's logits are the mean of its members'", family.logits(model), sum(members) / 2, 1e-4)
    remove(out)


def heads(family: Family) -> None:
    """`edit heads` against a hook on the output projection's input."""
    from surgery.checkpoint.resolve import open_checkpoint
    from surgery.checkpoint.structure import model_structure

    out, layer, head = family.work / "edited", 3, 1
    surgery("edit", "heads", family.base, "--head", f"L{layer}H{head}", "--no-measure", "-o", out)
    shape = model_structure(open_checkpoint(str(family.base))).output_projections[layer]
    assert shape.head_dim is not None
    begin = head * shape.head_dim
    model = family.load(family.base)

    def cut(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = inputs[0].clone()
        kept[..., begin : begin + shape.head_dim] = 0
        return (kept, *inputs[1:])

    projection = model.get_submodule(shape.name.removesuffix(".weight"))
    with projection.register_forward_pre_hook(cut):
        expected = family.logits(model)
    family.close("a head cut in the weights is a head cut by a hook", family.logits(family.load(out)), expected, 1e-5)
    remove(out)


def depth(family: Family) -> None:
    """`grow add` and a merge of layer ranges against the same model with its layers rearranged in memory."""
    deeper = family.work / "deeper"
    surgery("grow", "add", family.base, "--layers", 2, "--at", "middle", "--init", "identity", "-o", deeper)
    plain = family.load(family.base)
    family.close(
        "layers that compute the identity change nothing",
        family.logits(family.load(deeper)),
        family.logits(plain),
        1e-5,
    )
    remove(deeper)
    count = len(plain.model.layers)
    cut = count // 3
    order = [*range(count), *range(cut, count)]
    slices = [{"sources": [{"model": str(family.base), "layer_range": [a, count]}]} for a in (0, cut)]
    config = family.work / "stack.yml"
    config.write_text(json.dumps({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}))
    # Gemma's layers attend to a window or to everything in turn: that of a moved layer comes with it.
    surgery("merge", config, "-o", deeper)
    stacked = family.load(deeper)
    family.check("a passthrough merge has all its layers", holds=len(stacked.model.layers) == len(order))
    expected = _rearranged(plain, order)
    family.close(
        "a passthrough merge is its layers in that order", family.logits(stacked), family.logits(expected), 1e-4
    )
    remove(deeper)


def probes(family: Family) -> None:
    """Hidden states and the attribution of heads against transformers' own hidden states."""
    from probes.data.examples import TokenSequence
    from probes.model.activations import hidden_states_at
    from probes.model.residual_stream import trace_residual_stream
    from probes.refusal.heads.attribution import attribute_heads
    from surgery.checkpoint.resolve import open_checkpoint
    from surgery.models.loaded_model import attach_structure
    from surgery.models.loading import load_model

    live = attach_structure(load_model(family.base, family.name, dtype="float32"), open_checkpoint(str(family.base)))
    sequences = [
        TokenSequence(kind, tuple(tokens[:CONTEXT]), (CONTEXT // 2, CONTEXT - 4, CONTEXT, CONTEXT))
        for kind, tokens in family.tokens.items()
    ]
    last = [[CONTEXT - 1]] * len(sequences)
    found = hidden_states_at(live, sequences, last)
    plain = family.load(family.base)
    rows = torch.tensor([sequence.ids for sequence in sequences])
    with torch.inference_mode():
        states = plain(input_ids=rows, output_hidden_states=True).hidden_states
    # Of the last depth transformers returns what comes after the final norm.
    exact = torch.stack([state[:, -1] for state in states[:-1]], dim=1)
    family.close(
        "states of every depth are transformers'",
        found.reshape(*found.shape[:1], -1, found.shape[-1])[:, : exact.shape[1]],
        exact,
        1e-4,
    )
    weight = torch.randn(live.width, generator=torch.Generator().manual_seed(0))
    weight /= weight.norm()
    result = attribute_heads(live, sequences, weight, 0.3, stream=trace_residual_stream(live))
    family.close("what heads and MLPs write sums to the probe's logit", result.total, result.logit, 1e-4)


def _config(family: Family, name: str) -> Path:
    spec = METHODS[name].spec
    least, most = spec.models
    models = [family.code, family.docs][: most or 2]
    parameters = dict(OTHER_PARAMETERS.get(name, {}))
    parameters |= {"weight": 0.5} if name in WEIGHTED else {}
    parameters |= {"density": 0.5} if name in SPARSE else {}
    based = spec.base == "required"
    # A method of one model and a base has the other tune for its base.
    base = family.base if len(models) > 1 or name == "arcee_fusion" else family.docs
    config: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(model)} for model in ([base, *models] if name == "slerp" else models)],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    if based:
        config["base_model"] = str(base)
    assert len(models) >= least
    path = family.work / f"{name}.yml"
    path.write_text(json.dumps(config))
    return path


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))


def _rearranged(model: Any, order: list[int]) -> Any:
    """The model with its layers in `order`, as copies that know their new numbers."""
    import copy

    layers = [copy.deepcopy(model.model.layers[old]) for old in order]
    for new, layer in enumerate(layers):
        layer.self_attn.layer_idx = new
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(order)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[old] for old in order]
    return model


def _perplexity_table(title: str, rows: list[tuple[Any, ...]], more: tuple[str, ...] = ()) -> None:
    texts = [f"perplexity, {kind}" for kind in TEXTS]
    shown = [tuple(f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row) for row in rows]
    table(title, ("", *texts, "seconds", "peak MB", *more), shown)


def main() -> None:
    """Runs the parts that were asked for on the models that were asked for."""
    parts: dict[str, Callable[..., None]] = {
        "perplexity": perplexity,
        "vectors": vectors,
        "methods": methods,
        "ensemble": ensemble,
        "heads": heads,
        "depth": depth,
        "probes": probes,
    }
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"))
    arguments = parser.parse_args()
    print(machine(), flush=True)
    disable_progress_bar()
    failures = []
    for name in arguments.models.split(","):
        family = make_family(name)
        print(f"\n## {MODELS[name].name} ({MODELS[name].licence})\n", flush=True)
        for part in arguments.only.split(","):
            parts[part](family, *([arguments.mergekit] if part == "methods" else []))
        remove(family.work)
        failures += family.failures
    if failures:
        raise SystemExit("\n".join(["", f"{len(failures)} claims do not hold:", *failures]))
    print("\nEvery claim holds.")


if __name__ == "__main__":
    main()
