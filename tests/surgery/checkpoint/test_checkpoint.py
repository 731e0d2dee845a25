"""From a reference to a tensor table: every layout that is found in the wild, and each way it can be broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build
from support.hub_server import HubServer
from torch import Tensor

from surgery import lab
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import FAILED, WRONG_USAGE, SurgeryError
from surgery.hub import download as hub

A, B, C = torch.arange(6.0).view(2, 3), torch.arange(4.0) + 10, torch.tensor(7)


def write(folder: Path, files: Mapping[str, Mapping[str, Tensor]], index: object = None, name: str = "model") -> Path:
    """A folder of safetensors files; `index` is the weight_map of its index, if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / file)
    if index is not None:
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor as it is read through its place in the table."""
    with SourceFiles(checkpoint.files) as files:
        reader = TensorReader(files)
        return {
            name: reader.raw(tensor, 0, tensor.n_elements, "t")
            .clone()
            .view({"F32": torch.float32, "I64": torch.int64, "BF16": torch.bfloat16}[tensor.dtype])
            .view(tensor.shape)
            for name, tensor in checkpoint.tensors.items()
        }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return list(found) == sorted(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def failure(ref: str | Path, exit_code: int = FAILED) -> str:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(ref)
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_single_file_is_a_checkpoint_without_folder_or_config(tmp_path: Path) -> None:
    path = write(tmp_path, {"any name.safetensors": {"b": B, "a": A, "c": C}}) / "any name.safetensors"
    opened = open_checkpoint(path)
    assert same(values(opened), {"a": A, "b": B, "c": C})
    assert (opened.ref, opened.folder, opened.config, opened.side_files) == (str(path), None, {}, {})
    assert (opened.n_parameters, opened.n_bytes) == (11, 48)
    assert opened.float_names() == ["a", "b"]


def test_shards_with_an_index_equal_the_single_file(tmp_path: Path) -> None:
    single = open_checkpoint(build("llama", tmp_path / "single"))
    sharded = open_checkpoint(build("llama", tmp_path / "sharded", max_shard_size="10KB"))
    assert len(single.shards) == 1 and len(sharded.shards) > 2
    assert same(values(single), load_file(tmp_path / "single/model.safetensors"))
    assert same(values(sharded), values(single))
    assert single.config["model_type"] == sharded.config["model_type"] == "llama"


def test_shards_without_an_index_are_taken_together(tmp_path: Path) -> None:
    files = {"model-00001-of-00002.safetensors": {"b": B}, "model-00002-of-00002.safetensors": {"a": A}}
    opened = open_checkpoint(write(tmp_path, files))
    assert same(values(opened), {"a": A, "b": B})
    assert [shard.name for shard in opened.shards] == sorted(files)


def test_without_an_index_the_names_tell_that_a_shard_is_missing(tmp_path: Path) -> None:
    write(tmp_path, {"model-00001-of-00003.safetensors": {"b": B}, "model-00003-of-00003.safetensors": {"a": A}})
    assert failure(tmp_path) == (
        f"{tmp_path}: lacks shards that the others' names count: model-00002-of-00003.safetensors. "
        "The download is incomplete: fetch the missing files."
    )


def test_number_of_shards_in_a_name_is_not_trusted(tmp_path: Path) -> None:
    write(tmp_path, {f"m-1-of-{'9' * 200}.safetensors": {"b": B}})
    assert "lacks shards that the others' names count: m-2-of-999" in failure(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "weights.fp16.safetensors", "pytorch.safetensors"])
def test_only_file_counts_whatever_its_name(name: str, tmp_path: Path) -> None:
    assert same(values(open_checkpoint(write(tmp_path, {name: {"a": A}}))), {"a": A})


@pytest.mark.filterwarnings("ignore::surgery.errors.SurgeryWarning")
def test_consolidated_copy_beside_shards_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"consolidated.safetensors": {"wq": B}, "part.safetensors": {"a": A}})
    assert same(values(open_checkpoint(tmp_path)), {"a": A})


@pytest.mark.filterwarnings("ignore::surgery.errors.SurgeryWarning")
def test_model_safetensors_wins_over_other_files_and_a_stale_index(tmp_path: Path) -> None:
    """As in transformers, which looks for it first."""
    shard = "model-00001-of-00002.safetensors"
    write(tmp_path, {"model.safetensors": {"a": A}, shard: {"a": A + 1}}, index={"a": shard, "b": "gone.safetensors"})
    assert same(values(open_checkpoint(tmp_path)), {"a": A})


def test_index_that_names_model_safetensors_counts(tmp_path: Path) -> None:
    files = {"model.safetensors": {"a": A}, "mtp.safetensors": {"b": B}}
    write(tmp_path, files, index={"a": "model.safetensors", "b": "mtp.safetensors"})
    assert same(values(open_checkpoint(tmp_path)), {"a": A, "b": B})


def test_index_may_name_files_in_subfolders(tmp_path: Path) -> None:
    write(tmp_path, {"parts/one.safetensors": {"a": A}}, index={"a": "parts/one.safetensors"})
    assert same(values(open_checkpoint(tmp_path)), {"a": A})


def test_index_that_names_a_missing_shard_says_which(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": {"a": A}}, index={"a": "one.safetensors", "b": "two.safetensors"})
    assert failure(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: names 1 shard(s) that are not there: two.safetensors. "
        "The download is incomplete: fetch the missing files."
    )


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.safetensors", "a/../../x.safetensors", "..\\x.safetensors"])
def test_index_never_leads_outside_its_folder(path: str, tmp_path: Path) -> None:
    write(tmp_path / "outside", {"x.safetensors": {"a": A}})
    folder = write(tmp_path / "outside" / "model", {"one.safetensors": {"a": A}}, index={"a": path})
    assert f'"a" is mapped to {path!r}, a path outside the folder. Such an index is never followed' in failure(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, 'has no "weight_map" from tensor names to files'),
        ([], 'has no "weight_map" from tensor names to files'),
        ({"a": 3}, '"a" is mapped to 3, expected a file name'),
        ({"a": ""}, "names 1 shard(s) that are not there"),
        ({"a": "nul\0.safetensors"}, "names 1 shard(s) that are not there"),
    ],
)
def test_index_of_another_form_is_refused(index: object, message: str, tmp_path: Path) -> None:
    assert message in failure(write(tmp_path, {"one.safetensors": {"a": A}}, index=index))


def test_index_that_names_tensors_its_shards_lack_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": {"a": A}}, index=dict.fromkeys(("a", "y", "x"), "one.safetensors"))
    assert failure(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: names 2 tensor(s) that their shards do not hold: x, y. "
        "Index and shards are of different saves: fetch them again together."
    )


def test_index_decides_between_two_copies_of_a_tensor(tmp_path: Path) -> None:
    files = {"one.safetensors": {"a": A, "b": B}, "two.safetensors": {"a": A + 1, "c": C}}
    write(tmp_path, files, index={"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    assert same(values(open_checkpoint(tmp_path)), {"a": A + 1, "b": B, "c": C})


def test_two_copies_of_a_tensor_without_an_index_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": {"a": A}, "two.safetensors": {"a": A}})
    assert failure(tmp_path) == (
        f'{tmp_path}: "a" is in one.safetensors and in two.safetensors. '
        "Remove the stale shards, or add the index that says which one counts."
    )


@pytest.mark.filterwarnings("ignore::surgery.errors.SurgeryWarning")
def test_of_two_indexes_the_usual_one_counts_and_others_must_be_unambiguous(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": {"a": A}}, index={"a": "one.safetensors"}, name="other")
    assert same(values(open_checkpoint(tmp_path)), {"a": A})
    write(tmp_path, {}, index={"a": "gone.safetensors"}, name="another")
    assert failure(tmp_path) == (
        f"{tmp_path}: 2 indexes: another.safetensors.index.json, other.safetensors.index.json. "
        "Keep the one that describes the weights."
    )
    write(tmp_path, {}, index={"a": "one.safetensors"})
    assert same(values(open_checkpoint(tmp_path)), {"a": A})


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}})
    whole = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(whole[:-1])
    assert f'{tmp_path}/two.safetensors: "b" ends at byte 16 of 15. The download is incomplete' in failure(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickles_are_refused_with_the_way_to_convert(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for ref in (tmp_path, tmp_path / name):
        assert failure(ref) == (
            f"{ref}: holds weights only as Python pickles ({name}), which can run code when they are opened. "
            "Convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) writes safetensors."
        )


@pytest.mark.parametrize(
    "ref", ["no/such/folder", "nothing.safetensors", "", "~nobody/x/y", "a\0b", "x" * 1500, "+", "a+"]
)
def test_reference_that_leads_nowhere_is_wrong_usage(ref: str) -> None:
    message = failure(ref, WRONG_USAGE)
    assert message == (
        f"{ref or chr(34) * 2}: no such folder or file, and not a Hub id (org/name[@revision]) or lab:NAME. "
        "Check the spelling; `surgery lab list` names the lab models."
    )


def test_empty_folder_says_what_to_give(tmp_path: Path) -> None:
    assert failure(tmp_path) == (f"{tmp_path}: has no .safetensors file. Give the folder that holds model.safetensors.")


def test_files_without_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {}})
    assert failure(tmp_path) == f"{tmp_path}/model.safetensors: holds no tensor"
    write(tmp_path, {"model.safetensors": {"c": C}})
    with pytest.raises(SurgeryError, match="holds no float tensor"):
        open_checkpoint(tmp_path).float_names()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": ', "is not valid JSON (Expecting value"),
        (b"[1]", "is not a JSON object. Fetch the file again."),
        (b'{"a": "\xff"}', "is not valid JSON ('utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
        (b"[" * 100_000, "is nested more than 100 levels deep"),
    ],
)
def test_broken_config_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"a": A}})
    (tmp_path / "config.json").write_bytes(text)
    assert failure(tmp_path).startswith(f"{tmp_path}/config.json: {message}")


# What trainings, adapters, other tools and our own commands leave in a model's folder.
NOT_OF_A_MODEL = (
    "README.md",
    "surgery.json",
    "adapter_config.json",
    "adapter_model.bin",
    "all_results.json",
    "events.out.tfevents.1",
    "findings.json",
    "journal.jsonl",
    "notes.txt",
    "optimizer.pt",
    "plot.png",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "requirements.txt",
    "results.json",
    "rng_state_0.pth",
    "scheduler.pt",
    "scores.json",
    "trainer_state.json",
    "training.json",
    "training_args.bin",
    "train.py",
    ".env",
    ".hidden.json",
)


@pytest.mark.filterwarnings("ignore::surgery.errors.SurgeryWarning")
def test_side_files_are_what_a_model_needs_besides_its_weights(tmp_path: Path) -> None:
    folder = add_tokenizer(build("llama", tmp_path / "m", max_shard_size="10KB"))
    carried = [
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
    ]
    for name in (*carried, *NOT_OF_A_MODEL):
        (folder / name).write_text("{}")
    (folder / "folder.json").mkdir()
    made = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert list(open_checkpoint(folder).side_files) == sorted(carried + made)


def test_code_is_carried_where_a_config_names_it_and_with_what_it_imports(tmp_path: Path) -> None:
    folder = add_tokenizer(build("llama", tmp_path / "m"))
    auto_map = {"AutoModel": "modeling_x.X", "AutoConfig": "org/other--configuration_y.Y", "AutoImage": "../up.Z"}
    for name, value in {"config.json": auto_map, "tokenizer_config.json": ["tokenization_x.T", None, 3]}.items():
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"auto_map": value}))
    code = {
        "modeling_x": "import torch\nfrom .helper import f\nfrom . import loop\n",
        "helper": "    from .modeling_x import X\nfrom .missing import g\nimport os\n",
        "tokenization_x": "",
        "configuration_y": "",
        "setup": "raise SystemExit",
    }
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text)
    carried = [name for name in open_checkpoint(folder).side_files if name.endswith(".py")]
    assert carried == ["helper.py", "modeling_x.py", "tokenization_x.py"]


def test_hub_id_is_fetched_and_its_commit_recorded(server: HubServer, tmp_path: Path) -> None:
    files = {"model-00001-of-00002.safetensors": {"b": B}, "model-00002-of-00002.safetensors": {"a": A}}
    index = {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}
    folder = write(tmp_path / "m", files, index=index)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    server.add("org/tiny", folder)
    commit = hub.fetch("org/tiny", progress=False).revision
    for ref in ("org/tiny", "org/tiny@main", f"org/tiny@{commit}"):
        opened = open_checkpoint(ref)
        assert (opened.ref, opened.repo_id, opened.revision) == (ref, "org/tiny", commit)
        assert opened.config == {"model_type": "tiny"}
        assert same(values(opened), {"a": A, "b": B})


def test_folder_of_that_name_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "org/name", {"model.safetensors": {"a": A}})
    monkeypatch.chdir(tmp_path)
    opened = open_checkpoint("org/name")
    assert (opened.ref, opened.repo_id, opened.revision) == ("org/name", None, None)


def test_hub_errors_pass_through(server: HubServer) -> None:
    assert failure("org/absent").startswith("org/absent: no such model at ")


def test_lab_names_are_resolved_by_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"tiny": write(tmp_path / "made", {"model.safetensors": {"a": A}})}
    monkeypatch.setattr(lab, "resolve", lambda name: folders[name])
    opened = open_checkpoint("lab:tiny")
    assert (opened.ref, opened.folder) == ("lab:tiny", folders["tiny"])
    assert same(values(opened), {"a": A})


def write_adapter(folder: Path, a: Tensor, b: Tensor, base: str | None = None) -> Path:
    """The smallest LoRA adapter on a tensor "model.w.weight"."""
    write(
        folder,
        {
            "adapter_model.safetensors": {
                f"base_model.model.model.w.lora_{n}.weight": t for n, t in (("A", a), ("B", b))
            }
        },
    )
    config = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": 2 * a.shape[0], "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """A base, an adapter that names no base, and what the two are together."""
    a, b = torch.arange(3.0).view(1, 3) + 1, torch.tensor([[2.0], [-1.0]])
    base = write(tmp_path / "base", {"model.safetensors": {"model.w.weight": A}})
    return base, write_adapter(tmp_path / "adapter", a, b), A + 2 * b @ a


def read(ref: str) -> Tensor:
    opened = open_checkpoint(ref)
    with SourceFiles(opened.files) as files:
        return TensorReader(files).whole(TensorInput(opened.tensors["model.w.weight"]), 0).clone()


def test_plus_puts_an_adapter_on_a_base_of_your_choice(
    pair: tuple[Path, Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, expected = pair
    monkeypatch.setattr(lab, "resolve", lambda name: {"tiny": base}[name])
    for ref in (f"{base}+{adapter}", f"{base}/model.safetensors+{adapter}", f"lab:tiny+{adapter}"):
        assert torch.equal(read(ref), expected)
        opened = open_checkpoint(ref)
        assert (opened.ref, opened.adapter) == (ref, adapter)
        assert opened.files == tuple(sorted([adapter / "adapter_model.safetensors", base / "model.safetensors"]))


def test_folder_with_a_plus_in_its_name_is_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "a+b", {"model.safetensors": {"a": A}})
    assert same(values(open_checkpoint(folder)), {"a": A})


def test_adapters_and_bases_come_from_the_hub_too(
    server: HubServer, pair: tuple[Path, Path, Tensor], tmp_path: Path
) -> None:
    base, adapter, expected = pair
    server.add("org/base", base)
    server.add("org/adapter", adapter)
    assert torch.equal(read("org/base+org/adapter"), expected)
    named = write_adapter(tmp_path / "named", torch.ones(1, 3), torch.ones(2, 1), "org/base")
    assert torch.equal(read(str(named)), A + 2)
    opened = open_checkpoint(named)
    assert opened.repo_id == "org/base" and opened.revision == hub.fetch("org/base", progress=False).revision


def test_what_stands_after_the_plus_must_be_an_adapter(pair: tuple[Path, Path, Tensor]) -> None:
    base, adapter, _ = pair
    assert failure(f"{base}+{base}", WRONG_USAGE) == f"{base}: is not an adapter: it has no adapter_config.json"
    assert failure(f"{base}+none", WRONG_USAGE) == "none: no such adapter folder, and not a Hub id"
    assert failure(f"none+{adapter}", WRONG_USAGE).startswith("none: no such folder or file")


def test_adapter_on_an_adapter_is_refused(pair: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    base, adapter, _ = pair
    second = write_adapter(tmp_path / "second", torch.ones(1, 3), torch.ones(2, 1), str(adapter))
    itself = write_adapter(tmp_path / "itself", torch.ones(1, 3), torch.ones(2, 1), ".")
    for ref in (f"{base}+{adapter}+{second}", f"{second}+{adapter}", str(second), str(itself)):
        assert "is an adapter, and so cannot be the base of another. Merge it into its base first" in failure(ref)
