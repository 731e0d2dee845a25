"""A frozen embedding of a whole vocabulary: seconds and memory of 65,536 strings in many scripts, as glyphs.

Usage:

    python benchmarks/substrate.py [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from measuring import child, peak_of, spread, table
from transfer import machine

SEED = 0
TOKENS = 65_536
THREADS, MOST_SECONDS = 2, 60.0  # of an embedding
WIDE_SCRIPTS = 0x3000  # whose tokens are short


def strings(count: int) -> list[str]:
    """Distinct strings such as tokens are: numbers, and pieces of words in many scripts; half begin with a space."""
    draw = random.Random(SEED)
    words = [*[(0x61, 0x7B)] * 6, (0x41, 0x5B), (0x30, 0x3A), (0xC0, 0x180), (0x3B1, 0x3CA), (0x430, 0x450)]
    words += [(0x5D0, 0x5EB), (0x627, 0x64B), (0x905, 0x93A), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4)]
    found: dict[str, None] = {}
    while len(found) < count:
        script = draw.choice(words)
        length = draw.randint(1, 3 if script[0] > WIDE_SCRIPTS else 12)
        found[draw.choice(("", " ")) + "".join(chr(draw.randrange(*script)) for _ in range(length))] = None
    return list(found)


def make_tokenizer(folder: Path, count: int) -> None:
    """A byte-level BPE of `count` tokens: all single bytes, and as many strings as fit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = dict.fromkeys(["<eos>", *sorted(spell.alphabet())])
    for text in strings(count):
        pieces.setdefault("".join(piece for piece, _ in spell.pre_tokenize_str(text)))
    vocab = {piece: number for number, piece in enumerate(list(pieces)[:count])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = spell, decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def embed(folder: Path) -> None:
    """Prints the seconds, the peak resident MB, and what was made, as JSON."""
    from surgery.growth.embedding.build import make_embedding
    from surgery.growth.embedding.report import EmbeddingReport

    made: list[EmbeddingReport] = []
    begun = time.perf_counter()
    most = peak_of(lambda: made.append(make_embedding(str(folder / "tok"), folder / "emb", overwrite=True)))
    seconds = time.perf_counter() - begun
    [report] = made
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak": most,
                "tokens": report.vocab_size,
                "width": report.width,
                "alike": report.collisions.rows,
            }
        )
    )


def embedding(rounds: int) -> None:
    """Glyphs of a whole vocabulary, in a process of its own."""
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with TemporaryDirectory() as name:
        child(__file__, "--tokenizer", "--folder", name)
        found = [json.loads(child(__file__, "--embed", "--folder", name, more=threads)) for _ in range(rounds)]
    made = found[0]
    row = (
        f"{made['tokens']:,}",
        f"{made['width']:,}",
        f"{made['alike']:,}",
        spread([line["seconds"] for line in found], 1),
        f"≤ {MOST_SECONDS:.0f}",
        spread([line["peak"] for line in found], 0),
    )
    header = ("tokens", "width", "rows alike", "seconds", "wanted", "peak MB")
    table(f"`make_embedding` with its defaults (glyphs), {THREADS} threads", header, [row])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    for hidden in ("--tokenizer", "--embed"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokenizer:
        make_tokenizer(options.folder / "tok", TOKENS)
    elif options.embed:
        embed(options.folder)
    else:
        print(f"{machine()}, {options.rounds} rounds", flush=True)
        embedding(options.rounds)


if __name__ == "__main__":
    main()
