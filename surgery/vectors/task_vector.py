"""Task vectors: on disk as a folder, or as the difference of two models.

A vector folder holds `vector.safetensors` (or shards with an index) with one delta per tensor, fp32 unless asked
otherwise; tensors whose delta is zero are not stored but listed. `surgery.json` has the format's version, that list,
and the hashes of both donors. `donor/` has the tuned model's config and tokenizer, and a sketch of its base (see
`surgery.engine.preflight.sketch`), with which a target's ancestry is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.checkpoint.checkpoint import Checkpoint, existing_path
from surgery.checkpoint.config.model_config import CONFIG, read_config
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.safetensors_header import read_header
from surgery.checkpoint.tensor_file import load_tensors
from surgery.engine.kernel import Kernel
from surgery.engine.layouts import see_as
from surgery.engine.manifest import read_manifest
from surgery.engine.preflight import SKETCH_ELEMENTS, Preflight, sketch
from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import MANIFEST
from surgery.io.safe_paths import contained_file, contained_folder, find_file
from surgery.vectors.align import AlignedModel, aligned_model
from surgery.vectors.kernels import ADD_DIFFERENCE, ADD_VECTOR

FORMAT = 1
STEM = "vector"
DONOR = "donor"
SKETCH = "sketch.safetensors"


@dataclass(frozen=True)
class TaskVector:
    """A task vector on disk.

    zero: names of the tensors whose delta is zero, which are not stored. donor: the folder with the tuned model's side
    files.
    """

    checkpoint: Checkpoint
    zero: frozenset[str]
    donor: Path
    manifest: Mapping[str, Any]

    @property
    def ref(self) -> str:
        """The reference that the vector was opened by."""
        return self.checkpoint.ref

    @property
    def model(self) -> AlignedModel:
        """The deltas as a model to align, with the tuned model's tokenizer."""
        return AlignedModel(self.checkpoint, self.donor)

    def sketch(self) -> dict[str, Tensor]:
        """Read the sketch of the donors' base. Raises SurgeryError where it is missing, or is no sketch."""
        path = contained_file(self.donor, SKETCH)
        entries = read_header(path).entries
        for entry in entries:
            if entry.dtype != "F32" or len(entry.shape) != 1 or entry.shape[0] > SKETCH_ELEMENTS:
                raise SurgeryError(
                    f'"{entry.name}" is {entry.dtype} {list(entry.shape)}, expected up to {SKETCH_ELEMENTS:,} values '
                    "in F32",
                    where=path,
                    hint="Extract the vector again.",
                )
        return load_tensors(path, {entry.name: ("F32", 1) for entry in entries}, hint="Extract the vector again.")


def open_vector(ref: str | Path) -> TaskVector:
    """Open a vector folder. Raises SurgeryError where `ref` is none."""
    folder = existing_path(str(ref))
    if folder is None or not folder.is_dir():
        raise usage_error("no such vector folder", where=ref, hint="`surgery vector extract` writes one.")
    if find_file(folder, MANIFEST) is None:
        raise usage_error(
            "is not a vector: it has no surgery.json",
            where=ref,
            hint="To use the difference of two models at once, give both to `surgery vector transfer`.",
        )
    manifest = read_manifest(folder)
    vector = manifest.get("vector") or {}
    if manifest["kind"] != "vector" or vector.get("format") != FORMAT:
        raise usage_error(f"holds a {manifest['kind']}, expected a vector of format {FORMAT}", where=ref)
    # The donor's config is in a subfolder, or tools would take the vector's folder for a model.
    # A folder that led elsewhere would count as its own, with all that is in it.
    donor = contained_folder(folder, DONOR)
    config = {} if find_file(donor, CONFIG) is None else read_config(donor / CONFIG)
    checkpoint = replace(open_checkpoint(folder), ref=str(ref), config=config)
    return TaskVector(checkpoint, frozenset(vector["zero"]), donor, manifest)


@dataclass(frozen=True)
class VectorInput:
    """The vector v of θ + α·v as inputs of a kernel.

    models: role → model, in the order of the kernel's inputs after the target. kernel: computes θ + α·v. config: the
    donors' config.json. read_sketch: reads a sketch of the donors' base. zero: names of the tensors whose delta is
    known to be zero.
    """

    models: Mapping[str, AlignedModel]
    kernel: Kernel
    config: Mapping[str, Any]
    read_sketch: Callable[[], Mapping[str, Tensor]]
    zero: Collection[str] = ()

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Role → checkpoint."""
        return {role: model.checkpoint for role, model in self.models.items()}

    def in_layout_of(self, reference: Checkpoint, preflight: Preflight) -> VectorInput:
        """Return the vector with the names and the layout of `reference`; the facts of `preflight` tell of it."""
        views = {
            role: see_as(preflight, model.checkpoint, reference, absent=self.zero)
            for role, model in self.models.items()
        }
        models = {role: replace(model, checkpoint=views[role].checkpoint) for role, model in self.models.items()}
        changed = {role for role, model in self.models.items() if models[role].checkpoint is not model.checkpoint}
        zero = frozenset().union(*(view.absent for view in views.values()))
        if not changed and zero == frozenset(self.zero):
            return self
        if self.models.keys() == {"vector"}:
            read_sketch = partial(_renamed_sketch, self.read_sketch, views["vector"].renamed)
            return replace(self, models=models, zero=zero, read_sketch=read_sketch)
        return replace(self, models=models, zero=zero, read_sketch=partial(sketch, models["base"].checkpoint))


def _renamed_sketch(read: Callable[[], Mapping[str, Tensor]], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a sketch by the names in another layout; matrices that are regrouped there are left out."""
    return {renamed[name]: values for name, values in read().items() if name in renamed}


def stored_vector(vector: TaskVector) -> VectorInput:
    """Return the vector on disk as kernel inputs."""
    return VectorInput({"vector": vector.model}, ADD_VECTOR, vector.checkpoint.config, vector.sketch, vector.zero)


def model_difference(tuned: Checkpoint, base: Checkpoint) -> VectorInput:
    """Return θ_tuned − θ_base, which is never stored, as kernel inputs."""
    models = {"tuned": aligned_model(tuned), "base": aligned_model(base)}
    return VectorInput(models, ADD_DIFFERENCE, base.config, partial(sketch, base))
