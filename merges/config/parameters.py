"""Read a `parameters:` mapping into settings, checked against what the merge method takes, down to each number.

This is read by hand, beside the pydantic models of `merges.config.keys`: which parameters there are, and of which type,
depends on the merge method, and a parameter is a scalar, a list, one `{filter, value}` or a list of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from merges.config.ignored_keys import why_parameter_ignored
from merges.config.keys import RuleKeys
from merges.config.schema import Settings
from merges.config.settings import EVERYTHING, INT8_MASK, MethodSpec, ParameterSpec, Rule, Scalar, Setting, as_written
from merges.config.tolerant import ReadContext, nearest
from surgery.io.yaml_nodes import YamlNode

MAX_RULES = 1_000  # of one parameter: each is compared with the name of each tensor


@dataclass(frozen=True)
class ParameterReader:
    """Reads the parameters of one document.

    Args:
        method: the document's; None where it names none that is known, and values are not checked.
        strict: whether a parameter without effect is an error. Under `compat: mergekit` it is a warning, so that its
            configs pass unchanged; a name that no method knows is an error always.
    """

    context: ReadContext
    method: MethodSpec | None
    strict: bool

    def read(self, node: YamlNode | None, *, in_source: bool = False) -> Settings:
        """Return the settings under `node`, which may be absent; `in_source` where they are one model's."""
        settings: dict[str, Setting] = {}
        if node is None or not isinstance(node.value, dict):  # the latter is an error that pydantic reports
            return settings
        for name, child in node.value.items():
            spec = self._spec(name, child, node, in_source=in_source)
            if spec is not None:
                settings[name] = self._setting(child, spec)
        return settings

    def _spec(self, name: str, node: YamlNode, around: YamlNode, *, in_source: bool) -> ParameterSpec | None:
        """Return what is specified for `name`; None, with an error or a warning, where it is not to be read."""
        errors, methods = self.context.errors, self.context.methods.values()
        owners = [method.name for method in methods if method.parameter(name)]
        known = [spec.name for spec in (*(self.method.parameters if self.method else ()), INT8_MASK)]
        if not owners:
            if (why := why_parameter_ignored(name, around, known)) is not None:
                self._without_effect(node, why)
            elif self.method is None:
                errors.add(node, "unknown key, to every merge method")
            else:
                errors.add(node, f"unknown key. {nearest(name, known)}")
            return None
        if self.method is None:
            return None
        spec = self.method.parameter(name)
        if spec is None:
            self._without_effect(node, f"has no effect: {self.method.name} does not take it")
            return None
        # One value for the tensor: mergekit ignores it under a model.
        if in_source and not spec.per_model and spec != INT8_MASK:
            self._without_effect(node, "has no effect for one model. Move it to the parameters of the whole merge")
            return None
        return spec

    def _without_effect(self, node: YamlNode, text: str) -> None:
        report = self.context.errors.add if self.strict else self.context.errors.warn
        report(node, text)

    def _setting(self, node: YamlNode, spec: ParameterSpec) -> Setting:
        if isinstance(node.value, dict):
            return (self._rule(node, spec),)
        if not isinstance(node.value, tuple) or not any(isinstance(item.value, dict) for item in node.value):
            return (Rule(self._values(node, spec)),)
        if len(node.value) > MAX_RULES:
            self.context.errors.add(node, f"got {len(node.value):,} rules, expected at most {MAX_RULES:,}")
            return ()
        rules: list[Rule] = []
        for item in node.value:
            if not isinstance(item.value, dict):
                text = f"got {as_written(item.plain)} among rules, expected {{filter, value}}"
                self.context.errors.add(item, text)
                continue
            # The first rule that applies counts, so one without a filter ends the list.
            if rules and rules[-1].filter in (None, EVERYTHING):
                self.context.errors.warn(item, "is never reached: the rule before it holds for every tensor")
            rules.append(self._rule(item, spec))
        return tuple(rules)

    def _rule(self, node: YamlNode, spec: ParameterSpec) -> Rule:
        keys = RuleKeys.read(node, self.context)
        value = keys.get("value")
        return Rule(() if value is None else self._values(value, spec), keys.filter)

    def _values(self, node: YamlNode, spec: ParameterSpec) -> tuple[Scalar, ...]:
        """Return the values of a scalar or a list, without those that are wrong."""
        if node.value == ():
            self.context.errors.add(node, f"got an empty list, expected {spec.rule}, or a list of such")
        values = []
        for item in node.value if isinstance(node.value, tuple) else (node,):
            try:
                values.append(spec.read(item.plain))
            except ValueError as error:
                self.context.errors.add(item, str(error))
        return tuple(values)
