"""A merge config after it was read: the same types for `models:`, `slices:` and `modules:`.

A merge is a sequence of sections. Each section is a run of the output's layers, made from equally long runs of layers
of its sources; `models:` is one section over all layers. `SettingScope` looks up a parameter's value for one output
tensor.

Checked by running mergekit 0.1.5 (`linear` of a model of zeros and one of ones, in float32), and the same here:

- t is i/(n−1) for layer i of a section's n, and 1 where n is 1. Embeddings have t = 0 and the first section's
  parameters; the final norm and the head have t = 0 and the last section's.
- A per-model parameter comes from the first of these that has a value for the tensor: the source (the entry under
  `models:`), the slice, the module, the document. Parameters of the tensor skip the source. A list of filters of which
  none matches has no value, and the next place is asked.
- Filters of a per-model parameter are matched against the name of the input tensor, those of the others against the
  name of the output tensor. The two differ where a slice moves layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from merges.choices import Compat
from merges.config.settings import MethodSpec, ParameterSpec, Scalar, Setting, resolve
from surgery.errors import usage_error

Settings = Mapping[str, Setting]

UNION, BASE = "union", "base"  # values of the tokenizer's source that are no model


class Frozen(BaseModel):
    """Base of all types here: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MergeSource(Frozen):
    """One model's share in a section.

    `layer_range` is (first, last + 1), or None for all layers. `implied` marks the base model where the config names it
    as `base_model` only.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Settings = {}
    implied: bool = False


class MergeSection(Frozen):
    """A run of output layers, and the sources of each.

    `base_model` is the one in effect here, whether the slice or the document names it. `module` is the part of a
    composite model that `modules:` names, None for the whole model.
    """

    sources: tuple[MergeSource, ...]
    base_model: str | None = None
    parameters: Settings = {}
    module: str | None = None
    module_parameters: Settings = {}

    @property
    def base_index(self) -> int | None:
        """Index of the base model among the sources; None where it is not one of them."""
        return next((i for i, source in enumerate(self.sources) if source.model == self.base_model), None)


class ZeroToken(Frozen):
    """A token whose embedding is all zeros."""


class ModelToken(Frozen):
    """A token whose embedding is that of another token of `model`: exactly one of `token` and `token_id` is set."""

    model: str
    token: str | None = None
    token_id: int | None = None


class TokenRule(Frozen):
    """Where models that lack a token get its embedding, all models if `force`; a str is the model with the same token.

    `source` None: as for tokens without a rule.
    """

    source: str | ModelToken | ZeroToken | None = None
    force: bool = False


class TokenizerRule(Frozen):
    """The result's tokenizer: "union", "base", or that of a model reference."""

    source: str = "union"
    tokens: Mapping[str, TokenRule] = {}
    pad_to_multiple_of: int | None = None


class MergeConfig(Frozen):
    """One merge. Field names are the config's keys; `sections` stands for `models`, `slices` and `modules`.

    `uses` are the names of the documents whose results this one merges; `where` says where it was read, for errors;
    `warnings` are lines ready to print. `dequantise` is set by the
    command, not by a config. `dtype` and `out_dtype` are torch's names: float32, bfloat16, float16, float64.
    """

    merge_method: str
    sections: tuple[MergeSection, ...]
    base_model: str | None = None
    parameters: Settings = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    name: str | None = None
    compat: Compat = "mergekit"
    seed: int = 0
    dequantise: bool = False
    uses: tuple[str, ...] = ()
    where: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that weights or config are read from, once each: the base first, then as they are written."""
        # A dict keeps order and drops repetitions; a set's order would change from run to run.
        named = [ref for section in self.sections for ref in (section.base_model, *(s.model for s in section.sources))]
        return tuple(dict.fromkeys(ref for ref in (self.base_model, *named) if ref is not None))

    @property
    def template(self) -> str:
        """The model whose names, layout, config and side files the output gets: the base, or the first one."""
        return self.base_model or self.sections[0].sources[0].model

    def scope(self, section: MergeSection) -> SettingScope:
        """Return the scope in which parameters of this section's tensors are looked up."""
        return SettingScope(self, section)


@dataclass(frozen=True)
class SettingScope:
    """The parameters in effect for the tensors of one section."""

    config: MergeConfig
    section: MergeSection

    def value(self, spec: ParameterSpec, tensor_name: str, t: float, *, source: int | None = None) -> Scalar:
        """Return the value of `spec` for one tensor, as a float, int, bool or str by its kind.

        Args:
            tensor_name: of the output tensor; for a per-model parameter, of the source's own tensor.
            t: position of its layer, from `settings.layer_position`; `settings.EDGE_POSITION` outside the layers.
            source: which of the section's sources a per-model parameter is for.

        Raises:
            SurgeryError: a parameter without default has no value for this tensor.
        """
        for settings in self._places(spec, source):
            value = resolve(settings.get(spec.name, ()), tensor_name, t)
            if value is not None:
                return value
        if spec.default is None:
            model = "" if source is None else f" of {self.section.sources[source].model}"
            raise usage_error(
                f"{spec.name} has no value for {tensor_name}{model}",
                where=self.config.where,
                hint="Add a rule without a filter to its list.",
            )
        return spec.read(spec.default)

    def values(
        self, method: MethodSpec, tensor_name: str, t: float, input_names: Sequence[str] | None = None
    ) -> dict[str, Scalar | tuple[Scalar, ...]]:
        """Return all parameters of `method` for one output tensor: one value each, or a tuple for those per model.

        A tuple is in the order of the sources, the base left out where the method sets it apart.

        Args:
            input_names: the tensor's name in each of the sources; None where all call it `tensor_name`.

        Raises:
            SurgeryError: as in `value`.
        """
        names = [tensor_name] * len(self.section.sources) if input_names is None else input_names
        merged = merged_sources(method, self.section)
        return {
            spec.name: tuple(self.value(spec, names[i], t, source=i) for i in merged)
            if spec.per_model
            else self.value(spec, tensor_name, t)
            for spec in method.parameters
        }

    def _places(self, spec: ParameterSpec, source: int | None) -> Iterator[Settings]:
        """Yield the settings in which a value is looked up, innermost first."""
        if spec.per_model and source is not None:
            yield self.section.sources[source].parameters
        yield self.section.parameters
        yield self.section.module_parameters
        yield self.config.parameters


def merged_sources(method: MethodSpec, section: MergeSection) -> tuple[int, ...]:
    """Return the indices of the sources with per-model parameters: all but the base of a method that sets it apart."""
    apart = None if method.base == "none" else section.base_index
    return tuple(i for i in range(len(section.sources)) if i != apart)
