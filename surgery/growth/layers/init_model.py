"""The model that a growth begins with: a frozen embedding, a final norm, a head, and any number of layers.

In comes an embedding's folder (see `surgery.growth.embedding.build`) and a shape, out comes a model of a common family,
by default a Llama without layers, that every engine for that family runs. The embedding is there to the bit, and
untied; everything else is random, as transformers initialises it. After arXiv 2507.04886 and 2507.07129.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint, read_folder
from surgery.checkpoint.config_layers import language_part, spelled_out, untied, with_count
from surgery.checkpoint.dtypes import TORCH_NAMES, dtype_name
from surgery.checkpoint.safetensors_header import PYTORCH
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.tensor_roles import HIDDEN, N_LAYERS, language_config, number
from surgery.checkpoint.vocabulary import CONFIG as TOKENIZER_CONFIG
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.engine.card import CardContent, write_card
from surgery.engine.execution import execute
from surgery.engine.manifest import build_manifest, command_record, write_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, check_output, copy_tensor, plan_files
from surgery.engine.preflight import Preflight, check_space
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError, usage_error
from surgery.growth.embedding.build import TENSOR, Embedding, open_embedding
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
from surgery.io.atomic import check_free
from surgery.io.json_io import read_json
from surgery.reporting.report import Column, Table

COMMAND = "grow init"
EMBEDDING, ENDS, LAYERS = "embedding", "norm and head", "layers"
HEAD_WIDTH = 64  # of a Llama's heads, where nothing else is asked for
MLP_STEP = 64
_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class InitReport:
    """What a growth begins with.

    family: the config's model_type. vocab_size, width: of the embedding, with its hash `embedding`. trainable: the
    parameters that are not the embedding's.
    """

    out: Path
    preflight: Mapping[str, str]
    warnings: tuple[str, ...]
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
        """Parameters of the embedding."""
        return self.vocab_size * self.width

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps."""
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
        """What was made, for people."""
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
    """Writes the model that a growth on the frozen embedding `embed` begins with to the folder `out`.

    Layers, if there are to be any, are those that `surgery.growth.layers.add` would add at random to the model without
    any: the first ones of the config that is given, or, where it has fewer, of the kinds that the family has by
    default.

    Args:
        embed: a folder that `surgery grow embed` wrote.
        shape: of the model; its width is the embedding's.
        seed: of what is random.
        dtype: that everything is stored in; the embedding keeps its bytes in float32.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: the shape is impossible, or another width is said by its config; the family scales its
            embeddings, or has no head of its own; `out` exists; the disk is full.
    """
    stored_as = dtype_name(dtype)
    embedding = open_embedding(embed)
    frozen = replace(read_folder(embedding.folder), ref=embed)
    check_output(out, {EMBEDDING: frozen})
    if not dry_run:
        check_free(out, overwrite=options.overwrite)
    preflight = Preflight()
    config = _config(preflight, embedding, shape, dtype)
    preflight.errors.raise_if_any(COMMAND)
    if shape.config is not None:
        check_embedding(LayerSpec(config))
    said = shape.model_dump(mode="json", exclude_none=True)
    command = command_record(COMMAND, [], embed=embed, **said, seed=seed, dtype=dtype)
    with temporary_folder(None if dry_run else out) as folder:
        sources: dict[str, Checkpoint] = {EMBEDDING: frozen, ENDS: random_embedding_and_head(config, folder, seed=seed)}
        if shape.layers:
            kinds = {index: LayerSpec(config) for index in range(shape.layers)}
            made = random_layers(kinds, folder, seed=seed, depth=shape.layers)
            sources[LAYERS] = made.checkpoint
        planned = _planned(sources, embedding, stored_as)
        side_files = {path.name: path for path in embedding.tokenizer_files}
        plan = Plan(command, sources, plan_files(planned, metadata=PYTORCH), side_files)
        check_space(preflight, plan, out, options.threads)
        preflight.errors.raise_if_any(COMMAND)
        total = sum(tensor.inputs[0].n_elements for tensor in planned)
        report = InitReport(
            out,
            preflight.facts,
            tuple(preflight.warnings),
            str(config["model_type"]),
            shape.layers,
            embedding.vocab_size,
            embedding.width,
            embedding.hash,
            total - embedding.weight.n_elements,
            dry_run=dry_run,
        )
        if dry_run:
            return report

        def finish(folder: Path, outcome: ExecutionResult) -> InitReport:
            done = replace(report, resumed_bytes=outcome.resumed_bytes)
            write_config(folder, config)
            manifest = build_manifest(plan, outcome, kind="model", report=done.summary())
            manifest["versions"] |= transformers_version()
            write_manifest(folder, manifest)
            write_card(folder, manifest, sources, _card(done, stored_as))
            return done

        return execute(plan, out, options, finish=finish)


def llama_config(width: int, shape: ModelShape) -> dict[str, Any]:
    """A Llama of this width, as transformers 5 writes its config; what `shape` leaves open is filled in.

    Raises:
        SurgeryError: width, heads and key-value heads do not divide each other.
    """
    if width % 2:
        raise usage_error(f"the embedding is {width} wide: rotary positions turn pairs, so a width must be even")
    heads = shape.heads or _usual_heads(width)
    if width % (2 * heads):
        raise usage_error(f"{heads} heads do not divide a width of {width} into even parts", where="heads")
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


def _usual_heads(width: int) -> int:
    """The most heads of at least HEAD_WIDTH that divide the width into even parts."""
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
    part["vocab_size"] = embedding.vocab_size
    part |= _special_ids(preflight, embedding)
    for key in ("torch_dtype", "dtype"):
        config.pop(key, None)
    config["dtype"] = next(name for name, stored in TORCH_NAMES.items() if stored == dtype_name(dtype))
    return config


def _given_config(embedding: Embedding, shape: ModelShape) -> dict[str, Any]:
    """The config.json of the shape, with another number of layers, and without what it says of one model's tokens."""
    assert shape.config is not None
    where = shape.config
    said = sorted(shape.model_fields_set & {"heads", "kv_heads", "mlp", "context"})
    if said:
        raise usage_error(f"{', '.join(said)} cannot be given beside a config, which says them too", where=where)
    if not where.is_file():
        raise usage_error("no such file", where=where, hint="Give the config.json of a model.")
    config = read_json(where)
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
    held = number(whole, N_LAYERS)
    if held is None:
        raise usage_error("does not say how many layers there are", where=where)
    config = untied({key: value for key, value in config.items() if key != "quantization_config"})
    return with_count(spelled_out(config, whole, held), shape.layers)


def _special_ids(preflight: Preflight, embedding: Embedding) -> dict[str, int | None]:
    """The ids of the tokens that begin, end and fill up texts, as the tokenizer beside the embedding has them."""
    vocabulary = read_vocabulary(embedding.folder)
    found: dict[str, int | None] = dict.fromkeys(f"{name}_id" for name in _SPECIAL)
    if vocabulary is None:
        preflight.warnings.append("no tokenizer lies beside the embedding, so the model has none either")
        return found
    if vocabulary.size > embedding.vocab_size:
        preflight.errors.add(
            f"the tokenizer has ids up to {vocabulary.size - 1:,}, the embedding only {embedding.vocab_size:,} rows. "
            "Make the embedding again from this tokenizer."
        )
    settings = read_json(embedding.folder / TOKENIZER_CONFIG, missing={})
    for name in _SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        found[f"{name}_id"] = vocabulary.ids.get(token) if isinstance(token, str) else None
    return found


def _planned(sources: Mapping[str, Checkpoint], embedding: Embedding, stored_as: str) -> list[PlannedTensor]:
    ends = model_structure(sources[ENDS])
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
    tensors[name] = frozen
    return [replace(copy_tensor(tensor, dtype=stored_as), name=name) for name, tensor in sorted(tensors.items())]


def _card(report: InitReport, stored_as: str) -> CardContent:
    exact = "to the bit" if stored_as == "F32" else f"rounded to {stored_as}"
    method = (
        f"A {report.family} with {report.layers} layers on a frozen embedding (arXiv:2507.07129): its token embedding "
        f"is the given one {exact}, is not tied to the head, and is not to be trained. Everything else is random, as "
        "transformers initialises it. It is made to be grown: `surgery grow add` adds layers, `surgery grow run` "
        "trains them."
    )
    return CardContent("Model to grow", method, ("frozen-embedding", "growth"), report.table().to_markdown())
