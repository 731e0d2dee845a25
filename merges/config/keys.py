"""The keys of a merge config: which there are, of which types, and which are required.

`DocumentKeys.read` validates one YAML document. What takes more than one key to check (a method and its parameters, a
model and its layers) is in `merges.config.read`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from merges.choices import Compat
from merges.config.ignored_keys import dead_keys
from merges.config.settings import ParameterSpec, as_written
from merges.config.tolerant import Keys, NodeDict, ReadContext, nearest
from surgery.checkpoint.dtypes import TORCH_NAMES, dtype_guess

AUTO = "auto"
# The names of `merges.tokenizer.chat_template.TEMPLATES`, repeated here so that configs are read without what opens
# tokenizers; a test holds the two together.
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
MAX_MULTIPLE = 65_536  # to which rows of an embedding are padded
_REVISION = "has no effect here, as in mergekit: the default revision is read. Write model: NAME@REVISION for another"
_LORA = "has no effect here, as in mergekit: no adapter is added. Write model: BASE+ADAPTER for one"
_IN_TOKENIZER = "has no effect here, as in mergekit: it belongs under tokenizer"
NO_MODEL = ""  # stands in for a reference that could not be read

T = TypeVar("T")


def _read_as(kind: Literal["number", "integer", "boolean"], **bounds: Any) -> BeforeValidator:
    """Read a scalar as the parameters of merge methods are read: numbers may be text, truth may be 0 or `on`."""
    return BeforeValidator(ParameterSpec("", kind, **bounds).read)


def _one_of(known: Iterable[str], text: str) -> str:
    every = list(known)
    if text in every:
        return text
    raise ValueError(f"got {as_written(text)}. {nearest(text, every)}")


def _dtype(value: object) -> object:
    if not isinstance(value, (str, int, float)):
        return value
    short = str(value).removeprefix("torch.")
    if short in TORCH_NAMES:
        return short
    if (guess := dtype_guess(short)) is not None:  # before the spelling: "float" is nearer to "bfloat16" than to fp32
        raise ValueError(f"got {as_written(value)}. {guess}")
    return _one_of(TORCH_NAMES, str(value))


def _chat_template(text: str) -> str:
    return text if "{" in text else _one_of((AUTO, *CHAT_TEMPLATES), text)  # Jinja has braces, and no name has


def _merge_method(text: str, info: ValidationInfo) -> str:
    return _one_of(cast(ReadContext, info.context).methods, text)


def _layer_range(value: object) -> tuple[int, int]:
    layer = ParameterSpec("layer_range", "integer", low=0)
    try:
        first, end = (int(layer.read(item)) for item in value) if isinstance(value, list) else (0, 0)
    except ValueError:  # not two, or not whole numbers
        first, end = 0, 0
    if first < end:
        return first, end
    raise ValueError(f"got {as_written(value)}, expected [first, end] with 0 ≤ first < end, such as [0, 16]")


def _filter(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"got {as_written(value)}, expected a part of tensor names, in quotes")


def _joined(separator: str, kind: Callable[[], type[Keys]], first: str, second: str) -> WrapValidator:
    """Accept text, or a mapping of two keys whose values are joined; `NO_MODEL` where one of them is wrong."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> str:
        if not isinstance(value, NodeDict):
            return str(handler(value))
        keys = kind().model_validate(value, context=info.context)
        head, tail = getattr(keys, first), getattr(keys, second)
        # Half a reference could name another model than the one that was meant.
        if not head or (keys.get(second) and not tail):
            return NO_MODEL
        return f"{head}{separator}{tail}" if tail else str(head)

    return WrapValidator(validate)


Text = Annotated[str, StringConstraints(strict=True, pattern=r"\S")]
Entries = Annotated[list[T], Field(min_length=1)]
# The values are read by `merges.config.parameters`, as their types depend on the merge method.
Parameters = dict[str, Any]
# A path or Hub id, `org/name@revision`; from text, or from {path, revision}.
Repository = Annotated[Text, _joined("@", lambda: RepositoryKeys, "path", "revision")]
# A model as our reference, `BASE+ADAPTER`; from text, or from mergekit's {model, lora}.
Reference = Annotated[Text, _joined("+", lambda: ReferenceKeys, "model", "lora")]


class RepositoryKeys(Keys):
    """`{path, revision}`."""

    required = ("path",)
    path: Text = ""
    revision: Text | None = None


class ReferenceKeys(Keys):
    """`{model, lora}`, of which each may be text or `RepositoryKeys`."""

    required = ("model",)
    ignored: ClassVar[Mapping[str, str]] = dead_keys(
        override_architecture="has no effect: tensors are found by name and shape",
        revision=_REVISION,
    )
    model: Repository = NO_MODEL
    lora: Repository | None = None
    override_architecture: Text | None = None


class ModelEntry(Keys):
    """An entry of `models`."""

    required = ("model",)
    ignored: ClassVar[Mapping[str, str]] = dead_keys(
        layer_range="has no effect here, as in mergekit: models merges all layers. Give slices to choose some",
        revision=_REVISION,
        lora=_LORA,
    )
    model: Reference = NO_MODEL
    parameters: Parameters | None = None


class LayersEntry(Keys):
    """An entry of a slice's `sources`."""

    required = ("model", "layer_range")
    ignored: ClassVar[Mapping[str, str]] = dead_keys(revision=_REVISION, lora=_LORA)
    model: Reference = NO_MODEL
    layer_range: Annotated[tuple[int, int], BeforeValidator(_layer_range)] | None = None
    parameters: Parameters | None = None


class SliceEntry(Keys):
    """An entry of `slices`."""

    required = ("sources",)
    ignored: ClassVar[Mapping[str, str]] = dead_keys(
        layer_range="has no effect here, as in mergekit: it belongs to each entry of sources"
    )
    sources: Entries[LayersEntry] | None = None
    base_model: Reference | None = None
    residual_weight: Annotated[float, _read_as("number")] | None = None
    parameters: Parameters | None = None


class ModuleKeys(Keys):
    """One of `modules`."""

    models: Entries[ModelEntry] | None = None
    slices: Entries[SliceEntry] | None = None
    parameters: Parameters | None = None


class RowKeys(Keys):
    """`{kind, …}`: the row of the embedding that a token gets; used itself only where `kind` is unknown."""

    required: ClassVar[tuple[str, ...]] = ("kind",)
    kind: Literal["zero", "model_token"] | None = None
    model: Reference = NO_MODEL
    token: Text | None = None
    token_id: Annotated[int, _read_as("integer", low=0)] | None = None


class ModelRowKeys(RowKeys):
    """`{kind: model_token, …}`: the row of one token of one model."""

    required = ("kind", "model")


class ZeroRowKeys(Keys):
    """`{kind: zero}`."""

    kind: Literal["zero"]


def _row_kind(source: object) -> str:
    if not isinstance(source, NodeDict) or "kind" not in source:
        return "reference"
    return str(source["kind"]) if source["kind"] in ("zero", "model_token") else "unknown"


# A model, which gives the row of the same token, or a mapping with a kind.
TokenSource = Annotated[
    Annotated[Reference, Tag("reference")]
    | Annotated[ZeroRowKeys, Tag("zero")]
    | Annotated[ModelRowKeys, Tag("model_token")]
    | Annotated[RowKeys, Tag("unknown")],
    # By kind: a plain union would try all four, and report the errors of each.
    Discriminator(_row_kind),
]


class TokenKeys(Keys):
    """One of a tokenizer's `tokens`."""

    source: TokenSource | None = None
    force: Annotated[bool, _read_as("boolean")] = False


class TokenizerKeys(Keys):
    """The long form of the tokenizer."""

    short_form = "Write tokenizer_source: … for one"
    source: Reference | None = None
    tokens: dict[str, TokenKeys] | None = None
    pad_to_multiple_of: Annotated[int, _read_as("integer", low=1, high=MAX_MULTIPLE)] | None = None


class DocumentKeys(Keys):
    """One document, which is one merge. `name`, `compat` and `seed` are our own; mergekit has the rest."""

    required = ("merge_method",)
    ignored: ClassVar[Mapping[str, str]] = dead_keys(
        layer_range="has no effect here, as in mergekit: it belongs to each entry of slices[].sources",
        tokens=_IN_TOKENIZER,
        pad_to_multiple_of=_IN_TOKENIZER,
    )
    merge_method: Annotated[Text, AfterValidator(_merge_method)] = ""
    models: Entries[ModelEntry] | None = None
    slices: Entries[SliceEntry] | None = None
    modules: dict[str, ModuleKeys] | None = None
    base_model: Reference | None = None
    parameters: Parameters | None = None
    dtype: Annotated[Text, BeforeValidator(_dtype)] | None = None
    out_dtype: Annotated[Text, BeforeValidator(_dtype)] | None = None
    tokenizer_source: Reference | None = None
    tokenizer: TokenizerKeys | None = None
    chat_template: Annotated[Text, AfterValidator(_chat_template)] | None = None
    name: Text | None = None
    compat: Compat = "mergekit"
    seed: Annotated[int, _read_as("integer", low=0, high=2**63, high_open=True)] = 0


class RuleKeys(Keys):
    """`{filter, value}`: a parameter's value for the tensors whose names hold `filter`."""

    required = ("value",)
    filter: Annotated[str, BeforeValidator(_filter)] | None = None
    value: Any = None
