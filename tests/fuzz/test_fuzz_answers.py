"""The fuzzed Hub answers as a Hub does before anything is changed, and notes a token that goes elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fuzz_answers
from support.fuzz_answers import ANSWERS, BODIES, HUB_TARGETS, LARGE, TOKEN, mutate_answers, write_answers
from support.fuzzing import FuzzTarget, Workplace

from surgery.errors import SurgeryError
from surgery.hub.errors import http_library


@pytest.fixture(autouse=True)
def client() -> Iterator[None]:
    """Leave huggingface_hub as it was."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = vars(_http)["_GLOBAL_CLIENT_FACTORY"]
    yield
    fuzz_answers._install.cache_clear()
    set_client_factory(before)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    write_answers(tmp_path / "answers")
    return tmp_path / "answers"


@pytest.mark.parametrize("target", HUB_TARGETS, ids=lambda target: target.name)
def test_unchanged_answers_give_a_result(target: FuzzTarget, answers: Path, tmp_path: Path) -> None:
    target.call(answers, tmp_path / "out")
    fetched = {path.name for path in (tmp_path / "out").glob("hub/*/snapshots/*/*")}
    expected = {"rows.jsonl"} if target.name == "hub dataset" else {"config.json", "tokenizer.json", LARGE}
    assert fetched == expected


@pytest.mark.parametrize("target", HUB_TARGETS, ids=lambda target: target.name)
def test_a_repository_that_is_gone_is_refused(target: FuzzTarget, answers: Path, tmp_path: Path) -> None:
    (answers / ANSWERS).write_text("{}")
    with pytest.raises(SurgeryError):
        target.call(answers, tmp_path / "out")


def test_a_token_that_goes_elsewhere_is_noted(answers: Path) -> None:
    library = http_library()
    served = fuzz_answers._Answers()
    served.open(answers)
    for url in ("https://hub.example/x", "https://other.example/x"):
        served.handle_request(library.Request("GET", url, headers={"Authorization": f"Bearer {TOKEN}"}))
    assert served.faults == ["sends the token to other.example"]


def test_the_same_seed_makes_the_same_answers(tmp_path: Path) -> None:
    place = Workplace(tmp_path, tmp_path / "corpus", seed=0)
    write_answers(place.corpus / "hub")
    made = []
    for turn in ("one", "two"):
        for number in range(30):
            place.make_input(HUB_TARGETS[0], number, tmp_path / turn / str(number))
        made.append([(tmp_path / turn / str(n) / name).read_bytes() for n in range(30) for name in (ANSWERS, *BODIES)])
    assert made[0] == made[1]
    assert len(set(made[0])) > 40


def test_an_input_leaves_the_corpus_as_it_is(answers: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in answers.iterdir()}
    place = Workplace(tmp_path, tmp_path, seed=0)
    target = FuzzTarget("hub", ("answers",), BODIES, lambda folder, out: None, mutate=mutate_answers)
    for number in range(20):
        place.make_input(target, number, tmp_path / f"in-{number}")
    assert {path.name: path.read_bytes() for path in answers.iterdir()} == before
