"""The parameters of merge methods: how they are specified, and a setting's value for one tensor.

A config writes a setting as a scalar, a list (numbers: a gradient over the layers; other scalars: picked by position),
one `{filter, value}` or a list of them. All of these become one form: a tuple of `Rule`s, of which the first that
applies to a tensor's name counts. A scalar is a list of one.

A layer's position is a number t in [0, 1]: see `layer_position`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Scalar = bool | int | float | str
Kind = Literal["number", "integer", "boolean", "text"]
BaseModel = Literal["required", "optional", "none"]

EVERYTHING = "*"
# Characters of a wrong value in an error: with file, line and rule around it the message still fits two lines.
MAX_SHOWN = 60
_MAX_WRITTEN = 10 * MAX_SHOWN  # before line breaks and blanks in it are joined
# Embeddings, final norm and head are in no layer; mergekit gives them the start of every gradient.
EDGE_POSITION = 0.0

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True)
class Rule:
    """`values` for the tensors whose name contains `filter`; for all of them where it is None or `*`."""

    values: tuple[Scalar, ...]
    filter: str | None = None

    def applies(self, tensor_name: str) -> bool:
        """Return whether this rule is for the tensor."""
        return self.filter is None or self.filter == EVERYTHING or self.filter in tensor_name


Setting = tuple[Rule, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a merge method.

    Args:
        default: its value where a config sets none; None if every config must set one.
        per_model: whether each input has its own value, rather than the tensor one value.
        low, high: bounds of numbers and integers, inclusive unless `low_open` or `high_open`; None for no bound.
        summary: one line for people, without a full stop.
    """

    name: str
    kind: Kind
    default: Scalar | None = None
    per_model: bool = False
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    summary: str = ""

    @property
    def rule(self) -> str:
        """Describe the allowed values: `a number in (0, 1]`."""
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "text":
            return "text"
        noun = "a number" if self.kind == "number" else "a whole number"
        if self.low is not None and self.high is not None:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            return f"{noun} in {left}{self.low:g}, {self.high:g}{right}"
        if self.low is not None:
            return f"{noun} {'>' if self.low_open else '≥'} {self.low:g}"
        if self.high is not None:
            return f"{noun} {'<' if self.high_open else '≤'} {self.high:g}"
        return noun

    def read(self, value: object) -> Scalar:
        """Return `value` as this parameter's kind: a float, int, bool or str.

        Numbers may be written as text (YAML 1.1 reads `1e-5` as text), whole numbers as `10.0`, and truth as 0 or 1
        or one of the words that YAML knows, as mergekit takes them.

        Raises:
            ValueError: another kind, not finite, or out of bounds; the text names value and rule.
        """
        number: float | int | None
        if self.kind == "text":
            if isinstance(value, str):
                return value
        elif self.kind == "boolean":
            # 1.0 → 1, so that a float counts as the whole number that it is.
            word = f"{value:g}" if isinstance(value, float) else str(value).lower()
            if word in _TRUE or word in _FALSE:
                return word in _TRUE
        else:
            number = _number(value) if self.kind == "number" else _integer(value)
            # inf and nan are numbers for YAML; a bound would read as if another number were wanted.
            if number is None and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"got {value}, expected a finite number")
            if number is not None and self._is_inside(number):
                return number
        raise ValueError(f"got {as_written(value)}, expected {self.rule}")

    def _is_inside(self, number: float) -> bool:
        above = self.low is None or (number > self.low if self.low_open else number >= self.low)
        below = self.high is None or (number < self.high if self.high_open else number <= self.high)
        return above and below


@dataclass(frozen=True)
class MethodSpec:
    """What a config may set for one merge method.

    Args:
        base: "required" and "optional" methods set the base model apart from the models they merge, and give it no
            values of per-model parameters. To a method of "none" it is a model like any other.
        models: the least and the greatest number of models merged, not counting the base unless `base` is "none";
            None for no limit.
        summary: one line for people. paper: where the method comes from.
        joins_base: whether a method of "none" that is given `models:` and a base model beside them merges that one
            too under `compat: mergekit` (its karcher does).
    """

    name: str
    parameters: tuple[ParameterSpec, ...] = ()
    base: BaseModel = "none"
    models: tuple[int, int | None] = (1, None)
    summary: str = ""
    paper: str = ""
    joins_base: bool = False

    def parameter(self, name: str) -> ParameterSpec | None:
        """Return the parameter called `name`, or None."""
        return next((spec for spec in (*self.parameters, INT8_MASK) if spec.name == name), None)


# Accepted in every config, without effect: masks are computed piece by piece here, so there is no memory to save.
INT8_MASK = ParameterSpec("int8_mask", "boolean", False, summary="Without effect: masks are never kept")


def layer_position(index: int, n_layers: int) -> float:
    """Return t of layer `index` of the `n_layers` of one section: from 0 at its first layer to 1 at its last.

    The only layer of a section has t = 1, as in mergekit 0.1.5 (checked by running it).
    """
    return index / (n_layers - 1) if n_layers > 1 else 1.0


def resolve(setting: Setting, tensor_name: str, t: float) -> Scalar | None:
    """Return the value that `setting` gives the tensor at position t in [0, 1]; None where no rule applies to it.

    The n values of a rule are spread evenly over [0, 1]. Numbers are interpolated linearly, whole ones then rounded;
    of booleans and texts the value at int(t·(n−1)) counts.
    """
    for rule in setting:
        if rule.applies(tensor_name):
            return _at(rule.values, t)
    return None


def as_written(value: object) -> str:
    """Return `value` as a config writes it, on one line, cut at `MAX_SHOWN` characters."""
    # Only as much of it as is shown: a value may be a whole file.
    beginning = ""
    for piece in _written(value):
        beginning += piece
        if len(beginning) > _MAX_WRITTEN:
            break
    text = " ".join(beginning.split())
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def _written(value: object) -> Iterator[str]:
    """Yield the pieces of `value` as a config writes it, on any number of lines."""
    if value is None:
        yield "nothing"
    elif isinstance(value, bool):
        yield str(value).lower()
    elif isinstance(value, str):
        yield f'"{value}"'
    elif isinstance(value, Mapping):
        for i, (key, inner) in enumerate(value.items()):
            yield f"{', ' if i else '{'}{key}: "
            yield from _written(inner)
        yield "}" if value else "{}"
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield ", " if i else "["
            yield from _written(inner)
        yield "]" if value else "[]"
    else:
        yield str(value)


def _at(values: Sequence[Scalar], t: float) -> Scalar:
    place = t * (len(values) - 1)
    below = int(place)
    low, high = values[below], values[min(below + 1, len(values) - 1)]
    # A switch or a word has no value in between: the nearer to the start counts.
    if isinstance(low, (bool, str)) or isinstance(high, (bool, str)):
        return low
    share = place - below
    # Exact at both ends, unlike low + share · (high − low).
    between = (1 - share) * low + share * high
    return round(between) if isinstance(low, int) and isinstance(high, int) else between


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number, or a whole one beyond 1.8e308
        return None
    return number if math.isfinite(number) else None


def _integer(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None
