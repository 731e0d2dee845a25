"""What is checked of a merge's models before a byte is written: family, vocabulary, and that all values are finite."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from surgery.checkpoint.checkpoint import Checkpoint, StoredTensor
from surgery.checkpoint.reader import SourceFiles, TensorReader, count_nonfinite, segments
from surgery.checkpoint.vocabulary import Vocabulary, read_vocabulary
from surgery.engine.options import ExecutionOptions
from surgery.engine.preflight import Preflight, check_config
from surgery.engine.workers import run_shared
from surgery.errors import SurgeryError, listing

ALIGN = "Say `tokenizer_source: union`, `base` or a model: rows are then aligned by token."
_EXAMPLES = 3
_AT_ONCE = 8  # segments that a worker looks at for NaN in one go


class TensorFaults:
    """Faults of single tensors; one that many tensors share becomes one sentence."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, name: str, what: str, advice: str) -> None:
        """Notes that the tensor `name` is, or has, `what`; `advice` is the sentence that says what to do."""
        self._names[what, advice].append(name)

    def sentences(self) -> list[str]:
        """One for each kind of fault, in the order in which they were found."""
        found = []
        for (what, advice), names in self._names.items():
            quoted = listing([f'"{name}"' for name in names], _EXAMPLES)
            some = "" if len(names) == 1 else f"{len(names):,} tensors: "
            found.append(f"{some}{quoted}: {what}. {advice}")
        return found


def check_models(preflight: Preflight, template: Checkpoint, checkpoints: Iterable[Checkpoint]) -> None:
    """Adds faults for models of another architecture than the template's. Layers are counted in `merges.layout`."""
    for checkpoint in checkpoints:
        if checkpoint is not template:
            check_config(preflight, template, checkpoint.config, checkpoint.ref, any_depth=True)


def check_vocabularies(preflight: Preflight, checkpoints: Sequence[Checkpoint]) -> None:
    """Adds a fault where two models use one id for different tokens, or one token under different ids.

    Tokens that only some of the models have are allowed: nothing else stands in their rows.
    """
    known: list[tuple[str, Vocabulary]] = []
    lacking = []
    for checkpoint in checkpoints:
        found = read_vocabulary(checkpoint.folder) if checkpoint.folder else None
        if found is None:
            lacking.append(checkpoint.ref)
        else:
            known.append((checkpoint.ref, found))
    if lacking:
        preflight.facts["vocabulary"] = f"not compared: no tokenizer files in {listing(lacking, _EXAMPLES)}"
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
        alone |= first.ids.keys() ^ other.ids.keys()
    if alone:
        shown = listing([repr(token) for token in sorted(alone)], _EXAMPLES)
        preflight.warnings.append(
            f"{len(alone):,} tokens are not in all models ({shown}); their rows are merged as they lie."
        )
    elif not lacking:
        preflight.facts["vocabulary"] = f"the same {len(first.ids):,} tokens in all models"


def check_finite(tensors: Mapping[str, Sequence[StoredTensor]], options: ExecutionOptions) -> None:
    """Raises SurgeryError where a source holds NaN or infinite values; reads every one of them once.

    tensors: model → the tensors that are read of it.
    """
    held = [(ref, tensor) for ref, stored in tensors.items() for tensor in stored if tensor.is_float]
    parts = [(number, list(segments(tensor.n_elements))) for number, (_, tensor) in enumerate(held)]
    # Looking at a segment takes less time than handing it to a worker: so several at once, and told by number.
    units = [(number, bounds[i : i + _AT_ONCE]) for number, bounds in parts for i in range(0, len(bounds), _AT_ONCE)]

    def look(unit: tuple[int, list[tuple[int, int]]], reader: TensorReader) -> tuple[int, int, int]:
        number, bounds = unit
        tensor = held[number][1]
        size = count = 0
        for begin, end in bounds:
            data = reader.raw(tensor, begin, end, "look")
            size += data.numel()
            count += count_nonfinite(data, tensor.dtype)
        return number, size, count

    counts = Counter[int]()
    with (
        SourceFiles({tensor.file for _, tensor in held}) as files,
        options.progress("Checking", sum(tensor.n_bytes for _, tensor in held)) as advance,
    ):
        for number, size, count in run_shared(units, look, files, threads=options.threads):
            advance(size)
            counts[number] += count
    bad = {(held[number][0], held[number][1].name): count for number, count in counts.items() if count}
    if bad:
        found = [f'{count:,} in "{name}" of {ref}' for (ref, name), count in sorted(bad.items())]
        raise SurgeryError(
            f"NaN or infinite values: {listing(found, _EXAMPLES)}",
            where="sources",
            hint="They would spread through the merge. --allow-nonfinite merges them all the same.",
        )


def _clashes(a: Vocabulary, b: Vocabulary) -> list[str]:
    """Rows that hold different tokens, and tokens in different rows: a line for each, by row."""
    by_row = {row: token for token, row in b.ids.items()}
    clashes = []
    for token, row in sorted(a.ids.items(), key=lambda item: item[1]):
        other = by_row.get(row, token)
        if other != token:
            clashes.append(f"row {row}: {token!r} / {other!r}")
        elif b.ids.get(token, row) != row:
            clashes.append(f"{token!r}: row {row} / {b.ids[token]}")
    return clashes
