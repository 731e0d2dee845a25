"""Promises of recipes.run.cache_keys, things and hashes: a key changes exactly when what a step makes could change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hub_server import HubServer
from support.recipe_runs import make, node

from surgery import lab
from surgery.errors import SurgeryError
from surgery.recipes.run.cache_keys import KeyedOutput, cache_key
from surgery.recipes.run.content_hashes import FileHashCache, output_hash
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import StepPaths
from surgery.recipes.types import Given, RecipeStep, StepOutput


def key(step: RecipeStep, **done: KeyedOutput) -> str | None:
    return cache_key(step, done, InputResolver(FileHashCache()))


def of(**given: Given) -> str | None:
    return key(node("a", given))


def test_options_that_change_no_byte_are_left_out() -> None:
    assert of(threads=1) == of(threads=2) == of()


def test_the_threads_of_a_training_count_for_they_split_its_sums() -> None:
    from cli.commands.run import commands

    command = commands()["grow run"]
    keys = {key(node("a", {"plan": "small", "threads": n}, command=command)) for n in (1, 2)}
    assert len(keys) == 2
    assert key(node("a", {"plan": "small", "save-every": 1.0}, command=command)) == key(
        node("a", {"plan": "small"}, command=command)
    )


def test_a_default_that_is_written_out_is_the_same_key() -> None:
    assert of(count=1, scale=1, text="a") == of()


@pytest.mark.parametrize("given", [{"count": 2}, {"scale": 0.5}, {"text": "b"}, {"fast": True}, {"fast": False}])
def test_every_other_option_counts(given: dict[str, Given]) -> None:
    assert of(**given) != of()


def test_the_command_and_the_order_of_a_list_count() -> None:
    assert key(node("a", command=make("other"))) != of()
    assert of(inputs=("x", "y")) != of(inputs=("y", "x"))


def test_the_name_of_a_step_does_not_count() -> None:
    assert key(node("a")) == key(node("b"))


def test_another_steps_output_counts_by_its_key_its_hash_and_the_place_in_it() -> None:
    step = node("b", {"inputs": (StepOutput("a"),)})
    one = key(step, a=KeyedOutput("k", "h"))
    assert one == key(step, a=KeyedOutput("k", "h"))
    assert one not in (key(step, a=KeyedOutput("k", "other")), key(step, a=KeyedOutput("other", "h")))
    assert one != key(node("b", {"inputs": (StepOutput("a", "inside"),)}), a=KeyedOutput("k", "h"))


def test_there_is_no_key_before_what_is_needed_is_done() -> None:
    assert key(node("b", {"inputs": (StepOutput("a"),)})) is None


def test_a_folder_counts_by_its_content_not_by_its_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    before = of(text=one)
    assert before == of(text=two)
    (tmp_path / "one" / "config.json").write_text('{"a": 1}')
    assert of(text=one) != before


def test_a_card_and_scores_beside_weights_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = of(text=str(tmp_path))
    (tmp_path / "README.md").write_text("# better")
    (tmp_path / "scores.json").write_text("{}")
    assert of(text=str(tmp_path)) == before


def test_what_a_config_names_counts(tmp_path: Path) -> None:
    model, config = tmp_path / "model", tmp_path / "merge.yml"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config.write_text(f"models: [{{model: {model}}}, {{model: lab:sft}}]\n")
    before = of(text=str(config))
    (model / "config.json").write_text('{"a": 1}')
    assert of(text=str(config)) != before


def test_the_files_that_a_corpus_matches_count(tmp_path: Path) -> None:
    from cli.commands.run import commands

    (tmp_path / "a.txt").write_text("a")
    command = commands()["grow tokenizer"]
    given: dict[str, Given] = {"corpus": (f"{tmp_path}/*.txt",), "vocab": 300}
    before = key(node("a", given, command=command))
    (tmp_path / "b.txt").write_text("b")
    assert key(node("a", given, command=command)) != before


def test_a_lab_model_counts_by_its_recipe_and_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    thing = InputResolver(FileHashCache()).resolve("lab:grpo")
    assert thing is not None and thing.content is not None
    assert lab.path_of("grpo").parent.name in thing.content
    assert "trained first" in thing.note
    assert not list(tmp_path.iterdir())


def test_a_lab_model_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(SurgeryError, match="no lab model is called 'grop'"):
        of(text="lab:grop")


def test_a_repository_counts_by_its_commit(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    server.add("org/model", folder)
    seen = InputResolver(FileHashCache()).resolve("org/model")
    assert seen is not None and seen.content is not None and seen.content.startswith("hub/org/model@")
    assert (seen.n_bytes, seen.missing) == (100, 102)
    assert of(text="org/model") != of(text="org/other")


def test_what_cannot_be_looked_up_counts_as_it_is_typed_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    thing = InputResolver(FileHashCache()).resolve("org/surely-not-cached")
    assert thing is not None and thing.content is None
    assert "no complete copy in the cache" in thing.note


def test_weights_are_known_by_their_tensors_not_by_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file(tensors, tmp_path / "1.safetensors", metadata={"when": "now"})
    save_file(tensors, tmp_path / "2.safetensors")
    save_file({"a": torch.arange(6.0).reshape(3, 2)}, tmp_path / "3.safetensors")
    hashes = FileHashCache()
    one, two, three = (hashes.hash_file(tmp_path / f"{n}.safetensors") for n in (1, 2, 3))
    assert one == two != three


def test_a_kept_hash_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, file = tmp_path / "hashes.json", tmp_path / "file"
    file.write_text("one")
    hashes = FileHashCache(kept)
    found = hashes.hash_file(file)
    hashes.save()
    reads: list[Path] = []
    monkeypatch.setattr("surgery.recipes.run.content_hashes._bytes_hash", lambda path: reads.append(path) or "new")
    assert FileHashCache(kept).hash_file(file) == found
    assert not reads
    file.write_text("two!")
    assert FileHashCache(kept).hash_file(file) == "new"


def test_a_damaged_memory_of_hashes_is_forgotten(tmp_path: Path) -> None:
    kept, file = tmp_path / "hashes.json", tmp_path / "file"
    file.write_text("one")
    kept.write_text("{")
    assert FileHashCache(kept).hash_file(file) == FileHashCache().hash_file(file)


def test_a_byte_that_flips_is_noticed_though_size_and_name_stay(tmp_path: Path) -> None:
    path = tmp_path / "out" / "m.safetensors"
    path.parent.mkdir()
    save_file({"a": torch.arange(6.0)}, path)
    hashes = FileHashCache()
    files = hashes.hash_files(path.parent)
    assert hashes.is_intact(path.parent, files)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert not hashes.is_intact(path.parent, files)
    path.unlink()
    assert not hashes.is_intact(path.parent, files)


def test_what_a_probe_found_counts_and_how_long_a_growth_took_does_not(tmp_path: Path) -> None:
    place = StepPaths(tmp_path, tmp_path / "out")
    probed = {"a.safetensors": "1", "surgery.json": "2", "results.json": "3"}
    grown = {"stage-1/model.safetensors": "1", "stage-1/surgery.json": "2", "results.json": "3"}
    for files, counts in ((probed, True), (grown, False)):
        found = [output_hash(place, {**files, "results.json": each}, run_folder=tmp_path) for each in "34"]
        assert (found[0] != found[1]) is counts


def test_the_name_of_a_short_run_folder_is_no_part_of_what_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for run in (Path("a"), Path("run")):
        place = StepPaths(run / "steps" / "x", run / "steps" / "x" / "out")
        place.folder.mkdir(parents=True)
        place.text.write_text(f"a run of data: {run}/steps/m/out, {run.absolute()}/steps/m/out\n")
        found.append(output_hash(place, {}, run_folder=run))
    assert found[0] == found[1]


def test_what_was_printed_is_known_wherever_the_run_lies(tmp_path: Path) -> None:
    found = []
    for run in (tmp_path / "a", tmp_path / "a longer name"):
        place = StepPaths(run / "steps" / "x", run / "steps" / "x" / "out")
        place.folder.mkdir(parents=True)
        width = len(str(run))
        place.text.write_text(f" model {' ' * width} n\n {'─' * (width + 8)}\n {run}/steps/m/out  3\n")
        found.append(output_hash(place, {}, run_folder=run))
    assert found[0] == found[1]
