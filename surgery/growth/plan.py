"""The plan of a growth (YAML): which layers are added when, how they are initialised, what trains, how long, on what.

`read_plan` parses it into a `GrowthPlan`. Two schedules of arXiv 2507.07129 ship in `plans/`: one block at a time for
six stages, and three blocks at a time for three.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from surgery.errors import listing, usage_error
from surgery.growth.choices import LayerInit, LayerPosition
from surgery.io.json_records import Strict
from surgery.io.yaml_models import dump_yaml, n_bytes, parse_model, read_text
from surgery.models.choices import SpecialTokens

TrainableParts = Literal["new", "head", "norm", "lora", "embedding", "all"]
# Ten times what anybody has trained so; without a bound a plan of one line fills the memory.
MOST_STAGES, MOST_LAYERS = 1_000, 1_000
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# In YAML, a list of one name may be written without brackets.
_LISTED = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
Names = Annotated[tuple[str, ...], _LISTED]

PLANS = "plans"
PLAN = "plan.yml"  # the plan of a run, in its folder and in those of its stages


# Field names of these classes are keys of plan.yml, growth records and manifests: renaming one breaks existing files.
class ModelShape(Strict):
    """The shape of the Llama that is grown.

    hidden: its width, by default the embedding's, which it must equal. heads: of queries. kv_heads: of keys and values,
    by default as many. mlp: the MLP's inner width, by default 8/3 of the width, rounded up to a multiple of 64.
    context: positions. layers: before the first stage. config: a config.json that gives everything else, and the
    family.
    """

    hidden: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    mlp: PositiveInt | None = None
    context: PositiveInt = 1024
    layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 0
    config: Path | None = None


class StageTraining(Strict):
    """Optimizer settings: AdamW (arXiv 1711.05101) with gradient clipping.

    learning_rate: the peak. warmup: fraction of a stage's steps in which it rises linearly. decay: what follows, down
    to `final_rate` of the peak. weight_decay: of matrices. clip: the largest gradient norm. accumulate: number of
    micro-batches that a process computes a batch in.
    """

    learning_rate: PositiveFloat = 1e-3
    warmup: Share = 0.02
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_rate: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    clip: PositiveFloat = 1.0
    accumulate: PositiveInt = 1


class Lora(Strict):
    """Low-rank updates of frozen layers (arXiv 2106.09685): W + (alpha / rank)·B·A, merged into W after the stage."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0


class Plateau(Strict):
    """End a stage once the mean loss of the last `tokens` is not `by` nats below that of the `tokens` before."""

    tokens: PositiveInt
    by: Annotated[float, Field(ge=0)] = 0.005


class GrowthStage(Strict):
    """One stage: layers are added, and some of the model is trained.

    add: number of layers; 0 only trains. at: top (the default), middle, or the number of the layer before which they
    are inserted. init: identity (they add zero to the residual stream at first, so that the loss does not change),
    random (as in the paper), or copy (of the layers below). train: new (the added layers), head, norm (the final one),
    lora (low-rank updates of the layers below), embedding, or all. tokens: the most that are trained on. plateau: stops
    earlier. data: repeat starts the corpus again (which lets the prefix cache work), continue reads on where the last
    stage stopped. times: how often the stage is repeated.
    """

    add: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 1
    at: LayerPosition = "top"
    init: LayerInit = "identity"
    train: Annotated[tuple[TrainableParts, ...], _LISTED] = ("new", "head", "norm")
    tokens: PositiveInt
    plateau: Plateau | None = None
    data: Literal["repeat", "continue"] = "repeat"
    training: StageTraining | None = None
    lora: Lora = Lora()
    times: PositiveInt = 1

    @field_validator("at", mode="before")
    @classmethod
    def _known_place(cls, at: object) -> object:
        # bool is an int, and YAML reads `yes` as True: so no isinstance.
        if at in ("top", "middle") or (type(at) is int and at >= 0):
            return at
        raise ValueError(f"got {at!r}, expected top, middle, or the number of a layer")

    @field_validator("train")
    @classmethod
    def _something_trains(cls, train: tuple[TrainableParts, ...]) -> tuple[TrainableParts, ...]:
        if not train:
            raise ValueError("nothing trains; name new, head, norm, lora, embedding or all")
        # Both together would train the same matrices twice.
        if {"lora", "all"} <= set(train):
            raise ValueError("got lora beside all, which trains the layers themselves")
        return train

    @model_validator(mode="after")
    def _new_needs_layers(self) -> GrowthStage:
        if not self.add and set(self.train) == {"new"}:
            raise ValueError("trains new layers, but adds none")
        return self


class CacheSettings(Strict):
    """The prefix cache: the output of the frozen layers below the new ones, stored on disk.

    use: auto decides by a benchmark. dtype: of the stored states. disk: its largest size, such as 20 GB. folder: in
    which every run has a subfolder; by default it is in the run's folder. It is deleted once the run is done.
    """

    use: Literal["auto", "on", "off"] = "auto"
    # float32 stores states exactly; bfloat16 takes half the space and rounds them.
    dtype: Literal["float32", "bfloat16"] = "float32"
    disk: PositiveInt = 20 * 10**9
    folder: Path | None = None

    @field_validator("disk", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return n_bytes(value) if isinstance(value, str) else value


class Evaluation(Strict):
    """What every stage is measured on: texts (perplexity), and tasks of the evaluation harness.

    limit: the most documents of a text, or samples of a task.
    """

    texts: Names = ()
    tasks: Names = ()
    limit: PositiveInt | None = 200


class GrowthPlan(Strict):
    """A whole growth.

    embed: a frozen embedding (`surgery grow embed`), on which a model of the shape `model` is created; or start:
    the model that is deepened. corpus: texts, see `surgery.growth.data.corpus`. field: the column of a corpus's
    records with the text. special_tokens: what the text of a special token in the corpus is, text or that token.
    sequence: tokens in a window. batch: windows in an optimizer step. dtype: of stored checkpoints.
    """

    embed: str | None = None
    model: ModelShape | None = None
    start: str | None = None
    corpus: Names = ()
    field: str = "text"
    special_tokens: SpecialTokens = "text"
    sequence: PositiveInt = 256
    batch: PositiveInt = 16
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    training: StageTraining = StageTraining()
    stages: tuple[GrowthStage, ...]
    cache: CacheSettings = CacheSettings()
    evaluate: Evaluation = Evaluation()

    @field_validator("stages")
    @classmethod
    def _at_least_one(cls, stages: tuple[GrowthStage, ...]) -> tuple[GrowthStage, ...]:
        if not stages:
            raise ValueError("holds no stage")
        if sum(stage.times for stage in stages) > MOST_STAGES:
            raise ValueError(f"holds more than {MOST_STAGES:,} stages, repetitions counted")
        return stages

    @property
    def expanded(self) -> tuple[GrowthStage, ...]:
        """The stages one by one, repetitions written out, each with its optimizer settings."""
        return tuple(
            # A stage without settings of its own gets those of the plan, so that its key covers them.
            stage.model_copy(update={"times": 1, "training": stage.training or self.training})
            for stage in self.stages
            for _ in range(stage.times)
        )

    @property
    def steps_of(self) -> tuple[int, ...]:
        """Optimizer steps of each stage: the smallest number that covers its tokens."""
        return tuple(-(-stage.tokens // (self.sequence * self.batch)) for stage in self.expanded)


def plan_names() -> list[str]:
    """Return the names of the plans that ship with the tool."""
    return sorted(path.name.removesuffix(".yml") for path in _shipped().iterdir() if path.name.endswith(".yml"))


def read_plan(ref: str) -> tuple[GrowthPlan, str]:
    """Read the plan in the file `ref`, or the shipped one of that name; return it and its text.

    Raises:
        SurgeryError: there is neither; the file is not a plan (with every error, its line and key).
    """
    path = Path(ref)
    if path.is_file():
        text, where = read_text(path), ref
    elif ref in plan_names():
        text, where = (_shipped() / f"{ref}.yml").read_text(encoding="utf-8"), f"{ref}.yml"
    else:
        raise usage_error("no such plan", where=ref, hint=f"Give a YAML file, or one of {listing(plan_names())}.")
    return parse_model(text, where, GrowthPlan), text


def plan_text(plan: GrowthPlan) -> str:
    """Return the YAML text of `plan`, without defaults."""
    return dump_yaml(plan.model_dump(mode="json", exclude_defaults=True))


def _shipped() -> resources.abc.Traversable:
    return resources.files("surgery.growth") / PLANS
