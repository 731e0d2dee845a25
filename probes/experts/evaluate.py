"""Score models twice, as they are and with experts scaled while they run: `surgery eval --reinforce`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from probes.data.choices import Phase
from probes.data.records import check_model
from probes.experts.edit import ExpertSelection, select_experts
from probes.experts.findings import read_expert_findings
from probes.model.expert_scaling import ExpertScaling, scaled_routing
from probes.model.routers import find_routers
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.evaluation.scoring import Measure, Score
from surgery.models.loaded_model import attach_structure
from surgery.models.loading import ModelAndTokenizer


def add_scaled_models(
    opened: Mapping[str, Checkpoint],
    measures: Sequence[Measure],
    run: Path,
    *,
    top: int,
    scale: float,
    phase: Phase,
    options: ExecutionOptions = ExecutionOptions(),
) -> tuple[dict[str, Checkpoint], list[Measure]]:
    """Return the models and measures by which `score_models` scores every model also with experts of `run` × `scale`.

    Raises:
        SurgeryError: `run` has findings of another model, or ranks fewer than `top` experts; β or phase is wrong.
    """
    findings = read_expert_findings(run)
    for checkpoint in opened.values():
        check_model(findings, checkpoint, run, options=options)
    scales = select_experts(ExpertSelection(run=run, top=top, scale=scale), findings)
    scaling = ExpertScaling(scales, phase=phase)
    suffix = f" + {', '.join(map(str, scales))} × {scale:g}"
    # Both entries load the same model: which of them is scaled is known by its name alone.
    models: dict[str, Checkpoint] = {}
    for name, checkpoint in opened.items():
        models |= {name: checkpoint, name + suffix: checkpoint}
    scaled = {name + suffix: checkpoint for name, checkpoint in opened.items()}
    return models, [partial(_score, measure=measure, scaled=scaled, scaling=scaling) for measure in measures]


def _score(
    loaded: ModelAndTokenizer, *, measure: Measure, scaled: Mapping[str, Checkpoint], scaling: ExpertScaling
) -> Sequence[Score]:
    checkpoint = scaled.get(loaded.name)
    if checkpoint is None:
        return measure(loaded)
    # The harness has loaded the weights already; only the names of their parts are missing.
    live = attach_structure(loaded, checkpoint)
    with scaled_routing(live, find_routers(live), scaling) as applied:
        scores = measure(loaded)
    # With phase `generated`, tasks scored in one pass would report the unchanged model as the scaled one.
    applied.check(", ".join(dict.fromkeys(score.task for score in scores)))
    return scores
