"""Rows made ready for probing: what a model completes, what is judged, what is left out and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from support import refusal as refusing
from support.refusal import CLOSE, COMPLIES, CONTEXT, OPEN, REFUSES, make_model, rows_of, write_rows

from probes.data.examples import Example
from probes.data.preparation import (
    GenerationOptions,
    PreparedData,
    generation_settings,
    open_model,
    options_from_findings,
    prepare,
    resolve_markers,
)
from probes.data.reader import read_data
from surgery.errors import SurgeryError
from surgery.io.json_io import jsonable
from surgery.models.loaded_model import LoadedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def live(model: Path) -> LoadedModel:
    return open_model(str(model))


def ready(
    live: LoadedModel, folder: Path, rows: Sequence[dict[str, object]], asking: GenerationOptions = GenerationOptions()
) -> PreparedData:
    data = read_data(str(write_rows(folder / "rows.jsonl", rows)))
    return prepare(live, data, asking, model_id="m", cache=folder / "cache.jsonl")


def test_what_is_given_is_kept_in_the_order_of_the_data_and_nothing_is_generated(
    live: LoadedModel, tmp_path: Path
) -> None:
    rows = rows_of(dict.fromkeys(refusing.CELLS, 2))
    found = ready(live, tmp_path, rows)
    assert [(e.prompt, e.thinking, e.response, e.cell) for e in found.examples] == [
        (row["prompt"], row["thinking"], row["response"], row["label"]) for row in rows
    ]
    assert [s.key for s in found.sequences] == [e.key for e in found.examples] == [str(at) for at in range(8)]
    assert found.generated == 0 and found.unfinished == () and not (tmp_path / "cache.jsonl").exists()


def test_what_lacks_is_written_by_the_model_and_judged_by_the_list_of_phrases(
    live: LoadedModel, tmp_path: Path
) -> None:
    found = ready(live, tmp_path, rows_of(dict.fromkeys(refusing.CELLS, 3), whole=False))
    cells = [cell for cell in refusing.CELLS for _ in range(3)]
    assert [e.cell for e in found.examples] == cells
    assert {e.thinking for e in found.examples} == {"hm"} and {e.closing for e in found.examples} == {CLOSE}
    assert [e.response for e in found.examples] == [REFUSES if "refused" in cell else COMPLIES for cell in cells]
    assert found.generated == 12
    decided = {live.tokenizer.decode([s.ids[s.decision]]) for s in found.sequences}
    assert decided == {CLOSE}


def test_thinking_that_never_closes_is_set_apart(live: LoadedModel, tmp_path: Path) -> None:
    rows = [*rows_of({"harmful/refused": 1}, whole=False), {"prompt": "ab_c", "label": "harmful"}]
    found = ready(live, tmp_path, rows)
    assert [e.prompt for e in found.unfinished] == ["ab_c"] and found.unfinished[0].response == ""
    assert len(found.examples) == len(found.sequences) == 1 and found.generated == 2


def test_if_nothing_comes_to_an_answer_that_is_an_error_with_the_limit(live: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"none of its 1 examples .* within 20 tokens.*--max-new-tokens"):
        ready(live, tmp_path, [{"prompt": "ab_c"}], GenerationOptions(max_new_tokens=20))


def test_the_default_limit_is_what_the_context_leaves_the_longest_prompt_that_is_asked(live: LoadedModel) -> None:
    asked = Example("0", ({"role": "user", "content": "abc"},), "g")
    given = Example("1", ({"role": "user", "content": "abcdefg" * 20},), "g", thinking="hm", response="Sure")
    settings = generation_settings(
        live, [asked, given], resolve_markers(live, GenerationOptions()), GenerationOptions(), model_id="m"
    )
    assert settings.max_new_tokens == CONTEXT - len("abc") - 5  # <s> <user> … </s> <bot> [THINK]
    assert generation_settings(live, [], None, GenerationOptions(max_new_tokens=7), model_id="m").max_new_tokens == 7


def test_all_examples_that_do_not_fit_the_model_are_named(live: LoadedModel, tmp_path: Path) -> None:
    rows = rows_of({"harmful/refused": 2})
    with pytest.raises(SurgeryError, match=r"example 0: has a thinking.*\n.*example 1: has a thinking"):
        ready(live, tmp_path, rows, GenerationOptions(no_thinking=True))
    lacking = [{key: value for key, value in row.items() if key != "thinking"} for row in rows]
    with pytest.raises(SurgeryError, match=r"example 0: has a response, but no thinking"):
        ready(live, tmp_path, lacking)


def test_markers_are_found_or_given_or_said_not_to_be(live: LoadedModel) -> None:
    found = resolve_markers(live, GenerationOptions())
    assert found is not None and (found.open, found.close) == (OPEN, CLOSE)
    given = resolve_markers(live, GenerationOptions(think_open="<a>", think_close="\n</a>\n"))
    assert given is not None and (given.opening, given.closing) == ("<a>\n", "\n</a>\n")
    assert resolve_markers(live, GenerationOptions(no_thinking=True)) is None
    with pytest.raises(SurgeryError, match="--no-thinking says that there are no markers"):
        resolve_markers(live, GenerationOptions(no_thinking=True, think_open=OPEN))


def test_phrases_of_a_file_or_a_list_judge_alike(live: LoadedModel, tmp_path: Path) -> None:
    rows = [{**row, "label": "harmful"} for row in rows_of({"harmful/refused": 1, "harmful/complied": 1})]
    path = tmp_path / "phrases.txt"
    path.write_text("# what counts\nSure\n", encoding="utf-8")
    for phrases in (path, ("Sure",)):
        found = ready(live, tmp_path, rows, GenerationOptions(phrases=phrases))
        assert [e.refused for e in found.examples] == [False, True]


def test_a_guard_is_loaded_once_and_judges_what_the_data_do_not_say(
    live: LoadedModel, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def stand_in(examples: Sequence[Example], guard: object, **settings: object) -> list[Example]:
        asked.append((guard.name, len(examples)))  # type: ignore[attr-defined]
        return [
            Example(**{**vars(e), "refused": len(e.prompt) > 8 if e.refused is None else e.refused}) for e in examples
        ]

    monkeypatch.setattr("probes.data.preparation.label_by_guard", stand_in)
    rows = [
        {"prompt": "abc", "thinking": "hm", "response": "Sure"},
        {"prompt": "abcabcabc", "thinking": "", "response": "a"},
    ]
    found = ready(live, tmp_path, rows, GenerationOptions(guard=str(model)))
    assert [e.refused for e in found.examples] == [False, True] and asked == [(str(model), 2)]


def test_a_guard_and_phrases_are_one_too_many(live: LoadedModel, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="--guard and --refusal-phrases"):
        ready(live, tmp_path, rows_of({"harmful/refused": 1}), GenerationOptions(guard=str(model), phrases=("no",)))


def test_a_runs_settings_give_back_how_it_asked() -> None:
    asking = GenerationOptions(think_close="</t>", max_new_tokens=5, phrases=("No way",), seed=3)
    settings = json.loads(json.dumps({"asking": jsonable(asdict(asking))}))
    assert asdict(options_from_findings(settings)) | {"phrases": ("No way",)} == asdict(asking)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float33"}, r"--dtype: got 'float33', expected auto, float32"),
        ({"dtype": "int8"}, r"--dtype: got 'int8'"),
        ({"device": "gpu"}, r"--device: got 'gpu', expected cpu or cuda"),
    ],
)
def test_a_device_or_dtype_that_is_none_is_refused_before_anything_is_loaded(
    options: dict[str, str], text: str, model: Path
) -> None:
    with pytest.raises(SurgeryError, match=text) as error:
        open_model(str(model), **options)
    assert error.value.exit_code == 2


def test_a_model_without_tokenizer_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(SurgeryError, match=r"bare: has no tokenizer beside its weights"):
        open_model(str(bare))
