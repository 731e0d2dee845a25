"""Build the config of a merge that is given on the command line, by method and options, without a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from merges.choices import Compat
from merges.config.read import read_document
from merges.config.schema import MergeConfig
from merges.config.settings import MethodSpec
from merges.config.tolerant import ReadContext
from surgery.io.command_line import option_flag
from surgery.io.yaml_nodes import YamlErrors, YamlNode, to_node


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
    """Return the config of a command line: `surgery merge METHOD A B --base X --weight 0.5 --weight 0.3`.

    Args:
        parameters: name → its values, each as a config would write it; one value is for all models, as many as there
            are `models` are for one each.

    Raises:
        SurgeryError: all errors, one a line, by the names of the options: `--weight: got 3 values for 2 models`.
    """
    errors = YamlErrors("")
    spec = methods.get(method)
    given = parameters or {}
    if spec is not None:
        _check_given(spec, base, given, errors)
    shared, own = _distribute(given, len(models), spec, errors)
    # Errors in the number of values first: with the wrong ones nothing else can be checked.
    errors.raise_if_any()
    # Nodes without lines, whose paths are the options: errors then name what was typed.
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
        # Its entries have the paths of their own options.
        "parameters": YamlNode("", None, shared),
        "dtype": YamlNode("--dtype", None, dtype),
        "out_dtype": YamlNode("--out-dtype", None, out_dtype),
        "tokenizer_source": YamlNode("--tokenizer-source", None, tokenizer_source),
        "chat_template": YamlNode("--chat-template", None, chat_template),
        "seed": YamlNode("--seed", None, seed),
        "compat": YamlNode("--compat", None, compat),
    }
    parsed = read_document(YamlNode("", None, document), ReadContext(errors, methods), strict=True)
    errors.raise_if_any()
    return parsed.config.model_copy(update={"warnings": errors.warnings_of(1)})


def _check_given(spec: MethodSpec, base: str | None, given: Collection[str], errors: YamlErrors) -> None:
    """Report what a method cannot do without, by the name of its option."""
    # `read_document` would report both as well, but by keys of a config that nobody has written.
    if spec.base == "required" and base is None:
        errors.add(YamlNode("--base", None, None), f"{spec.name} needs a base model, and none is given")
    for parameter in spec.parameters:
        if parameter.default is None and parameter.name not in given:
            errors.add(
                YamlNode(option_flag(parameter.name), None, None),
                f"{spec.name} needs {parameter.rule}, and none is given",
            )


def _distribute(
    given: Mapping[str, Sequence[object]], n_models: int, spec: MethodSpec | None, errors: YamlErrors
) -> tuple[dict[str, YamlNode], list[dict[str, YamlNode]]]:
    """Return the parameters of the whole merge, and those of each model."""
    shared: dict[str, YamlNode] = {}
    own: list[dict[str, YamlNode]] = [{} for _ in range(n_models)]
    for name, values in given.items():
        option = option_flag(name)
        known = spec.parameter(name) if spec else None
        if len(values) == 1:
            shared[name] = to_node(values[0], option)
        elif known is not None and not known.per_model:
            errors.add(YamlNode(option, None, None), f"got {len(values)} values, expected one: it holds for all models")
        elif len(values) != n_models:
            errors.add(YamlNode(option, None, None), f"got {len(values)} values for {n_models} models")
        else:
            for entry, value in zip(own, values, strict=True):
                entry[name] = to_node(value, option)
    return shared, own
