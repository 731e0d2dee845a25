"""Score TARGET + α·v over a grid of α, with norm-matched random vectors as the control.

The target is loaded once; its weights are then set in memory, tensor by tensor, to exactly what
`surgery.vectors.application.apply` would write to disk for that α. Reviewers of arXiv 2509.01363 asked for the grid,
the random control and the intervals.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader, compute_dtype
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import check_output
from surgery.engine.preflight import Preflight, check_ancestor
from surgery.engine.unshared import UnsharedChoice
from surgery.errors import SurgeryError, listing, usage_error
from surgery.evaluation.harness import on_tasks
from surgery.evaluation.scoring import Score
from surgery.io.atomic import MANIFEST
from surgery.io.json_io import to_json
from surgery.io.output_folder import atomic_folder, check_free
from surgery.models.loading import load_model
from surgery.reporting.plots import plot_scale_curve
from surgery.reporting.report import Column, Figure, Report, Table
from surgery.runtime.collectives import on_main
from surgery.vectors.align import VectorSettings
from surgery.vectors.application import fit_vector
from surgery.vectors.choices import VocabPolicy
from surgery.vectors.kernels import ADD_VECTOR
from surgery.vectors.selection import TensorSelection
from surgery.vectors.task_vector import TaskVector, open_vector, stored_vector

COMMAND = "vector sweep"
SCHEMA = 1


@dataclass(frozen=True)
class SweepPoint:
    """The scores at one α. `control` is None for v itself, else the seed of the random vector in its place."""

    scale: float
    scores: Sequence[Score]
    control: int | None = None


@dataclass(frozen=True)
class SweepReport:
    """Scores over the grid, and of the controls at the best α of each task."""

    vector: str
    target: str
    points: Sequence[SweepPoint]
    controls: Sequence[SweepPoint]
    preflight: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order they were asked for."""
        return list(dict.fromkeys(score.task for point in self.points for score in point.scores))

    def tables(self) -> list[Table]:
        """Return one table per task."""
        columns = [
            Column("vector"),
            Column("α", "number"),
            Column("score", "percent"),
            Column("95 % from", "percent"),
            Column("to", "percent"),
            Column("n", "count"),
        ]
        return [
            Table(
                f"{self.target} + α · {self.vector}, {task}",
                columns,
                [
                    (
                        "v" if point.control is None else f"random {point.control}",
                        point.scale,
                        s.value,
                        s.low,
                        s.high,
                        s.n,
                    )
                    for point in (*self.points, *self.controls)
                    for s in point.scores
                    if s.task == task
                ],
                note="random: Gaussian noise with the norm of v in every tensor.",
            )
            for task in self.tasks
        ]

    def figures(self) -> list[Figure]:
        """Return one curve per task: score against α, with the controls."""
        return [
            plot_scale_curve(
                f"{task}: {self.target} + α·v",
                [(point.scale, _score(point, task)) for point in self.points],
                {"random, same norm": [(point.scale, _score(point, task)) for point in self.controls]},
                lines=self._unchanged(task),
                score=_score(self.points[0], task).metric,
                caption="The band is the 95 % interval. Random vectors have the norm of v in every tensor.",
            )
            for task in self.tasks
        ]

    def sentences(self) -> list[str]:
        """Return a sentence per task: the best α and what its score compares with."""
        sentences = []
        for task in self.tasks:
            best = max(self.points, key=lambda p: _score(p, task).value)
            score = _score(best, task)
            against = [f"{value:.1%} unchanged" for value in self._unchanged(task).values()]
            randoms = [_score(point, task).value for point in self.controls]
            against += [f"at most {max(randoms):.1%} with a random vector of the same norm"] if randoms else []
            sentences.append(
                f"{task}: {score.value:.1%} at α = {best.scale:g} (95 % interval {score.low:.1%} to {score.high:.1%}, "
                f"n = {score.n})" + (f", against {' and '.join(against)}." if against else ".")
            )
        return sentences

    def _unchanged(self, task: str) -> dict[str, float]:
        scores = [_score(point, task).value for point in self.points if point.scale == 0]
        return {"target": scores[0]} if scores else {}


def parse_grid(text: str) -> list[float]:
    """Parse `-1,0,0.5` to [-1.0, 0.0, 0.5], without repetitions. Raises SurgeryError."""
    try:
        grid = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise usage_error(f"got {text!r}, expected numbers with commas between them", where="--scale") from error
    if not all(math.isfinite(scale) for scale in grid):
        raise usage_error(f"got {text!r}, expected finite numbers", where="--scale")
    return list(dict.fromkeys(grid))


def sweep(
    vector: str,
    target: str,
    *,
    scales: Sequence[float],
    tasks: Sequence[str],
    out: Path | None = None,
    controls: int = 3,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_for: Mapping[str, float] | None = None,
    vocab: VocabPolicy = "strict",
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    allow_unrelated: bool = False,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    options: ExecutionOptions = ExecutionOptions(),
) -> SweepReport:
    """Score θ_target + α·(m ⊙ v) for every α of the grid, and `controls` random vectors at the best one.

    Example:
        report = surgery.sweep("reasoning", "lab:instruct", scales=[0.25, 0.5, 1.0], tasks=["lab_sums"])

    Args:
        scales: the grid; `scale_for` globs multiply it, so that 0.5 halves a tensor's α everywhere on the grid.
        out: a folder for results.json, one picture per task and report.html.
        seed: of the first random vector; the others count up from it.
        keep: globs over names of tensors that only the target has: they stay as they are.
        drop: globs over names of tensors whose updates the target has no place for.

    Raises:
        SurgeryError: vector and target do not fit; the model's tensors cannot be reached in memory by their names on
            disk; a task is unknown; lm-evaluation-harness is not installed.
    """
    opened, model = open_vector(vector), open_checkpoint(target)
    selection = TensorSelection(1.0, tuple(include), tuple(exclude), scale_for or {})
    choice = UnsharedChoice(tuple(keep), tuple(drop))
    settings = VectorSettings(selection, vocab, allow_unrelated=allow_unrelated, unshared=choice)
    # Before the model is loaded: a sweep takes long, and must not fail at its last step.
    if out is not None:
        check_free(out, overwrite=options.overwrite)
        check_output(out, {"target": model, "vector": opened.checkpoint})
    preflight = Preflight()
    model, aligned = _check_and_align(preflight, model, opened, settings)
    measures = on_tasks(tasks, limit=limit, batch_size=batch_size)
    with _EditedModel(model, aligned, selection, options.device) as edited:

        def score(scale: float, name: str, control: int | None = None) -> SweepPoint:
            edited.set_scale(scale, control=control)
            loaded = replace(edited.loaded, name=name)
            return SweepPoint(scale, [score for measure in measures for score in measure(loaded)], control)

        with options.progress("Scoring", len(scales) + controls, "steps") as advance:
            points = []
            for scale in scales:
                points.append(score(scale, f"α = {scale:g}"))
                advance(1)
            best = _best_scale(points)
            control_points = []
            for number in range(controls):
                control_points.append(score(best, f"random {number}", seed + number))
                advance(1)
    report = SweepReport(vector, target, points, control_points, preflight.facts, preflight.warnings)
    if out is not None:
        on_main(_write, report, out, overwrite=options.overwrite)
    return report


def _check_and_align(
    preflight: Preflight, model: Checkpoint, vector: TaskVector, settings: VectorSettings
) -> tuple[Checkpoint, dict[str, TensorInput]]:
    """Return the target as it is seen, and the vector's input for every tensor that it changes. Raises SurgeryError."""
    seen, aligned, fitted = fit_vector(
        preflight, model, stored_vector(vector), settings, command=COMMAND, can_dequantise=False
    )
    check_ancestor(preflight, seen, fitted.read_sketch(), allow_unrelated=settings.allow_unrelated)
    preflight.errors.raise_if_any(COMMAND)
    if aligned.dropped:
        raise usage_error(
            f"would leave out {len(aligned.dropped)} tensor(s) that the target has: {listing(aligned.dropped, 3)}",
            where="--drop",
            hint="A sweep sets the weights of a loaded model, and can leave out none.",
        )
    if parted := sorted(seen.tensors.keys() - model.tensors.keys()):
        raise SurgeryError(
            f"{listing(parted)} would be another matrix than its embedding, to which the loaded model ties it",
            where=model.ref,
            hint="Write each α with `surgery vector apply` and score them with `surgery eval`.",
        )
    return seen, {name: source for name, (source,) in aligned.inputs.items()}


def _best_scale(points: Sequence[SweepPoint]) -> float:
    """Return the α with the best mean score, of equally good ones the largest, and 0 only where there is no other."""
    # At the largest scale a random vector has the best chance to have an effect too, so the control is strictest there.
    return max(points, key=lambda point: (point.scale != 0, _mean(point), abs(point.scale))).scale


class _EditedModel:
    """The target in memory, its weights set to θ + α·v, or to θ + α·(random of v's norm)."""

    def __init__(
        self, checkpoint: Checkpoint, vector: Mapping[str, TensorInput], selection: TensorSelection, device: str
    ) -> None:
        self.loaded = load_model(checkpoint, checkpoint.ref, device=device)
        self._checkpoint, self._vector, self._selection = checkpoint, vector, selection
        self._parameters = dict(self._find_parameters())
        paths = {path for source in vector.values() for path in source.tensor.files}
        self._files = SourceFiles(paths | set(checkpoint.files))
        self._reader = TensorReader(self._files)

    def __enter__(self) -> _EditedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @torch.no_grad()
    def set_scale(self, alpha: float, *, control: int | None = None) -> None:
        """Set every tensor that v changes to θ + α·v, with noise seeded by `control` instead of v where it is given."""
        for name, source in self._vector.items():
            target = self._checkpoint.tensors[name]
            compute = compute_dtype((target.dtype, source.tensor.dtype))
            # From the values on disk: rounding errors must not add up from one α to the next.
            weights = self._reader.whole(TensorInput(target), "target").to(compute)
            update = self._reader.values(source, 0, target.n_elements, "vector").view(target.shape).to(compute)
            if control is not None:
                update = matched_noise(update, name, control)
            stored = ADD_VECTOR.fn([weights, update], scale=alpha * self._selection.scale_of(name))
            self._parameters[name].copy_(stored)

    def _find_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameter in memory of every name on disk. Raises SurgeryError for fused or renamed ones."""
        state = self.loaded.model.state_dict()
        prefix = getattr(self.loaded.model, "base_model_prefix", "")
        missing = []
        for name in self._vector:
            # Some checkpoints leave out the base model's prefix, which transformers adds on loading.
            parameter = state.get(name, state.get(f"{prefix}.{name}"))
            if parameter is None or tuple(parameter.shape) != self._checkpoint.tensors[name].shape:
                missing.append(name)
            else:
                yield name, parameter
        if missing:
            raise SurgeryError(
                f"transformers holds {len(missing)} tensor(s) in memory under another name or shape: "
                f"{listing(missing, 3)}",
                where=self._checkpoint.ref,
                hint="Write each α with `surgery vector apply` and score them with `surgery eval`.",
            )


def matched_noise(update: Tensor, name: str, seed: int) -> Tensor:
    """Return Gaussian noise of the shape and norm of `update`, from a generator seeded by (seed, tensor name)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    # On the CPU and in fp64, so that every device and dtype gets the same noise.
    noise = torch.randn(update.shape, generator=generator, dtype=torch.float64)
    norm = noise.norm()
    return (noise * (update.double().norm() / norm)).to(update.dtype) if norm > 0 else torch.zeros_like(update)


def _score(point: SweepPoint, task: str) -> Score:
    return next(score for score in point.scores if score.task == task)


def _mean(point: SweepPoint) -> float:
    return math.fsum(score.value for score in point.scores) / len(point.scores)


def _write(report: SweepReport, out: Path, *, overwrite: bool) -> None:
    with atomic_folder(out, overwrite=overwrite) as folder:
        _write_files(report, folder)


def _write_files(report: SweepReport, out: Path) -> None:
    results = {
        "schema": SCHEMA,
        "kind": "sweep",
        "vector": report.vector,
        "target": report.target,
        "points": report.points,
        "controls": report.controls,
    }
    page = Report(f"{report.target} + α · {report.vector}", " ".join(report.sentences()))
    for task, figure, table in zip(report.tasks, report.figures(), report.tables(), strict=True):
        figure.save(out / f"{task}.png")
        page.add(figure)
        page.add(table)
    page.write(out / "report.html")
    (out / "results.json").write_text(to_json(results), encoding="utf-8")
    # Marks the folder as ours, so that --overwrite may replace it.
    (out / MANIFEST).write_text(to_json({"schema": SCHEMA, "kind": "sweep"}), encoding="utf-8")
