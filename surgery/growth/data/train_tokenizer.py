"""A tokenizer that begins with characters: BPE over a corpus's common characters, and bytes for all others.

In come texts, out comes the folder TOK of a fast tokenizer as transformers loads it. Text is neither normalised nor
trimmed, and a character that is not in the alphabet is spelled in UTF-8 bytes (`<0xE2>`): whatever Unicode goes in
comes out again. The same texts give the same bytes.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from surgery.checkpoint.vocabulary import TOKENIZER
from surgery.engine.manifest import build_manifest_of_files, command_record, write_manifest
from surgery.errors import SurgeryError, listing, usage_error
from surgery.growth.data.corpus import FIELD
from surgery.io.atomic import check_free, commit_folder, create_partial_folder, disk_error, file_sizes
from surgery.io.hashing import KEY, hash_bytes
from surgery.models.loading import save_tokenizer
from surgery.reporting.report import Column, Table
from surgery.runtime.progress import Progress, silent

KIND = "tokenizer"
END = "<|endoftext|>"
N_BYTES = 256
# SentencePiece's share of a text that an alphabet covers; the rest is spelled in bytes.
COVERAGE = 0.9995
# A pair seen once says nothing about the language.
FEWEST = 2
# A longer token's picture has less than a column of pixels for a character.
LONGEST = 32
# Words with the space before them, numbers in threes, punctuation, line ends, other white space. Every character is in
# one of these; only their bounds are used, and nothing is dropped.
PIECES = r" ?\p{L}[\p{L}\p{M}]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerReport:
    """What was learnt.

    size: tokens in all, fewer than `asked` where the texts have no more pairs that occur twice. alphabet: characters
    that are tokens. covered: their share of the texts. hash: of tokenizer.json.
    """

    out: Path
    size: int
    asked: int
    alphabet: int
    merges: int
    documents: int
    characters: int
    covered: float
    hash: str

    def table(self) -> Table:
        """The report, for people."""
        facts = [
            ("tokens", self.size),
            ("asked for", self.asked),
            ("characters in the alphabet", self.alphabet),
            ("merges", self.merges),
            ("documents", self.documents),
            ("characters read", self.characters),
        ]
        note = (
            f"{100 * self.covered:.3f} % of the characters read are in the alphabet; the others are spelled in bytes."
        )
        return Table("Tokenizer", [Column(""), Column("", "count")], facts, note=note)


def train_tokenizer(
    corpus: Iterable[str],
    out: Path,
    *,
    vocab: int,
    special: Sequence[str] = (END,),
    refs: Sequence[str] = (),
    field: str = FIELD,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TokenizerReport:
    """Learns byte-pair merges of characters (arXiv 1508.07909) on `corpus` and writes the tokenizer to folder `out`.

    The alphabet are the most frequent characters that make up 99.95 % of the corpus; ids are those of the special
    tokens, the 256 bytes, the alphabet by codepoint, and the merges in their order.

    Args:
        corpus: texts, read once; a copy is kept in a temporary file while it is learnt from.
        vocab: how many tokens there are to be.
        special: tokens with a meaning of their own; the first of them begins, ends and pads texts.
        refs, field: what the texts were read from, and the column of records, for the manifest.

    Raises:
        SurgeryError: the corpus is empty, or holds half a surrogate pair; `vocab` has no room for the alphabet; a
            special token is no good; `out` exists; the disk is full.
    """
    _check_special(special)
    check_free(out, overwrite=overwrite)
    with _spool() as spool:
        counts, documents = _count(corpus, spool, progress)
        alphabet = _alphabet(counts)
        fixed = len(special) + N_BYTES
        if vocab < fixed + len(alphabet):
            raise usage_error(
                f"got {vocab:,}, expected {fixed + len(alphabet):,} or more: {len(special)} special tokens, "
                f"{N_BYTES} bytes and {len(alphabet):,} characters",
                where="--vocab",
            )
        learnt = _learn(_known_parts(spool, alphabet, documents, progress), alphabet, vocab - fixed)
    clash = sorted(set(special) & set(learnt["vocab"]))
    if clash:
        raise usage_error(f"{listing(map(repr, clash))} is also learnt as ordinary text", where="--special")
    tokenizer = _assemble(learnt, special)
    partial = create_partial_folder(out, overwrite=overwrite)
    _save(tokenizer, special, partial)
    found = hash_bytes((partial / TOKENIZER).read_bytes()).hex()
    characters = counts.total()
    report = TokenizerReport(
        out,
        tokenizer.get_vocab_size(),
        vocab,
        len(alphabet),
        len(learnt["merges"]),
        documents,
        characters,
        sum(counts[character] for character in alphabet) / characters,
        found,
    )
    named = None if tuple(special) == (END,) else list(special)
    record = command_record("grow tokenizer", refs, vocab=vocab, special=named, field=None if field == FIELD else field)
    manifest = build_manifest_of_files(
        KIND,
        record,
        inputs={},
        files=file_sizes(partial),
        tensors={},
        versions=_versions(),
        report={name: value for name, value in asdict(report).items() if name != "out"} | {f"{TOKENIZER} {KEY}": found},
    )
    write_manifest(partial, manifest)
    commit_folder(partial, out, overwrite=overwrite)
    return report


def _check_special(special: Sequence[str]) -> None:
    if not special:
        raise usage_error("got none, expected one or more", where="--special", hint=f"Such as {END}.")
    wrong = [token for token in special if len(token) < 2 or token in _byte_tokens()]
    if wrong or len(set(special)) < len(special):
        raise usage_error(
            f"got {listing(map(repr, special))}, expected different ones, of two characters or more, and no bytes",
            where="--special",
        )


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(N_BYTES)]


def _count(corpus: Iterable[str], spool: IO[str], progress: Progress) -> tuple[Counter[str], int]:
    """Copies the texts to `spool`, one JSON string per line; returns how often each character occurs, and the texts."""
    counts: Counter[str] = Counter()
    documents = 0
    with progress("Counting characters", 0, "steps") as advance:
        for text in corpus:
            documents += 1
            counts.update(text)
            with _spooling():
                spool.write(json.dumps(text) + "\n")
            advance(1)
    with _spooling():
        spool.flush()
    broken = next((character for character in counts if "\ud800" <= character <= "\udfff"), None)
    if broken is not None:
        raise SurgeryError(
            f"holds {broken!r}, half of a surrogate pair, which is no character",
            where="corpus",
            hint="Read it with errors='replace', or leave out what is broken.",
        )
    if not counts:
        raise usage_error("holds no text", where="corpus")
    return counts, documents


@contextmanager
def _spool() -> Iterator[IO[str]]:
    """A temporary file. Raises SurgeryError where there can be none."""
    with _spooling():
        file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115
    try:
        yield file
    finally:
        with suppress(OSError):  # of what a full disk could not take, which was said before
            file.close()


@contextmanager
def _spooling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, Path(tempfile.gettempdir())) from error


def _alphabet(counts: Counter[str]) -> list[str]:
    """The fewest characters, the most frequent first, that make up `COVERAGE` of the text; sorted by codepoint."""
    enough = COVERAGE * counts.total()
    chosen, covered = [], 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= enough:
            break
        chosen.append(character)
        covered += count
    return sorted(chosen)


def _known_parts(spool: IO[str], alphabet: Sequence[str], documents: int, progress: Progress) -> Iterator[list[str]]:
    """The spooled texts, cut where a character is not in the alphabet: nothing is merged across it."""
    unknown = re.compile(f"[^{''.join(map(re.escape, alphabet))}]+")
    spool.seek(0)
    with progress("Learning", documents, "steps") as advance:
        for line in spool:
            yield [part for part in unknown.split(json.loads(line)) if part]
            advance(1)


def _learn(parts: Iterable[list[str]], alphabet: Sequence[str], size: int) -> dict[str, Any]:
    """{"vocab": token → number, "merges": pairs}: the alphabet and at most `size` tokens with it."""
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pieces()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=FEWEST,
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
        max_token_length=LONGEST,
        show_progress=False,
    )
    learner.train_from_iterator((part for some in parts for part in some), trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    return model


def _assemble(learnt: Mapping[str, Any], special: Sequence[str]) -> Any:
    """The tokenizer: special tokens and bytes before what was learnt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    ordered = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    vocab = {token: number for number, token in enumerate((*special, *_byte_tokens(), *ordered))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    # Bytes are tokens of the model, not added ones: those would be found in a text that spells "<0x41>".
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.pre_tokenizer = _pieces()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _pieces() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(PIECES), behavior="isolated")


def _save(tokenizer: Any, special: Sequence[str], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    end = special[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(special[1:]),
    )
    save_tokenizer(fast, folder)


def _versions() -> dict[str, str]:
    import tokenizers
    import transformers

    return {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}
