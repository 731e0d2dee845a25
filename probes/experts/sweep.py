"""How strongly to reinforce: a grid of β scored on tasks, chosen on one half, tested on the other, with controls.

In come a live model, its chosen experts and tasks of lm-evaluation-harness; out come scores with intervals at every β,
and how many answers collapse into repetition. The paper's single runs without controls are what this is to mend: the
controls are experts of the same layers that fire about as often.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.data.generation import DEFAULT_MAX_NEW_TOKENS, generate_texts, remaining_tokens
from probes.data.records import IntervalRecord, interval_record
from probes.experts.findings import ExpertRecord, PointRecord, SweepRecord
from probes.experts.repetition import is_repetitive
from probes.model.expert_scaling import ExpertScaling, Phase, ScalingMethod, scaled_routing
from probes.model.routers import Router
from probes.side_effects.effects import Rate
from surgery.checkpoint.selectors import Expert
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.harness import on_tasks
from surgery.evaluation.scoring import Score
from surgery.io.command_line import option_flag
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.progress import Progress, silent

CHOICE, TEST = (0, 2), (1, 2)
NEAREST = 4  # of a layer's experts in firing rate, among which a control is drawn
LOOKED_AT = 32  # prompts whose answers are looked at for repetition


@dataclass(frozen=True)
class BetaGrid:
    """What is tried.

    Args:
        betas: the grid; 1 is the model as it is, and is added where it is missing.
        tasks: whose scores choose; the mean over tasks of each task's first metric.
        top: how many of the ranked experts are reinforced.
        controls: random sets at the best β.
        limit: samples of each task at most.

    Raises:
        SurgeryError: a value is out of its range.
    """

    betas: Sequence[float]
    tasks: Sequence[str]
    top: int = 2
    way: ScalingMethod = "weight"
    phase: Phase = "all"
    controls: int = 5
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("controls", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise usage_error(f"got {getattr(self, name)}, expected {least} or more", where=option_flag(name))
        if not self.betas or not self.tasks:
            raise usage_error("a sweep needs a grid and a task to score it on: give both --sweep and --task.")
        if self.way == "logit" and 0 in self.betas:
            raise usage_error("got β = 0, which has no logarithm to add to a logit", where="--sweep")
        for beta in self.betas:
            ExpertScaling({Expert(0, 0): beta}, self.way, self.phase)


def check_tasks(grid: BetaGrid) -> None:
    """Raises SurgeryError where a task is unknown, or lm-evaluation-harness is missing."""
    on_tasks(grid.tasks, limit=grid.limit, batch_size=grid.batch_size, seed=grid.seed)


def parse_betas(text: str) -> list[float]:
    """`1,2,4` → [1.0, 2.0, 4.0]; `1,2,…,64`, or with three dots, goes on by the last ratio. Raises SurgeryError."""
    words = [word.strip() for word in text.replace("...", "…").split(",")]
    found: list[float] = []
    for at, word in enumerate(words):
        if word == "…" and at >= 2 and at == len(words) - 2 and len(found) >= 2 and found[-2] > 0:
            ratio, end = found[-1] / found[-2], _number(words[-1], text)
            while ratio > 1 and found[-1] * ratio < end * (1 - 1e-9):
                found.append(found[-1] * ratio)
        else:
            found.append(_number(word, text))
    if not all(math.isfinite(beta) and beta >= 0 for beta in found):
        raise usage_error(f"got {text!r}, expected finite numbers from 0 on", where="--sweep")
    return list(dict.fromkeys(found))


def sweep_beta(
    live: LoadedModel,
    routers: Sequence[Router],
    ranked: Sequence[ExpertRecord],
    every: Sequence[ExpertRecord],
    prompts: Sequence[tuple[int, ...]],
    grid: BetaGrid,
    *,
    max_new_tokens: int | None = None,
    progress: Progress = silent,
) -> SweepRecord:
    """Scores the grid on one half of the tasks' samples, and the best β, 1 and the controls on the other.

    Where 1 is best there is no effect to control: the β that is farthest from it shows what random experts do.

    Args:
        ranked: the supported experts, best first. every: all experts, for controls.
        prompts: ids of prompts whose answers are looked at for repetition.
        max_new_tokens: of these answers; None for 1,024, or what the model's context leaves.

    Raises:
        SurgeryError: fewer experts are ranked than asked for; a layer has no experts left to be controls; a task is
            unknown, or has too few samples to be halved; lm-evaluation-harness is missing; phase `generated` does not
            reach a task.
    """
    if len(ranked) < grid.top:
        raise usage_error(
            f"{len(ranked)} experts have evidence enough to be ranked, {grid.top} were asked for",
            where="--top",
            hint="Ask for fewer, lower --fires or --at-marker, or leave --sweep out.",
        )
    chosen = [row.name for row in ranked[: grid.top]]
    betas = list(dict.fromkeys([1.0, *grid.betas]))
    choice = on_tasks(grid.tasks, limit=grid.limit, batch_size=grid.batch_size, seed=grid.seed, part=CHOICE)
    test = on_tasks(grid.tasks, limit=grid.limit, batch_size=grid.batch_size, seed=grid.seed, part=TEST)
    looked = list(prompts)[:LOOKED_AT]

    def point(beta: float, experts: Sequence[Expert], part: str, control: int | None = None) -> PointRecord:
        how = ExpertScaling(dict.fromkeys(experts, beta), grid.way, grid.phase)
        scores: list[Score] = []
        for measure in choice if part == "choice" else test:
            with scaled_routing(live, routers, how) as applied:
                scores += measure(live.loaded)
            applied.check(scores[-1].task)
        collapsed = None
        if control is None and part == "choice":
            with scaled_routing(live, routers, how):
                collapsed = _collapsed(live, looked, grid.batch_size, max_new_tokens)
        return PointRecord(
            beta=beta,
            experts=[str(expert) for expert in experts],
            control=control,
            part=part,
            scores=_first_metrics(scores),
            collapsed=collapsed,
        )

    rngs = [random.Random(f"{grid.seed}/{number}/experts") for number in range(grid.controls)]
    controls = [matched_controls(chosen, every, rng) for rng in rngs]
    with progress("Sweeping β", len(betas) + 2 + grid.controls, "steps") as advance:
        points = []
        for beta in betas:
            points.append(point(beta, chosen, "choice"))
            advance(1)
        # Of equally good ones that nearest to 1: what changes least.
        best = max(points, key=lambda one: (_mean(one.scores), -_strength(one.beta))).beta
        shown = best if best != 1 else max(betas, key=_strength)
        for beta in dict.fromkeys((1.0, shown)):
            points.append(point(beta, chosen, "test"))
            advance(1)
        for number, drawn in enumerate(controls):
            points.append(point(shown, drawn, "test", number))
            advance(1)
    return SweepRecord(
        tasks=list(grid.tasks),
        experts=[str(expert) for expert in chosen],
        way=grid.way,
        phase=grid.phase,
        points=points,
        best=best,
    )


def matched_controls(chosen: Sequence[Expert], every: Sequence[ExpertRecord], rng: random.Random) -> list[Expert]:
    """For each chosen expert another of its layer that fires about as often, each once.

    Raises:
        SurgeryError: a layer has too few experts.
    """
    rates = {row.name: row.rate for row in every}
    taken: list[Expert] = []
    for expert in chosen:
        others = [name for name in rates if name.layer == expert.layer and name not in (*chosen, *taken)]
        if not others:
            raise SurgeryError(f"layer {expert.layer} has no other expert left to be the control of {expert}")
        others.sort(key=lambda name: (abs(rates[name] - rates[expert]), name))
        taken.append(rng.choice(others[:NEAREST]))
    return taken


def _strength(beta: float) -> float:
    return abs(math.log2(beta)) if beta else math.inf


def _collapsed(
    live: LoadedModel, prompts: Sequence[tuple[int, ...]], batch_size: int, most: int | None
) -> IntervalRecord | None:
    if not prompts:
        return None
    limit = remaining_tokens(live.model, max(map(len, prompts)), DEFAULT_MAX_NEW_TOKENS if most is None else most)
    texts = generate_texts(
        live.loaded, prompts, max_new_tokens=limit, batch_size=batch_size, label="Looking for repetition"
    )
    rate = Rate.of([is_repetitive(live.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])
    return interval_record(rate, rate.n)


def _first_metrics(scores: Sequence[Score]) -> dict[str, IntervalRecord]:
    """Task → its first metric, turned so that higher is better."""
    found: dict[str, IntervalRecord] = {}
    for score in scores:
        if score.task not in found:
            if score.higher_is_better is False:
                raise usage_error(
                    f"the first metric of {score.task}, {score.metric}, is better when it is lower",
                    where="--task",
                    hint="Take a task with an accuracy.",
                )
            found[score.task] = interval_record(score, score.n)
    return found


def _mean(scores: Mapping[str, IntervalRecord]) -> float:
    return math.fsum(row.value or 0.0 for row in scores.values()) / len(scores)


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise usage_error(f"got {text!r}, expected numbers such as 1,2,4,…,64", where="--sweep") from error
