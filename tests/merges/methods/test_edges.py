"""Where formulas have no answer or several: what each method then does, decided once and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merges.methods.registry import METHODS
from surgery.errors import SurgeryError

Merge = Callable[..., Any]
CUTS = {"segment": 60, "block": 20}
SPARSIFYING = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear", "della")
REQUIRED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.1}}


def given(method: str, models: int, **more: object) -> dict[str, Any]:
    """The parameters that `method` cannot do without, and `more`."""
    weighted = METHODS[method].spec.parameter("weight") is not None
    return {**({"weight": (0.5,) * models} if weighted else {}), **REQUIRED.get(method, {}), **more}


def count_of(method: str) -> int:
    least, most = METHODS[method].spec.models
    return max(least, min(most or 3, 3))


def is_based(method: str) -> bool:
    return METHODS[method].spec.base != "none"


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", ["zeros", "noise"])
def test_models_that_are_all_the_same_stay_as_they_are(method: str, value: str, merge: Merge) -> None:
    tensor = noise(9, 13) if value == "noise" else torch.zeros(9, 13)
    models = [{"t": tensor}] * count_of(method)
    params = given(method, len(models))
    out = merge(method, models, models[0] if is_based(method) else None, params=params, **CUTS).tensors["t"]
    torch.testing.assert_close(out, tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["multislerp", "nuslerp"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_tensors_have_no_direction_and_stay_zero(method: str, eps: float, merge: Merge) -> None:
    models = [{"t": torch.zeros(5)}] * count_of(method)
    params = given(method, len(models), **({"eps": eps} if method == "multislerp" else {}))
    assert not merge(method, models, params=params).tensors["t"].any()


@pytest.mark.parametrize("method", METHODS)
def test_huge_values_whose_squares_overflow_stay_finite(method: str, merge: Merge) -> None:
    models = [{"t": noise(9, 13, seed=i, scale=1e25)} for i in range(count_of(method) + 1)]
    base = models.pop() if is_based(method) else None
    out = merge(method, models, base, params=given(method, len(models)), **CUTS).tensors["t"]
    assert torch.isfinite(out).all()


def test_opposite_directions_have_no_mean_but_for_two_models(merge: Merge) -> None:
    x = noise(40)
    two = merge("multislerp", [{"t": x}, {"t": -x}], params={"weight": (0.5, 0.5)}).tensors["t"]
    assert torch.equal(two, torch.zeros(40))
    three = [{"t": x}, {"t": -x}, {"t": x}]
    with pytest.raises(SurgeryError, match="t: the models' directions cancel under these weights") as caught:
        merge("multislerp", three, params={"weight": (1.0, 2.0, 1.0)})
    assert "Use other weights, or another method" in str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_opposite_task_vectors_meet_on_the_chord(seed: int, merge: Merge) -> None:
    # Rounding may leave their angle short of 180° by 1e-8; on the arc that is noise times 1e8.
    delta = noise(200, seed=seed)
    for scale in (1.0, 2.0, 0.5):
        models, base = [{"t": delta}, {"t": -scale * delta}], {"t": torch.zeros(200)}
        out = merge("nuslerp", models, base, params={"weight": (0.75, 0.25)}).tensors["t"]
        torch.testing.assert_close(out, (0.75 - 0.25 * scale) * delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signs", [(1, -1), (1, 1, -1), (1, -1, 1, -1)])
def test_karcher_ignores_what_lies_opposite(signs: tuple[int, ...], merge: Merge) -> None:
    x = noise(60)
    out = merge("karcher", [{"t": sign * x} for sign in signs], params={}).tensors["t"]
    torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-6)


def test_karcher_takes_the_mean_of_what_is_too_short_for_a_direction(merge: Merge) -> None:
    models = [{"t": torch.full((4,), 1e-7)}, {"t": torch.full((4,), 3e-7)}]
    torch.testing.assert_close(merge("karcher", models, params={}).tensors["t"], torch.full((4,), 2e-7))


@pytest.mark.parametrize("method", SPARSIFYING)
@pytest.mark.parametrize("paper", [False, True])
def test_density_0_is_the_base_and_density_1_drops_nothing(method: str, paper: bool, merge: Merge) -> None:
    base, models = {"t": noise(9, 13)}, [{"t": noise(9, 13, seed=i)} for i in (1, 2)]
    none = merge(method, models, base, params=given(method, 2, density=0.0, paper=paper), **CUTS)
    assert torch.equal(none.tensors["t"], base["t"])
    assert [none.outcome.sums["t"][f"kept.{i}"] for i in (0, 1)] == [0, 0]
    params = given(method, 2, density=1.0, paper=paper, normalize=False)
    every = merge(method, models, base, params=params, **CUTS)
    assert [round(every.outcome.sums["t"][f"kept.{i}"]) for i in (0, 1)] == [117, 117]
    if method in ("dare_linear", "breadcrumbs", "della_linear"):
        plain = merge("task_arithmetic", models, base, params=given("task_arithmetic", 2), **CUTS)
        assert torch.equal(every.tensors["t"], plain.tensors["t"])


@pytest.mark.parametrize("method", [*SPARSIFYING, "task_arithmetic"])
def test_weights_of_0_leave_the_base(method: str, merge: Merge) -> None:
    base, models = {"t": noise(9, 13)}, [{"t": noise(9, 13, seed=i)} for i in (1, 2)]
    params = {"weight": (0.0, 0.0), "density": 0.5}
    assert torch.equal(merge(method, models, base, params=params, **CUTS).tensors["t"], base["t"])


def test_gamma_0_drops_no_outlier_and_gamma_1_as_many_as_the_density_leaves(merge: Merge) -> None:
    base, model = {"t": torch.zeros(10)}, {"t": torch.arange(1.0, 11.0)}
    params = {"weight": (1.0,), "density": (0.4,)}
    largest = merge("breadcrumbs", [model], base, params={**params, "gamma": 0.0}).tensors["t"]
    assert largest.tolist() == [0, 0, 0, 0, 0, 0, 7, 8, 9, 10]
    smallest = merge("breadcrumbs", [model], base, params={**params, "gamma": 1.0}).tensors["t"]
    assert smallest.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]


def test_magnitude_keeps_one_element_at_any_positive_density(merge: Merge) -> None:
    params = {"weight": (1.0,), "density": (1e-9,)}
    out = merge("ties", [{"t": torch.tensor([1.0, 3.0, -3.0])}], {"t": torch.zeros(3)}, params=params).tensors["t"]
    assert out.tolist() == [0, 3, 0]


def test_a_probability_next_to_1_keeps_and_a_tiny_one_is_divided_by_as_dealt(merge: Merge) -> None:
    row = torch.arange(1.0, 9.0).expand(500, 8).contiguous()
    params = {"weight": (1.0,), "density": (0.9,), "epsilon": (0.1 - 1e-9,), "rescale": False}
    out = merge("della_linear", [{"t": row}], {"t": torch.zeros(500, 8)}, params=params).tensors["t"]
    assert (out[:, -1] == 8).all()
    ones = {"t": torch.ones(1 << 20)}
    params = {"weight": (1.0,), "density": (1e-7,), "paper": True}
    out = merge("dare_linear", [ones], {"t": torch.zeros(1 << 20)}, params=params).tensors["t"]
    assert set(out.unique().tolist()) == {0.0, 65536.0}
    assert float(out.mean()) == pytest.approx(1, abs=4 / 16**0.5)  # 16 are expected to be kept


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_rescale_false_is_heeded_in_the_papers_way_too(method: str, merge: Merge) -> None:
    base, model = {"t": torch.zeros(9, 13)}, {"t": noise(9, 13)}
    params = {"weight": (1.0,), "density": (0.5,), "rescale": False, "paper": True}
    out = merge(method, [model], base, params=params, **CUTS).tensors["t"]
    assert torch.equal(out[out != 0], model["t"][out != 0])


def test_the_papers_vote_is_on_what_is_not_weighted_yet(merge: Merge) -> None:
    base = {"t": torch.zeros(1)}
    models = [{"t": torch.tensor([3.0])}, {"t": torch.tensor([-2.0])}]
    params = {"weight": (0.25, 1.0), "normalize": False}
    assert merge("ties", models, base, params=params).tensors["t"].item() == -2.0
    assert merge("ties", models, base, params={**params, "paper": True}).tensors["t"].item() == 0.75


def test_one_model_varies_nowhere_so_that_sce_selects_nothing(merge: Merge) -> None:
    base, model = {"t": noise(9, 13)}, {"t": noise(9, 13, seed=1)}
    assert torch.equal(merge("sce", [model], base, params={"select_topk": 0.5}).tensors["t"], base["t"])
    torch.testing.assert_close(merge("sce", [model], base, params={}).tensors["t"], model["t"])


def test_models_that_changed_nothing_amplify_nothing(merge: Merge) -> None:
    base = {"t": noise(9, 13)}
    out = merge("ramplus_tl", [base, base], base, params={"epsilon": 0.0})
    assert torch.equal(out.tensors["t"], base["t"])
    assert [out.outcome.sums["t"][f"kept.{i}"] for i in (0, 1)] == [0, 0]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce", "arcee_fusion", "dare_ties", "slerp", "karcher"])
def test_nan_in_the_inputs_stops_the_merge_with_its_own_message(method: str, merge: Merge) -> None:
    # More of them than are kept: the cut itself lies among NaN.
    models = [{"t": torch.full((9, 13), float("nan"))}, {"t": noise(9, 13)}][: count_of(method)]
    more = {"density": 0.3} if method in SPARSIFYING else {"select_topk": 0.3} if method == "sce" else {}
    params = given(method, len(models), **more)
    with pytest.raises(SurgeryError, match=r"values .* are NaN or infinite"):
        merge(method, models, {"t": noise(9, 13, seed=1)} if is_based(method) else None, params=params, **CUTS)


@pytest.mark.parametrize("method", [*SPARSIFYING, "ram", "ramplus_tl", "arcee_fusion"])
@pytest.mark.parametrize("paper", [False, True])
def test_kept_is_how_many_elements_came_through(method: str, paper: bool, merge: Merge) -> None:
    count = min(count_of(method), 2)
    base, models = {"t": torch.zeros(23, 17)}, [{"t": noise(23, 17, seed=i)} for i in range(count)]
    more = {"density": 0.4} if method in SPARSIFYING else {"epsilon": 0.5} if method.startswith("ram") else {}
    for i in range(count):  # one model at a time shows what comes through; with the others the numbers must be the same
        mine = merge(method, [models[i]], base, params=given(method, 1, paper=paper, **more), **CUTS)
        assert round(mine.outcome.sums["t"]["kept.0"]) == int(torch.count_nonzero(mine.tensors["t"]))
    if count > 1 and method.startswith(("ties", "breadcrumbs", "ram")):
        both = merge(method, models, base, params=given(method, count, paper=paper, **more), **CUTS)
        last = mine.outcome.sums["t"]["kept.0"]
        assert both.outcome.sums["t"]["kept.1"] == pytest.approx(last)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_leave_their_inputs_alone(method: str, merge: Merge) -> None:
    # What is measured is measured of the inputs after the kernel has run.
    models = [{"t": noise(9, 13, seed=i)} for i in range(count_of(method))]
    base = {"t": noise(9, 13, seed=9)} if is_based(method) else None
    more = {"density": 0.5} if method in SPARSIFYING else {}
    sums = merge(method, models, base, params=given(method, len(models), **more), **CUTS).outcome.sums["t"]
    for i, model in enumerate(models):
        assert sums[f"squares.{i}"] == pytest.approx(float(model["t"].double().square().sum()), rel=1e-5)
    if base is not None:
        assert sums["base"] == pytest.approx(float(base["t"].double().square().sum()), rel=1e-5)
