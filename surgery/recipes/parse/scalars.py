"""Convert scalars of recipes: to the values of parameters, to names, and to keys by which they are compared.

Numbers may be written as text, for YAML 1.1 reads `1e-3` as text; text may be written as a number. Nothing else is
taken for anything else: `yes` is true to YAML, and never a text.
"""

from __future__ import annotations

import math
import re

from surgery.errors import did_you_mean
from surgery.recipes.types import CommandParameter, Scalar

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_KINDS = {"text": "text", "path": "a path", "whole": "a whole number", "number": "a number", "flag": "true or false"}


def scalar_error(value: object) -> str:
    """Return why `value`, a leaf of a YAML file, is no scalar of a recipe; an empty text where it is one."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"got {describe(value)}, expected a finite number"
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            return f"got {value!r}, expected text without NUL and half characters"
        return ""
    if isinstance(value, bool | int | float):
        return ""
    return f"got {describe(value)}, expected text, a number, true or false"


def describe(value: object) -> str:
    """Return a value as messages show it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        return to_text(value)
    return repr(value) if isinstance(value, str) else f"{value} ({type(value).__name__}, without quotes)"


def to_text(value: Scalar) -> str:
    """Return a scalar as it is typed: `true`, `0.5`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def expected(parameter: CommandParameter) -> str:
    """Return what a parameter takes, in words: `a number from 0 to 1`."""
    if parameter.choices:
        *others, last = parameter.choices
        return f"{', '.join(others)} or {last}" if others else last
    words = _KINDS[parameter.kind]
    if parameter.least is not None and parameter.most is not None:
        return f"{words} from {parameter.least:g} to {parameter.most:g}"
    if parameter.least is not None:
        return f"{words} from {parameter.least:g} on"
    return words if parameter.most is None else f"{words} up to {parameter.most:g}"


def convert(value: Scalar, parameter: CommandParameter) -> Scalar:
    """Convert `value` to one of `parameter`'s. Raises ValueError that says what is expected."""
    converted = _converted(value, parameter)
    if converted is None:
        raise ValueError(f"expected {expected(parameter)}{_advice(value, parameter)}")
    return converted


def _converted(value: Scalar, parameter: CommandParameter) -> Scalar | None:
    # A bool is an int in Python: `limit: true` must not become 1.
    if parameter.kind == "flag" or isinstance(value, bool):
        return value if parameter.kind == "flag" and isinstance(value, bool) else None
    if parameter.kind in ("text", "path"):
        text = to_text(value)
        return text if not parameter.choices or text in parameter.choices else None
    number = number_of(value)
    if number is None or (parameter.kind == "whole" and number != int(number)):
        return None
    if parameter.least is not None and number < parameter.least:
        return None
    if parameter.most is not None and number > parameter.most:
        return None
    return int(number) if parameter.kind == "whole" else float(number)


def _advice(value: Scalar, parameter: CommandParameter) -> str:
    if isinstance(value, bool) and parameter.kind in ("text", "path"):
        return "; YAML takes on, yes and true for the same: put a text in quotes"
    hint = did_you_mean(to_text(value), parameter.choices)
    return "" if hint is None else f"; did you mean {hint.removeprefix('Did you mean ')}"


def number_of(value: Scalar) -> int | float | None:
    """Return the number that a scalar is or spells; None where it is none, or too large for a float."""
    if isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        return None
    # int() takes ever longer for longer texts, and no option takes such a number.
    number = int(value) if value.lstrip("+-").isdecimal() and len(value) < 20 else float(value)
    return number if math.isfinite(number) else None


def comparison_key(value: Scalar | None) -> tuple[str, object]:
    """Return a key that is equal for values that mean the same: 1e-3, 0.001 and "0.001" do; 1 and true do not."""
    if isinstance(value, bool):
        return "flag", value
    number = None if value is None else number_of(value)
    return ("number", number) if number is not None else ("text", value)
