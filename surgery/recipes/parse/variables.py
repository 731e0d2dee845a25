"""Resolve the names of one recipe: its variables with the values of this run, and its steps, one for each combination
of a matrix, including those that `when` leaves out.

Every error in the recipe's tree, and in what the command line sets, is collected where it stands.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.errors import SurgeryError, listing
from surgery.io.yaml_models import n_bytes
from surgery.io.yaml_nodes import YamlErrors, YamlNode, read_documents, to_node
from surgery.recipes.parse.file import (
    Reference,
    check_names,
    children,
    escaped,
    meaning,
    misread,
    nearest,
    text_at,
)
from surgery.recipes.parse.scalars import comparison_key, describe, scalar_error, to_text
from surgery.recipes.types import Command, Scalar, Value

# Of one recipe, all matrices expanded. More is a slip, or a file that means harm.
MAX_STEPS = 1000
LONGEST_FOLDER = 200  # characters of a node's name; file systems allow 255 bytes


@dataclass(frozen=True)
class StepInstance:
    """One run of a step: `values` of its matrix, and whether `when` keeps it."""

    name: str
    values: Mapping[str, Scalar]
    kept: bool


@dataclass(frozen=True)
class StepTemplate:
    """A step of the recipe. command: None where none has its name. is_whole: False where its matrix has errors, so that
    its instances are not all known."""

    name: str
    node: YamlNode
    command: Command | None
    memory: int | None
    axes: frozenset[str]
    instances: tuple[StepInstance, ...]
    is_whole: bool = True


@dataclass
class VariableScope:
    """The names of a recipe. used: the variables that it names somewhere. faulty: those whose value has errors; what
    depends on them is not known (`n_unclear` counts it), and has no errors of its own. set_names: the variables that
    the command line sets."""

    recipe: YamlNode
    errors: YamlErrors
    variables: Mapping[str, Value] = field(default_factory=dict)
    templates: Mapping[str, StepTemplate] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    faulty: set[str] = field(default_factory=set)
    n_unclear: int = 0
    set_names: frozenset[str] = frozenset()

    @property
    def n_problems(self) -> int:
        """A count that rises with every error, and with every value that is not known because of one."""
        return len(self.errors.found) + self.n_unclear

    def refuse_unused(self) -> None:
        """Add an error for variables that nothing names: setting one would change nothing, in silence."""
        for name, node in children(self.recipe, "vars").items():
            if name not in self.used:
                self.errors.add(node, "is used nowhere in this recipe")

    def unknown(self, name: str, axes: frozenset[str] = frozenset()) -> str:
        """Return the error for a reference to a name that does not exist."""
        known = [*axes, *self.variables, *self.templates]
        near = nearest(name, known, "$")
        return f"got ${name}, which is neither a variable nor a step; " + (near or f"there are {listing(known)}")


def open_scope(
    recipe: YamlNode, errors: YamlErrors, commands: Mapping[str, Command], settings: Mapping[str, str]
) -> VariableScope:
    """Return the names of `recipe`, with the variables as `settings` (variable → text as typed) sets them."""
    scope = VariableScope(recipe, errors, set_names=frozenset(settings))
    scope.variables, scope.faulty = _variables(recipe, errors, settings)
    steps = children(recipe, "steps")
    check_names(steps, errors, "a step")
    for name in scope.variables.keys() & steps.keys():
        errors.add(steps[name], f"is the name of a variable too, so that ${name} could be either")
    templates: dict[str, StepTemplate] = {}
    room = MAX_STEPS
    for name, node in steps.items():
        templates[name] = _template(name, node, scope, commands, room=room)
        room -= len(templates[name].instances)
    scope.templates = templates
    _refuse_duplicates(scope)
    return scope


def chosen_text(value: Value) -> object:
    """Return a variable's value as a recipe writes it."""
    if isinstance(value, tuple):
        return [chosen_text(item) for item in value]
    return escaped(value) if isinstance(value, str) else value


def _variables(recipe: YamlNode, errors: YamlErrors, settings: Mapping[str, str]) -> tuple[dict[str, Value], set[str]]:
    """Return variables with their values, and the names of those whose value has errors."""
    written = children(recipe, "vars")
    check_names(written, errors, "a variable")
    found: dict[str, Value] = {}
    faulty = set()
    for name, node in written.items():
        known = len(errors.found)
        found[name] = _literal(node, node, errors)
        if name in settings:
            place = YamlNode(f"--set {name}", None, None)
            # A setting has no line in the file: its errors stand at `--set NAME`.
            found[name] = _literal(_typed(settings[name], place, errors), place, errors)
        if len(errors.found) > known:
            faulty.add(name)
    for name in settings:
        if name not in written:
            near = nearest(name, written) or (f"there are {listing(written)}" if written else "there are none")
            errors.add(YamlNode(f"--set {name}", None, None), f"is no variable of this recipe; {near}")
    return found, faulty


def _typed(text: str, node: YamlNode, errors: YamlErrors) -> YamlNode:
    """Return what the command line gives a variable, read as YAML."""
    if what := misread(text.strip()):
        errors.add(node, what)
    try:
        documents, inner = read_documents(text, node.path)
    except SurgeryError as error:
        errors.add(node, error.what)
        return node
    for fault in inner.found:
        errors.add(node, fault.what)
    if len(documents) > 1:
        errors.add(node, f"got {len(documents)} documents, expected one value")
    return to_node(documents[0].plain if documents else None, node.path)


def _literal(node: YamlNode, at: YamlNode, errors: YamlErrors) -> Value:
    """Return a value or list of values without references. Errors without a line of their own stand at `at`."""
    if node.value is None:
        return None
    items = node.value if isinstance(node.value, tuple) else (node,)
    values: list[Scalar] = []
    for item in items:
        where = item if item.line is not None else at
        what = scalar_error(item.plain)
        value = item.value
        if not what and isinstance(value, str):
            try:
                meant = meaning(value)
                if isinstance(meant, Reference):
                    what = f"got {value!r}, expected a value: variables name nothing else; $$ begins a text with one $"
                else:
                    value = meant
            except ValueError as error:
                what = str(error)
        if what:
            errors.add(where, what)
        elif isinstance(value, str | int | float):
            values.append(value)
    if isinstance(node.value, tuple):
        return tuple(values)
    return values[0] if values else None


def _template(
    name: str, node: YamlNode, scope: VariableScope, commands: Mapping[str, Command], *, room: int
) -> StepTemplate:
    errors = scope.errors
    run = text_at(node, "run")
    command = commands.get(run)
    at = node.value.get("run") if isinstance(node.value, dict) else None
    # An empty text is no command either; what is no text, or not there at all, is told by the file's reader.
    if command is None and at is not None and isinstance(at.value, str):
        near = nearest(run, commands) or f"there are {listing(sorted(commands))}"
        errors.add(at, f"got {run!r}, expected a command; {near}")
    known = scope.n_problems
    axes = children(node, "matrix")
    check_names(axes, errors, "a variable")
    for axis in axes.keys() & children(scope.recipe, "steps").keys():
        errors.add(axes[axis], f"is the name of a step too, so that ${axis} could be either")
    conditions = children(node, "when")
    outer = {key: wanted for key, wanted in conditions.items() if key not in axes}
    holds = [_condition_holds(key, wanted, scope, axes) for key, wanted in outer.items()]  # every one, for its errors
    may_run = all(holds)
    values = {axis: _axis(given, scope, may_run) for axis, given in axes.items()}
    n_instances = math.prod(map(len, values.values()))
    if n_instances > room:
        errors.add(node, f"stands for {n_instances:,} steps, expected at most {MAX_STEPS:,} in a recipe")
    is_whole = scope.n_problems == known
    # Conditions on the matrix's own variables leave out single instances, the others the whole step.
    inner = {key: wanted for key, wanted in conditions.items() if key in axes}
    instances = []
    # With values missing because of an error, references to the step would get errors that only follow from it.
    for combination in itertools.product(*values.values()) if is_whole else ():
        own = dict(zip(values, combination, strict=True))
        matched = [_matches(own[key], wanted, errors) for key, wanted in inner.items()]
        instances.append(StepInstance(_node_name(name, own), own, may_run and all(matched)))
    for instance in instances:
        if len(instance.name) > LONGEST_FOLDER:
            errors.add(node, f"makes a name of {len(instance.name)} characters, expected at most {LONGEST_FOLDER}")
    return StepTemplate(name, node, command, _memory(node), frozenset(axes), tuple(instances), is_whole)


def _memory(node: YamlNode) -> int | None:
    given = node.value.get("memory") if isinstance(node.value, dict) else None
    if given is None or isinstance(given.value, bool):
        return None
    if isinstance(given.value, str):
        try:
            return n_bytes(given.value)
        except ValueError:  # noted when the file was read
            return None
    return given.value if isinstance(given.value, int) else None


def _axis(node: YamlNode, scope: VariableScope, may_run: bool) -> tuple[Scalar, ...]:
    """Return the values of one variable of a matrix: a list, or variables that hold values or lists."""
    items = node.value if isinstance(node.value, tuple) else (node,)
    found: list[Scalar] = []
    known = scope.n_problems
    for item in items:
        try:
            meant = meaning(item.value) if isinstance(item.value, str) else None
        except ValueError as error:
            scope.errors.add(item, str(error))
            continue
        if not isinstance(meant, Reference):
            value = _literal(item, item, scope.errors)
            if value is None or isinstance(value, tuple):
                if item.value is None:
                    scope.errors.add(item, "got nothing, expected a value")
            else:
                found.append(value)
            continue
        if meant.name in scope.variables and not meant.inside:
            scope.used.add(meant.name)
            scope.n_unclear += meant.name in scope.faulty
            value = scope.variables[meant.name]
            found += value if isinstance(value, tuple) else () if value is None else (value,)
        elif meant.name in children(scope.recipe, "steps"):
            scope.errors.add(item, f"got the output of the step {meant.name}, expected values; list outputs in `with`")
        elif meant.inside:
            scope.errors.add(item, f"got {item.value!r}, expected a value or a variable")
        else:
            scope.errors.add(item, scope.unknown(meant.name))
    # A step that does not run may have an empty variable; an empty list in the file is a slip in any case.
    if not found and (may_run or node.value == ()) and scope.n_problems == known:
        scope.errors.add(node, "is empty, expected a value at least")
    seen: set[tuple[str, object]] = set()
    for value in found:
        # 0.5 and 5e-1 would make two steps of one meaning, and one folder.
        if comparison_key(value) in seen:
            scope.errors.add(node, f"holds {to_text(value)} twice")
        seen.add(comparison_key(value))
    return tuple(found)


def _condition_holds(name: str, wanted: YamlNode, scope: VariableScope, axes: Mapping[str, YamlNode]) -> bool:
    """Return whether a variable of the recipe has a value that `when` names."""
    if name not in scope.variables:
        known = [*axes, *scope.variables]
        near = nearest(name, known) or (f"there are {listing(known)}" if known else "there are none")
        scope.errors.add(wanted, f"is no variable; {near}")
        return False
    scope.used.add(name)
    value = scope.variables[name]
    if name in scope.faulty:
        scope.n_unclear += 1
        return False
    if isinstance(value, tuple):
        scope.errors.add(wanted, f"got a list as the value of {name}, expected a single one: `when` compares those")
        return False
    return _matches(value, wanted, scope.errors)


def _matches(value: Scalar | None, wanted: YamlNode, errors: YamlErrors) -> bool:
    allowed = []
    for item in wanted.value if isinstance(wanted.value, tuple) else (wanted,):
        one = _literal(item, item, errors) if not isinstance(item.value, tuple) else ()
        if isinstance(one, tuple):
            errors.add(item, f"got {describe(item.value)}, expected a value")
        else:
            allowed.append(comparison_key(one))
    return comparison_key(value) in allowed


def _node_name(step: str, values: Mapping[str, Scalar]) -> str:
    return step + "".join(f".{key}={re.sub('[^A-Za-z0-9._+-]+', '-', to_text(v))}" for key, v in values.items())


def _refuse_duplicates(scope: VariableScope) -> None:
    """Add an error for steps of matrices whose folders would be one; no other step has a `=` in its name."""
    seen: dict[str, str] = {}
    for template in scope.templates.values():
        for instance in template.instances if template.axes else ():
            other = seen.setdefault(instance.name.casefold(), instance.name)
            # File systems that ignore case would put both into one folder.
            if seen[instance.name.casefold()] is not instance.name:
                same = "of the same name" if other == instance.name else f"that differs from {other} in case alone"
                scope.errors.add(template.node, f"makes a second node {instance.name}, {same}")
