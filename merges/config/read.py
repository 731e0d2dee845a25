"""Read one document into a `MergeConfig`: check its validated keys against each other and the merge method."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from merges.config.keys import (
    NO_MODEL,
    DocumentKeys,
    LayersEntry,
    ModelEntry,
    ModuleKeys,
    RowKeys,
    SliceEntry,
    TokenKeys,
    ZeroRowKeys,
)
from merges.config.other_tools import pickle_instead_of_model
from merges.config.parameters import ParameterReader
from merges.config.schema import (
    BASE,
    UNION,
    MergeConfig,
    MergeSection,
    MergeSource,
    ModelToken,
    TokenizerRule,
    TokenRule,
    ZeroToken,
)
from merges.config.settings import MethodSpec
from merges.config.sources import check_section
from merges.config.tolerant import Keys, ReadContext
from surgery.errors import listing
from surgery.io.yaml_nodes import YamlNode

_INPUTS = ("models", "slices", "modules")
_OLD_PREFIX = "model:"  # of a model as tokenizer_source, in mergekit's first versions


@dataclass(frozen=True)
class ParsedDocument:
    """A document as read, with the nodes that later checks point at: its name, and every reference to a model."""

    node: YamlNode
    config: MergeConfig
    name: YamlNode | None
    refs: tuple[tuple[YamlNode, str], ...]


def read_document(node: YamlNode, context: ReadContext, *, strict: bool = False) -> ParsedDocument:
    """Read one document. The result is only of use where `context.errors` holds none.

    Args:
        strict: whether a parameter without effect is an error under `compat: mergekit` too.
    """
    named = node.children.get("merge_method")
    method = context.methods.get(named.value) if named is not None and isinstance(named.value, str) else None
    context = replace(context, method=method)
    keys = DocumentKeys.read(node, context)
    parameters = ParameterReader(context, method, strict=strict or keys.compat == "paper")
    builder = _ConfigBuilder(context, keys, method, parameters)
    config = builder.config()
    return ParsedDocument(node, config, keys.get("name"), tuple(builder.refs))


@dataclass
class _ConfigBuilder:
    """Builds the config of one document; `refs` collects its references to models, with their places."""

    context: ReadContext
    document: DocumentKeys
    method: MethodSpec | None
    parameters: ParameterReader
    refs: list[tuple[YamlNode, str]] = field(default_factory=list)

    def config(self) -> MergeConfig:
        keys = self.document
        base = self.base_model(keys)
        parameters = self.parameters.read(keys.get("parameters"))
        sections = self.sections(base, set(parameters))
        return MergeConfig(
            merge_method=keys.merge_method,
            sections=tuple(sections),
            base_model=base,
            parameters=parameters,
            dtype=keys.dtype,
            out_dtype=keys.out_dtype,
            tokenizer=self.tokenizer({source.model for section in sections for source in section.sources}, base),
            chat_template=keys.chat_template,
            name=keys.name,
            compat=keys.compat,
            seed=keys.seed,
            where=self.context.errors.place,
        )

    def base_model(self, keys: DocumentKeys | SliceEntry) -> str | None:
        if not keys.get("base_model"):
            return None
        # Where the reference is wrong, that one is given is still known to the checks.
        return self.model(keys, "base_model", keys.base_model or NO_MODEL)

    def model(self, keys: Keys, key: str, ref: str) -> str:
        # Names of other documents are checked when all documents have been read.
        self.refs.append((keys.at(key), ref))
        if (why := pickle_instead_of_model(ref)) is not None:
            self.context.errors.add(keys.at(key), why)
        return ref

    def sections(self, base: str | None, outer: Collection[str]) -> list[MergeSection]:
        """Return all sections of the document. `outer`: the parameters set around them, here and below."""
        keys, errors = self.document, self.context.errors
        given = [key for key in _INPUTS if keys.get(key)]
        if len(given) != 1:
            text = listing(given) if given else "none of them"
            errors.add(keys.node, f"got {text}, expected exactly one of models, slices and modules")
        sections = self.models_and_slices(keys, base, outer)
        if keys.modules is not None and not keys.modules:
            errors.add(keys.at("modules"), "names no module")
        for name, module in (keys.modules or {}).items():
            if bool(module.get("models")) == bool(module.get("slices")):
                errors.add(module.node, "expected exactly one of models and slices")
                continue
            shared = self.parameters.read(module.get("parameters"))
            around = {*outer, *shared}
            sections += [
                section.model_copy(update={"module": name, "module_parameters": shared})
                for section in self.models_and_slices(module, base, around)
            ]
        return sections

    def models_and_slices(
        self, keys: DocumentKeys | ModuleKeys, base: str | None, outer: Collection[str]
    ) -> list[MergeSection]:
        of_models = [self.models(keys.at("models"), keys.models, base, outer)] if keys.models else []
        return of_models + [self.slice(entry, base, outer) for entry in keys.slices or ()]

    def models(
        self, node: YamlNode, entries: Sequence[ModelEntry], base: str | None, outer: Collection[str]
    ) -> MergeSection:
        sources = [self.source(entry) for entry in entries]
        # `base_model` alone makes the base a source of `models:`; slices must list it, with its layers.
        if base is not None and all(source.model != base for source in sources) and self.base_joins(node, base):
            sources.append(MergeSource(model=base, implied=True))
        section = MergeSection(sources=tuple(sources), base_model=base)
        check_section(node, [entry.node for entry in entries], section, self.method, outer, self.context.errors)
        return section

    def base_joins(self, node: YamlNode, base: str) -> bool:
        """Return whether a base model that `models:` does not list is one of the sources."""
        if self.method is None or self.method.base != "none":
            return True
        name = self.method.name
        joins = self.method.joins_base and self.document.compat == "mergekit"
        if joins:
            text = f"{name} merges {base} as one more model, as in mergekit. `compat: paper` leaves it out"
        else:
            text = f"{name} has no use for a base: no weights are taken from {base}"
        self.context.errors.warn(node, text)
        return joins

    def slice(self, keys: SliceEntry, base: str | None, outer: Collection[str]) -> MergeSection:
        own = self.base_model(keys) if keys.get("base_model") else base
        parameters = self.parameters.read(keys.get("parameters"))
        sources = tuple(self.source(entry) for entry in keys.sources or ())
        section = MergeSection(sources=sources, base_model=own, parameters=parameters)
        if keys.sources:
            entries, around = [entry.node for entry in keys.sources], {*outer, *parameters}
            check_section(keys.at("sources"), entries, section, self.method, around, self.context.errors)
        return section

    def source(self, keys: ModelEntry | LayersEntry) -> MergeSource:
        return MergeSource(
            model=self.model(keys, "model", keys.model),
            layer_range=keys.layer_range if isinstance(keys, LayersEntry) else None,
            parameters=self.parameters.read(keys.get("parameters"), in_source=True),
        )

    def tokenizer(self, merged: Collection[str], base: str | None) -> TokenizerRule | None:
        """Return the tokenizer's rule, written in either form. `merged`: the models whose rows tokens may have."""
        keys = self.document
        short = keys.get("tokenizer_source")
        if short and keys.get("tokenizer"):
            self.context.errors.add(short, "cannot stand beside tokenizer. Write it as tokenizer: {source: …}.")
        if keys.tokenizer is None:
            source = keys.tokenizer_source
            return None if source is None else TokenizerRule(source=self.tokenizer_source(short, source, base))
        own = keys.tokenizer
        return TokenizerRule(
            source=UNION if own.source is None else self.tokenizer_source(own.get("source"), own.source, base),
            tokens={token: self.token(one, merged) for token, one in (own.tokens or {}).items()},
            pad_to_multiple_of=own.pad_to_multiple_of,
        )

    def tokenizer_source(self, node: YamlNode | None, source: str, base: str | None) -> str:
        assert node is not None  # it has a source
        if source.startswith(_OLD_PREFIX):
            source = source.removeprefix(_OLD_PREFIX)
            self.context.errors.warn(node, f"is read as {source}: model: stands before a name in old configs only")
        if source == BASE and base is None:
            self.context.errors.add(node, "says base, and there is no base_model")
        if source not in (UNION, BASE):
            self.refs.append((node, source))
        return source

    def token(self, keys: TokenKeys, merged: Collection[str]) -> TokenRule:
        if keys.source is None:
            return TokenRule(force=keys.force)
        if isinstance(keys.source, str):
            return TokenRule(source=self.token_model(keys, "source", keys.source, merged), force=keys.force)
        row = keys.source
        if isinstance(row, ZeroRowKeys) or row.kind != "model_token":
            return TokenRule(source=ZeroToken(), force=keys.force)
        if bool(row.get("token")) == bool(row.get("token_id")):
            self.context.errors.add(row.node, "expected exactly one of token and token_id")
        model = self.token_model(row, "model", row.model, merged)
        return TokenRule(source=ModelToken(model=model, token=row.token, token_id=row.token_id), force=keys.force)

    def token_model(self, keys: TokenKeys | RowKeys, key: str, ref: str, merged: Collection[str]) -> str:
        if ref != NO_MODEL and ref not in merged:
            self.context.errors.add(keys.at(key), f"{ref} is not one of the merged models")
        return self.model(keys, key, ref)
