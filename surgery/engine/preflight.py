"""Check, before any byte is written, that checkpoints fit each other and that the output fits the disk.

All errors are collected and raised at once. Two checkpoints fit each other where they meet the conditions of arXiv
2509.01363 on donor and target: same tensors and shapes, same vocabulary, same pre-trained ancestor.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.config.normalised_config import is_text_of, normalise_config
from surgery.checkpoint.quantised.quantisation import find_quantisation
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.config_differences import NamedConfig, shape_differences, told_differences
from surgery.engine.plan import Plan
from surgery.engine.work.workers import default_threads
from surgery.errors import ErrorList
from surgery.io.atomic import partial_path
from surgery.reporting.report import format_value

# Two matrices drawn independently have a cosine within a few hundredths of 0; fine-tuning leaves it above 0.9. What
# is between has been trained for long from a common start, and may still carry a vector.
UNRELATED_BELOW = 0.2
SKETCH_ELEMENTS = 1024  # of each matrix, from its middle: enough for a cosine to ±0.03, cheap enough to read always


@dataclass
class Preflight:
    """The results of the checks: `facts` (label → value) for people, `errors` that stop the job, `warnings`."""

    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: ErrorList = field(default_factory=ErrorList)


def check_config(
    preflight: Preflight, target: Checkpoint, donor: Mapping[str, Any], donor_name: str, *, any_depth: bool = False
) -> None:
    """Compare the configs of two models, as `check_configs`."""
    check_configs(preflight, target, [(donor_name, donor)], any_depth=any_depth)


def check_configs(
    preflight: Preflight,
    target: Checkpoint,
    donors: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    any_depth: bool = False,
) -> None:
    """Compare the configs of models: a difference that shows in no shape would garble the result.

    Other families and other shapes are errors. What changes the function besides is a warning, one for each key: the
    result is a model all the same, with the config of `target`.

    Args:
        donors: name and config of each of the other models.
        any_depth: the models may differ in their number of layers.
    """
    known = [(name, config) for name, config in donors if config]
    if not target.config or len(known) < len(donors):
        preflight.facts["architecture"] = "not compared: no config.json on both sides"
    if not target.config or not known:
        return
    reference = NamedConfig(target.ref, normalise_config(target.config))
    others = []
    for name, config in known:
        other = NamedConfig(name, normalise_config(config))
        kinds = reference.config.model_type, other.config.model_type
        if kinds[0] != kinds[1] and not is_text_of(target.config, config):
            preflight.errors.add(
                f"architectures differ: {target.ref} is {kinds[0]}, {name} is {kinds[1]}. Use models of one family."
            )
            continue
        if different := shape_differences(reference, other, any_depth=any_depth):
            preflight.errors.add(f"configs differ between {target.ref} and {name}: {', '.join(different)}.")
        others.append(other)
    preflight.warnings += told_differences(reference, others)
    preflight.facts.setdefault("architecture", str(reference.config.model_type))


def check_quantised(preflight: Preflight, checkpoints: Iterable[Checkpoint], *, has_option: bool = False) -> None:
    """Add an error for each quantised model: sums of codes without their scales mean nothing.

    Models that are seen dequantised are facts. `has_option`: whether the command can dequantise.
    """
    for checkpoint in checkpoints:
        if checkpoint.dequantised is not None:
            preflight.facts[f"dequantised {checkpoint.ref}"] = f"{checkpoint.dequantised}, to bf16"
        found = find_quantisation(checkpoint)
        if found is None:
            continue
        advice = "Use the unquantised model."
        if found.readable and has_option:
            advice = "Use the unquantised model, or --dequantise, which computes its weights in bf16."
        elif found.readable:
            convert = f"surgery merge passthrough {shlex.quote(checkpoint.ref)} --dequantise -o OUT"
            advice = f"Use the unquantised model; `{convert}` writes it in bf16."
        preflight.errors.add(
            f"{checkpoint.ref} is quantised ({found.scheme}), and its stored values are not its weights. "
            f"Evidence: {found.evidence}. {advice}"
        )


def sketch(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return up to `SKETCH_ELEMENTS` consecutive values, fp32, from the middle of each float matrix.

    Ancestry is checked by them where the model itself is no longer available.
    """
    with SourceFiles(checkpoint.files) as files:
        reader = TensorReader(files)
        return {
            name: _middle(reader, tensor)
            for name, tensor in checkpoint.tensors.items()
            if tensor.is_float and len(tensor.shape) >= 2 and tensor.n_elements
        }


def check_ancestor(
    preflight: Preflight,
    target: Checkpoint,
    donor_sketch: Mapping[str, torch.Tensor],
    *,
    allow_unrelated: bool,
) -> None:
    """Add an error where the median cosine of matching matrices is too low for models of one pre-trained ancestor."""
    ours = sketch(target)
    cosines = []
    for name in sorted(ours.keys() & donor_sketch.keys()):
        a, b = ours[name], donor_sketch[name]
        norms = float(a.norm() * b.norm())
        # Zeros have no direction: a matrix that was initialised to zero says nothing about ancestry.
        if a.shape == b.shape and norms > 0:
            cosines.append(float(torch.dot(a, b)) / norms)
    if not cosines:
        preflight.facts["same ancestor"] = "not judged: no matching matrices"
        return
    # The median: matrices that were replaced or trained apart (embeddings, heads) do not decide it.
    cosine = float(torch.tensor(cosines).median())
    preflight.facts["same ancestor"] = f"median cosine of target and donor {cosine:.3f} over {len(cosines)} matrices"
    if cosine < UNRELATED_BELOW and not allow_unrelated:
        preflight.errors.add(
            f"target and donor do not look like children of one pre-trained model (median cosine {cosine:.3f}, "
            "siblings have above 0.9): the vector means nothing there. --allow-unrelated adds it all the same."
        )


def check_space(preflight: Preflight, plan: Plan, out: Path, threads: int | None) -> None:
    """Add an error where the output does not fit the disk; what a `.partial` already takes counts as free.

    The facts say how much is needed, and which models are read that nobody typed: the bases that adapters name.
    """
    # The nearest folder that exists: OUT's parents are created later.
    parent = next(folder for folder in (out.parent, *out.absolute().parents) if folder.exists())
    side = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in plan.side_files.values())
    needed = plan.output_bytes + side
    partial = partial_path(out)
    # Blocks, of 512 bytes whatever the file system: a resumed run's files may be sparse.
    taken = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + taken
    for base, ref in sorted({(c.named_base, c.ref) for c in plan.sources.values() if c.named_base is not None}):
        preflight.facts[f"base of {ref}"] = f"{base}, which the adapter names"
    preflight.facts["disk"] = f"{_size(needed)} needed, {_size(free)} free"
    preflight.facts["memory"] = (
        f"about {_size(plan.memory_bytes(threads or default_threads()))} of buffers beside Python and torch"
    )
    if needed > free:
        preflight.errors.add(
            f"not enough disk at {parent}: {_size(needed)} needed, {_size(free)} free. "
            "Free some, or choose another place."
        )
    if not os.access(parent, os.W_OK):
        preflight.errors.add(f"{parent} is not writable. Choose another place for the output.")


def _size(count: int) -> str:
    return format_value(count, "bytes")


def _middle(reader: TensorReader, tensor: StoredTensor) -> torch.Tensor:
    count = tensor.n_elements
    # The middle: the first rows of an embedding are often special or padding tokens.
    begin = max(0, (count - SKETCH_ELEMENTS) // 2)
    # A copy, since the reader puts the next tensor into the same buffer.
    return reader.values(TensorInput(tensor), begin, min(begin + SKETCH_ELEMENTS, count), "sketch").float().clone()
