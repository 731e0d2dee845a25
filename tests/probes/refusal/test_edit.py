"""Edits of heads by findings or by name: they are measured, rejected where refusal fell, and can be undone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import refusal as refusing
from support.refusal import ONE_THREAD, SUPPRESSORS, WRITER, make_model, make_run, no_pictures, rows_of, write_rows

from probes.data.preparation import GenerationOptions, open_model
from probes.model.ablation import ablated_heads
from probes.refusal.edit import EffectOptions, HeadEditResult, HeadSelection, _prompts, edit_heads
from probes.refusal.findings import HEADS, CausalRecord, read_findings, write_findings
from probes.refusal.heads.ablation_study import ProofOptions
from probes.refusal.heads.causal_proof import prove_heads
from surgery.checkpoint.selectors import Head
from surgery.edits.undo_file import undo
from surgery.errors import SurgeryError
from surgery.models.choices import SpecialTokens

WEIGHTS = "model.safetensors"
MEASURED, UNMEASURED = EffectOptions(), EffectOptions(wanted=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a proof, which is never written to."""
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        run = make_run(model, tmp_path_factory.mktemp("runs") / "run", rows_of(dict.fromkeys(refusing.CELLS, 8)))
        prove_heads(str(model), run, proof=ProofOptions(controls=0, examples=6), options=ONE_THREAD)
    return run


def edit(
    model: Path, out: Path, choice: HeadSelection, measuring: EffectOptions = MEASURED, **options: Any
) -> HeadEditResult:
    return edit_heads(str(model), out, choice=choice, measuring=measuring, options=ONE_THREAD, **options)


def changed(run: Path, out: Path, **updates: object) -> Path:
    """A copy of a run with another proof in it."""
    shutil.copytree(run, out)
    found = read_findings(run)
    assert found.causal is not None
    write_findings(out, found.model_copy(update={"causal": found.causal.model_copy(update=updates)}))
    return out


def test_the_lowest_heads_are_removed_and_everything_harmful_is_refused(model: Path, run: Path, tmp_path: Path) -> None:
    found = edit(model, tmp_path / "out", HeadSelection(run=run, top="2"))
    assert found.heads == dict.fromkeys(SUPPRESSORS, 0.0) and found.measured is not None
    before, after = found.measured.refusal["harmful"]
    assert (before.value, after.value, before.n, after.n) == (0.5, 1.0, 16, 16)
    assert [rate.value for rate in found.measured.refusal["harmless"]] == [0.5, 0.5]
    assert [rate.value for rate in found.measured.never_closed] == [0.0, 0.0]
    assert found.measured.kl["harmful"][0] > found.measured.kl["harmless"][0] > 0
    old, new = load_file(model / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 2)}


def test_card_and_manifest_carry_what_was_measured(model: Path, run: Path, tmp_path: Path) -> None:
    found = edit(model, tmp_path / "out", HeadSelection(run=run, top="2"))
    assert found.measured is not None
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert found.measured.table().to_markdown() in card
    assert "refusal of harmful prompts | 50.0 % [" in card and "| 100.0 % [" in card
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())["report"]["measured"]
    assert [rate["value"] for rate in record["refusal"]["harmful"]] == [0.5, 1.0]
    assert set(record) == {"refusal", "kl", "perplexity", "never_closed"}


def test_the_result_is_what_the_hook_does(model: Path, run: Path, tmp_path: Path) -> None:
    edit(model, tmp_path / "out", HeadSelection(run=run, top="2", scale=0.5), UNMEASURED)
    before, after = open_model(str(model)), open_model(str(tmp_path / "out"))
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.inference_mode():
        with ablated_heads(before, {Head.parse(name): 0.5 for name in SUPPRESSORS}):
            hooked = before.model(input_ids=ids).logits
        assert torch.equal(hooked, after.model(input_ids=ids).logits)


def test_findings_of_a_model_with_one_other_weight_are_refused(model: Path, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tensors = load_file(other / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"run: its findings are of .* but .*other has the weights") as error:
        edit(other, tmp_path / "out", HeadSelection(run=run, top="2"))
    assert error.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_result_that_refuses_less_is_not_kept_and_leaves_nothing(model: Path, run: Path, tmp_path: Path) -> None:
    choice = HeadSelection(run=run, heads=[WRITER])
    with pytest.raises(SurgeryError, match=r"refusal of harmful prompts fell from 50.0% to 0.0% \(n = 16\)") as error:
        edit(model, tmp_path / "out", choice)
    assert error.value.exit_code == 1 and list(tmp_path.iterdir()) == []
    found = edit(model, tmp_path / "out", choice, EffectOptions(force=True))
    assert found.measured is not None and found.measured.refusal["harmful"][1].value == 0.0
    assert "| 0.0 % [" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_without_measuring_the_card_says_so(model: Path, run: Path, tmp_path: Path) -> None:
    found = edit(model, tmp_path / "out", HeadSelection(run=run, top="2"), UNMEASURED)
    assert found.measured is None
    assert "Side effects were not measured." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["report"]["measured"] is None


def test_heads_by_name_are_measured_on_the_data_that_are_given(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", rows_of({"harmful/complied": 3, "harmless/complied": 2}, whole=False))
    found = edit(
        model, tmp_path / "out", HeadSelection(heads=["L1H2=0.1", "L2H1"], scale=0.2), EffectOptions(data=str(data))
    )
    assert found.heads == {"L1H2": 0.1, "L2H1": 0.2} and found.measured is not None
    assert found.measured.refusal["harmful"][1].value == 1.0 and found.measured.refusal["harmful"][1].n == 3
    assert edit(model, tmp_path / "plain", HeadSelection(heads=["L1H2"])).measured is None


def test_each_prompt_is_measured_once_and_no_more_than_asked_for(model: Path, tmp_path: Path) -> None:
    rows = rows_of({"harmful/complied": 5, "harmless/complied": 4})
    data = write_rows(tmp_path / "d.jsonl", [*rows, *rows])
    counts = []
    for most in (64, 3):
        measuring = EffectOptions(data=str(data), examples=most)
        found = edit(model, tmp_path / f"out{most}", HeadSelection(heads=SUPPRESSORS), measuring).measured
        assert found is not None
        counts.append({topic: before.n for topic, (before, _) in found.refusal.items()})
    assert counts == [{"harmful": 5, "harmless": 4}, {"harmful": 3, "harmless": 3}]


def test_thinking_that_never_closes_is_counted(model: Path, tmp_path: Path) -> None:
    rows: Sequence[Mapping[str, Any]] = [*rows_of({"harmful/complied": 3}), {"prompt": "a_", "label": "harmful"}]
    measuring = EffectOptions(
        data=str(write_rows(tmp_path / "d.jsonl", rows)), asking=GenerationOptions(max_new_tokens=12)
    )
    found = edit(model, tmp_path / "out", HeadSelection(heads=SUPPRESSORS), measuring).measured
    assert found is not None
    assert [(rate.value, rate.n) for rate in found.never_closed] == [(0.25, 4), (0.25, 4)]
    assert found.refusal["harmful"][1].n == 3 and "harmless" not in found.refusal


def test_where_nothing_harmful_is_answered_nothing_is_kept(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a_", "label": "harmful"}, *rows_of({"harmless/complied": 1})]
    measuring = EffectOptions(
        data=str(write_rows(tmp_path / "d.jsonl", rows)), asking=GenerationOptions(max_new_tokens=12)
    )
    with pytest.raises(SurgeryError, match="no harmful prompt came to an answer in both models"):
        edit(model, tmp_path / "out", HeadSelection(heads=SUPPRESSORS), measuring)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_the_proven_set_is_edited_as_it_was_proven(model: Path, run: Path, tmp_path: Path) -> None:
    proven = read_findings(run).causal
    assert proven is not None
    found = edit(model, tmp_path / "out", HeadSelection(run=run, proven=True), UNMEASURED)
    assert found.heads == dict.fromkeys(sorted(proven.steps[-1].heads), 0.0)
    halved = changed(run, tmp_path / "halved", ablation="scale 0.5")
    with pytest.raises(SurgeryError, match=r"--proven: the set was proven with the ablation scale 0.5.*--scale 0.5"):
        edit(model, tmp_path / "no", HeadSelection(run=halved, proven=True))
    assert set(
        edit(model, tmp_path / "half", HeadSelection(run=halved, proven=True, scale=0.5), UNMEASURED).heads.values()
    ) == {0.5}
    by_means = changed(run, tmp_path / "means", ablation="mean")
    with pytest.raises(SurgeryError, match="Add --mode mean"):
        edit(model, tmp_path / "no", HeadSelection(run=by_means, proven=True))
    resampled = changed(run, tmp_path / "resampled", ablation="resample")
    assert edit(model, tmp_path / "zero", HeadSelection(run=resampled, proven=True), UNMEASURED).heads == found.heads


def test_a_proof_that_found_nothing_is_told_with_its_reason(model: Path, run: Path, tmp_path: Path) -> None:
    empty = changed(run, tmp_path / "empty", steps=[], stopped="L1H2 would take KL to 2, over 0.1")
    with pytest.raises(SurgeryError, match=r"no set of heads was proven .*L1H2 would take KL to 2, over 0.1"):
        edit(model, tmp_path / "out", HeadSelection(run=empty, proven=True))
    unproven = Path(shutil.copytree(run, tmp_path / "unproven"))
    write_findings(unproven, read_findings(run).model_copy(update={"causal": None}))
    with pytest.raises(SurgeryError, match=r"has no proven set of heads.*surgery probe heads"):
        edit(model, tmp_path / "out", HeadSelection(run=unproven, proven=True))


def test_means_need_a_bias_and_with_one_do_what_the_hook_does(model: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"o_proj.weight: mean ablation adds a constant .* has no bias to hold it"):
        edit(model, tmp_path / "out", HeadSelection(run=run, top="2", mode="mean"))
    biased = make_model(tmp_path / "biased", bias=True)
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        other = make_run(biased, tmp_path / "run", rows_of(dict.fromkeys(refusing.CELLS, 5)))
    found = edit(biased, tmp_path / "out", HeadSelection(run=other, top="2", mode="mean"), UNMEASURED)
    assert set(found.heads) == set(SUPPRESSORS)
    before, after = open_model(str(biased)), open_model(str(tmp_path / "out"))
    stored = load_file(other / HEADS)
    means = {layer: stored[f"layer.{layer}"].flatten() for layer in before.projections}
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.inference_mode():
        plain = before.model(input_ids=ids).logits
        with ablated_heads(before, {Head.parse(name): 0.0 for name in SUPPRESSORS}, means):
            hooked = before.model(input_ids=ids).logits
        assert torch.allclose(hooked, after.model(input_ids=ids).logits, atol=1e-4)
        assert not torch.allclose(hooked, plain, atol=1e-2)


def test_undo_gives_the_bytes_of_the_weights_back(model: Path, run: Path, tmp_path: Path) -> None:
    edit(model, tmp_path / "out", HeadSelection(run=run, top="3", scale=0.3), UNMEASURED)
    undo(str(tmp_path / "out"), tmp_path / "back", options=ONE_THREAD)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (model / WEIGHTS).read_bytes()


def test_a_dry_run_checks_and_writes_nothing(model: Path, run: Path, tmp_path: Path) -> None:
    found = edit(model, tmp_path / "out", HeadSelection(run=run, top="2"), dry_run=True)
    assert found.report.dry_run and found.measured is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({}, r"no heads were given. Name them \(--head L12H7\)"),
        ({"run": True}, r"run: how many heads\? Add --top 3%"),
        ({"top": "2"}, "--top: chooses among the heads of a run. Add --from RUN"),
        ({"proven": True}, "--proven: chooses among the heads of a run"),
        ({"run": True, "top": "2", "proven": True}, "--top and --proven all choose heads"),
        ({"run": True, "top": "2", "heads": ["L0H0"]}, "--head and --top all choose heads"),
        ({"heads": ["L0H0"], "mode": "mean"}, "--mode mean: mean ablation takes the means of a run"),
        ({"run": True, "top": "2", "mode": "mean", "scale": 0.5}, "--mode mean: means take the place"),
        ({"run": True, "heads": ["L0H0=0.5"], "mode": "mean"}, "--mode mean: means take the place"),
        ({"run": True, "top": "0"}, "--top: got '0', which is 0 of 12"),
        ({"run": True, "top": "2.5"}, "--top: got '2.5', expected a share"),
        ({"run": True, "top": "100%"}, r"do not write against refusal: L\dH\d has .*Use --top \d"),
    ],
)
def test_a_choice_that_says_nothing_or_two_things_is_refused(
    choice: dict[str, Any], text: str, model: Path, run: Path, tmp_path: Path
) -> None:
    given = {**choice, **({"run": run} if "run" in choice else {})}
    with pytest.raises(SurgeryError, match=text) as error:
        edit(model, tmp_path / "out", HeadSelection(**given))
    assert error.value.exit_code == 2 and list(tmp_path.iterdir()) == []


def test_as_many_heads_as_the_error_says_can_be_edited(model: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError) as error:
        edit(model, tmp_path / "out", HeadSelection(run=run, top="100%"))
    assert error.value.hint is not None
    most = int(error.value.hint.removeprefix("Use --top ").removesuffix("."))
    assert len(edit(model, tmp_path / "out", HeadSelection(run=run, top=str(most)), UNMEASURED).heads) == most


def test_data_without_topics_cannot_be_measured_on(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "abc"}])
    with pytest.raises(SurgeryError, match="no example is harmful, so that it cannot be seen whether refusal fell"):
        edit(model, tmp_path / "out", HeadSelection(heads=["L1H2"]), EffectOptions(data=str(data)))
    with pytest.raises(SurgeryError, match=r"--data .* --no-measure"):
        edit(model, tmp_path / "out", HeadSelection(heads=["L1H2"]), EffectOptions(data=str(data), wanted=False))


def test_the_record_of_a_proof_is_what_proven_takes(run: Path) -> None:
    found = read_findings(run).causal
    assert isinstance(found, CausalRecord) and found.steps[1].heads == list(SUPPRESSORS)


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_special_tokens_in_data_are_text_unless_asked_for(tmp_path: Path, special_tokens: SpecialTokens) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "ab</think>", "label": "harmful"}])
    measuring = EffectOptions(data=str(data), special_tokens=special_tokens)
    (prompt,) = _prompts(None, measuring)
    assert prompt.literal == (("messages",) if special_tokens == "text" else ())
    assert _prompts(None, EffectOptions(data=str(data)))[0].literal == ("messages",)
