"""`StageModel`: a model of which only the parts that a stage names are trainable, as a module token ids → loss.

Frozen parameters have no gradient and no optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, listing, usage_error
from surgery.growth.plan import GrowthStage
from surgery.growth.training.lora import LoraUpdates, add_lora
from surgery.growth.training.loss import cross_entropy
from surgery.models.forward_pass import replace_input, tupled_layers
from surgery.models.loaded_model import LoadedModel


class StageModel(nn.Module):
    """The model of a stage; it contains the transformers model as a submodule, so that DDP and FSDP2 can wrap it.

    depth: index of the first layer in which something trains; the number of layers where only what follows them trains,
    0 where the embedding trains.
    """

    def __init__(self, live: LoadedModel, updates: LoraUpdates | None) -> None:
        super().__init__()
        self.model: Any = live.model
        self.live, self.updates = live, updates
        # The classes FSDP2 shards as units. Taken from the layers, as transformers' own list may name missing classes.
        self._no_split_modules = sorted({type(layer).__name__ for layer in live.layers})
        self.depth = self._depth()
        self._tupled = tupled_layers(live) if self.depth else ()

    def forward(self, tokens: Tensor, targets: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of predicting `targets`, in nats: a scalar in fp32.

        tokens: (B, T) ids. targets: (B, T) ids. hidden: (B, T, D), the input of layer `depth`; if given, the layers
        below are not computed.
        """
        replaced = replace_input(self.live, self.depth, hidden, self._tupled) if hidden is not None else nullcontext()
        with replaced:
            # Keys and values are of no use in training, and would take memory.
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, in the model's order; after sharding, the shards."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def frozen(self) -> dict[str, Tensor]:
        """Return all other tensors of a checkpoint of the model, parameters and buffers, by name."""
        tensors = self.model.state_dict(keep_vars=True)
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor) and not value.requires_grad}

    def trained_names(self) -> list[str]:
        """Return the names of the trainable parameters."""
        return list(self.trained())

    @property
    def n_trained(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for parameter in self.trained().values())

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for AdamW: only matrices decay, not biases and norm weights."""
        matrices = [parameter for parameter in self.trained().values() if parameter.dim() > 1]
        others = [parameter for parameter in self.trained().values() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def has_unused_parameters(self, n_tokens: int) -> bool:
        """Return whether a trainable parameter gets no gradient, tried on `n_tokens` tokens: DDP must know of that."""
        tokens = (
            torch.arange(n_tokens + 1, device=self.live.device)[None]
            % self.live.model.config.get_text_config().vocab_size
        )
        self(tokens[:, :-1], tokens[:, 1:]).backward()
        missing = any(parameter.grad is None for parameter in self.trained().values())
        self.zero_grad(set_to_none=True)
        return missing

    def finish(self) -> list[str]:
        """Merge low-rank updates into their weights; return the names of all parameters that the stage changed."""
        names = [name for name in self.trained_names() if self.updates is None or ".lora." not in name]
        if self.updates is not None:
            names += self.updates.merged_names
            self.updates.merge()
        return names

    def _depth(self) -> int:
        # Parameters that are neither in the layers nor after them count as before them, and so does a tied head.
        first: dict[int, int] = {}
        for part in (self.live.final_norm, _head(self.model)):
            first |= {id(parameter): len(self.live.layers) for parameter in part.parameters()} if part else {}
        for index, layer in enumerate(self.live.layers):
            first |= {id(parameter): index for parameter in layer.parameters()}
        first |= {id(parameter): 0 for parameter in self.model.get_input_embeddings().parameters()}
        return min(first.get(id(parameter), 0) for parameter in self.trained().values())


def prepare_stage_model(live: LoadedModel, stage: GrowthStage, new: Sequence[int], *, seed: int) -> StageModel:
    """Freeze all of `live` but what `stage` trains, and add low-rank updates where it asks for them.

    Args:
        live: in fp32.
        new: indices of the layers that the stage added.
        seed: of the initial low-rank updates.

    Raises:
        SurgeryError: nothing is left to train; there is no such layer; the head is tied to the embedding and only one
            of them trains; what trains is not fp32; there is no matrix for a low-rank update.
    """
    model, n_layers, train = live.model, len(live.layers), set(stage.train)
    if missing := [index for index in new if not 0 <= index < n_layers]:
        raise usage_error(f"there is no layer {missing[0]} among {n_layers}", where=live.name)
    embedding, head = model.get_input_embeddings(), _head(model)
    if "head" in train and head is None:
        raise SurgeryError("has no output head that could train", where=live.name)
    # Tied weights are one parameter: freezing one name would freeze the other.
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    if tied and "all" not in train and ("head" in train) != ("embedding" in train):
        one, other = ("head", "embedding") if "head" in train else ("embedding", "head")
        raise SurgeryError(
            f"its head is tied to its embedding: training the {one} would train the {other}",
            where=live.name,
            hint=f"Name both under train, or leave {one} out; a model with an untied head has neither problem.",
        )
    parts: dict[str, list[nn.Module]] = {
        "new": [live.layers[index] for index in new],
        "head": [] if head is None else [head],
        "norm": [live.final_norm],
        "embedding": [embedding],
        "all": [model],
    }
    model.requires_grad_(False)
    for parameter in (p for name in stage.train for part in parts.get(name, []) for p in part.parameters()):
        if not parameter.is_floating_point():
            raise SurgeryError("is quantised; what trains must be in float32", where=live.name)
        parameter.requires_grad_(True)
    updates = None
    paths = {id(module): path for path, module in model.named_modules()}
    old = {paths[id(layer)]: layer for index, layer in enumerate(live.layers) if index not in new}
    if "lora" in train and old:
        updates = add_lora(old, stage.lora, seed=seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        if not trained:
            raise usage_error(f"nothing of this model trains with {listing(stage.train)}", where="train")
        if dtypes := sorted({str(p.dtype).removeprefix("torch.") for p in trained.values()} - {"float32"}):
            raise SurgeryError(f"is in {listing(dtypes)}; what trains must be in float32", where=live.name)
        return StageModel(live, updates)
    except BaseException:
        # The caller keeps the model, and must get it as it was.
        if updates is not None:
            updates.remove()
        raise


def _head(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None
