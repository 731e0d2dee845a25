"""The schema for editors: it takes the recipes that `surgery run` takes, and finds the faults an editor can find."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from support.recipe_texts import COMMANDS

from surgery.recipes.parse.schema import json_schema

SCHEMA = json_schema(COMMANDS)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def fits(value: Any, schema: Any) -> bool:
    """What the specification says of the words that our schemas use; an unknown one fails the test."""
    if isinstance(schema, bool):
        return schema
    return all(_word_fits(word, said, value, schema) for word, said in schema.items())


def _word_fits(word: str, said: Any, value: Any, schema: dict[str, Any]) -> bool:
    is_object, is_number = isinstance(value, dict), isinstance(value, int | float) and not isinstance(value, bool)
    match word:
        case "$ref":
            return fits(value, SCHEMA["$defs"][said.removeprefix("#/$defs/")])
        case "type":
            names = [said] if isinstance(said, str) else said
            return any(isinstance(value, _TYPES[n]) and (n == "boolean" or not isinstance(value, bool)) for n in names)
        case "enum":
            return value in said
        case "const":
            return bool(value == said)
        case "anyOf":
            return any(fits(value, one) for one in said)
        case "allOf":
            return all(fits(value, one) for one in said)
        case "if":
            return not fits(value, said) or fits(value, schema["then"])
        case "properties":
            return not is_object or all(fits(value[key], one) for key, one in said.items() if key in value)
        case "additionalProperties":
            return not is_object or all(fits(value[key], said) for key in value.keys() - schema.get("properties", {}))
        case "propertyNames":
            return not is_object or all(fits(key, said) for key in value)
        case "required":
            return not is_object or all(key in value for key in said)
        case "minProperties":
            return not is_object or len(value) >= said
        case "items":
            return not isinstance(value, list) or all(fits(item, said) for item in value)
        case "pattern":
            return not isinstance(value, str) or re.search(said, value) is not None
        case "maxLength":
            return not isinstance(value, str) or len(value) <= said
        case "minimum":
            return not is_number or value >= said
        case "maximum":
            return not is_number or value <= said
        case "then" | "title" | "description" | "default" | "$defs" | "$schema":
            return True
    raise AssertionError(f"the test does not know {word}")


GOOD = """
recipes:
  moved:
    about: One line.
    needs: {disk: 10 MB}
    vars: {tuned: lab:grpo, tasks: [a, b], repo: , measure: true}
    steps:
      vector: {run: vector extract, with: {tuned: $tuned, base: lab:sft, rank: 4, dtype: $kind}, memory: 2 GB}
      moved:
        run: vector apply
        with: {vector: $vector, target: x, scale: 1e-3, scale-for: [a=1, "b=2"], rescale: false}
        matrix: {scale: [0.5, $a]}
        when: {measure: true}
      scores: {run: eval, with: {models: $moved, task: [$tasks], limit: "200"}, memory: 5}
    push: [{from: $moved, to: $repo, private: true}, {from: $vector/x, to: org/name, pr: $pr}]
"""


def test_a_good_recipe_fits() -> None:
    assert fits(yaml.safe_load(GOOD), SCHEMA)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("about:", "abuot:"),
        ("run: eval", "run: evil"),
        ("base: lab:sft, ", ""),
        ("rank: 4", "rank: 0"),
        ("rank: 4", "rank: 1.5"),
        ("rank: 4", "rank: many"),
        ("rank: 4", "rang: 4"),
        ("dtype: $kind", "dtype: float64"),
        ("scale: 1e-3", "scale: [1]"),
        ("scale: 1e-3", "scale: 11"),
        ("rescale: false", "rescale: 1"),
        ("target: x", "target: true"),
        ('with: {models: $moved, task: [$tasks], limit: "200"}, ', ""),
        ("memory: 2 GB", "memory: 2 gigs"),
        ("memory: 5", "memory: 0"),
        ("from: $moved", "from: moved"),
        ("to: $repo, ", ""),
        ("private: true", "private: 3"),
        ("  moved:\n    about", "  .moved:\n    about"),
        ("      scores:", "      a/b:"),
        ("tuned: lab:grpo", "tuned: {a: 1}"),
    ],
)
def test_a_fault_does_not_fit(old: str, new: str) -> None:
    assert GOOD.count(old) >= 1
    assert not fits(yaml.safe_load(GOOD.replace(old, new, 1)), SCHEMA)


def test_editors_are_told_what_options_are_for() -> None:
    rules = {rule["if"]["properties"]["run"]["const"]: rule["then"] for rule in SCHEMA["$defs"]["StepEntry"]["allOf"]}
    assert list(rules) == sorted(COMMANDS)
    options = rules["vector extract"]["properties"]["with"]
    assert options["required"] == ["tuned", "base"]
    assert options["additionalProperties"] is False
    assert options["properties"]["rank"] == {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"},
            {"$ref": "#/$defs/reference"},
        ],
        "description": "Of the adapter.",
    }
    assert options["properties"]["dtype"]["default"] == "float32"
    assert SCHEMA["$defs"]["StepEntry"]["properties"]["matrix"]["description"].startswith("Variables of this step")
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "required" not in rules["note"]
