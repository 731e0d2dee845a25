"""Sweep the factor β of reinforced experts on tasks, choosing on one half of the samples and testing on the other.

Every β is scored on tasks of lm-evaluation-harness, with intervals, and the share of answers that collapse into
repetition is measured. The paper (arXiv 2505.14681) reports single runs without controls; here random experts of the
same layers that fire about as often are the control.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.data.choices import Phase, ScalingMethod
from probes.data.generation import DEFAULT_MAX_NEW_TOKENS, generate_texts, remaining_tokens
from probes.data.records import IntervalRecord, interval_record
from probes.experts.findings import ExpertRecord, PointRecord, SweepRecord
from probes.experts.repetition import is_repetitive
from probes.model.expert_scaling import ExpertScaling, scaled_routing
from probes.model.routers import Router
from probes.side_effects.effects import Rate
from surgery.checkpoint.selectors import Expert
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.harness import on_tasks
from surgery.evaluation.scoring import Measure, Score
from surgery.io.command_line import option_flag
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.progress import Progress, silent

CHOICE, TEST = (0, 2), (1, 2)  # (which, of how many) parts of each task's samples
# A control is drawn among so many experts of the layer that are nearest in firing rate: with fewer, all controls would
# be the same expert; with more, they would differ from the chosen one in how often they act.
NEAREST = 4
REPETITION_PROMPTS = 32  # whose answers are checked for repetition: generation costs far more than scoring


@dataclass(frozen=True)
class BetaGrid:
    """The values of β to try, the tasks to score them on, and the controls.

    Args:
        betas: the grid; 1, the unchanged model, is added where it is missing.
        tasks: the best β has the largest mean, over these tasks, of each task's first metric.
        top: how many of the ranked experts are reinforced.
        way, phase: as of `probes.model.expert_scaling.ExpertScaling`.
        controls: sets of random experts, tried at the best β.
        limit: samples of each task at most.
        batch_size: samples, and prompts, at a time.
        seed: of the tasks' samples and of the random experts.

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
            # Constructed for its checks alone.
            ExpertScaling({Expert(0, 0): beta}, self.way, self.phase)


def check_tasks(grid: BetaGrid) -> None:
    """Raise SurgeryError if a task is unknown, or lm-evaluation-harness is missing."""
    on_tasks(grid.tasks, limit=grid.limit, batch_size=grid.batch_size, seed=grid.seed)


def parse_betas(text: str) -> list[float]:
    """Return `1,2,4` as [1.0, 2.0, 4.0]; `1,2,…,64`, or with three dots, continues by the last ratio.

    Raises:
        SurgeryError: a part is no finite number ≥ 0.
    """
    words = [word.strip() for word in text.replace("...", "…").split(",")]
    betas: list[float] = []
    for index, word in enumerate(words):
        if word == "…" and index >= 2 and index == len(words) - 2 and len(betas) >= 2 and betas[-2] > 0:
            ratio, end = betas[-1] / betas[-2], _number(words[-1], text)
            # The end itself is the next word: rounding must not put a second value just below it.
            while ratio > 1 and betas[-1] * ratio < end * (1 - 1e-9):
                betas.append(betas[-1] * ratio)
        else:
            betas.append(_number(word, text))
    if not all(math.isfinite(beta) and beta >= 0 for beta in betas):
        raise usage_error(f"got {text!r}, expected finite numbers from 0 on", where="--sweep")
    return list(dict.fromkeys(betas))


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
    """Score the grid on one half of the tasks' samples, and the best β, 1 and the controls on the other.

    If 1 is best there is no effect to control: then random experts are tried at the β farthest from 1.

    Args:
        ranked: the supported experts, best first.
        every: all experts, from which controls are drawn.
        prompts: ids of prompts whose answers are checked for repetition.
        max_new_tokens: of these answers; None for 1,024, or what the model's context leaves.

    Raises:
        SurgeryError: fewer experts are ranked than asked for; a layer has no experts left to be controls; a task is
            unknown, or has too few samples to be halved; lm-evaluation-harness is missing; phase `generated` does not
            reach a task.
    """
    chosen = _best(ranked, grid.top)
    # 1 is always tried: it is what every other β is compared with.
    betas = list(dict.fromkeys([1.0, *grid.betas]))
    # Tasks are loaded and controls drawn first, so that what is missing is reported before hours of scoring.
    evaluator = _Evaluator.create(live, routers, grid, prompts, max_new_tokens)
    controls = _draw_controls(chosen, every, grid)
    with progress("Sweeping β", len(betas) + 2 + grid.controls, "steps") as advance:
        points = []
        for beta in betas:
            points.append(evaluator.evaluate(beta, chosen, "choice"))
            advance(1)
        # Of equally good ones that nearest to 1, which changes the model least.
        best = max(points, key=lambda point: (_mean(point.scores), -_strength(point.beta))).beta
        tested = best if best != 1 else max(betas, key=_strength)
        # The unchanged model is scored on this half, too: the halves differ in difficulty.
        for beta in dict.fromkeys((1.0, tested)):
            points.append(evaluator.evaluate(beta, chosen, "test"))
            advance(1)
        for number, control in enumerate(controls):
            points.append(evaluator.evaluate(tested, control, "test", number))
            advance(1)
    return SweepRecord(
        tasks=list(grid.tasks),
        experts=[str(expert) for expert in chosen],
        way=grid.way,
        phase=grid.phase,
        points=points,
        best=best,
    )


def _best(ranked: Sequence[ExpertRecord], count: int) -> list[Expert]:
    if len(ranked) < count:
        raise usage_error(
            f"{len(ranked)} experts have evidence enough to be ranked, {count} were asked for",
            where="--top",
            hint="Ask for fewer, lower --fires or --at-marker, or leave --sweep out.",
        )
    return [row.name for row in ranked[:count]]


def _draw_controls(chosen: Sequence[Expert], every: Sequence[ExpertRecord], grid: BetaGrid) -> list[list[Expert]]:
    # A generator for each set: the number of controls does not change the sets that are drawn before.
    rngs = [random.Random(f"{grid.seed}/{number}/experts") for number in range(grid.controls)]
    return [matched_controls(chosen, every, rng) for rng in rngs]


def matched_controls(chosen: Sequence[Expert], every: Sequence[ExpertRecord], rng: random.Random) -> list[Expert]:
    """Return, for each chosen expert, another of its layer that fires about as often; each is drawn once.

    Raises:
        SurgeryError: a layer has too few experts.
    """
    rates = {row.name: row.rate for row in every}
    controls: list[Expert] = []
    for expert in chosen:
        others = [name for name in rates if name.layer == expert.layer and name not in (*chosen, *controls)]
        if not others:
            raise SurgeryError(f"layer {expert.layer} has no other expert left to be the control of {expert}")
        # The name breaks ties, so that equal rates give the same controls on every machine.
        others.sort(key=lambda name: (abs(rates[name] - rates[expert]), name))
        controls.append(rng.choice(others[:NEAREST]))
    return controls


@dataclass(frozen=True)
class _Evaluator:
    """Scores a model with some of its experts scaled.

    measures: `choice` and `test` → what scores the model on that half of each task.
    prompts: whose answers are checked for repetition, on the choice half alone.
    """

    live: LoadedModel
    routers: Sequence[Router]
    grid: BetaGrid
    measures: Mapping[str, Sequence[Measure]]
    prompts: Sequence[tuple[int, ...]]
    max_new_tokens: int | None

    @classmethod
    def create(
        cls,
        live: LoadedModel,
        routers: Sequence[Router],
        grid: BetaGrid,
        prompts: Sequence[tuple[int, ...]],
        max_new_tokens: int | None,
    ) -> _Evaluator:
        measures = {
            name: on_tasks(grid.tasks, limit=grid.limit, batch_size=grid.batch_size, seed=grid.seed, part=part)
            for name, part in (("choice", CHOICE), ("test", TEST))
        }
        return cls(live, routers, grid, measures, list(prompts)[:REPETITION_PROMPTS], max_new_tokens)

    def evaluate(self, beta: float, experts: Sequence[Expert], part: str, control: int | None = None) -> PointRecord:
        """Return the scores on `part` of the tasks with `experts` × `beta`; `control` numbers a random set."""
        scaling = ExpertScaling(dict.fromkeys(experts, beta), self.grid.way, self.grid.phase)
        scores: list[Score] = []
        for measure in self.measures[part]:
            with scaled_routing(self.live, self.routers, scaling) as applied:
                scores += measure(self.live.loaded)
            # Phase `generated` may not have reached the task; its scores would be those of the unchanged model.
            applied.check(scores[-1].task)
        collapsed = None
        if control is None and part == "choice":
            with scaled_routing(self.live, self.routers, scaling):
                collapsed = self._collapse_rate()
        return PointRecord(
            beta=beta,
            experts=[str(expert) for expert in experts],
            control=control,
            part=part,
            scores=_first_metrics(scores),
            collapsed=collapsed,
        )

    def _collapse_rate(self) -> IntervalRecord | None:
        """Return the share of answers to `prompts` that end in a repetition; None without prompts."""
        if not self.prompts:
            return None
        wanted = DEFAULT_MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        texts = generate_texts(
            self.live.loaded,
            self.prompts,
            max_new_tokens=remaining_tokens(self.live.model, max(map(len, self.prompts)), wanted),
            batch_size=self.grid.batch_size,
            label="Looking for repetition",
        )
        tokenizer = self.live.tokenizer
        # The texts are tokenised again: generation returns them without the ids.
        rate = Rate.of([is_repetitive(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])
        return interval_record(rate, rate.n)


def _strength(beta: float) -> float:
    """Return how far β is from 1, where doubling and halving are equally far."""
    return abs(math.log2(beta)) if beta else math.inf


def _first_metrics(scores: Sequence[Score]) -> dict[str, IntervalRecord]:
    """Return task → its first metric. Raises SurgeryError if that is better when it is lower."""
    first: dict[str, IntervalRecord] = {}
    for score in scores:
        if score.task not in first:
            if score.higher_is_better is False:
                raise usage_error(
                    f"the first metric of {score.task}, {score.metric}, is better when it is lower",
                    where="--task",
                    hint="Take a task with an accuracy.",
                )
            first[score.task] = interval_record(score, score.n)
    return first


def _mean(scores: Mapping[str, IntervalRecord]) -> float:
    return math.fsum(row.value or 0.0 for row in scores.values()) / len(scores)


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise usage_error(f"got {text!r}, expected numbers such as 1,2,4,…,64", where="--sweep") from error
