"""Probe a model for refusal: train probes, trace every token, measure cliffs, score heads, and write the findings.

After arXiv 2510.06036. Deviations, all to report what is in the data and not what the method put there:

- Features are standardised, and all four cells of topic and verdict are used and weighted alike (`cells="paper"` takes
  the paper's two).
- Metrics, traces and cliffs of an example come from the probe that was not fitted to its group.
- Heads are scored with the final norm folded in (`attribution="paper"` does without).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from probes.data.choices import AttributionForm
from probes.data.preparation import GenerationOptions, refusal_phrases
from probes.data.probe_run import open_run
from probes.refusal.analysis import RefusalSettings, analyse
from probes.refusal.findings import Findings
from probes.refusal.fitted_probes import ProbeTraining
from probes.refusal.results import to_findings, write_run
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.models.choices import SpecialTokens


def probe_refusal(
    model: str,
    data: str,
    out: Path,
    *,
    transfer: str | None = None,
    asking: GenerationOptions = GenerationOptions(),
    training: ProbeTraining = ProbeTraining(),
    attribution: AttributionForm = "exact",
    special_tokens: SpecialTokens = "text",
    limit: int | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    options: ExecutionOptions = ExecutionOptions(),
) -> Findings:
    """Probe `model` on `data` and write the findings to the folder `out`.

    Example:
        findings = probe_refusal("lab:cliff", "lab:cliff", Path("RUN"))

    Args:
        data: a file, a Hub data set, or lab:NAME; see `probes.data.reader.read_data`.
        transfer: a second data set that the probes are tested on.
        attribution: exact folds the norms in, so that all parts sum to the probe's logit; paper does not.
        special_tokens: what special tokens in the data are, see `probes.data.reader.read_data`.
        limit: only the first examples of each data set.
        dtype: that the model computes in; auto is the one it is stored in.
        batch_tokens: tokens of a batch; None tries what fits.

    Raises:
        SurgeryError: as `open_run`, `probes.data.preparation.prepare`, `train_probes`, `trace_residual_stream`.
    """
    if not 0 < training.strength < math.inf:
        raise usage_error(f"got {training.strength:g}, expected a positive number", where="--strength")
    if asking.phrases is not None:
        # The findings keep the phrases themselves: later verdicts must not depend on what has become of their file.
        asking = replace(asking, phrases=tuple(refusal_phrases(asking)))
    settings = RefusalSettings(training, attribution, limit, batch_tokens, special_tokens)
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
        analysis = analyse(run, run.prepare(), run.prepare_transfer(), settings)
        findings = to_findings(analysis)
        run.write(lambda folder: write_run(folder, findings, analysis))
    return findings
