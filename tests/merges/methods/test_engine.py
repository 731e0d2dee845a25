"""What the engine promises of every method: the same bytes however the work is cut, shared out or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import surgery.engine.storage.journal
from merges.methods.registry import METHODS
from merges.methods.sparsify import uniforms
from merges.methods.topk import THRESHOLDS, topk_passes
from surgery.engine.kernel import TensorSlice

Merge = Callable[..., Any]
PARAMS: dict[str, dict[str, Any]] = {
    **{name: {"weight": (0.5, 0.7), "density": (0.4, 0.8)} for name in ("ties", "dare_ties", "dare_linear", "della")},
    **{name: {"weight": (0.5, 0.7), "density": (0.4, 0.8)} for name in ("breadcrumbs", "della_linear")},
    "breadcrumbs_ties": {"weight": (0.5, 0.7), "density": (0.4, 0.8), "gamma": 0.1},
    "task_arithmetic": {"weight": (0.5, 0.7)},
    "linear": {"weight": (0.5, 0.7)},
    "multislerp": {"weight": (0.5, 0.7)},
    "nuslerp": {"weight": (0.5, 0.7)},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.1},
    "sce": {"select_topk": 0.4},
}
ALONE = ("slerp", "nearswap", "arcee_fusion", "passthrough")
BITWISE = sorted(set(METHODS) - {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"})


def inputs(method: str, seed: int = 0) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
    """Models of bf16 tensors, siblings as fine-tuning makes them, and a base where the method can have one."""
    generator = torch.Generator().manual_seed(seed)
    base = {"m": torch.randn(23, 17, generator=generator), "v": torch.randn(29, generator=generator)}
    count = 1 if method in ALONE else 2
    models = [
        {name: (x + 0.05 * torch.randn(x.shape, generator=generator)).bfloat16() for name, x in base.items()}
        for _ in range(count)
    ]
    has_base = METHODS[method].spec.base != "none"
    return models, {name: x.bfloat16() for name, x in base.items()} if has_base else None


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_a_bit(method: str, merge: Merge) -> None:
    models, base = inputs(method)
    one, three = (
        merge(method, models, base, params=PARAMS.get(method), threads=n, segment=60, block=20) for n in (1, 3)
    )
    assert all(torch.equal(one.tensors[name], three.tensors[name]) for name in one.tensors)
    assert one.outcome.sums == three.outcome.sums


@pytest.mark.parametrize("method", BITWISE)
def test_where_the_work_is_cut_does_not_change_a_bit(method: str, merge: Merge) -> None:
    # Not the methods whose coefficients are sums over the tensor: those differ in the order of the sum.
    models, base = inputs(method)
    params = {**PARAMS.get(method, {}), **({"rescale": False} if "rescale" in _names(method) else {})}
    whole = merge(method, models, base, params=params).tensors
    for segment, block in ((60, 20), (31, 7), (1, 1)):
        cut = merge(method, models, base, params=params, segment=segment, block=block).tensors
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("method", ["ties", "della", "slerp", "linear"])
def test_a_killed_merge_goes_on_and_damaged_segments_are_made_again(
    method: str, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, base = inputs(method)
    cuts = {"segment": 40, "block": 20, "params": PARAMS[method]}
    fresh = merge(method, models, base, out=tmp_path / "fresh", **cuts)
    append, left = surgery.engine.storage.journal.Journal.append, 10

    def counted(
        self: surgery.engine.storage.journal.Journal, record: surgery.engine.storage.journal.SegmentRecord
    ) -> None:
        nonlocal left
        if left == 0:
            raise RuntimeError("killed")
        left -= 1
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(surgery.engine.storage.journal.Journal, "append", counted)
        # All of "m" (10 segments) is in the journal by then, and nothing of "v".
        with pytest.raises(RuntimeError, match="killed"):
            merge(method, models, base, out=tmp_path / "again", **cuts)
    weights = tmp_path / "again/out.partial/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-700:-640] = bytes(60)  # the journal reached the disk, the data did not
    weights.write_bytes(data)
    resumed = merge(method, models, base, out=tmp_path / "again", **cuts)
    assert resumed.outcome.resumed_bytes > 0
    assert resumed.outcome.hashes == fresh.outcome.hashes
    assert (tmp_path / "again/out/model.safetensors").read_bytes() == (
        tmp_path / "fresh/out/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("method", ["ties", "dare_linear", "task_arithmetic", "linear", "sce", "della"])
def test_what_is_measured_is_what_counting_gives(method: str, merge: Merge) -> None:
    models, base = inputs(method)
    made = merge(method, models, base, params=PARAMS.get(method), segment=60, block=20)
    for name, out in made.tensors.items():
        sums = made.outcome.sums[name]
        for i, model in enumerate(models):
            x, y = model[name].double(), out.double()
            assert sums[f"squares.{i}"] == pytest.approx(float((x * x).sum()), rel=1e-5)
            assert sums[f"distance.{i}"] == pytest.approx(float((y - x).square().sum()), rel=1e-5)
            if base is not None:
                w = base[name].double()
                assert sums["base"] == pytest.approx(float((w * w).sum()), rel=1e-5)
                assert sums[f"update.{i}"] == pytest.approx(float((x - w).square().sum()), rel=1e-5)
        if method == "ties":
            assert [round(sums[f"kept.{i}"]) for i in (0, 1)] == [int(d * out.numel()) for d in (0.4, 0.8)]


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 1e-45, 1e-40, 0.125, 0.25, 0.2500001, 3.0, 1e38]), min_size=1, max_size=60)
    | st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60),
    k=st.integers(0, 60),
    piece=st.integers(1, 17),
)
def test_the_k_largest_are_found_with_ties_by_position(scores: list[float], k: int, piece: int) -> None:
    values = torch.tensor(scores, dtype=torch.float32)
    n, k = len(scores), min(k, len(scores))
    place = TensorSlice("t", 0, (n,))
    for one in topk_passes(lambda tensors, place: [tensors[0]], lambda place, positive: [(k,)]):
        gathered = [
            one.gather([values[at : at + piece]], TensorSlice("t", at, (n,), place.pass_results))
            for at in range(0, n, piece)
        ]
        place = TensorSlice("t", 0, (n,), {**place.pass_results, **one.reduce(gathered, place)})
    cut = place.pass_results[THRESHOLDS][0][0]
    found = np.concatenate([cut.largest(values[at : at + piece].numpy(), at) for at in range(0, n, piece)])
    wanted = np.zeros(n, bool)
    wanted[np.lexsort((np.arange(n), -values.numpy()))[:k]] = True
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.93])
def test_chance_keeps_the_density_and_the_mean(density: float, merge: Merge) -> None:
    n = 200_000
    generator = torch.Generator().manual_seed(1)
    base, model = {"t": torch.zeros(n)}, {"t": torch.randn(n, generator=generator)}
    spread = (density * (1 - density) / n) ** 0.5
    for method in ("dare_linear", "della_linear"):
        params = {"weight": (1.0,), "density": (density,), "seed": 5, "rescale": False}
        if method == "della_linear":
            params["epsilon"] = (0.05,)
        out = merge(method, [model], base, params=params).tensors["t"]
        kept = out != 0
        assert abs(float(kept.float().mean()) - density) < 4 * spread + 1e-5
        assert torch.equal(out[kept], model["t"][kept])
        rescaled = merge(method, [model], base, params={**params, "rescale": True}).tensors["t"]
        assert float(rescaled.abs().sum()) == pytest.approx(float(model["t"].abs().sum()), rel=1e-5)
        divided = merge(method, [model], base, params={**params, "rescale": True, "paper": True}).tensors["t"]
        error = float((divided - model["t"]).mean())
        assert abs(error) < 4 * float(((1 / density - 1) / n) ** 0.5) * 1.5


def test_dellas_probability_grows_with_the_rank_in_the_row(merge: Merge) -> None:
    rows, width = 4000, 50
    magnitude = torch.arange(1, width + 1).float().expand(rows, width).contiguous()
    params = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.3,), "rescale": False}
    out = merge("della_linear", [{"t": magnitude}], {"t": torch.zeros(rows, width)}, params=params).tensors["t"]
    kept = (out != 0).float().mean(dim=0)
    wanted = 0.2 + 0.6 * torch.arange(width) / (width - 1)
    assert float((kept - wanted).abs().max()) < 5 * (0.25 / rows) ** 0.5


def test_streams_of_other_tensors_models_and_seeds_are_independent_and_parts_agree() -> None:
    n = 100_000
    whole = uniforms(0, "t", 0, 0, n)
    assert np.array_equal(whole[1234:77_777], uniforms(0, "t", 0, 1234, 77_777))
    for other in (uniforms(1, "t", 0, 0, n), uniforms(0, "u", 0, 0, n), uniforms(0, "t", 1, 0, n)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 4 / n**0.5


def _names(method: str) -> set[str]:
    return {spec.name for spec in METHODS[method].spec.parameters}
