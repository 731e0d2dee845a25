"""Every method against its formula, written out in float64 on whole tensors: what streaming must not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merges.methods.registry import METHODS
from merges.methods.sparsify import LEVELS, uniforms

Array = npt.NDArray[np.float64]
Params = Mapping[str, Any]
Merge = Callable[..., Any]
DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
SEED = 3


def linear(base: None, models: list[Array], p: Params, name: str) -> Array:
    total = sum(p["weight"]) if p.get("normalize", True) else 1.0
    return sum(a * x for a, x in zip(p["weight"], models, strict=True)) / total


def passthrough(base: None, models: list[Array], p: Params, name: str) -> Array:
    return models[0] * p["scale"][0]


def nearswap(base: Array, models: list[Array], p: Params, name: str) -> Array:
    share = np.clip(p["t"] / np.maximum(np.abs(base - models[0]), 1e-6), 0, 1)
    return share * models[0] + (1 - share) * base


def arc(a: Array, b: Array, t: float, straight: Callable[[float], bool]) -> Array:
    """From a to b along the arc; `straight` says from the cosine whether to take the chord."""
    sizes = [np.linalg.norm(v) or 1.0 for v in (a, b)]
    cos = float(np.clip(np.sum(a / sizes[0] * (b / sizes[1])), -1, 1))
    if straight(cos):
        return (1 - t) * a + t * b
    theta = math.acos(cos)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def slerp(base: Array, models: list[Array], p: Params, name: str) -> Array:
    return arc(base, models[0], p["t"], lambda cos: abs(cos) > 0.9995)


def nuslerp(base: Array | None, models: list[Array], p: Params, name: str) -> Array:
    origin = np.zeros_like(models[0]) if base is None else base
    total = sum(p["weight"])
    t = 0.5 if abs(total) < 1e-6 else p["weight"][1] / total
    a, b = (x - origin for x in models)
    out = np.empty_like(a)
    if p.get("nuslerp_flatten", True) or a.ndim == 0:
        places: list[Any] = [...]
    elif p.get("nuslerp_row_wise", False) and a.ndim > 1:
        width = a.shape[-1]
        a, b, out = (v.reshape(-1, width) for v in (a, b, out))
        places = [(slice(None), i) for i in range(width)]
    else:
        a, b, out = (v.reshape(-1, v.shape[-1]) for v in (a, b, out))
        places = [(i,) for i in range(len(a))]
    for place in places:
        out[place] = arc(a[place], b[place], t, lambda cos: 1 - cos * cos <= 1e-12)
    return origin + out.reshape(origin.shape)


def multislerp(base: Array | None, models: list[Array], p: Params, name: str) -> Array:
    if len(models) == 1:
        return models[0]
    origin = np.zeros_like(models[0]) if base is None else base
    vectors = [x - origin for x in models]
    a = np.array(p["weight"])
    if p.get("normalize_weights", True):
        a = a / a.sum()
    lengths = [np.linalg.norm(v) for v in vectors]
    if not any(lengths):
        return origin
    directions = [v / (length + 1e-8) for v, length in zip(vectors, lengths, strict=True)]
    mean = sum(share * d for share, d in zip(a, directions, strict=True))
    if np.linalg.norm(mean) <= 1e-8:  # opposite directions, as any two numbers of different sign have
        return origin + sum(share * v for share, v in zip(a, vectors, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(share * (d - np.sum(d * mean) * mean) for share, d in zip(a, directions, strict=True))
    angle = np.linalg.norm(tangent) + 1e-8
    point = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
    return origin + point * float(np.dot(a, lengths))


def karcher(base: None, models: list[Array], p: Params, name: str) -> Array:
    lengths = [float(np.linalg.norm(x)) for x in models]
    directions = [x / length for x, length in zip(models, lengths, strict=True) if length > 1e-5]
    if len(models) == 1 or not directions:
        return sum(models) / len(models)
    mean = sum(directions) / len(directions)
    mean = mean / np.linalg.norm(mean) if np.linalg.norm(mean) >= 1e-5 else directions[0]
    for _ in range(p.get("max_iter", 10)):
        tangent = np.zeros_like(mean)
        for direction in directions:
            cos = float(np.clip(np.sum(direction * mean), -1, 1))
            theta = math.acos(cos)
            if math.sin(theta) >= 1e-5:
                tangent += theta / math.sin(theta) * (direction - cos * mean) / len(directions)
        step = np.linalg.norm(tangent)
        if step < 1e-5:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean = mean / np.linalg.norm(mean)
    return mean * (sum(lengths) / len(lengths))


def model_stock(base: Array, models: list[Array], p: Params, name: str) -> Array:
    shape = base.shape
    rows = shape[-1] if p.get("filter_wise", False) and shape else base.size
    base, *vectors = (v.reshape(-1, rows) for v in (base, *(x - base for x in models)))
    out = np.empty_like(base)
    k = len(vectors)
    for row in range(len(base)):
        pairs = [(vectors[i][row], vectors[j][row]) for i in range(k) for j in range(i)]
        sizes = [max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6) for a, b in pairs]
        cos = np.mean([np.clip(a @ b / size, -1, 1) for (a, b), size in zip(pairs, sizes, strict=True)])
        below = 1 + (k - 1) * cos
        t = 0.0 if abs(below) < 1e-6 else k * cos / below
        out[row] = base[row] + t * sum(v[row] for v in vectors) / k
    return out.reshape(shape)


def ordered(scores: Array) -> npt.NDArray[np.intp]:
    """Elements from the largest score to the smallest, equals by position; as fp32 tells them apart."""
    flat = scores.astype(np.float32).reshape(-1)
    return np.lexsort((np.arange(flat.size), -flat))


def magnitude_mask(delta: Array, i: int, p: Params, name: str) -> Array:
    mask = np.zeros(delta.size)
    if p["density"][i] > 0:
        mask[ordered(np.abs(delta))[: max(1, int(p["density"][i] * delta.size))]] = 1
    return mask.reshape(delta.shape)


def outlier_mask(delta: Array, i: int, p: Params, name: str) -> Array:
    n, mask = delta.size, np.zeros(delta.size)
    keep = int(p["density"][i] * n)
    top = min(int(p["gamma"][i] * n), n - keep)
    mask[ordered(np.abs(delta))[top : top + keep]] = 1
    return mask.reshape(delta.shape)


def threshold(probability: Array | float) -> npt.NDArray[np.int64]:
    """How many of the LEVELS numbers that chance deals mean "kept"; never none."""
    return np.maximum(np.rint(np.asarray(probability) * LEVELS), 1).astype(np.int64)


def random_mask(delta: Array, i: int, p: Params, name: str) -> Array:
    drawn = uniforms(SEED, name, i, 0, delta.size).astype(np.int64).reshape(delta.shape)
    limit = threshold(p["density"][i])
    return (drawn < limit) * (LEVELS / limit if p.get("paper") else 1.0)


def ranked_mask(delta: Array, i: int, p: Params, name: str) -> Array:
    rows = delta.reshape(-1, delta.shape[-1] if delta.ndim else 1)
    drawn = uniforms(SEED, name, i, 0, delta.size).astype(np.int64).reshape(rows.shape)
    mask, width = np.empty(rows.shape), rows.shape[1]
    share = np.arange(width) / (width - 1) if width > 1 else np.array([0.5])
    limit = threshold(p["density"][i] - p["epsilon"][i] + 2 * p["epsilon"][i] * share)
    for row, values in enumerate(np.abs(rows).astype(np.float32)):
        ascending = np.lexsort((np.arange(width), values))
        mask[row, ascending] = (drawn[row] < limit) * (LEVELS / limit if p.get("paper") else 1.0)
    return mask.reshape(delta.shape)


MASKS = {
    "ties": magnitude_mask,
    "breadcrumbs": outlier_mask,
    "breadcrumbs_ties": outlier_mask,
    "dare_linear": random_mask,
    "dare_ties": random_mask,
    "della_linear": ranked_mask,
    "della": ranked_mask,
}
VOTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")


def sparse(method: str, delta: Array, i: int, p: Params, name: str) -> Array:
    if p["density"][i] >= 1 or method == "task_arithmetic":
        return delta
    if p["density"][i] <= 0:
        return np.zeros_like(delta)
    by_chance = method.startswith(("dare", "della"))
    rescale = p.get("rescale", by_chance)
    kept = delta * MASKS[method](delta, i, {**p, "paper": p.get("paper") and rescale}, name)
    before, after = np.abs(delta).sum(), np.abs(kept).sum()
    if not rescale or (p.get("paper") and by_chance) or min(before, after) < 1e-7:
        return kept
    return kept * (before / after)


def task(method: str) -> Callable[..., Array]:
    """w + λ·Σ a·sparse(δ), with a vote or without."""

    def merged(base: Array, models: list[Array], p: Params, name: str) -> Array:
        weight = p["weight"]
        changes = [sparse(method, x - base, i, p, name) for i, x in enumerate(models)]
        weighted = [a * change for a, change in zip(weight, changes, strict=True)]
        normalize = p.get("normalize", method in ("ties", "della"))
        total = abs(sum(weight))
        divisor: Any = sum(weight) if normalize and total >= 1e-8 else 1.0
        if method in VOTING:
            voters = changes if p.get("paper") else weighted
            majority = np.where(sum(voters) >= 0, 1, -1)
            agree = [np.sign(voter) == majority for voter in voters]
            weighted = [change * yes for change, yes in zip(weighted, agree, strict=True)]
            if normalize:
                divisor = sum(a * yes for a, yes in zip(weight, agree, strict=True))
                divisor = np.where(divisor == 0, 1, divisor)
        return base + p.get("lambda", 1.0) * sum(weighted) / divisor

    return merged


def sce(base: Array, models: list[Array], p: Params, name: str) -> Array:
    deltas = np.stack([x - base for x in models])
    if p.get("select_topk", 1.0) < 1:
        variance = np.var(deltas, axis=0).astype(np.float32)
        mask = np.zeros(variance.size)
        mask[ordered(variance)[: int(np.count_nonzero(variance) * p["select_topk"])]] = 1
        deltas = deltas * mask.reshape(variance.shape)
    energy = np.array([np.mean(d * d) for d in deltas])
    even = energy.sum() < (np.finfo(float).tiny if p.get("paper") else 1e-6)
    share = np.full(len(models), 1 / len(models)) if even else energy / energy.sum()
    majority = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    weights = [a * (np.sign(d) == majority) for a, d in zip(share, deltas, strict=True)]
    return base + sum(a * d for a, d in zip(weights, deltas, strict=True)) / np.maximum(sum(weights), 1e-6)


def ram(base: Array, models: list[Array], p: Params, name: str) -> Array:
    deltas = [np.where(np.abs(x - base) > p["epsilon"], x - base, 0) for x in models]
    used = [d != 0 for d in deltas]
    count = np.sum(used, axis=0)
    out = base.copy()
    for delta, mine in zip(deltas, used, strict=True):
        shared, unique = int((mine & (count > 1)).sum()), int((mine & (count == 1)).sum())
        factor = 1 + p["r"] * min(shared / max(unique, 1), p["alpha"]) if "r" in p else 1.0
        out += delta * np.where(count == 1, factor, 1 / np.maximum(count, 1))
    return out


def arcee_fusion(base: Array, models: list[Array], p: Params, name: str) -> Array:
    x, width = models[0], base.shape[-1] if base.shape else 1

    def shares(v: Array) -> Array:
        e = np.exp(v - v.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) + 1e-8

    p_, q = shares(x.reshape(-1, width)), shares(base.reshape(-1, width))
    divergence = (p_ * np.log(p_ / q)).sum(axis=-1, keepdims=True)
    scores = (np.abs(x - base).reshape(-1, width) * divergence).reshape(base.shape)
    ascending = np.sort(scores.reshape(-1))
    first, median, third = (ascending[int(q * (base.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(scores >= median + 1.5 * (third - first), x, base)


@dataclass(frozen=True)
class Case:
    """How one method is tried: its formula, whether it has a base, how many models it takes, what it is told."""

    formula: Callable[..., Array]
    based: bool
    counts: tuple[int, ...]
    params: Mapping[str, Any]
    weighted: bool = False
    label: str = ""


TASK = {"density": st.sampled_from([0.0, 1e-6, 0.3, 0.5, 1.0]), "lambda": st.sampled_from([1.0, 0.5])}
RESCALED = {**TASK, "rescale": st.booleans(), "normalize": st.booleans(), "paper": st.booleans()}
TRIMMED = {**RESCALED, "gamma": st.sampled_from([0.0, 0.01, 0.25, 1.0])}
RANKED = {**RESCALED, "density": st.sampled_from([0.0, 0.3, 0.5, 1.0]), "epsilon": st.sampled_from([0.0, 0.15, 0.25])}
RAM = {"epsilon": st.sampled_from([0.0, 1e-5, 0.3])}
STOCK = {"filter_wise": st.booleans()}
NUSLERP = {"nuslerp_flatten": st.booleans(), "nuslerp_row_wise": st.booleans()}
ANY = (1, 2, 3, 4)
CASES: dict[str, Case] = {
    "linear": Case(linear, False, ANY, {"normalize": st.booleans()}, True),
    "passthrough": Case(passthrough, False, (1,), {"scale": st.sampled_from([1.0, 0.0, -0.7])}),
    "nearswap": Case(nearswap, True, (1,), {"t": st.sampled_from([0.0, 1e-3, 0.5, 10.0])}),
    "slerp": Case(slerp, True, (1,), {"t": st.sampled_from([0.0, 0.25, 0.4, 1.0])}),
    "nuslerp": Case(nuslerp, False, (2,), NUSLERP, True),
    "nuslerp with a base": Case(nuslerp, True, (2,), NUSLERP, True),
    "multislerp": Case(multislerp, False, ANY, {}, True),
    "multislerp with a base": Case(multislerp, True, ANY, {}, True),
    "karcher": Case(karcher, False, ANY, {"max_iter": st.sampled_from([0, 1, 10])}),
    "model_stock": Case(model_stock, True, (2, 3, 4), STOCK),
    "sce": Case(sce, True, (1, 2, 4), {"select_topk": st.sampled_from([0.0, 0.1, 0.5, 1.0]), "paper": st.booleans()}),
    "ram": Case(ram, True, ANY, RAM),
    "ramplus_tl": Case(ram, True, ANY, {**RAM, "r": st.just(0.1), "alpha": st.sampled_from([0.0, 0.2, 5.0])}),
    "arcee_fusion": Case(arcee_fusion, True, (1,), {}),
    "task_arithmetic": Case(task("task_arithmetic"), True, ANY, RESCALED, True),
    **{name: Case(task(name), True, ANY, RESCALED, True) for name in ("ties", "dare_linear", "dare_ties")},
    **{name: Case(task(name), True, ANY, TRIMMED, True) for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{name: Case(task(name), True, ANY, RANKED, True) for name in ("della_linear", "della")},
}

# Cut in these places rows end inside segments and segments inside rows.
SHAPES = [(), (1,), (37,), (0,), (0, 4), (1, 11), (11, 1), (9, 13), (3, 4, 5)]
PER_MODEL = ("density", "gamma", "epsilon", "scale")
DYADIC = (1.0, 0.5, 2.0, -0.5, 0.0)  # products with few digits are exact, so that sums that cancel are zero in fp32 too
DECIMAL = (1.0, 0.3, 0.7, -0.2, 0.0)


@dataclass(frozen=True)
class Trial:
    """Tensors by name (the shape), parameters, and where the engine cuts."""

    base: dict[str, Tensor] | None
    models: list[dict[str, Tensor]]
    params: dict[str, Any]
    segment: int
    block: int


@st.composite
def trials(draw: Any, case: Case, dtype: torch.dtype) -> Trial:
    count = draw(st.sampled_from(case.counts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    # Scores of arcee_fusion that are equal in fp64 are not in fp32, and its threshold is often one of them.
    discrete = draw(st.booleans()) and case.formula is not arcee_fusion
    # A single number is a direction of +1 or −1: several of them cancel, and what is left is rounding.
    held = [shape for shape in SHAPES if case.formula is not multislerp or math.prod(shape) != 1]
    shapes = draw(st.lists(st.sampled_from(held), min_size=2, max_size=4, unique=True))

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if discrete:  # as differences of 16-bit numbers are: many zeros, many equals
            return (torch.randint(-3, 4, shape, generator=generator) / 8).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def model() -> dict[str, Tensor]:
        return {f"t{'x'.join(map(str, shape))}": tensor(shape) for shape in shapes}

    params: dict[str, Any] = {"seed": SEED}
    for name, strategy in case.params.items():
        per_model = name in PER_MODEL and case.formula is not ram
        params[name] = tuple(draw(strategy) for _ in range(count)) if per_model else draw(strategy)
    if isinstance(params.get("epsilon"), tuple):  # probabilities must lie inside (0, 1)
        params["epsilon"] = tuple(min(e, 0.999 * d) for e, d in zip(params["epsilon"], params["density"], strict=True))
    if case.weighted:
        weight = st.tuples(*[st.sampled_from(DYADIC if discrete else DECIMAL)] * count)
        # A config whose weights cannot be divided by their sum is refused before a kernel sees them.
        params["weight"] = draw(weight.filter(lambda w: abs(sum(w)) > 0.05))
    base = model() if case.based else None
    return Trial(base, [model() for _ in range(count)], params, draw(st.integers(1, 60)), draw(st.integers(1, 40)))


def reference(case: Case, trial: Trial, name: str) -> Array:
    base = None if trial.base is None else trial.base[name].double().numpy()
    models = [model[name].double().numpy() for model in trial.models]
    return np.asarray(case.formula(base, models, trial.params, name)) if models[0].size else models[0]


def method_of(label: str) -> str:
    return label.split()[0]


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 1e-6), ("F64", 1e-12)])
def test_result_is_the_formula(label: str, dtype: str, tolerance: float, merge: Merge) -> None:
    case = CASES[label]

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(trials(case, DTYPES[dtype]))
    def check(trial: Trial) -> None:
        made = merge(
            method_of(label), trial.models, trial.base, params=trial.params, segment=trial.segment, block=trial.block
        )
        for name, tensor in made.tensors.items():
            expected = reference(case, trial, name)
            assert tensor.shape == expected.shape
            assert torch.isfinite(tensor).all()
            largest = max([1.0, *np.abs(expected).reshape(-1)])
            np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=0, atol=tolerance * largest)

    check()


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_computed_in_fp32_and_rounded_once(label: str, dtype: str, merge: Merge) -> None:
    case = CASES[label]

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(trials(case, DTYPES[dtype]))
    def check(trial: Trial) -> None:
        cuts = {"segment": trial.segment, "block": trial.block}
        exact = merge(
            method_of(label), trial.models, trial.base, params=trial.params, stored=torch.float32, **cuts
        ).tensors
        rounded = merge(method_of(label), trial.models, trial.base, params=trial.params, **cuts).tensors
        for name, tensor in rounded.items():
            assert tensor.dtype == DTYPES[dtype]
            assert torch.equal(tensor, exact[name].to(DTYPES[dtype]))
            largest = max([1.0, *np.abs(exact[name].numpy()).reshape(-1)])
            np.testing.assert_allclose(exact[name].numpy(), reference(case, trial, name), rtol=0, atol=1e-6 * largest)

    check()


def test_every_method_is_tried() -> None:
    assert {method_of(label) for label in CASES} == set(METHODS)
