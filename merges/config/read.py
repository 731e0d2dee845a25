"""One document of a config → `MergeConfig`, with every fault noted where it stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from merges.config.fields import (
    read_choice,
    read_entries,
    read_fields,
    read_mapping,
    read_model,
    read_scalar,
    read_text,
)
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
from merges.config.settings import MethodSpec, ParameterSpec, shown
from merges.config.sources import check_section
from surgery.checkpoint.dtypes import TORCH_NAMES
from surgery.errors import listing
from surgery.io.yaml_nodes import YamlErrors, YamlNode

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
AUTO = "auto"

_INPUTS = ("models", "slices", "modules")
_KEYS = (
    *("merge_method", *_INPUTS, "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name", "compat", "seed"),
)
_SEED = ParameterSpec("seed", "integer", 0, low=0, high=2**63, high_open=True)
_LAYER = ParameterSpec("layer_range", "integer", low=0)
_MULTIPLE = ParameterSpec("pad_to_multiple_of", "integer", low=1)
_TOKEN_ID = ParameterSpec("token_id", "integer", low=0)
_FORCE = ParameterSpec("force", "boolean", False)
_RESIDUAL = ParameterSpec("residual_weight", "number")


@dataclass(frozen=True)
class ParsedDocument:
    """A document as read, with the nodes that later checks point at: its name, and every reference to a model."""

    node: YamlNode
    config: MergeConfig
    name: YamlNode | None
    refs: tuple[tuple[YamlNode, str], ...]


def read_document(
    node: YamlNode, methods: Mapping[str, MethodSpec], faults: YamlErrors, *, strict: bool = False
) -> ParsedDocument:
    """Reads one document. What it returns is only of use where `faults` holds none.

    Args:
        strict: whether a parameter without effect is a fault under `compat: mergekit` too.
    """
    elsewhere = {spec.name for method in methods.values() for spec in method.parameters}
    keys = read_fields(node, _KEYS, faults, required=("merge_method",), elsewhere=elsewhere)
    chosen = read_choice(keys["merge_method"], methods, faults) if "merge_method" in keys else None
    compat = read_choice(keys["compat"], ("mergekit", "paper"), faults) if "compat" in keys else "mergekit"
    method = None if chosen is None else methods[chosen]
    as_mergekit = compat != "paper"
    parameter_reader = ParameterReader(methods, method, faults, strict=strict or not as_mergekit)
    reader = _Reader(method, parameter_reader, faults, as_mergekit)
    base = reader.model(keys["base_model"]) if "base_model" in keys else None
    parameters = reader.parameters.read(keys.get("parameters"))
    sections = reader.inputs(node, keys, base, set(parameters))
    config = MergeConfig(
        merge_method=chosen or "",
        sections=tuple(sections),
        base_model=base,
        parameters=parameters,
        dtype=reader.dtype(keys.get("dtype")),
        out_dtype=reader.dtype(keys.get("out_dtype")),
        tokenizer=reader.tokenizer(keys, sections, base),
        chat_template=reader.chat_template(keys.get("chat_template")),
        name=read_text(keys["name"], faults) if "name" in keys else None,
        compat="mergekit" if as_mergekit else "paper",
        seed=int(read_scalar(keys["seed"], _SEED, faults) or 0) if "seed" in keys else 0,
        where=faults.place,
    )
    return ParsedDocument(node, config, keys.get("name"), tuple(reader.refs))


@dataclass
class _Reader:
    method: MethodSpec | None
    parameters: ParameterReader
    faults: YamlErrors
    as_mergekit: bool
    refs: list[tuple[YamlNode, str]] = field(default_factory=list)

    def model(self, node: YamlNode) -> str:
        ref = read_model(node, self.faults)
        self.refs.append((node, ref))
        return ref

    def inputs(
        self, node: YamlNode, keys: Mapping[str, YamlNode], base: str | None, outer: Collection[str]
    ) -> list[MergeSection]:
        """All sections of the document. `outer`: the parameters set around them, here and below."""
        given = [key for key in _INPUTS if key in keys]
        if len(given) != 1:
            found = listing(given) if given else "none of them"
            self.faults.add(node, f"got {found}, expected exactly one of models, slices and modules")
        sections: list[MergeSection] = []
        if "models" in keys:
            sections.append(self.models(keys["models"], base, outer))
        if "slices" in keys:
            sections += self.slices(keys["slices"], base, outer)
        if "modules" in keys:
            modules = read_mapping(keys["modules"], self.faults)
            if not modules:
                self.faults.add(keys["modules"], "names no module")
            for name, child in modules.items():
                sections += self.module(name, child, base, outer)
        return sections

    def module(self, name: str, node: YamlNode, base: str | None, outer: Collection[str]) -> list[MergeSection]:
        keys = read_fields(node, ("models", "slices", "parameters"), self.faults)
        if ("models" in keys) == ("slices" in keys):
            self.faults.add(node, "expected exactly one of models and slices")
            return []
        shared = self.parameters.read(keys.get("parameters"))
        around = {*outer, *shared}
        if "models" in keys:
            sections = [self.models(keys["models"], base, around)]
        else:
            sections = self.slices(keys["slices"], base, around)
        return [section.model_copy(update={"module": name, "module_parameters": shared}) for section in sections]

    def models(self, node: YamlNode, base: str | None, outer: Collection[str]) -> MergeSection:
        entries = read_entries(node, self.faults)
        sources = [self.source(entry, has_layers=False) for entry in entries]
        if base is not None and all(source.model != base for source in sources) and self.base_joins(node, base):
            sources.append(MergeSource(model=base, implied=True))
        section = MergeSection(sources=tuple(sources), base_model=base)
        if entries:
            check_section(node, entries, section, self.method, outer, self.faults)
        return section

    def base_joins(self, node: YamlNode, base: str) -> bool:
        """Whether a base model that `models:` does not list is one of the sources."""
        if self.method is None or self.method.base != "none":
            return True
        name = self.method.name
        joins = self.method.joins_base and self.as_mergekit
        if joins:
            what = f"{name} merges {base} as one more model, as in mergekit. `compat: paper` leaves it out"
        else:
            what = f"{name} has no use for a base: no weights are taken from {base}"
        self.faults.warn(node, what)
        return joins

    def slices(self, node: YamlNode, base: str | None, outer: Collection[str]) -> list[MergeSection]:
        return [self.slice(entry, base, outer) for entry in read_entries(node, self.faults)]

    def slice(self, node: YamlNode, base: str | None, outer: Collection[str]) -> MergeSection:
        known = "sources", "base_model", "residual_weight", "parameters"
        keys = read_fields(node, known, self.faults, required=("sources",))
        if "residual_weight" in keys:
            read_scalar(keys["residual_weight"], _RESIDUAL, self.faults)
            self.faults.warn(keys["residual_weight"], "has no effect, as in mergekit")
        own = self.model(keys["base_model"]) if "base_model" in keys else base
        parameters = self.parameters.read(keys.get("parameters"))
        entries = read_entries(keys["sources"], self.faults) if "sources" in keys else ()
        sources = tuple(self.source(entry, has_layers=True) for entry in entries)
        section = MergeSection(sources=sources, base_model=own, parameters=parameters)
        if entries:
            check_section(keys["sources"], entries, section, self.method, {*outer, *parameters}, self.faults)
        return section

    def source(self, node: YamlNode, *, has_layers: bool) -> MergeSource:
        required = ("model", "layer_range") if has_layers else ("model",)
        keys = read_fields(node, (*required, "parameters"), self.faults, required=required)
        return MergeSource(
            model=self.model(keys["model"]) if "model" in keys else "",
            layer_range=self.layer_range(keys["layer_range"]) if "layer_range" in keys else None,
            parameters=self.parameters.read(keys.get("parameters"), in_source=True),
        )

    def layer_range(self, node: YamlNode) -> tuple[int, int] | None:
        value = node.plain
        try:
            first, end = (int(_LAYER.read(item)) for item in value) if isinstance(value, list) else (0, 0)
        except ValueError:  # not two, or not whole numbers
            first, end = 0, 0
        if first < end:
            return first, end
        self.faults.add(node, f"got {shown(value)}, expected [first, end] with 0 ≤ first < end, such as [0, 16]")
        return None

    def dtype(self, node: YamlNode | None) -> str | None:
        if node is None:
            return None
        if isinstance(node.value, str) and node.value.removeprefix("torch.") in TORCH_NAMES:
            return node.value.removeprefix("torch.")
        return read_choice(node, TORCH_NAMES, self.faults)

    def chat_template(self, node: YamlNode | None) -> str | None:
        if node is None:
            return None
        text = read_text(node, self.faults)
        return text if "{" in text or not text else read_choice(node, (AUTO, *CHAT_TEMPLATES), self.faults)

    def tokenizer(
        self, keys: Mapping[str, YamlNode], sections: list[MergeSection], base: str | None
    ) -> TokenizerRule | None:
        if "tokenizer" in keys and "tokenizer_source" in keys:
            self.faults.add(
                keys["tokenizer_source"], "cannot stand beside tokenizer. Write it as tokenizer: {source: …}."
            )
        if "tokenizer" not in keys:
            node = keys.get("tokenizer_source")
            return None if node is None else TokenizerRule(source=self.tokenizer_source(node, base))
        own = read_fields(keys["tokenizer"], ("source", "tokens", "pad_to_multiple_of"), self.faults)
        merged = {source.model for section in sections for source in section.sources}
        tokens = read_mapping(own["tokens"], self.faults) if "tokens" in own else {}
        multiple = own.get("pad_to_multiple_of")
        return TokenizerRule(
            source=self.tokenizer_source(own["source"], base) if "source" in own else UNION,
            tokens={token: self.token(node, merged) for token, node in tokens.items()},
            pad_to_multiple_of=None if multiple is None else self.whole(multiple, _MULTIPLE),
        )

    def tokenizer_source(self, node: YamlNode, base: str | None) -> str:
        if node.value == UNION:
            return UNION
        if node.value == BASE:
            if base is None:
                self.faults.add(node, "says base, and there is no base_model")
            return BASE
        return self.model(node)

    def token(self, node: YamlNode, merged: Collection[str]) -> TokenRule:
        keys = read_fields(node, ("source", "force"), self.faults)
        force = bool(read_scalar(keys["force"], _FORCE, self.faults)) if "force" in keys else False
        if "source" not in keys:
            return TokenRule(force=force)
        source = keys["source"]
        if not isinstance(source.value, dict) or "kind" not in source.value:
            return TokenRule(source=self.token_model(source, merged), force=force)
        kind = read_choice(source.value["kind"], ("zero", "model_token"), self.faults)
        if kind != "model_token":
            read_fields(source, ("kind", *(("model", "token", "token_id") if kind is None else ())), self.faults)
            return TokenRule(source=ZeroToken(), force=force)
        own = read_fields(source, ("kind", "model", "token", "token_id"), self.faults, required=("model",))
        if ("token" in own) == ("token_id" in own):
            self.faults.add(source, "expected exactly one of token and token_id")
        return TokenRule(
            source=ModelToken(
                model=self.token_model(own["model"], merged) if "model" in own else "",
                token=read_text(own["token"], self.faults) if "token" in own else None,
                token_id=self.whole(own["token_id"], _TOKEN_ID) if "token_id" in own else None,
            ),
            force=force,
        )

    def token_model(self, node: YamlNode, merged: Collection[str]) -> str:
        ref = self.model(node)
        if ref and ref not in merged:
            self.faults.add(node, f"{ref} is not one of the merged models")
        return ref

    def whole(self, node: YamlNode, spec: ParameterSpec) -> int | None:
        value = read_scalar(node, spec, self.faults)
        return None if value is None else int(value)
