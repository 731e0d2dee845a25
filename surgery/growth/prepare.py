"""A plan is held against what it names before anything is written: the model or embedding, the texts, the run's folder.

In comes a plan (see `schedule`), out comes a `PreparedRun` that can be grown; or every fault at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.tensor_roles import number
from surgery.engine.manifest import input_entry
from surgery.engine.verification import tensor_hashes
from surgery.errors import SurgeryError, listing, usage_error
from surgery.evaluation.perplexity import Text
from surgery.growth.data.corpus import documents
from surgery.growth.embedding.build import open_embedding
from surgery.growth.embedding.token_strings import open_tokenizer
from surgery.growth.plan import GrowthPlan, ModelShape, read_plan
from surgery.growth.results import RESULTS
from surgery.io.hashing import KEY, hash_text
from surgery.io.json_io import read_json
from surgery.runtime.environment import n_processes

COMMAND = "grow run"
TOKENS = "tokens"
# What of a plan changes no weights, or is known by its content, wherever it lies; stages have keys of their own.
FREE: dict[str, Any] = {
    **dict.fromkeys(("evaluate", "stages", "embed", "start", "corpus"), True),
    "cache": {"use", "disk", "folder"},
    "model": {"config"},
}


@dataclass(frozen=True)
class PreparedRun:
    """A run whose plan fits: what it starts from, and where its tokens come from.

    key: hash of what comes before the first stage. layers: of the model it starts from. width: of its embedding. texts:
    what stages are measured on. facts: what was checked. made_from: what it begins with, as manifests name it.
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
    made_from: Mapping[str, Mapping[str, Any]]


def load_plan(
    ref: str,
    *,
    embed: str | None = None,
    corpus: Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int | None = None,
) -> GrowthPlan:
    """The plan `ref` (see `schedule.read_plan`), with what is given here in place of what it says.

    Raises:
        SurgeryError: as reading it; it says neither here nor there what it begins with, or what it trains on.
    """
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
    """Checks all of `plan` against what it names, and against what lies in `run`; nothing is written.

    Raises:
        SurgeryError: with every fault that was found: a stage that adds layers where none can be, a batch that the
            processes cannot share, an embedding of another tokenizer, a text that is missing, a run of another plan.
    """
    if run.exists() and not run.is_dir():
        raise usage_error("is a file, expected a folder", where=run)
    if run.exists() and any(run.iterdir()) and not (run / RESULTS).exists() and not (run / TOKENS).exists():
        raise usage_error("is not empty, and no growth", where=run, hint="Choose another folder.")
    faults: list[str] = []
    if plan.embed is not None:
        embedding = open_embedding(plan.embed)
        folder, key, layers = embedding.folder, embedding.hash, (plan.model or ModelShape()).layers
        width, vocab_size = embedding.width, embedding.vocab_size
        made_from = {"embedding": {**dict.fromkeys(("repo_id", "revision")), "ref": plan.embed, KEY: embedding.hash}}
        what = f"{plan.embed}: {vocab_size:,} tokens × {width:,}, frozen"
    else:
        start = open_checkpoint(str(plan.start))
        structure = model_structure(start)
        if start.folder is None:
            raise usage_error("is no model folder, which can be trained", where=plan.start)
        made_from = {"start": input_entry(start, tensor_hashes(start))}
        folder, key, layers = start.folder, str(made_from["start"][KEY]), structure.layers
        width, vocab_size = structure.hidden_size or 0, structure.vocab_size or 0
        what = f"{plan.start}: {layers} layers of width {width:,}"
    tokenizer = open_tokenizer(str(folder)).tokenizer
    if tokenizer.eos_token_id is None:
        faults.append(f"{folder}: its tokenizer has no end-of-text token, which separates documents.")
    if len(tokenizer) > vocab_size:
        faults.append(
            f"{folder}: its tokenizer has {len(tokenizer):,} tokens, the embedding {vocab_size:,} rows. Make the "
            "embedding of this tokenizer."
        )
    depth = _check_stages(plan, layers, faults)
    _check_context(plan, open_checkpoint(str(plan.start)) if plan.start else None, faults)
    _check_corpus(plan, faults)
    texts = tuple(_text(ref, plan, faults) for ref in plan.evaluate.texts)
    if faults:
        raise usage_error("\n  ".join(faults), where=COMMAND)
    total = sum(steps * plan.batch * plan.sequence for steps in plan.steps_of)
    facts = {
        "begins with": what,
        "stages": f"{len(plan.expanded)}, from {layers} to {depth} layers",
        "tokens": f"{total:,} in all, in windows of {plan.sequence:,}",
        "corpus": listing(plan.corpus, 3),
    }
    config = read_json(plan.model.config) if plan.model and plan.model.config else None
    key = key_of(key, plan.model_dump(mode="json", exclude=FREE), config)
    return PreparedRun(plan, run, key, layers, width, vocab_size, tokenizer, texts, facts, made_from)


def key_of(*parts: Any) -> str:
    """The hash that stands for everything in `parts`."""
    return hash_text(json.dumps(parts, sort_keys=True))


def shape_of(plan: GrowthPlan, *, layers: int) -> ModelShape:
    """The shape of the model that a plan with `embed` begins with; its context is the windows' unless the plan says."""
    shape = plan.model or ModelShape()
    own = shape.config is not None or "context" in shape.model_fields_set
    return shape.model_copy(update={"layers": layers} | ({} if own else {"context": plan.sequence}))


def _check_stages(plan: GrowthPlan, layers: int, faults: list[str]) -> int:
    """Adds a fault for every stage that cannot be; returns how many layers there are at the end."""
    for index, stage in enumerate(plan.expanded, start=1):
        if isinstance(stage.at, int) and stage.add and stage.at > layers:
            faults.append(f"stage {index} adds layers before layer {stage.at}, where there are {layers}: use top.")
        if stage.init == "copy" and stage.add and not layers:
            faults.append(f"stage {index} copies layers, where there are none yet: use identity or random.")
        layers += stage.add
        if not layers:
            faults.append(f"stage {index} trains a model without any layer: let it add some.")
        parts = n_processes() * (stage.training or plan.training).accumulate
        if plan.batch % parts:
            faults.append(f"stage {index}: a batch of {plan.batch} windows cannot be divided into {parts} parts.")
    return layers


def _check_context(plan: GrowthPlan, start: Checkpoint | None, faults: list[str]) -> None:
    config = start.config if start else {}
    if plan.model is not None and plan.model.config is not None:
        config = read_json(plan.model.config)
    stated = number(config, ("max_position_embeddings",))
    context = stated if config else shape_of(plan, layers=0).context
    if context is not None and plan.sequence > context:
        faults.append(f"windows of {plan.sequence:,} tokens do not fit into the model's context of {context:,}.")


def _check_corpus(plan: GrowthPlan, faults: list[str]) -> None:
    """Adds a fault where the corpus is not there or holds no text; only its first document is read."""
    try:
        next(documents(plan.corpus, field=plan.field))
    except SurgeryError as error:
        faults.append(str(error))
    except StopIteration:
        faults.append(f"{listing(plan.corpus)}: holds no text to learn from.")


def _text(ref: str, plan: GrowthPlan, faults: list[str]) -> Text:
    found: list[str] = []
    try:
        # Only what will be used: a corpus may be of any size.
        found = [document.text for document in islice(documents([ref], field=plan.field), plan.evaluate.limit)]
        if not found:
            faults.append(f"{ref}: holds no text to be measured on.")
    except SurgeryError as error:
        faults.append(str(error))
    return Text(ref, found)
