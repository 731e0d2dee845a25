"""Kill, stop and fault commands at random moments, run them again, and compare what they wrote with undisturbed runs.

Everything is imported once; each run of a command is then a fork of this process, before any library has started a
thread. `benchmarks/torture.py` runs this for long, `tests/cli/test_kills.py` for a minute.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from support.faults import ERRORS, Counter, Fault, Injector

HANGS = 120.0  # seconds after which a run counts as hanging
POLL = 0.002
OUT = "out"
TIMED = (".json", ".jsonl", ".md", ".html", ".log", ".txt", ".png", ".svg", ".key")  # files that hold times
# What is said where a child of the command, a worker or a recipe's step, was killed in its place.
CHILD_KILLED = ("a worker process was ended from outside", "ended by signal 9")
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class Job:
    """A command, run in a folder of its own.

    Attributes:
        words: what follows `surgery`, for the folder with the inputs.
        goes_on: a finished one may be run again; the others refuse, as OUT exists.
        timed: files of these kinds hold times: only that they are there is compared.
        before: folder of the inputs, folder of the run → prepares the latter.
        content: in place of the files of OUT, what is compared.
        every: it takes part in one of so many rounds, since it takes long.
    """

    name: str
    words: Callable[[Path], Sequence[object]]
    goes_on: bool = False
    timed: bool = False
    before: Callable[[Path, Path], None] | None = None
    content: Callable[[Path], Mapping[str, str]] | None = None
    every: int = 1


@dataclass
class Score:
    """What was done to a job, and what went wrong."""

    tally: Tally[str] = field(default_factory=Tally)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Undisturbed:
    """What a job does when nobody disturbs it."""

    content: Mapping[str, str]
    earlier: Mapping[str, str] | None
    seconds: float
    calls: int


def content_of(folder: Path, *, timed: bool) -> dict[str, str]:
    """Return relative path → hash of every file under `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file() and timed and (path.suffix in TIMED or path.name == ".lock"):
            found[name] = "there"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Arena:
    """The folder in which jobs run: `inputs`, and `work` with one run at a time."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.inputs, self.work, self.log = folder / "inputs", folder / "work", folder / "log"
        self.random = random.Random(seed)
        self.calls, self.hits = Counter(), Counter()
        self.known: dict[str, Undisturbed] = {}

    def undisturbed(self, job: Job) -> Undisturbed:
        """Run a job in peace, twice: the first time much is read from the disk."""
        if job.name not in self.known:
            for _ in range(2):
                self._prepare(job)
                earlier = content_of(self.work / OUT, timed=job.timed) if (self.work / OUT).exists() else None
                begin = time.monotonic()
                code = self._run(job)
                seconds = time.monotonic() - begin
                if code != 0:
                    raise AssertionError(f"{job.name}: exit code {code}\n{self._said()}")
            self.known[job.name] = Undisturbed(self._content(job), earlier, seconds, self.calls.value)
        return self.known[job.name]

    def kill(self, job: Job, score: Score, *, most: int = 3) -> None:
        """Kill a job up to `most` times, and run it to its end."""
        peace, rng = self.undisturbed(job), self.random
        self._prepare(job)
        for disturbed in range(rng.randint(1, most)):
            how = rng.choices(["moment", "call", "SIGINT", "SIGTERM"], [45, 40, 8, 7])[0]
            number = getattr(signal, how) if how.startswith("SIG") else signal.SIGKILL
            at = rng.randint(1, max(peace.calls, 1)) if how == "call" else 0
            after = None if how == "call" else rng.uniform(0, peace.seconds)
            code = self._run(job, at=at, after=after, number=number, group=rng.random() < 0.5)
            where = f"{how} at {at or after}"
            if code == -signal.SIGKILL:
                score.tally["kills"] += 1
            elif number in STOPPED and code == STOPPED[number]:
                score.tally["stops"] += 1
                if "goes on where it was" not in self._said():
                    self._failed(job, score, f"{where}: does not say that it goes on")
            elif number in STOPPED and code in (-number, 70):
                score.tally["kills"] += 1  # before the program had begun
            elif how == "call" and code == 1 and any(said in self._said() for said in CHILD_KILLED):
                score.tally["kills"] += 1  # a child made that call
            elif self._is_done(job, code, disturbed):
                score.tally["too late"] += 1
                break
            else:
                self._failed(job, score, f"{where}: exit code {code}")
            self._check_out(job, score, where)
        self._finish(job, score)

    def writes(self, job: Job) -> int:
        """Return how many calls of an undisturbed run a full disk would let fail."""
        self.undisturbed(job)
        self._prepare(job)
        if (code := self._run(job, writes=True)) != 0:
            raise AssertionError(f"{job.name}: exit code {code}\n{self._said()}")
        return self.calls.value

    def fault(self, job: Job, score: Score, at: int, fault: Fault, *, writes: bool = False) -> None:
        """Let one call of a job go wrong, or with `writes` its `at`-th write, and run it to its end."""
        self.undisturbed(job)
        self._prepare(job)
        code = self._run(job, at=at, fault=fault, writes=writes)
        score.tally["faults"] += min(self.hits.value, 1)
        where, said = f"{fault} at call {at}", self._said()
        if code != 0:
            if "internal error" in said or "Traceback" in said or "error: " not in said or code not in (1, 2):
                self._failed(job, score, f"{where}: exit code {code}")
            elif fault in ("ENOSPC", "EDQUOT") and "disk is full" not in said:
                self._failed(job, score, f"{where}: does not name the disk")
        self._check_out(job, score, where)
        self._finish(job, score)

    def _finish(self, job: Job, score: Score) -> None:
        code = self._run(job)
        score.tally["reruns"] += 1
        if not self._is_done(job, code, 1):
            self._failed(job, score, f"run again: exit code {code}")
            return
        expected, found = self.known[job.name].content, self._content(job)
        if found != expected:
            changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            self._failed(job, score, f"other bytes: {changed}")
        if left := sorted(path.name for path in self.work.iterdir() if path.name != OUT):
            self._failed(job, score, f"left behind: {left}")

    def _is_done(self, job: Job, code: int, disturbed: int) -> bool:
        """Whether a run has done its work, or found that an earlier one has."""
        if code == 0:
            return True
        return code == 2 and bool(disturbed) and not job.goes_on and "exists already" in self._said()

    def _check_out(self, job: Job, score: Score, where: str) -> None:
        """OUT is what it was, or complete; what goes on in its own folder may be anything meanwhile."""
        if job.goes_on or not (self.work / OUT).exists():
            return
        found, peace = content_of(self.work / OUT, timed=job.timed), self.known[job.name]
        if found not in (peace.content, peace.earlier):
            self._failed(job, score, f"{where}: OUT is incomplete: {sorted(found)}")

    def _failed(self, job: Job, score: Score, what: str) -> None:
        said = self._said().strip()
        score.failures.append(f"{job.name}: {what}\n    " + "\n    ".join(said.splitlines()[-12:]))

    def _said(self) -> str:
        """What the last run printed; two streams may cut each other's characters."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _prepare(self, job: Job) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        if job.before is not None:
            job.before(self.inputs, self.work)

    def _content(self, job: Job) -> Mapping[str, str]:
        return job.content(self.work) if job.content else content_of(self.work / OUT, timed=job.timed)

    def _run(
        self,
        job: Job,
        *,
        at: int = 0,
        fault: Fault = "kill",
        after: float | None = None,
        number: int = signal.SIGKILL,
        group: bool = True,
        writes: bool = False,
    ) -> int:
        """Run a job in a fork; return its exit code, or minus the signal that ended it."""
        self.calls.value = self.hits.value = 0
        injector = Injector(self.work, self.calls, at=at, fault=fault, hits=self.hits, writes=writes)
        child = fork(lambda: run_command(job.words(self.inputs), self.work, self.log, injector))
        begin = time.monotonic()
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - begin
            if passed > HANGS:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 99
            if after is not None and passed >= after:
                after = None
                (os.killpg if group and number == signal.SIGKILL else os.kill)(child, number)
            time.sleep(POLL)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process, in a session of its own; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        # Here as well as there: the group must be there before it can be killed.
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    try:
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    os._exit(0)


def run_command(
    words: Sequence[object], folder: Path, log: Path, injector: Injector | None, *, out: Path | None = None
) -> NoReturn:
    """Run `surgery WORDS…` in `folder`, in this process, and end it."""
    from cli.main import program

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(folder)
    for target, path in ((1, out or log), (2, log)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.argv = ["surgery", *map(str, words)]
    if injector is not None:
        injector.install()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program()
    os._exit(0)


class ForkedStep:
    """A step of a recipe as a fork, in place of a new process that would import everything again."""

    def __init__(self, step: Any) -> None:
        paths, parent = step.paths, os.getpid()
        paths.progress.unlink(missing_ok=True)

        def work() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # as the real ones: it dies with its parent
            if os.getppid() != parent:
                os._exit(1)
            os.environ.update(step.environment)
            run_command(step.arguments, Path.cwd(), paths.log, None, out=paths.text)

        self.process, self.code = fork(work), None

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process, number)


# What the jobs use: imported once, before the first fork.
MODULES = (
    "cli.main",
    "merges.ensemble.average",
    "merges.ensemble.unpacking",
    "merges.run",
    "safetensors.torch",
    "surgery.edits.experts",
    "surgery.edits.heads",
    "surgery.edits.undo_file",
    "surgery.growth.prefix_cache.decide",
    "surgery.growth.run",
    "surgery.publish.upload",
    "surgery.vectors.application",
    "surgery.vectors.extraction",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)


def import_everything() -> None:
    """Import what commands use, and let recipes fork their steps."""
    os.environ |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in MODULES:
        importlib.import_module(name)
    torch, scheduler = (importlib.import_module(name) for name in ("torch", "surgery.recipes.run.scheduler"))
    torch.set_num_threads(1)
    scheduler.run_pipeline.__kwdefaults__["runner"] = ForkedStep


def make_inputs(folder: Path) -> None:
    """Write the models, vectors, plans and recipes that the jobs read; in a fork, as it starts threads."""
    from support.growth_runs import write_corpora, write_plan, write_substrate
    from support.moe import make_thinker
    from support.recipe_runs import make_models, write_recipe

    from merges.ensemble.average import average_logits
    from surgery.vectors import application, extraction

    folder.mkdir(parents=True)
    models = make_models(folder)
    tuned, base, target = (str(models[name]) for name in ("tuned", "base", "target"))
    write_recipe(folder, models)
    make_thinker(folder / "moe")
    extraction.extract(tuned, base, folder / "vector")
    application.transfer(tuned, base, target, folder / "earlier")
    average_logits([tuned, target], folder / "ensemble")
    entry = {"model": tuned, "parameters": {"weight": 0.5, "density": 0.5}}
    one = {
        "merge_method": "ties",
        "base_model": base,
        "models": [entry, {**entry, "model": target}],
        "dtype": "float32",
    }
    two = {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1}}, entry]}
    documents = [json.dumps({**one, "name": "first"}), json.dumps(two)]
    (folder / "merge.yml").write_text("\n---\n".join(documents))
    (folder / "corpus").mkdir()
    write_corpora(folder / "corpus")
    write_substrate(folder / "corpus")
    for use in ("on", "off"):
        stages = [{"times": 2, "tokens": 128}]
        write_plan(folder, f"plan-{use}.yml", stages=stages, cache={"use": use})


def jobs() -> list[Job]:
    """Return the jobs: one of each kind of output, and of each way of writing it."""

    def earlier(inputs: Path, work: Path) -> None:
        shutil.copytree(inputs / "earlier", work / OUT)

    def transfer(inputs: Path) -> list[object]:
        return ["vector", "transfer", inputs / "tuned", inputs / "base", inputs / "target", "-o", OUT, "--threads", 2]

    def grow(use: str) -> Callable[[Path], list[object]]:
        return lambda i: [
            *("grow", "run", i / f"plan-{use}.yml", "--embed", i / "corpus/emb", "--corpus", i / "corpus/sums.txt"),
            *("-o", OUT, "--threads", 1, "--save-every", 0.001),
        ]

    def ties(i: Path) -> list[object]:
        models = [i / "tuned", i / "target", "--base", i / "base"]
        return ["merge", "weights", "ties", *models, "--weight", 0.5, "--density", 0.5, "-o", OUT, "--threads", 2]

    experts = ["--expert", "L0E1", "--no-measure", "-o", OUT, "--threads", 1]
    heads = ["--head", "L0H1", "--no-measure", "-o", OUT, "--threads", 1]
    embed = ["--kind", "random", "--width", 8, "-o", OUT]
    return [
        Job("vector transfer", transfer),
        Job("vector transfer --overwrite", lambda i: [*transfer(i), "--overwrite"], before=earlier, goes_on=False),
        Job("vector extract", lambda i: ["vector", "extract", i / "tuned", i / "base", "-o", OUT, "--threads", 1]),
        Job(
            "vector apply",
            lambda i: ["vector", "apply", i / "vector", i / "target", "--scale", 0.5, "-o", OUT, "--threads", 1],
        ),
        Job("merge ties", ties),
        Job("merge documents", lambda i: ["merge", "weights", i / "merge.yml", "-o", OUT, "--threads", 1]),
        Job("edit heads", lambda i: ["edit", "heads", i / "target", *heads]),
        Job("edit experts", lambda i: ["edit", "experts", i / "moe", *experts]),
        Job("edit undo", lambda i: ["edit", "undo", i / "edited", "-o", OUT, "--threads", 1]),
        Job("merge logits", lambda i: ["merge", "logits", i / "tuned", i / "target", "-o", OUT, "--threads", 1]),
        Job("merge unpack", lambda i: ["merge", "unpack", i / "ensemble", "-o", OUT, "--threads", 1]),
        Job("grow embed", lambda i: ["grow", "embed", i / "corpus/tok", *embed]),
        Job("grow run, cache on", grow("on"), goes_on=True, timed=True, every=4),
        Job("grow run, cache off", grow("off"), goes_on=True, timed=True, every=4),
        Job(
            "run RECIPE",
            lambda i: ["run", "reasoning", "--file", i / "recipes.yaml", "-o", OUT],
            goes_on=True,
            timed=True,
            every=4,
        ),
        Job(
            "push",
            lambda i: ["push", i / "earlier", REPO, "--private"],
            goes_on=True,
            before=lambda inputs, work: forget_repositories(),
            content=lambda work: pushed_files(),
        ),
    ]


REPO = "lab/tortured"
HUB = """
import signal, sys
from support.hub_server import HubServer
with HubServer() as hub:
    def forget(*_):
        hub.repos.clear()
        hub.blobs.clear()
        print("forgotten", flush=True)
    signal.signal(signal.SIGUSR1, forget)
    print(hub.url, hub.token, flush=True)
    while True:
        signal.pause()
"""
_hub: list[subprocess.Popen[str]] = []


@contextmanager
def local_hub(folder: Path) -> Iterator[None]:
    """Start a Hub of our own in another process, and let pushes go there."""
    command = [sys.executable, "-c", HUB]
    paths = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[n]) for n in (1, 2))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | paths
    ) as hub:
        assert hub.stdout is not None
        url, token = hub.stdout.readline().split()
        os.environ |= {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(folder / "hf")}
        os.environ |= {"NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
        _hub.append(hub)
        try:
            yield
        finally:
            hub.kill()


def forget_repositories() -> None:
    """Let the Hub lose everything."""
    hub = _hub[-1]
    hub.send_signal(signal.SIGUSR1)
    assert hub.stdout is not None and hub.stdout.readline() == "forgotten\n"


def pushed_files() -> dict[str, str]:
    """Return path → hash of what the Hub has."""
    request = urllib.request.Request(  # noqa: S310 (our own server)
        f"{os.environ['HF_ENDPOINT']}/api/models/{REPO}/tree/main?recursive=true",
        headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        return {entry["path"]: json.dumps(entry, sort_keys=True) for entry in json.load(answer)}


def torture(folder: Path, *, kills: int, faults: int, seed: int, only: str = "") -> dict[str, Score]:
    """Kill until `kills` processes were killed, and let `faults` calls fail, spread over the jobs; return job → score.

    Raises:
        AssertionError: a job fails although nobody disturbs it.
    """
    arena = Arena(folder, seed=seed)
    chosen = [job for job in jobs() if re.search(only, job.name)]
    scores = {job.name: Score() for job in chosen}
    with local_hub(folder):
        turns = _turns(chosen)
        while sum(score.tally["kills"] for score in scores.values()) < kills:
            job = next(turns)
            with _timed(scores[job.name]):
                arena.kill(job, scores[job.name])
        turns = _turns(chosen)
        while sum(score.tally["faults"] for score in scores.values()) < faults:
            job = next(turns)
            with _timed(scores[job.name]):
                if calls := arena.undisturbed(job).calls:
                    fault = arena.random.choice([*ERRORS, "short"])
                    arena.fault(job, scores[job.name], arena.random.randint(1, calls), fault)
    return scores


def fill_disk_at_every_write(
    folder: Path, *, seed: int = 0, only: str = "", share: tuple[int, int] = (0, 1)
) -> dict[str, Score]:
    """Run each job with a disk that is full from its first write on, from its second on, …, and then to its end.

    What is written is counted once without a fault. Jobs whose threads race may write in another order.

    Args:
        share: (i, n): the i-th of n processes takes every n-th write.

    Raises:
        AssertionError: a job fails although nobody disturbs it.
    """
    arena = Arena(folder, seed=seed)
    chosen = [job for job in jobs() if re.search(only, job.name)]
    scores = {job.name: Score() for job in chosen}
    with local_hub(folder):
        for job in chosen:
            with _timed(scores[job.name]):
                for at in range(1 + share[0], arena.writes(job) + 1, share[1]):
                    arena.fault(job, scores[job.name], at, "ENOSPC", writes=True)
    return scores


def _turns(chosen: Sequence[Job]) -> Iterator[Job]:
    """Yield the jobs in turn for ever, so that all have had their share wherever it ends."""
    for number in itertools.count():
        yield from (job for job in chosen if number % job.every == 0)


@contextmanager
def _timed(score: Score) -> Iterator[None]:
    begin = time.monotonic()
    yield
    score.seconds += time.monotonic() - begin


def prepare(folder: Path) -> None:
    """Write the inputs of the jobs, in forks. Raises AssertionError where that fails."""
    log = folder / "log"

    def edited() -> None:
        heads = ["--head", "L0H1", "--no-measure", "-o", "edited", "--threads", 1]
        run_command(["edit", "heads", "target", *heads], folder / "inputs", log, None)

    for work in (lambda: make_inputs(folder / "inputs"), edited):
        _, status = os.waitpid(fork(work), 0)
        if status:
            raise AssertionError(f"the inputs could not be made\n{log.read_text() if log.exists() else ''}")
