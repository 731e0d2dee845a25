"""Read an adapter's config: what PEFT merges by it, and why it may not be merged at all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from surgery.checkpoint.checkpoint import ADAPTER_CONFIG
from surgery.errors import SurgeryError
from surgery.io.input_files import MB
from surgery.io.json_fields import COUNT, FLAG, MAX_COUNT, NUMBER, TEXT, TEXTS, check_fields, wrong_value
from surgery.io.json_io import read_json
from surgery.io.patterns import SuffixPatterns

DEFAULT_ALPHA = 8  # PEFT's, for configs that do not say
LORA, TRAINED_TOKENS = "LORA", "TRAINABLE_TOKENS"
MERGE_WITH_PEFT = "Merge it with PEFT (merge_and_unload) and give the merged folder."
CONVERT = "Save it as a plain LoRA adapter: save_pretrained(…, path_initial_model_for_weight_conversion=INITIAL)."
MAX_CONFIG_BYTES = MB

# Keys of adapter_config.json with which the result is not W + s·B·A → what messages call them.
OTHER_KINDS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "replicated layers",
}
# Initialisations that take their first B·A out of W. What it was follows from W alone, or from nothing that is saved.
FROM_WEIGHTS = ("pissa", "olora")
BASE_CHANGING = {
    "pissa_niter": "a random decomposition",
    "corda": "data that it was initialised on",
    "loftq": "a quantised copy of it",
    "lora_ga": "gradients that it was initialised from",
}
_KINDS = {
    **dict.fromkeys(("revision", "peft_type", "task_type", "bias"), TEXT),
    "r": COUNT,
    "lora_alpha": NUMBER,
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias", "ensure_weight_tying"), FLAG),
    **dict.fromkeys(("modules_to_save", "target_parameters"), TEXTS),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The content of an adapter_config.json. `where`: its path, for messages."""

    values: Mapping[str, Any]
    where: Path

    @property
    def initial(self) -> str:
        """How the factors were initialised, where that has a name; in lower case."""
        name = self.values.get("init_lora_weights")
        return name.lower() if isinstance(name, str) else ""

    @property
    def changed_base(self) -> str | None:
        """What the base was changed by before training, where that cannot be computed from it."""
        return next((reason for name, reason in BASE_CHANGING.items() if self.initial.startswith(name)), None)

    @property
    def decomposition(self) -> Literal["pissa", "olora"] | None:
        """How the first B·A was taken out of the base, where it can be computed from the base."""
        if self.initial == "pissa":
            return "pissa"
        return "olora" if self.initial == "olora" else None

    @property
    def task(self) -> str:
        """What kind of model it was trained in, by PEFT's name; empty where the config does not say."""
        return str(self.values.get("task_type") or "")

    @property
    def has_tied_weights(self) -> bool:
        """Whether what is trained of the embedding was trained of a tied output head as well."""
        return bool(self.values.get("ensure_weight_tying"))

    def refuse_other_kinds(self) -> None:
        """Raise SurgeryError, with every reason, for what is no closed form of the base and the saved tensors."""
        values = self.values
        unsupported = [f"{words} ({key})" for key, words in OTHER_KINDS.items() if values.get(key)]
        if values.get("alora_invocation_tokens"):
            raise SurgeryError(
                "is an activated LoRA (alora_invocation_tokens), which changes the model after certain tokens only: no "
                "weights do that",
                where=self.where,
                hint="Run it with PEFT.",
            )
        kind = values.get("peft_type", LORA)
        if kind not in (LORA, TRAINED_TOKENS):
            unsupported.append(f"peft_type {kind}")
        if unsupported:
            raise SurgeryError(
                f"cannot be rebuilt as W + ΔW: {'; '.join(unsupported)}", where=self.where, hint=MERGE_WITH_PEFT
            )

    def saves(self, module: str) -> bool:
        """Return whether `module` was trained as a whole, beside the base's (modules_to_save)."""
        return any(module.endswith(name) for name in self.values.get("modules_to_save") or ())

    def token_rows(self, module: str) -> np.ndarray | None:
        """Return the rows of `module` that single tokens were trained of; None where the config names none.

        Raises:
            SurgeryError: they are no row numbers.
        """
        key = "token_indices" if self.values.get("peft_type") == TRAINED_TOKENS else "trainable_token_indices"
        rows: Any = self.values.get(key)
        if isinstance(rows, dict):
            rows = next((rows[name] for name in rows if re.search(rf"(^|\.){re.escape(name)}$", module)), None)
        if rows is None:
            return None
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row <= MAX_COUNT for row in rows):
            raise wrong_value(key, rows, "a list of token ids", where=self.where)
        return np.array(rows, dtype=np.int64)

    def scale(self, module: str, rank: int) -> float:
        """Return s of s·B·A. Raises SurgeryError where the config gives no number."""
        patterns, values = self._alphas
        at = patterns.first_match(module)
        alpha = self.values.get("lora_alpha", DEFAULT_ALPHA) if at is None else values[at]
        try:
            scale = float(alpha) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        except (TypeError, ValueError, OverflowError):  # a stranger's config: the value may be of any type
            scale = math.nan
        if not math.isfinite(scale):
            raise SurgeryError(
                f'lora_alpha and alpha_pattern give "{module}" no number (lora_alpha: {alpha!s:.40})', where=self.where
            )
        return scale

    @cached_property
    def _alphas(self) -> tuple[SuffixPatterns, list[Any]]:
        """The α of modules: by PEFT's rule that of the first key of alpha_pattern that matches the end of its name."""
        by_pattern = self.values.get("alpha_pattern") or {}
        if not isinstance(by_pattern, dict):
            raise SurgeryError(f"alpha_pattern is no table, but {by_pattern!r:.40}", where=self.where)
        return SuffixPatterns(by_pattern, where=self.where), list(by_pattern.values())


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return the config of the adapter in `folder`. Raises SurgeryError where it is damaged."""
    path = folder / ADAPTER_CONFIG
    values = read_json(path, limit=MAX_CONFIG_BYTES)
    check_fields(values, _KINDS, where=path)
    return AdapterConfig(values, path)
