"""The causal proof: it finds the heads that are known to suppress refusal, within its budget; random heads do not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import refusal as refusing
from support.refusal import ONE_THREAD, SUPPRESSORS, make_model, make_run, no_pictures, rows_of

from probes.data.markers import find_markers
from probes.data.preparation import open_model
from probes.data.records import EXAMPLES, read_examples, write_examples
from probes.data.tokenization import build_sequences
from probes.model.ablation import ablated_heads
from probes.refusal.findings import CausalRecord, Findings, read_findings
from probes.refusal.fitted_probes import decision_states
from probes.refusal.heads.ablation_study import ProofOptions
from probes.refusal.heads.causal_proof import NO_BUDGET_NOTE, prove_heads
from probes.refusal.linear.probes import Probes
from probes.refusal.tables import refusal_sentences
from surgery.checkpoint.selectors import Head
from surgery.errors import SurgeryError

SMALL = ProofOptions(controls=1, examples=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def probed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is never written to."""
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        return make_run(model, tmp_path_factory.mktemp("runs") / "run", rows_of(dict.fromkeys(refusing.CELLS, 8)))


@pytest.fixture
def run(probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    no_pictures(monkeypatch)
    return Path(shutil.copytree(probed, tmp_path / "run"))


def prove(model: Path, run: Path, proof: ProofOptions = SMALL, **options: Any) -> CausalRecord:
    found = prove_heads(str(model), run, proof=proof, options=ONE_THREAD, **options)
    assert found.causal is not None and read_findings(run) == found
    return found.causal


def without(run: Path, *cells: str) -> None:
    """Drops a run's examples of these cells."""
    write_examples(run, [example for example in read_examples(run) if example.cell not in cells])


def test_the_greedy_set_is_the_known_one_and_brings_refusal_back(model: Path, run: Path) -> None:
    found = prove(model, run, ProofOptions(controls=3, examples=8))
    assert tuple(found.steps[1].heads) == SUPPRESSORS and found.steps[0].heads == [SUPPRESSORS[0]]
    refusals = [step.refusal.value for step in (found.base, *found.steps) if step.refusal]
    assert refusals[0] == 0 and refusals[2] == 1
    assert all(step.harmless_refusal and step.harmless_refusal.value == 0 for step in found.steps)
    assert (found.base.score.value or 1) < 0.2 < 0.8 < (found.steps[1].score.value or 0)
    assert found.base.kl is not None and found.base.kl.value == pytest.approx(0, abs=1e-6)
    ends = [steps[-1].refusal for steps in found.control]
    assert [rate.value for rate in ends if rate] == [0, 0, 0]


def test_single_heads_are_ranked_by_what_ablating_them_does(model: Path, run: Path) -> None:
    found = prove(model, run)
    effects = {str(Head(row.layer, row.head)): row.effect.value or 0.0 for row in found.effects}
    ranked = sorted(effects, key=effects.__getitem__)
    assert ranked[-2:] == list(reversed(SUPPRESSORS))
    assert (found.spearman.value or 0) > 0.8 and found.spearman.n == len(effects) == 12
    assert (found.positions, found.ablation, found.n) == ("last 4", "scale 0", 6)

    live, probes = open_model(str(model)), Probes.load(run / "probes.safetensors")
    own = [e for e in read_examples(run) if e.cell == found.cell][:6]
    sequences = build_sequences(live.tokenizer, own, find_markers(live.tokenizer, where="m"), where="m")

    def logit(heads: Sequence[str]) -> float:
        with ablated_heads(live, {Head.parse(name): 0.0 for name in heads}):
            states = decision_states(live, sequences)
        return float(probes.logits(states)[:, -1].mean())

    everywhere = prove(model, run, replace(SMALL, positions=None))
    assert everywhere.positions == "all"
    for row in everywhere.effects:
        name = str(Head(row.layer, row.head))
        assert row.effect.value == pytest.approx(logit([name]) - logit([]), abs=1e-4)


def test_random_sets_are_as_large_and_hold_no_candidate(model: Path, run: Path) -> None:
    found = prove(model, run, replace(SMALL, controls=4, examples=2))
    assert len(found.control) == 4
    for steps in found.control:
        assert [len(step.heads) for step in steps] == list(range(1, len(found.steps) + 1))
        assert not set(steps[-1].heads) & set(found.candidates)
        assert steps[0].refusal is None and steps[-1].refusal is not None
    assert prove(model, run, replace(SMALL, controls=4, examples=2)).control == found.control
    assert prove(model, run, replace(SMALL, controls=0, examples=2)).control == []


def test_a_budget_of_nothing_stops_before_the_first_head_and_the_report_says_so(model: Path, run: Path) -> None:
    found = prove(model, run, replace(SMALL, budget=0.0))
    assert found.steps == [] and found.control == []
    assert found.stopped.startswith("L1H2 would take KL to") and found.stopped.endswith(", over 0")
    assert found.stopped in refusal_sentences(read_findings(run))[-1]


def test_no_set_goes_over_its_budget(model: Path, run: Path) -> None:
    found = prove(model, run, replace(SMALL, budget=0.05, top="50%"))
    assert found.steps and all(step.kl is not None and (step.kl.value or 0) <= 0.05 for step in found.steps)


@pytest.mark.parametrize(
    ("proof", "ablation"),
    [
        (replace(SMALL, kind="mean"), "mean"),
        (replace(SMALL, kind="mean", positions=None), "mean"),
        (replace(SMALL, kind="resample"), "resample"),
        (replace(SMALL, scale=0.5), "scale 0.5"),
    ],
)
def test_other_ablations_are_recorded_by_name(proof: ProofOptions, ablation: str, model: Path, run: Path) -> None:
    found = prove(model, run, proof)
    effects = {str(Head(row.layer, row.head)): row.effect.value or 0.0 for row in found.effects}
    assert found.ablation == ablation and len(effects) == 12
    if proof.kind == "mean":  # what suppresses all of these examples alike is suppressed by its mean, too
        assert abs(effects["L1H2"]) < 0.2 and abs(effects["L2H1"]) < 0.2
    else:
        assert sorted(effects, key=effects.__getitem__)[-2:] == list(reversed(SUPPRESSORS))


def test_resampling_reaches_back_no_further_than_its_shortest_donor(model: Path, run: Path) -> None:
    examples = read_examples(run)
    short = [
        replace(e, messages=({"role": "user", "content": "a"},), thinking="") if e.cell == "harmless/complied" else e
        for e in examples
    ]
    write_examples(run, short)
    found = prove(model, run, replace(SMALL, kind="resample", positions=50))
    assert found.positions == "last 6"  # <s> <user> a </s> <bot> [THINK] [/THINK], but for the first


def test_without_harmless_answers_it_is_said_that_no_budget_held(model: Path, run: Path) -> None:
    without(run, "harmless/complied")
    found = prove(model, run)
    assert all(step.kl is None and step.harmless_refusal is None for step in found.steps) and found.steps
    prove(model, run)
    assert read_findings(run).warnings.count(NO_BUDGET_NOTE) == 1
    with pytest.raises(SurgeryError, match="--ablate resample"):
        prove(model, run, replace(SMALL, kind="resample"))


def test_everything_else_that_was_found_stays(model: Path, run: Path) -> None:
    before = read_findings(run)
    prove(model, run)
    assert read_findings(run).model_copy(update={"causal": None}) == before


BAD: list[tuple[dict[str, Any], str]] = [
    ({"scale": float("nan")}, "--scale: got nan"),
    ({"scale": 1.0}, "--scale: got 1, which leaves heads as they are"),
    ({"budget": float("nan")}, "--kl-budget: got nan"),
    ({"budget": -0.1}, "--kl-budget: got -0.1"),
    ({"top": "0"}, "--top: got '0', which is 0 of 12"),
    ({"top": "200%"}, "--top: got '200%', which is 24 of 12"),
    ({"top": "abc"}, "--top: got 'abc', expected a share"),
    ({"top": "7"}, "--top: got '7', which is 7 of 12 heads: too few are left.*Use --top 6 at most, or --controls 0"),
    ({"kind": "resample", "positions": None}, "--ablate resample: resampling takes a harmless example's last"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], text: str, model: Path, run: Path) -> None:
    before = (run / "results.json").read_bytes()
    with pytest.raises(SurgeryError, match=text) as error:
        prove(model, run, replace(SMALL, **options))
    assert error.value.exit_code == 2 and (run / "results.json").read_bytes() == before


def test_all_heads_may_be_candidates_where_no_control_is_wanted(model: Path, run: Path) -> None:
    found = prove(model, run, replace(SMALL, top="100%", controls=0, examples=2))
    screen = read_findings(run)
    assert found.candidates == [str(row.name) for row in screen.ranked if screen.score_of(row) < 0]


def test_heads_scored_on_harmless_examples_have_no_refusal_to_bring_back(model: Path, run: Path) -> None:
    found = read_findings(run).model_copy(update={"heads_cell": "harmless/complied"})
    with pytest.raises(SurgeryError, match="scored on harmless/complied examples"):
        prove_with(found, model, run)


def test_findings_without_a_head_against_refusal_have_nothing_to_prove(model: Path, run: Path) -> None:
    found = read_findings(run)
    rows = [row.model_copy(update={"exact": row.paper.model_copy(update={"value": 1.0})}) for row in found.heads]
    with pytest.raises(SurgeryError, match="no head writes against refusal"):
        prove_with(found.model_copy(update={"heads": rows}), model, run)


def test_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", bias=True)
    with pytest.raises(SurgeryError, match=r"its findings are of .* with the weights"):
        prove(other, run)


def test_examples_that_are_gone_are_named(model: Path, run: Path) -> None:
    (run / EXAMPLES).unlink()
    with pytest.raises(SurgeryError, match=r"examples.jsonl: cannot be read"):
        prove(model, run)


def prove_with(findings: Findings, model: Path, run: Path) -> None:
    """Puts changed findings in a run's place, and proves them."""
    from probes.refusal.findings import write_findings

    write_findings(run, findings)
    prove(model, run)
