"""Read mergekit's configs unchanged: YAML → `MergeConfig`, with all errors of a file in one `SurgeryError`.

Beyond mergekit's keys a document may have `compat: mergekit | paper` (whose arithmetic counts where the two differ;
default mergekit) and `seed` (of the random methods; default 0). Unknown keys and parameters are errors. A parameter
that only other methods know, or that is given where it has no effect, is a warning under `compat: mergekit` and an
error under `compat: paper`.

Several documents are several merges: a document may have a `name`, by which others merge its result (see
`merges.config.document_order`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merges.config.document_order import check_names
from merges.config.other_tools import foreign_file
from merges.config.read import read_document
from merges.config.schema import MergeConfig
from merges.config.settings import MethodSpec
from merges.config.tolerant import ReadContext
from surgery.errors import usage_error
from surgery.io.yaml_models import read_text
from surgery.io.yaml_nodes import read_documents

MAX_DOCUMENTS = 100
MAX_MODELS = 500  # of one merge: each is opened, or fetched, before anything else is known of it


def read_configs(path: Path, *, methods: Mapping[str, MethodSpec]) -> tuple[MergeConfig, ...]:
    """Return the merges that a file describes, in its order.

    Raises:
        SurgeryError: it cannot be read; else as `parse_configs`.
    """
    return parse_configs(read_text(path), str(path), methods=methods)


def parse_configs(text: str, where: str, *, methods: Mapping[str, MethodSpec]) -> tuple[MergeConfig, ...]:
    """Return the merges that a YAML text describes, one for each document, in its order; run them as `ordered` does.

    Args:
        where: what errors call the text; its file, as a rule.
        methods: the merge methods there are, by name.

    Raises:
        SurgeryError: all errors of the text, one a line, each as `CONFIG.yml:12: document 2: models[1].model: …`.
    """
    nodes, errors = read_documents(text, where)
    if not nodes:
        raise usage_error("holds no merge config", where=where)
    if len(nodes) > MAX_DOCUMENTS:
        raise usage_error(f"holds {len(nodes):,} documents, more than the {MAX_DOCUMENTS} that it may", where=where)
    documents = []
    for number, node in enumerate(nodes, start=1):
        errors.document = number
        if (what := foreign_file(node)) is not None:
            errors.add(node, what)
            continue
        documents.append(read_document(node, ReadContext(errors, methods)))
    if len(documents) < len(nodes):
        errors.raise_if_any()
    # One document alone has no names to refer to, so a bare word in it is left to the Hub.
    uses = check_names(documents, errors) if len(documents) > 1 else [()]
    errors.raise_if_any()
    for parsed in documents:
        if (count := len(parsed.config.models)) > MAX_MODELS:
            raise usage_error(
                f"names {count:,} models, more than the {MAX_MODELS} that one merge may have", where=parsed.config.where
            )
    return tuple(
        parsed.config.model_copy(update={"uses": used, "warnings": errors.warnings_of(number)})
        for number, (parsed, used) in enumerate(zip(documents, uses, strict=True), start=1)
    )
