"""Write the model that a growth starts from: a frozen embedding, a final norm, a head, and any number of layers.

The model is of a common family, by default a Llama without layers, so that every engine for that family runs it. The
embedding is copied bit by bit and is not tied to the head; everything else is random, as transformers initialises it.
After arXiv 2507.04886 and 2507.07129.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint, read_folder
from surgery.checkpoint.config.config_layers import language_part, untied, with_count, with_explicit_layer_kinds
from surgery.checkpoint.config.model_config import HIDDEN, N_LAYERS, language_config, number, read_config
from surgery.checkpoint.dtypes import TORCH_NAMES, dtype_name
from surgery.checkpoint.safetensors_header import PYTORCH
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.vocabulary import CONFIG as TOKENIZER_CONFIG
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.preflight import Preflight
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, usage_error
from surgery.growth.embedding.embedding_folder import TENSOR, Embedding, open_embedding
from surgery.growth.layers.add import write_config
from surgery.growth.layers.random_init import (
    LayerSpec,
    random_embedding_and_head,
    random_layers,
    temporary_folder,
    text_config,
    transformers_version,
)
from surgery.growth.layers.residual_writes import check_embedding
from surgery.growth.plan import ModelShape
from surgery.io.escaping import markdown_text
from surgery.io.json_io import read_json
from surgery.reporting.report import Column, Table

COMMAND = "grow init"
EMBEDDING, ENDS, LAYERS = "embedding", "norm and head", "layers"
HEAD_WIDTH = 64  # of a Llama's heads, where nothing else is asked for
MLP_STEP = 64
_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class InitReport:
    """The result of `init_model`.

    family: the config's model_type. vocab_size, width: of the embedding. embedding: its hash. trainable: parameters
    outside the embedding.
    """

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    family: str
    layers: int
    vocab_size: int
    width: int
    embedding: str
    trainable: int
    resumed_bytes: int = 0
    dry_run: bool = False

    @property
    def frozen(self) -> int:
        """Number of the embedding's parameters."""
        return self.vocab_size * self.width

    def summary(self) -> dict[str, Any]:
        """Return the manifest's report."""
        return {
            "family": self.family,
            "layers": self.layers,
            "vocab_size": self.vocab_size,
            "width": self.width,
            "frozen_embedding": self.embedding,
            "frozen_parameters": self.frozen,
            "trainable_parameters": self.trainable,
        }

    def table(self) -> Table:
        """Return a table of the model's properties."""
        facts: list[tuple[str, str | int]] = [
            ("family", self.family),
            ("layers", self.layers),
            ("tokens", self.vocab_size),
            ("width", self.width),
            ("frozen parameters (embedding)", self.frozen),
            ("other parameters", self.trainable),
            ("hash of the embedding", self.embedding),
        ]
        return Table("Model to grow", [Column(""), Column("")], facts)


def init_model(
    embed: str,
    out: Path,
    *,
    shape: ModelShape,
    seed: int = 0,
    dtype: str = "float32",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> InitReport:
    """Write the model that a growth on the frozen embedding `embed` starts from to the folder `out`.

    Layers, if the shape asks for any, are the random ones that `surgery.growth.layers.add` would add to the model
    without layers: the first ones of the given config, or, where it has fewer, of the family's default kinds.

    Example:
        from surgery.growth.plan import ModelShape
        surgery.init_model("EMB", Path("M0"), shape=ModelShape(width=256, heads=4))

    Args:
        embed: a folder that `surgery grow embed` wrote.
        shape: of the model; its width is the embedding's.
        seed: of the random weights.
        dtype: of all stored tensors; in float32 the embedding keeps its bytes.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: the shape is impossible, or its config has another width; the family scales its embeddings, or
            has no head of its own; `out` exists; the disk is full.
    """
    stored_as = dtype_name(dtype)
    embedding = open_embedding(embed)
    # With the reference as it was typed: manifests must not depend on where the folder is.
    frozen = replace(read_folder(embedding.folder), ref=embed)
    check_destination(out, {EMBEDDING: frozen}, options, dry_run=dry_run)
    preflight = Preflight()
    config = _config(preflight, embedding, shape, dtype)
    preflight.errors.raise_if_any(COMMAND)
    # The default family, Llama, is known to pass embeddings on unchanged.
    if shape.config is not None:
        check_embedding(LayerSpec(config))
    arguments = shape.model_dump(mode="json", exclude_none=True)
    command = command_record(COMMAND, [], embed=embed, **arguments, seed=seed, dtype=dtype)
    with temporary_folder(None if dry_run else out) as folder:
        sources = {EMBEDDING: frozen, **_random_sources(config, shape, folder, seed=seed)}
        planned = _planned(sources, embedding, stored_as)
        side_files = {path.name: path for path in embedding.tokenizer_files}
        plan = Plan(command, sources, plan_files(planned, metadata=PYTORCH), side_files)
        preview = replace(_preview(preflight, embedding, config, shape, plan, out), dry_run=dry_run)

        def describe(folder: Path, result: ExecutionResult) -> OutputDescription[InitReport]:
            report = replace(preview, resumed_bytes=result.resumed_bytes)
            write_config(folder, config)
            return OutputDescription(
                report, report.summary(), _card(report, stored_as), versions=transformers_version()
            )

        return write_checkpoint(
            plan, out, options, describe=describe, preflight=preflight, dry_run_report=preview if dry_run else None
        )


def _random_sources(config: Mapping[str, Any], shape: ModelShape, folder: Path, *, seed: int) -> dict[str, Checkpoint]:
    """Write random weights to `folder`: embedding and head, and the layers if there are any; return them by role."""
    sources = {ENDS: random_embedding_and_head(config, folder, seed=seed)}
    if shape.layers:
        specs = {index: LayerSpec(config) for index in range(shape.layers)}
        sources[LAYERS] = random_layers(specs, folder, seed=seed, depth=shape.layers).checkpoint
    return sources


def _preview(
    preflight: Preflight, embedding: Embedding, config: Mapping[str, Any], shape: ModelShape, plan: Plan, out: Path
) -> InitReport:
    """Return the report as far as it is known before anything is written."""
    total = sum(tensor.inputs[0].n_elements for tensor in plan.tensors)
    return InitReport(
        out,
        preflight.facts,
        preflight.warnings,
        str(config["model_type"]),
        shape.layers,
        embedding.vocab_size,
        embedding.width,
        embedding.hash,
        total - embedding.weight.n_elements,
    )


def llama_config(width: int, shape: ModelShape) -> dict[str, Any]:
    """Return the config of a Llama of this width, as transformers 5 writes it, with defaults for what `shape` omits.

    Raises:
        SurgeryError: width, heads and key-value heads do not divide each other.
    """
    # Rotary position embeddings rotate pairs of values, in every head.
    if width % 2:
        raise usage_error(f"the embedding is {width} wide: rotary positions turn pairs, so a width must be even")
    heads = shape.heads or _default_heads(width)
    if width % (2 * heads):
        raise usage_error(f"{heads} heads do not divide a width of {width} into even parts", where="heads")
    # As many as heads: multi-head attention; fewer: grouped queries.
    kv_heads = shape.kv_heads or heads
    if heads % kv_heads:
        raise usage_error(f"{kv_heads} key-value heads cannot be shared by {heads} heads", where="kv_heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp or -(-8 * width // (3 * MLP_STEP)) * MLP_STEP,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _default_heads(width: int) -> int:
    """Return the largest number of heads, each at least HEAD_WIDTH wide, that divide the width into even parts."""
    return next(n for n in range(max(width // HEAD_WIDTH, 1), 0, -1) if width % (2 * n) == 0)


def _config(preflight: Preflight, embedding: Embedding, shape: ModelShape, dtype: str) -> dict[str, Any]:
    if shape.hidden not in (None, embedding.width):
        raise usage_error(
            f"got {shape.hidden}, expected the embedding's width, {embedding.width}",
            where="hidden",
            hint="Make an embedding of the width that you want: surgery grow embed … --width W.",
        )
    config = llama_config(embedding.width, shape) if shape.config is None else _given_config(embedding, shape)
    part = language_part(config)
    # The embedding's rows, not the tokenizer's size, which may be smaller.
    part["vocab_size"] = embedding.vocab_size
    part |= _special_ids(preflight, embedding)
    # Families and versions of transformers use either; the given config may have both.
    for key in ("torch_dtype", "dtype"):
        config.pop(key, None)
    config["dtype"] = next(name for name, stored in TORCH_NAMES.items() if stored == dtype_name(dtype))
    return config


def _given_config(embedding: Embedding, shape: ModelShape) -> dict[str, Any]:
    """Return the shape's config.json with its number of layers, untied and without quantisation."""
    assert shape.config is not None
    where = shape.config
    also_given = sorted(shape.model_fields_set & {"heads", "kv_heads", "mlp", "context"})
    if also_given:
        raise usage_error(f"{', '.join(also_given)} cannot be given beside a config, which says them too", where=where)
    if not where.is_file():
        raise usage_error("no such file", where=where, hint="Give the config.json of a model.")
    config = read_config(where)
    # Vision-language models have their layers in a part; growing those is not supported.
    if language_part(config) is not config:
        raise usage_error("is of a model of several parts", where=where, hint="Take that of a language model.")
    width = number(language_config(config), HIDDEN)
    if width != embedding.width:
        raise usage_error(
            f"says a width of {width}, the embedding is {embedding.width} wide",
            where=where,
            hint="Make the embedding as wide, or take another config.",
        )
    whole = text_config(config)
    stated_layers = number(whole, N_LAYERS)
    if stated_layers is None:
        raise usage_error("does not say how many layers there are", where=where)
    # A tied head would be the frozen embedding, and could not train.
    config = untied({key: value for key, value in config.items() if key != "quantization_config"})
    return with_count(with_explicit_layer_kinds(config, whole, stated_layers), shape.layers)


def _special_ids(preflight: Preflight, embedding: Embedding) -> dict[str, int | None]:
    """Return the ids of the begin-, end- and padding tokens of the tokenizer beside the embedding."""
    vocabulary = read_vocabulary(embedding.folder)
    ids: dict[str, int | None] = dict.fromkeys(f"{name}_id" for name in _SPECIAL)
    if vocabulary is None:
        preflight.warnings.append("no tokenizer lies beside the embedding, so the model has none either")
        return ids
    if vocabulary.size > embedding.vocab_size:
        preflight.errors.add(
            f"the tokenizer has ids up to {vocabulary.size - 1:,}, the embedding only {embedding.vocab_size:,} rows. "
            "Make the embedding again from this tokenizer."
        )
    settings = read_json(embedding.folder / TOKENIZER_CONFIG, missing={})
    for name in _SPECIAL:
        token = settings.get(name)
        # Either a string or an added token as an object.
        token = token.get("content") if isinstance(token, Mapping) else token
        ids[f"{name}_id"] = vocabulary.ids.get(token) if isinstance(token, str) else None
    return ids


def _planned(sources: Mapping[str, Checkpoint], embedding: Embedding, stored_as: str) -> list[PlannedTensor]:
    ends = model_structure(sources[ENDS])
    # Families with several embeddings (per layer, or factorised) have no single table to freeze.
    if len(ends.token_embeddings) != 1 or not ends.lm_heads:
        raise SurgeryError(
            "this family has no token embedding and output head that are tensors of their own",
            where=COMMAND,
            hint="Take a config of another family, such as llama.",
        )
    (name,) = ends.token_embeddings
    frozen = sources[EMBEDDING].tensors[TENSOR]
    if frozen.shape != sources[ENDS].tensors[name].shape:
        raise SurgeryError(
            f"{name} of this family is {list(sources[ENDS].tensors[name].shape)}, the embedding {list(frozen.shape)}",
            where=COMMAND,
            hint="Take a config of another family, such as llama.",
        )
    tensors = {
        name: tensor for role in (ENDS, LAYERS) if role in sources for name, tensor in sources[role].tensors.items()
    }
    # In place of the random embedding of the same name.
    tensors[name] = frozen
    return [replace(copy_tensor(tensor, dtype=stored_as), name=name) for name, tensor in sorted(tensors.items())]


def _card(report: InitReport, stored_as: str) -> CardContent:
    exact = "to the bit" if stored_as == "F32" else f"rounded to {stored_as}"
    method = (
        f"A {markdown_text(report.family)} with {report.layers} layers on a frozen embedding (arXiv:2507.07129): "
        f"its token embedding is the given one {exact}, is not tied to the head, and is not to be trained. "
        "Everything else is random, as transformers initialises it. "
        "It is made to be grown: `surgery grow add` adds layers, `surgery grow run` "
        "trains them."
    )
    return CardContent("Model to grow", method, ("frozen-embedding", "growth"), report.table().to_markdown())
