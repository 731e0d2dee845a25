"""Recognise quantised weights: by the tensors themselves, by config.json, and by files that tools write beside them.

Tools do not agree on where they say that a model is quantised, and some do not say it at all. What they agree on is
that codes lie beside their scales, in names that belong together and in dtypes that no plain weight has. A model's own
integers (position ids, masks, routing tables) have no scales, and 8-bit floats without any are plain floats.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.side_files import QUANTISATION_FILES
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.errors import SurgeryError
from surgery.io.json_io import read_json

FP8, FP4, MXFP4 = "FP8 with scales", "FP4 with block scales", "MXFP4"
READABLE = (FP8, FP4, MXFP4)  # the schemes that `surgery.checkpoint.quantised.dequantise` computes weights of
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
PACKED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")  # dtypes of codes and of block scales, of nothing else
_BY_PARTS = "Quanto or torchao"  # which store the parts of a tensor under names of their own
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# Methods whose config may stand beside plain floats: what was left out of the quantisation, or was undone.
FLOAT_METHODS = ("fp8", "mxfp4", "fbgemm_fp8", "modelopt", "compressed-tensors")

# Endings of names of codes, which their scales do not have: down_proj_blocks, down_proj_scales.
_CODE_ENDING = re.compile(r"[._:]+(?:blocks|packed|q?data|int_data|codes|quanti[sz]ed|q)$")
# What follows the name of codes in that of a companion: weight_scale_inv, weight.absmax, weight._scale.
_COMPANION_ENDING = re.compile(
    r"[._:]+(?:scales?|scale_\w+|scb|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\..*|zeros?|zero_points?"
    r"|global_scale)$",
    re.I,
)
# Companions of a module's `weight` that are not called after it.
_SCALE_OF_MODULE = re.compile(
    r"scales?|scale_inv|q?scale_w(?:eight)?|weights?_scal(?:es?|ing_factor)\w*|_weight_scale\w*|dequant_scale|scb"
    r"|comfy_quant|pre_quant_scale",
    re.I,
)
# Scales of activations, which are no part of the weights, and of the cache of keys and values.
ACTIVATION = re.compile(
    r"(?:\w+_)?(?:input|act|activation|output)_(?:scale|amax|zero_point)(?:_ub|_inv)?|scale_(?:input|output)"
    r"|qscale_act|activation_scaling_factor"
)
CACHE = re.compile(r"(?:kv?|v|q|prob|prob_output)_(?:scale|amax|zero_point)|kv_cache_scaling_factor")
WHOLE_FILE = "scaled_fp8"  # ComfyUI's marker: a weight without a scale of its own then has a scale of 1
MARKER = re.compile(f"{WHOLE_FILE}|comfy_quant")
MAX_COMPANIONS = 100  # names that begin with that of one tensor and are looked at; ten are usual
# Last components that name codes whatever lies beside them → scheme.
_NAMED: Mapping[str, str] = {
    "weight_packed": "compressed-tensors",
    "packed_weight": "packed integers",
    "bitmask": "compressed-tensors, sparse",
    "w_q": "HQQ",
    "qidxs": "QuIP#",
    "b_24": "Marlin",
    "absmax": "bitsandbytes",
}
# Last component of codes → companion in the same module, which together are a scheme.
_PAIRS = (
    ("codes", re.compile("codebooks"), "AQLM"),
    ("indices", re.compile("centroids"), "VPTQ"),
    ("b", re.compile("s"), "Marlin"),
    ("dense_weights", re.compile(".*"), "SpQR"),
    ("weight", re.compile("tables2?"), "HIGGS"),
)


@dataclass(frozen=True)
class Quantisation:
    """How a model is quantised. `readable`: its weights can be computed; `in_config`: config.json says so."""

    scheme: str
    evidence: str
    readable: bool
    in_config: bool


@dataclass(frozen=True)
class QuantisedTensor:
    """Codes and what lies beside them: `scales` of the weights, and one name for messages."""

    codes: StoredTensor
    scheme: str
    scales: tuple[StoredTensor, ...] = ()
    witness: str = ""

    @property
    def evidence(self) -> str:
        """What shows that the tensor holds codes."""
        beside = f' beside "{self.witness}"' if self.witness else ""
        return f'"{self.codes.name}" is {self.codes.dtype}{beside}'


def find_quantisation(checkpoint: Checkpoint) -> Quantisation | None:
    """Return how the weights of `checkpoint` are quantised, and what shows it; None where they are plain numbers."""
    found = list(quantised_tensors(checkpoint))
    settings = quantisation_settings(checkpoint.config)
    if not found and not settings:
        return _by_side_file(checkpoint)
    methods = [_method(values) for values in settings.values()]
    # All that readers cannot make weights of comes first: it is the reason why the rest does not help.
    found.sort(key=lambda tensor: tensor.scheme in READABLE)
    schemes = dict.fromkeys([*methods, *(tensor.scheme for tensor in found)])
    evidence = [*(f"{key} in config.json" for key in settings), *(tensor.evidence for tensor in found[:1])]
    readable = all(tensor.scheme in READABLE for tensor in found) and all(map(_is_linear, settings.values()))
    readable = readable and (bool(found) or all(method in FLOAT_METHODS for method in methods))
    return Quantisation(", ".join(schemes), "; ".join(evidence), readable, bool(settings))


def quantised_tensors(checkpoint: Checkpoint) -> Iterator[QuantisedTensor]:
    """Yield every tensor of codes in `checkpoint`, by name; its scales are not among them."""
    table = _Table(checkpoint)
    taken: set[str] = set()
    for tensor in checkpoint.tensors.values():
        # By name, so that codes come before the scales that are called after them.
        found = None if tensor.name in taken else table.codes(tensor)
        if found is not None:
            taken.update(scale.name for scale in found.scales)
            yield found
    # Block scales whose codes were not recognised: of whatever format, they scale something.
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in PACKED and name not in taken:
            yield QuantisedTensor(tensor, f"packed {tensor.dtype}")


def quantisation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return where in the config, nested ones included → what it says about quantisation."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        # "quantization" is MLX's key, with the width of codes; elsewhere the word may mean anything.
        counts = value if key != "quantization" else isinstance(value, Mapping) and "bits" in value
        if key in CONFIG_KEYS and counts:
            found[key] = value
        elif isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in quantisation_settings(value).items()}
    return found


def stated_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return where it is said, in config.json or in a side file → what is said of the quantisation of `checkpoint`.

    Raises:
        SurgeryError: a side file is damaged.
    """
    found: dict[str, Any] = dict(quantisation_settings(checkpoint.config))
    for name, file in checkpoint.side_files.items():
        if name in QUANTISATION_FILES and isinstance(file, Path):
            found[name] = read_json(file)
    return found


class _Table:
    """The names of a checkpoint, in which companions are looked up."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = checkpoint.tensors
        self.names = sorted(self.tensors)
        self.leaves: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self.leaves[name.rpartition(".")[0]].append(name)
        self.marker = next((name for name in self.names if _leaf(name) == WHOLE_FILE), "")

    def codes(self, tensor: StoredTensor) -> QuantisedTensor | None:
        """Return the codes that `tensor` holds, with their scales; None where it holds none."""
        if tensor.dtype in FLOAT8:
            return self._float8(tensor)
        leaf = _leaf(tensor.name).lower()
        # Floats of the same names are weights: w_q is what some call the queries' projection.
        if leaf in _NAMED and (tensor.dtype in CODES or leaf == "absmax"):
            beside = self._called_after(tensor.name)
            is_nvfp4 = tensor.dtype == "U8" and any(other.dtype == "F8_E4M3" for other in beside)
            witness = next((other.name for other in beside), "")
            return QuantisedTensor(tensor, "NVFP4" if is_nvfp4 else _NAMED[leaf], witness=witness)
        if tensor.dtype in CODES and tensor.shape and not _is_companion(leaf):
            return self._integers(tensor, leaf)
        return None

    def _float8(self, tensor: StoredTensor) -> QuantisedTensor | None:
        leaf = _leaf(tensor.name)
        # A scale may be stored as FP8 itself (NVFP4), and has no scale of its own.
        if _is_companion(leaf.lower()):
            return None
        neighbours = self._neighbours(tensor.name) if leaf == "weight" else []
        module = [self.tensors[n] for n in neighbours if _SCALE_OF_MODULE.fullmatch(_leaf(n))]
        beside = {t.name: t for t in (*self._called_after(tensor.name), *module)}
        scales = tuple(t for t in beside.values() if not MARKER.fullmatch(_leaf(t.name)))
        marks = [*beside, *(n for n in neighbours if ACTIVATION.fullmatch(_leaf(n)))]
        if self.marker and len(tensor.shape) >= 2:
            marks.append(self.marker)
        scheme = _BY_PARTS if _CODE_ENDING.search(tensor.name) else FP8
        return QuantisedTensor(tensor, scheme, scales, marks[0]) if marks else None

    def _integers(self, tensor: StoredTensor, leaf: str) -> QuantisedTensor | None:
        named = leaf in ("weight", "qweight", *(codes for codes, _, _ in _PAIRS))
        neighbours = self._neighbours(tensor.name) if named else []
        for codes, companion, scheme in _PAIRS:
            if leaf == codes and (with_ := [n for n in neighbours if companion.fullmatch(_leaf(n).lower())]):
                return QuantisedTensor(tensor, scheme, witness=with_[0])
        if leaf == "qweight":
            return self._packed(tensor, neighbours)
        module = [self.tensors[n] for n in neighbours if leaf == "weight" and _SCALE_OF_MODULE.fullmatch(_leaf(n))]
        if beside := list({t.name: t for t in (*self._called_after(tensor.name), *module)}.values()):
            return QuantisedTensor(tensor, _scheme_of(tensor, leaf, beside), tuple(beside), beside[0].name)
        # No model computes with a matrix of bytes: its scales are in another file, or are not called so.
        if leaf == "weight" and tensor.dtype in ("I8", "U8") and len(tensor.shape) >= 2:
            return QuantisedTensor(tensor, "integer codes")
        return None

    def _packed(self, tensor: StoredTensor, neighbours: list[str]) -> QuantisedTensor:
        """Return the codes `qweight` of GPTQ, packed along the inputs, or of AWQ, packed along the outputs."""
        scales = next((self.tensors[n] for n in neighbours if _leaf(n) == "scales"), None)
        beside = next((n for n in neighbours if _leaf(n) in ("scales", "qzeros", "g_idx")), "")
        widths = (tensor.shape[-1], scales.shape[-1] if scales is not None and scales.shape else None)
        if tensor.dtype != "I32":
            scheme = "packed integers"
        elif widths[0] == widths[1] or any(_leaf(n) == "g_idx" for n in neighbours):
            scheme = "GPTQ"
        else:
            scheme = "AWQ" if widths[1] == 8 * widths[0] else "GPTQ or AWQ"
        return QuantisedTensor(tensor, scheme, witness=beside)

    def _called_after(self, name: str) -> list[StoredTensor]:
        """Return the companions whose names begin with that of the codes."""
        found = {}
        for stem in dict.fromkeys((name, _CODE_ENDING.sub("", name))):
            first = bisect_left(self.names, stem)
            for other in self.names[first : first + MAX_COMPANIONS]:
                if not other.startswith(stem):
                    break
                if other != name and _COMPANION_ENDING.fullmatch(other[len(stem) :]):
                    found[other] = self.tensors[other]
        return list(found.values())

    def _neighbours(self, name: str) -> list[str]:
        """Return the other names in the module of `name`, which must be one: a file's top level is none."""
        module = name.rpartition(".")[0]
        return [n for n in self.leaves[module] if n != name] if module else []


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_companion(leaf: str) -> bool:
    """Return whether a name's last component says that the tensor scales others."""
    return bool(_SCALE_OF_MODULE.fullmatch(leaf) or ACTIVATION.fullmatch(leaf) or _COMPANION_ENDING.search(leaf))


def _scheme_of(tensor: StoredTensor, leaf: str, beside: list[StoredTensor]) -> str:
    """Return the scheme of integer codes that lie beside scales."""
    leaves = {_leaf(other.name).lower() for other in beside}
    dtypes = {other.dtype for other in beside}
    if any(".quant_state." in other.name for other in beside):
        kind = next(_leaf(other.name) for other in beside if ".quant_state." in other.name)
        return f"bitsandbytes {kind.removeprefix('bitsandbytes__')}"
    if leaves & {"absmax", "scb", "weight_scb"}:
        return "bitsandbytes int8" if "scb" in leaves else "bitsandbytes"
    if tensor.dtype == "U8" and leaf.endswith("blocks"):
        return MXFP4
    if tensor.dtype in ("U8", "I8") and any("scale_2" in one for one in leaves):
        return "NVFP4"
    if tensor.dtype == "I8" and len(beside) == 1 and "F8_E8M0" in dtypes:
        return FP4
    if leaf.endswith("data"):
        return _BY_PARTS
    if tensor.dtype == "U32":
        return "MLX"
    return "INT8 with scales" if tensor.dtype == "I8" else "integer codes with scales"


def _method(settings: object) -> str:
    """Return what a config calls its method of quantisation."""
    if not isinstance(settings, Mapping):
        return str(settings)
    named = settings.get("quant_method")
    if not named and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return "bitsandbytes"  # as transformers guesses it where old files do not say
    return str(named or "unknown")


def _is_linear(settings: object) -> bool:
    """Return whether code times scale is the weight: rotations and sparse packing are something else."""
    if not isinstance(settings, Mapping):
        return False
    sparsity = settings.get("sparsity_config")
    packed = isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense")
    return not settings.get("transform_config") and not packed


def _by_side_file(checkpoint: Checkpoint) -> Quantisation | None:
    """Return what a known side file says, if any tensor could hold codes: such a file outlives what it describes."""
    suspect = next((t for t in checkpoint.tensors.values() if _may_be_codes(t)), None)
    if suspect is None or checkpoint.folder is None:
        return None
    for name, file in checkpoint.side_files.items():
        if name in QUANTISATION_FILES and isinstance(file, Path):
            evidence = f'{name}, and "{suspect.name}" is {suspect.dtype}'
            scheme = _stated(file) or QUANTISATION_FILES[name]
            return Quantisation(scheme, evidence, readable=False, in_config=False)
    return None


def _stated(path: Path) -> str | None:
    """Return the method that a side file names, if it does."""
    try:
        values = read_json(path)
    except SurgeryError:
        return None  # a damaged file says that much by its name
    inner = values.get("quantization")
    named = [values.get("quant_method"), inner.get("quant_algo") if isinstance(inner, Mapping) else None]
    return next((one for one in named if isinstance(one, str) and one), None)


def _may_be_codes(tensor: StoredTensor) -> bool:
    """Return whether a matrix could be codes: of 8 bits, or of packed integers, and called after no index or mask."""
    if len(tensor.shape) < 2 or re.search(r"(ids?|index|indices|mask|bias|map)$", _leaf(tensor.name), re.I):
        return False
    return tensor.dtype in (*FLOAT8, *PACKED, "I8", "U8", "I16", "U16", "I32", "U32")
