"""Load a model together with the probes that an earlier run fitted to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from probes.data.markers import Markers
from probes.data.preparation import open_model
from probes.data.records import check_model
from probes.refusal.findings import PROBES, Findings
from probes.refusal.linear.probes import Probes
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.models.loaded_model import LoadedModel


@dataclass(frozen=True, eq=False)
class ProbedModel:
    """A model in memory, the findings of a run on it, and that run's probes."""

    live: LoadedModel
    findings: Findings
    probes: Probes

    @property
    def weight(self) -> Tensor:
        """(D,) fp32: the probe's direction at the depth that findings report."""
        return self.probes.weights[self.findings.depth]

    @property
    def bias(self) -> float:
        """The probe's bias at that depth."""
        return float(self.probes.biases[self.findings.depth])

    @property
    def markers(self) -> Markers | None:
        """The markers of thinking that the run used; None where the model does not think."""
        return None if self.findings.markers is None else Markers(**self.findings.markers)


def open_probed_model(
    model: str, findings: Findings, run: Path, *, dtype: str, options: ExecutionOptions
) -> ProbedModel:
    """Load `model` and the probes in the folder `run`, which `findings` were read from.

    Raises:
        SurgeryError: the findings are of another model; the model or the probes cannot be loaded.
    """
    # Weights are compared before they are loaded: the wrong model may take minutes, and more memory than there is.
    check_model(findings, open_checkpoint(model), run, options=options)
    live = open_model(model, device=options.device, dtype=dtype)
    return ProbedModel(live, findings, Probes.load(run / PROBES))
