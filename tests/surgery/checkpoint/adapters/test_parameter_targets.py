"""LoRA on the parameters of experts reads as PEFT merges it, whether a file has the experts fused or one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import assert_sliced_alike, edit_config, load_adapter, save_adapter, write_merged
from support.architectures import build
from support.merges import tensors_of

from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore:The following (rank|alpha)_pattern:RuntimeWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",
)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"target_parameters": BOTH, "target_modules": ["q_proj"], "r": 3}),
        ("mixtral", {"target_parameters": ["experts.down_proj"], "r": 2, "alpha_pattern": {"experts.down_proj": 5}}),
        ("qwen3_moe", {"target_parameters": BOTH, "use_rslora": True, "r": 2}),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"], "r": 2}),
        ("qwen2_moe", {"target_parameters": BOTH, "r": 2, "rank_pattern": {"experts.gate_up_proj": 4}}),
        ("gpt_oss", {"target_parameters": BOTH, "r": 3}),
        ("gpt_oss", {"target_parameters": ["7.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"], "r": 2}),
        ("llama", {"target_parameters": ["q_proj.weight", "self_attn.o_proj.weight"], "r": 2}),
    ],
    ids=str,
)
def test_parameters_read_as_peft_merges_them(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    dtype = torch.bfloat16 if options["r"] == 3 else torch.float32
    base = build(family, tmp_path / "base", dtype=dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **{"target_modules": [], **options})
    # In fp32: in bf16 PEFT rounds an update of parameters once more, before it is added.
    load_adapter(base, adapter, dtype=torch.float32).merge_and_unload().save_pretrained(tmp_path / "expected")
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(write_merged(adapter, tmp_path / "out"))
    plain = tensors_of(base)
    assert found.keys() == expected.keys() == plain.keys()
    moved = [name for name in plain if not torch.equal(found[name], plain[name])]
    assert any("expert" in name for name in moved) or family == "llama"
    for name, tensor in found.items():
        assert torch.equal(tensor, plain[name]) == torch.equal(expected[name], plain[name].float()), name
        bound = 2e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(tensor.float(), expected[name], rtol=bound, atol=2e-6, msg=name)


def test_slices_of_experts_are_those_of_the_whole(tmp_path: Path) -> None:
    for family in ("gpt_oss", "qwen3_moe"):
        base = build(family, tmp_path / family, dtype=torch.float32)
        options = {"target_modules": [], "target_parameters": BOTH, "r": 2}
        assert_sliced_alike(open_checkpoint(save_adapter(base, tmp_path / f"{family} adapter", **options)))


def test_parameters_that_the_base_lacks_are_refused(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=BOTH, r=2)
    dense = build("qwen3", tmp_path / "dense")
    with pytest.raises(
        SurgeryError, match=r"adapts 2 parameters of .*, of which the base has none\. Name the right base"
    ):
        open_checkpoint(f"{dense}+{adapter}")
    edit_config(adapter, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(SurgeryError, match="of which the base has down_proj"):
        open_checkpoint(adapter)
    edit_config(adapter, target_parameters=["mlp.experts.up_proj", "mlp.gate.weight"])
    with pytest.raises(SurgeryError, match="of which the base has none"):
        open_checkpoint(adapter)
