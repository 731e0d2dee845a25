"""The command line as a user meets it: help, tables, JSON, exit codes, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build, sibling
from support.cli import Surgery, commands_in

COMMANDS = {
    "inspect",
    "diff",
    "verify",
    "eval",
    "vector extract",
    "vector apply",
    "vector transfer",
    "vector compare",
    "vector sweep",
    "lab list",
    "lab build",
    "merge weights",
    "merge methods",
    "merge logits",
    "merge unpack",
    "probe refusal",
    "probe heads",
    "probe judge",
    "probe experts",
    "probe show",
    "edit heads",
    "edit experts",
    "edit undo",
    "grow embed",
    "grow tokenizer",
    "grow init",
    "grow add",
    "grow run",
    "grow baseline",
    "push",
    "reproduce",
    "run",
}


def surgery_process(*arguments: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, which takes seconds: where that is what a test is about."""
    script = "from cli.main import run; run()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **env}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=600,
    )


@pytest.fixture
def surgery(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    """Runs a command in this process, in the folder `models`, as wide as a terminal."""
    return commands_in(models, monkeypatch, capsys, columns=120)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `tuned` and `target`: tiny Llama siblings with tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base")
    for number, name in enumerate(("tuned", "target")):
        add_tokenizer(sibling(base, folder / name, seed=number))
    add_tokenizer(base)
    return folder


def test_every_command_has_help_with_an_example(surgery: Surgery) -> None:
    for command in sorted(COMMANDS):
        result = surgery(*command.split(), "--help")
        assert result.code == 0
        assert f"Example: surgery {command}" in " ".join(result.out.split())


def test_the_list_of_commands_and_options_is_frozen() -> None:
    import typer

    from cli.main import app

    root = typer.main.get_command(app)
    found: dict[str, list[str]] = {}

    def walk(command: object, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found[" ".join(path)] = sorted(o for p in command.params for o in p.opts if o.startswith("-"))  # type: ignore[attr-defined]
        for name, child in (children or {}).items():
            walk(child, (*path, name))

    walk(root, ())
    assert set(found) == COMMANDS
    frozen = Path(__file__).parent / "options.json"
    assert found == json.loads(frozen.read_text()), "a change of the command line: update options.json and the README"


def test_the_installed_program_leaves_with_the_commands_exit_code_and_all_of_its_output() -> None:
    script = "from cli.main import program; program()"
    for words, code in ((["lab", "list", "--json"], 0), (["inspect", "no-such-model"], 2)):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == code
        assert ("substrate" in done.stdout) == (code == 0) and ("error:" in done.stderr) == (code == 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_termination_are_told_in_a_line(number: int, code: int) -> None:
    script = (
        "import time, surgery.checkpoint.inspect\nfrom cli import main\nfrom cli.commands import models\n"
        "def work(*_, **__): print('working', flush=True); time.sleep(60)\n"
        "models.console.show_json = work\nmain.program()"
    )
    words = ["lab", "list", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == "working\n"
        running.send_signal(number)
        out, err = running.communicate(timeout=600)
    assert (running.returncode, out) == (code, "")
    assert err == "error: stopped. The same command goes on where it was.\n"


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; sys.argv = ['surgery', '--help']\n"
        "from cli.main import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'sklearn', 'pydantic', 'matplotlib', 'numpy', 'huggingface_hub'}"
        " & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_weight_commands_never_import_transformers(models: Path, tmp_path: Path) -> None:
    commands = [
        ["inspect", "base"],
        ["diff", "base", "tuned"],
        ["vector", "extract", "tuned", "base", "-o", str(tmp_path / "v")],
        ["vector", "apply", str(tmp_path / "v"), "target", "-o", str(tmp_path / "out")],
        ["vector", "transfer", "tuned", "base", "target", "-o", str(tmp_path / "out2")],
        ["vector", "compare", str(tmp_path / "v"), str(tmp_path / "v")],
        ["vector", "extract", "tuned", "base", "-o", str(tmp_path / "adapter"), "--rank", "4"],
        ["verify", str(tmp_path / "out")],
    ]
    script = (
        "import json, sys\nfrom cli.main import app\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['surgery', *command]\n"
        "    try: app()\n    except SystemExit as end: assert not end.code, command\n"
        "assert not {'transformers', 'accelerate', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, json.dumps(commands)], cwd=models, check=True, capture_output=True)


def test_the_readmes_commands_on_tiny_models(models: Path, tmp_path: Path, surgery: Surgery) -> None:
    assert "4 × 8" in surgery("inspect", "base").out
    moved = surgery("diff", "base", "tuned", "--plot", tmp_path / "moved.png")
    assert "layer 1" in moved.out and (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")
    made = surgery("vector", "extract", "tuned", "base", "-o", tmp_path / "v")
    assert made.code == 0 and "same ancestor" in made.err
    made = surgery("vector", "apply", tmp_path / "v", "target", "-o", tmp_path / "out", "--scale", "-1")
    assert made.code == 0 and "delivered" in made.out and f"Wrote {tmp_path / 'out'}" in made.err
    assert "hashes as in the manifest" in surgery("verify", tmp_path / "out").err
    compared = surgery("vector", "compare", tmp_path / "v", tmp_path / "v", "--plot", tmp_path / "cos.png")
    assert "1.000" in compared.out and (tmp_path / "cos.png").exists()


def test_json_is_one_object_on_stdout(models: Path, tmp_path: Path, surgery: Surgery) -> None:
    commands: list[list[str | Path]] = [
        ["inspect", "base"],
        ["diff", "base", "tuned"],
        ["vector", "extract", "tuned", "base", "-o", tmp_path / "v"],
        ["vector", "apply", tmp_path / "v", "target", "-o", tmp_path / "out"],
        ["vector", "transfer", "tuned", "base", "target", "-o", tmp_path / "out2", "--dry-run"],
        ["vector", "compare", tmp_path / "v", tmp_path / "v"],
        ["verify", tmp_path / "out"],
        ["lab", "list"],
    ]
    for command in commands:
        result = surgery(*command, "--json")
        assert result.code == 0, result.err
        assert isinstance(json.loads(result.out), dict), command


def test_eval_puts_members_and_result_side_by_side_and_into_the_result_s_card(
    models: Path, tmp_path: Path, surgery: Surgery
) -> None:
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text('{"text": "w10 w11 w12 w13"}\n{"text": "w20 w21 w22"}\n')
    surgery("vector", "transfer", "tuned", "base", "target", "-o", out)
    card = (out / "README.md").read_text()

    untouched = surgery("eval", "base", out, "--perplexity", text, "--no-card", "--json")
    assert untouched.code == 0, untouched.err
    scores = json.loads(untouched.out)["scores"]
    assert [(s["model"], s["metric"], s["n"]) for s in scores[:4:3]] == [
        ("base", "perplexity", 5),
        (str(out), "perplexity", 5),
    ]
    assert (out / "README.md").read_text() == card

    shown = surgery("eval", "base", out, "--perplexity", text)
    assert "perplexity ↓" in shown.out and "★" in shown.out
    assert f"Scores are in {out / 'README.md'}" in shown.err
    written = (out / "README.md").read_text()
    assert written.startswith(card) and f"surgery eval base {out} --perplexity {text}" in written
    assert "## Scores" not in "".join(path.read_text() for path in models.glob("*/README.md"))


def test_eval_loads_a_logit_ensemble(models: Path, tmp_path: Path) -> None:
    from merges.ensemble.average import average_logits

    text, out = tmp_path / "text.txt", tmp_path / "ensemble"
    text.write_text("w10 w11 w12 w13 w20 w21 w22")
    average_logits([str(models / "base"), str(models / "tuned")], out)
    result = surgery_process("eval", models / "base", models / "tuned", out, "--perplexity", text, "--json")
    assert result.returncode == 0, result.stderr
    values = [s["value"] for s in json.loads(result.stdout)["scores"] if s["metric"] == "nats per token"]
    # The mean of logits is the normalised geometric mean: never worse than the members' mean loss.
    assert len(values) == 3 and values[2] <= (values[0] + values[1]) / 2 + 1e-6


def test_an_error_is_one_line_and_debug_shows_where(models: Path) -> None:
    plain = surgery_process("inspect", "nowhere", cwd=models)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.count("\n") == 1 and plain.stderr.startswith("error: nowhere: no such folder")
    assert "Traceback" in surgery_process("--debug", "inspect", "nowhere", cwd=models).stderr


def test_verify_fails_where_a_byte_has_changed(models: Path, tmp_path: Path, surgery: Surgery) -> None:
    surgery("vector", "transfer", "tuned", "base", "target", "-o", tmp_path / "out")
    weights = tmp_path / "out/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = surgery("verify", tmp_path / "out")
    assert result.code == 1
    assert "1 tensor(s) are not what the manifest says: model.norm.weight" in result.err


def test_verify_names_tensors_that_are_not_finite(models: Path, tmp_path: Path, surgery: Surgery) -> None:
    tensors = load_file(models / "base/model.safetensors")
    tensors["model.norm.weight"][:2] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    result = surgery("verify", tmp_path / "bad.safetensors")
    assert result.code == 1
    assert "hold NaN or infinite values: model.norm.weight (2)" in result.err


TRANSFER = ["vector", "transfer", "tuned", "base", "target", "-o"]
BAD_USAGE = [
    ([*TRANSFER, "out", "--scale", "nan"], "--scale: got nan, expected a finite number"),
    ([*TRANSFER, "base/out"], "lies inside the base base"),
    ([*TRANSFER, "tuned"], "lies inside the tuned tuned"),
    ([*TRANSFER, "out", "--vocab", "hope"], "--vocab: got 'hope', expected strict, by-token or skip-embeddings"),
    (
        ["merge", "linear", "base", "--weight", "1", "--dtype", "half", "-o", "out"],
        "--dtype: got 'half', expected float64, float32, bfloat16 or float16. Did you mean \"float16\"?",
    ),
    ([*TRANSFER, "out", "--scale-for", "mlp"], "--scale-for: got 'mlp', expected GLOB=NUMBER"),
    (["vector", "apply", "base", "target", "-o", "out"], "is not a vector"),
    (["vector", "apply", "nowhere", "target", "-o", "out"], "no such vector folder"),
    (["vector", "compare", "base"], "got 1 vector, expected two or more"),
    (["lab", "build", "grpoo"], "grpo"),
    (["eval", "base"], "nothing to score the models on. Add --task TASK, --perplexity TEXT, or both."),
    (["eval", "base", "--perplexity", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["inspect", "lab:nothing"], "nothing"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD_USAGE)
def test_wrong_usage_is_told_in_a_line_with_exit_code_2(
    arguments: list[str], text: str, models: Path, surgery: Surgery
) -> None:
    before = sorted(models.rglob("*"))
    result = surgery(*arguments)
    assert result.code == 2, result.err
    assert text in result.err and "Traceback" not in result.err
    assert sorted(models.rglob("*")) == before


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def lie(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[32]', b'"shape":[99]'))


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokens(folder: Path) -> None:
    add_tokenizer(folder, [f"other{i}" for i in range(90)])


def nonfinite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = [
    (truncate, "The download is incomplete or the file is damaged: fetch it again."),
    (lie, "takes 64 bytes, but BF16 [99] takes 198"),
    (point_outside, "a path outside the folder"),
    (lose_a_shard, "names 1 shard(s) that are not there: model-1.safetensors"),
    (pickle_only, "holds weights only as Python pickles (pytorch_model.bin)"),
    (drop_a_tensor, "in tuned, base and not in broken"),
    (other_tokens, "the vocabularies of broken and"),
    (nonfinite, "model.norm.weight: 1 of 32 values from element 0 on are NaN or infinite"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_target_fails_with_what_where_and_what_to_do(
    damage: Callable[[Path], None],
    text: str,
    models: Path,
    tmp_path: Path,
    surgery: Surgery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("tuned", "base"):
        (tmp_path / name).symlink_to(models / name)
    shutil.copytree(models / "target", tmp_path / "broken")
    damage(tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    result = surgery("vector", "transfer", "tuned", "base", "broken", "-o", "out")
    assert result.code == 1, result.err
    assert text in result.err and "Traceback" not in result.err
    left = {path.name for path in tmp_path.iterdir()} - {"tuned", "base", "broken"}
    assert left == ({"out.partial", ".out.lock"} if damage is nonfinite else set())


def test_a_hub_id_that_is_not_cached_says_so_offline(tmp_path: Path) -> None:
    result = surgery_process("inspect", "nobody/nothing", HF_HUB_CACHE=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("error: nobody/nothing") and "Traceback" not in result.stderr
