"""Measure what an edit of experts does to a model's answers, before the edited checkpoint is committed.

Both models answer the same prompts. Measured are: answers that end in a repetition, thinking that never closes, the
length of answers, and KL divergence and perplexity against the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from probes.data.examples import Example
from probes.data.markers import never_closed
from probes.data.preparation import GenerationOptions, open_model, resolve_markers
from probes.experts.repetition import is_repetitive
from probes.side_effects.compare import (
    EffectRow,
    counts_text,
    divergence_by_topic,
    divergence_rows,
    effects_table,
    generate_answers,
    manifest_record,
    share_text,
)
from probes.side_effects.effects import Rate
from surgery.edits.common import EditNotes
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError
from surgery.models.loaded_model import LoadedModel
from surgery.reporting.report import Table

# How much the share of answers that end in a loop may grow before the result is rejected.
MAX_MORE_LOOPS = 0.1


@dataclass(frozen=True)
class ExpertEffects:
    """Measures of the original and the edited model, in this order.

    loops: shares of answers that end in a repetition.
    never_closed: shares of answers whose thinking never closed.
    tokens: mean lengths of an answer.
    kl, perplexity: by topic; see `probes.side_effects.compare.divergence_by_topic`.
    """

    loops: tuple[Rate, Rate]
    never_closed: tuple[Rate, Rate]
    tokens: tuple[float, float]
    kl: Mapping[str, tuple[float, float, float]]
    perplexity: Mapping[str, tuple[float, float]]

    def table(self) -> Table:
        """Return a table with a row per measure."""
        rows: list[EffectRow] = []
        for name, (before, after) in (
            ("answers that end in a loop", self.loops),
            ("thinking never closed", self.never_closed),
        ):
            rows.append((name, share_text(before), share_text(after), counts_text(before, after)))
        rows.append(("tokens of an answer", f"{self.tokens[0]:.1f}", f"{self.tokens[1]:.1f}", None))
        rows += divergence_rows(self.kl, self.perplexity)
        return effects_table(rows)


@dataclass
class ExpertEffectMeasurement:
    """Compares an edited checkpoint with the original; called with the folder of the edited one.

    model: the original's reference. ref: its name in errors.
    prompts: examples without thinking and response.
    force: accept a result whose answers collapse.
    effects: what was measured; None before the call.
    """

    model: str
    ref: str
    prompts: Sequence[Example]
    generation: GenerationOptions
    dtype: str
    force: bool
    options: ExecutionOptions
    effects: ExpertEffects | None = None

    def __call__(self, folder: Path) -> EditNotes:
        """Measure the checkpoint in `folder`. Raises SurgeryError if its answers collapse into repetition."""
        original = open_model(self.model, device=self.options.device, dtype=self.dtype)
        edited = open_model(folder, device=self.options.device, dtype=self.dtype, name="the edited model")
        markers = resolve_markers(original, self.generation)
        answers = generate_answers(original, self.prompts, self.generation, markers, self.options)
        edited_answers = generate_answers(edited, self.prompts, self.generation, markers, self.options)
        unfinished = {row.key for row in never_closed(answers)}
        finished = [row for row in answers if row.key not in unfinished]
        # On the original's answers: the edited model's own would hide where it has gone astray.
        kl, perplexity = divergence_by_topic(original, edited, finished, markers, self.options)
        # Both models' answers are tokenised by the original's tokenizer, so that their lengths can be compared.
        effects = ExpertEffects(
            loops=(_loop_rate(original, answers), _loop_rate(original, edited_answers)),
            never_closed=(_never_closed_rate(answers), _never_closed_rate(edited_answers)),
            tokens=(_mean_length(original, answers), _mean_length(original, edited_answers)),
            kl=kl,
            perplexity=perplexity,
        )
        if not self.force:
            _reject_loops(effects, self.ref)
        self.effects = effects
        return EditNotes(manifest_record(effects), effects.table().to_markdown())


def _reject_loops(effects: ExpertEffects, ref: str) -> None:
    before, after = effects.loops
    if after.value > before.value + MAX_MORE_LOOPS:
        raise SurgeryError(
            f"{after.value:.1%} of its answers end in a loop, {before.value:.1%} of the original's (n = {after.n}), "
            "so the result is not kept",
            where=ref,
            hint="Use a smaller --scale or fewer experts, or add --force.",
        )


def _generated_ids(live: LoadedModel, row: Example) -> list[int]:
    text = f"{row.thinking or ''}{row.closing or ''}{row.response or ''}"
    # Without special tokens: a BOS would count as a token of every answer.
    ids: list[int] = live.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _loop_rate(live: LoadedModel, rows: Sequence[Example]) -> Rate:
    return Rate.of([is_repetitive(_generated_ids(live, row)) for row in rows])


def _never_closed_rate(rows: Sequence[Example]) -> Rate:
    unfinished = {row.key for row in never_closed(rows)}
    return Rate.of([row.key in unfinished for row in rows])


def _mean_length(live: LoadedModel, rows: Sequence[Example]) -> float:
    return sum(len(_generated_ids(live, row)) for row in rows) / len(rows)
