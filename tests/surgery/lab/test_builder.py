from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery import lab
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.lab import builder
from surgery.lab.recipe import GrpoTraining, QwenShape, ReasoningRecipe, SpecialistsRecipe
from surgery.lab.sums import CHARACTERS
from surgery.lab.tokenizer import vocabulary
from surgery.runtime import progress, progress_lines

FULL = ReasoningRecipe()
QUICK = replace(
    FULL,
    shape=QwenShape(layers=1, width=16, heads=2, kv_heads=1, mlp_width=16),
    base=replace(FULL.base, steps=3, batch=4),
    sft=replace(FULL.sft, steps=2, batch=4),
    instruct=replace(FULL.instruct, steps=2, batch=4),
    grpo=GrpoTraining(steps=2, prompts=2, group=2),
)
PAIR = SpecialistsRecipe()
QUICK_PAIR = replace(
    PAIR,
    shape=QUICK.shape,
    adder=replace(PAIR.adder, steps=2, batch=8),
    sorter=replace(PAIR.sorter, steps=3, batch=8),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def build_in(cache: Path, name: str, monkeypatch) -> Path:
    monkeypatch.setenv("SURGERY_CACHE", str(cache))
    return lab.build(name, recipe=QUICK)


def test_building_twice_gives_identical_bytes(tmp_path, monkeypatch):
    first, second = (build_in(tmp_path / place, "grpo", monkeypatch) for place in ("a", "b"))
    assert hashes(first) == hashes(second)
    assert hashes(first.parent / "sft") == hashes(second.parent / "sft")


def test_building_does_not_depend_on_the_caller_s_random_state_or_threads(tmp_path, monkeypatch):
    first = build_in(tmp_path / "a", "base", monkeypatch)
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    torch.set_num_threads(1)
    expected = torch.get_rng_state()
    try:
        second = build_in(tmp_path / "b", "base", monkeypatch)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), expected)
    assert hashes(first) == hashes(second)


def test_another_seed_gives_another_model_in_another_folder(cache):
    first = lab.build("base", recipe=QUICK)
    second = lab.build("base", recipe=replace(QUICK, seed=1))
    assert first.parent != second.parent
    assert hashes(first)["model.safetensors"] != hashes(second)["model.safetensors"]


def test_a_member_is_built_after_what_it_is_made_from_and_nothing_else(cache):
    folder = lab.build("grpo", recipe=QUICK)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "base", "grpo", "sft"]


def test_the_cache_is_its_owners_alone(cache):
    assert lab.build("base", recipe=QUICK).parents[1].stat().st_mode & 0o777 == 0o700


def test_a_built_model_is_not_built_again(cache):
    before = lab.build("base", recipe=QUICK).stat().st_mtime_ns
    assert lab.build("base", recipe=QUICK).stat().st_mtime_ns == before


def test_what_a_killed_build_left_behind_is_cleared_away(cache):
    clean = hashes(lab.build("base", recipe=QUICK))
    folder = lab.path_of("base", recipe=QUICK)
    folder.rename(folder.with_name("base.partial"))
    (folder.with_name("base.partial") / "model.safetensors").write_bytes(b"half")
    (folder.with_name("base.partial") / "stray").touch()
    folder.with_name(".base.lock").touch()
    assert hashes(lab.build("base", recipe=QUICK)) == clean


def test_a_build_that_fails_leaves_no_model(cache, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.lab.reasoning.build_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.build("base", recipe=QUICK)
    assert not lab.path_of("base", recipe=QUICK).exists()


@pytest.mark.slow
def test_two_processes_that_build_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    alone = hashes(build_in(tmp_path / "alone", "sft", monkeypatch))
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "shared"))
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=lab.build, args=("sft",), kwargs={"recipe": QUICK}) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert hashes(lab.path_of("sft", recipe=QUICK)) == alone


def test_progress_is_told_once_per_step(cache):
    seen: dict[str, list[int]] = {}

    @contextmanager
    def progress(label, total, unit="steps"):
        seen[label] = [total]
        yield seen[label].append

    lab.build("grpo", recipe=QUICK, progress=progress)
    assert seen == {"lab:base": [3, 1, 1, 1], "lab:sft": [2, 1, 1], "lab:grpo": [2, 1, 1]}


@pytest.mark.parametrize("name", ["sft", "grpo", "instruct", "base"])
def test_a_model_loads_and_its_template_asks_in_its_own_format(cache, name):
    folder = lab.build(name, recipe=QUICK)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    if name == "base":
        assert tokenizer.chat_template is None
        return
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+5+6="}], tokenize=False, add_generation_prompt=True
    )
    before, after = {"instruct": ("<|user|>", "<|end|><|assistant|>")}.get(name, ("<|question|>", "<|answer|>"))
    assert asked == f"{before}3+5+6={after}"


def test_the_folder_says_what_it_holds(cache):
    folder = lab.build("grpo", recipe=QUICK)
    record = json.loads((folder / "trainer_state.json").read_text())
    assert record["parent"] == "sft"
    assert len(record["reward"]) == QUICK.grpo.steps
    assert record["final_reward"] == record["reward"][-1]
    card = (folder / "README.md").read_text()
    assert "synthetic" in card
    assert QUICK.key in card


def test_an_unknown_name_is_wrong_usage_and_names_the_nearest(cache):
    with pytest.raises(SurgeryError, match=r"no lab model is called 'gpro'. Did you mean 'grpo'\?") as caught:
        lab.resolve("gpro")
    assert caught.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match="no lab model is called 'gpro'"):
        lab.path_of("gpro", recipe=QUICK)


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file"))
    with pytest.raises(SurgeryError, match="SURGERY_CACHE"):
        lab.build("base", recipe=QUICK)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SURGERY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert lab.path_of("base") == tmp_path / "xdg" / "surgery" / "lab" / FULL.key / "base"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lab.path_of("base").is_relative_to(tmp_path / ".cache" / "surgery")


def test_names_and_descriptions_need_no_torch():
    code = "import sys; from surgery import lab; [lab.describe(n) for n in lab.names()]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_key_of_the_reasoning_family_stays_what_published_caches_have():
    assert FULL.key == "e00b8b5f0ab4"


def test_specialists_share_one_frozen_embedding_and_nothing_else_that_is_trained(cache):
    names = ("substrate", "adder", "sorter")
    weights = {n: load_file(lab.build(n, recipe=QUICK_PAIR) / "model.safetensors") for n in names}
    assert "lm_head.weight" in weights["adder"]
    for name in ("adder", "sorter"):
        # In two steps a norm's 1 moves less than bf16 can tell.
        matrices = {key: value for key, value in weights["substrate"].items() if value.ndim > 1}
        same = [key for key, value in matrices.items() if torch.equal(value, weights[name][key])]
        assert same == ["model.embed_tokens.weight"]
    assert not torch.equal(weights["adder"]["lm_head.weight"], weights["sorter"]["lm_head.weight"])


def test_building_a_specialist_twice_gives_identical_bytes(tmp_path, monkeypatch):
    found = []
    for place in ("a", "b"):
        monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / place))
        found.append(hashes(lab.build("sorter", recipe=QUICK_PAIR)))
    assert found[0] == found[1]


def test_the_specialists_tokenizer_is_the_family_s_and_two_characters(cache):
    folder = lab.build("adder", recipe=QUICK_PAIR)
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert ids == {**vocabulary(), ",": len(vocabulary()), ">": len(vocabulary()) + 1}
    assert (lab.build("sorter", recipe=QUICK_PAIR) / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    assert not {",", ">"} & set(CHARACTERS)


def test_a_specialist_s_folder_says_how_it_does_in_both_domains(cache):
    folder = lab.build("sorter", recipe=QUICK_PAIR)
    record = json.loads((folder / "trainer_state.json").read_text())
    assert (record["parent"], record["domain"], len(record["loss"])) == ("substrate", "sorting", 3)
    assert set(record["greedy_accuracy"]) == {"sums", "sorting"}
    assert "Trained from: `lab:substrate`, all but the token embedding" in (folder / "README.md").read_text()
    assert "- Not trained" in (folder.parent / "substrate" / "README.md").read_text()


def test_a_specialist_s_progress_is_told_once_per_step(cache):
    seen: dict[str, list[int]] = {}

    @contextmanager
    def progress(label, total, unit="steps"):
        seen[label] = [total]
        yield seen[label].append

    lab.build("adder", recipe=QUICK_PAIR, progress=progress)
    assert seen == {"lab:adder": [2, 1, 1]}


def test_a_log_says_that_a_build_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    printed: list[str] = []
    monkeypatch.setattr(progress, "_print_line", lambda text, stream: printed.append(text))
    monkeypatch.setattr(progress_lines, "FIRST_AFTER", 0.0)
    entered = threading.Event()

    def build() -> None:
        with builder._exclusive(tmp_path / "models"):
            entered.set()

    other = threading.Thread(target=build)
    with builder._exclusive(tmp_path / "models"):
        printed.clear()
        other.start()
        end = time.monotonic() + 60
        while not printed and time.monotonic() < end:
            time.sleep(0.01)
        assert not entered.is_set()
    other.join()
    assert entered.is_set()
    assert printed[0].startswith("Waiting for another process that builds a lab model: running for ")
    assert printed[-1].startswith("Waiting for another process that builds a lab model: done after ")
