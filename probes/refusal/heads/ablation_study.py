"""Ablate heads one by one, in greedily growing sets, and in random sets, and measure what each does to the model.

Single heads are measured by the probe's logit. Sets are measured by the probe's score, by the refusals among the
model's answers, and by their side effects on harmless answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.data.choices import AblationKind
from probes.data.examples import Example, TokenSequence
from probes.data.generation import context_length
from probes.data.preparation import make_labeler, options_from_findings
from probes.data.records import IntervalRecord, interval_record, read_examples
from probes.data.tokenization import build_sequences
from probes.model.ablation import Ablation, AblationSweep, ablate_each_head, all_heads
from probes.model.activations import hidden_states_at
from probes.refusal.findings import HEADS, GreedyStepRecord
from probes.refusal.heads.attribution import head_inputs
from probes.refusal.probed_model import ProbedModel
from probes.side_effects.effects import ComparedModel, Rate, greedy_answers, measure_divergence
from surgery.checkpoint.selectors import Head
from surgery.checkpoint.tensor_file import load_tensors
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.evaluation.statistics import bootstrap_mean
from surgery.io.safe_paths import contained_file

HARMLESS = "harmless/complied"
# A head that adds less than this share of what the set has gained already is not worth its side effects.
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class ProofOptions:
    """How `prove_heads` ablates heads.

    Args:
        top: how many of the lowest heads of the screen are candidates for sets, as a share or a count; at least 6, and
            no more than half of all heads, so that as many are left for the random sets.
        kind: z ← scale · z; z ← its mean over the scored examples; or z ← that of a harmless example (resample).
        scale: γ of kind `scale`; 0 removes.
        positions: where single heads are ablated: so many last positions before the answer, or None for all. Sets
            are always ablated at all positions, as baking does; sets of kind `resample`, which cannot be baked, are
            scaled.
        budget: KL(original ‖ ablated) on harmless answers that no set may exceed, in nats per token.
        controls: random sets, of heads that are no candidates.
        examples: at most so many of each kind.
        seed: of the random sets and of the donors of `resample`.
    """

    top: str = "5%"
    kind: AblationKind = "scale"
    scale: float = 0.0
    positions: int | None = 4
    budget: float = 0.1
    controls: int = 5
    examples: int = 32
    seed: int = 0


@dataclass(frozen=True)
class EncodedExamples:
    """Examples of a run with their tokens."""

    examples: Sequence[Example]
    sequences: Sequence[TokenSequence]

    def __bool__(self) -> bool:
        return bool(self.examples)

    @property
    def groups(self) -> list[str]:
        """The group of each example."""
        return [example.group for example in self.examples]


class AblationStudy:
    """A probed model, the examples that heads are ablated on, and the measurements that are taken.

    scored: the examples that the screen scored heads on. harmless: harmless examples with their answers, for side
        effects; there may be none.
    last: so many last positions before the answer are ablated for single heads; None for all.
    """

    def __init__(
        self,
        probed: ProbedModel,
        run: Path,
        proof: ProofOptions,
        *,
        batch_tokens: int | None,
        options: ExecutionOptions,
    ) -> None:
        self._probed, self._run, self._proof = probed, run, proof
        self._batch_tokens, self._options = batch_tokens, options
        self._heads = all_heads(probed.live)
        generation = options_from_findings(probed.findings.settings)
        self._label = make_labeler(generation, device=options.device, progress=options.progress)
        examples = read_examples(run)
        self.scored = self._encode([e for e in examples if e.cell == probed.findings.heads_cell])
        self.harmless = self._encode([e for e in examples if e.cell == HARMLESS and e.response])
        self.last = self._last_positions()

    def ablate_single_heads(self) -> AblationSweep:
        """Ablate every head by itself."""
        return self._sweep(self._heads, self._ablation(), last=self.last, progress=self._options.progress)

    def grow(self, candidates: Sequence[Head]) -> tuple[list[GreedyStepRecord], str]:
        """Grow a set by the candidate that raises the probe's logit most, while the KL budget holds.

        Returns:
            A record for each size, and why the set did not grow further.
        """
        chosen: list[Head] = []
        steps: list[GreedyStepRecord] = []
        total_gain = 0.0
        with self._options.progress("Growing a set", len(candidates), "steps") as advance:
            while len(chosen) < len(candidates):
                head, gain = self._best_addition(chosen, [head for head in candidates if head not in chosen])
                if not steps and gain <= 0:
                    return steps, "no candidate raises the probe's score when it is ablated"
                if gain <= LEAST_GAIN * total_gain:
                    return steps, f"no further head adds {LEAST_GAIN:.0%} of what the set has gained"
                step = self.measure_set((*chosen, head))
                if step.kl is not None and step.kl.value is not None and step.kl.value > self._proof.budget:
                    return steps, f"{head} would take KL to {step.kl.value:.3g}, over {self._proof.budget:g}"
                chosen.append(head)
                steps.append(step)
                total_gain += gain
                advance(1)
        return steps, "all candidates are in the set"

    def random_sets(self, candidates: Sequence[Head], size: int, seed: int) -> list[GreedyStepRecord]:
        """Measure sets of 1 to `size` random heads that are no candidates; side effects only for the last set."""
        # Candidates are left out, or a random set could contain what it is the control of.
        others = [head for head in self._heads if head not in set(candidates)]
        drawn = random.Random(f"{seed}/control").sample(others, size)
        return [self.measure_set(drawn[:n], side_effects=n == size) for n in range(1, size + 1)]

    def measure_set(self, heads: Sequence[Head], *, side_effects: bool = True) -> GreedyStepRecord:
        """Measure the probe's score with `heads` ablated, and with `side_effects` the answers and the KL, too."""
        ablated = self._with_ablated(heads)
        with ablated.active():
            score = self._mean_score()
        record = GreedyStepRecord(heads=[str(head) for head in heads], score=score)
        # Answers are generated token by token, which takes far longer than a score.
        if not side_effects:
            return record
        update: dict[str, object] = {"refusal": self._refusal_rate(ablated, self.scored)}
        if self.harmless:
            update["harmless_refusal"] = self._refusal_rate(ablated, self.harmless)
            original = ComparedModel(self._probed.live)
            divergence = measure_divergence(
                original, {"set": ablated}, self.harmless.sequences, max_tokens=self._batch_tokens
            )["set"]
            kl = divergence.mean_kl(self.harmless.groups)
            update["kl"] = interval_record(kl, len(self.harmless.examples))
            update["perplexity"] = divergence.perplexities[1]
        return record.model_copy(update=update)

    def _encode(self, examples: Sequence[Example]) -> EncodedExamples:
        live, rows = self._probed.live, examples[: self._proof.examples]
        sequences = build_sequences(
            live.tokenizer,
            rows,
            self._probed.markers,
            max_tokens=context_length(live.model),
            where=str(self._run),
        )
        return EncodedExamples(rows, sequences)

    def _last_positions(self) -> int | None:
        if self._proof.positions is None:
            return None
        # Donors of resampled positions must reach back as far as the examples that take them.
        donors = self.harmless.sequences if self._proof.kind == "resample" else ()
        shortest = min(len(sequence.before_answer) for sequence in (*self.scored.sequences, *donors))
        last = min(self._proof.positions, shortest - 1)
        if last < 1:
            raise usage_error("the shortest example has one token", where="--positions", hint="Use all.")
        return last

    def _best_addition(self, chosen: Sequence[Head], rest: Sequence[Head]) -> tuple[Head, float]:
        """Return the head of `rest` that raises the mean logit most beside `chosen`, and by how much."""
        # Beside the heads that are in the set already: two heads may do the same, and one of them is enough.
        with self._with_ablated(chosen).active():
            gains = self._sweep(rest, self._set_ablation()).effects.mean(0)
        best = int(gains.argmax())
        return rest[best], float(gains[best])

    def _sweep(self, heads: Sequence[Head], ablation: Ablation, **more: Any) -> AblationSweep:
        probed = self._probed
        return ablate_each_head(
            probed.live,
            self.scored.sequences,
            heads,
            probed.weight,
            probed.bias,
            ablation=ablation,
            max_tokens=self._batch_tokens,
            **more,
        )

    def _refusal_rate(self, model: ComparedModel, encoded: EncodedExamples) -> IntervalRecord:
        """The share of examples that the model refuses, given their own prompt and thinking."""
        texts = greedy_answers(model, encoded.sequences)
        answered = [
            # What the model writes has its own tokens in it.
            replace(example, response=text, refused=None, literal=tuple(n for n in example.literal if n != "response"))
            for example, text in zip(encoded.examples, texts, strict=True)
        ]
        rate = Rate.of([bool(example.refused) for example in self._label(answered)])
        return interval_record(rate, rate.n)

    def _mean_score(self) -> IntervalRecord:
        """The mean score at the last token before the answer, of the model as it runs now."""
        probed, sequences = self._probed, self.scored.sequences
        positions = [[sequence.decision] for sequence in sequences]
        states = hidden_states_at(probed.live, sequences, positions, max_tokens=self._batch_tokens)[:, 0, -1]
        scores = torch.sigmoid(states.double() @ probed.weight.double() + probed.bias)
        band = bootstrap_mean(scores[:, None].numpy(), groups=self.scored.groups)
        return interval_record(band.at(0), len(sequences))

    def _with_ablated(self, heads: Sequence[Head]) -> ComparedModel:
        """The model with a set of heads ablated as it would be baked."""
        scale = self._proof.scale if self._proof.kind == "scale" else 0.0
        means = self._mean_inputs if self._proof.kind == "mean" else None
        return ComparedModel(self._probed.live, dict.fromkeys(heads, scale), means)

    @cached_property
    def _mean_inputs(self) -> Mapping[int, Tensor]:
        """Layer → (W,): the mean input of the output projection, as the run stored it."""
        names = {layer: f"layer.{layer}" for layer in self._probed.live.projections}
        stored = load_tensors(
            contained_file(self._run, HEADS), dict.fromkeys(names.values(), (None, 2)), hint="Probe the model again."
        )
        return {layer: stored[name].flatten() for layer, name in names.items()}

    def _set_ablation(self) -> Ablation:
        """The ablation of a head that joins a set: what can be baked."""
        return Ablation(self._proof.scale) if self._proof.kind == "resample" else self._ablation()

    def _ablation(self) -> Ablation:
        if self._proof.kind == "scale":
            return Ablation(self._proof.scale)
        count = len(self.scored.examples)
        if self._proof.kind == "mean":
            return Ablation(values={layer: mean.expand(count, 1, -1) for layer, mean in self._mean_inputs.items()})
        if self.last is None or not self.harmless:
            raise usage_error(
                "resampling takes a harmless example's last positions",
                where="--ablate resample",
                hint="Give --positions a number, and data with harmless/complied examples.",
            )
        donors = head_inputs(self._probed.live, self.harmless.sequences, self.last, max_tokens=self._batch_tokens)
        # Drawn once for all heads, so that their effects differ by the head and not by the donor.
        picks = random.Random(f"{self._proof.seed}/donors").choices(range(len(self.harmless.examples)), k=count)
        return Ablation(values={layer: rows[picks] for layer, rows in donors.items()})
