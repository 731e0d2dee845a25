"""Push what a recipe names to the Hub, once all of its steps are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from surgery.io.json_io import jsonable
from surgery.publish.upload import push
from surgery.recipes.run.consent import Consent
from surgery.recipes.run.paths import RunPaths
from surgery.recipes.types import Pipeline, StepOutput


def push_all(
    pipeline: Pipeline, paths: RunPaths, consent: Consent, *, notify: Callable[[str], None], bars: bool
) -> Iterator[Mapping[str, Any]]:
    """Push one output after the other, and yield the entry of run.json for each. Raises SurgeryError as `push`."""
    for request in pipeline.pushes:
        notify(f"pushing {request.node} to {request.repo_id}")
        result = push(
            paths.output_path(StepOutput(request.node, request.inside)),
            request.repo_id,
            private=request.private,
            public=request.public,
            # The file does not know whether everybody may have what comes from this machine.
            vouched=consent.public,
            revision=request.revision,
            pr=request.pr,
            message=request.message or f"Push {request.node} of the recipe {pipeline.recipe}",
            recipe=(pipeline.recipe, pipeline.text),
            notify=notify,
            bars=bars,
        )
        notify(result.url if result.changed else f"{request.repo_id} has all of it already: nothing was committed.")
        yield {"step": request.node, "inside": request.inside, **jsonable(result)}
