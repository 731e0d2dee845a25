"""A mapping of a merge config as a pydantic model that records its errors and goes on.

pydantic returns a model or raises all its errors. A config needs both: an unknown key must not hide that a base model
is missing. So a `Keys` records what is wrong with its own values, each with its line, and is then validated again
without them. What is read after an error is never used: `YamlErrors.raise_if_any` raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from merges.config.ignored_keys import dead_keys, why_ignored
from merges.config.settings import MethodSpec, as_written
from surgery.errors import closest, listing
from surgery.io.yaml_models import node_at
from surgery.io.yaml_nodes import YamlErrors, YamlNode

_MAPPING = "expected a mapping of keys to values"
_ENTRIES = "expected a list with at least one entry"
_EXPECTED = {"dict_type": _MAPPING, "list_type": _ENTRIES, "too_short": _ENTRIES}


@dataclass(frozen=True)
class ReadContext:
    """What validators need beside the value: where errors go, and the merge methods there are, by name.

    method: that of the document; None where it names none of them.
    """

    errors: YamlErrors
    methods: Mapping[str, MethodSpec]
    method: MethodSpec | None = None


class NodeDict(dict[str, object]):
    """A mapping of plain values, empty where `node` is none, that remembers its node and with it the lines."""

    def __init__(self, node: YamlNode) -> None:
        super().__init__({key: _plain(child) for key, child in node.children.items()})
        self.node = node


def _plain(node: YamlNode) -> object:
    if isinstance(node.value, dict):
        return NodeDict(node)
    return [_plain(child) for child in node.value] if isinstance(node.value, tuple) else node.value


class Keys(BaseModel):
    """The keys that one kind of mapping may have. Those left empty (`key:` alone) count as not given.

    Every field has a default, which stands in for a wrong value; `required` names the keys that must be given all the
    same. `ignored` are keys without effect, which mergekit's configs may have, with the warning to give of each: those
    that are fields are checked, others may hold anything. `short_form` says what to write in place of a single value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    required: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[Mapping[str, str]] = dead_keys()
    short_form: ClassVar[str] = ""
    _node: YamlNode = PrivateAttr()

    @classmethod
    def read(cls, node: YamlNode, context: ReadContext) -> Self:
        """Validate `node`, and record what is wrong in `context.errors`."""
        if not isinstance(node.value, dict):
            context.errors.add(node, f"got {as_written(node.plain)}, {_MAPPING}")
        return cls.model_validate(NodeDict(node), context=context)

    @property
    def node(self) -> YamlNode:
        """The mapping in its file."""
        return self._node

    def get(self, key: str) -> YamlNode | None:
        """Return the node of `key`, whether its value is right or wrong; None where it is not given."""
        child = self._node.children.get(key)
        return None if child is None or child.is_empty else child

    def at(self, key: str) -> YamlNode:
        """Return the place of an error about `key`: its node, or that of the mapping where it is not given."""
        return self.get(key) or self._node

    @model_validator(mode="wrap")  # around the innermost mapping: only there it is known what else of it is right
    @classmethod
    def _record_errors(cls, data: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(data, NodeDict):
            hint = f". {cls.short_form}" if cls.short_form and isinstance(data, str) else ""
            raise ValueError(f"got {as_written(data)}, {_MAPPING}{hint}")  # recorded by the mapping around it
        context, node = cast(ReadContext, info.context), data.node
        # An unknown key stays, whatever its value, so that pydantic reports it.
        values = {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        for unknown in [key for key in values if key not in cls.model_fields]:
            if (why := cls._why_ignored(unknown, node, context)) is not None:
                context.errors.warn(node.children[unknown], why)
                del values[unknown]
        try:
            keys = handler(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                place, _ = node_at(node, detail["loc"])
                context.errors.add(place, cls._message(detail, place, context))
                key, *inside = detail["loc"]
                value: Any = values.get(str(key))
                if inside and place is not node.children[str(key)]:
                    value[inside[0]] = NodeDict(place)  # an entry that is no mapping: its neighbours are right
                else:
                    values.pop(str(key), None)
            # Once more without the wrong values, so that mistakes in the others are found in the same run.
            keys = handler(values)
        for key in cls.required if isinstance(node.value, dict) else ():
            if data.get(key) is None:
                context.errors.add(node.children.get(key, node), f"{key} is missing")
        for key in cls.ignored.keys() & values.keys():
            context.errors.warn(node.children[key], cls.ignored[key])
        keys._node = node
        return keys

    @classmethod
    def _message(cls, detail: ErrorDetails, place: YamlNode, context: ReadContext) -> str:
        """Return the text for one of pydantic's errors, which is at `place`."""
        kind = detail["type"]
        if kind == "extra_forbidden":
            return f"unknown key. {cls._unknown_hint(str(detail['loc'][-1]), context)}"
        if kind == "value_error":
            return str(detail["ctx"]["error"])
        got = as_written(place.plain)
        if kind == "literal_error":
            known = re.findall("'([^']*)'", detail["ctx"]["expected"])
            return f"got {got}. {nearest(str(place.value), known)}"
        if kind in _EXPECTED:
            return f"got {got}, {_EXPECTED[kind]}"
        # A number or a date in place of text is as a rule a name that YAML has read as such.
        quote = "" if isinstance(place.value, (str, dict, tuple)) else ". Put it in quotes"
        return f"got {got}, expected text{quote}"

    @classmethod
    def _why_ignored(cls, key: str, node: YamlNode, context: ReadContext) -> str | None:
        """Return the warning to give of a `key` of `node` that is no field; None where it is an error."""
        return why_ignored(
            key,
            node,
            known={name: _kinds(field.annotation) for name, field in cls.model_fields.items()},
            dead=cls.ignored,
            method=context.method,
            methods=context.methods,
            is_document="merge_method" in cls.model_fields,
        )

    @classmethod
    def _unknown_hint(cls, key: str, context: ReadContext) -> str:
        """Return the next step for someone who wrote the unknown `key`."""
        # `weight:` at the top of a document, say, where mergekit has it under `parameters:`.
        is_parameter = any(method.parameter(key) for method in context.methods.values())
        if is_parameter and "parameters" in cls.model_fields:
            return "It belongs under parameters."
        return nearest(key, cls.model_fields)


def _kinds(annotation: object) -> set[type]:
    """Return which values a field takes: `dict` for mappings, `tuple` for lists, `str` for every scalar."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {dict}
    origin = get_origin(annotation)
    if origin in (dict, list, tuple):
        return {dict if origin is dict else tuple}
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) if part is not NoneType for kind in _kinds(part)}
    return _kinds(get_args(annotation)[0]) if origin is Annotated else {str}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that leads from a misspelt name to a known one."""
    every = list(known)
    near = closest(name, every) or closest(name.lower(), every)
    return f'Did you mean "{near}"?' if near else f"Expected one of: {listing(every)}."
