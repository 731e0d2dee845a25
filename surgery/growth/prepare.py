"""Check a growth plan against what it names before anything is written: model or embedding, texts, run folder.

The result is a `PreparedRun` that can be grown, or one error with everything that is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.checkpoint.config.model_config import number, read_config
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import model_structure
from surgery.engine.manifest import input_entry
from surgery.engine.verification import tensor_hashes
from surgery.errors import ErrorList, SurgeryError, listing, usage_error
from surgery.evaluation.perplexity import Text
from surgery.growth.data.corpus import documents
from surgery.growth.embedding.embedding_folder import open_embedding
from surgery.growth.embedding.token_text import open_tokenizer
from surgery.growth.plan import GrowthPlan, ModelShape, read_plan
from surgery.growth.results import RESULTS
from surgery.io.hashing import KEY, hash_text
from surgery.io.safe_paths import kind_of
from surgery.runtime.environment import n_processes

COMMAND = "grow run"
TOKENS = "tokens"
LOCK = ".lock"  # while a process trains in the folder
# Parts of a plan that are not in a run's key: they change no weights, or their content is hashed instead of their path;
# stages have keys of their own.
NOT_IN_KEY: dict[str, Any] = {
    **dict.fromkeys(("evaluate", "stages", "embed", "start", "corpus", "special_tokens"), True),
    "cache": {"use", "disk", "folder"},
    "model": {"config"},
}


@dataclass(frozen=True)
class PreparedRun:
    """A run whose plan was checked: what it starts from, and where its tokens come from.

    key: hash of everything before the first stage. layers: of the model it starts from. width: of its embedding. texts:
    what stages are measured on. facts: checked properties, as (label, value) for people. inputs: what it starts from,
    as entries of manifests.
    """

    plan: GrowthPlan
    run: Path
    key: str
    layers: int
    width: int
    vocab_size: int
    tokenizer: Any
    texts: tuple[Text, ...]
    facts: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, Any]]


def load_plan(
    ref: str,
    *,
    embed: str | None = None,
    corpus: Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int | None = None,
) -> GrowthPlan:
    """Read the plan `ref` (see `surgery.growth.plan.read_plan`), with the given arguments in place of its own values.

    Example:
        plan = surgery.load_plan("small", embed="EMB", corpus=["lab:python/code"])

    Raises:
        SurgeryError: as `read_plan`; neither the plan nor the arguments say what to begin with, or what to train on.
    """
    # Arguments replace values of the plan before it is checked, so that a plan may leave out what is always given.
    plan, _ = read_plan(ref)
    changed: dict[str, Any] = {}
    if embed is not None:
        changed |= {"embed": embed, "start": None}
    if corpus:
        changed["corpus"] = tuple(corpus)
    if tokens is not None:
        changed["stages"] = tuple(stage.model_copy(update={"tokens": tokens}) for stage in plan.stages)
    if seed is not None:
        changed["seed"] = seed
    plan = plan.model_copy(update=changed)
    if (plan.embed is None) == (plan.start is None):
        raise usage_error(
            "says neither embed nor start" if plan.embed is None else "says both embed and start",
            where=ref,
            hint="Say one: embed: EMB (or --embed EMB) to begin on a frozen embedding, or start: MODEL to deepen one.",
        )
    if plan.start is not None and plan.model is not None:
        raise usage_error("says the shape of a model beside start, whose shape it is", where=ref, hint="Drop `model`.")
    if not plan.corpus:
        raise usage_error("names no corpus", where=ref, hint="Say corpus: in it, or give --corpus.")
    return plan


def prepare_run(plan: GrowthPlan, run: Path) -> PreparedRun:
    """Check all of `plan` against what it names, and against what exists in `run`; nothing is written.

    Example:
        prepared = surgery.prepare_run(plan, Path("RUN"))

    Raises:
        SurgeryError: with every error that was found: a stage that adds layers where none can be, a batch that the
            processes cannot share, an embedding of another tokenizer, a missing text, a run of another plan.
    """
    _check_folder(run)
    start = _frozen_embedding(plan) if plan.embed is not None else _start_model(plan)
    errors = ErrorList()
    tokenizer = _tokenizer(start, errors)
    depth = _check_stages(plan, start.layers, errors)
    _check_context(plan, errors)
    _check_corpus(plan, errors)
    texts = tuple(_evaluation_text(ref, plan, errors) for ref in plan.evaluate.texts)
    errors.raise_if_any(COMMAND)
    total = sum(steps * plan.batch * plan.sequence for steps in plan.steps_of)
    facts = {
        "begins with": start.description,
        "stages": f"{len(plan.expanded)}, from {start.layers} to {depth} layers",
        "tokens": f"{total:,} in all, in windows of {plan.sequence:,}",
        "corpus": listing(plan.corpus, 3),
    }
    config = read_config(plan.model.config) if plan.model and plan.model.config else None
    key = content_key(start.key, plan.model_dump(mode="json", exclude=NOT_IN_KEY), config)
    return PreparedRun(
        plan, run, key, start.layers, start.width, start.vocab_size, tokenizer, texts, facts, start.inputs
    )


@dataclass(frozen=True)
class _Start:
    """What a plan begins with: a frozen embedding, or a model. key: hash of its weights."""

    folder: Path
    key: str
    layers: int
    width: int
    vocab_size: int
    inputs: Mapping[str, Mapping[str, Any]]
    description: str


def _frozen_embedding(plan: GrowthPlan) -> _Start:
    embedding = open_embedding(str(plan.embed))
    entry = {**dict.fromkeys(("repo_id", "revision")), "ref": plan.embed, KEY: embedding.hash}
    return _Start(
        embedding.folder,
        embedding.hash,
        (plan.model or ModelShape()).layers,
        embedding.width,
        embedding.vocab_size,
        {"embedding": entry},
        f"{plan.embed}: {embedding.vocab_size:,} tokens × {embedding.width:,}, frozen",
    )


def _start_model(plan: GrowthPlan) -> _Start:
    model = open_checkpoint(str(plan.start))
    structure = model_structure(model)
    if model.folder is None:
        raise usage_error("is no model folder, which can be trained", where=plan.start)
    # Hashing a large model takes a while, but results of an earlier run must not be reused if it was changed.
    entry = input_entry(model, tensor_hashes(model))
    width = structure.hidden_size or 0
    return _Start(
        model.folder,
        str(entry[KEY]),
        structure.layers,
        width,
        structure.vocab_size or 0,
        {"start": entry},
        f"{plan.start}: {structure.layers} layers of width {width:,}",
    )


def content_key(*parts: Any) -> str:
    """Return one hash over everything in `parts` (JSON values)."""
    return hash_text(json.dumps(parts, sort_keys=True))


def start_shape(plan: GrowthPlan, *, layers: int) -> ModelShape:
    """Return the shape of the model that a plan with `embed` begins with.

    Its context is the length of the training windows unless the plan says otherwise.
    """
    shape = plan.model or ModelShape()
    has_context = shape.config is not None or "context" in shape.model_fields_set
    return shape.model_copy(update={"layers": layers} | ({} if has_context else {"context": plan.sequence}))


def _check_folder(run: Path) -> None:
    if not run.is_dir() and os.path.lexists(run):
        kind = "a link to nothing" if run.is_symlink() else kind_of(run.stat().st_mode)
        raise usage_error(f"is {kind}, expected a folder", where=run)
    # A run that was killed in its first stage has tokens and no results yet; before that, only its lock.
    holds_more = run.exists() and any(path.name != LOCK for path in run.iterdir())
    if holds_more and not (run / RESULTS).exists() and not (run / TOKENS).exists():
        raise usage_error("is not empty, and no growth", where=run, hint="Choose another folder.")


def _tokenizer(start: _Start, errors: ErrorList) -> Any:
    tokenizer = open_tokenizer(str(start.folder)).tokenizer
    if tokenizer.eos_token_id is None:
        errors.add("its tokenizer has no end-of-text token, which separates documents.", where=start.folder, usage=True)
    if len(tokenizer) > start.vocab_size:
        errors.add(
            f"its tokenizer has {len(tokenizer):,} tokens, the embedding {start.vocab_size:,} rows",
            where=start.folder,
            hint="Make the embedding of this tokenizer.",
            usage=True,
        )
    return tokenizer


def _check_stages(plan: GrowthPlan, layers: int, errors: ErrorList) -> int:
    """Add an error for every impossible stage; return the number of layers at the end."""
    for index, stage in enumerate(plan.expanded, start=1):
        if isinstance(stage.at, int) and stage.add and stage.at > layers:
            errors.add(
                f"stage {index} adds layers before layer {stage.at}, where there are {layers}: use top.", usage=True
            )
        if stage.init == "copy" and stage.add and not layers:
            errors.add(f"stage {index} copies layers, where there are none yet: use identity or random.", usage=True)
        layers += stage.add
        if not layers:
            errors.add(f"stage {index} trains a model without any layer: let it add some.", usage=True)
        # Every process takes equally many windows of a batch, in equally large micro-batches.
        parts = n_processes() * (stage.training or plan.training).accumulate
        if plan.batch % parts:
            errors.add(
                f"stage {index}: a batch of {plan.batch} windows cannot be divided into {parts} parts.", usage=True
            )
    return layers


def _check_context(plan: GrowthPlan, errors: ErrorList) -> None:
    config = open_checkpoint(str(plan.start)).config if plan.start else {}
    if plan.model is not None and plan.model.config is not None:
        config = read_config(plan.model.config)
    stated = number(config, ("max_position_embeddings",))
    context = stated if config else start_shape(plan, layers=0).context
    if context is not None and plan.sequence > context:
        errors.add(
            f"windows of {plan.sequence:,} tokens do not fit into the model's context of {context:,}.", usage=True
        )


def _check_corpus(plan: GrowthPlan, errors: ErrorList) -> None:
    """Add an error where the corpus does not exist or holds no text; only its first document is read."""
    try:
        # Reading all of it would take as long as tokenising it.
        next(documents(plan.corpus, field=plan.field))
    except SurgeryError as error:
        errors.add(str(error), usage=True)
    except StopIteration:
        errors.add("holds no text to learn from.", where=listing(plan.corpus), usage=True)


def _evaluation_text(ref: str, plan: GrowthPlan, errors: ErrorList) -> Text:
    texts: list[str] = []
    try:
        # Only what will be used: a corpus may be of any size.
        texts = [document.text for document in islice(documents([ref], field=plan.field), plan.evaluate.limit)]
        if not texts:
            errors.add("holds no text to be measured on.", where=ref, usage=True)
    except SurgeryError as error:
        errors.add(str(error), usage=True)
    return Text(ref, texts, plan.special_tokens)
