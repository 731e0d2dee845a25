"""Write the model card of a merge: its models and method, where its layers come from, and the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merges.config.schema import MergeConfig
from merges.layout import Layout
from merges.methods.registry import METHODS
from merges.report import MergeReport
from surgery.engine.card import CardContent
from surgery.errors import listing
from surgery.io.escaping import markdown_block, markdown_code, markdown_text
from surgery.reporting.report import Table

_ARXIV = "arXiv:"
_MOST_MODELS = 6  # named in the first sentence; the table has all


def merge_card(
    config: MergeConfig,
    layout: Layout,
    report: MergeReport,
    steps: Mapping[str, Mapping[str, Any]],
    text: str,
) -> CardContent:
    """Return the model card of a finished merge.

    Args:
        steps: name → manifest of the documents whose results it was made from.
        text: the config as it was written; "" where there was none.
    """
    method = METHODS[config.merge_method].spec
    # A method that does not set the base apart merges it like any other model, and the card names it among them.
    others = [markdown_code(ref) for ref in config.models if ref != config.base_model or method.base == "none"]
    onto = f" onto {markdown_code(config.base_model)}" if config.base_model and method.base != "none" else ""
    sentence = (
        f"{listing(others, _MOST_MODELS)}, merged{onto} by **{method.name}**: {method.summary}{_source(method.paper)}."
    )
    parts = [report.table().to_markdown()] if report.models else []
    if any(source.layer_range for section in config.sections for source in section.sources):
        parts.append(layers_table(config, layout).to_markdown())
    if steps:
        parts.append(_steps_table(steps).to_markdown())
    if "vocabulary" in report.preflight:
        parts.append(f"Vocabulary: {markdown_text(report.preflight['vocabulary'])}.")
    if text:
        parts.append(f"## Config\n\n{markdown_block(text.strip(), 'yaml')}")
    return CardContent("Merged model", f"{sentence} {_computed(report)}", ("merge", method.name), "\n\n".join(parts))


def layers_table(config: MergeConfig, layout: Layout) -> Table:
    """Return which layers of which models each run of the output's layers is made from."""
    rows = []
    first = 0
    for section in config.sections:
        # A source without a range gives all its layers, and the output then has as many.
        ranges = [source.layer_range or (0, len(layout.layers)) for source in section.sources]
        last = first + ranges[0][1] - ranges[0][0]
        for source, (begin, end) in zip(section.sources, ranges, strict=True):
            rows.append((_span(first, last), source.model, _span(begin, end)))
        first = last
    return Table("Where the layers come from", ["layers", "model", "its layers"], rows)


def _steps_table(steps: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (name, role, entry.get("repo_id") or entry.get("ref"), entry.get("revision"))
        for name, manifest in steps.items()
        for role, entry in manifest["inputs"].items()
    ]
    return Table("Merged before, by the same config", ["name", "role", "model", "revision"], rows)


def _span(begin: int, end: int) -> str:
    return f"{begin}–{end - 1}" if end - begin > 1 else str(begin)


def _source(paper: str) -> str:
    if not paper:
        return ""
    if paper.startswith(_ARXIV):
        return f" ([{paper}](https://arxiv.org/abs/{paper.removeprefix(_ARXIV)}))"
    return f" (<https://{paper}>)"


def _computed(report: MergeReport) -> str:
    if not report.merged:
        return f"All {report.tensors} tensors are copies, byte for byte."
    rest = report.tensors - report.merged
    done = "Every tensor was" if not rest else f"{report.merged} of {report.tensors} tensors were"
    return f"{done} computed in fp32 and rounded once{'; the rest are copies.' if rest else '.'}"
