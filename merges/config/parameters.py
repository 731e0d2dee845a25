"""A `parameters:` mapping → settings, checked against what the merge method takes, down to each number of a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merges.config.fields import nearest, read_fields, read_mapping, read_scalar
from merges.config.schema import Settings
from merges.config.settings import EVERYTHING, INT8_MASK, MethodSpec, ParameterSpec, Rule, Scalar, Setting, shown
from surgery.io.yaml_nodes import YamlErrors, YamlNode


@dataclass(frozen=True)
class ParameterReader:
    """Reads the parameters of one document.

    Args:
        methods: all methods that are known, by name.
        method: the document's; None where it names none that is known, and values are not checked.
        strict: whether a parameter without effect is a fault. Under `compat: mergekit` it is a warning, so that its
            configs pass unchanged; a name that no method knows is a fault always.
    """

    methods: Mapping[str, MethodSpec]
    method: MethodSpec | None
    faults: YamlErrors
    strict: bool

    def read(self, node: YamlNode | None, *, in_source: bool = False) -> Settings:
        """The settings under `node`, which may be absent; `in_source` where they are one model's."""
        settings: dict[str, Setting] = {}
        if node is None:
            return settings
        for name, child in read_mapping(node, self.faults).items():
            spec = self._spec(name, child, in_source=in_source)
            if spec is not None:
                settings[name] = self._setting(child, spec)
        return settings

    def _spec(self, name: str, node: YamlNode, *, in_source: bool) -> ParameterSpec | None:
        """The parameter called `name`, or None where it is not to be read."""
        if self.method is None:
            if not any(method.parameter(name) for method in self.methods.values()):
                self.faults.add(node, "unknown key, to every merge method")
            return None
        spec = self.method.parameter(name)
        if spec is None:
            others = [method.name for method in self.methods.values() if method.parameter(name)]
            known = [spec.name for spec in (*self.method.parameters, INT8_MASK)]
            if others:
                self._idle(node, f"has no effect: {self.method.name} does not take it")
            else:
                self.faults.add(node, f"unknown key. {nearest(name, known)}")
            return None
        if in_source and not spec.per_model and spec != INT8_MASK:
            self._idle(node, "has no effect for one model. Move it to the parameters of the whole merge")
            return None
        return spec

    def _idle(self, node: YamlNode, what: str) -> None:
        note = self.faults.add if self.strict else self.faults.warn
        note(node, what)

    def _setting(self, node: YamlNode, spec: ParameterSpec) -> Setting:
        if isinstance(node.value, dict):
            return (self._rule(node, spec),)
        if not isinstance(node.value, tuple) or not any(isinstance(item.value, dict) for item in node.value):
            return (Rule(self._values(node, spec)),)
        rules: list[Rule] = []
        for item in node.value:
            if not isinstance(item.value, dict):
                self.faults.add(item, f"got {shown(item.plain)} among rules, expected {{filter, value}}")
                continue
            if rules and rules[-1].filter in (None, EVERYTHING):
                self.faults.warn(item, "is never reached: the rule before it holds for every tensor")
            rules.append(self._rule(item, spec))
        return tuple(rules)

    def _rule(self, node: YamlNode, spec: ParameterSpec) -> Rule:
        keys = read_fields(node, ("filter", "value"), self.faults, required=("value",))
        values = self._values(keys["value"], spec) if "value" in keys else ()
        pattern = keys["filter"].value if "filter" in keys else None
        if pattern is None or isinstance(pattern, str):
            return Rule(values, pattern)
        self.faults.add(
            keys["filter"], f"got {shown(keys['filter'].plain)}, expected a part of tensor names, in quotes"
        )
        return Rule(values)

    def _values(self, node: YamlNode, spec: ParameterSpec) -> tuple[Scalar, ...]:
        """The values of a scalar or a list; () where it is empty."""
        if node.value == ():
            self.faults.add(node, f"got an empty list, expected {spec.rule}, or a list of such")
        items = node.value if isinstance(node.value, tuple) else (node,)
        values = [read_scalar(item, spec, self.faults) for item in items]
        return tuple(value for value in values if value is not None)
