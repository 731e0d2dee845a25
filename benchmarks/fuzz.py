"""Run mutated files through everything that reads files, and count results, refusals and failures.

    python benchmarks/fuzz.py --inputs 100000 --jobs 2

Exit code 1 where an input fails: ends in anything but a result or a `SurgeryError`, takes over 2 s or 500 MB, writes
outside of its output or reads outside of its folder, starts a process or connects to another machine. Such inputs are
written to a folder, each with the command that repeats it. `support.fuzzing` says what is checked.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    from support.fuzz_campaign import TargetCounts
    from support.fuzzing import Outcome


def main() -> None:
    """Run the campaign that the command line describes."""
    arguments = _parse()
    memory = Path("/dev/shm")  # noqa: S108 - files in memory; the folder in it gets a name of its own
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as name:
        code = _run(arguments, Path(name).resolve())
    sys.exit(code)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2, help="Processes side by side.")
    parser.add_argument("--seed", type=int, default=0, help="Another one makes other inputs.")
    parser.add_argument("--minutes", type=float, default=None, help="Stop after so many, however many inputs are left.")
    parser.add_argument("--only", action="append", help="A target; may be repeated.")
    parser.add_argument("--input", type=int, help="With one --only: run only this input, and show what comes of it.")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="Folder for inputs that fail.")
    return parser.parse_args()


def _run(arguments: argparse.Namespace, folder: Path) -> int:
    caches = _set_environment(folder)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    # Before anything is computed: a pool of threads does not outlive a fork.
    torch.set_num_threads(1)
    from support.fuzz_campaign import Campaign, run_campaign
    from support.fuzz_corpus import make_corpus
    from support.fuzz_targets import TARGETS, prepare_targets
    from support.fuzzing import Workplace, run_input

    targets = [target for target in TARGETS if target.name in (arguments.only or [target.name])]
    start = time.monotonic()
    corpus = make_corpus(folder / "corpus")
    prepare_targets()
    gc.collect()
    gc.freeze()  # what was imported is no garbage: to look through it again and again takes a tenth of the time
    print(f"The corpus took {time.monotonic() - start:.1f} s.", flush=True)
    if arguments.input is not None:
        place = Workplace(folder / "worker-0", corpus, arguments.seed, caches)
        place.prepare()
        place.make_input(targets[0], arguments.input, arguments.failures)
        outcome = run_input(targets[0], arguments.input, place)
        print(outcome.kind, outcome.why, f"{outcome.seconds:.3f} s, {outcome.mb:.0f} MB", sep="\n")
        return int(outcome.kind == "failed")
    campaign = Campaign(
        TARGETS,
        corpus,
        folder,
        arguments.inputs,
        seed=arguments.seed,
        jobs=arguments.jobs,
        caches=caches,
        only=frozenset(arguments.only or ()),
    )
    start = time.monotonic()
    counts = run_campaign(campaign, minutes=arguments.minutes, report=_say)
    _print_counts(counts, time.monotonic() - start)
    return _keep_failures(counts, campaign, arguments)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _set_environment(folder: Path) -> Sequence[Path]:
    """Point caches into `folder`, and keep libraries offline; before any of them is imported. Return the caches."""
    caches = [folder / "hub", folder / "lab", folder / "xdg"]
    os.environ |= {
        "HF_HOME": str(caches[0]),
        "SURGERY_CACHE": str(caches[1]),
        "XDG_CACHE_HOME": str(caches[2]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(caches[2]),
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("HF_TOKEN", "SURGERY_DEBUG", "WORLD_SIZE", "RANK"):
        os.environ.pop(name, None)
    return caches


def _print_counts(counts: Mapping[str, TargetCounts], seconds: float) -> None:
    head = ("target", "inputs", "results", "refused", "failures", "mean ms", "slowest ms", "peak MB")
    rows = [
        (
            name,
            f"{row.inputs:,}",
            f"{row.results:,}",
            f"{row.refused:,}",
            f"{len(row.failures):,}",
            f"{1000 * row.seconds / max(row.inputs, 1):.1f}",
            f"{1000 * row.slowest:.0f}",
            f"{row.peak:.0f}",
        )
        for name, row in counts.items()
        if row.inputs
    ]
    every = list(counts.values())
    rows.append(
        (
            "all",
            f"{sum(row.inputs for row in every):,}",
            f"{sum(row.results for row in every):,}",
            f"{sum(row.refused for row in every):,}",
            f"{sum(len(row.failures) for row in every):,}",
            f"{1000 * sum(row.seconds for row in every) / max(sum(row.inputs for row in every), 1):.1f}",
            f"{1000 * max(row.slowest for row in every):.0f}",
            f"{max(row.peak for row in every):.0f}",
        )
    )
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    print(f"\n{sum(row.inputs for row in every):,} inputs in {seconds:.0f} s.", flush=True)


def _keep_failures(counts: Mapping[str, TargetCounts], campaign: object, arguments: argparse.Namespace) -> int:
    """Write every failing input to the folder for failures, with its reason and its command; return the exit code."""
    from support.fuzz_campaign import Campaign
    from support.fuzzing import Workplace

    assert isinstance(campaign, Campaign)
    failures = [outcome for row in counts.values() for outcome in row.failures]
    place = Workplace(campaign.folder / "again", campaign.corpus, campaign.seed)
    place.prepare()
    for outcome in failures:
        target = next(target for target in campaign.targets if target.name == outcome.target)
        folder = arguments.failures / f"{outcome.target.replace(' ', '-')}-{campaign.seed}-{outcome.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        again = f"--only '{outcome.target}' --seed {campaign.seed} --input {outcome.number}"
        (folder / "why.txt").write_text(
            f"python benchmarks/fuzz.py {again}\n\n{outcome.seconds:.2f} s, {outcome.mb:.0f} MB\n{outcome.why}\n",
            encoding="utf-8",
            errors="backslashreplace",
        )
        place.make_input(target, outcome.number, folder / "input")
    for why, names in _by_reason(failures).items():
        print(f"{len(names)}× {why}: {', '.join(names[:3])}")
    if failures:
        print(f"{len(failures)} inputs failed; they are in {arguments.failures}.")
    return int(bool(failures))


def _by_reason(failures: Sequence[Outcome]) -> dict[str, list[str]]:
    """Return the first lines of reasons, the most frequent first → the inputs that failed so."""
    found: dict[str, list[str]] = {}
    for outcome in failures:
        # Numbers differ from input to input.
        reason = re.sub(r"(in|out)-\d+", r"\1-N", outcome.why.partition("\n")[0])
        found.setdefault(reason, []).append(f"{outcome.target} {outcome.number}")
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


if __name__ == "__main__":
    main()
