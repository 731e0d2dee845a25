"""What a recipe pushes, once all of its steps are done: each by `surgery.push`, with the recipe in its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from surgery.jsonable import jsonable
from surgery.push import push
from surgery.recipes.parts import Made, Program
from surgery.recipes.places import Places


def push_all(
    program: Program, places: Places, *, notify: Callable[[str], None], bars: bool
) -> Iterator[Mapping[str, Any]]:
    """Pushes one after the other, and yields what run.json says of each. Raises SurgeryError as `push`."""
    for wanted in program.pushes:
        notify(f"pushing {wanted.node} to {wanted.repo_id}")
        pushed = push(
            places.made(Made(wanted.node, wanted.inside)),
            wanted.repo_id,
            private=wanted.private,
            revision=wanted.revision,
            pr=wanted.pr,
            message=wanted.message or f"Push {wanted.node} of the recipe {program.recipe}",
            recipe=(program.recipe, program.text),
            notify=notify,
            bars=bars,
        )
        notify(pushed.url if pushed.changed else f"{wanted.repo_id} has all of it already: nothing was committed.")
        yield {"step": wanted.node, "inside": wanted.inside, **jsonable(pushed)}
