"""Read the token embedding of another model as fp32 rows, for a tokenizer with the same tokens.

Nothing else of the checkpoint is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.quantised.quantisation import quantised_tensors
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader, hash_tensor, segments
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.table_file import Table
from surgery.checkpoint.vocabulary import differences, read_vocabulary
from surgery.engine.manifest import input_entry
from surgery.errors import SurgeryError, usage_error
from surgery.growth.embedding.token_text import OpenTokenizer


def embedding_rows(opened: OpenTokenizer, ref: str, rows: int) -> tuple[Table, str, dict[str, Any], bool]:
    """Read the first `rows` rows of the token embedding of the model `ref`.

    Returns:
        The rows in fp32, the tensor's name, the manifest's entry of the model, and whether the model has a tokenizer,
        whose tokens were compared; without one nothing is known of them.

    Raises:
        SurgeryError: the model has no such embedding, or one of fewer rows; it is quantised; its tokens
            are not those of the tokenizer `opened`; the embedding holds NaN or infinite values.
    """
    source = open_checkpoint(ref)
    tensor = _token_embedding(source)
    # A quantised model's embedding is stored as it is, as a rule.
    if codes := next((one for one in quantised_tensors(source) if one.codes.name == tensor.name), None):
        raise SurgeryError(
            f"its embedding is quantised ({codes.scheme}): {codes.evidence}",
            where=ref,
            hint="Use the unquantised model.",
        )
    own = tensor.shape[1]
    if tensor.shape[0] < rows:
        raise usage_error(
            f"its embedding has {tensor.shape[0]:,} rows, and {opened.ref} needs {rows:,}",
            where=ref,
            hint="Give the tokenizer that the model was trained with.",
        )
    # Equal sizes prove nothing: the ids of two tokenizers of one size stand for different tokens.
    theirs = read_vocabulary(source.folder) if source.folder else None
    if theirs is not None:
        difference = differences(opened.vocabulary, theirs)
        if difference.only_in_a or difference.moved:
            raise usage_error(
                f"has another vocabulary: {difference.describe(opened.ref, ref)}",
                where=ref,
                hint="Rows would stand for other tokens. Give the model's own tokenizer.",
            )
    table = np.empty((rows, own), np.float32)
    flat = table.reshape(-1)
    with SourceFiles(source.files) as files:
        reader = TensorReader(files)
        for begin, end in segments(table.size):
            flat[begin:end] = reader.values(TensorInput(tensor), begin, end, "table").float().numpy()
        entry = input_entry(source, {part.name_in_file: hash_tensor(reader, part) for part in tensor.parts})
        # A source that is written to meanwhile would give rows of two versions.
        files.check_unchanged()
    if not np.isfinite(table).all():
        raise SurgeryError(f'"{tensor.name}" holds NaN or infinite values', where=ref)
    return table, tensor.name, entry, theirs is not None


def _token_embedding(source: Checkpoint) -> StoredTensor:
    names = model_structure(source).token_embeddings
    if len(names) != 1:
        raise SurgeryError(f"has {len(names)} token embeddings that are recognised, expected one", where=source.ref)
    tensor = source.tensors[names[0]]
    if not tensor.is_float or len(tensor.shape) != 2:
        raise SurgeryError(
            f'"{tensor.name}" is {tensor.dtype} {list(tensor.shape)}, expected a matrix of floats', where=source.ref
        )
    return tensor
