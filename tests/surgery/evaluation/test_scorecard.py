from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import SurgeryError
from surgery.evaluation.scorecard import (
    BEGIN,
    END,
    is_result,
    losses,
    read_scores,
    score_figure,
    score_table,
    write_scores,
)
from surgery.evaluation.scoring import Score

NAN = math.nan
MEMBER = Score("A", "sums", "acc", 0.9, 0.85, 0.94, 400, True)
OTHER = Score("B", "sums", "acc", 0.1, 0.08, 0.14, 400, True)
RESULT = Score("OUT", "sums", "acc", 0.88, 0.83, 0.92, 400, True)
COMMAND = "surgery eval A B OUT --task sums"


def table_of(*scores):
    table = score_table(scores)
    return [getattr(column, "name", column) for column in table.columns], [list(row) for row in table.rows]


def test_models_stand_side_by_side_with_the_best_and_the_worse_marked():
    columns, rows = table_of(MEMBER, OTHER, RESULT)
    assert columns == ["task", "metric", "A", "B", "OUT", "n"]
    assert rows == [
        ["sums", "acc ↑", "0.900 [0.850, 0.940] ★", "0.100 [0.080, 0.140] ▽", "0.880 [0.830, 0.920]", "400"]
    ]


def test_where_lower_is_better_the_lowest_is_the_best():
    scores = [
        Score("A", "t", "perplexity", 12.5, 12.0, 13.0, 1500, False),
        Score("B", "t", "perplexity", 9.0, 8.5, 9.5, 1400, False),
    ]
    assert table_of(*scores)[1] == [
        ["t", "perplexity ↓", "12.50 [12.00, 13.00] ▽", "9.000 [8.500, 9.500] ★", "1,500 / 1,400"]
    ]
    assert "bits per byte between all" in score_table(scores).note
    assert "bits per byte" not in score_table([MEMBER, OTHER]).note


def test_nothing_is_marked_where_there_is_nothing_to_choose():
    unknown = [Score(name, "t", "f", value, NAN, NAN, 5) for name, value in (("A", 0.5), ("B", 0.7))]
    assert table_of(*unknown)[1] == [["t", "f", "0.500", "0.700", "5"]]
    equal = [Score(name, "t", "f", 0.5, 0.4, 0.6, 5, True) for name in "AB"]
    assert table_of(*equal)[1] == [["t", "f ↑", "0.500 [0.400, 0.600]", "0.500 [0.400, 0.600]", "5"]]
    assert "★" not in score_table([MEMBER]).note


def test_equal_bests_are_both_marked_and_a_nan_never_is():
    scores = [
        Score(name, "t", "f", value, NAN, NAN, 5, True)
        for name, value in zip("ABCD", (0.7, 0.7, 0.1, NAN), strict=True)
    ]
    assert table_of(*scores)[1] == [["t", "f ↑", "0.700 ★", "0.700 ★", "0.100", "NaN", "5"]]


def test_rows_keep_the_order_asked_and_gaps_are_dashes():
    other = Score("B", "a task before", "acc", 0.5, 0.4, 0.6, 9, True)
    table = score_table([MEMBER, other])
    assert [row[0] for row in table.rows] == ["sums", "a task before"]
    assert [row[3] for row in table.rows] == [None, "0.500 [0.400, 0.600]"]
    assert "| – |" in table.to_markdown()


def test_the_picture_has_a_panel_per_score_and_darkens_every_best(monkeypatch):
    drawn = {}

    def keep(title, panels, *, best):
        drawn.update(panels=panels, best=best)

    monkeypatch.setattr("surgery.reporting.plots.plot_score_bars", keep)
    values = {"a": 1.0, "b": 1.0, "c": 0.5}
    scores = [Score(model, "sums", "acc", value, 0.0, 1.0, 9, True) for model, value in values.items()]
    score_figure(scores)
    assert drawn["best"] == {"sums, acc ↑": ["a", "b"]}
    assert list(drawn["panels"]["sums, acc ↑"]) == ["a", "b", "c"]


def test_a_result_that_is_worse_than_a_member_is_told():
    assert losses([MEMBER, OTHER, RESULT], "OUT") == []
    assert losses([MEMBER, OTHER, RESULT], "B") == [
        "B is worse than A on sums: acc 0.100 against 0.900, and their 95 % intervals do not touch."
    ]


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def result(tmp_path):
    (tmp_path / "surgery.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n\n# OUT\n\nMade of A and B.\n", encoding="utf-8")
    return tmp_path


def test_the_card_gets_the_table_the_command_and_n(result):
    before = card_of(result)
    assert write_scores(result, [MEMBER, OTHER, RESULT], COMMAND) == result / "README.md"
    card = card_of(result)
    assert card.startswith(before)
    section = card.removeprefix(before)
    assert section.startswith(f"\n{BEGIN}\n## Scores\n\n| task | metric | A | B | OUT | n |\n")
    assert "| 0.880 [0.830, 0.920] | 400 |" in section
    assert section.endswith(f"```\n{COMMAND}\n```\n{END}\n")
    assert sorted(path.name for path in result.iterdir()) == ["README.md", "scores.json", "surgery.json"]


def test_the_numbers_are_kept_and_read_back_for_the_folder_s_own_model(result):
    own = [
        Score(str(result), "sums", "acc", 0.88, 0.83, 0.92, 400, True),
        Score(str(result), "t", "f", 0.5, NAN, NAN, 5),
    ]
    write_scores(result, [MEMBER, *own], COMMAND)
    found = read_scores(result)
    assert found.command == COMMAND
    assert found.scores[0] == own[0]
    assert math.isnan(found.scores[1].low) and found.scores[1].value == 0.5
    assert [score.model for score in found.scores] == [str(result)] * 2


def test_no_scores_of_its_own_are_none(result):
    assert read_scores(result) is None
    write_scores(result, [MEMBER, OTHER], COMMAND)
    assert read_scores(result) is None


def test_scores_of_other_weights_are_never_the_folder_s(result):
    write_scores(result, [replace(RESULT, model=str(result))], COMMAND)
    assert read_scores(result) is not None
    (result / "surgery.json").write_text('{"tensors": {"w": {"xxh3": "0"}}}')
    assert read_scores(result) is None


@pytest.mark.parametrize(
    ("text", "fault"), [('{"schema": 9}', "schema 9, this version reads 1"), ("[]", "not a JSON object")]
)
def test_scores_that_cannot_be_read_are_an_error(result, text, fault):
    (result / "scores.json").write_text(text)
    with pytest.raises(SurgeryError, match=rf"scores.json: .*{fault}"):
        read_scores(result)


def test_damaged_scores_are_an_error(result):
    write_scores(result, [RESULT], COMMAND)
    path = result / "scores.json"
    path.write_text(path.read_text().replace('"value"', '"worth"'))
    with pytest.raises(SurgeryError, match=r"scores.json: is damaged. Score the model again"):
        read_scores(result)


def test_a_second_run_replaces_the_section_and_the_same_run_changes_nothing(result):
    write_scores(result, [MEMBER, RESULT], COMMAND)
    first = card_of(result)
    write_scores(result, [MEMBER, RESULT], COMMAND)
    assert card_of(result) == first
    (result / "README.md").write_text(first + "\nA word by hand.\n", encoding="utf-8")
    write_scores(result, [OTHER, RESULT], "surgery eval B OUT --task sums")
    card = card_of(result)
    assert card.count("## Scores") == 1
    assert "surgery eval B OUT" in card and COMMAND not in card
    assert card.startswith("---\ntags: [a]") and card.endswith(f"{END}\n\nA word by hand.\n")


def test_without_a_card_the_section_is_the_card(result):
    (result / "README.md").unlink()
    write_scores(result, [RESULT], COMMAND)
    assert card_of(result).startswith(f"{BEGIN}\n## Scores")


def test_the_card_keeps_its_permissions(result):
    (result / "README.md").chmod(0o664)
    write_scores(result, [RESULT], COMMAND)
    assert (result / "README.md").stat().st_mode & 0o777 == 0o664


def test_a_folder_without_a_manifest_is_never_touched(result):
    (result / "surgery.json").unlink()
    before = card_of(result)
    with pytest.raises(SurgeryError, match=r"has no surgery.json"):
        write_scores(result, [RESULT], COMMAND)
    assert card_of(result) == before


def test_scores_and_a_manifest_that_are_links_to_elsewhere_are_not_read(result, tmp_path_factory):
    write_scores(result, [RESULT], COMMAND)
    for name in ("scores.json", "surgery.json"):
        outside = tmp_path_factory.mktemp("outside") / name
        (result / name).rename(outside)
        (result / name).symlink_to(outside)
        with pytest.raises(SurgeryError, match=f"{name}: is a link that leads out of its folder"):
            read_scores(result)
        (result / name).unlink()
        outside.rename(result / name)


def test_a_manifest_whose_tensors_have_no_hashes_is_damaged(result):
    write_scores(result, [RESULT], COMMAND)
    (result / "surgery.json").write_text('{"tensors": {"a": "b"}}')
    with pytest.raises(SurgeryError, match=r'surgery.json: "tensors" names no hashes'):
        read_scores(result)


@pytest.mark.parametrize("damaged", [f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}", END])
def test_damaged_markers_are_an_error_and_the_card_stays(result, damaged):
    (result / "README.md").write_text(damaged, encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"README.md: does not have each of .* once, in this order.*--no-card"):
        write_scores(result, [RESULT], COMMAND)
    assert card_of(result) == damaged


def test_a_write_that_fails_leaves_the_old_card_and_nothing_else(result, monkeypatch):
    before = card_of(result)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SurgeryError, match="the disk is full"):
        write_scores(result, [RESULT], COMMAND)
    assert card_of(result) == before
    assert sorted(path.name for path in result.iterdir()) == ["README.md", "surgery.json"]


def test_only_local_folders_that_this_tool_wrote_are_results(result, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    assert is_result(Checkpoint("x", result, (), {}))
    assert not is_result(Checkpoint("org/x", result, (), {}, repo_id="org/x"))
    assert not is_result(Checkpoint("x", bare, (), {}))
    assert not is_result(Checkpoint("x.safetensors", None, (), {}))
