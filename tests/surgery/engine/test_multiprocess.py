"""Promises of weight jobs over several processes: the files of one, said once, and nobody left waiting."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import add_tokenizer, build, sibling
from support.processes import free_port, known_to

from surgery.checkpoint.reader import SourceFiles
from surgery.engine.work.partitioning import WorkItem, partition
from surgery.engine.work.workers import default_threads, run_shared
from surgery.growth.embedding.build import make_embedding
from surgery.runtime.collectives import all_reduce_sum, barrier, map_over_ranks, n_active_processes, single_process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
# What a process may take before it counts as hanging, on a machine with ten others at work; it takes about ten.
SECONDS = 600

# Runs the commands in the file argv[1], one a line, one after the other; what each says goes to a file of its own.
# Without arguments it does so in forks of itself, which need not import all of it again: each line that it reads names
# a folder, arguments, and the environment of each process; it answers with their exit codes.
SCRIPT = """
import contextlib, gc, json, os, shlex, signal, sys
from pathlib import Path
import torch.distributed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import surgery.checkpoint.reader, surgery.engine.execution, surgery.engine.plan, surgery.engine.storage.journal
import surgery.engine.storage.writer, surgery.engine.work.computation, surgery.engine.work.worker_job
import surgery.growth.layers.add, surgery.growth.layers.initial_model
from surgery.runtime import environment as process
from cli import main

append = surgery.engine.storage.journal.Journal.append

def work(listed, said, fault):
    rank = process.rank()
    for module in (surgery.checkpoint.reader, surgery.engine.work.computation, surgery.engine.plan):
        module.SEGMENT = 64 + (rank if fault == "apart" else 0)
    process.configure_cli_process()
    if fault.startswith("direct"):
        surgery.engine.storage.writer.DIRECT_FROM = 1
    left = [20]

    def failing(self, record):
        left[0] -= 1
        if left[0] < 0 and fault.endswith(f"killed {rank}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] < 0 and fault == f"full {rank}":
            raise OSError(28, "No space left on device")
        append(self, record)

    surgery.engine.storage.journal.Journal.append = failing
    said = Path(said)
    said.mkdir(exist_ok=True)
    for number, command in enumerate(Path(listed).read_text().splitlines()):
        sys.argv = ["surgery", *shlex.split(command)]
        with open(said / f"{number}.{rank}.txt", "w") as text:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                try:
                    main.run()
                except SystemExit as left_with:
                    if left_with.code:
                        text.flush()
                        os._exit(left_with.code)

def fork(folder, arguments, environment, errors):
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.alarm(SECONDS)
            os.chdir(folder)
            os.environ.update(environment)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            work(*arguments)
            code = 0
        finally:
            os._exit(code)
    return child

if sys.argv[1:]:
    work(*sys.argv[1:])
else:
    gc.collect()
    gc.freeze()  # what was imported is no garbage, for the forks to look through
    print("ready", flush=True)
    for line in sys.stdin:
        folder, arguments, environments = json.loads(line)
        children = [
            fork(folder, arguments, each, Path(folder) / f"errors.{at}") for at, each in enumerate(environments)
        ]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children]), flush=True)
""".replace("SECONDS", str(SECONDS))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `tuned` and `target`, tiny Llamas in shards, and the script."""
    folder = tmp_path_factory.mktemp("ranks")
    base = build("llama", folder / "base", max_shard_size="15KB")
    for number, name in enumerate(("tuned", "target")):
        add_tokenizer(sibling(base, folder / name, seed=number))
    add_tokenizer(base)
    make_embedding(str(base), folder / "emb", kind="random", width=16)
    (folder / "single").mkdir()
    for name in ("base", "tuned", "target"):
        shutil.copytree(folder / name, folder / "single" / name)
        one_file(folder / "single" / name)
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    weight = {"parameters": {"weight": 1}}
    pair = [{"model": f"../{name}", **weight} for name in ("tuned", "base")]
    document = {"merge_method": "linear", "models": pair}
    first = {"name": "first", **document}
    last = {**document, "models": [{"model": "first", **weight}, {"model": "../target", **weight}]}
    (folder / "steps.yaml").write_text(yaml.safe_dump_all([first, last]), encoding="utf-8")
    return folder


def one_file(model: Path) -> None:
    """Puts all tensors of `model` into one file."""
    from safetensors.torch import load_file, save_file

    shards = sorted(model.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for path in (*shards, model / "model.safetensors.index.json"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", autouse=True)
def forks(models: Path) -> Iterator[None]:
    """Starts the script, once for all tests."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, models / "script.py"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        _script.append(running)
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        yield
        _script.pop()


_script: list[subprocess.Popen[str]] = []


def launch(
    folder: Path, commands: Sequence[str], *, processes: int, fault: str = "none"
) -> tuple[list[int], list[str]]:
    """Runs `commands` in `folder`; exit codes and complaints of all processes."""
    prepare(folder, commands)
    port = free_port()
    known = [known_to(rank, world=processes, port=port) for rank in range(processes)]
    [script] = _script
    assert script.stdin is not None and script.stdout is not None
    asked = [str(folder), ["commands", "said", fault], known if processes > 1 else [{}]]
    script.stdin.write(f"{json.dumps(asked)}\n")
    script.stdin.flush()
    codes = json.loads(script.stdout.readline())
    return codes, [(folder / f"errors.{rank}").read_text() for rank in range(processes)]


def launch_by(
    launcher: Sequence[str], folder: Path, commands: Sequence[str], *, fault: str = "none"
) -> tuple[int, str]:
    """As `launch`, by a real launcher: its exit code and complaints."""
    prepare(folder, commands)
    done = subprocess.run(
        [sys.executable, *launcher, folder.parent / "script.py", "commands", "said", fault],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stderr


def prepare(folder: Path, commands: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "commands").write_text("\n".join(commands), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but what the processes said."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.parent != folder}


def said(folder: Path, number: int, rank: int) -> str:
    return (folder / "said" / f"{number}.{rank}.txt").read_text()


EVERYTHING = [
    "vector extract ../tuned ../base -o vector --allow-unrelated",
    "vector apply vector ../target -o applied --allow-unrelated",
    "vector transfer ../tuned ../base ../target -o transferred --allow-unrelated",
    "vector extract ../single/tuned ../single/base -o adapter --allow-unrelated --rank 4",
    "vector transfer ../single/tuned ../single/base ../single/target -o single --allow-unrelated",
    "merge linear ../tuned ../base ../target --weight 1 -o linear --plot pictures.png",
    "merge ties ../tuned ../target --base ../base --weight 1 --density 0.4 -o ties",
    "merge ../steps.yaml -o chained",
    "merge logits ../tuned ../base ../target -o ensemble",
    "merge unpack ensemble -o members",
    "edit heads ../target --head L0H1 -o edited --no-measure",
    "edit undo ../edited -o undone",
    "grow add ../target --layers 1 --at middle --init random --seed 3 -o deeper",
    "grow init --embed ../emb --heads 2 --mlp 24 --layers 2 --seed 3 -o begun",
    "verify ties",
    "diff ../base transferred --plot diff.png",
    "vector compare vector vector",
    "inspect linear",
    "verify linear --json",
]


@pytest.fixture(scope="module")
def both(models: Path) -> tuple[Path, Path]:
    """Where one process, and where two, ran `EVERYTHING`."""
    codes, complaints = launch(
        models / "before", ["edit heads ../target --head L0H1 -o ../edited --no-measure"], processes=1
    )
    assert codes == [0], complaints
    for name, processes in (("one", 1), ("two", 2)):
        codes, complaints = launch(models / name, EVERYTHING, processes=processes)
        last = {path.name: path.read_text()[-500:] for path in (models / name / "said").iterdir()}
        assert codes == [0] * processes, (complaints, last)
    return models / "one", models / "two"


def test_two_processes_leave_the_files_of_one(both: tuple[Path, Path]) -> None:
    one, two = (contents(folder) for folder in both)
    names = {name for name in one if not name.startswith("said/")}
    assert names == {name for name in two if not name.startswith("said/")}
    assert sum(name.endswith(".safetensors") for name in names) > 40
    assert [name for name in sorted(names) if one[name] != two[name]] == []
    assert all((folder / picture).is_file() for folder in both for picture in ("diff.png", "pictures.png"))


# What differs by the time of day, and by how many threads each process has.
OWN = r"[\d.]+ GB free|about [\d.]+ k?B of buffers"


def test_one_of_two_processes_talks_and_says_what_one_alone_says(both: tuple[Path, Path]) -> None:
    _, two = both
    for number, command in enumerate(EVERYTHING):
        single_process, shared = (re.sub(OWN, "…", said(folder, number, 0)) for folder in both)
        assert shared == single_process, command
        assert said(two, number, 1) == "", command


TRANSFER = ["vector transfer ../single/tuned ../single/base ../single/target -o out --allow-unrelated"]
SHARDS = ["vector transfer ../tuned ../base ../target -o out --allow-unrelated"]


@pytest.mark.parametrize(("form", "dead", "then"), [("", 0, 2), ("", 1, 1), ("direct ", 1, 2)])
def test_a_process_that_is_killed_ends_all_and_any_number_of_them_goes_on(
    models: Path, both: tuple[Path, Path], form: str, dead: int, then: int
) -> None:
    folder = models / f"{form}killed {dead} {then}"
    codes, complaints = launch(folder, TRANSFER, processes=2, fault=f"{form}killed {dead}")
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1, complaints
    assert f"process {1 - dead}: another process has ended" in said(folder, 0, 1 - dead)
    assert "The same command goes on" in said(folder, 0, 1 - dead)
    assert not (folder / "out").exists()
    assert sorted(path.name for path in (folder / "out.partial").glob("journal*")) == [
        "journal-1.jsonl",
        "journal.jsonl",
    ]
    codes, complaints = launch(folder, ["verify ../base", *TRANSFER, *TRANSFER], processes=then, fault=form + "none")
    assert codes == [2] * then, complaints  # the third finds the result of the second
    assert "exists already" in said(folder, 2, 0)
    written, expected = folder / "out", both[0] / "single"
    assert {path.name for path in written.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert path.read_bytes() == (written / path.name).read_bytes(), path.name


OTHERS = {
    "ensemble": "merge logits ../tuned ../base ../target -o ensemble",
    "edited": "edit heads ../target --head L0H1 -o edited --no-measure",
    "deeper": "grow add ../target --layers 1 --at middle --init random --seed 3 -o deeper",
    "begun": "grow init --embed ../emb --heads 2 --mlp 24 --layers 2 --seed 3 -o begun",
}


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_job_goes_on_after_one_of_two_processes_was_killed(
    models: Path, both: tuple[Path, Path], name: str, dead: int
) -> None:
    folder, expected = models / f"{name} killed {dead}", both[0] / name
    codes, complaints = launch(folder, [OTHERS[name]], processes=2, fault=f"killed {dead}")
    if name in ("deeper", "begun") and dead == 1:
        assert codes == [0, 0], complaints  # only the first one works, so the other one's journal is empty
    else:
        assert (codes[dead], codes[1 - dead]) == (-signal.SIGKILL, 1), complaints
        assert f"process {1 - dead}: another process has ended" in said(folder, 0, 1 - dead)
        assert not (folder / name).exists() and (folder / f"{name}.partial").is_dir()
        codes, complaints = launch(folder, [OTHERS[name]], processes=2)
        assert codes == [0, 0], complaints
    written = {path.relative_to(folder / name): path for path in (folder / name).rglob("*") if path.is_file()}
    assert sorted(written) == sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    for at, path in written.items():
        assert path.read_bytes() == (expected / at).read_bytes(), at


def test_a_launcher_ends_all_when_one_is_killed(models: Path, both: tuple[Path, Path]) -> None:
    folder = models / "launched"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    code, complaints = launch_by(torchrun, folder, SHARDS, fault="killed 1")
    assert code == 1
    assert "Signal 9 (SIGKILL)" in complaints
    assert not (folder / "out").exists()
    code, complaints = launch_by(torchrun, folder, SHARDS)
    assert code == 0, complaints
    for path in (both[0] / "transferred").iterdir():
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes(), path.name


def test_a_fault_in_one_process_is_told_by_all(models: Path) -> None:
    folder = models / "full"
    codes, _ = launch(folder, TRANSFER, processes=2, fault="full 1")
    assert codes == [1, 1]
    assert "process 1 failed: " in said(folder, 0, 0)
    assert "No space left on device" in said(folder, 0, 0) and "the disk is full" in said(folder, 0, 1)
    assert (folder / "out.partial").is_dir() and not (folder / "out").exists()
    codes, _ = launch(folder, TRANSFER, processes=2)
    assert codes == [0, 0]
    assert not any(path.name == "fault.txt" for path in (folder / "out").iterdir())


def test_processes_that_do_not_see_the_same_sources_write_nothing(models: Path) -> None:
    """As where machines have files of their own, here by another segment size."""
    folder = models / "apart"
    codes, _ = launch(folder, TRANSFER, processes=2, fault="apart")
    assert codes == [1, 1]
    assert "the processes do not see the same sources" in said(folder, 0, 0)
    assert not (folder / "out.partial").exists()


def test_one_process_never_imports_what_several_need(tmp_path: Path, models: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from surgery.vectors.application import transfer\n"
        "transfer(*sys.argv[1:4], Path(sys.argv[4]), allow_unrelated=True)\n"
        "assert not {'accelerate', 'transformers'} & sys.modules.keys()\n"
        "import torch.distributed as dist; assert not dist.is_initialized()"
    )
    names = [str(models / name) for name in ("tuned", "base", "target")]
    done = subprocess.run(
        [sys.executable, "-c", code, *names, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_inside_of_a_share_a_process_shares_nothing_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with single_process():
        assert map_over_ranks([3, 1, 2], lambda item: map_over_ranks([item], lambda one: one * one)[0]) == [9, 1, 4]
        assert all_reduce_sum(torch.tensor([5])).tolist() == [5]
        barrier()
        with SourceFiles([]) as files:
            assert sorted(run_shared([1, 2, 3], lambda unit, _: unit, files, threads=2)) == [1, 2, 3]
    assert n_active_processes() == 2


def test_processes_of_one_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert default_threads() == 12
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_threads() == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert default_threads() == 1


@given(
    pieces=st.lists(st.builds(WorkItem, st.integers(0, 6), st.integers(0, 1000)), max_size=60),
    machines=st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
)
def test_every_piece_is_dealt_out_once_and_no_file_to_two_machines(pieces: list[WorkItem], machines: list[str]) -> None:
    dealt = partition(pieces, machines)
    assert len(dealt) == len(machines)
    assert sorted(number for held in dealt for number in held) == list(range(len(pieces)))
    for file in {piece.file for piece in pieces}:
        at = {machines[p] for p, held in enumerate(dealt) for number in held if pieces[number].file == file}
        assert len(at) == 1


@given(
    weights=st.lists(st.integers(1, 100), min_size=1, max_size=80), processes=st.integers(1, 5), files=st.integers(1, 4)
)
def test_processes_of_one_machine_get_equal_runs_of_neighbours(weights: list[int], processes: int, files: int) -> None:
    pieces = [WorkItem(number * files // len(weights), weight) for number, weight in enumerate(weights)]
    dealt = partition(pieces, ["here"] * processes)
    assert [number for held in dealt for number in held] == list(range(len(weights)))
    loads = [sum(weights[number] for number in held) for held in dealt]
    assert max(loads) <= sum(weights) / processes + max(weights)


def test_machines_are_dealt_files_by_how_many_processes_they_have() -> None:
    pieces = [WorkItem(file, 100) for file in range(6)]
    dealt = partition(pieces, ["big", "big", "small"])
    assert [len(held) for held in dealt] == [2, 2, 2]
    assert torch.tensor(dealt).flatten().sort().values.tolist() == list(range(6))
