"""The causal proof of a screen: heads ablated one by one, then in greedy sets, beside random sets of the same sizes.

In come the findings of `refusal.probe_refusal` and the same model; out come the findings with what the ablations did:
single heads' effects on the probe's logit (and how well the screen ranked them), sets that grow by the head that helps
most while KL on harmless answers stays within a budget, with the refusals that they bring back, and the control.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from probes.data.examples import Example, TokenSequence
from probes.data.generation import context_length
from probes.data.markers import Markers
from probes.data.preparation import make_labeler, open_model, options_from_findings
from probes.data.records import IntervalRecord, check_model, interval_record, parse_top, read_examples
from probes.data.tokenization import build_sequences
from probes.model.ablation import Ablation, AblationSweep, ablate_each_head, all_heads
from probes.model.activations import hidden_states_at
from probes.refusal.findings import (
    HEADS,
    PROBES,
    CausalRecord,
    EffectRecord,
    Findings,
    GreedyStepRecord,
    read_findings,
    write_findings,
)
from probes.refusal.heads.attribution import head_inputs
from probes.refusal.linear.probes import Probes
from probes.side_effects.effects import ComparedModel, Rate, greedy_answers, measure_divergence
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.statistics import EstimateWithInterval, bootstrap_mean, spearman
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.collectives import barrier
from surgery.runtime.environment import is_main

AblationKind = Literal["scale", "mean", "resample"]
HARMLESS = "harmless/complied"
# A head that adds less than this share of what the set has gained already is not worth its side effects.
LEAST_GAIN = 0.05
LEAST_CANDIDATES = 6
NO_BUDGET_NOTE = (
    f"No example is {HARMLESS}: what ablations do to harmless answers was not measured, and no budget held."
)


@dataclass(frozen=True)
class ProofOptions:
    """How heads are put to the proof.

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
    """

    top: str = "5%"
    kind: AblationKind = "scale"
    scale: float = 0.0
    positions: int | None = 4
    budget: float = 0.1
    controls: int = 5
    examples: int = 32
    seed: int = 0


def prove_heads(
    model: str,
    run: Path,
    *,
    proof: ProofOptions = ProofOptions(),
    dtype: str = "auto",
    batch_tokens: int | None = None,
    options: ExecutionOptions = ExecutionOptions(),
) -> Findings:
    """Ablates heads of `model`, adds what that did to the findings in `run`, and writes their report anew.

    Raises:
        SurgeryError: `run` holds findings of another model, or none; an option is out of range; heads were scored on
            harmless examples, because there were no others, or none writes against refusal.
    """
    findings = read_findings(run)
    wanted = _check(findings, run, proof)
    count = len(findings.heads)
    check_model(findings, open_checkpoint(model), run, options=options)
    live = open_model(model, device=options.device, dtype=dtype)
    bench = _Bench(live, findings, run, proof, batch_tokens, options)
    effects = bench.single()
    screen = [findings.score_of(row) for row in findings.heads]
    means = effects.effects.mean(0)
    by_head = {head: float(value) for head, value in zip(effects.heads, means, strict=True)}
    ranks = spearman([-score for score in screen], [by_head[row.name] for row in findings.heads])
    candidates = [row.name for row in findings.ranked[:wanted] if findings.score_of(row) < 0]
    if not candidates:
        raise SurgeryError("no head writes against refusal: every attribution is above 0", where=run)
    base = bench.step(())
    steps, stopped = bench.grow(candidates)
    sizes = len(steps)
    control = []
    with options.progress("Random heads", proof.controls, "steps") as advance:
        for number in range(proof.controls if sizes else 0):
            control.append(bench.random(candidates, sizes, proof.seed + number))
            advance(1)
    bands = bootstrap_mean(effects.effects.numpy(), groups=bench.groups)
    causal = CausalRecord(
        ablation=proof.kind if proof.kind != "scale" else f"scale {proof.scale:g}",
        positions="all" if proof.positions is None else f"last {bench.last}",
        method=effects.method,
        cell=findings.heads_cell,
        n=len(bench.sequences),
        effects=[
            EffectRecord(
                layer=head.layer,
                head=head.index,
                effect=interval_record(
                    EstimateWithInterval(bands.mean[at], bands.low[at], bands.high[at]), len(bench.sequences)
                ),
            )
            for at, head in enumerate(effects.heads)
        ],
        spearman=interval_record(ranks, count),
        candidates=[str(head) for head in candidates],
        base=base,
        steps=steps,
        stopped=stopped,
        control=control,
        kl_budget=proof.budget,
    )
    unheld = [] if bench.harmless or NO_BUDGET_NOTE in findings.warnings else [NO_BUDGET_NOTE]
    proven = findings.model_copy(update={"causal": causal, "warnings": [*findings.warnings, *unheld]})
    if is_main():
        write_findings(run, proven)
        from probes.refusal.report import write_report

        write_report(run, name=str(run))
    barrier()
    return proven


def _check(findings: Findings, run: Path, proof: ProofOptions) -> int:
    """How many candidates there are to be. Raises SurgeryError for what no ablation is needed to see."""
    if not math.isfinite(proof.scale):
        raise usage_error(f"got {proof.scale}, expected a finite number", where="--scale")
    if proof.scale == 1 and proof.kind == "scale":
        raise usage_error("got 1, which leaves heads as they are", where="--scale")
    if not proof.budget >= 0:
        raise usage_error(f"got {proof.budget}, expected 0 or more", where="--kl-budget")
    if findings.heads_cell.startswith("harmless"):
        raise usage_error(
            f"its heads were scored on {findings.heads_cell} examples, because it has no others: there is no refusal "
            "to bring back",
            where=run,
            hint="Probe the model on harmful examples, too.",
        )
    count = len(findings.heads)
    if not count:
        raise SurgeryError("has no heads that are understood", where=run)
    asked = parse_top(proof.top, count)
    if proof.controls and asked > count // 2:
        raise usage_error(
            f"got {proof.top!r}, which is {asked} of {count} heads: too few are left to draw as many at random",
            where="--top",
            hint=f"Use --top {count // 2} at most, or --controls 0.",
        )
    return max(asked, min(LEAST_CANDIDATES, count // 2))


class _Bench:
    """The model, the examples that heads are tried on, and the measures that are taken of every set."""

    def __init__(
        self,
        live: LoadedModel,
        findings: Findings,
        run: Path,
        proof: ProofOptions,
        batch_tokens: int | None,
        options: ExecutionOptions,
    ) -> None:
        self.live, self.proof, self.options, self.batch_tokens = live, proof, options, batch_tokens
        self.judge = make_labeler(
            options_from_findings(findings.settings), device=options.device, progress=options.progress
        )
        self.run, self.heads = run, all_heads(live)
        probes = Probes.load(run / PROBES)
        self.weight, self.bias = probes.weights[findings.depth], float(probes.biases[findings.depth])
        examples = read_examples(run)
        markers = None if findings.markers is None else Markers(**findings.markers)
        scored = [e for e in examples if e.cell == findings.heads_cell][: proof.examples]
        benign = [e for e in examples if e.cell == HARMLESS and e.response][: proof.examples]

        def encoded(rows: Sequence[Example]) -> list[TokenSequence]:
            return build_sequences(live.tokenizer, rows, markers, max_tokens=context_length(live.model), where=str(run))

        self.scored, self.benign = scored, benign
        self.sequences, self.harmless = encoded(scored), encoded(benign)
        self.groups = [example.group for example in scored]
        # Donors of resampled positions must reach back as far as the examples that take them.
        reaching = [*self.sequences, *(self.harmless if proof.kind == "resample" else ())]
        shortest = min(len(sequence.before_answer) for sequence in reaching)
        self.last = None if proof.positions is None else min(proof.positions, shortest - 1)
        if self.last is not None and self.last < 1:
            raise usage_error("the shortest example has one token", where="--positions", hint="Use all.")

    def single(self) -> AblationSweep:
        """Every head by itself."""
        return ablate_each_head(
            self.live,
            self.sequences,
            self.heads,
            self.weight,
            self.bias,
            ablation=self._ablation(),
            last=self.last,
            max_tokens=self.batch_tokens,
            progress=self.options.progress,
        )

    def grow(self, candidates: Sequence[Head]) -> tuple[list[GreedyStepRecord], str]:
        """Greedy sets: the head that raises the probe's logit most comes next, while the budget holds."""
        chosen: list[Head] = []
        steps: list[GreedyStepRecord] = []
        gained = 0.0
        with self.options.progress("Growing a set", len(candidates), "steps") as advance:
            while len(chosen) < len(candidates):
                rest = [head for head in candidates if head not in chosen]
                with self._subject(chosen).running():
                    tried = ablate_each_head(
                        self.live,
                        self.sequences,
                        rest,
                        self.weight,
                        self.bias,
                        ablation=self._at_all_positions(),
                        max_tokens=self.batch_tokens,
                    )
                gains = tried.effects.mean(0)
                best = int(gains.argmax())
                gain = float(gains[best])
                if not steps and gain <= 0:
                    return steps, "no candidate raises the probe's score when it is ablated"
                if gain <= LEAST_GAIN * gained:
                    return steps, f"no further head adds {LEAST_GAIN:.0%} of what the set has gained"
                step = self.step((*chosen, rest[best]))
                if step.kl is not None and step.kl.value is not None and step.kl.value > self.proof.budget:
                    return steps, f"{rest[best]} would take KL to {step.kl.value:.3g}, over {self.proof.budget:g}"
                chosen.append(rest[best])
                steps.append(step)
                gained += gain
                advance(1)
        return steps, "all candidates are in the set"

    def random(self, candidates: Sequence[Head], sizes: int, seed: int) -> list[GreedyStepRecord]:
        """Random heads that are no candidates, in sets of 1 to `sizes`; side effects are measured of the last."""
        others = [head for head in self.heads if head not in set(candidates)]
        drawn = random.Random(f"{seed}/control").sample(others, sizes)
        return [self.step(drawn[:size], whole=size == sizes) for size in range(1, sizes + 1)]

    def step(self, heads: Sequence[Head], *, whole: bool = True) -> GreedyStepRecord:
        """What a set does to the probe's score; `whole`: to answers and to harmless text, too."""
        subject = self._subject(heads)
        with subject.running():
            score = self._score()
        record = GreedyStepRecord(heads=[str(head) for head in heads], score=score)
        if not whole:
            return record
        own = self._refused(subject, self.scored, self.sequences)
        update: dict[str, object] = {"refusal": own, "harmless_refusal": None}
        if self.harmless:
            plain = ComparedModel(self.live)
            update["harmless_refusal"] = self._refused(subject, self.benign, self.harmless)
            away = measure_divergence(plain, {"set": subject}, self.harmless, max_tokens=self.batch_tokens)["set"]
            kl = away.mean_kl([example.group for example in self.benign])
            update |= {"kl": interval_record(kl, len(self.benign)), "perplexity": away.perplexities[1]}
        return record.model_copy(update=update)

    def _refused(
        self, subject: ComparedModel, rows: Sequence[Example], sequences: Sequence[TokenSequence]
    ) -> IntervalRecord:
        """The share of examples that the subject refuses behind their own thinking."""
        texts = greedy_answers(subject, sequences)
        fresh = [replace(row, response=text, refused=None) for row, text in zip(rows, texts, strict=True)]
        rate = Rate.of([bool(row.refused) for row in self.judge(fresh)])
        return interval_record(rate, rate.n)

    def _score(self) -> IntervalRecord:
        positions = [[sequence.decision] for sequence in self.sequences]
        states = hidden_states_at(self.live, self.sequences, positions, max_tokens=self.batch_tokens)[:, 0, -1]
        scores = torch.sigmoid(states.double() @ self.weight.double() + self.bias)
        band = bootstrap_mean(scores[:, None].numpy(), groups=self.groups)
        return interval_record(EstimateWithInterval(band.mean[0], band.low[0], band.high[0]), len(self.sequences))

    def _subject(self, heads: Sequence[Head]) -> ComparedModel:
        scale = self.proof.scale if self.proof.kind == "scale" else 0.0
        return ComparedModel(self.live, dict.fromkeys(heads, scale), self._means if self.proof.kind == "mean" else None)

    @cached_property
    def _means(self) -> Mapping[int, Tensor]:
        stored = load_file(self.run / HEADS)
        return {layer: stored[f"layer.{layer}"].flatten() for layer in self.live.projections}

    def _at_all_positions(self) -> Ablation:
        return Ablation(self.proof.scale) if self.proof.kind == "resample" else self._ablation()

    def _ablation(self) -> Ablation:
        if self.proof.kind == "scale":
            return Ablation(self.proof.scale)
        count = len(self.sequences)
        if self.proof.kind == "mean":
            return Ablation(values={layer: mu.expand(count, 1, -1) for layer, mu in self._means.items()})
        if self.last is None or not self.harmless:
            raise usage_error(
                "resampling takes a harmless example's last positions",
                where="--ablate resample",
                hint="Give --positions a number, and data with harmless/complied examples.",
            )
        donors = head_inputs(self.live, self.harmless, self.last, max_tokens=self.batch_tokens)
        picks = random.Random(f"{self.proof.seed}/donors").choices(range(len(self.harmless)), k=count)
        return Ablation(values={layer: rows[picks] for layer, rows in donors.items()})
