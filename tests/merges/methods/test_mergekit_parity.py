"""Every method against mergekit itself, in float32; runs where MERGEKIT names its `mergekit-yaml`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.architectures import add_tokenizer, build, sibling
from torch import Tensor

from merges.config.parse import read_configs
from merges.methods.registry import METHODS
from merges.run import merge

MERGEKIT = os.environ.get("MERGEKIT")
pytestmark = pytest.mark.skipif(not MERGEKIT, reason="set MERGEKIT to the path of mergekit-yaml")

# Config without models → parameters of the models a, b, c, of which as many are merged; and whether there is a base.
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], bool]] = {
    "linear": ({}, [{"weight": 0.3}, {"weight": 0.5}, {"weight": 0.7}], False),
    "slerp": ({"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"value": 0.4}]}, [{}], True),
    "nuslerp": ({}, [{"weight": 0.3}, {"weight": 0.5}], False),
    "nuslerp with a base": ({}, [{"weight": 0.3}, {"weight": 0.5}], True),
    "nuslerp by rows": ({"nuslerp_flatten": False}, [{"weight": 0.3}, {"weight": 0.5}], False),
    "nuslerp by columns": (
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        [{"weight": 0.3}, {"weight": 0.5}],
        False,
    ),
    "multislerp": ({}, [{"weight": 0.3}, {"weight": 0.5}, {"weight": 0.7}], False),
    "multislerp with a base": ({}, [{"weight": 0.3}, {"weight": 0.5}, {"weight": 0.7}], True),
    "karcher": ({}, [{}, {}, {}], False),
    "model_stock": ({}, [{}, {}, {}], True),
    "model_stock by rows": ({"filter_wise": True}, [{}, {}, {}], True),
    "nearswap": ({"t": 0.001}, [{}], True),
    "arcee_fusion": ({}, [{}], True),
    "sce": ({"select_topk": 0.3}, [{}, {}, {}], True),
    "ram": ({"epsilon": 0.002}, [{}, {}, {}], True),
    "ramplus_tl": ({"epsilon": 0.002}, [{}, {}, {}], True),
    "task_arithmetic": ({"lambda": 0.9, "normalize": True}, [{"weight": 0.3}, {"weight": -0.5}, {"weight": 0.7}], True),
    "ties": (
        {},
        [{"weight": 0.3, "density": 0.5}, {"weight": 0.5, "density": 0.33}, {"weight": [0.1, 0.9], "density": 1.0}],
        True,
    ),
    "ties rescaled": (
        {"rescale": True, "normalize": False},
        [{"weight": 0.3, "density": 0.5}, {"weight": 0.5, "density": 0.33}],
        True,
    ),
    "breadcrumbs": (
        {},
        [{"weight": 0.3, "density": 0.5, "gamma": 0.1}, {"weight": 0.5, "density": 0.95, "gamma": 0.1}],
        True,
    ),
    "breadcrumbs_ties": (
        {},
        [{"weight": 0.3, "density": 0.5, "gamma": 0.0}, {"weight": 0.5, "density": 0.8}],
        True,
    ),
}
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    base = add_tokenizer(build("llama", folder / "base", dtype=torch.float32))
    for seed, name in enumerate("abc", start=1):
        sibling(base, folder / name, seed=seed, relative=0.05)
    return folder


def both(
    family: Path, out: Path, method: str, shared: dict[str, Any], models: list[dict[str, Any]], *, based: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What we make of a config, and what mergekit makes of it."""
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": shared}
    entries = [{"model": str(family / name), "parameters": params} for name, params in zip("abc", models, strict=False)]
    config["models"] = entries
    if based:
        config["base_model"] = str(family / "base")
    path = out / "c.yml"
    path.write_text(yaml.dump(config, sort_keys=False))
    merge(read_configs(path, methods={n: m.spec for n, m in METHODS.items()}), out / "ours", line=["surgery"])
    subprocess.run(
        [str(MERGEKIT), str(path), str(out / "theirs")],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    ours, theirs = ({}, {})
    for folder, held in ((out / "ours", ours), (out / "theirs", theirs)):
        for file in folder.glob("*.safetensors"):
            held.update(load_file(file))
    assert ours.keys() == theirs.keys()
    return ours, theirs


@pytest.mark.parametrize("label", CASES)
def test_the_same_values_as_mergekit(label: str, family: Path, tmp_path: Path) -> None:
    shared, models, based = CASES[label]
    ours, theirs = both(family, tmp_path, label.split()[0], shared, models, based=based)
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max())


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_keep_and_move_as_much_as_mergekit(method: str, family: Path, tmp_path: Path) -> None:
    ours, theirs = both(family, tmp_path, method, {}, [{"weight": 1.0, "density": 0.4}], based=True)
    base = load_file(family / "base/model.safetensors")
    for name in (name for name, tensor in theirs.items() if tensor.numel() > 1000):
        changes = [made[name] - base[name] for made in (ours, theirs)]
        kept = [float((change != 0).float().mean()) for change in changes]
        assert abs(kept[0] - kept[1]) < 6 * (0.24 / changes[0].numel()) ** 0.5
        norms = [float(change.abs().sum()) for change in changes]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
