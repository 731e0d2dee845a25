"""Fill in what configs leave to their family: values that follow from others, by the rules of `config_defaults.json`.

A rule is a list: its name, then its arguments, as `["quotient", "hidden_size", "num_attention_heads"]`. Which family
has which was found by trying them on transformers' own config classes (`tests/support/config_defaults.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
# Values under which a file says nothing.
UNSAID = (None, "auto", -1)
SLIDING, FULL = "sliding_attention", "full_attention"


def apply_rule(rule: Sequence[Any], values: Values, n_layers: int) -> Any:
    """Return the value that `rule` gives, or None where what it needs is missing or is no number.

    Args:
        values: the other keys of the config, legacy ones such as `sliding_window_pattern` among them.
        n_layers: the number of entries of a list with one per layer.
    """
    name, *arguments = rule
    try:
        return _RULES[name](values, n_layers, *arguments)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def keys_of(rule: Sequence[Any]) -> list[str]:
    """Return the keys that a rule for a list of layers reads: what they say, the list says."""
    # The first argument of these is a key; of the others, which give numbers, no key is used up.
    if rule[0] == "unless":
        return [*rule[1], *keys_of(rule[2])]
    if rule[0] in ("window", "alternate_window", "nope_window"):
        return ["use_sliding_window", "max_window_layers"]
    return list(rule[1:2]) if rule[0] in ("every", "leading") else []


def _copy(values: Values, n: int, key: str) -> Any:
    return values[key]


def _quotient(values: Values, n: int, key: str, by: str) -> int:
    return int(values[key] // values[by])


def _over(values: Values, n: int, key: str, divisor: int) -> int:
    return -int(-values[key] // divisor)


def _sum(values: Values, n: int, key: str, other: str) -> Any:
    return values[key] + values[other]


def _product(values: Values, n: int, factor: int, key: str) -> Any:
    return factor * values[key]


def _value(values: Values, n: int, value: Any) -> Any:
    return value


def _gated(values: Values, n: int, flag: str, key: str, otherwise: Any) -> Any:
    """`key` where `flag` is set."""
    return values[key] if values[flag] else otherwise


def _cycle(values: Values, n: int, period: Sequence[str], last: str | None = None) -> list[str]:
    """The kinds of `period` again and again; the last layer is a `last` one."""
    kinds = [period[i % len(period)] for i in range(n)]
    return [*kinds[:-1], last] if last is not None and kinds else kinds


def _every(values: Values, n: int, key: str, default: int, kind: str, others: str, first: int = 1) -> list[str]:
    """Every p-th layer is a `kind` one, with p under `key`, counted from `first`."""
    period = int(values.get(key, default))
    return [kind if (i + first) % period == 0 else others for i in range(n)]


def _leading(values: Values, n: int, key: str, default: int, first: str, others: str) -> list[str]:
    """The first layers, as many as `key` says, are `first` ones."""
    count = int(values.get(key, default))
    return [first if i < count else others for i in range(n)]


def _places(values: Values, n: int, key: str, default: int) -> list[int]:
    """The numbers of every p-th layer, with p under `key`."""
    period = int(values.get(key, default))
    return [i for i in range(n) if (i + 1) % period == 0]


def _last(values: Values, n: int) -> int:
    """The number of the last layer."""
    return n - 1


def _unless(values: Values, n: int, flags: Mapping[str, bool], rule: Sequence[Any]) -> Any:
    """What `rule` gives where `flags` are as they are by default; with others nothing is known."""
    return apply_rule(rule, values, n) if all(values[flag] == value for flag, value in flags.items()) else None


def _window(values: Values, n: int) -> list[str]:
    """A sliding window from layer `max_window_layers` on, if there is a window (Qwen2)."""
    sliding = values["sliding_window"]  # none, or 0
    return [SLIDING if sliding and i >= values["max_window_layers"] else FULL for i in range(n)]


def _alternate_window(values: Values, n: int) -> list[str]:
    """A sliding window in every second layer before `max_window_layers` (Qwen2-MoE)."""
    sliding, end = values["use_sliding_window"], values["max_window_layers"]
    return [SLIDING if sliding and i % 2 == 0 and i < end else FULL for i in range(n)]


def _nope_window(values: Values, n: int) -> list[str]:
    """A sliding window in layers without rotary embeddings (SmolLM3)."""
    sliding = values["use_sliding_window"] and values["sliding_window"] is not None
    return [SLIDING if sliding and not values["no_rope_layers"][i] else FULL for i in range(n)]


_RULES: Mapping[str, Callable[..., Any]] = {
    "copy": _copy,
    "quotient": _quotient,
    "over": _over,
    "sum": _sum,
    "product": _product,
    "value": _value,
    "gated": _gated,
    "cycle": _cycle,
    "every": _every,
    "leading": _leading,
    "places": _places,
    "last": _last,
    "window": _window,
    "alternate_window": _alternate_window,
    "nope_window": _nope_window,
    "unless": _unless,
}
