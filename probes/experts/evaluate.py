"""Models scored with experts reinforced while they run, beside themselves as they are: `surgery eval --reinforce`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from probes.data.records import check_model
from probes.experts.edit import ExpertSelection, select_experts
from probes.experts.findings import read_expert_findings
from probes.model.expert_scaling import ExpertScaling, Phase, scaled_routing
from probes.model.routers import find_routers
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.evaluation.scoring import Measure, Score
from surgery.models.loaded_model import attach_structure
from surgery.models.loading import ModelAndTokenizer


def add_scaled_models(
    opened: Mapping[str, Checkpoint],
    folders: Mapping[str, Path],
    measures: Sequence[Measure],
    run: Path,
    *,
    top: int,
    scale: float,
    phase: str,
    options: ExecutionOptions = ExecutionOptions(),
) -> tuple[dict[str, Path], list[Measure]]:
    """What `scoring.score_models` takes to score every model twice: as it is, and with experts of `run` × `scale`.

    Raises:
        SurgeryError: `run` holds findings of another model, or ranks fewer than `top` experts; β or phase are wrong.
    """
    findings = read_expert_findings(run)
    for checkpoint in opened.values():
        check_model(findings, checkpoint, run, options=options)
    scales = select_experts(ExpertSelection(run=run, top=top, scale=scale), findings)
    how = ExpertScaling(scales, phase=cast("Phase", phase))
    suffix = f" + {', '.join(map(str, scales))} × {scale:g}"
    twice: dict[str, Path] = {}
    originals: dict[str, Checkpoint] = {}
    for name, folder in folders.items():
        twice |= {name: folder, name + suffix: folder}
        originals[name + suffix] = opened[name]
    return twice, [partial(_measured, measure=measure, originals=originals, how=how) for measure in measures]


def _measured(
    loaded: ModelAndTokenizer, *, measure: Measure, originals: Mapping[str, Checkpoint], how: ExpertScaling
) -> Sequence[Score]:
    checkpoint = originals.get(loaded.name)
    if checkpoint is None:
        return measure(loaded)
    live = attach_structure(loaded, checkpoint)
    with scaled_routing(live, find_routers(live), how) as applied:
        scores = measure(loaded)
    applied.check(", ".join(dict.fromkeys(score.task for score in scores)))
    return scores
