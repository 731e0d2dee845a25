"""What the tests of fetching share: the files of a model on the Hub, and what `fetch` answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.hub import download as hub

REPO = "lab/tiny"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB, so that a cut leaves something on both sides
FETCHED = {
    "config.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": b"second",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "qwen.tiktoken": b"YQ== 0",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "members/0.json": b"{}",
    "members/0/config.json": b"{}",
    "members/0/README.md": b"# member",
}
LEFT_ALONE = {
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "model.pth": b"pickle",
    "model.gguf": b"gguf",
    "modeling_tiny.py": b"raise SystemExit",
    "README.md": b"# tiny",
    "consolidated.safetensors": b"the same weights",
    "original/consolidated.safetensors": b"the same weights",
    "onnx/config.json": b"{}",
    "members/0/model.safetensors": b"weights",
    "members/0/modeling_tiny.py": b"raise SystemExit",
    "additional_chat_templates/run.py": b"raise SystemExit",
}


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    """Write `files`, by their paths, to the folder `path`, and return it."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def failure(repo_id: str = REPO, revision: str | None = None) -> str:
    """Return the error that `fetch` raises, as one line."""
    with pytest.raises(SurgeryError) as caught:
        hub.fetch(repo_id, revision, progress=False)
    assert "\n" not in str(caught.value)
    return f"{caught.value.where}: {caught.value.what}. {caught.value.hint}"


def content(folder: Path) -> dict[str, bytes]:
    """Return path → bytes of every file in `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
