"""Merges from config to loadable folder: every architecture, however it is run; refused before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import ARCHITECTURES, add_tokenizer, build, sibling
from support.merges import config_of, family, files_of, logits_of, run, set_tensor, tensors_of

import surgery.engine.execution
from merges.job import MergeJob
from surgery.errors import SurgeryError
from surgery.io.atomic import MANIFEST

LINEAR = """\
models:
  - {model: ⟨a⟩, parameters: {weight: 1.0}}
  - {model: ⟨b⟩, parameters: {weight: 0.3}}
merge_method: linear
dtype: float32
"""
SLERP = """\
slices:
  - sources:
      - {model: ⟨a⟩, layer_range: [0, 2]}
      - {model: ⟨b⟩, layer_range: [0, 2]}
merge_method: slerp
base_model: ⟨a⟩
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
"""
TIES = """\
models:
  - {model: ⟨a⟩, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - model: ⟨b⟩
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
merge_method: ties
base_model: ⟨base⟩
parameters: {normalize: true, int8_mask: true}
dtype: float16
"""
DARE_TIES = """\
models:
  - model: ⟨base⟩
  - {model: ⟨a⟩, parameters: {density: 0.53, weight: 0.4}}
  - {model: ⟨b⟩, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: ⟨base⟩
parameters: {int8_mask: true}
dtype: bfloat16
"""
FRANKEN = """\
slices:
  - sources: [{model: ⟨a⟩, layer_range: [0, 2]}]
  - sources: [{model: ⟨b⟩, layer_range: [1, 2]}]
  - sources: [{model: ⟨a⟩, layer_range: [1, 2], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
merge_method: passthrough
"""
STOCK = """\
models: [{model: ⟨a⟩}, {model: ⟨b⟩}]
base_model: ⟨base⟩
merge_method: model_stock
"""
UNION = """\
models:
  - {model: ⟨a⟩, parameters: {weight: 0.5}}
  - {model: ⟨other⟩, parameters: {weight: 0.5}}
merge_method: linear
tokenizer_source: union
"""
LORA = """\
models:
  - {model: ⟨a⟩, parameters: {weight: 0.6}}
  - {model: ⟨base⟩+⟨lora⟩, parameters: {weight: 0.4}}
base_model: ⟨base⟩
merge_method: task_arithmetic
"""
EXAMPLES = {
    "linear": LINEAR,
    "slerp": SLERP,
    "ties": TIES,
    "dare_ties": DARE_TIES,
    "franken": FRANKEN,
    "stock": STOCK,
    "union": UNION,
    "lora": LORA,
}
STEPS = """\
name: half
models: [{model: ⟨a⟩, parameters: {weight: 1}}, {model: ⟨b⟩, parameters: {weight: 1}}]
merge_method: linear
---
name: ours/../stock
models: [{model: half}, {model: ⟨b⟩}]
base_model: ⟨base⟩
merge_method: model_stock
---
models:
  - {model: ours/../stock, parameters: {weight: 0.5}}
  - {model: half+⟨lora⟩, parameters: {weight: 0.5}}
base_model: ⟨base⟩
merge_method: task_arithmetic
"""


def refusal(text: str, folder: Path, out: Path, **options: Any) -> str:
    """The error's text; nothing may have been written."""
    with pytest.raises(SurgeryError) as caught:
        run(text, folder, out, **options)
    assert not list(out.parent.glob(f"{out.name}*"))
    return str(caught.value).replace(f"{folder}/", "")


# -- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_example_configs_run_unchanged_and_load(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path / "models")
    for kind, text in EXAMPLES.items():
        run(text, folder, tmp_path / kind)
        logits = logits_of(tmp_path / kind)
        assert logits.shape == (4, 96)
    a, b, mixed = (tensors_of(path) for path in (folder / "a", folder / "b", tmp_path / "linear"))
    assert mixed.keys() == a.keys()
    for tensor, x in a.items():
        reference = (x.double() + 0.3 * b[tensor].double()) / 1.3
        torch.testing.assert_close(mixed[tensor].double(), reference, rtol=1e-6, atol=1e-7, msg=tensor)


# -- however it is run ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 64 elements: tiny tensors then take many."""
    for module in (
        "surgery.checkpoint.reader",
        "surgery.engine.work.computation",
        "surgery.engine.plan",
        "merges.tokenizer.embeddings",
    ):
        monkeypatch.setattr(f"{module}.SEGMENT", 64)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("kind", ["ties", "dare_ties", "slerp", "union", "lora", "franken"])
def test_any_number_of_threads_gives_the_same_files(kind: str, llama: Path, tmp_path: Path) -> None:
    outs = {threads: tmp_path / f"out{threads}" for threads in (1, 3)}
    for threads, out in outs.items():
        run(EXAMPLES[kind], llama, out, threads=threads)
    assert files_of(outs[1]) == files_of(outs[3])


def test_shards_of_the_inputs_do_not_change_a_tensor(tmp_path: Path) -> None:
    for name, limit in (("one", None), ("many", "10KB")):
        folder = tmp_path / name
        base = build("llama", folder / "base", dtype=torch.float32, max_shard_size=limit)
        for seed, child in enumerate("ab"):
            sibling(base, folder / child, seed=seed)
        run(TIES, folder, folder / "out")
    assert len(list((tmp_path / "many/out").glob("*.safetensors"))) > 2
    one, many = (json.loads((tmp_path / name / "out" / MANIFEST).read_text()) for name in ("one", "many"))
    assert one["tensors"] == many["tensors"]
    for ours, theirs in zip(one["report"]["models"], many["report"]["models"], strict=True):
        assert {**ours, "model": ""} == {**theirs, "model": ""}


def test_an_adapter_counts_as_the_model_it_makes(llama: Path, tmp_path: Path) -> None:
    whole = "models: [{model: ⟨base⟩+⟨lora⟩}]\nmerge_method: passthrough\n"
    run(whole, llama, tmp_path / "whole")
    changed, base = tensors_of(tmp_path / "whole"), tensors_of(llama / "base")
    assert sorted(name for name in base if not torch.equal(base[name], changed[name])) == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]
    run(LORA, llama, tmp_path / "adapter")
    run(LORA.replace("⟨base⟩+⟨lora⟩", str(tmp_path / "whole")), llama, tmp_path / "merged")
    assert files_of(tmp_path / "adapter")["model.safetensors"] == files_of(tmp_path / "merged")["model.safetensors"]


def test_tied_and_untied_heads_meet(tmp_path: Path) -> None:
    for tied in (True, False):
        add_tokenizer(build("qwen3", tmp_path / str(tied), seed=int(tied), dtype=torch.float32, tied=tied))
    text = """\
models: [{model: ⟨True⟩, parameters: {weight: 0.5}}, {model: ⟨False⟩, parameters: {weight: 0.5}}]
merge_method: linear
"""
    report = run(text, tmp_path, tmp_path / "out")
    assert "a model has an output head of its own, so the result has one: it is not tied" in report.warnings
    tied, untied, mixed = (tensors_of(tmp_path / name) for name in ("True", "False", "out"))
    head = (tied["model.embed_tokens.weight"].double() + untied["lm_head.weight"].double()) / 2
    torch.testing.assert_close(mixed["lm_head.weight"].double(), head, rtol=1e-6, atol=1e-7)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    logits_of(tmp_path / "out")
    both = text.replace("⟨False⟩", "⟨again⟩")
    sibling(tmp_path / "True", tmp_path / "again", seed=3)
    add_tokenizer(tmp_path / "again")
    run(both, tmp_path, tmp_path / "still tied")
    assert "lm_head.weight" not in tensors_of(tmp_path / "still tied")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program may catch it."""


def killing(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`call`, which dies instead of being called for the `after`-th time."""
    count = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == after:
            raise Killed
        return call(*arguments, **keywords)

    return counted


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("kind", ["ties", "dare_ties", "slerp", "union"])
def test_a_killed_merge_resumes_to_the_same_files(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(EXAMPLES[kind], llama, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            "surgery.engine.storage.journal.Journal.append", killing(surgery.engine.execution.Journal.append, 100)
        )
        with pytest.raises(Killed):
            run(EXAMPLES[kind], llama, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    assert run(EXAMPLES[kind], llama, tmp_path / "out", threads=3).resumed_bytes > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# -- several documents ------------------------------------------------------------------------------------------------


def test_documents_merge_each_other_s_results_and_leave_one_folder(llama: Path, tmp_path: Path) -> None:
    beside = tmp_path / "out.steps/mine.txt"
    beside.parent.mkdir()
    beside.touch()
    run(STEPS, llama, tmp_path / "out")
    half, stock, _ = STEPS.split("---\n")
    run(half.removeprefix("name: half\n"), llama, tmp_path / "half")
    run(stock.partition("\n")[2].replace("{model: half}", f"{{model: {tmp_path}/half}}"), llama, tmp_path / "stock")
    last = STEPS.split("---\n")[2].replace("ours/../stock", f"{tmp_path}/stock").replace("half", f"{tmp_path}/half")
    run(last, llama, tmp_path / "by hand")
    by_hand, out = tensors_of(tmp_path / "by hand"), tensors_of(tmp_path / "out")
    assert all(torch.equal(by_hand[name], out[name]) for name in out) and out.keys() == by_hand.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by hand", "half", "out", "out.steps", "stock"]
    assert list(beside.parent.iterdir()) == [beside]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert [entry["ref"] for entry in manifest["inputs"].values()] == [
        str(llama / "base"),
        "ours/../stock",
        f"half+{llama}/lora",
    ]
    assert manifest["report"]["steps"]["half"]["inputs"]["model 2"]["ref"] == str(llama / "b")
    assert f"| half | model 2 | {llama}/b |" in (tmp_path / "out/README.md").read_text()


def test_killed_between_documents_it_keeps_what_is_done(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(STEPS, llama, tmp_path / "elsewhere/whole")
    with monkeypatch.context() as patch:
        patch.setattr("surgery.engine.execution.commit_folder", killing(surgery.engine.execution.commit_folder, 2))
        with pytest.raises(Killed):
            run(STEPS, llama, tmp_path / "out")
    run(STEPS, llama, tmp_path / "out", dry_run=True)
    assert (tmp_path / "out.steps/name=half" / MANIFEST).is_file(), "a dry run removes nothing"
    written: list[str] = []
    execute = MergeJob.execute

    def counted(job: MergeJob, *arguments: Any, **keywords: Any) -> Any:
        written.append(str(job.config.name))
        return execute(job, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(MergeJob, "execute", counted)
        run(STEPS, llama, tmp_path / "out")
    assert written == ["ours/../stock", "None"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "elsewhere/whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_a_step_of_models_that_have_changed_since_is_made_anew(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("surgery.engine.execution.commit_folder", killing(surgery.engine.execution.commit_folder, 2))
        with pytest.raises(Killed):
            run(STEPS, own, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.steps/name=ours%2F..%2Fstock.partial")
    set_tensor(own / "a", "model.norm.weight", lambda x: x + 1)
    run(STEPS, own, tmp_path / "out")
    run(STEPS, own, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_fault_of_the_last_document_shows_before_the_first_is_merged(own: Path, tmp_path: Path) -> None:
    text = STEPS.replace("base_model: ⟨base⟩\nmerge_method: task", "base_model: ⟨lost⟩\nmerge_method: task")
    assert "no such folder or file" in refusal(text, own, tmp_path / "out")
    build("gpt2", own / "lost")
    text = text.replace("{model: half+⟨lora⟩", "{model: ⟨a⟩")
    found = refusal(text, own, tmp_path / "out")
    assert "architectures differ: lost is gpt2, a is llama." in found


# -- refused before a byte is written ---------------------------------------------------------------------------------


def test_layer_ranges_outside_the_model(llama: Path, tmp_path: Path) -> None:
    text = FRANKEN.replace("⟨a⟩, layer_range: [0, 2]", "⟨a⟩, layer_range: [0, 5]")
    found = refusal(text.replace("⟨b⟩, layer_range: [1, 2]", "⟨b⟩, layer_range: [3, 4]"), llama, tmp_path / "out")
    assert "c.yml: layer_range [0, 5] of a reaches beyond its 2 layers." in found
    assert "layer_range [3, 4] of b reaches beyond its 2 layers." in found


def test_models_of_different_depth_need_slices(own: Path, tmp_path: Path) -> None:
    run(FRANKEN, own, own / "deep")
    found = refusal(LINEAR.replace("⟨b⟩", "⟨deep⟩"), own, tmp_path / "out")
    what = "the models differ in their number of layers (a 2, deep 4). Name the layers to merge with `slices:`."
    assert found == f"c.yml: {what}"


def test_several_modules_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    modules = "".join(f"  {module}:\n    models: [{{model: ⟨a⟩}}]\n" for module in ("text_decoder", "vision_tower"))
    text = f"merge_method: linear\nmodules:\n{modules}parameters: {{weight: 1}}\n"
    found = refusal(text, llama, tmp_path / "out")
    assert "modules: got text_decoder, vision_tower, expected one" in found


def test_weights_that_sum_to_zero(llama: Path, tmp_path: Path) -> None:
    found = refusal(LINEAR.replace("0.3", "-1.0"), llama, tmp_path / "out")
    assert found == (
        'c.yml: 21 tensors: "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", '
        '"model.layers.0.mlp.down_proj.weight" and 18 more: weights 1, -1 sum to zero, and are to be divided by their '
        "sum. Change one, or set normalize to false."
    )
    run(LINEAR.replace("0.3", "-1.0") + "parameters: {normalize: false}", llama, tmp_path / "difference")


def test_different_vocabularies_name_the_option(own: Path, tmp_path: Path) -> None:
    found = refusal(LINEAR.replace("⟨b⟩", "⟨other⟩"), own, tmp_path / "out")
    assert found.startswith("c.yml: the vocabularies of a and other differ: 86 rows hold different tokens (row 4: 'w4'")
    assert "Say `tokenizer_source: union`, `base` or a model: rows are then aligned by token." in found
    shutil.rmtree(own / "b")
    wide = build("llama", own / "b", dtype=torch.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        set_tensor(wide, name, lambda x: torch.cat([x, x[:4]]))
    found = refusal(LINEAR, own, tmp_path / "out")
    assert found == (
        'c.yml: 2 tensors: "model.embed_tokens.weight", "lm_head.weight": [96, 32] in a, [100, 32] in b. '
        "Say `tokenizer_source: union`, `base` or a model: rows are then aligned by token."
    )


def test_different_shapes_and_missing_tensors_at_once(own: Path, tmp_path: Path) -> None:
    set_tensor(own / "b", "model.layers.1.mlp.up_proj.weight", lambda x: x[:40].clone())
    path = own / "a/model.safetensors"
    tensors = tensors_of(own / "a")
    save_file({n: x for n, x in tensors.items() if n != "model.norm.weight"}, path, metadata={"format": "pt"})
    found = refusal(LINEAR.replace("0.3", "-1.0"), own, tmp_path / "out").split("\n  ")
    assert found[0].startswith('c.yml: "model.norm.weight": in b and not in a. --keep GLOB copies it from the base')
    assert 'model.layers.1.mlp.up_proj.weight": [48, 32] in a, [40, 32] in b. Only models of one shape' in found[2]
    assert "sum to zero" in found[1] and len(found) == 3


def test_different_architectures(own: Path, tmp_path: Path) -> None:
    build("gpt2", own / "b2")
    found = refusal(LINEAR.replace("⟨b⟩", "⟨b2⟩"), own, tmp_path / "out")
    assert found == "c.yml: architectures differ: a is llama, b2 is gpt2. Use models of one family."


def test_a_quantised_source(own: Path, tmp_path: Path) -> None:
    config = {**config_of(own / "b"), "quantization_config": {"quant_method": "gptq"}}
    (own / "b/config.json").write_text(json.dumps(config))
    found = refusal(LINEAR, own, tmp_path / "out")
    assert "b is quantised (gptq), and its stored values are not its weights." in found


def test_nan_in_a_source_names_model_and_tensor(own: Path, tmp_path: Path) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([0]), float("nan"))

    set_tensor(own / "b", "model.layers.1.mlp.up_proj.weight", spoil)
    set_tensor(own / "lora", "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight", spoil)
    found = refusal(DARE_TIES, own, tmp_path / "out")
    assert found == (
        'sources: NaN or infinite values: 32 in "model.layers.1.mlp.up_proj.weight" of b. They would spread through '
        "the merge. --allow-nonfinite merges them all the same."
    )
    found = refusal(LORA, own, tmp_path / "out")
    assert '"base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight" of base+lora' in found
    run(LINEAR, own, tmp_path / "out", allow_nonfinite=True)
    bad = tensors_of(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].isnan()
    assert bad[0].all() and not bad[1:].any()


def test_out_that_exists_and_out_inside_a_source(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SurgeryError, match=r"out: exists already\. Choose another folder, or add --overwrite\."):
        run(LINEAR, own, out)
    assert not list(out.iterdir())
    found = refusal(LINEAR, own, own / "b/merged")
    assert found == "b/merged: lies inside the model 2 b, which is only ever read. Choose a folder outside of it."
    out.rmdir()
    run(LINEAR, own, out)
    with pytest.raises(SurgeryError, match="exists already"):
        run(TIES, own, out)
    run(TIES, own, out, overwrite=True)
    assert json.loads((out / MANIFEST).read_text())["report"]["method"] == "ties"


def test_a_part_of_a_model_is_no_model(own: Path, tmp_path: Path) -> None:
    run("models: [{model: ⟨a⟩}]\nmerge_method: passthrough", own, own / "part")
    for name in ("a", "b"):
        tensors = {n: x for n, x in tensors_of(own / name).items() if "layers.0." not in n}
        save_file(tensors, own / name / "model.safetensors", metadata={"format": "pt"})
    found = refusal(LINEAR, own, tmp_path / "out")
    assert "a holds 1 layers from 1 to 1: a part of a model. Give the whole." in found


def test_a_dry_run_writes_nothing_and_says_what_it_would(llama: Path, tmp_path: Path) -> None:
    report = run(TIES, llama, tmp_path / "out", dry_run=True)
    assert (report.dry_run, report.merged, report.tensors) == (True, 21, 21)
    assert report.preflight["vocabulary"] == "the same 96 tokens in all models"
    report = run(STEPS, llama, tmp_path / "out", dry_run=True)
    assert report.preflight["checked"].startswith("in full the documents that need no other's result")
    assert not list(tmp_path.iterdir())


# -- what it says -----------------------------------------------------------------------------------------------------


def test_the_report_measures_models_base_and_result(llama: Path, tmp_path: Path) -> None:
    report = run(TIES.replace("dtype: float16", "dtype: float32"), llama, tmp_path / "out")
    base, out = tensors_of(llama / "base"), tensors_of(tmp_path / "out")
    for share, name in zip(report.models, ("a", "b"), strict=True):
        model = tensors_of(llama / name)

        def norm(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor] | None = None) -> float:
            squares = [(x.double() - (right[n].double() if right else 0)).square().sum() for n, x in left.items()]
            return float(torch.stack(squares).sum().sqrt())

        assert share.model == str(llama / name)
        assert share.norm == pytest.approx(norm(model), rel=1e-5)
        assert share.update == pytest.approx(norm(model, base) / norm(base), rel=1e-4)
        assert share.distance == pytest.approx(norm(out, model) / norm(model), rel=1e-4)
        assert list(share.layers) == ["embed", "layer 0", "layer 1", "final norm", "lm_head"]
    assert report.models[1].kept == pytest.approx(0.5, abs=0.01)
    assert [share.weight for share in report.models] == pytest.approx([1, 9 / 21])


def test_the_card_tells_people_what_was_merged(llama: Path, tmp_path: Path) -> None:
    run(TIES, llama, tmp_path / "ties")
    card = (tmp_path / "ties/README.md").read_text()
    assert "library_name: transformers" in card and "- ties" in card
    assert (
        f"`{llama}/a`, `{llama}/b`, merged onto `{llama}/base` by **ties**: the largest of each task vector, then a "
        "vote on signs ([arXiv:2306.01708](https://arxiv.org/abs/2306.01708)). Every tensor was computed in fp32 and "
        "rounded once."
    ) in card
    assert f"| {llama}/a | 1.000 |" in card and "density: [1, 0.7, 0.1]" in card
    assert "surgery merge c.yml -o OUT" in card
    run(FRANKEN, llama, tmp_path / "franken")
    card = (tmp_path / "franken/README.md").read_text()
    assert f"| 0–1 | {llama}/a | 0–1 |\n| 2 | {llama}/b | 1 |\n| 3 | {llama}/a | 1 |" in card
    assert "1 of 39 tensors were computed in fp32 and rounded once; the rest are copies." in card


# -- speed ------------------------------------------------------------------------------------------------------------
