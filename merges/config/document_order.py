"""Names and order of the documents of one file.

Others may merge a document's result by its name; the document without a name is what the file is for. If all have
names, it is the one that no other uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from merges.config.read import ParsedDocument
from merges.config.schema import MergeConfig
from merges.config.tolerant import nearest
from surgery.io.yaml_nodes import YamlErrors

_ONE_RESULT = "Give a name to every document but one."


def ordered(configs: Sequence[MergeConfig]) -> tuple[MergeConfig, ...]:
    """Return the merges of one file in the order in which they can run, the result last, without unused ones.

    Args:
        configs: as `parse_configs` returns them.
    """
    named = {config.name: config for config in configs}
    result = configs[_results([config.name for config in configs], [config.uses for config in configs])[0]]
    needed: dict[str | None, tuple[str, ...]] = {}
    # From the result back through what it uses: documents that are not reached are not merged.
    waiting: list[str | None] = [result.name]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = named[name].uses
            waiting += needed[name]
    return tuple(named[name] for name in TopologicalSorter(needed).static_order())


def check_names(documents: Sequence[ParsedDocument], errors: YamlErrors) -> list[tuple[str, ...]]:
    """Return for each document the names of those it merges; report duplicate names, unknown ones and cycles."""
    names: dict[str, int] = {}
    for number, document in enumerate(documents, start=1):
        errors.document = number
        name = document.config.name
        if document.name is not None and name and names.setdefault(name, number) != number:
            errors.add(document.name, f"{name} is the name of document {names[name]} already")
    uses = []
    for number, document in enumerate(documents, start=1):
        errors.document = number
        uses.append(tuple(dict.fromkeys(ref for refs in _named(document, names, errors) for ref in refs)))
    _check_order(documents, uses, names, errors)
    return uses


def _named(document: ParsedDocument, names: Collection[str], errors: YamlErrors) -> Iterable[list[str]]:
    """Yield the documents that each reference names, as itself or as the base of an adapter."""
    for node, ref in document.refs:
        base = ref.partition("+")[0]
        matches = [name for name in dict.fromkeys((ref, base)) if name in names]
        yield matches
        # A word without a slash could be a Hub id of old, but is far more often a misspelt name.
        if not matches and base and not any(mark in base for mark in "/\\:") and not _exists(base):
            errors.add(node, f"no document is called {base}, and there is no such folder. {nearest(base, names)}")


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, ~nobody, a zero byte
        return False


def _check_order(
    documents: Sequence[ParsedDocument], uses: Sequence[tuple[str, ...]], names: Mapping[str, int], errors: YamlErrors
) -> None:
    """Report documents that need each other in a cycle, and files of which the result is not clear."""
    try:
        TopologicalSorter({name: uses[number - 1] for name, number in names.items()}).prepare()
    except CycleError as error:
        # In a cycle every document is used by another, so that none of them could be named as the result.
        cycle: list[str] = error.args[1]
        errors.document = names[cycle[0]]
        document = documents[errors.document - 1]
        errors.add(document.name or document.node, f"is made from itself: {' → '.join(cycle)}")
        return
    results = _results([document.config.name for document in documents], uses)
    for surplus in results[1:]:
        errors.document = surplus + 1
        errors.add(documents[surplus].node, f"which is the result, document {results[0] + 1} or this? {_ONE_RESULT}")
    needed = {documents[results[0]].config.name} | {ref for used in uses for ref in used}
    errors.document = results[0] + 1
    for name in names:
        if name not in needed:
            errors.warn(documents[results[0]].node, f"{name} is used by no document, and is left out")


def _results(names: Sequence[str | None], uses: Sequence[tuple[str, ...]]) -> list[int]:
    """Return which documents the file may be for: those without a name; if all have one, those that no other uses."""
    unnamed = [i for i, name in enumerate(names) if name is None]
    used = {ref for some in uses for ref in some}
    return unnamed or [i for i, name in enumerate(names) if name not in used]
