"""Findings for people: what the tables hold, what the sentences say, and a page that is whole in itself."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path

import pytest
from support import refusal as refusing
from support.refusal import ONE_THREAD, make_model, make_run, rows_of

from probes.data.records import REPORT, IntervalRecord
from probes.refusal.findings import CausalRecord, Findings, read_findings, write_findings
from probes.refusal.heads.ablation_study import ProofOptions
from probes.refusal.heads.causal_proof import prove_heads
from probes.refusal.report import FIGURES, read_traces, write_report
from probes.refusal.tables import refusal_sentences, refusal_tables
from surgery.reporting.report import Table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a proof and all its pictures."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_model(folder / "m")
    run = make_run(model, folder / "run", rows_of(dict.fromkeys(refusing.CELLS, 6)))
    prove_heads(str(model), run, proof=ProofOptions(controls=2, examples=4), options=ONE_THREAD)
    return run


@pytest.fixture(scope="module")
def found(run: Path) -> Findings:
    return read_findings(run)


def titled(findings: Findings, word: str) -> Table:
    return next(table for table in refusal_tables(findings) if word in table.title)


def test_the_tables_hold_the_findings(found: Findings) -> None:
    assert [table.title for table in refusal_tables(found)] == [
        "Examples",
        "Probes, by depth",
        "Cliffs",
        "Heads that write against refusal",
        "Heads ablated, set by set",
    ]
    assert [tuple(row) for row in titled(found, "Examples").rows] == [(cell, 6) for cell in refusing.CELLS]
    assert [row[0] for row in titled(found, "write against").rows] == [str(row.name) for row in found.ranked]
    assert [row[0] for row in titled(found, "Probes").rows] == [0, 1, 2, 3]
    assert {row[0]: row[1] for row in titled(found, "Cliffs").rows} == dict.fromkeys(refusing.CELLS, 6)
    proof = titled(found, "ablated")
    assert [row[0] for row in proof.rows][:3] == ["none", "1: + L1H2", "2: + L2H1"]
    assert proof.rows[0][2] == 0.0 and proof.rows[2][2] == 1.0


def test_a_second_data_set_has_a_table_of_its_own(found: Findings) -> None:
    both = found.model_copy(update={"transfer": found.probes, "transfer_data": found.data})
    assert refusal_tables(both)[2].title == f"The same probes on {found.data.ref}"


def test_the_page_holds_every_picture_and_table_and_nothing_from_elsewhere(run: Path, found: Findings) -> None:
    page = (run / REPORT).read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    stored = {(run / f"{name}.png").read_bytes() for name in FIGURES}
    assert len(pictures) == 6 and {base64.b64decode(picture) for picture in pictures} == stored
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for table in refusal_tables(found):
        assert table.title in page
    assert found.model.xxh3 in page and found.data.xxh3 in page


def test_pictures_of_an_earlier_report_do_not_stay(run: Path, found: Findings, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    write_findings(copy, found.model_copy(update={"causal": None}))
    write_report(copy, name="run")
    assert {path.stem for path in copy.glob("*.png")} == set(FIGURES) - {"cumulative", "screen"}
    assert "Heads ablated" not in (copy / REPORT).read_text(encoding="utf-8")


def test_traces_are_read_with_their_segments(run: Path) -> None:
    examples, sequences, traces = read_traces(run)
    assert len(examples) == len(sequences) == len(traces) == 24
    for example, sequence, trace in zip(examples, sequences, traces, strict=True):
        assert len(sequence.span("thinking")) == len(example.thinking or "")
        assert len(sequence.span("closing")) == 1 and len(trace) == len(sequence.ids) == sequence.ends[3]


def test_the_sentences_tell_cliff_head_and_proof(found: Findings) -> None:
    probe, cliff, calm, head, proof = refusal_sentences(found)
    assert probe.startswith("The probe after the final norm tells refused from complied with an AUROC of ")
    assert cliff.startswith("On harmful/complied examples (n = 6) refusal stands at ")
    assert cliff.endswith("just before the answer; it falls at the last token before the answer.")
    assert calm.startswith("For comparison, harmless/complied (n = 6): ")
    assert head.startswith("The head that writes most against refusal there is L1H2 (-")
    assert re.fullmatch(
        r"Ablating L1H2, L2H1.* takes refusal from 0% to 100%; as many random heads give at most 0%\.", proof
    )


@pytest.mark.parametrize(
    ("onset", "text"),
    [(0, "it falls at the last token before"), (-1, "it falls 1 token earlier"), (-2.5, "it falls 2.5 tokens earlier")],
)
def test_an_onset_is_told_in_words(onset: float, text: str, found: Findings) -> None:
    rows = [row.model_copy(update={"onset": onset}) for row in found.cliffs]
    assert text in refusal_sentences(found.model_copy(update={"cliffs": rows}))[1]


def test_without_a_head_against_refusal_none_is_named(found: Findings) -> None:
    rows = [
        row.model_copy(update={"exact": IntervalRecord(value=0.5), "paper": IntervalRecord(value=0.5)})
        for row in found.heads
    ]
    sentences = refusal_sentences(found.model_copy(update={"heads": rows, "causal": None}))
    assert sentences[-1] == "No head writes against refusal there."


def test_a_model_without_heads_has_a_report_all_the_same(run: Path, found: Findings, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    bare = found.model_copy(update={"heads": [], "skipped_layers": [0, 1, 2], "causal": None})
    write_findings(copy, bare)
    write_report(copy, name="run")
    assert not (copy / "heads.png").exists() and refusal_sentences(bare)[-1] == "No head is understood."
    assert "Layers without heads that are understood, skipped: 0, 1, 2." in (copy / REPORT).read_text(encoding="utf-8")


def test_a_proof_without_a_set_says_why(found: Findings) -> None:
    assert found.causal is not None
    none = found.causal.model_copy(update={"steps": [], "control": [], "stopped": "L1H2 would take KL to 2, over 0.1"})
    sentences = refusal_sentences(found.model_copy(update={"causal": none}))
    assert sentences[-1] == "No set of heads was found: L1H2 would take KL to 2, over 0.1."


def test_where_answers_were_not_judged_the_score_is_told(found: Findings) -> None:
    causal = found.causal
    assert isinstance(causal, CausalRecord)
    base = causal.base.model_copy(update={"refusal": None})
    sentences = refusal_sentences(found.model_copy(update={"causal": causal.model_copy(update={"base": base})}))
    assert "raises the probe's score to" in sentences[-1]
