"""Report an edit of a model's weights in numbers: norms, and how many updates changed the stored value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import TORCH_NAMES
from surgery.checkpoint.structure import model_structure
from surgery.engine.result import ExecutionResult
from surgery.io.escaping import json_text
from surgery.io.json_io import read_json
from surgery.io.output_files import write_output
from surgery.reporting.report import Column, Table


@dataclass(frozen=True)
class EditedGroup:
    """One layer, or another part of the model, after an edit.

    updates: the number of non-zero updates.
    delivered: how many of them changed the stored value.
    update_norm: ‖α·v‖.
    relative: ‖α·v‖/‖θ_target‖.
    nonfinite: NaN and infinite values that were written.
    """

    name: str
    updates: int
    delivered: int
    update_norm: float
    relative: float
    nonfinite: int

    @property
    def delivered_fraction(self) -> float:
        """Share of the non-zero updates that change the stored value; 1 where there was none to deliver."""
        return self.delivered / self.updates if self.updates else 1.0


@dataclass(frozen=True)
class EditReport:
    """The report of an edit: `edited` of `tensors` tensors went through a kernel, the rest keep the target's bytes."""

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    edited: int
    tensors: int
    groups: Sequence[EditedGroup] = ()
    whole: EditedGroup | None = None
    resumed_bytes: int = 0
    dry_run: bool = False

    @property
    def delivered_fraction(self) -> float:
        """`EditedGroup.delivered_fraction` of the whole model."""
        return self.whole.delivered_fraction if self.whole else 1.0

    def summary(self) -> dict[str, Any]:
        """Return what the manifest records, which does not depend on where and in how many runs the job ran."""
        assert self.whole is not None
        return {
            "tensors": self.tensors,
            "edited_tensors": self.edited,
            "updates": self.whole.updates,
            "delivered": self.whole.delivered,
            "delivered_fraction": self.delivered_fraction,
            "update_norm": self.whole.update_norm,
            "relative_norm": self.whole.relative,
            "nonfinite": self.whole.nonfinite,
            "groups": [
                {
                    "name": group.name,
                    "update_norm": group.update_norm,
                    "relative_norm": group.relative,
                    "delivered_fraction": group.delivered_fraction,
                }
                for group in self.groups
            ],
        }


def build_edit_report(
    report: EditReport, model: Checkpoint, edited: Sequence[str], result: ExecutionResult
) -> EditReport:
    """Return `report` with the numbers of `result`, per group of `model` and as a whole."""
    return replace(
        report,
        groups=[
            _group(group, [result.sums[name] for name in names])
            for group, names in model_structure(model).grouped(edited).items()
        ],
        whole=_group("whole", [result.sums[name] for name in edited]),
        resumed_bytes=result.resumed_bytes,
    )


def edit_table(report: EditReport) -> Table:
    """Return the numbers per part of the model and as a whole."""
    rows = [*report.groups, *([report.whole] if report.whole else [])]
    return Table(
        "What the edit did",
        [
            Column("part"),
            Column("‖αv‖", "number"),
            Column("‖αv‖/‖θ‖", "percent"),
            Column("updates", "count"),
            Column("delivered", "percent"),
            Column("NaN/Inf", "count"),
        ],
        [(g.name, g.update_norm, g.relative, g.updates, g.delivered_fraction, g.nonfinite) for g in rows],
        note="delivered: share of the non-zero updates that change the stored value; rounding loses the rest.",
    )


def write_config_dtype(folder: Path, dtype: str) -> None:
    """Set the dtype in `folder`'s config.json to that of the weights, or loaders would cast them back."""
    path = folder / "config.json"
    spelled = next(name for name, stored in TORCH_NAMES.items() if stored == dtype)
    config = read_json(path, missing={})
    if not config:
        return
    # Older versions of transformers read "torch_dtype": whichever key is there must agree with the weights.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = spelled
    write_output(folder, path.name, json_text(json.dumps(config, indent=2, ensure_ascii=False)) + "\n")


def _group(name: str, rows: Sequence[Mapping[str, float]]) -> EditedGroup:
    def total(measure: str) -> float:
        return math.fsum(row[measure] for row in rows)

    # Squares are added up over tensors, not norms: ‖(a, b)‖² = ‖a‖² + ‖b‖².
    update, target = math.sqrt(total("update_squares")), math.sqrt(total("target_squares"))
    return EditedGroup(
        name,
        int(total("updates")),
        int(total("delivered")),
        update,
        # A part that was all zeros has no norm to relate an update to.
        update / target if target else (math.inf if update else 0.0),
        int(total("nonfinite")),
    )


# What every kernel of an edit measures, in this order; `_group` reads them by name.
MEASURES = ("updates", "delivered", "update_squares", "target_squares")
