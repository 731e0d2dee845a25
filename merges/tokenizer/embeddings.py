"""Read embeddings and heads with their rows aligned to the output's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from merges.tokenizer.plan import TokenPlan
from surgery.checkpoint.reader import SEGMENT, SourceFiles, TensorInput, TensorReader
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.errors import SurgeryError


class TokenInputs:
    """Builds inputs for the engine by a `TokenPlan`.

    Args:
        outside: model → tensor's name → tensor, of the tensors in no layer.
    """

    def __init__(self, plan: TokenPlan, outside: Mapping[str, Mapping[str, StoredTensor]]) -> None:
        self.plan = plan
        self._outside = outside

    def align(self, ref: str, name: str, tensor: StoredTensor) -> TensorInput:
        """Return `tensor`, which `ref` has for the output tensor `name`, with one row per row of the output.

        Reads `tensor` where some rows are to be the mean of the others.

        Raises:
            SurgeryError: a model that rows are to be taken from has no such tensor.
        """
        # The tensor itself, so that a model with the output's tokenizer is read without a copy of its rows.
        if self.plan.unchanged(ref, tensor.shape[0]):
            return TensorInput(tensor)
        contributions = self.plan.contributions(ref)
        others = tuple((self._tensor(other, name), rows) for other, rows in contributions.items() if other != ref)
        aligned = TensorInput(tensor, contributions[ref], others)
        if not len(self.plan.averaged):
            return aligned
        mean = self._mean(aligned, self.plan.averaged)
        return TensorInput(tensor, contributions[ref], others, (self.plan.averaged, mean))

    def _tensor(self, ref: str, name: str) -> StoredTensor:
        if name not in self._outside[ref]:
            raise SurgeryError(
                f'has no "{name}", and others are to take rows of it for tokens that they lack',
                where=ref,
                hint="Name another model for these tokens under `tokenizer: tokens:`.",
            )
        return self._outside[ref][name]

    def _mean(self, source: TensorInput, without: np.ndarray) -> np.ndarray:
        """Return the mean of the rows that are not in `without`: (width,) fp64."""
        rows = source.shape[0]
        width = source.n_elements // rows
        counted = np.ones(rows, bool)
        counted[without] = False
        total = torch.zeros(width, dtype=torch.float64)
        step = max(SEGMENT // width, 1)
        with SourceFiles(path for stored in source.tensors for path in stored.files) as files:
            reader = TensorReader(files)
            # In pieces of a segment: an embedding in fp64 would take four times the memory of its file.
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                piece = reader.values(source, begin * width, end * width, "mean").view(-1, width).double()
                total += piece[torch.from_numpy(counted[begin:end])].sum(dim=0)
        mean: np.ndarray = (total / max(int(counted.sum()), 1)).numpy()
        return mean
