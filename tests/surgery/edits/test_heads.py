"""Heads scaled in the weights do what hooks do, touch nothing else, and can be undone to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, build
from torch import Tensor
from transformers import AutoModelForCausalLM

import surgery.engine.storage.journal
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head, by_layer
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.tensor_roles import HeadShape
from surgery.edits.common import NOT_MEASURED, EditNotes
from surgery.edits.heads import mean_heads, scale_heads
from surgery.edits.kernels import add_means, restore_blocks, scale_blocks, spread
from surgery.edits.undo_file import UNDO, undo
from surgery.engine.execution import execute
from surgery.engine.kernel import TensorSlice
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, copy_tensor, plan_files
from surgery.engine.verification import verify
from surgery.errors import SurgeryError

CHOSEN = (Head(0, 1), Head(1, 0), Head(1, 3))
PROMPTS = torch.tensor([[5, 17, 40, 8, 66, 12, 90], [7, 7, 31, 50, 4, 88, 23]])
WITH_BIAS = ("gpt2", "gpt_neox", "gpt_oss")  # families whose output projections have one


def heads_of(folder: Path) -> Mapping[int, HeadShape]:
    return model_structure(open_checkpoint(folder)).output_projections


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def live_projection(model: Any, name: str) -> Any:
    """The module that the checkpoint calls `name`; base models are stored with or without their prefix."""
    prefix = f"{model.base_model_prefix}."
    module = name.removesuffix(".weight")
    known = dict(model.named_modules())
    return next(known[path] for path in (module, prefix + module, module.removeprefix(prefix)) if path in known)


def hooked_logits(folder: Path, dtype: torch.dtype, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Logits of PROMPTS where `change(z, layer)` stands at the input (…, n, d) of every output projection."""
    model = load(folder, dtype)
    handles = []
    for layer, heads in heads_of(folder).items():

        def before(_: Any, inputs: tuple[Tensor], layer: int = layer, heads: HeadShape = heads) -> tuple[Tensor]:
            z = inputs[0].clone().unflatten(-1, (heads.n_heads, heads.head_dim))
            return (change(z, layer).flatten(-2),)

        handles.append(live_projection(model, heads.name).register_forward_pre_hook(before))
    with torch.inference_mode():
        logits: Tensor = model(PROMPTS).logits
    assert handles
    return logits


def logits_of(folder: Path, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = load(folder, dtype)(PROMPTS).logits
    return logits


def scaled(scale: float) -> Callable[[Tensor, int], Tensor]:
    def change(z: Tensor, layer: int) -> Tensor:
        z[..., list(by_layer(CHOSEN).get(layer, ())), :] *= scale
        return z

    return change


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def write_means(folder: Path, path: Path) -> dict[int, Tensor]:
    """Means for every layer: (n, d) drawn from a fixed seed, bf16-representable."""
    generator = torch.Generator().manual_seed(3)
    means = {
        layer: torch.randn(h.n_heads or 0, h.head_dim or 0, generator=generator).bfloat16().float()
        for layer, h in heads_of(folder).items()
    }
    save_file({f"layer.{layer}": mu for layer, mu in means.items()}, path)
    return means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_baked_zero_is_the_hook_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype=dtype)
    scale_heads(str(base), tmp_path / "out", scales=dict.fromkeys(CHOSEN, 0.0))
    baked = logits_of(tmp_path / "out", dtype)
    assert torch.equal(baked, hooked_logits(base, dtype, scaled(0.0)))
    assert not torch.equal(baked, logits_of(base, dtype))


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0])
def test_powers_of_two_are_exact_too(family: str, scale: float, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype=torch.bfloat16)
    scale_heads(str(base), tmp_path / "out", scales=dict.fromkeys(CHOSEN, scale))
    assert torch.equal(logits_of(tmp_path / "out", torch.bfloat16), hooked_logits(base, torch.bfloat16, scaled(scale)))


@pytest.mark.parametrize("family", WITH_BIAS)
def test_baked_means_are_the_hook_up_to_rounding(family: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype=torch.float32)
    means = write_means(base, tmp_path / "means.safetensors")
    report = mean_heads(str(base), tmp_path / "out", heads=CHOSEN, means=tmp_path / "means.safetensors")

    def change(z: Tensor, layer: int) -> Tensor:
        wanted = list(by_layer(CHOSEN).get(layer, ()))
        z[..., wanted, :] = means[layer][wanted]
        return z

    assert report.edited == 4
    torch.testing.assert_close(
        logits_of(tmp_path / "out", torch.float32), hooked_logits(base, torch.float32, change), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shard", [None, "10KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_only_the_named_blocks_change_and_undo_gives_every_byte_back(
    family: str, shard: str | None, tmp_path: Path
) -> None:
    base = build(family, tmp_path / "base", max_shard_size=shard)
    scales = {CHOSEN[0]: 0.0, CHOSEN[1]: -1.5, CHOSEN[2]: 0.3}
    report = scale_heads(str(base), tmp_path / "out", scales=scales)
    old, new = weights(base), weights(tmp_path / "out")
    projections = {heads_of(base)[layer].name: layer for layer in (0, 1)}
    assert report.edited == 2 and report.tensors == len(old) == len(new)
    for name, tensor in old.items():
        expected = tensor.clone()
        if name in projections:
            heads = heads_of(base)[projections[name]]
            assert heads.n_heads
            blocks = (
                expected.view(heads.n_heads, -1, tensor.shape[1])
                if heads.transposed
                else (expected.view(tensor.shape[0], heads.n_heads, -1).transpose(0, 1))
            )
            for head, scale in scales.items():
                if head.layer == projections[name]:
                    blocks[head.index] = (blocks[head.index].float() * scale).bfloat16() if scale else 0.0
        assert torch.equal(new[name].view(torch.uint8), expected.view(torch.uint8)), name
    touched = {file for file, names in files_of(base).items() if names & set(projections)}
    before, after = shards(base), shards(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == touched
    assert len(touched) < len(before) or shard is None
    assert verify(str(tmp_path / "out")).ok

    restored = undo(str(tmp_path / "out"), tmp_path / "restored")
    assert shards(tmp_path / "restored") == before
    assert restored.edited == 2
    assert restored.whole and report.whole
    assert restored.whole.updates == report.whole.delivered
    for side in ("config.json", "generation_config.json"):
        assert (tmp_path / "restored" / side).read_bytes() == (base / side).read_bytes()


def files_of(folder: Path) -> dict[str, set[str]]:
    return {path.name: set(load_file(path)) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_undo_restores_every_float_format_and_biases(dtype: torch.dtype, tmp_path: Path) -> None:
    base = build("gpt2", tmp_path / "base", dtype=dtype)
    write_means(base, tmp_path / "means.safetensors")
    report = mean_heads(str(base), tmp_path / "out", heads=CHOSEN, means=tmp_path / "means.safetensors")
    kept = load_file(tmp_path / "out" / UNDO)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in kept.items()} == {
        "transformer.h.0.attn.c_proj.bias": (dtype, (32,)),
        "transformer.h.0.attn.c_proj.weight": (dtype, (8, 32)),
        "transformer.h.1.attn.c_proj.bias": (dtype, (32,)),
        "transformer.h.1.attn.c_proj.weight": (dtype, (16, 32)),
    }
    undo(str(tmp_path / "out"), tmp_path / "restored")
    assert shards(tmp_path / "restored") == shards(base)
    assert report.whole and report.whole.updates > 0


def test_the_undo_file_holds_the_blocks_and_says_what_they_are(tmp_path: Path) -> None:
    base = build("qwen3", tmp_path / "base")
    scale_heads(str(base), tmp_path / "out", scales=dict.fromkeys(CHOSEN, 0.0))
    name = "model.layers.1.self_attn.o_proj.weight"
    old = weights(base)[name]
    assert torch.equal(load_file(tmp_path / "out" / UNDO)[name], torch.cat([old[:, :16], old[:, 48:]], dim=1))
    metadata = metadata_of(tmp_path / "out" / UNDO)
    assert metadata["model_surgery_undo"] == "1"
    manifest = json.loads((tmp_path / "out/surgery.json").read_text())
    edit = json.loads(metadata["edits"])[name]
    assert (edit["heads"], edit["n_heads"], edit["transposed"]) == ([0, 3], 4, False)
    assert edit["after"] == manifest["tensors"][name]["xxh3"]


def test_loaders_and_later_edits_do_not_take_the_undo_file_for_a_shard(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    weights_only = tmp_path / "named" / "weights.safetensors"  # found by its suffix alone
    weights_only.parent.mkdir()
    (base / "model.safetensors").rename(weights_only)
    (base / "config.json").rename(weights_only.parent / "config.json")
    scale_heads(str(weights_only.parent), tmp_path / "out", scales={Head(0, 0): 0.0})
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(load_file(weights_only))
    scale_heads(str(tmp_path / "out"), tmp_path / "twice", scales={Head(0, 1): 0.0})
    undo(str(tmp_path / "twice"), tmp_path / "once")
    assert shards(tmp_path / "once") == shards(tmp_path / "out")
    undo(str(tmp_path / "out"), tmp_path / "restored")
    assert (tmp_path / "restored/weights.safetensors").read_bytes() == weights_only.read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_edited_as_part_of_the_weights(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    ref = f"{base}+{tmp_path / 'adapter'}"
    whole = open_checkpoint(ref)
    sides = whole.side_files
    copies = plan_files([copy_tensor(tensor) for tensor in whole.tensors.values()], like=whole)
    execute(Plan({}, {"model": whole}, copies, sides), tmp_path / "merged", ExecutionOptions(), finish=lambda *_: None)
    assert shards(tmp_path / "merged") != shards(base)
    scale_heads(ref, tmp_path / "out", scales=dict.fromkeys(CHOSEN, 0.0))
    scale_heads(str(tmp_path / "merged"), tmp_path / "expected", scales=dict.fromkeys(CHOSEN, 0.0))
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    undo(str(tmp_path / "out"), tmp_path / "restored")
    assert shards(tmp_path / "restored") == shards(tmp_path / "merged")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_a_killed_edit_resumes_to_identical_bytes(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
        monkeypatch.setattr(f"{module}.SEGMENT", 300)
    base = build("qwen2", tmp_path / "base", max_shard_size="20KB")
    scales = {CHOSEN[0]: 0.0, CHOSEN[2]: 0.7}
    append = surgery.engine.storage.journal.Journal.append
    left = after

    def counted(
        self: surgery.engine.storage.journal.Journal, record: surgery.engine.storage.journal.SegmentRecord
    ) -> None:
        nonlocal left
        if left == 0:
            raise StoppedError
        left -= 1
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(surgery.engine.storage.journal.Journal, "append", counted)
        with pytest.raises(StoppedError):
            scale_heads(str(base), tmp_path / "out", scales=scales, options=ExecutionOptions(threads=1))
    assert not (tmp_path / "out").exists()
    resumed = scale_heads(str(base), tmp_path / "out", scales=scales, options=ExecutionOptions(threads=2))
    scale_heads(str(base), tmp_path / "fresh", scales=scales, options=ExecutionOptions(threads=1))
    assert (resumed.resumed_bytes > 0) == (after > 0)
    files = sorted(path.relative_to(tmp_path / "fresh") for path in (tmp_path / "fresh").rglob("*") if path.is_file())
    assert UNDO in files
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes(), file


@pytest.mark.parametrize("file", ["a", "b"])
def test_undo_is_the_same_however_it_is_cut(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = {"a": "gemma2", "b": "gpt2"}[file]
    base = build(family, tmp_path / "base")
    for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
        monkeypatch.setattr(f"{module}.SEGMENT", 77)
    monkeypatch.setattr("surgery.engine.work.computation.BLOCK", 10)
    scale_heads(str(base), tmp_path / "out", scales=dict.fromkeys(CHOSEN, 0.25))
    undo(str(tmp_path / "out"), tmp_path / "restored")
    assert shards(tmp_path / "restored") == shards(base)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.booleans())
GAMMAS = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-4, 4, width=32))


@given(shape=SHAPES, data=st.data())
@settings(deadline=None)
def test_kernels_agree_with_float64_wherever_the_tensor_is_cut(
    shape: tuple[int, int, int, bool], data: st.DataObject
) -> None:
    n, d, out, transposed = shape
    scales = tuple(data.draw(st.lists(GAMMAS, min_size=n, max_size=n)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn((n * d, out) if transposed else (out, n * d), generator=generator)
    exact = weight.double()
    factors = torch.tensor(scales, dtype=torch.float64).repeat_interleave(d)
    exact = exact * (factors[:, None] if transposed else factors)
    pieces, kept = [], []
    inside = torch.tensor([scale != 1 for scale in scales]).repeat_interleave(d)
    flags = inside[:, None].expand(-1, out) if transposed else inside.expand(out, -1)
    changed = tuple(h for h in range(n) if scales[h] != 1)
    begin = 0
    while begin < weight.numel():
        end = min(begin + data.draw(st.integers(1, weight.numel())), weight.numel())
        place = TensorSlice("w", begin, tuple(weight.shape))
        piece = weight.flatten()[begin:end]
        pieces.append(scale_blocks([piece], place, scales=scales, transposed=transposed))
        restored = restore_blocks([pieces[-1], piece], place, heads=changed, n_heads=n, transposed=transposed)
        assert torch.equal(restored, piece)
        own = spread(torch.tensor([scale != 1 for scale in scales]), place, end - begin, transposed=transposed)
        kept.append(own)
        begin = end
    found = torch.cat(pieces).view_as(weight)
    assert torch.equal(torch.cat(kept).view_as(weight), flags)
    # Half an ulp of the one rounding; numbers below the normal ones lose up to the smallest of these.
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-24 + 2.0**-149).all()
    zero = torch.tensor(scales) == 0
    zeros = found[zero.repeat_interleave(d)] if transposed else found[:, zero.repeat_interleave(d)]
    assert (zeros.contiguous().view(torch.int32) == 0).all()
    bias, means = torch.randn(out, generator=generator), torch.randn(n, d, generator=generator)
    moved = add_means([bias, weight, means], heads=changed, transposed=transposed)
    blocks = (weight.T if transposed else weight).reshape(out, n, d).double()
    reference = bias.double() + torch.einsum("ond,nd->o", blocks[:, list(changed)], means[list(changed)].double())
    torch.testing.assert_close(moved, reference, rtol=1e-12, atol=1e-12)


def test_infinite_weights_of_a_removed_head_become_zeros(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 8:16] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    scale_heads(str(base), tmp_path / "out", scales={Head(0, 1): 0.0})
    made = weights(tmp_path / "out")["model.layers.0.self_attn.o_proj.weight"]
    assert (made[:, 8:16].contiguous().view(torch.int16) == 0).all()
    with pytest.raises(SurgeryError, match=r"8 of 1,024 values from element 0 on are NaN or infinite"):
        scale_heads(str(base), tmp_path / "other", scales={Head(0, 2): 0.0})


def test_the_report_counts_the_update_of_the_scaled_columns(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float32)
    report = scale_heads(str(base), tmp_path / "out", scales={Head(0, 1): 0.25, Head(0, 2): 1.0})
    weight = weights(base)["model.layers.0.self_attn.o_proj.weight"].double()
    assert report.whole and report.edited == 1 and report.preflight["heads"] == "1 in 1 of 2 layers"
    assert (report.whole.updates, report.whole.delivered) == (32 * 8, 32 * 8)
    assert report.whole.update_norm == pytest.approx(0.75 * weight[:, 8:16].norm().item(), rel=1e-6)
    assert report.whole.relative == pytest.approx(0.75 * (weight[:, 8:16].norm() / weight.norm()).item(), rel=1e-6)
    assert [group.name for group in report.groups] == ["layer 0"]


def test_what_is_measured_goes_into_manifest_and_card(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    seen: list[list[str]] = []

    def measure(folder: Path) -> EditNotes:
        seen.append(sorted(path.name for path in folder.iterdir()))
        assert torch.equal(logits_of(folder, torch.bfloat16), hooked_logits(base, torch.bfloat16, scaled(0.0)))
        return EditNotes({"refusal": 0.75}, "| refusal |\n|---|\n| 0.75 |")

    scale_heads(str(base), tmp_path / "out", scales=dict.fromkeys(CHOSEN, 0.0), measure=measure)
    assert {"config.json", "model.safetensors"} <= set(seen[0])
    report = json.loads((tmp_path / "out/surgery.json").read_text())["report"]
    assert report["measured"] == {"refusal": 0.75}
    assert report["heads"] == {"L0H1": 0.0, "L1H0": 0.0, "L1H3": 0.0}
    card = (tmp_path / "out/README.md").read_text()
    assert "| refusal |\n|---|\n| 0.75 |" in card and NOT_MEASURED not in card


def test_a_refused_result_leaves_nothing_behind(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")

    def measure(folder: Path) -> EditNotes:
        raise SurgeryError("refusal fell from 0.90 to 0.10", where="measured")

    with pytest.raises(SurgeryError, match=r"^measured: refusal fell from 0.90 to 0.10$"):
        scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0}, measure=measure)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_interrupted_measurement_keeps_the_weights_for_the_next_run(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")

    def measure(folder: Path) -> EditNotes:
        raise StoppedError

    with pytest.raises(StoppedError):
        scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0}, measure=measure)
    report = scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0})
    assert report.resumed_bytes == sum(t.numel() * 2 for t in weights(base).values())


def test_the_card_names_heads_scales_method_and_the_way_back(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    scale_heads(str(base), tmp_path / "out", scales={Head(1, 2): 0.5, Head(0, 1): 0.0, Head(0, 3): 0.0})
    card = (tmp_path / "out/README.md").read_text()
    assert "arXiv:2510.06036" in card and NOT_MEASURED in card
    assert "| γ | heads |\n|---|---|\n| 0 | L0H1, L0H3 |\n| 0.5 | L1H2 |" in card
    assert f"surgery edit heads {base} -o OUT --head L0H1=0.0 --head L0H3=0.0 --head L1H2=0.5" in card
    assert "`undo/undo.safetensors` holds what they were, and `surgery edit undo` puts it back" in card
    scale_heads(str(base), tmp_path / "one", scales={Head(1, 2): 0.5, Head(0, 1): 0.5})
    assert "-o OUT --head L0H1 --head L1H2 --scale 0.5" in (tmp_path / "one/README.md").read_text()


def test_the_card_of_means_names_their_file(tmp_path: Path) -> None:
    base = build("gpt_oss", tmp_path / "base")
    path = tmp_path / "means.safetensors"
    write_means(base, path)
    mean_heads(str(base), tmp_path / "out", heads=CHOSEN, means=path)
    card = (tmp_path / "out/README.md").read_text()
    assert "| output | heads |\n|---|---|\n| μ | L0H1, L1H0, L1H3 |" in card
    assert f"--head L0H1 --head L1H0 --head L1H3 --means {path}" in card
    assert "replaced by their means (z ← μ)" in card


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    report = scale_heads(str(base), tmp_path / "out", scales=dict.fromkeys(CHOSEN, 0.0), dry_run=True)
    assert (report.edited, report.dry_run, report.preflight["heads"]) == (2, True, "3 in 2 of 2 layers")
    assert "disk" in report.preflight
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def reconfigure(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def without_projections(folder: Path, *layers: int) -> None:
    """Drops the output projections of a one-file model's `layers`."""
    dropped = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in layers}
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if name not in dropped}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_fault_of_a_request_is_named_at_once(tmp_path: Path) -> None:
    base = build("qwen2", tmp_path / "base")
    without_projections(base, 1)
    scales = {Head(9, 1): 0.0, Head(0, 4): 0.0, Head(1, 0): 0.0, Head(2, 1): float("nan"), Head(2, 0): float("inf")}
    with pytest.raises(SurgeryError) as caught:
        scale_heads(str(base), tmp_path / "out", scales=scales)
    assert str(caught.value).split("\n  ") == [
        "edit heads: L2H0: got γ = inf, expected a finite number.",
        "L2H1: got γ = nan, expected a finite number.",
        "L0H4: layer 0 has the heads 0 to 3.",
        "L1H0: layer 1 has no attention output projection that is recognised (linear attention and Mamba have none); "
        "layers that have: 0, 2.",
        "L9H1: there is no layer 9, expected 0 to 2.",
    ]
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("scales", "text"),
    [
        ({}, "edit heads: no heads were given. Name them: --head L12H7."),
        ({Head(0, 0): 1.0, Head(1, 1): 1.0}, "edit heads: nothing to do: every γ is 1."),
        ({Head(0, -1): 0.0}, "edit heads: L0H-1: layer 0 has the heads 0 to 3."),
    ],
)
def test_a_request_for_nothing_is_refused(scales: dict[Head, float], text: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    with pytest.raises(SurgeryError) as caught:
        scale_heads(str(base), tmp_path / "out", scales=scales)
    assert (str(caught.value), caught.value.exit_code) == (text, 2)


def test_models_without_recognised_heads_are_refused(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    single = base / "model.safetensors"
    with pytest.raises(SurgeryError) as caught:
        scale_heads(str(single), tmp_path / "out", scales={Head(0, 0): 0.0})
    assert str(caught.value) == (
        "edit heads: L0H0: neither config nor shapes say how many heads model.layers.0.self_attn.o_proj.weight "
        "[32, 32] is cut into. Give the folder with its config.json, and num_attention_heads in it."
    )
    assert caught.value.exit_code == 1
    without_projections(base, 0, 1)
    with pytest.raises(SurgeryError) as caught:
        scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0, Head(1, 0): 0.0})
    assert str(caught.value) == (
        f"edit heads: {base} has no attention output projection that is recognised in any layer."
    )


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    reconfigure(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        SurgeryError, match=r"is quantised \(gptq\), and its stored values are not its weights"
    ) as caught:
        scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0})
    assert caught.value.exit_code == 1


def test_means_need_a_bias_to_hold_them(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    write_means(base, tmp_path / "means.safetensors")
    with pytest.raises(SurgeryError) as caught:
        mean_heads(str(base), tmp_path / "out", heads=CHOSEN, means=tmp_path / "means.safetensors")
    assert str(caught.value) == (
        "edit heads: model.layers.0.self_attn.o_proj.weight, model.layers.1.self_attn.o_proj.weight: mean ablation "
        "adds a constant to the residual stream, and this projection has no bias to hold it. Use --scale 0, which "
        "needs none."
    )


def test_means_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = build("gpt2", tmp_path / "base")
    path = tmp_path / "means.safetensors"
    save_file({"layer.0": torch.zeros(8, 4)}, path)
    with pytest.raises(SurgeryError) as caught:
        mean_heads(str(base), tmp_path / "out", heads=CHOSEN, means=path)
    assert str(caught.value).split("\n  ") == [
        f'edit heads: {path}: "layer.0" is F32 [8, 4], expected floats [4, 8]: a row per head.',
        f'{path}: has no "layer.1" (it has layer.0).',
    ]
    with pytest.raises(SurgeryError, match=r"none.safetensors: cannot be read \(No such file or directory\)"):
        mean_heads(str(base), tmp_path / "out", heads=CHOSEN, means=tmp_path / "none.safetensors")


def test_an_edit_never_overwrites(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    with pytest.raises(SurgeryError, match=r"out: exists already. Choose another folder, or add --overwrite"):
        (tmp_path / "out").mkdir()
        scale_heads(str(base), tmp_path / "out", scales={Head(0, 0): 0.0})
    with pytest.raises(SurgeryError, match="lies inside the model"):
        scale_heads(str(base), base / "out", scales={Head(0, 0): 0.0})
