"""Run functions on mutated files, and hold each run to what a stranger's file may do: nothing but be read.

An input is a pair (target, number): its files are made anew from a generator that is seeded by both, so that a failure
is repeated by naming them. `run_input` runs one and returns its `Outcome`; `surgery`'s promises are checked there:

- a result or a `SurgeryError`, with a message of readable length;
- in `MAX_SECONDS`, with at most `MAX_MB` more memory than before;
- nothing is written outside of OUT, the folder of temporary files and the caches; nothing is read outside of the input;
- no process is started (but `FuzzTarget.program`), no connection made (but to `FuzzTarget.host`), no code of the input
  compiled or unpickled.

Layout of a worker's folder: `in-N` (the input, and the working directory), `out-N`, `tmp`, `home`, and `outside`: what
no input may reach.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.audit import ALWAYS_READ, WatchedFiles, is_inside, watch_files
from support.fuzz_mutations import mutate_folder

from surgery.errors import SurgeryError
from surgery.io.input_files import read_utf8
from surgery.recipes.config_texts import config_texts

# Of processor time: on a machine with other work a clock would find fault with innocent inputs.
MAX_SECONDS = 2.0
MAX_MB = 500.0
MAX_MESSAGE = 250_000  # characters: a thousand lines, of as many faults in one file
MAX_NAMED = 1_000_000  # bytes of a config whose texts are looked at
# By the clock, for what waits for ever.
HUNG_SECONDS = 20.0
# How often an input that took too long is run: what is slow in itself is slow each time.
TRIES = 3
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "pickle.find_class",
)


@dataclass(frozen=True)
class FuzzTarget:
    """What is run on mutated files.

    seeds: folders of the corpus; each input is made of one of them.
    files: globs of the files in it that are mutated.
    call: called with the input's folder and the folder for results, which does not exist yet.
    weight: how many inputs it gets of each round.
    mutate: makes the input of the copied seed, in place of `mutate_folder`.
    named: files of the input that the user names, and so may be links to anywhere.
    follows: whether the input may name what is read, wherever it is: the models of a merge, the base of an adapter.
    writes: whether it may write into the input, e.g. what it resumes; by default only into OUT.
    host: the one address that it may connect to.
    every: it takes part in one of so many rounds, where an input takes long (a report with its pictures).
    program: the one script that it may start, in a process of its own.
    """

    name: str
    seeds: Sequence[str]
    files: Sequence[str]
    call: Callable[[Path, Path], object]
    weight: int = 1
    mutate: Callable[[Path, Sequence[str], random.Random], None] = mutate_folder
    named: Sequence[str] = ()
    follows: bool = False
    writes: bool = False
    host: tuple[str, int] | None = None
    every: int = 1
    program: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one input: `kind` is result, refused or failed, `why` says it in words."""

    target: str
    number: int
    kind: str
    why: str
    seconds: float
    mb: float


class _HungError(BaseException):
    """The input is still running after `HUNG_SECONDS`; no `except Exception` holds it."""


@dataclass
class _Forbidden:
    """What happened that may not; the hook that fills it stays for ever, and does nothing while `folder` is None."""

    folder: str | None = None
    host: tuple[str, int] | None = None
    program: Path | None = None
    found: list[str] = field(default_factory=list)
    installed: bool = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or (event == "subprocess.Popen" and self._is_program(args)):
            return
        if event in _FORBIDDEN or (event in ("socket.connect", "socket.bind") and args[1] != self.host):
            self.found.append(f"{event} {str(args)[:200]}")
        elif event in ("compile", "exec", "import") and self._is_inside(event, args):
            self.found.append(f"{event} of code in the input: {str(args)[:200]}")

    def _is_program(self, args: tuple[Any, ...]) -> bool:
        """Return whether the process started is this interpreter, running `program` apart from its user's packages."""
        if self.program is None or os.fsdecode(args[0]) != sys.executable:
            return False
        return [os.fsdecode(word) for word in args[1][1:3]] == ["-I", str(self.program)]

    def _is_inside(self, event: str, args: tuple[Any, ...]) -> bool:
        assert self.folder is not None
        file = getattr(args[0], "co_filename", None) if event == "exec" else args[1]
        return isinstance(file, str) and file.startswith(self.folder)


_forbidden = _Forbidden()


@dataclass(frozen=True)
class Workplace:
    """A worker's folder, and the folders that may be read and written beside the input."""

    folder: Path
    corpus: Path
    seed: int
    caches: Sequence[Path] = ()

    def prepare(self) -> None:
        """Make the folders that all inputs share, and point the process at them."""
        for name in ("tmp", "home", "outside"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "home" / "secret.txt").write_text("secret\n")
        (self.folder / "outside" / "secret.txt").write_text("secret\n")
        if (model := self.corpus / "model").is_dir():
            shutil.copytree(model, self.folder / "outside" / "model", dirs_exist_ok=True)
        os.environ["HOME"] = str(self.folder / "home")
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder / "tmp")

    def make_input(self, target: FuzzTarget, number: int, folder: Path) -> None:
        """Write the files of the input into `folder`."""
        draw = random.Random(f"{self.seed}:{target.name}:{number}")
        shutil.copytree(self.corpus / draw.choice(target.seeds), folder, copy_function=_link, symlinks=True)
        target.mutate(folder, target.files, draw)


def run_input(target: FuzzTarget, number: int, place: Workplace) -> Outcome:
    """Run one input, several times where it took too long, and return what became of it."""
    outcome = _run_once(target, number, place)
    for _ in range(TRIES - 1):
        if outcome.kind == "failed" or outcome.seconds <= MAX_SECONDS:
            return outcome
        outcome = min(outcome, _run_once(target, number, place), key=lambda one: one.seconds)
    if outcome.seconds > MAX_SECONDS:
        return Outcome(target.name, number, "failed", "takes too long", outcome.seconds, outcome.mb)
    return outcome


def _run_once(target: FuzzTarget, number: int, place: Workplace) -> Outcome:
    folder, out = place.folder / f"in-{number}", place.folder / f"out-{number}"
    shared = [place.folder / name for name in ("outside", "home")]
    before = [_signature(path) for path in shared]
    try:
        place.make_input(target, number, folder)
    except Exception as error:  # a fault of the fuzzer's own, which is not to pass for one of the program
        why = f"the input could not be made: {type(error).__name__}: {error} ({_where(error.__traceback__)})"
        return Outcome(target.name, number, "failed", why, 0.0, 0.0)
    # Each input is a process of its own to its user: whatever an earlier one left is not its fault.
    os.chdir(folder)
    kind, why = "result", ""
    _reset_peak()
    memory, start = _memory("VmRSS"), time.process_time()
    seconds = 0.0
    try:
        with watch_files() as watched, _watching(folder, target), _alarm(HUNG_SECONDS):
            try:
                target.call(folder, out)
            except SurgeryError as error:
                kind, why = "refused", str(error)
            finally:
                seconds = time.process_time() - start
        if len(why) > MAX_MESSAGE:
            kind, why = "failed", f"a message of {len(why):,} characters: {why[:300]}…"
        if before != [_signature(path) for path in shared]:
            raise AssertionError("a file outside of the input was changed")
        if found := [*_forbidden.found, *_outside(watched, target, folder, out, place)]:
            raise AssertionError("; ".join(found))
    except _HungError:
        kind, why = "failed", f"hangs ({_where(sys.exc_info()[2])})"
    except MemoryError:
        kind, why = "failed", f"out of memory ({_where(sys.exc_info()[2])})"
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:300]} ({_where(error.__traceback__)})"
        kind, why = "failed", f"{text}\n\n{traceback.format_exc()[-4_000:]}"
    mb = max(0.0, _memory("VmHWM") - memory)
    if mb > MAX_MB and kind != "failed":
        kind, why = "failed", f"takes {mb:,.0f} MB"
    os.chdir(place.folder)
    _remove(folder)
    for path in place.folder.glob(f"*out-{number}*"):
        _remove(path)
    for path in (place.folder / "tmp").iterdir():
        _remove(path)
    return Outcome(target.name, number, kind, why, seconds, mb)


def _outside(watched: WatchedFiles, target: FuzzTarget, folder: Path, out: Path, place: Workplace) -> Iterator[str]:
    """Yield in words what was written or read where it may not."""
    writable = [out, place.folder / "tmp", *place.caches, *([folder] if target.writes else [])]
    writable += [Path("/dev/null")] if target.program else []  # what a program says is thrown away
    for path in sorted(watched.written):
        # Made if it is not there.
        if path != out.parent and not is_inside(path, writable) and not _is_beside(path, out):
            yield f"writes {path.relative_to(place.folder) if path.is_relative_to(place.folder) else path}"
    readable = [*writable, folder, place.corpus, *(Path(os.path.realpath(folder / name)) for name in target.named)]
    if target.follows:
        readable += [place.folder / "outside", place.folder / "home"]
        # A file that its user gave may name any other; which ones are read is told before anything is done.
        readable += [Path(os.path.realpath(folder / text)) for name in target.named for text in _texts(folder / name)]
    for path in sorted(watched.read):
        # Opened to be synced, after something was renamed in it.
        if path != place.folder and not is_inside(path, [*readable, *ALWAYS_READ]) and not _is_beside(path, out):
            yield f"reads {path.relative_to(place.folder) if path.is_relative_to(place.folder) else path}"


def _texts(path: Path) -> Sequence[str]:
    try:
        return [text for text in config_texts(read_utf8(path, limit=MAX_NAMED), str(path)) if "\0" not in text]
    except SurgeryError:  # the input has no such file, or it is no text
        return []


def _is_beside(path: Path, out: Path) -> bool:
    """Return whether it belongs to OUT, under a name of its own: what is unfinished, a lock, what OUT replaces."""
    first = path.relative_to(out.parent).parts[:1] if path.is_relative_to(out.parent) else ()
    return any(name.startswith((out.name, f".{out.name}")) for name in first)


def _link(source: str, copy: str) -> None:
    # An input has many files, and few of them change.
    try:
        os.link(source, copy)
    except OSError:  # on another file system
        shutil.copy2(source, copy)


@contextmanager
def _watching(folder: Path, target: FuzzTarget) -> Iterator[None]:
    if not _forbidden.installed:
        sys.addaudithook(_forbidden.hook)
        _forbidden.installed = True
    _forbidden.host, _forbidden.program, _forbidden.found = target.host, target.program, []
    _forbidden.folder = str(folder)
    try:
        yield
    finally:
        _forbidden.folder = None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise _HungError

    before = signal.signal(signal.SIGALRM, ring)
    # Again every second: what catches it the first time, such as a `finally` that waits, must not keep it.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _where(trace: Any) -> str:
    frames = traceback.extract_tb(trace)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-8:]))


def _signature(folder: Path) -> list[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        return sorted((entry.name, *_times(entry.stat(follow_symlinks=False))) for entry in entries)


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_size


def _reset_peak() -> None:
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")


def _memory(name: str) -> float:
    """Return a line of /proc/self/status in MB."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
