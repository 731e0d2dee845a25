"""Models and what is asked of them: each is loaded once, and every measurement is taken of it, on tasks and on texts.

In come folders and measurements (`evaluate.on_tasks`, `perplexity.on_texts`), out come `Score`s.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import read_json
from surgery.compute import torch_device
from surgery.errors import SurgeryError, usage_error
from surgery.progress import Advance, Progress, silent
from surgery.vocab import CONFIG, FETCH_AGAIN, TOKENIZER

# The 97.5 % quantile of the normal distribution: the half-width of a 95 % interval in standard errors.
Z = 1.959963984540054
AUTO = "auto"  # as a device: wherever accelerate's device map puts the layers; as a dtype: the stored one


@dataclass(frozen=True)
class Score:
    """One metric of one model on one task or text, with its 95 % interval.

    `low` and `high` are Wilson's for a mean of zeros and ones, else `value` ± 1.96 standard errors as the harness
    estimates them (from the samples, by bootstrap for metrics that are no means, pooled for groups); NaN where it
    gives none. `metric` names the harness's filter too where the task has more than one. `n` counts samples.
    `higher_is_better` is None where nobody says.
    """

    model: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Loaded:
    """A transformers model in memory, where it is, and its tokenizer; `name` is what tables call it."""

    name: str
    model: Any
    tokenizer: Any


Measure = Callable[[Loaded], Sequence[Score]]


def score_models(
    models: Mapping[str, Path | str],
    measures: Sequence[Measure],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> list[Score]:
    """Takes every measurement of every model, one model in memory at a time; the scores model by model.

    Args:
        models: display name → folder with a model and its tokenizer.
        dtype: that the models compute in; `auto` is the one they are stored in.

    Raises:
        SurgeryError: no model was given, or one cannot be loaded; else as the measurements.
    """
    if not models:
        raise usage_error("no model to evaluate was given.")
    scores = []
    with progress("Scoring", len(models) * len(measures), "steps") as advance:
        for name, folder in models.items():
            scores += _score_model(folder, name, measures, device, dtype, advance)
    return scores


def load_model(folder: Path | str, name: str, *, device: str = "cpu", dtype: str = "auto") -> Loaded:
    """The transformers model in `folder`, ready to be run.

    Args:
        device: cpu, cuda[:N], or auto, which spreads the layers over the devices that there are.

    Raises:
        SurgeryError: it cannot be loaded; there is no such device or dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype, None)
    if dtype != AUTO and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise usage_error(f"got {dtype!r}, expected auto, float32, bfloat16 or float16", where="--dtype")
    if device != AUTO:
        torch_device(device)

    tokenizer = load_tokenizer(folder, name)
    with quiet():
        try:
            spread = {"device_map": AUTO} if device == AUTO else {}
            # Unsaid, transformers would ask on the terminal whether to run a stranger's code.
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, **spread
            ).eval()
            model = model if spread else model.to(device)
        except (OSError, ValueError) as fault:
            raise SurgeryError(f"cannot be loaded: {fault}", where=name) from fault
    return Loaded(name, model, tokenizer)


def load_tokenizer(folder: Path | str, name: str) -> Any:
    """The tokenizer in `folder`. Raises SurgeryError where it cannot be loaded, or needs code of its own."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as fault:  # the tokenizers library raises nothing narrower
            if "AutoTokenizer" in (read_json(Path(folder) / CONFIG, missing={}).get("auto_map") or {}):
                raise SurgeryError(
                    "its tokenizer needs code of its own, which is not run", where=name,
                    hint=f"Give a folder with its {TOKENIZER}, and a {CONFIG} without auto_map.",
                ) from fault  # fmt: skip
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise SurgeryError(f"its tokenizer cannot be loaded ({reason})", where=name, hint=FETCH_AGAIN) from fault


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness's and its libraries' logs, bars and warnings off the terminal; errors still get out."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _score_model(
    folder: Path | str, name: str, measures: Sequence[Measure], device: str, dtype: str, advance: Advance
) -> list[Score]:
    # A call of its own, so that the model is gone before the next one is loaded.
    loaded = load_model(folder, name, device=device, dtype=dtype)
    scores: list[Score] = []
    for measure in measures:
        scores += measure(loaded)
        advance(1)
    return scores
