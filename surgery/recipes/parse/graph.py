"""Build the `Pipeline` of one recipe and what the command line sets: its steps with everything filled in, each after
those it needs.

The whole graph is checked before anything runs, steps that `when` leaves out included, and every fault is told at once:
`FILE:LINE: recipes.NAME.steps.STEP.with.KEY: got …, expected …; did you mean …?`
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import cast

from surgery.errors import SurgeryError
from surgery.io.yaml_models import dump_yaml
from surgery.io.yaml_nodes import YamlNode
from surgery.recipes.parse.arguments import ArgumentResolver
from surgery.recipes.parse.file import Reference, meaning, needs_of, read, text_at
from surgery.recipes.parse.scalars import describe
from surgery.recipes.parse.variables import StepInstance, StepTemplate, VariableScope, chosen_text, open_scope
from surgery.recipes.types import Command, CommandParameter, Given, Pipeline, Push, RecipeStep, StepOutput

_PUSH_FLAGS = ("private", "public", "pr")
_PUSH = {
    name: CommandParameter(name, "flag" if name in _PUSH_FLAGS else "text", required=name in ("from", "to"))
    for name in ("from", "to", *_PUSH_FLAGS, "revision", "message")
}


def build_pipeline(
    file: Path, name: str, *, commands: Mapping[str, Command], settings: Mapping[str, str] | None = None
) -> Pipeline:
    """Build the pipeline of the recipe `name` in `file`.

    Args:
        commands: what a step may run, by name: `vector apply`.
        settings: variable → text, as `--set` has them; a text is read as a value or list of YAML.

    Raises:
        SurgeryError: the file cannot be read, holds no such recipe, or anything in the recipe, or in how the file is
            built, is wrong; each fault has a line of its own.
    """
    source = read(file)
    recipe = source.recipe(name)
    scope = open_scope(recipe, source.errors, commands, settings or {})
    resolver = ArgumentResolver(scope)
    nodes = _nodes(scope, resolver)
    pushes = _pushes(scope, resolver)
    _refuse_cycles(scope, resolver.needed)
    resolver.check_tasks()
    scope.refuse_unused()
    source.errors.raise_if_any()
    return Pipeline(
        recipe=name,
        about=text_at(recipe, "about"),
        file=file,
        text=_text(name, recipe, scope),
        settings=dict(scope.variables),
        nodes=_ordered(nodes),
        needs=needs_of(recipe),
        pushes=pushes,
        chosen=tuple(_chosen(scope)),
    )


def _chosen(scope: VariableScope) -> Iterator[str]:
    """Yield the texts that the command line gave variables."""
    for name in scope.set_names:
        value = scope.variables.get(name)
        yield from (item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, str))


def _text(name: str, recipe: YamlNode, scope: VariableScope) -> str:
    alone = cast("dict[str, object]", recipe.plain)
    if scope.variables:
        alone = {**alone, "vars": {key: chosen_text(value) for key, value in scope.variables.items()}}
    return dump_yaml({"recipes": {name: alone}})


def _nodes(scope: VariableScope, resolver: ArgumentResolver) -> list[RecipeStep]:
    """Return the steps that `when` keeps, in the order of the file."""
    found = []
    for template in scope.templates.values():
        # Where there is no instance, what `with` says is still read, for its errors.
        for instance in template.instances or (StepInstance(template.name, {}, kept=False),):
            # Every instance is resolved, also those that do not run, so that their errors are found today.
            given = resolver.options(template, instance)
            if instance.kept and template.command:
                found.append(_node(template, template.command, instance, given))
    templates = scope.templates.values()
    if templates and not found and all(template.command and template.is_whole for template in templates):
        scope.errors.add(scope.recipe, "has nothing to do: `when` leaves out every step")
    return found


def _node(template: StepTemplate, command: Command, instance: StepInstance, given: Mapping[str, Given]) -> RecipeStep:
    items = [item for value in given.values() for item in (value if isinstance(value, tuple) else (value,))]
    return RecipeStep(
        name=instance.name,
        step=template.name,
        command=command,
        given=given,
        after=tuple(dict.fromkeys(item.step for item in items if isinstance(item, StepOutput))),
        line=template.node.line,
        memory=template.memory,
    )


def _refuse_cycles(scope: VariableScope, needed: Mapping[str, Sequence[str]]) -> None:
    """Add an error for each circle of steps that need each other."""
    position = {name: index for index, name in enumerate(scope.templates)}
    remaining = {name: list(needed.get(name, ())) for name in scope.templates}
    while cycle := _find_cycle(remaining):
        first = min(range(len(cycle)), key=lambda index: position[cycle[index]])
        around = [*cycle[first:], *cycle[:first], cycle[first]]
        scope.errors.add(scope.templates[cycle[first]].node, f"needs itself: {' needs '.join(around)}")
        # Without this circle, graphlib finds the next one.
        remaining = {
            name: [need for need in needs if need not in cycle]
            for name, needs in remaining.items()
            if name not in cycle
        }


def _find_cycle(needed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return steps of which each needs the next, and the last the first; nothing where there is no such circle."""
    try:
        TopologicalSorter(needed).prepare()
    except CycleError as error:
        found: list[str] = error.args[1][:0:-1]  # graphlib names what is needed first, and one step twice
        return found
    return []


def _ordered(nodes: Sequence[RecipeStep]) -> tuple[RecipeStep, ...]:
    """Return the nodes, which hold no cycle, each after those it needs, and otherwise in the order of the file."""
    position = {node.name: index for index, node in enumerate(nodes)}
    sorter = TopologicalSorter({node.name: node.after for node in nodes})
    sorter.prepare()
    ready: list[int] = []
    found = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, position[name])
        # One at a time, the first of the file: graphlib alone would return every ready node before any follower.
        node = nodes[heapq.heappop(ready)]
        found.append(node)
        sorter.done(node.name)
    return tuple(found)


def _pushes(scope: VariableScope, resolver: ArgumentResolver) -> tuple[Push, ...]:
    """Return what goes to the Hub: the entries whose `to` has a value."""
    recipe = scope.recipe.value
    node = recipe.get("push") if isinstance(recipe, dict) else None
    if node is None:
        return ()
    found: list[Push] = []
    for entry in node.value if isinstance(node.value, tuple) else (node,):
        push = _push(entry, scope, resolver) if isinstance(entry.value, dict) else None
        if push is None:
            continue
        if not push.pr and any((p.repo_id, p.revision, p.pr) == (push.repo_id, push.revision, False) for p in found):
            scope.errors.add(entry, f"goes to {push.repo_id} too, where it would take the place of the one before")
        found.append(push)
    return tuple(found)


def _push(entry: YamlNode, scope: VariableScope, resolver: ArgumentResolver) -> Push | None:
    written = cast("dict[str, YamlNode]", entry.value)
    known = len(scope.errors.found)
    # Without a value for `to` there is nothing to push, which is how recipes make a push optional.
    kept = _is_given(written.get("to"), scope)
    fields = {key: node for key, node in written.items() if key in _PUSH and (key != "to" or kept)}
    given = resolver.values(fields, _PUSH, StepInstance("", {}, kept))
    source = given.get("from")
    texts = {key: value for key, value in given.items() if isinstance(value, str) and key != "from"}
    for key, value in given.items():
        if key == "from" and not isinstance(value, StepOutput) and kept:
            scope.errors.add(written[key], f"got {describe(value)}, expected the output of a step: $STEP")
        if key != "from" and isinstance(value, StepOutput):
            scope.errors.add(written[key], f"got the folder of a step (${value.step}), expected text")
    if "to" not in texts:
        return None
    revision, pr = texts.get("revision"), given.get("pr") is True
    from surgery.publish.commit_plan import parse_destination

    try:
        parse_destination(texts["to"], revision, pr)
    except SurgeryError as error:
        scope.errors.add(written["to"], str(error))
    if not isinstance(source, StepOutput) or len(scope.errors.found) > known:
        return None
    private, public = given.get("private") is True, given.get("public") is True
    if private and public:
        scope.errors.add(entry, "is both private and public, expected one of them")
    return Push(
        source.step,
        texts["to"],
        source.inside,
        private,
        revision,
        pr,
        texts.get("message"),
        public=public,
        is_allowed=_is_named_by_command_line(written["to"], scope),
    )


def _is_named_by_command_line(to: YamlNode, scope: VariableScope) -> bool:
    """Return whether the whole of a push's `to` is a variable that the command line sets, and no step uses.

    Who sets the model to read, say, has not said that anything may be pushed there.
    """
    meant = meaning(to.value) if isinstance(to.value, str) else None
    if not isinstance(meant, Reference) or meant.inside or meant.name not in scope.set_names:
        return False
    steps = scope.recipe.value.get("steps") if isinstance(scope.recipe.value, dict) else None
    return steps is not None and not _mentions(steps, meant.name)


def _mentions(node: YamlNode, name: str) -> bool:
    """Return whether a text below `node` is a reference to `name`."""
    if isinstance(node.value, dict):
        return any(_mentions(child, name) for child in node.value.values())
    if isinstance(node.value, tuple):
        return any(_mentions(child, name) for child in node.value)
    try:
        meant = meaning(node.value) if isinstance(node.value, str) else None
    except ValueError:
        return False
    return isinstance(meant, Reference) and meant.name == name


def _is_given(to: YamlNode | None, scope: VariableScope) -> bool:
    """Return whether a push's `to` has a value. What is wrong there counts as one, so that it is reported."""
    if to is None or to.value is None:
        return False
    try:
        meant = meaning(to.value) if isinstance(to.value, str) else None
    except ValueError:
        return True
    if not isinstance(meant, Reference) or meant.name not in scope.variables:
        return True
    scope.used.add(meant.name)
    return scope.variables[meant.name] is not None
