"""Check whether the sources of a section fit each other and the merge method, before any of them is opened."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from merges.config.keys import NO_MODEL
from merges.config.schema import MergeSection, merged_sources
from merges.config.settings import MethodSpec
from surgery.errors import listing
from surgery.io.yaml_nodes import YamlErrors, YamlNode


def check_section(
    node: YamlNode,
    entries: Sequence[YamlNode],
    section: MergeSection,
    method: MethodSpec | None,
    outer: Collection[str],
    errors: YamlErrors,
) -> None:
    """Report what a section lacks or has too much of.

    Args:
        node: the list of its sources; `entries`: one node for each source that the config lists.
        method: None where the config names none that is known.
        outer: the names of the parameters that are set around its sources.
    """
    # A base that joined from `base_model` is not in the list: errors about it are placed at the whole list.
    places = [*entries, *[node] * (len(section.sources) - len(entries))]
    _check_duplicates(places, section, errors)
    lengths = [end - first for first, end in (s.layer_range for s in section.sources if s.layer_range)]
    if len(set(lengths)) > 1:
        errors.add(node, f"got runs of {listing(map(str, lengths))} layers, expected as many from each source")
    if method is not None:
        _check_models(node, section, method, errors)
        _check_values(node, places, section, method, outer, errors)


def _check_duplicates(places: Sequence[YamlNode], section: MergeSection, errors: YamlErrors) -> None:
    """Report the same layers of one model listed twice, and a second base model: which one is meant is not clear."""
    seen: dict[tuple[str, object], YamlNode] = {}
    for place, source in zip(places, section.sources, strict=True):
        # The base may be there once only, whatever its layers; others twice if their layers differ.
        key = source.model, None if source.model == section.base_model else source.layer_range
        if source.model != NO_MODEL and seen.setdefault(key, place) is not place:
            errors.add(place, f"{source.model} stands here a second time; the first is {seen[key].path}")


def _check_models(node: YamlNode, section: MergeSection, method: MethodSpec, errors: YamlErrors) -> None:
    """Report a missing base model, and a number of models that the method does not take."""
    beside = ""
    if method.base != "none":
        if section.base_model is None and method.base == "required":
            errors.add(node, f"{method.name} needs a base model, and none is given. Add base_model: MODEL.")
            return
        if section.base_model is not None:
            beside = " beside the base"
            if section.base_index is None:
                # Where a reference could not be read, it may have been this one.
                if all(ref != NO_MODEL for ref in (section.base_model, *(s.model for s in section.sources))):
                    errors.add(
                        node, f"the base model {section.base_model} is not among them. Add it with its layer_range."
                    )
                return
    least, most = method.models
    count = len(merged_sources(method, section))
    if count < least or (most is not None and count > most):
        rule = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        noun = "model" if rule.endswith(" 1") else "models"
        errors.add(node, f"got {count}, expected {rule} {noun}{beside} for {method.name}")


def _check_values(
    node: YamlNode,
    places: Sequence[YamlNode],
    section: MergeSection,
    method: MethodSpec,
    outer: Collection[str],
    errors: YamlErrors,
) -> None:
    """Report required parameters that have no value, and values of a base model, which have no effect."""
    merged = frozenset(merged_sources(method, section))
    for i, source in enumerate(section.sources):
        if i not in merged and source.parameters:
            errors.warn(places[i], f"is the base model: its {listing(source.parameters)} has no effect")
    for spec in method.parameters:
        if spec.default is not None or spec.name in outer:
            continue
        missing = [places[i] for i in sorted(merged) if spec.name not in section.sources[i].parameters]
        for place in missing if spec.per_model else [node]:
            errors.add(place, f"{method.name} needs {spec.name}, {spec.rule}. Add it under parameters.")
