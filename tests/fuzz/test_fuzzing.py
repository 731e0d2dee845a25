"""The fuzzer finds what it is there for: each promise is broken once on purpose."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from support import fuzzing
from support.fuzz_campaign import Campaign
from support.fuzz_mutations import mutate_content
from support.fuzzing import FuzzTarget, Outcome, Workplace, run_input

from surgery.errors import SurgeryError

Call = Callable[[Path, Path], object]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A worker's folder with a corpus of one seed, in this process."""
    seed = tmp_path / "corpus" / "seed"
    seed.mkdir(parents=True)
    (seed / "file.json").write_text('{"a": [1, 2, 3], "b": {"c": "text"}}')
    for name in ("HOME", "TMPDIR"):  # restored at the end
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    place = Workplace(tmp_path / "worker", tmp_path / "corpus", seed=0)
    place.prepare()
    yield place
    os.chdir(tmp_path)


def run(place: Workplace, call: Call, **options: object) -> Outcome:
    return run_input(FuzzTarget("target", ("seed",), ("*.json",), call, **options), 0, place)  # type: ignore[arg-type]


def test_a_result_and_a_surgery_error_are_no_failures(place: Workplace) -> None:
    def refuse(folder: Path, out: Path) -> None:
        raise SurgeryError("is wrong", where=folder)

    assert run(place, lambda folder, out: out.mkdir()).kind == "result"
    assert run(place, refuse).kind == "refused"


def leak(folder: Path, out: Path) -> None:
    (folder.parent / "outside" / "x").write_text("x")


def touch_input(folder: Path, out: Path) -> None:
    (folder / "new").write_text("x")


def load_pickle(folder: Path, out: Path) -> None:
    pickle.loads(pickle.dumps(Path("x")))


def compile_input(folder: Path, out: Path) -> None:
    compile("1", str(folder / "code.py"), "exec")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda folder, out: {}["key"], "KeyError: 'key'"),
        (leak, "outside of the input was changed"),
        (touch_input, "writes in-0/new"),
        (lambda folder, out: (folder / "../outside/secret.txt").read_text(), "reads outside/secret.txt"),
        (lambda folder, out: Path("/etc/hostname").read_text(), "reads /etc/hostname"),
        (lambda folder, out: (Path.home() / "secret.txt").read_text(), "reads home/secret.txt"),
        (lambda folder, out: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda folder, out: socket.socket().bind(("127.0.0.1", 0)), "socket.bind"),
        (load_pickle, "pickle.find_class"),
        (compile_input, "code in the input"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_what_breaks_a_promise_fails(place: Workplace, call: Call, why: str) -> None:
    outcome = run(place, call)
    assert (outcome.kind, why in outcome.why) == ("failed", True), outcome


def test_a_message_that_nobody_can_read_fails(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "MAX_MESSAGE", 100)

    def refuse(folder: Path, out: Path) -> None:
        raise SurgeryError("x" * 101)

    assert run(place, refuse).why.startswith("a message of 101 characters")


def compute(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_is_slow_once_is_run_again_and_what_is_slow_each_time_fails(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "MAX_SECONDS", 0.2)
    calls: list[float] = []

    def slow_once(folder: Path, out: Path) -> None:
        calls.append(0.0 if calls else 0.3)
        compute(calls[-1])

    assert run(place, slow_once).kind == "result"
    assert len(calls) > 1
    assert run(place, lambda folder, out: compute(0.3)).why == "takes too long"
    assert run(place, lambda folder, out: time.sleep(0.3)).kind == "result"  # as on a busy machine


def test_what_waits_for_ever_fails(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "HUNG_SECONDS", 0.2)

    def wait(folder: Path, out: Path) -> None:
        os.mkfifo(out)
        out.open("rb")

    assert run(place, wait).why.startswith("hangs")


def test_memory_that_an_input_takes_is_measured(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "MAX_MB", 100)
    assert run(place, lambda folder, out: bytearray(b"x" * 200_000_000)).why.endswith("MB")


def test_what_the_user_named_may_be_a_link_and_what_the_input_names_may_not(place: Workplace) -> None:
    def link(folder: Path, files: object, draw: object) -> None:
        (folder / "file.json").unlink()
        (folder / "file.json").symlink_to("../outside/secret.txt")

    def read(folder: Path, out: Path) -> str:
        return (folder / "file.json").read_text()

    assert "reads outside/secret.txt" in run(place, read, mutate=link).why
    assert run(place, read, mutate=link, named=("file.json",)).kind == "result"
    assert run(place, read, mutate=link, follows=True).kind == "result"


def test_the_same_seed_makes_the_same_inputs(place: Workplace, tmp_path: Path) -> None:
    target = FuzzTarget("target", ("seed",), ("*.json",), lambda folder, out: None)
    made: list[list[bytes]] = [[], []]
    for name, inputs in zip(("one", "two"), made, strict=True):
        for number in range(40):
            place.make_input(target, number, tmp_path / name / str(number))
            inputs += [
                path.read_bytes()
                for path in sorted((tmp_path / name / str(number)).iterdir())
                if path.is_file() and path.stat().st_size < 10**7
            ]
    assert made[0] == made[1]
    assert len(set(made[0])) > 20


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.yml"])
def test_most_changes_of_a_tree_leave_a_tree(name: str) -> None:
    content = b'{"a": [1, 2, 3], "b": {"c": "text"}, "d": null}'
    whole = 0
    for number in range(200):
        try:
            changed = mutate_content(name, content, random.Random(number))
            yaml.safe_load(changed) if name.endswith("yml") and len(changed) < 10_000 else json.loads(changed)
            whole += 1
        except (ValueError, yaml.YAMLError, RecursionError):
            continue
    assert 80 < whole < 200


_CAMPAIGN = """
import os, signal, sys, time
from pathlib import Path
from support import fuzz_campaign
from support.fuzz_campaign import Campaign, run_campaign
from support.fuzzing import FuzzTarget

fuzz_campaign.SILENT_SECONDS = 3.0
corpus = Path(sys.argv[1])

def end(folder, out):
    if folder.name == "in-2":
        os.kill(os.getpid(), signal.SIGSEGV)
    if folder.name == "in-5":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if folder.name == "in-7":
        bytearray(60_000_000_000)

target = FuzzTarget("target", ("seed",), ("*.json",), end)
counts = run_campaign(Campaign([target], corpus, corpus.parent / "work", 10, jobs=2))["target"]
print(counts.results, sorted((one.number, one.why[:13]) for one in counts.failures))
"""


@pytest.mark.slow
def test_a_campaign_goes_on_after_an_input_that_ends_its_worker_or_holds_it(place: Workplace) -> None:
    # In a process of its own: this one has threads, whose locks a fork would copy.
    done = subprocess.run(
        [sys.executable, "-c", _CAMPAIGN, str(place.corpus)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    expected = "7 [(2, 'its process e'), (5, 'its process e'), (7, 'out of memory')]"
    assert done.stdout.strip() == expected, done.stderr


def test_campaigns_share_inputs_out_by_weight(place: Workplace) -> None:
    one, two = (FuzzTarget(name, ("seed",), (), lambda folder, out: None, weight=w) for name, w in (("a", 1), ("b", 3)))
    campaign = Campaign([one, two], place.corpus, place.folder, 8)
    assert [campaign.target_of(number).name for number in range(8)] == ["a", "b", "b", "b"] * 2


def test_campaigns_leave_a_target_out_of_rounds(place: Workplace) -> None:
    one, two = (FuzzTarget(name, ("seed",), (), lambda folder, out: None, every=n) for name, n in (("a", 1), ("b", 3)))
    campaign = Campaign([one, two], place.corpus, place.folder, 8)
    assert [campaign.target_of(number).name for number in range(8)] == ["a", "b", "a", "a"] * 2
