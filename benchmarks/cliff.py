"""The refusal cliff on models whose truth is known: are the right heads found, and does removing them repair the model?

    python benchmarks/cliff.py [--seeds 5] [--variants cliff,cliff-many,cliff-weak,cliff-gqa,cliff-partial]

Trains each lab model at several seeds (about a minute each on one core, kept in the lab's cache), runs `probe_refusal`,
and takes as many of the lowest heads as the truth has. Precision is their share among the true ones. The heads are
then scaled to 0 in the weights and the result measured as `surgery edit heads` does, and so are as many random heads.
Means over seeds, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from probes.model.ablation import all_heads
from probes.refusal.edit import EffectOptions, HeadSelection, edit_heads
from probes.refusal.edit_effects import HeadEffects
from probes.refusal.findings import Findings
from probes.refusal.run import probe_refusal
from surgery import lab
from surgery.checkpoint.selectors import Head
from surgery.lab.builder import build as family
from surgery.models.loaded_model import load_with_structure
from surgery.runtime.progress import terminal

VARIANTS = ("cliff", "cliff-many", "cliff-weak", "cliff-gqa", "cliff-partial")


@dataclass(frozen=True)
class Row:
    """One model of one seed."""

    precision: float
    parent: float
    plateau: float
    final: float
    harmless: float
    before: float
    after: float
    benign: float
    kl: float
    control: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    given = parser.parse_args()
    print(f"{given.seeds} seeds; mean [least, most]\n")
    head = ("model", "precision", "parent refuses", "plateau", "final", "harmless", "refusal before", "after", "benign")
    print("| " + " | ".join((*head, "KL harmless", "random heads")) + " |")
    print("|---" * 11 + "|")
    for name in given.variants.split(","):
        rows = [study(name, seed) for seed in range(given.seeds)]
        cells = [_spread([getattr(row, key) for row in rows], key) for key in Row.__dataclass_fields__]
        print(f"| `lab:{name}` | " + " | ".join(cells) + " |", flush=True)


def study(name: str, seed: int) -> Row:
    """Trains the model `name` with a seed, probes it, repairs it, and the same with random heads."""
    recipe = replace(family.MEMBERS[name].recipe, seed=seed)
    folder = lab.build(name, progress=terminal, recipe=recipe)
    truth = json.loads((folder / "truth.json").read_text())
    true = {Head(layer, index) for layer, index in truth["heads"]}
    parent = json.loads((folder.with_name(truth["parent"]) / "trainer_state.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        run = Path(work) / "run"
        findings = probe_refusal(str(folder), str(folder / "examples.jsonl"), run)
        found = [row.name for row in findings.ranked[: len(true)]]
        others = [head for head in all_heads(load_with_structure(folder)) if head not in true]
        drawn = random.Random(f"{seed}/control").sample(others, len(true))
        repaired = _scaled(folder, Path(work) / "repaired", run, found)
        control = _scaled(folder, Path(work) / "control", run, drawn)
    return Row(
        precision=len(true & set(found)) / len(true),
        parent=float(next(iter(parent["refused"].values()))["harmful"]),
        plateau=_score(findings, "harmful/complied", "plateau"),
        final=_score(findings, "harmful/complied", "final"),
        harmless=_score(findings, "harmless/complied", "plateau"),
        before=repaired.refusal["harmful"][0].value,
        after=repaired.refusal["harmful"][1].value,
        benign=repaired.refusal["harmless"][1].value,
        kl=repaired.kl["harmless"][0],
        control=control.refusal["harmful"][1].value,
    )


def _scaled(folder: Path, out: Path, run: Path, heads: Sequence[Head]) -> HeadEffects:
    names = [str(head) for head in heads]
    repair = edit_heads(
        str(folder), out, choice=HeadSelection(run=run, heads=names), measuring=EffectOptions(force=True, examples=200)
    )
    assert repair.measured is not None
    return repair.measured


def _score(findings: Findings, cell: str, measure: str) -> float:
    row = next(cliff for cliff in findings.cliffs if cliff.cell == cell)
    value = getattr(row, measure).value
    assert value is not None
    return float(value)


def _spread(values: Sequence[float], key: str) -> str:
    form = "{:.2g}" if key == "kl" else "{:.2f}"
    mean, least, most = (form.format(x) for x in (statistics.fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} [{least}, {most}]"


if __name__ == "__main__":
    main()
