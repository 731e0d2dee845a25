"""Resolve what the steps of a recipe are given: each option's text to a value, or to the outputs of other steps.

An `ArgumentResolver` takes a `VariableScope`, in which all names are known, and returns the parameters of each instance
of a step, checked against the command's own. Every fault is noted where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from surgery.errors import listing, usage_error
from surgery.io.yaml_nodes import YamlNode
from surgery.recipes.parse.file import Reference, children, meaning, nearest
from surgery.recipes.parse.inputs import input_error, task_errors
from surgery.recipes.parse.scalars import comparison_key, convert, describe, expected, scalar_error, to_text
from surgery.recipes.parse.variables import StepInstance, StepTemplate, VariableScope
from surgery.recipes.types import Command, CommandParameter, Given, Scalar, StepOutput

# Options that some commands have, but no step may give.
ENGINES: Mapping[str, str] = {
    "out": "the run says where a step writes: steps/STEP/out in its folder",
    "json": "the run keeps what a step prints",
    "overwrite": "the run makes again what is out of date, by itself",
    "dry-run": "give it to the run, which then shows the whole plan",
    "plot": "the run says where files are written",
    "cards-in": "a step changes model cards in the run's folder alone",
    "help": "it shows how a command is used",
    "debug": "give it to the run",
}
# Options of all nodes, lists counted item by item. Matrices reach any number with a few lines.
MAX_VALUES = 200_000
Items = tuple[Scalar | StepOutput, ...]


@dataclass
class ArgumentResolver:
    """Resolves options. needed: step → the steps that it names, whatever `when` says. n_values: resolved so far."""

    scope: VariableScope
    needed: dict[str, list[str]] = field(default_factory=dict)
    n_values: int = 0
    tasks: list[tuple[YamlNode, str, str]] = field(default_factory=list)

    def check_tasks(self) -> None:
        """Add an error for each value that should name a task of the evaluation harness, and does not."""
        errors = task_errors(task for _, task, _ in self.tasks) if self.tasks else {}
        for node, task, source in self.tasks:
            if task in errors:
                self.scope.errors.add(node, f"got {describe(task)}{source}: {errors[task]}")

    def count(self, n_values: int) -> None:
        """Count resolved values. Raises SurgeryError once there are too many."""
        self.n_values += n_values
        if self.n_values > MAX_VALUES:
            raise usage_error(
                f"stands for more than {MAX_VALUES:,} values, once matrices are expanded",
                where=f"{self.scope.errors.where}: {self.scope.recipe.path}",
            )

    def options(self, template: StepTemplate, instance: StepInstance) -> dict[str, Given]:
        """Return parameter → value, of one instance of a step."""
        written = children(template.node, "with")
        command = template.command
        if command is None:
            return self.values(written, {}, instance, template)
        for key, node in written.items():
            if key not in command.parameters:
                self.scope.errors.add(node, _unknown_option(key, command))
        for name, parameter in command.parameters.items():
            if parameter.required and name not in written:
                place = YamlNode(f"{template.node.path}.with.{name}", template.node.line, None)
                self.scope.errors.add(place, f"is missing, and `{command.name}` needs it: {expected(parameter)}")
        return self.values(written, command.parameters, instance, template)

    def values(
        self,
        written: Mapping[str, YamlNode],
        parameters: Mapping[str, CommandParameter],
        instance: StepInstance,
        template: StepTemplate | None = None,
    ) -> dict[str, Given]:
        """Return parameter → value of what is written. What has no parameter is only read for its errors."""
        found: dict[str, Given] = {}
        for key, node in written.items():
            parameter = parameters.get(key)
            known = self.scope.n_problems
            items = _Option(self, node, parameter, instance, template).items()
            # With an error in any item, a shorter list would be reported as empty as well.
            if parameter is None or self.scope.n_problems > known:
                continue
            if items:
                found[key] = items if parameter.many else items[0]
            elif parameter.required and instance.kept:
                self.scope.errors.add(node, "is an empty list, or `when` leaves out every step in it")
        return found


@dataclass(frozen=True)
class _Option:
    """One option of one instance of a step (of a push, where there is no template)."""

    resolver: ArgumentResolver
    node: YamlNode
    parameter: CommandParameter | None
    instance: StepInstance
    template: StepTemplate | None

    @property
    def scope(self) -> VariableScope:
        return self.resolver.scope

    @property
    def is_single(self) -> bool:
        return self.parameter is not None and not self.parameter.many

    def items(self) -> Items:
        """Return any number of items where the parameter takes a list, else one; none where there is an error."""
        if not isinstance(self.node.value, tuple):
            return self.item(self.node)
        if self.is_single:
            return self.wrong(self.node, "a list")
        return tuple(item for node in self.node.value for item in self.item(node))

    def item(self, node: YamlNode) -> Items:
        found = self.read(node)
        self.resolver.count(1 + len(found))
        return found

    def read(self, node: YamlNode) -> Items:
        value = node.value
        if value is None or isinstance(value, dict | tuple):
            return self.wrong(node, describe(value))
        if what := scalar_error(value):
            return self.error(node, what)
        if not isinstance(value, str):
            return self.converted(node, cast("Scalar", value))
        try:
            meant = meaning(value)
        except ValueError as error:
            return self.error(node, str(error))
        if isinstance(meant, str):
            return self.converted(node, meant)
        if meant.name in self.instance.values:
            return self.joined(node, (self.instance.values[meant.name],), meant)
        axes = self.template.axes if self.template else frozenset[str]()
        # The instance's values come first: a matrix variable hides one of the recipe.
        if meant.name in axes:  # of a matrix that has errors, or no values
            return self.unclear()
        if meant.name in self.scope.variables:
            return self.variable(node, meant)
        if meant.name in self.scope.templates:
            return self.outputs(node, meant, self.scope.templates[meant.name])
        return self.error(node, self.scope.unknown(meant.name, axes))

    def variable(self, node: YamlNode, meant: Reference) -> Items:
        self.scope.used.add(meant.name)
        value = self.scope.variables[meant.name]
        if meant.name in self.scope.faulty:
            return self.unclear()
        if value is None:
            missing = f"${meant.name} has no value; give it one: --set {meant.name}=…"
            return self.error(node, missing) if self.instance.kept else ()
        if not isinstance(value, tuple):
            return self.joined(node, (value,), meant)
        return self.wrong(node, f"a list (${meant.name})") if self.is_single else self.joined(node, value, meant)

    def joined(self, node: YamlNode, values: Sequence[Scalar], meant: Reference) -> Items:
        """Return the values of a variable, each with the path behind it."""
        found: list[Scalar | StepOutput] = []
        for value in values:
            if meant.inside and not isinstance(value, str):
                self.error(node, f"got {to_text(value)} (${meant.name}), expected a path before /{meant.inside}")
            else:
                whole = f"{value}/{meant.inside}" if meant.inside else value
                found += self.converted(node, whole, f" (${meant.name})")
        return tuple(found)

    def outputs(self, node: YamlNode, meant: Reference, target: StepTemplate) -> Items:
        """Return the outputs of a step: of its instances that run, and whose matrix has the values of ours."""
        # Noted even where `when` leaves the step out: other settings would run into the circle.
        if self.template:
            self.resolver.needed.setdefault(self.template.name, []).append(target.name)
        if target.command and not (target.command.writes or target.command.changes):
            return self.error(node, f"got ${meant.name}, but `{target.command.name}` only prints, and makes no folder")
        if target.command and target.command.suffix and (meant.inside or not self.template):
            return self.error(node, f"got ${meant.name}, but `{target.command.name}` makes a file, and no folder")
        if self.parameter and (self.parameter.kind not in ("text", "path") or self.parameter.choices):
            return self.wrong(node, f"the folder of a step (${meant.name})")
        # Outputs of steps that this run leaves out need not exist for a step that it leaves out too.
        if not self.instance.kept:
            return ()
        if not target.is_whole:
            return self.unclear()
        own = self.instance.values
        # Steps over the same variable are paired by its value, not combined with each other.
        shared = [axis for axis in own if axis in target.axes]
        agreeing = [
            other
            for other in target.instances
            if all(comparison_key(other.values[a]) == comparison_key(own[a]) for a in shared)
        ]
        kept = [other for other in agreeing if other.kept]
        if target.instances and not agreeing:
            here = ", ".join(f"{axis}={to_text(own[axis])}" for axis in shared)
            return self.error(node, f"got ${meant.name}, of which there is none for {here}")
        if self.is_single and not kept:
            return self.error(node, f"got ${meant.name}, which `when` leaves out; leave this out with it")
        if self.is_single and len(kept) > 1:
            names = listing((other.name for other in kept), 3)
            return self.error(
                node,
                f"got ${meant.name}, which is {len(kept)} folders ({names}), expected one; "
                "make that one by a step without a matrix, or give this step the same matrix",
            )
        return tuple(StepOutput(other.name, meant.inside) for other in kept)

    def converted(self, node: YamlNode, value: Scalar, of: str = "") -> Items:
        if self.parameter is None:
            return (value,)
        try:
            converted = convert(value, self.parameter)
        except ValueError as error:
            return self.error(node, f"got {describe(value)}{of}, {error}")
        kind = self.parameter.names
        # What a step that is left out names need not be there.
        if kind is not None and isinstance(converted, str) and self.instance.kept:
            if kind == "task":
                self.resolver.tasks.append((node, converted, of))
            elif what := input_error(converted, kind):
                return self.error(node, f"got {describe(converted)}{of}: {what}")
        return (converted,)

    def wrong(self, node: YamlNode, got: str) -> Items:
        return self.error(node, f"got {got}, expected {expected(self.parameter) if self.parameter else 'a value'}")

    def unclear(self) -> Items:
        """Return nothing for what is not known because of an error elsewhere."""
        self.scope.n_unclear += 1
        return ()

    def error(self, node: YamlNode, what: str) -> Items:
        self.scope.errors.add(node, what)
        return ()


def _unknown_option(key: str, command: Command) -> str:
    name = key.strip("-").replace("_", "-")
    if name in ENGINES and name not in command.parameters:
        return f"is not for a recipe to say: {ENGINES[name]}"
    positive = name.removeprefix("no-")
    if positive != name and positive in command.parameters:
        return f"is no option of `{command.name}`; write {positive}: false"
    known = command.parameters
    near = nearest(name, known) or (f"there are {listing(known, 40)}" if known else "it has none")
    return f"is no option of `{command.name}`; {near}"
