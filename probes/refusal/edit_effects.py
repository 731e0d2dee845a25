"""Measure what an edit of heads does to a model's answers, before the edited checkpoint is committed.

Both models answer the same prompts. Measured are: refusals by topic, KL divergence and perplexity against the
original, and thinking that never closes. A result in which refusal of harmful prompts fell is rejected, unless forced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from probes.data.examples import Example
from probes.data.markers import never_closed
from probes.data.preparation import GenerationOptions, make_labeler, open_model, resolve_markers
from probes.side_effects.compare import (
    TOPICS,
    EffectRow,
    counts_text,
    divergence_by_topic,
    divergence_rows,
    effects_table,
    generate_answers,
    manifest_record,
    share_text,
)
from probes.side_effects.effects import Rate, refusal_rates
from surgery.edits.common import EditNotes
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError
from surgery.reporting.report import Table


@dataclass(frozen=True)
class HeadEffects:
    """Measures of the original and the edited model, in this order.

    refusal: topic → shares of prompts that are refused.
    kl, perplexity: by topic; see `probes.side_effects.compare.divergence_by_topic`.
    never_closed: shares of answers whose thinking never closed.
    """

    refusal: Mapping[str, tuple[Rate, Rate]]
    kl: Mapping[str, tuple[float, float, float]]
    perplexity: Mapping[str, tuple[float, float]]
    never_closed: tuple[Rate, Rate]

    def table(self) -> Table:
        """Return a table with a row per measure."""
        rows: list[EffectRow] = []
        for topic, (before, after) in self.refusal.items():
            rows.append(
                (f"refusal of {topic} prompts", share_text(before), share_text(after), counts_text(before, after))
            )
        rows += divergence_rows(self.kl, self.perplexity)
        before, after = self.never_closed
        rows.append(("thinking never closed", share_text(before), share_text(after), counts_text(before, after)))
        return effects_table(rows)


class HeadEffectMeasurement:
    """Compares an edited checkpoint with the original; called with the folder of the edited one.

    effects: what was measured; None before the call.
    """

    def __init__(
        self,
        model: str,
        ref: str,
        prompts: Sequence[Example],
        generation: GenerationOptions,
        *,
        dtype: str,
        force: bool,
        options: ExecutionOptions,
    ) -> None:
        """Prepare the measurement.

        Args:
            model: the original's reference. ref: its name in errors.
            prompts: examples without thinking and response.
            force: accept a result in which refusal fell.

        Raises:
            SurgeryError: the phrase file or the guard of `generation` is wrong: before the edit is written.
        """
        self._model, self._ref, self._prompts, self._generation = model, ref, prompts, generation
        self._dtype, self._force, self._options = dtype, force, options
        self._label = make_labeler(generation, device=options.device, progress=options.progress)
        self.effects: HeadEffects | None = None

    def __call__(self, folder: Path) -> EditNotes:
        """Measure the checkpoint in `folder`. Raises SurgeryError if refusal of harmful prompts fell."""
        options, generation = self._options, self._generation
        original = open_model(self._model, device=options.device, dtype=self._dtype)
        edited = open_model(folder, device=options.device, dtype=self._dtype, name="the edited model")
        # The edited model has the same tokenizer, and so the same markers.
        markers = resolve_markers(original, generation)
        # From the bare prompts: the edit may change the thinking as well as the answer.
        answers = [generate_answers(live, self._prompts, generation, markers, options) for live in (original, edited)]
        unfinished = [{row.key for row in never_closed(rows)} for rows in answers]
        # Unfinished answers have no verdict: they are counted by themselves, or they would pass for compliance.
        labelled = [
            self._label([row for row in rows if row.key not in keys])
            for rows, keys in zip(answers, unfinished, strict=True)
        ]
        before, after = (refusal_rates(rows) for rows in labelled)
        flags = [[row.key in keys for row in rows] for rows, keys in zip(answers, unfinished, strict=True)]
        kl, perplexity = divergence_by_topic(original, edited, labelled[0], markers, options)
        effects = HeadEffects(
            refusal={topic: (before[topic], after[topic]) for topic in TOPICS if topic in before and topic in after},
            kl=kl,
            perplexity=perplexity,
            never_closed=(Rate.of(flags[0]), Rate.of(flags[1])),
        )
        if not self._force:
            _reject_lower_refusal(effects, self._ref)
        self.effects = effects
        return EditNotes(manifest_record(effects), effects.table().to_markdown())


def _reject_lower_refusal(effects: HeadEffects, ref: str) -> None:
    before, after = effects.refusal.get("harmful", (None, None))
    if before is None or after is None:
        raise SurgeryError(
            "no harmful prompt came to an answer in both models, so that it cannot be seen whether refusal fell",
            where=ref,
            hint="Raise --max-new-tokens, or add --force.",
        )
    if after.value < before.value:
        raise SurgeryError(
            f"refusal of harmful prompts fell from {before.value:.1%} to {after.value:.1%} (n = {after.n}), so the "
            "result is not kept",
            where=ref,
            hint="These heads hold refusal up: choose others, or add --force.",
        )
