"""Generate the JSON Schema of recipe files (draft 2020-12), by which editors complete and check them.

It comes from the models that files are read with and from the commands' own parameters. It knows no variables and no
steps, so that a reference is right anywhere; whether there is what it names, only `surgery run` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.recipes.parse.file import LONGEST_NAME, NAME, RecipeFile
from surgery.recipes.types import Command, CommandParameter

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NUMBER = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_SIZE = r"^[0-9]+\.?[0-9]* (kB|MB|GB|TB)$"
_Schema = dict[str, Any]


def json_schema(commands: Mapping[str, Command]) -> _Schema:
    """Return the schema of files whose steps run `commands`."""
    schema = RecipeFile.model_json_schema(by_alias=True)
    parts = schema["$defs"]
    names = {"pattern": f"^{NAME}$", "maxLength": LONGEST_NAME}
    step, recipe, push = parts["StepEntry"], parts["RecipeEntry"], parts["PushEntry"]
    step["properties"]["run"]["enum"] = sorted(commands)
    # Pydantic sees only the number that `2 GB` becomes.
    step["properties"]["memory"].pop("anyOf")
    step["properties"]["memory"] |= {"type": ["integer", "string"], "minimum": 1, "pattern": _SIZE}
    for key in ("matrix", "when"):
        step["properties"][key] |= {"additionalProperties": _reference("values"), "propertyNames": names}
    # One rule per command: the options that `with` may hold depend on `run`.
    step["allOf"] = [_rule(command) for _, command in sorted(commands.items())]
    recipe["properties"]["vars"] |= {"additionalProperties": _reference("values"), "propertyNames": names}
    recipe["properties"]["steps"] |= {"propertyNames": names, "minProperties": 1}
    entry = _reference("PushEntry")
    recipe["properties"]["push"] = {
        "description": recipe["properties"]["push"]["description"],
        "anyOf": [entry, {"type": "array", "items": entry}],
    }
    for key in ("private", "public", "pr"):
        push["properties"][key] |= {"anyOf": [{"type": "boolean"}, _reference("reference")]}
    for key in ("to", "revision", "message"):
        push["properties"][key] |= {"type": ["string", "null"] if key == "to" else "string"}
    push["properties"]["from"] |= _reference("reference")
    schema["properties"]["recipes"]["propertyNames"] = names
    parts["reference"] = {
        "type": "string",
        "pattern": rf"^\${NAME}(/.*)?$",
        "description": "A variable or the output of a step: $name or $name/inside/path.",
    }
    scalar = {"type": ["string", "number", "boolean", "null"]}
    parts["values"] = {"anyOf": [scalar, {"type": "array", "items": scalar}]}
    return {"$schema": DRAFT, **schema, "title": "Recipes of model surgery"}


def _rule(command: Command) -> _Schema:
    """Return what `with` of a step may hold if it runs `command`."""
    required = [name for name, parameter in command.parameters.items() if parameter.required]
    options: _Schema = {
        "description": command.help,
        "properties": {name: _option(parameter) for name, parameter in command.parameters.items()},
        "additionalProperties": False,
    }
    then: _Schema = {"properties": {"with": options}}
    if required:
        options["required"] = required
        then["required"] = ["with"]
    return {"if": {"properties": {"run": {"const": command.name}}, "required": ["run"]}, "then": then}


def _option(parameter: CommandParameter) -> _Schema:
    one = _kind(parameter)
    schema: _Schema = (
        {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}}]} if parameter.many else {"anyOf": one}
    )
    if parameter.help:
        schema["description"] = parameter.help
    if parameter.default is not None:
        schema["default"] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return schema


def _kind(parameter: CommandParameter) -> list[_Schema]:
    """Return schemas, one of which a value must fit."""
    reference = _reference("reference")
    if parameter.choices:
        return [{"enum": list(parameter.choices)}, reference]
    if parameter.kind == "flag":
        return [{"type": "boolean"}, reference]
    if parameter.kind in ("text", "path"):
        return [{"type": ["string", "number"]}]  # a reference is a text
    number: _Schema = {"type": "integer" if parameter.kind == "whole" else "number"}
    if parameter.least is not None:
        number["minimum"] = parameter.least
    if parameter.most is not None:
        number["maximum"] = parameter.most
    # YAML 1.1, which recipes are read as, takes 1e-3 for text.
    return [number, {"type": "string", "pattern": _NUMBER}, reference]


def _reference(name: str) -> _Schema:
    return {"$ref": f"#/$defs/{name}"}
