"""Bring the models of a job to the layout of one of them, and tell what was done to their names."""

from __future__ import annotations

from collections.abc import Collection

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.layouts.layout_view import LayoutView, seen_as
from surgery.engine.preflight import Preflight


def see_as(
    preflight: Preflight, checkpoint: Checkpoint, reference: Checkpoint, *, absent: Collection[str] = ()
) -> LayoutView:
    """Return `checkpoint` in the layout of `reference`; the facts of `preflight` say what is seen under another name.

    Why parts could not be brought to that layout is shown beside the errors, where it leads to any.

    Args:
        absent: names of tensors that count as zeros and are not stored (of task vectors).
    """
    view = seen_as(checkpoint, reference, absent=absent)
    if view.description is not None:
        preflight.facts[f"names of {checkpoint.ref}"] = f"{view.description}, as in {reference.ref}"
    for problem in view.problems:
        preflight.errors.add_reason(problem)
    return view
