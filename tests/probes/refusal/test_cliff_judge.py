"""Cliff-as-a-Judge: exactly the deepest cliffs of a pool are chosen, and written as rows that trainers load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from support import refusal as refusing
from support.refusal import CLOSE, ONE_THREAD, OPEN, make_model, make_run, no_pictures, rows_of, write_rows

from probes.data.generation_cache import Completion, GenerationCache
from probes.data.markers import find_markers
from probes.data.preparation import open_model
from probes.data.reader import read_data
from probes.data.tokenization import build_sequences
from probes.model.activations import project_hidden_states
from probes.refusal.cliff_judge import JudgedSelection, judge
from probes.refusal.findings import PROBES
from probes.refusal.linear.probes import Probes
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError

ROWS = rows_of(dict.fromkeys(refusing.CELLS, 7), seed=9)
POOL = [{**row, "source": f"s{at}", "weight": at} for at, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        return make_run(model, tmp_path_factory.mktemp("runs") / "run", rows_of(dict.fromkeys(refusing.CELLS, 8)))


def select(
    model: Path, run: Path, out: Path, rows: Sequence[Mapping[str, Any]] = POOL, top: str = "4", **options: Any
) -> JudgedSelection:
    pool = write_rows(out.with_name("pool.jsonl"), rows)
    return judge(str(model), run, str(pool), out, top=top, **{"options": ONE_THREAD, **options})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def brute_force(model: Path, run: Path, pool: Path) -> dict[str, float]:
    """Prompt → plateau − final, from the probe's logit at every token."""
    live, probes = open_model(str(model)), Probes.load(run / PROBES)
    examples = read_data(str(pool)).examples
    sequences = build_sequences(live.tokenizer, examples, find_markers(live.tokenizer, where="m"), where="m")
    found = {}
    for example, sequence in zip(examples, sequences, strict=True):
        (rows,) = project_hidden_states(live, [sequence], probes.weights, probes.biases)
        scores = [1 / (1 + math.exp(-float(logit))) for logit in rows[:, -1]]
        found[example.prompt] = max(scores[sequence.ends[0] : sequence.ends[1]]) - scores[sequence.ends[2] - 1]
    return found


@pytest.mark.parametrize(("top", "count"), [("25%", 7), ("26%", 8), ("1", 1), ("100%", 28)])
def test_exactly_the_top_share_by_plateau_less_final_is_kept(
    top: str, count: int, model: Path, run: Path, tmp_path: Path
) -> None:
    found = select(model, run, tmp_path / "sub.jsonl", top=top)
    scores = brute_force(model, run, tmp_path / "pool.jsonl")
    expected = sorted(scores, key=lambda prompt: -scores[prompt])[:count]
    rows = lines(tmp_path / "sub.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == expected
    assert [row["misalignment"] for row in rows] == pytest.approx([scores[prompt] for prompt in expected], abs=1e-5)
    assert all(row["misalignment"] == pytest.approx(row["plateau"] - row["final"]) for row in rows)
    assert found.n == 28 and len(found.chosen) == count and found.threshold == rows[-1]["misalignment"]
    assert (found.left_out, found.without_response) == (0, 0)


def test_rows_keep_their_fields(model: Path, run: Path, tmp_path: Path) -> None:
    pool = [{**row, "instruction": "theirs", "messages_of": [1]} for row in POOL]
    by_source = {row["source"]: row for row in pool}
    select(model, run, tmp_path / "sub.jsonl", pool)
    for row in lines(tmp_path / "sub.jsonl"):
        own = by_source[row["source"]]
        assert {key: row[key] for key in own if key != "prompt"} == {k: v for k, v in own.items() if k != "prompt"}
        assert row["messages"] == [
            {"role": "user", "content": own["prompt"]},
            {"role": "assistant", "content": f"{OPEN}{own['thinking']}{CLOSE}{own['response']}"},
        ]


def test_trl_loads_conversations(model: Path, run: Path, tmp_path: Path) -> None:
    select(model, run, tmp_path / "sub.jsonl", top="25%")
    loaded = load(tmp_path / "sub.jsonl", tmp_path)
    assert loaded.num_rows == 7
    assert set(loaded.column_names) == {
        "messages",
        "label",
        "thinking",
        "response",
        "source",
        "weight",
        "misalignment",
        "plateau",
        "final",
    }
    assert [message["role"] for message in loaded[0]["messages"]] == ["user", "assistant"]


def test_llama_factory_loads_alpaca_rows(model: Path, run: Path, tmp_path: Path) -> None:
    pool = [{**row, "input": "theirs"} for row in POOL]
    pool[0] = {
        "messages": [{"role": "system", "content": "be good"}, {"role": "user", "content": "ab!?cd"}],
        "thinking": "hm",
        "response": "Sure",
        "source": "system",
    }
    select(model, run, tmp_path / "sub.jsonl", pool, top="100%", style="llama-factory")
    loaded = load(tmp_path / "sub.jsonl", tmp_path)
    assert {"instruction", "input", "output", "system"} <= set(loaded.column_names)
    assert "messages" not in loaded.column_names and "prompt" not in loaded.column_names
    rows = {row["source"]: row for row in loaded}
    assert rows["system"]["system"] == "be good" and rows["s1"]["system"] is None
    assert {row["input"] for row in loaded} == {""}
    assert rows["s1"]["output"] == f"{OPEN}{POOL[1]['thinking']}{CLOSE}{POOL[1]['response']}"


def test_generated_thinking_is_scored_and_not_written(model: Path, run: Path, tmp_path: Path) -> None:
    answered = [{key: value for key, value in row.items() if key != "thinking"} for row in POOL]
    found = select(model, run, tmp_path / "sub.jsonl", answered, top="7")
    assert {cliff.thinking for cliff in found.chosen} == {2}  # the model's own "hm"
    rows = lines(tmp_path / "sub.jsonl")
    assert [row["messages"][1]["content"] for row in rows] == [row["response"] for row in rows]
    assert all("thinking" not in row for row in rows) and OPEN not in (tmp_path / "sub.jsonl").read_text()
    assert not (tmp_path / "sub.jsonl.partial").exists()


def test_prompts_without_a_response_stay_prompts(model: Path, run: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": row["prompt"], "label": row["label"].split("/")[0]} for row in POOL]
    found = select(model, run, tmp_path / "sub.jsonl", prompts)
    assert found.without_response == 4 and "4 of the chosen have no response in the pool" in (found.table().note or "")
    for row in lines(tmp_path / "sub.jsonl"):
        assert [message["role"] for message in row["prompt"]] == ["user"] and "messages" not in row
    select(model, run, tmp_path / "alpaca.jsonl", prompts, style="llama-factory")
    assert {row["output"] for row in lines(tmp_path / "alpaca.jsonl")} == {None}


def test_what_never_closes_is_left_out_and_reported(model: Path, run: Path, tmp_path: Path) -> None:
    endless = [{"prompt": "ab_", "label": "harmful"}, *POOL[:3]]
    found = select(model, run, tmp_path / "sub.jsonl", endless, top="100%")
    assert (found.n, len(found.chosen), found.left_out) == (4, 3, 1)
    assert "1 without a thinking that ends could not be scored" in (found.table().note or "")
    with pytest.raises(SurgeryError, match="none of its 1 examples came to an answer"):
        select(model, run, tmp_path / "none.jsonl", endless[:1], top="1")


def test_a_pool_that_never_thinks_has_no_cliffs(model: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="no example has any thinking, and so no cliff"):
        select(model, run, tmp_path / "sub.jsonl", [{**row, "thinking": ""} for row in POOL])
    assert not (tmp_path / "sub.jsonl").exists()


def test_the_same_pool_gives_the_same_bytes_in_any_batches(model: Path, run: Path, tmp_path: Path) -> None:
    for name, tokens in (("a", None), ("b", None), ("c", 30)):
        select(model, run, tmp_path / f"{name}.jsonl", top="30%", batch_tokens=tokens)
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    assert [row["source"] for row in lines(a)] == [row["source"] for row in lines(c)]


def test_a_selection_that_was_killed_goes_on(
    model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"prompt": row["prompt"]} for row in POOL]
    select(model, run, tmp_path / "whole.jsonl", prompts)
    add, added = GenerationCache.add, []

    def dying(self: GenerationCache, completions: Mapping[str, Completion]) -> None:
        if added:
            raise KeyboardInterrupt
        added.append(len(completions))
        add(self, completions)

    with monkeypatch.context() as patch:
        patch.setattr(GenerationCache, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            select(model, run, tmp_path / "sub.jsonl", prompts)
    partial = tmp_path / "sub.jsonl.partial"
    assert not (tmp_path / "sub.jsonl").exists() and len(lines(partial)) == added[0] == 16
    select(model, run, tmp_path / "sub.jsonl", prompts)
    assert (tmp_path / "sub.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()


def test_a_file_is_only_replaced_when_asked_and_a_folder_never(model: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "sub.jsonl").write_text("theirs\n")
    with pytest.raises(SurgeryError, match=r"exists already. Choose another file, or add --overwrite"):
        select(model, run, tmp_path / "sub.jsonl")
    select(model, run, tmp_path / "sub.jsonl", options=ExecutionOptions(threads=1, overwrite=True))
    assert len(lines(tmp_path / "sub.jsonl")) == 4
    (tmp_path / "folder").mkdir()
    with pytest.raises(SurgeryError, match="is a folder, expected the name of a file"):
        select(model, run, tmp_path / "folder", options=ExecutionOptions(threads=1, overwrite=True))


def test_findings_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", bias=True)
    with pytest.raises(SurgeryError, match=r"its findings are of .* but .*other has the weights"):
        select(other, run, tmp_path / "sub.jsonl")


def load(path: Path, folder: Path) -> datasets.Dataset:
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "datasets"))
    assert isinstance(loaded, datasets.Dataset)
    return loaded
