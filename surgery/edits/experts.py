"""Scale experts in the weights: an expert's contribution to the residual stream times β, as D_e ← β·D_e on disk.

After arXiv 2505.14681, which multiplies the routing weight of chosen experts by β = 64 at run time. An expert's output
is linear in its down projection: (β·w_e)·D_e·h_e = w_e·(β·D_e)·h_e. Only the named experts' down projections (with
their biases) change. Where β is a power of two and nothing overflows or becomes subnormal, the effect is that of the
factor on the routing weight (after selection and renormalisation), to the bit. Shared experts never change.

| stored as | what changes |
|---|---|
| floats: a tensor per expert, or one for all | the expert's values |
| FP8 with block scales (`weight_scale_inv`) | the expert's scales |
| MXFP4 (`down_proj_blocks`, `down_proj_scales`) | log₂ β is added to the expert's block exponents |

β = 0 writes zeros in the place of values, quantised ones included, since not every scale format has a zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.model_config import language_config
from surgery.checkpoint.quantised.quantisation import FP8, MXFP4, QuantisedTensor, quantised_tensors
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader, segments
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Expert, Part, by_layer
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import ATTENTION, NORM, ExpertLayer, parts_of, word_of
from surgery.edits.common import (
    Edit,
    EditDescription,
    Measure,
    TensorChange,
    check_indices,
    edit_options,
    record,
    require_in_layer,
    write_edit,
)
from surgery.edits.kernels import SCALE_BLOCKS, SHIFT_EXPONENTS
from surgery.edits.undo_file import UndoBlocks
from surgery.engine.edit_report import EditReport
from surgery.engine.kernel import Kernel, Parameter
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import PlannedTensor
from surgery.errors import ErrorList, listing, usage_error

COMMAND = "edit experts"
PAPER = "arXiv:2505.14681"
QUANTISED = ("fp8", "mxfp4")  # the methods whose formats are understood here, as configs name them
EXPONENTS = ("U8", "F8_E8M0")  # what stores block scales 2^(e − 127) as bytes e
LARGEST = 254  # of such e; 255 stands for NaN
CAUTION = "β acts on the prompt too, which a factor at run time can leave out."


@dataclass(frozen=True)
class _Down:
    """The tensors with the down projections of `experts`: of all n of a layer, along the first axis, or of one.

    scale: the block scales of quantised values; None where the values are the weights.
    power: the reason why β must be a power of two, or empty.
    """

    experts: tuple[Expert, ...]
    values: StoredTensor
    bias: StoredTensor | None
    scale: StoredTensor | None
    power: str = ""

    def changes(self, scales: Mapping[Expert, float]) -> Iterable[TensorChange]:
        """Yield the tensors that change where each expert is multiplied by its β."""
        factors = [scales.get(expert, 1.0) for expert in self.experts]
        if self.scale is None:
            yield from _scaled(self.values, factors)
        else:
            yield from _scaled(self.values, [0.0 if factor == 0 else 1.0 for factor in factors])
            # Zero is in the values: not every scale format has one.
            nonzero = [factor or 1.0 for factor in factors]
            yield from (_shifted if self.scale.dtype in EXPONENTS else _scaled)(self.scale, nonzero)
        if self.bias is not None:
            yield from _scaled(self.bias, factors)


def scale_experts(
    model: str,
    out: Path,
    *,
    scales: Mapping[Expert, float],
    measure: Measure | None = None,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Write `model` with D_e ← β·D_e, the down projection and its bias, for every expert of `scales` to `out`.

    The product is taken in fp32 (fp64 for F64) and rounded once to the stored dtype; every other tensor, and what a
    tensor stores of other experts, keeps its bytes. `surgery.edits.undo_file.undo` restores the model. The report's
    norms are those of the stored values: of scales where the weights are quantised.

    Example:
        from surgery.checkpoint import Expert
        surgery.scale_experts("lab:moe", Path("OUT"), scales={Expert(1, 3): 4.0})

    Args:
        scales: expert → β ≥ 0; 0 removes the expert's contribution, exactly; experts with β = 1 are left alone.
        measure: measures the result before it is committed, for manifest and card; where it raises SurgeryError
            nothing is kept.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: an expert is not there, its layer has none, or its down projection is not recognised; β is
            negative, not finite, or no power of two where exponents store it; an exponent would leave its range;
            nothing would change; the model applies routing weights to experts' inputs or normalises their outputs; it
            is quantised in another way (all errors are listed); `out` exists; NaN or infinite values came out; the disk
            is full; `measure` rejected the result.
    """
    if not scales:
        raise usage_error("no experts were given", where=COMMAND, hint="Name them: --expert L12E45.")
    scales = {expert: float(scale) for expert, scale in scales.items()}  # 64 and 64.0 give the same manifest
    base = open_checkpoint(model)
    structure = model_structure(base)
    downs = _checked(base, structure, scales)
    changes = [change for down in downs for change in down.changes(scales)]
    if not changes:
        raise usage_error("nothing to do: every β is 1.", where=COMMAND)
    changed: dict[Part, float] = {expert: scale for expert, scale in scales.items() if scale != 1}
    description = EditDescription(
        "Model with experts scaled",
        f"{len(changed)} routed expert(s) scaled (w·E(x) ← β·w·E(x))",
        PAPER,
        "their down projections multiplied by β",
        ("mixture-of-experts", "expert-steering"),
        "β",
        CAUTION,
    )
    warnings = []
    if any(down.scale is not None for down in downs):
        warnings.append("the experts' weights are quantised: norms are those of the stored scales or codes.")
    command = record(base, COMMAND, edit_options(scales, Expert.NOUN))
    edit = Edit(base, structure, "experts", changed, changes, description, command, warnings=warnings)
    return write_edit(edit, out, measure=measure, dry_run=dry_run, options=options)


def _checked(base: Checkpoint, structure: ModelStructure, scales: Mapping[Expert, float]) -> list[_Down]:
    """Return the tensors of the experts in `scales`. Raises SurgeryError with all errors of the request."""
    errors = ErrorList()
    for expert, scale in sorted(scales.items()):
        if not math.isfinite(scale) or scale < 0:
            errors.add(f"{expert}: got β = {scale:g}, expected a finite number from 0 on.", usage=True)
    if model_errors := _check_model(base):
        errors.extend(model_errors)
        errors.raise_if_any(COMMAND)  # such weights cannot be checked any further
    downs: list[_Down] = []
    for layer, indices in by_layer(scales).items():
        named = listing((str(Expert(layer, index)) for index in indices), 3)
        what = "routed experts that are recognised"
        experts = require_in_layer(structure.experts, layer, named, structure, base.ref, errors, what=what)
        if experts is not None:
            check_indices(Expert, layer, indices, experts.n_experts, errors)
            _check_norm(structure, layer, named, errors)
            there = [Expert(layer, index) for index in indices if 0 <= index < experts.n_experts]
            downs += _downs(base, there, experts, errors)
    for down in downs:
        _check_powers(down, scales, errors)
    errors.raise_if_any(COMMAND)
    return downs


def _check_model(base: Checkpoint) -> ErrorList:
    """Return an error for each setting of the config by which scaled weights differ from a scaled routing weight."""
    errors = ErrorList()
    config = language_config(base.config)
    method = _quantisation(base).get("quant_method")
    if method not in (None, *QUANTISED):
        errors.add(_not_scaled(base, str(method)))
    elif other := next((tensor for tensor in quantised_tensors(base) if not _is_scaled(tensor)), None):
        errors.add(f"{_not_scaled(base, other.scheme)} Evidence: {other.evidence}.")
    # Neither names nor shapes show where the routing weight is applied. Llama 4 is the one family that always applies
    # it to the experts' input; others have an option for it.
    llama4 = any(str(part.get("model_type")).startswith("llama4") for part in (base.config, config))
    if llama4 or any(value for key, value in config.items() if key.endswith("router_weight_on_input")):
        errors.add(
            f"{base.ref} multiplies the experts' inputs by the routing weight, not their outputs, and experts are not "
            "linear in these: no change of the weights does what β on the routing weight does."
        )
    return errors


def _not_scaled(base: Checkpoint, method: str) -> str:
    return (
        f"{base.ref} is quantised ({method}): experts are scaled where weights are stored as floats, as FP8 with "
        "block scales, or as MXFP4. Use the unquantised model."
    )


def _is_scaled(tensor: QuantisedTensor) -> bool:
    """Return whether the scales of `tensor` are those that are changed here."""
    if tensor.scheme == MXFP4:
        return True
    return tensor.scheme == FP8 and [scale.name for scale in tensor.scales] == [f"{tensor.codes.name}_scale_inv"]


def _check_norm(structure: ModelStructure, layer: int, named: str, errors: ErrorList) -> None:
    """Add an error where the experts' outputs may be normalised."""
    names = next(block.names for block in structure.blocks if block.index == layer)
    for name in names:
        words = parts_of(name)
        if "experts" in words and NORM.search(word_of(words)) and not any(ATTENTION.search(word) for word in words):
            errors.add(
                f"{named}: {name} is a norm among the experts, which takes a factor out of their outputs again: β on "
                "the routing weight cannot be written into the weights."
            )


def _downs(base: Checkpoint, wanted: Sequence[Expert], experts: ExpertLayer, errors: ErrorList) -> list[_Down]:
    """Return the tensors with the down projections of `wanted`, experts of one layer, where they are recognised."""
    if experts.layout == "per-expert":
        by_number = {_number(name): name for name in experts.down}
        stored: list[tuple[tuple[Expert, ...], str | None]] = [((e,), by_number.get(e.index)) for e in wanted]
    elif wanted:
        every = tuple(Expert(wanted[0].layer, index) for index in range(experts.n_experts))
        # Several candidates are as bad as none: a factor on the wrong one would go unnoticed.
        stored = [(every, experts.down[0] if len(experts.down) == 1 else None)]
    else:
        return []
    if lost := [
        expert for owners, name in stored if name is None for expert in (owners if len(owners) == 1 else wanted)
    ]:
        errors.add(
            f"{listing(map(str, lost), 3)}: none of the experts' tensors is recognised as the down projection "
            f"({listing(experts.names, 3)})."
        )
    downs = [_down(base, owners, name, errors) for owners, name in stored if name is not None]
    return [down for down in downs if down is not None]


def _down(base: Checkpoint, experts: tuple[Expert, ...], name: str, errors: ErrorList) -> _Down | None:
    """Return the tensor `name`, (out, in) of one expert or (n, …) of all n `experts`, with its bias and scales."""
    values, packed = base.tensors[name], name.endswith("_blocks")
    # GPT-OSS has down_proj_blocks, _scales and _bias side by side; others append to the name of the values.
    stem = name.removesuffix(".weight").removesuffix("_blocks").removesuffix("_weight")
    bias = base.tensors.get(f"{stem}.bias" if name.endswith(".weight") else f"{stem}_bias")
    scale_name = f"{stem}_scales" if packed else f"{name}_scale_inv"
    scale = base.tensors.get(scale_name)
    method, scale_fmt = (_quantisation(base).get(key) for key in ("quant_method", "scale_fmt"))
    text = f"{name}, {values.dtype} {list(values.shape)}"
    # Each branch names the tensor that does not fit, for whoever adds support for its format.
    if scale is None and (packed or (method == "fp8" and values.dtype.startswith("F8"))):
        errors.add(f"{text}: the scales that belong to it, {scale_name}, are not there.")
    elif scale is None and not values.is_float:
        errors.add(f"{text}: is stored in a way that is not understood.")
    elif scale is not None and not _fits(values, scale, len(experts), packed=packed):
        errors.add(f"{text}: its scales, {scale.name}, {scale.dtype} {list(scale.shape)}, do not fit it.")
    elif bias is not None and not _is_bias(bias, values, experts):
        errors.add(f"{text}: its bias, {bias.name}, {bias.dtype} {list(bias.shape)}, does not fit it.")
    else:
        power = ""
        if scale is not None and scale.dtype in EXPONENTS:
            power = f"{scale.name} stores the exponents of block scales"
        elif scale is not None and scale_fmt == "ue8m0":
            power = f"engines round the block scales in {scale.name} to powers of two (scale_fmt ue8m0)"
        return _Down(experts, values, bias, scale, power)
    return None


def _fits(values: StoredTensor, scale: StoredTensor, n: int, *, packed: bool) -> bool:
    """Return whether `scale` can be the scales of n experts' `values`."""
    if packed:
        return values.dtype == "U8" and scale.dtype in EXPONENTS and scale.shape == values.shape[:-1]
    # Blocks are of 128 × 128 values or others, so only the number of experts can be compared.
    stored = values.dtype.startswith("F8") and (scale.is_float or scale.dtype == "F8_E8M0")
    return stored and (n == 1 or scale.shape[:1] == (n,))


def _is_bias(bias: StoredTensor, values: StoredTensor, experts: Sequence[Expert]) -> bool:
    """Return whether `bias` can be the bias of the experts' `values`: (out,) of one, (n, out) of all."""
    # Of one expert it may have a leading axis of 1.
    n = len(experts)
    shaped = bias.shape[:-1] in ((), (1,)) if n == 1 else bias.shape[:-1] == (n,)
    return bias.is_float and bias.shape != () and shaped and bias.shape[-1] in values.shape


def _check_powers(down: _Down, scales: Mapping[Expert, float], errors: ErrorList) -> None:
    """Add an error for each β that `down` cannot store: no power of two, or out of its exponents' range."""
    for block, expert in enumerate(down.experts):
        scale = scales.get(expert, 1.0)
        # 0 and 1 need no exponent; negative and infinite factors are errors already.
        if not down.power or down.scale is None or scale in (0, 1) or not math.isfinite(scale) or scale < 0:
            continue
        # frexp gives a mantissa in [0.5, 1): 0.5 for powers of two alone.
        if math.frexp(scale)[0] != 0.5:
            errors.add(f"{expert}: got β = {scale:g}, expected a power of two: {down.power}.", usage=True)
        elif down.scale.dtype in EXPONENTS:
            # Looked up now: while writing, a byte out of range would silently wrap around.
            low, high = _range(down.scale, block, len(down.experts))
            shift = _log2(scale)
            if low + shift < 0 or high + shift > LARGEST:
                errors.add(
                    f"{expert}: β = {scale:g} adds {shift} to the exponents in {down.scale.name}, {low} to {high}, "
                    f"which would leave the range 0 to {LARGEST}.",
                    usage=True,
                )


def _range(exponents: StoredTensor, block: int, n: int) -> tuple[int, int]:
    """Return the smallest and the largest byte of the block `block` of n."""
    size = exponents.n_elements // n
    low, high = 255, 0
    with SourceFiles(exponents.files) as files:
        reader = TensorReader(files)
        for begin, end in segments(size):
            data = reader.raw(exponents, block * size + begin, block * size + end, "exponents")
            low, high = min(low, int(data.min())), max(high, int(data.max()))
    return low, high


def _scaled(tensor: StoredTensor, factors: Sequence[float]) -> Iterable[TensorChange]:
    return _changed(tensor, SCALE_BLOCKS, factors, {"scales": tuple(factors), "transposed": True})


def _shifted(tensor: StoredTensor, factors: Sequence[float]) -> Iterable[TensorChange]:
    return _changed(tensor, SHIFT_EXPONENTS, factors, {"shifts": tuple(map(_log2, factors))})


def _changed(
    tensor: StoredTensor, kernel: Kernel, factors: Sequence[float], params: Mapping[str, Parameter]
) -> Iterable[TensorChange]:
    """Yield the change of a tensor whose blocks along the first axis are multiplied by `factors`, if one is not 1."""
    chosen = tuple(block for block, factor in enumerate(factors) if factor != 1)
    if chosen:
        blocks = UndoBlocks(tensor) if len(factors) == 1 else UndoBlocks(tensor, chosen, len(factors), transposed=True)
        yield TensorChange(
            PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (TensorInput(tensor),), kernel, params), blocks
        )


def _log2(factor: float) -> int:
    """Return log₂ of a power of two."""
    return math.frexp(factor)[1] - 1


def _number(name: str) -> int:
    """Return the number of the expert that a per-expert tensor belongs to."""
    words = parts_of(name)
    return int(words[words.index("experts") + 1])


def _quantisation(base: Checkpoint) -> Mapping[str, Any]:
    """Return the config's quantisation settings; empty where the weights are not quantised."""
    config = language_config(base.config)
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(settings, Mapping):
        return {"quant_method": settings}
    # Settings without a method are refused as "unknown": whatever they say, the values are not the weights.
    return {**settings, "quant_method": settings.get("quant_method") or "unknown"} if settings else settings
