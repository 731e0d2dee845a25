"""Probe a mixture-of-experts model for its cognitive experts (arXiv 2505.14681), and write the findings.

Routing decisions are counted, experts are scored by nPMI at the markers of thinking, and, if asked, a grid of β is
tried with controls. Deviations from the paper:

- Experts need support, and are ranked by the smoothed score with intervals and a false-discovery rate; the published
  score is the field `npmi`, and its rank is reported beside ours.
- β is chosen on one half of a task's samples and tested on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from probes.data.preparation import GenerationOptions
from probes.data.probe_run import open_run
from probes.experts.analysis import ExpertSettings, analyse
from probes.experts.findings import ExpertFindings
from probes.experts.results import to_findings, write_run
from probes.experts.scoring import Support
from probes.experts.sweep import BetaGrid, check_tasks
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.models.choices import SpecialTokens


def probe_experts(
    model: str,
    data: str,
    tokens: Sequence[str],
    out: Path,
    *,
    transfer: str | None = None,
    asking: GenerationOptions = GenerationOptions(),
    support: Support = Support(),
    grid: BetaGrid | None = None,
    special_tokens: SpecialTokens = "text",
    limit: int | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    seed: int = 0,
    options: ExecutionOptions = ExecutionOptions(),
) -> ExpertFindings:
    """Find the experts of `model` that go with `tokens`, and write the findings to the folder `out`.

    Example:
        probe_experts("lab:moe", "lab:moe", ["<think>"], Path("RUN"))

    Args:
        data: texts to count on, see `probes.data.reader.read_data`; what they lack is generated.
        tokens: markers with signed weights, as `-0.5*Alternatively`; see `probes.model.routing.parse_marker`.
        transfer: a second data set, whose ranking is compared with the first.
        asking: how missing thinking and responses are generated.
        support: what an expert needs to be ranked.
        grid: β to try on tasks; None leaves that out.
        special_tokens: what special tokens in the data are, see `probes.data.reader.read_data`.
        limit: only the first examples of each data set.
        dtype: that the model computes in; auto is the one it is stored in.
        batch_tokens: tokens of a batch; None tries what fits.
        seed: of the bootstrap.

    Raises:
        SurgeryError: the model has no experts; a marker is not in its vocabulary, never occurs, is given twice, or none
            has a weight above 0; as `open_run`, `probes.data.preparation.prepare` and `sweep_beta`.
    """
    if not tokens:
        raise usage_error("no marker was given.", hint="Add --token '<think>' --token=-'</think>'.")
    if grid is not None:
        # Before anything is loaded: the sweep comes last, after everything else has been paid for.
        check_tasks(grid)
    settings = ExpertSettings(tuple(tokens), support, grid, limit, batch_tokens, seed, special_tokens)
    with open_run(
        model,
        data,
        out,
        transfer=transfer,
        generation=asking,
        special_tokens=special_tokens,
        limit=limit,
        dtype=dtype,
        options=options,
    ) as run:
        analysis = analyse(run, settings)
        findings = to_findings(analysis)
        run.write(lambda folder: write_run(folder, findings, analysis))
    return findings
