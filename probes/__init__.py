"""Probe models: refusal cliffs and the heads behind them, and the cognitive experts of mixtures.

from probes import probe_refusal, prove_heads, edit_heads
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from probes.experts.edit import edit_experts
    from probes.experts.findings import read_expert_findings
    from probes.experts.run import probe_experts
    from probes.refusal.cliff_judge import judge
    from probes.refusal.edit import edit_heads
    from probes.refusal.findings import read_findings
    from probes.refusal.heads.causal_proof import prove_heads
    from probes.refusal.run import probe_refusal

__all__ = [
    "edit_experts",
    "edit_heads",
    "judge",
    "probe_experts",
    "probe_refusal",
    "prove_heads",
    "read_expert_findings",
    "read_findings",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "probes.experts.edit": ["edit_experts"],
        "probes.experts.findings": ["read_expert_findings"],
        "probes.experts.run": ["probe_experts"],
        "probes.refusal.cliff_judge": ["judge"],
        "probes.refusal.edit": ["edit_heads"],
        "probes.refusal.findings": ["read_findings"],
        "probes.refusal.heads.causal_proof": ["prove_heads"],
        "probes.refusal.run": ["probe_refusal"],
    },
)
