"""Promises of experts.edit: what an edit of experts does is measured before it is kept; what collapses is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import open_folder
from support.moe import (
    AT_M,
    COLLAPSING,
    THOUGHT,
    logits_of,
    make_thinker,
    no_pictures,
    rows,
    write_rows,
)

from probes.data.examples import Example
from probes.experts.edit import ExpertEditResult, ExpertSelection, edit_experts
from probes.experts.findings import read_expert_findings, write_expert_findings
from probes.experts.run import probe_experts
from probes.model.expert_scaling import ExpertScaling, scaled_routing
from probes.model.routers import find_routers
from surgery.edits.common import NOT_MEASURED
from surgery.edits.undo_file import undo
from surgery.engine.options import ExecutionOptions
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.choices import SpecialTokens

ONE_THREAD = ExecutionOptions(threads=1)
WEIGHTS = "model.safetensors"
IDS = torch.tensor([[2, 4, 20, 21, 22, 3, 5, 6, 8, 15, 20, 7]])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `m` and `run`, which ranks the expert at `m` first."""
    folder = tmp_path_factory.mktemp("boosting")
    make_thinker(folder / "m")
    write_rows(folder / "d.jsonl", rows(60))
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        probe_experts(str(folder / "m"), str(folder / "d.jsonl"), [THOUGHT], folder / "run", options=ONE_THREAD)
    return folder


def edit(bench: Path, out: Path, **how: Any) -> ExpertEditResult:
    named = {key: how.pop(key) for key in ("top", "experts", "scale") if key in how}
    run = bench / "run" if how.pop("run", True) else None
    return edit_experts(
        str(bench / "m"), out, choice=ExpertSelection(run=run, **named), options=ONE_THREAD, examples=8, **how
    )


def test_the_first_of_a_run_are_scaled_and_nothing_else(bench: Path, tmp_path: Path) -> None:
    found = edit(bench, tmp_path / "out", top=1, scale=4.0)
    assert found.experts == {str(AT_M): 4.0} and found.report.edited == 1
    old, new = load_file(bench / "m" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {f"model.layers.{AT_M.layer}.mlp.experts.{AT_M.index}.down_proj.weight"}
    (name,) = moved
    assert torch.equal(new[name], old[name] * 4)


def test_two_are_scaled_where_nobody_says_how_many(bench: Path, tmp_path: Path) -> None:
    first = [str(row.name) for row in read_expert_findings(bench / "run").ranked[:2]]
    found = edit(bench, tmp_path / "out", scale=2.0, wanted=False)
    assert found.experts == dict.fromkeys(sorted(first), 2.0) and len(first) == 2


def test_the_result_is_what_the_hook_does(bench: Path, tmp_path: Path) -> None:
    edit(bench, tmp_path / "out", top=2, scale=64.0, wanted=False)
    scales = {row.name: 64.0 for row in read_expert_findings(bench / "run").ranked[:2]}
    live = open_folder(bench / "m")
    with scaled_routing(live, find_routers(live), ExpertScaling(scales)):
        hooked = logits_of(live, IDS)
    assert torch.equal(hooked, logits_of(open_folder(tmp_path / "out"), IDS))
    assert not torch.equal(hooked, logits_of(live, IDS))


def test_card_and_manifest_carry_what_was_measured(bench: Path, tmp_path: Path) -> None:
    found = edit(bench, tmp_path / "out", top=1, scale=4.0)
    measured = found.measured
    assert measured is not None
    assert [(rate.value, rate.n) for rate in measured.loops] == [(0, 8), (0, 8)]
    assert [(rate.value, rate.n) for rate in measured.never_closed] == [(0, 8), (0, 8)]
    assert measured.tokens == (4, 4)  # h, m, the closing marker, S
    assert set(measured.kl) == {"all"} and 0 <= measured.kl["all"][0] < 1e-3
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert measured.table().to_markdown() in card
    assert "| answers that end in a loop | 0.0 % [" in card and "β acts on the prompt too" in card
    record = json.loads((tmp_path / "out/surgery.json").read_text())["report"]["measured"]
    assert set(record) == {"loops", "never_closed", "tokens", "kl", "perplexity"}
    assert [rate["value"] for rate in record["loops"]] == [0, 0] and record["tokens"] == [4, 4]


def test_a_result_that_collapses_is_not_kept_and_leaves_nothing(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"100.0% of its answers end in a loop, 0.0% of the original's") as error:
        edit(bench, tmp_path / "out", top=1, scale=COLLAPSING)
    assert error.value.exit_code == 1 and "--force" in str(error.value) and list(tmp_path.iterdir()) == []


def test_force_keeps_what_collapses_and_the_card_tells(bench: Path, tmp_path: Path) -> None:
    found = edit(bench, tmp_path / "out", top=1, scale=COLLAPSING, force=True)
    assert found.measured is not None and found.measured.loops[1].value == 1
    assert found.measured.never_closed[1].value == 1 and found.measured.tokens[1] > 50
    assert "| 100.0 % [" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_without_measuring_the_card_says_so(bench: Path, tmp_path: Path) -> None:
    for name, how in (("unwanted", {"wanted": False}), ("named", {"run": False, "experts": ["L1E3"], "scale": 2.0})):
        how = {"top": 1, "scale": COLLAPSING, **how} if name == "unwanted" else how
        found = edit(bench, tmp_path / name, **how)
        assert found.measured is None
        assert NOT_MEASURED in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert json.loads((tmp_path / name / "surgery.json").read_text())["report"]["measured"] is None


def test_experts_by_name_are_measured_on_the_data_that_are_given(bench: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.jsonl", rows(3, whole=False, seed=5))
    found = edit(bench, tmp_path / "out", run=False, experts=["L1E6=0", "L0E2"], scale=8.0, data=str(data))
    assert found.experts == {"L0E2": 8.0, "L1E6": 0.0}
    assert found.measured is not None and found.measured.loops[1].n == 3


def test_undo_gives_the_bytes_back(bench: Path, tmp_path: Path) -> None:
    edit(bench, tmp_path / "out", top=2, scale=3.0, wanted=False)
    undo(str(tmp_path / "out"), tmp_path / "back", options=ONE_THREAD)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (bench / "m" / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (bench / "m" / WEIGHTS).read_bytes()


def test_a_dry_run_checks_and_writes_nothing(bench: Path, tmp_path: Path) -> None:
    found = edit(bench, tmp_path / "out", top=1, scale=2.0, dry_run=True)
    assert found.report.dry_run and found.measured is None and list(tmp_path.iterdir()) == []


def test_findings_of_a_model_with_one_other_weight_are_refused(bench: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bench / "m", tmp_path / "other"))
    tensors = load_file(other / WEIGHTS)
    tensors["model.layers.0.mlp.gate.weight"][0, 0] += 1
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    choice = ExpertSelection(run=bench / "run", top=1, scale=2.0)
    with pytest.raises(SurgeryError, match=r"run: its findings are of .* but .*other has the weights") as error:
        edit_experts(str(other), tmp_path / "out", choice=choice, options=ONE_THREAD)
    assert error.value.exit_code == WRONG_USAGE and [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"run": False}, r"no experts were given. Name them \(--expert L12E45\)"),
        ({"run": False, "top": 2}, "no experts were given"),
        ({"top": 2, "experts": ["L0E0"]}, "--expert names experts, --top chooses them"),
        ({"top": 99}, r"--top: \d+ experts have evidence enough to be ranked, 99 were asked for"),
        ({"experts": ["E1"]}, "--expert: got 'E1'"),
        ({"experts": ["L1E8"], "scale": 2.0}, "L1E8: layer 1 has the experts 0 to 7"),
        ({"experts": ["L7E0"], "scale": 2.0}, "L7E0: there is no layer 7"),
        ({"top": 1, "scale": -1.0}, "got β = -1, expected a finite number from 0 on"),
        ({"top": 1, "scale": float("nan")}, "got β = nan"),
        ({"top": 1, "scale": float("inf")}, "got β = inf"),
        ({"top": 1, "scale": 1.0}, "nothing to do: every β is 1"),
        ({"top": 1, "scale": 2.0, "data": "d.jsonl", "wanted": False}, "--no-measure not to measure: give one of them"),
    ],
)
def test_a_choice_that_says_nothing_or_two_things_is_refused(
    how: dict[str, Any], text: str, bench: Path, tmp_path: Path
) -> None:
    with pytest.raises(SurgeryError, match=text) as error:
        edit(bench, tmp_path / "out", **how)
    assert error.value.exit_code == WRONG_USAGE and list(tmp_path.iterdir()) == []


def test_a_run_without_a_ranking_chooses_nothing(bench: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(bench / "run", tmp_path / "run"))
    found = read_expert_findings(run)
    bare = [row.model_copy(update={"rank": None, "why": "no"}) for row in found.experts]
    write_expert_findings(run, found.model_copy(update={"experts": bare}))
    with pytest.raises(SurgeryError, match="--top: 0 experts have evidence enough to be ranked, 2 were asked for"):
        edit_experts(str(bench / "m"), tmp_path / "out", choice=ExpertSelection(run=run, scale=2.0), options=ONE_THREAD)


def test_several_processes_are_refused(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SurgeryError, match="edit experts: runs in one process"):
        edit(bench, tmp_path / "out", top=1, scale=2.0)


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_special_tokens_in_data_are_text_unless_asked_for(
    bench: Path, tmp_path: Path, special_tokens: SpecialTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Example] = []

    def measure(**options: Any) -> None:
        seen.extend(options["prompts"])
        raise SurgeryError("seen")

    monkeypatch.setattr("probes.experts.edit.ExpertEffectMeasurement", lambda *given: measure(prompts=given[2]))
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "ab</think>"}])
    how: dict[str, Any] = {} if special_tokens == "text" else {"special_tokens": special_tokens}
    with pytest.raises(SurgeryError, match="seen"):
        edit(bench, tmp_path / "out", data=str(data), **how)
    assert seen[0].literal == (("messages",) if special_tokens == "text" else ())
