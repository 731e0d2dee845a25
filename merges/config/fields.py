"""Reading nodes of a config as what they should be: keys of a mapping, entries of a list, text, scalars, models.

Every function notes what is wrong in `faults` and returns a stand-in, so that reading goes on. What was read after a
fault is never used: `YamlErrors.settle` raises.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from merges.config.settings import ParameterSpec, Scalar, shown
from surgery.errors import listing
from surgery.io.yaml_nodes import YamlErrors, YamlNode

NO_MODEL = ""  # stands in for a reference that could not be read


def read_mapping(node: YamlNode, faults: YamlErrors) -> dict[str, YamlNode]:
    """The entries of a mapping, none perhaps."""
    if isinstance(node.value, dict):
        return node.value
    faults.add(node, f"got {shown(node.plain)}, expected a mapping of keys to values")
    return {}


def read_entries(node: YamlNode, faults: YamlErrors) -> tuple[YamlNode, ...]:
    """The entries of a list with at least one."""
    if isinstance(node.value, tuple) and node.value:
        return node.value
    faults.add(node, f"got {shown(node.plain)}, expected a list with at least one entry")
    return ()


def read_fields(
    node: YamlNode,
    known: Sequence[str],
    faults: YamlErrors,
    *,
    required: Sequence[str] = (),
    elsewhere: Iterable[str] = (),
) -> dict[str, YamlNode]:
    """The keys of a mapping that may hold only `known`; those left empty are taken as not given.

    Args:
        elsewhere: keys that belong under `parameters`, for a better hint.
    """
    found = {}
    for key, child in read_mapping(node, faults).items():
        if key not in known:
            hint = "It belongs under parameters." if key in elsewhere else nearest(key, known)
            faults.add(child, f"unknown key. {hint}")
        elif not child.is_empty:
            found[key] = child
    if isinstance(node.value, dict):
        for key in required:
            if key not in found:
                faults.add(node.value.get(key, node), f"{key} is missing")
    return found


def read_text(node: YamlNode, faults: YamlErrors) -> str:
    """Text that is not empty."""
    if isinstance(node.value, str) and node.value.strip():
        return node.value
    quote = "" if isinstance(node.value, (str, dict, tuple)) else ". Put it in quotes"
    faults.add(node, f"got {shown(node.plain)}, expected text{quote}")
    return ""


def read_choice(node: YamlNode, choices: Iterable[str], faults: YamlErrors) -> str | None:
    """One of some names; None where it is another."""
    every = list(choices)
    text = read_text(node, faults)
    if text in every:
        return text
    if text:
        faults.add(node, f"got {shown(text)}. {nearest(text, every)}")
    return None


def read_scalar(node: YamlNode, spec: ParameterSpec, faults: YamlErrors) -> Scalar | None:
    """A value of a parameter's kind and in its bounds; None where it is not."""
    try:
        return spec.read(node.plain)
    except ValueError as error:
        faults.add(node, str(error))
        return None


def read_model(node: YamlNode, faults: YamlErrors) -> str:
    """A model as our reference, `BASE+ADAPTER` or `org/name@revision`, from text or from mergekit's mapping.

    The mapping is `{model: {path, revision}, lora: {path, revision}, override_architecture}`; model and lora may be
    text.
    """
    if not isinstance(node.value, dict):
        return read_text(node, faults)
    keys = read_fields(node, ("model", "lora", "override_architecture"), faults, required=("model",))
    if "override_architecture" in keys:
        read_text(keys["override_architecture"], faults)
        faults.warn(keys["override_architecture"], "has no effect: tensors are found by name and shape")
    parts = [_path(keys[key], faults) for key in ("model", "lora") if key in keys]
    return "+".join(parts) if all(parts) else NO_MODEL


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that leads from a misspelt name to a known one."""
    every = list(known)
    near = difflib.get_close_matches(name, every, n=1)
    return f'Did you mean "{near[0]}"?' if near else f"Expected one of: {listing(every)}."


def _path(node: YamlNode, faults: YamlErrors) -> str:
    if not isinstance(node.value, dict):
        return read_text(node, faults)
    keys = read_fields(node, ("path", "revision"), faults, required=("path",))
    parts = [read_text(keys[key], faults) for key in ("path", "revision") if key in keys]
    return "@".join(parts) if all(parts) else NO_MODEL
