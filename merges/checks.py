"""Check the models of a merge before anything is written: architecture, vocabulary, and that all values are finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import SourceFiles, TensorReader, count_nonfinite, segments
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.vocabulary import Vocabulary, read_vocabulary
from surgery.engine.options import ExecutionOptions
from surgery.engine.preflight import Preflight, check_configs
from surgery.engine.work.workers import run_shared
from surgery.errors import SurgeryError, listing

ALIGN = "Say `tokenizer_source: union`, `base` or a model: rows are then aligned by token."
_EXAMPLES = 3  # tokens or tensors named in a message
# To look at a segment for NaN takes less time than to hand it to a worker: so several at once.
_SEGMENTS_PER_TASK = 8


def check_models(preflight: Preflight, template: Checkpoint, checkpoints: Iterable[Checkpoint]) -> None:
    """Add errors for models of another architecture than the template's. Layers are counted in `merges.layout`."""
    others = [(checkpoint.ref, checkpoint.config) for checkpoint in checkpoints if checkpoint is not template]
    check_configs(preflight, template, others, any_depth=True)


def check_vocabularies(preflight: Preflight, checkpoints: Sequence[Checkpoint]) -> None:
    """Add an error where two models use one id for different tokens, or one token under different ids.

    Tokens that only some of the models have are allowed: nothing else stands in their rows.
    """
    known: list[tuple[str, Vocabulary]] = []
    unknown = []
    for checkpoint in checkpoints:
        folder = checkpoint.tokenizer_folder
        vocabulary = read_vocabulary(folder) if folder else None
        if vocabulary is None:
            unknown.append(checkpoint.ref)
        else:
            known.append((checkpoint.ref, vocabulary))
    if unknown:
        preflight.facts["vocabulary"] = f"not compared: no tokenizer files in {listing(unknown, _EXAMPLES)}"
    if not known:
        return
    first_ref, first = known[0]
    alone = set()
    for ref, other in known[1:]:
        clashes = _clashes(first, other)
        if clashes:
            preflight.errors.add(
                f"the vocabularies of {first_ref} and {ref} differ: {len(clashes):,} rows hold different tokens "
                f"({listing(clashes, _EXAMPLES)}). {ALIGN}"
            )
        # A difference in both directions: tokens that either of the two lacks.
        alone |= first.ids.keys() ^ other.ids.keys()
    if alone:
        examples = listing([repr(token) for token in sorted(alone)], _EXAMPLES)
        preflight.warnings.append(
            f"{len(alone):,} tokens are not in all models ({examples}); their rows are merged as they lie."
        )
    elif not unknown:
        preflight.facts["vocabulary"] = f"the same {len(first.ids):,} tokens in all models"


def check_finite(tensors: Mapping[str, Sequence[StoredTensor]], options: ExecutionOptions) -> None:
    """Raise SurgeryError where a source has NaN or infinite values. Reads every tensor once.

    Args:
        tensors: model → the tensors that are read of it.
    """
    float_tensors = [(ref, tensor) for ref, stored in tensors.items() for tensor in stored if tensor.is_float]
    parts = [(number, list(segments(tensor.n_elements))) for number, (_, tensor) in enumerate(float_tensors)]
    # Tensors go by number: names would be sent to every rank and back.
    step = _SEGMENTS_PER_TASK
    tasks = [(number, bounds[i : i + step]) for number, bounds in parts for i in range(0, len(bounds), step)]

    def count_bad(task: tuple[int, list[tuple[int, int]]], reader: TensorReader) -> tuple[int, int, int]:
        number, bounds = task
        tensor = float_tensors[number][1]
        size = count = 0
        for begin, end in bounds:
            data = reader.raw(tensor, begin, end, "look")
            size += data.numel()
            count += count_nonfinite(data, tensor.dtype)
        return number, size, count

    counts = Counter[int]()
    with (
        SourceFiles({tensor.file for _, tensor in float_tensors}) as files,
        options.progress("Checking", sum(tensor.n_bytes for _, tensor in float_tensors)) as advance,
    ):
        for number, size, count in run_shared(tasks, count_bad, files, threads=options.threads):
            advance(size)
            counts[number] += count
    bad = {
        (float_tensors[number][0], float_tensors[number][1].name): count for number, count in counts.items() if count
    }
    if bad:
        examples = [f'{count:,} in "{name}" of {ref}' for (ref, name), count in sorted(bad.items())]
        raise SurgeryError(
            f"NaN or infinite values: {listing(examples, _EXAMPLES)}",
            where="sources",
            hint="They would spread through the merge. --allow-nonfinite merges them all the same.",
        )


def _clashes(a: Vocabulary, b: Vocabulary) -> list[str]:
    """Describe rows with different tokens, and tokens in different rows, one text each, by row."""
    # From b's point of view, to find what it has in the row of each of a's tokens.
    by_row = {row: token for token, row in b.ids.items()}
    clashes = []
    for token, row in sorted(a.ids.items(), key=lambda item: item[1]):
        other = by_row.get(row, token)
        if other != token:
            clashes.append(f"row {row}: {token!r} / {other!r}")
        elif b.ids.get(token, row) != row:
            clashes.append(f"{token!r}: row {row} / {b.ids[token]}")
    return clashes
