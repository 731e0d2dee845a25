"""One causal language model made of several: its logits are the weighted mean of its members' logits.

This file stands by itself (torch and transformers 5): a copy of it lies in every ensemble's folder, so that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` needs no other package.

The folder holds the members' tensors under the names `members.<i>.<name in the member's own checkpoint>`. A tensor that
an earlier member has too is stored once: config.json's `aliases` says under which name. Each member is built by
transformers' own loader from a view of these tensors, so that whatever it renames, fuses or casts for an architecture
happens here as it does for the member alone.

Shapes: B batch, T new tokens, V the vocabulary that all members share, Hᵢ the width of member i.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    import accelerate
except ImportError:  # only a device_map over several devices needs it
    accelerate = None

MODEL_TYPE = "logit_ensemble"
MODES = ("logits", "logprobs", "probs")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INFERRED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# What says where a checkpoint lies. Every other keyword of `from_pretrained` is for the members' own loaders.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
NOT_FOR_MEMBERS = (
    *HUB_OPTIONS, "subfolder", "proxies", "adapter_kwargs", "trust_remote_code", "code_revision", "use_safetensors",
    "weights_only", "variant", "_from_auto", "_from_pipeline", "_commit_hash",
)  # fmt: skip


class LogitEnsembleConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """What an ensemble is made of.

    Args:
        members: the members' config.json, in order.
        weights: one per member, of sum 1.
        mode: "logits" Σ wᵢ·zᵢ; "logprobs" Σ wᵢ·log softmax(zᵢ), the same distribution, normalised; "probs"
            log Σ wᵢ·softmax(zᵢ), the mixture.
        vocab_size: V; rows that a member has beyond it are cut.
        aliases: `members.<i>.<name>` → the stored tensor that is the same to the bit.
        fused_head: whether one matrix on the members' concatenated hidden states (B, T, Σ Hᵢ) makes the logits
            instead of their own heads; "none", "linear" or "affine" (with a bias).
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        members: Sequence[Mapping[str, Any]] = (),
        weights: Sequence[float] = (),
        mode: str = "logits",
        vocab_size: int = 0,
        aliases: Mapping[str, str] | None = None,
        fused_head: str = "none",
        **kwargs: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
        if len(members) != len(weights):
            raise ValueError(f"weights: got {len(weights)} for {len(members)} members")
        self.members = [dict(member) for member in members]
        self.weights = [float(weight) for weight in weights]
        self.mode = mode
        self.vocab_size = vocab_size
        self.aliases = dict(aliases or {})
        self.fused_head = fused_head
        super().__init__(**kwargs)

    def member_configs(self) -> list[Any]:
        """The members' configs as transformers' own objects."""
        return [member_config(member) for member in self.members]


def member_config(values: Mapping[str, Any]) -> Any:
    """The config object of a member whose config.json holds `values`."""
    return AutoConfig.for_model(**values)


class EnsembleCache(Cache):  # type: ignore[misc]
    """One cache per member behind the interface of one: what `generate` does to it happens to every member's."""

    # Masks are made by each member from the 2-D mask; a compiled graph over all of them would need them made outside.
    is_compileable = False

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = list(caches)
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> list[Any]:
        """Every layer of every member."""
        return [layer for cache in self.caches for layer in cache.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; every member holds as many."""
        return int(self.caches[0].get_seq_length(layer_idx))


class LogitEnsembleForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Runs every member on the same tokens and combines their logits in fp32 (see `LogitEnsembleConfig.mode`).

    With a fused head the logits are W·concat(hᵢ) + b. At W = concat(wᵢ·Wᵢ), b = Σ wᵢ·bᵢ this is the mean of logits
    ("mean of logits = one GEMM").

    Args:
        members: models that exist already; else they are made from the config, with random weights.
    """

    config_class = LogitEnsembleConfig
    base_model_prefix = ""
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: LogitEnsembleConfig, members: Sequence[Any] | None = None) -> None:
        super().__init__(config)
        if members is None:
            members = [_member_from_config(member) for member in config.member_configs()]
        for i, member in enumerate(members):
            if "past_key_values" not in inspect.signature(member.forward).parameters:
                raise ValueError(f"member {i} ({type(member).__name__}) does not keep its state in past_key_values")
        self.members = nn.ModuleList(members)
        self._accepted = [frozenset(inspect.signature(member.forward).parameters) for member in members]
        self.head: nn.Linear | None = None
        if config.fused_head != "none":
            width = sum(head_of(member).weight.shape[1] for member in members)
            self.head = nn.Linear(width, config.vocab_size, bias=config.fused_head == "affine", dtype=torch.float32)
        self._is_stateful = any(member._is_stateful for member in members)
        self.post_init()
        for i, member in enumerate(members):
            self._no_split_modules |= set(member._no_split_modules or ())
            self._skip_keys_device_placement |= set(member._skip_keys_device_placement or ())
            self.all_tied_weights_keys |= {
                f"members.{i}.{target}": f"members.{i}.{source}"
                for target, source in member.all_tied_weights_keys.items()
            }
            self._tp_plan |= {f"members.{i}.{name}": how for name, how in (member._tp_plan or {}).items()}

    @property
    def models(self) -> list[Any]:
        """The members, in order."""
        return list(self.members)

    def init_weights(self) -> None:
        """Nothing: members come with their weights, and a fused head with its own or at random."""

    def get_input_embeddings(self) -> Any:
        """The first member's, whose device is where inputs are expected."""
        return self.models[0].get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids, attention_mask, position_ids, labels: (B, T) → logits (B, T, V) in fp32, on input_ids' device.

        Args:
            logits_to_keep: only the logits of that many last positions; 0 for all.
        """
        use_cache = not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if past_key_values is not None and not isinstance(past_key_values, EnsembleCache):
            raise TypeError(f"past_key_values is a {type(past_key_values).__name__}, expected model.new_cache()")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        caches = past_key_values.caches if past_key_values is not None else [None] * len(self.models)
        runs = (
            {"past_key_values": cache, "use_cache": use_cache, **_to_device_of(member, given, accepted)}
            for member, accepted, cache in zip(self.models, self._accepted, caches, strict=True)
        )
        if self.head is None:
            logits = combine(
                self._member_logits(runs, logits_to_keep, input_ids.device), self.config.weights, self.config.mode
            )
        else:
            logits = self.head(self._hidden_states(runs, logits_to_keep)).to(input_ids.device)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output if return_dict or return_dict is None else output.to_tuple()

    def new_cache(self) -> EnsembleCache:
        """An empty cache for all members."""
        return EnsembleCache([DynamicCache(config=_text_config(member)) for member in self.models])

    def member_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) → every member's logits by itself, (members, B, T, V) in fp32."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        runs = (
            {"use_cache": False, **_to_device_of(member, given, accepted)}
            for member, accepted in zip(self.models, self._accepted, strict=True)
        )
        return torch.stack(list(self._member_logits(runs, 0, input_ids.device)))

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) → what the members' heads see, side by side: (B, T, Σ Hᵢ) in fp32."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        runs = (
            {"use_cache": False, **_to_device_of(member, given, accepted)}
            for member, accepted in zip(self.models, self._accepted, strict=True)
        )
        return self._hidden_states(runs, 0)

    def _member_logits(
        self, runs: Iterator[Mapping[str, Any]], keep: int | Tensor, device: torch.device
    ) -> Iterator[Tensor]:
        for member, accepted, run in zip(self.models, self._accepted, runs, strict=True):
            native = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
            logits = member(**run, **native, return_dict=True).logits
            kept = logits if native else logits[:, _positions(keep)]
            yield kept[..., : self.config.vocab_size].to(device, torch.float32)

    def _hidden_states(self, runs: Iterator[Mapping[str, Any]], keep: int | Tensor) -> Tensor:
        device, dtype = self.device, torch.float32
        if self.head is not None:
            device, dtype = self.head.weight.device, self.head.weight.dtype
        states = [
            member.base_model(**run, return_dict=True).last_hidden_state[:, _positions(keep)].to(device, dtype)
            for member, run in zip(self.models, runs, strict=True)
        ]
        return torch.cat(states, dim=-1)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Called by `generate`: each member prepares its own cache, of the kind that the caller asked for."""
        held = model_kwargs.get("past_key_values")
        if held is not None or generation_config.use_cache is False:
            return
        caches = []
        for member in self.models:
            own: dict[str, Any] = {}
            member._prepare_cache_for_generation(generation_config, own, *args)
            caches.append(own["past_key_values"])
        model_kwargs["past_key_values"] = EnsembleCache(caches)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LogitEnsembleConfig | None = None,
        device_map: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | Path | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads every member as `AutoModelForCausalLM.from_pretrained` would; equal tensors share their memory.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub.
            device_map: as transformers takes it; names begin with `members.<i>`.
            max_memory: device → bytes, where the map is inferred.
            offload_folder: where members whose map says "disk" put their weights.
            kwargs: dtype, attn_implementation and whatever else is for the members' own loaders.
        """
        location = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        folder = _folder_of(Path(pretrained_model_name_or_path), location) / (kwargs.get("subfolder") or "")
        if config is None:
            config = cls.config_class.from_pretrained(folder)
        options = {key: value for key, value in kwargs.items() if key not in NOT_FOR_MEMBERS}
        if config._attn_implementation is not None:  # AutoModel put it there, and kept it from us
            options["attn_implementation"] = config._attn_implementation
        maps, placed = cls._device_maps(config, device_map, max_memory, options.get("dtype"))
        table = _tensor_table(folder, config.aliases)
        members, infos = [], {}
        for i, (own, where) in enumerate(zip(config.member_configs(), maps, strict=True)):
            member, info = _load_member(own, _view(table, f"members.{i}."), where, offload_folder, options)
            members.append(member)
            infos[f"members.{i}"] = info
        model = cls(config, members)
        if model.head is not None:
            state = {name: tensor.clone() for name, tensor in _view(table, "head.").items()}
            model.head.load_state_dict(state)
            model.head.to(placed.get("head", placed.get("", members[-1].device)) if placed else members[-1].device)
        _share(model, config.aliases)
        if placed:
            model.hf_device_map = placed
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        model.eval()
        return (model, infos) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes the ensemble, members trained further included, so that `from_pretrained` reads it.

        Only `members/`, from which `surgery merge unpack` restores the originals, is not written: they are gone.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for i, member in enumerate(self.models):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                member.save_pretrained(scratch, max_shard_size="1TB")
                stored = load_file(Path(scratch) / WEIGHTS)
            tensors |= {f"members.{i}.{name}": tensor for name, tensor in stored.items()}
        if self.head is not None:
            tensors |= {f"head.{name}": tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        aliases = {
            name: source
            for name, source in self.config.aliases.items()
            if name in tensors and source in tensors and _same(tensors[name], tensors[source])
        }
        kept = {name: tensor for name, tensor in tensors.items() if name not in aliases}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
        self.config.aliases = aliases
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        target = folder / Path(__file__).name
        if not target.exists() or not target.samefile(__file__):
            shutil.copyfile(__file__, target)

    @classmethod
    def _device_maps(
        cls, config: LogitEnsembleConfig, device_map: Any, max_memory: Mapping[Any, Any] | None, dtype: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """One map per member, and the map of the whole; Nones and an empty map where everything goes to one place."""
        if device_map is None:
            return [None] * len(config.members), {}
        if isinstance(device_map, str) and device_map in INFERRED_MAPS:
            device_map = cls._inferred_map(config, device_map, max_memory, dtype)
        whole = dict(device_map) if isinstance(device_map, Mapping) else {"": device_map}
        return [_part_of_map(whole, i) for i in range(len(config.members))], whole

    @classmethod
    def _inferred_map(
        cls, config: LogitEnsembleConfig, kind: str, max_memory: Mapping[Any, Any] | None, dtype: Any
    ) -> Any:
        if accelerate is None:
            raise ImportError(f"device_map={kind!r} needs accelerate: pip install accelerate")
        with torch.device("meta"):
            skeleton = cls(config)
        classes = sorted(skeleton._no_split_modules)
        sizes = None if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        memory = (
            accelerate.utils.get_max_memory(max_memory)
            if kind == "sequential"
            else accelerate.utils.get_balanced_memory(
                skeleton, max_memory, classes, dtype=sizes, low_zero=kind == "balanced_low_0"
            )
        )
        return accelerate.infer_auto_device_map(
            skeleton, max_memory=memory, no_split_module_classes=classes, dtype=sizes
        )


def combine(member_logits: Iterable[Tensor], weights: Sequence[float] | Tensor, mode: str) -> Tensor:
    """The mean in one of the `MODES`.   members × (…, V), weights (members,) → (…, V); one member at a time."""
    total: Tensor | None = None
    for logits, weight in zip(member_logits, weights, strict=True):
        if mode == "probs":
            # log Σ wᵢ·pᵢ, added up as logarithms: probabilities of 1e-40 must not become 0.
            term = logits.log_softmax(-1) + torch.as_tensor(weight, device=logits.device).log()
            total = term if total is None else torch.logaddexp(total, term)
        else:
            term = weight * (logits if mode == "logits" else logits.log_softmax(-1))
            total = term if total is None else total + term
    assert total is not None, "an ensemble has members"
    return total


def head_of(member: Any) -> Any:
    """The linear layer that makes `member`'s logits."""
    return member.get_output_embeddings()


def register() -> None:
    """Lets `AutoModelForCausalLM` load ensembles without `trust_remote_code` in this process."""
    AutoConfig.register(MODEL_TYPE, LogitEnsembleConfig, exist_ok=True)
    AutoModelForCausalLM.register(LogitEnsembleConfig, LogitEnsembleForCausalLM, exist_ok=True)


def _member_from_config(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _text_config(member: Any) -> Any:
    return member.config.get_text_config(decoder=True)


def _to_device_of(member: Any, given: Mapping[str, Tensor | None], accepted: frozenset[str]) -> dict[str, Any]:
    device = member.get_input_embeddings().weight.device
    chosen = {key: value for key, value in given.items() if value is not None and key in accepted}
    if device.type == "meta":  # offloaded: its hooks move what comes in
        return chosen
    return {key: value.to(device) for key, value in chosen.items()}


def _positions(keep: int | Tensor) -> slice | Tensor:
    """What `logits_to_keep` lets through along T: a number of last positions (0: all), or these."""
    return slice(-keep, None) if isinstance(keep, int) else keep


def _folder_of(path: Path, location: Mapping[str, Any]) -> Path:
    if path.is_dir():
        return path
    return Path(snapshot_download(path.as_posix(), allow_patterns=["*.json", "*.safetensors"], **location))


def _tensor_table(folder: Path, aliases: Mapping[str, str]) -> dict[str, tuple[Path, str]]:
    """Name → (file, name in it), aliases included."""
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), WEIGHTS)
    else:
        raise OSError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    table = {name: (folder / file, name) for name, file in weight_map.items()}
    return table | {alias: table[name] for alias, name in aliases.items()}


def _view(table: Mapping[str, tuple[Path, str]], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it. Mapped, not read: pages come in when they are used."""
    wanted: dict[Path, list[tuple[str, str]]] = {}
    for name, (path, stored) in table.items():
        if name.startswith(prefix):
            wanted.setdefault(path, []).append((name.removeprefix(prefix), stored))
    view = {}
    for path, names in sorted(wanted.items()):
        with safe_open(path, framework="pt") as file:
            view.update({name: file.get_tensor(stored) for name, stored in names})
    return view


def _load_member(
    config: Any, state: dict[str, Tensor], where: Any, offload_folder: str | Path | None, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The member with `state` as its checkpoint, and transformers' report on it."""
    with torch.device("meta"):
        kind = type(_member_from_config(config))
    on_disk = isinstance(where, Mapping) and "disk" in where.values()
    member, info = kind.from_pretrained(
        None, config=config, state_dict=state, device_map=None if on_disk else where, output_loading_info=True,
        **options,
    )  # fmt: skip
    if on_disk:  # transformers offloads to disk only from whole checkpoint files
        if offload_folder is None:
            raise ValueError('device_map says "disk": give an offload_folder')
        place = Path(tempfile.mkdtemp(dir=_made(Path(offload_folder))))  # members have tensors of the same name
        if set(where.values()) == {"disk"}:
            accelerate.disk_offload(member, place, execution_device="cuda" if torch.cuda.is_available() else "cpu")
        else:
            accelerate.dispatch_model(member, device_map=where, offload_dir=place)
    return member, info


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _part_of_map(whole: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The device map of one member, in its own names."""
    prefix = f"members.{index}"
    for key in ("", "members", prefix):
        if key in whole:
            return {"": whole[key]}
    part = {name.removeprefix(prefix + "."): where for name, where in whole.items() if name.startswith(prefix + ".")}
    if not part:
        raise ValueError(f"device_map says nothing about {prefix}; it names {', '.join(sorted(whole))}")
    return part


def _share(model: LogitEnsembleForCausalLM, aliases: Mapping[str, str]) -> None:
    """Makes tensors that are stored once one parameter in memory too, where both ended up on one device."""
    for alias, name in aliases.items():
        here, there = _slot(model, alias), _slot(model, name)
        if here is None or there is None or here[0] is there[0]:
            continue
        ours, theirs = getattr(*here), getattr(*there)
        if ours is not theirs and ours.requires_grad == theirs.requires_grad and _same(ours, theirs):
            _replace(model.models[int(alias.split(".")[1])], ours, theirs)


def _slot(model: LogitEnsembleForCausalLM, stored: str) -> tuple[nn.Module, str] | None:
    """The module and attribute that the tensor called `stored` became, or None where loading renamed or fused it."""
    _, index, name = stored.split(".", 2)
    member = model.models[int(index)]
    prefix = member.base_model_prefix + "."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        owner, _, attribute = candidate.rpartition(".")
        try:
            module = member.get_submodule(owner)
        except AttributeError:
            continue
        if isinstance(getattr(module, attribute, None), nn.Parameter):
            return module, attribute
    return None


def _replace(member: Any, old: nn.Parameter, new: nn.Parameter) -> None:
    """Puts `new` wherever `member` has `old`: a tied output head follows its embedding."""
    for module in member.modules():
        for name, held in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if held is old:
                setattr(module, name, new)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.device.type == "meta" or a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Mapped from the same bytes they are equal without a look; a NaN must not keep two copies apart.
    return a.data_ptr() == b.data_ptr() or torch.equal(_octets(a), _octets(b))


def _octets(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
