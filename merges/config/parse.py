"""mergekit's configs, read unchanged: YAML → `MergeConfig`, with all faults of a file in one error.

The types are in `merges.config.schema`, and are named here again for those who use them. Beyond mergekit's keys a
document may say `compat: mergekit | paper` (whose arithmetic counts where the two differ; default mergekit) and `seed`
(of the random methods; default 0). Keys and parameters that nobody knows are faults. A parameter that only other
methods know, or that stands where it has no effect, is a warning under `compat: mergekit` and a fault under `compat:
paper`.

Several documents are several merges. A document may say `name`, and others may then merge its result by that name; the
document without a name is what the file is for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from merges.config.fields import nearest
from merges.config.read import ParsedDocument, read_document
from merges.config.schema import (
    Compat,
    MergeConfig,
)
from merges.config.settings import MethodSpec
from surgery.errors import usage_error
from surgery.io.command_line import option_flag
from surgery.io.yaml_models import read_text
from surgery.io.yaml_nodes import YamlErrors, YamlNode, read_documents, to_node

_ONE_RESULT = "Give a name to every document but one."


def read_configs(path: Path, *, methods: Mapping[str, MethodSpec]) -> tuple[MergeConfig, ...]:
    """The merges that a file describes, in its order.

    Raises:
        SurgeryError: it cannot be read; else as `parse_configs`.
    """
    return parse_configs(read_text(path), str(path), methods=methods)


def parse_configs(text: str, where: str, *, methods: Mapping[str, MethodSpec]) -> tuple[MergeConfig, ...]:
    """The merges that a YAML text describes, one for each document, in its order; run them as `ordered` says.

    Args:
        where: what faults call the text; its file, as a rule.
        methods: the merge methods there are, by name.

    Raises:
        SurgeryError: all faults of the text, one a line, each as `CONFIG.yml:12: document 2: models[1].model: …`.
    """
    nodes, faults = read_documents(text, where)
    if not nodes:
        raise usage_error("holds no merge config", where=where)
    drafts = []
    for number, node in enumerate(nodes, start=1):
        faults.document = number
        drafts.append(read_document(node, methods, faults))
    uses = _check_names(drafts, faults) if len(drafts) > 1 else [()]
    faults.settle()
    return tuple(
        draft.config.model_copy(update={"uses": used, "warnings": faults.warnings_of(number)})
        for number, (draft, used) in enumerate(zip(drafts, uses, strict=True), start=1)
    )


def ordered(configs: Sequence[MergeConfig]) -> tuple[MergeConfig, ...]:
    """The merges of one file in the order in which they can run, the result last; those it does not need are left out.

    Args:
        configs: as `parse_configs` returns them.
    """
    named = {config.name: config for config in configs}
    result = configs[_results([config.name for config in configs], [config.uses for config in configs])[0]]
    needed: dict[str | None, tuple[str, ...]] = {}
    waiting: list[str | None] = [result.name]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = named[name].uses
            waiting += needed[name]
    return tuple(named[name] for name in TopologicalSorter(needed).static_order())


def config_for_method(
    method: str,
    models: Sequence[str],
    *,
    methods: Mapping[str, MethodSpec],
    base: str | None = None,
    parameters: Mapping[str, Sequence[object]] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    tokenizer_source: str | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    compat: Compat = "mergekit",
) -> MergeConfig:
    """The config that a command line asks for: `surgery merge METHOD A B --base X --weight 0.5 --weight 0.3`.

    Args:
        parameters: name → its values, each as a config would write it; one value is for all models, as many as there
            are `models` are for one each.

    Raises:
        SurgeryError: all faults, one a line, by the names of the options: `--weight: got 3 values for 2 models`.
    """
    faults = YamlErrors("")
    spec = methods.get(method)
    given = parameters or {}
    if spec is not None:
        _check_given(spec, base, given, faults)
    shared, own = _shared_out(given, len(models), spec, faults)
    faults.settle()
    entries = [
        YamlNode(
            f"MODEL {i}",
            None,
            {"model": YamlNode(f"MODEL {i}", None, ref), "parameters": YamlNode(f"MODEL {i}", None, values)},
        )
        for i, (ref, values) in enumerate(zip(models, own, strict=True), start=1)
    ]
    document = {
        "merge_method": YamlNode("METHOD", None, method),
        "models": YamlNode("MODELS", None, tuple(entries)),
        "base_model": YamlNode("--base", None, base),
        "parameters": YamlNode("", None, shared),
        "dtype": YamlNode("--dtype", None, dtype),
        "out_dtype": YamlNode("--out-dtype", None, out_dtype),
        "tokenizer_source": YamlNode("--tokenizer-source", None, tokenizer_source),
        "chat_template": YamlNode("--chat-template", None, chat_template),
        "seed": YamlNode("--seed", None, seed),
        "compat": YamlNode("--compat", None, compat),
    }
    draft = read_document(YamlNode("", None, document), methods, faults, strict=True)
    faults.settle()
    return draft.config.model_copy(update={"warnings": faults.warnings_of(1)})


def _check_given(spec: MethodSpec, base: str | None, given: Collection[str], faults: YamlErrors) -> None:
    """Notes what a method cannot do without, by the name of its option."""
    if spec.base == "required" and base is None:
        faults.add(YamlNode("--base", None, None), f"{spec.name} needs a base model, and none is given")
    for parameter in spec.parameters:
        if parameter.default is None and parameter.name not in given:
            faults.add(
                YamlNode(option_flag(parameter.name), None, None),
                f"{spec.name} needs {parameter.rule}, and none is given",
            )


def _shared_out(
    given: Mapping[str, Sequence[object]], n_models: int, spec: MethodSpec | None, faults: YamlErrors
) -> tuple[dict[str, YamlNode], list[dict[str, YamlNode]]]:
    """Options → the parameters of the whole merge, and those of each model."""
    shared: dict[str, YamlNode] = {}
    own: list[dict[str, YamlNode]] = [{} for _ in range(n_models)]
    for name, values in given.items():
        option = option_flag(name)
        known = spec.parameter(name) if spec else None
        if len(values) == 1:
            shared[name] = to_node(values[0], option)
        elif known is not None and not known.per_model:
            faults.add(YamlNode(option, None, None), f"got {len(values)} values, expected one: it holds for all models")
        elif len(values) != n_models:
            faults.add(YamlNode(option, None, None), f"got {len(values)} values for {n_models} models")
        else:
            for entry, value in zip(own, values, strict=True):
                entry[name] = to_node(value, option)
    return shared, own


def _check_names(drafts: Sequence[ParsedDocument], faults: YamlErrors) -> list[tuple[str, ...]]:
    """For each document the names of those it merges; notes names that are there twice, lead nowhere or in a circle."""
    names: dict[str, int] = {}
    for number, draft in enumerate(drafts, start=1):
        faults.document = number
        name = draft.config.name
        if draft.name is not None and name and names.setdefault(name, number) != number:
            faults.add(draft.name, f"{name} is the name of document {names[name]} already")
    uses = []
    for number, draft in enumerate(drafts, start=1):
        faults.document = number
        uses.append(tuple(dict.fromkeys(ref for found in _named(draft, names, faults) for ref in found)))
    _check_order(drafts, uses, names, faults)
    return uses


def _named(draft: ParsedDocument, names: Iterable[str], faults: YamlErrors) -> Iterable[list[str]]:
    for node, ref in draft.refs:
        base = ref.partition("+")[0]
        found = [name for name in names if name in (ref, base)]
        yield found
        if not found and base and not any(mark in base for mark in "/\\:") and not _exists(base):
            faults.add(node, f"no document is called {base}, and there is no such folder. {nearest(base, names)}")


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, ~nobody, a zero byte
        return False


def _check_order(
    drafts: Sequence[ParsedDocument], uses: Sequence[tuple[str, ...]], names: Mapping[str, int], faults: YamlErrors
) -> None:
    """Notes where no order of the documents would do, and where it is not plain which of them is the result."""
    try:
        TopologicalSorter({name: uses[number - 1] for name, number in names.items()}).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        faults.document = names[circle[0]]
        draft = drafts[faults.document - 1]
        faults.add(draft.name or draft.node, f"is made from itself: {' → '.join(circle)}")
        return
    results = _results([draft.config.name for draft in drafts], uses)
    for surplus in results[1:]:
        faults.document = surplus + 1
        faults.add(drafts[surplus].node, f"which is the result, document {results[0] + 1} or this? {_ONE_RESULT}")
    needed = {drafts[results[0]].config.name} | {ref for used in uses for ref in used}
    faults.document = results[0] + 1
    for name in names:
        if name not in needed:
            faults.warn(drafts[results[0]].node, f"{name} is used by no document, and is left out")


def _results(names: Sequence[str | None], uses: Sequence[tuple[str, ...]]) -> list[int]:
    """Which documents the file may be for: those without a name; where all have one, those that no other uses."""
    unnamed = [i for i, name in enumerate(names) if name is None]
    used = {ref for some in uses for ref in some}
    return unnamed or [i for i, name in enumerate(names) if name not in used]
