"""Find tensors that several checkpoints have in common, byte for byte, so that they are stored only once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from surgery.checkpoint.reader import SourceFiles, TensorReader, digest, hash_tensor
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.options import ExecutionOptions
from surgery.engine.work.workers import run_shared

SKETCH = 4096  # elements; tensors that differ at all nearly always differ here, and need not be read as a whole

Shared = Mapping[str, str]  # members.<i>.<name> → members.<j>.<name>, j < i, which is stored
Key = tuple[int, str]
Groups = list[list[Key]]


def find_shared(members: Sequence[Mapping[str, StoredTensor]], options: ExecutionOptions) -> Shared:
    """Return, for every tensor that an earlier member has too, that member's tensor; one of the same name if possible.

    Equal means dtype, shape and bytes. Equal tensors within one member (two norms at 1) stay apart, and so does what
    an adapter changes.
    """
    tensors = {
        (i, name): tensor
        for i, member in enumerate(members)
        for name, tensor in member.items()
        # An adapter's tensor exists only once it is added up, and empty tensors would all be equal.
        if tensor.derivation is None and tensor.n_bytes
    }
    # Three filters, each more expensive than the one before: shape and dtype, the first bytes, all bytes.
    groups = _split([list(tensors)], lambda key: (tensors[key].dtype, tensors[key].shape))
    candidates = {key: tensors[key] for group in groups for key in group}
    paths = {tensor.file for tensor in candidates.values()}

    def sketch(key: Key, reader: TensorReader) -> tuple[Key, str]:
        tensor = candidates[key]
        return key, digest(reader.raw(tensor, 0, min(SKETCH, tensor.n_elements), "sketch")).hex()

    def whole(key: Key, reader: TensorReader) -> tuple[Key, str]:
        return key, hash_tensor(reader, candidates[key])

    with SourceFiles(paths) as files:
        sketches = dict(run_shared(list(candidates), sketch, files, threads=options.threads))
        groups = _split(groups, sketches.__getitem__)
        likely = [key for group in groups for key in group]
        hashes = {}
        with options.progress("Comparing", sum(candidates[key].n_bytes for key in likely)) as advance:
            for key, hash_value in run_shared(likely, whole, files, threads=options.threads):
                hashes[key] = hash_value
                advance(candidates[key].n_bytes)
    return {alias: name for group in _split(groups, hashes.__getitem__) for alias, name in _aliases(group)}


def _split(groups: Groups, property_of: Callable[[Key], Hashable]) -> Groups:
    """Split each group by a property of its tensors; keep the parts that span several members."""
    groups_of_several = []
    for group in groups:
        parts: dict[Hashable, list[Key]] = defaultdict(list)
        for key in group:
            parts[property_of(key)].append(key)
        groups_of_several += [part for part in parts.values() if len({member for member, _ in part}) > 1]
    return groups_of_several


def _aliases(group: Sequence[Key]) -> Iterator[tuple[str, str]]:
    """Yield pairs (alias, stored) of a group of equal tensors, which is in the order of members."""
    first = group[0][0]
    # Several equal tensors in the first member: the one of the same name is preferred, so that aliases read naturally.
    stored = [name for member, name in group if member == first]
    for member, name in group:
        if member != first:
            source = name if name in stored else stored[0]
            yield f"members.{member}.{name}", f"members.{first}.{source}"
