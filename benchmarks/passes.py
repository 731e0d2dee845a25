"""What the benchmarks of probes run: models with random weights, and the bare forward passes that are the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from probes.data.examples import TokenSequence
from probes.model.activations import CPU_TOKENS, make_batches
from surgery.checkpoint.resolve import open_checkpoint
from surgery.models.loaded_model import LoadedModel, attach_structure
from surgery.models.loading import ModelAndTokenizer


def make_random(folder: Path, config: Any) -> None:
    """Writes the model of a transformers config with random weights in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def load(folder: Path) -> LoadedModel:
    """The model in `folder`; it has no tokenizer, and none is needed."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return attach_structure(ModelAndTokenizer("random", model, None), open_checkpoint(str(folder)))


def draw(count: int, vocabulary: int, ends: tuple[int, int, int, int]) -> list[TokenSequence]:
    """Random sequences; `ends` of prompt, thinking, closing template and answer."""
    ids = torch.randint(vocabulary, (count, ends[-1]), generator=torch.Generator().manual_seed(1))
    return [TokenSequence(str(at), tuple(row), ends) for at, row in enumerate(ids.tolist())]


def bare(live: LoadedModel, sequences: Sequence[TokenSequence], *, keep: bool = False) -> None:
    """The reference: forward passes over the same batches, without logits; with `keep`, all hidden states are made."""
    with torch.inference_mode():
        for batch in make_batches([sequence.ids for sequence in sequences], max_tokens=CPU_TOKENS):
            live.body(**batch.inputs(live.device), use_cache=False, output_hidden_states=keep)
