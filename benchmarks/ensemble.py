"""A logit ensemble of two models against the two alone: decoding time, size on disk, and equality.

Two random Llamas in fp32 with one embedding, greedy decoding of 256 tokens with the cache, one process, medians of
several rounds in which the three take turns. Usage:

    python benchmarks/ensemble.py [--rounds 5] [--hidden 512] [--layers 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transfer import machine
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from merges.ensemble.average import average_logits

TOKENS = 256


def make(folder: Path, hidden: int, layers: int) -> list[Path]:
    """Two models of one shape that differ in everything but the embedding."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=32_000,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    paths, shared = [], None
    for name in ("a", "b"):
        torch.manual_seed(len(paths))
        model = AutoModelForCausalLM.from_config(config)
        embedding = model.get_input_embeddings().weight
        if shared is None:
            shared = embedding.detach().clone()
        with torch.no_grad():
            embedding.copy_(shared)
        model.save_pretrained(folder / name)
        paths.append(folder / name)
    return paths


def decode(model: object, prompt: torch.Tensor, *, cached: bool = True) -> torch.Tensor:
    """The greedy continuation of `prompt`, (1, prompt + TOKENS)."""
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, use_cache=cached)


def size(folder: Path) -> float:
    """MB of weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    disable_progress_bar()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        a, b = make(folder, options.hidden, options.layers)
        average_logits([str(a), str(b)], folder / "both")
        models = {path.name: AutoModelForCausalLM.from_pretrained(path).eval() for path in (a, b, folder / "both")}
        prompt = torch.tensor([[1, 5, 9, 200, 31]])
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                decode(model, prompt)
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        ratios = [e / (x + y) for x, y, e in zip(*(times[1:] for times in seconds.values()), strict=True)]
        with torch.no_grad():
            x, y, e = (model(prompt).logits for model in models.values())
        cached, uncached = (decode(models["both"], prompt, cached=cached) for cached in (True, False))
        print(f"{machine()}, {options.rounds} rounds, hidden {options.hidden}, {options.layers} layers")
        print("seconds for 256 tokens: " + ", ".join(f"{name} {s:.2f}" for name, s in medians.items()))
        print(f"both ÷ (a + b): {statistics.median(ratios):.2f} (allowed 1.1)")
        print(f"largest difference from the explicit mean: {float(((x + y) / 2 - e).abs().max()):.1e} (allowed 1e-5)")
        print(f"cached and uncached tokens identical: {torch.equal(cached, uncached)}")
        print(f"MB on disk: a {size(a):.0f}, b {size(b):.0f}, both {size(folder / 'both'):.0f}")


if __name__ == "__main__":
    main()
