"""Promises of probes.experts.report: what was found is told in words and tables, whichever way it came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.damage import failures_of

from probes.data.records import DataRecord, IntervalRecord, ModelRecord
from probes.experts.findings import (
    ExpertFindings,
    ExpertRecord,
    MarkerRecord,
    OverlapRecord,
    PointRecord,
    SweepRecord,
    read_expert_findings,
    write_expert_findings,
)
from probes.experts.report import TABLE_EXPERTS, expert_sentences, expert_tables, write_expert_report
from surgery.reporting.report import Table

N_EXPERTS = 20
MODEL = ModelRecord(
    ref="org/m", repo_id=None, revision=None, xxh3="ab12", tokenizer="t", template="p", dtype="bfloat16"
)
DATA = DataRecord(ref="d.jsonl", revision=None, xxh3="cd34")


def expert(number: int, rank: int | None, **other: Any) -> ExpertRecord:
    given = {
        "layer": 3,
        "expert": number,
        "npmi": 0.5 - 0.01 * number,
        "by_marker": [0.5],
        "smoothed": IntervalRecord(value=0.4, low=0.3, high=0.5),
        "difference": 0.25,
        "fires": 120,
        "at_marker": 30,
        "rate": 0.12,
        "q": 0.001,
        "rank": rank,
        "rank_low": None if rank is None else 1,
        "rank_high": None if rank is None else 4,
        "published_rank": number + 1,
        "why": None if rank else "fires at 1 positions, fewer than 50",
        "norm_ratio": 0.05 if rank == 1 else None,
    }
    return ExpertRecord(**{**given, **other})


def point(beta: float, part: str, value: float, control: int | None = None) -> PointRecord:
    score = IntervalRecord(value=value, low=value - 0.1, high=value + 0.1, n=50)
    collapsed = IntervalRecord(value=0.25, low=0.1, high=0.4, n=8) if part == "choice" else None
    names = ["L3E1"] if control is None else [f"L3E{9 + control}"]
    return PointRecord(beta=beta, experts=names, control=control, part=part, scores={"t": score}, collapsed=collapsed)


def sweep(best: float) -> SweepRecord:
    points = [point(1, "choice", 0.5), point(8, "choice", 0.7), point(1, "test", 0.45), point(8, "test", 0.65)]
    controls = [point(8, "test", value, number) for number, value in enumerate((0.4, 0.5))]
    return SweepRecord(tasks=["t"], experts=["L3E1"], way="weight", phase="all", points=[*points, *controls], best=best)


def findings(ranked: int = 2, **other: Any) -> ExpertFindings:
    rows = [expert(number, number if number <= ranked else None) for number in range(1, N_EXPERTS)]
    rows.append(expert(0, None))
    given = {
        "model": MODEL,
        "data": DATA,
        "settings": {},
        "markers": [MarkerRecord(text="<think>", weight=1, positions=60)],
        "positions": 1000,
        "by_part": {"prompt": 600, "thinking": 300, "answer": 100},
        "sequences": 60,
        "generated": 5,
        "layers": [3],
        "n_experts": [N_EXPERTS],
        "top_k": [2],
        "warnings": [],
        "experts": rows,
    }
    return ExpertFindings(**{**given, **other})


def cells(table: Table) -> list[list[Any]]:
    return [list(row) for row in table.rows]


def test_the_first_expert_is_told_and_what_the_published_score_would_say() -> None:
    said = expert_sentences(findings())
    assert said[0] == (
        "L3E1 goes most with the markers: nPMI 0.490 as published, 0.400 [0.300, 0.500] smoothed; it fires at 12.0% of "
        "all positions."
    )
    assert said[1] == ("By the published score alone L3E0 would come first (fires at 1 positions, fewer than 50).")
    assert len(said) == 2


def test_where_both_agree_nothing_is_said_of_the_published_score() -> None:
    rows = [expert(1, 1, published_rank=1), expert(0, None, published_rank=2)]
    assert len(expert_sentences(findings(experts=rows))) == 1


def test_without_a_ranking_there_is_one_sentence_and_the_published_order() -> None:
    found = findings(ranked=0)
    assert expert_sentences(found) == ["No expert has evidence enough to be ranked."]
    ranking = expert_tables(found)[1]
    assert [row[0] for row in cells(ranking)] == [str(row.name) for row in found.experts[:TABLE_EXPERTS]]
    assert {row[1] for row in cells(ranking)} == {None}


def test_the_tables_hold_the_counts_and_the_ranked_experts() -> None:
    counted, ranking = expert_tables(findings())
    assert cells(counted) == [
        ["prompt", 600, None],
        ["thinking", 300, None],
        ["answer", 100, None],
        ["marker <think>", 60, 1.0],
    ]
    assert "60 texts, 1,000 positions; 5 were completed by the model. 20 experts in 1 layers." in str(counted.note)
    assert cells(ranking)[0] == [
        "L3E1",
        1,
        "1 to 4",
        0.49,
        "0.400 [0.300, 0.500]",
        0.25,
        0.12,
        30,
        0.001,
        0.05,
        2,
    ]
    assert len(ranking.rows) == 2 and "18 of 20 experts" in str(ranking.note)


def test_overlap_is_told() -> None:
    other = OverlapRecord(data=DATA, top=10, shared=["L3E1"], jaccard=0.1, spearman=IntervalRecord(value=0.5))
    assert expert_sentences(findings(overlap=other))[-1] == "Of the first 10, 1 are among those of d.jsonl, too."


def test_a_gain_is_told_on_the_half_that_it_was_not_chosen_on_beside_random_experts() -> None:
    found = findings(sweep=sweep(8))
    assert expert_sentences(found)[-1] == (
        "β = 8, chosen on one half of t, takes the other from 45.0% [35.0%, 55.0%] to 65.0% [55.0%, 75.0%]; random "
        "experts of the same layers give 40.0% to 50.0%."
    )
    rows = cells(expert_tables(found)[2])
    assert [row[:3] for row in rows] == [
        ["choice", "L3E1", 1],
        ["choice", "L3E1", 8],
        ["test", "L3E1", 1],
        ["test", "L3E1", 8],
        ["test", "random 0: L3E9", 8],
        ["test", "random 1: L3E10", 8],
    ]
    assert [row[-1] for row in rows] == [0.25, 0.25, None, None, None, None]


def test_no_gain_is_told_as_one() -> None:
    assert expert_sentences(findings(sweep=sweep(1)))[-1] == (
        "No β of the grid is better than leaving t as it is (45.0% [35.0%, 55.0%] on the test half; β = 8 gives 65.0% "
        "[55.0%, 75.0%]; random experts of the same layers give 40.0% to 50.0%)."
    )


@pytest.mark.parametrize(
    ("found", "pictures"),
    [
        (findings(sweep=sweep(8), warnings=["Take care."]), {"experts.png", "ranking.png", "beta-0.png"}),
        (findings(ranked=0), {"experts.png"}),
    ],
)
def test_the_page_is_made_of_what_lies_in_the_folder(found: ExpertFindings, pictures: set[str], tmp_path: Path) -> None:
    write_expert_findings(tmp_path, found)
    path = write_expert_report(tmp_path, name="here")
    page = path.read_text(encoding="utf-8")
    assert {picture.name for picture in tmp_path.glob("*.png")} == pictures
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    for text in ("The cognitive experts of org/m", "Experts by nPMI with the markers", "Folder here.", "cd34"):
        assert text in page
    assert ("Note: Take care." in page) == bool(found.warnings)
    assert page.count("<img") + page.count("<svg") >= len(pictures)


def test_damaged_findings_are_named_or_shown(tmp_path: Path) -> None:
    write_expert_findings(tmp_path, findings(sweep=sweep(8)))

    def use() -> None:
        found = read_expert_findings(tmp_path)
        expert_sentences(found)
        for table in expert_tables(found):
            table.to_markdown()

    assert failures_of(tmp_path / "results.json", use) == []
