"""Adapters as PEFT saves them, and what PEFT itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support.merges import run
from torch import Tensor
from transformers import AutoModelForCausalLM

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader
from surgery.checkpoint.resolve import open_checkpoint


def save_adapter(base: Path, folder: Path, config: Any = None, *, rows: int | None = None, **options: Any) -> Path:
    """Save a random adapter on `base`, whose embeddings are first resized to `rows`, with PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(model, config or LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


def load_adapter(base: Path, adapter: Path, *, rows: int | None = None, dtype: Any = "auto") -> PeftModel:
    """Load an adapter with PEFT, on `base` with embeddings of `rows` rows."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def peft_merged(base: Path, adapter: Path, *, rows: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of PEFT's merge_and_unload, in the dtype of the base."""
    return dict(load_adapter(base, adapter, rows=rows).merge_and_unload().state_dict())


def read_all(ref: str | Path) -> dict[str, Tensor]:
    """Return every tensor of `ref` as our reader gives it, derived ones unrounded."""
    opened = open_checkpoint(ref)
    with SourceFiles(opened.files) as files:
        reader = TensorReader(files)
        return {name: reader.whole(TensorInput(tensor), 0).clone() for name, tensor in opened.tensors.items()}


def write_merged(ref: str | Path, out: Path) -> Path:
    """Write the model that `ref` is, an adapter with its base, to the folder `out`."""
    run(f"merge_method: passthrough\nmodels: [{{model: {json.dumps(str(ref))}}}]", out.parent, out)
    return out


def logits(model: Any, tokens: int) -> Tensor:
    """Return the logits of `model` for a text of the first and the last of `tokens` ids."""
    ids = torch.tensor([[1, 2, 3, 4, tokens - 1, tokens - 2, 5]])
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits.float()
    return found


def edit_config(adapter: Path, **values: object) -> Path:
    """Change values in an adapter's config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | values))
    return adapter


def assert_sliced_alike(opened: Checkpoint) -> None:
    """Assert that any slice of a derived tensor is the slice of the whole."""
    derived = [tensor for tensor in opened.tensors.values() if tensor.derivation]
    assert derived
    with SourceFiles(opened.files) as files:
        reader = TensorReader(files)
        wholes = {tensor.name: reader.whole(TensorInput(tensor), 0).reshape(-1).clone() for tensor in derived}

        @given(st.sampled_from(derived), st.tuples(st.floats(0, 1), st.floats(0, 1)))
        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        def check(tensor: Any, ends: tuple[float, float]) -> None:
            begin, end = sorted(int(share * tensor.n_elements) for share in ends)
            found = reader.values(TensorInput(tensor), begin, end, 0)
            torch.testing.assert_close(found, wholes[tensor.name][begin:end], rtol=2e-6, atol=2e-6)

        check()
