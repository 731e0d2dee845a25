"""What the benchmarks share: contestants that take turns, seconds and peak memory, and tables in Markdown.

In come functions that run in this process, or commands that run in processes of their own. Medians stand with the least
and the most; ratios are taken round by round. Nothing large is imported here: a child's peak memory counts from its
parent's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from transfer import SETTLE, START_UP, remove, timed

# Threads that spin while they wait for each other take the processors from whatever else runs: on a machine that was
# shared, one row of 512 tokens took ten times as long. Both contestants wait in the same way.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# Where glibc hands freed memory back and fetches it anew, that takes up to a fifth of a forward pass, and whether it
# does is a matter of luck: 0 or 420,000 page faults in the same pass. While times are taken it keeps what it has.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
MEMORY_LIMIT = 600.0  # MB, of an edit
WEIGHTS = "model.safetensors"

Times = list[tuple[float, float]]  # of every round: seconds by the clock, seconds of the processors


def take_turns(plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[Times, Times]:
    """Runs both in every round, one after the other."""
    times: tuple[Times, Times] = ([], [])
    for _ in range(rounds):
        for contestant, found in zip((plain, ours), times, strict=True):
            start, begun = time.perf_counter(), time.process_time()
            contestant()
            found.append((time.perf_counter() - start, time.process_time() - begun))
    return times


def ratios(over: Times, under: Times, digits: int = 2) -> list[str]:
    """`over` ÷ `under` round by round: by the clock, and by the processors."""
    return [spread([a[clock] / b[clock] for a, b in zip(over, under, strict=True)], digits) for clock in (0, 1)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (min–max)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def compare(title: str, names: tuple[str, str], times: tuple[Times, Times], found: Sequence[str], wanted: str) -> None:
    """Prints both contestants' times, and `found`: their ratio by the clock and by the processors."""
    header = ("", "seconds", "processor seconds", "ratio", "of processor seconds", "wanted")
    plain, ours = ([spread([time[clock] for time in held]) for clock in (0, 1)] for held in times)
    table(title, header, [(names[0], *plain, "", "", ""), (names[1], *ours, *found, wanted)])


def peak_of(work: Callable[[], object]) -> float:
    """Peak resident MB while `work` runs, what was there before included. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def child(program: str, *arguments: str, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """What `program` prints in a process of its own, with `more` environment."""
    plain = {name: value for name, value in os.environ.items() if name not in KEEPING}
    command = [sys.executable, program, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=plain | WAITING | more).stdout


def against_copying(name: str, what: str, source: Path, change: Sequence[str], rounds: int) -> None:
    """Prints medians and peak memory of an edit and of undoing it, beside those of copying the checkpoint.

    what: what is changed, for the title. source: the checkpoint, in one file. change: the command that edits it, to
    which `--out` and a path are added.
    """
    folder = source.parent
    cut, back = folder / "cut", folder / "back"
    contestants = {
        "cp -r": (["cp", "-r", str(source), str(folder / "copy")], folder / "copy"),
        # What surgery writes is on the disk when it ends; what cp alone writes is not.
        "cp -r, fsync": (
            ["sh", "-c", f"cp -r {source} {folder / 'kept'} && sync {folder / 'kept' / WEIGHTS}"],
            folder / "kept",
        ),
        name: ([*change, "--out", str(cut)], None),
        "edit undo": ([sys.executable, __file__, str(cut), str(back)], back),
    }
    runs: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        remove(cut)
        for contestant, (command, output) in contestants.items():
            if contestant == "edit undo":  # large files are written past the page cache
                subprocess.run(["cat", cut / WEIGHTS], stdout=subprocess.DEVNULL, check=True)
            time.sleep(SETTLE)
            result = timed(command)
            if contestant == "edit undo":
                subprocess.run(["cmp", source / WEIGHTS, back / WEIGHTS], check=True)
            if number:  # the first round warms the page cache
                runs.setdefault(contestant, []).append(result)
            if output is not None:
                remove(output)
    remove(cut)
    copies, rows = [seconds for seconds, _ in runs["cp -r"]], []
    for contestant, results in runs.items():
        spent, start_up = [seconds for seconds, _ in results], 0.0 if contestant.startswith("cp") else START_UP
        found = [(seconds - start_up) / copy for seconds, copy in zip(spent, copies, strict=True)]
        rows.append((contestant, spread(spent), spread(found), f"{max(memory for _, memory in results):.0f} MB"))
    title = f"{(source / WEIGHTS).stat().st_size / 1e9:.2f} GB, {what}, {rounds} rounds"
    table(title, ("", "seconds", "(seconds − start-up) ÷ cp, by rounds", "peak memory"), rows)
    print(f"\nAllowed: {MEMORY_LIMIT:.0f} MB. Start-up: {START_UP:.0f} s.")


def main() -> None:
    """Undoes the edit in the first path given, to the second."""
    from surgery.edits.undo_file import undo

    undo(sys.argv[1], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
