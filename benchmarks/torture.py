"""Kill, stop and fault every kind of job at random moments, and compare what it wrote with an undisturbed run.

A process is killed by SIGKILL at a random moment of its work, or at its k-th write, rename, fsync, …; stopped by SIGINT
or SIGTERM; or one of its calls fails (full disk, used-up quota, failing or read-only disk, no permission) or is cut
short. Then the same command runs again until it is done. OUT must have the same bytes, and nothing else may be left.
Usage:

    python benchmarks/torture.py [--kills 1000] [--faults 500] [--jobs 2] [--seed 0] [--only REGEX]
    python benchmarks/torture.py --every-write [--jobs 2] [--only REGEX]

With --every-write nothing is drawn: each job runs once for each of its writes, with a disk that is full from there on.
A push has none: it reads OUT and writes to the Hub alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

from support import torture as t  # noqa: E402 (tests are no package)

COUNTS = ("kills", "stops", "faults", "reruns", "too late")


def main() -> int:
    """Run the torture, print a line per job, and return 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression of the jobs' names")
    parser.add_argument("--every-write", action="store_true", help="a full disk at write 1, 2, … of each job")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    asked = parser.parse_args()
    begin = time.monotonic()
    t.import_everything()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name).resolve()
        t.prepare(folder)
        results = [folder / f"result-{index}.json" for index in range(asked.jobs)]

        def share(index: int) -> None:
            kills, faults = (
                count // asked.jobs + (index < count % asked.jobs) for count in (asked.kills, asked.faults)
            )
            (folder / f"arena-{index}").mkdir()
            # The same inputs under the same path for all, as their paths are in what is written.
            arena = folder / f"arena-{index}"
            (arena / "inputs").symlink_to(folder / "inputs")
            if asked.every_write:
                scores = t.fill_disk_at_every_write(arena, only=asked.only, share=(index, asked.jobs))
            else:
                scores = t.torture(arena, kills=kills, faults=faults, seed=asked.seed * 1000 + index, only=asked.only)
            results[index].write_text(
                json.dumps({job: {**vars(score), "tally": dict(score.tally)} for job, score in scores.items()})
            )

        children = [t.fork(lambda index=index: share(index)) for index in range(asked.jobs)]  # type: ignore[misc]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        found = [json.loads(path.read_text()) for path in results if path.exists()]
    failures = [failure for scores in found for score in scores.values() for failure in score["failures"]]
    total = dict.fromkeys(COUNTS, 0)
    print(f"{'job':<28}" + "".join(f"{name:>10}" for name in COUNTS) + f"{'failures':>10}{'seconds':>10}")
    for job in found[0] if found else ():
        parts = [scores[job] for scores in found]
        counts = {name: sum(part["tally"].get(name, 0) for part in parts) for name in COUNTS}
        total = {name: total[name] + counts[name] for name in COUNTS}
        failed, seconds = sum(len(part["failures"]) for part in parts), sum(part["seconds"] for part in parts)
        print(f"{job:<28}" + "".join(f"{counts[name]:>10,}" for name in COUNTS) + f"{failed:>10}{seconds:>10.1f}")
    print(f"{'all':<28}" + "".join(f"{total[name]:>10,}" for name in COUNTS) + f"{len(failures):>10}", end="")
    print(f"{time.monotonic() - begin:>10.1f}")
    for failure in failures:
        print(failure)
    if asked.json:
        asked.json.write_text(json.dumps({"counts": total, "failures": failures}))
    return 1 if failures or any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
