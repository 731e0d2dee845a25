"""Train a character-level BPE tokenizer: merges over a corpus's common characters, and bytes for all others.

The result is the folder TOK of a fast tokenizer as transformers loads it. Text is neither normalised nor trimmed, and a
character outside the alphabet is encoded as UTF-8 bytes (`<0xE2>`), so that any Unicode text is decoded unchanged. The
same texts give the same bytes.
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
from surgery.io.atomic import disk_error, file_sizes
from surgery.io.hashing import KEY, hash_bytes
from surgery.io.output_folder import atomic_folder, check_free
from surgery.models.loading import save_tokenizer
from surgery.reporting.report import Column, Table
from surgery.runtime.progress import Progress, silent

KIND = "tokenizer"
END = "<|endoftext|>"
N_BYTES = 256
# Fraction of the text that the alphabet covers, as SentencePiece's default; the rest is encoded as bytes.
COVERAGE = 0.9995
# A pair that occurs once says nothing about the language.
MIN_FREQUENCY = 2
# In the bitmap of a longer token (see `surgery.growth.embedding.glyphs`) a character has less than a column of pixels.
MAX_TOKEN_LENGTH = 32
# Words with the space before them, numbers in threes, punctuation, line ends, other white space. Every character is in
# one of these: the text is only split, nothing is dropped.
PIECES = r" ?\p{L}[\p{L}\p{M}]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerReport:
    """The result of `train_tokenizer`.

    size: tokens in total, fewer than `asked` if no more pairs occur twice. alphabet: characters that are tokens.
    covered: their fraction of the texts. hash: of tokenizer.json.
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

    def summary(self) -> dict[str, Any]:
        """Return the manifest's report."""
        fields = {name: value for name, value in asdict(self).items() if name != "out"}
        return fields | {f"{TOKENIZER} {KEY}": self.hash}

    def table(self) -> Table:
        """Return a table of the report."""
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
    """Learn byte-pair merges of characters (arXiv 1508.07909) on `corpus`, and write the tokenizer to the folder `out`.

    The alphabet is the most frequent characters that make up 99.95 % of the corpus. Ids are given to special tokens,
    the 256 bytes, the alphabet by codepoint, and merged tokens in the order of their merges.

    Example:
        surgery.train_tokenizer(["lab:python/code"], Path("TOK"), vocab=4096)

    Args:
        corpus: texts, read once; a copy is in a temporary file during training.
        vocab: the number of tokens.
        special: special tokens; the first is the begin-, end- and padding token.
        refs, field: what the texts were read from, and the column of records, for the manifest.

    Raises:
        SurgeryError: the corpus is empty, or has half a surrogate pair; `vocab` has no room for the alphabet; a special
            token is invalid; `out` exists; the disk is full.
    """
    _check_special(special)
    check_free(out, overwrite=overwrite)
    learnt, statistics = _learn(corpus, special, vocab, progress)
    # Such a token would have two ids, and text that contains it would be ambiguous.
    clash = sorted(set(special) & set(learnt["vocab"]))
    if clash:
        raise usage_error(f"{listing(map(repr, clash))} is also learnt as ordinary text", where="--special")
    tokenizer = _assemble(learnt, special)
    with atomic_folder(out, overwrite=overwrite) as partial:
        _save(tokenizer, special, partial)
        report = TokenizerReport(
            out,
            tokenizer.get_vocab_size(),
            vocab,
            len(statistics.alphabet),
            len(learnt["merges"]),
            statistics.documents,
            statistics.counts.total(),
            statistics.covered,
            hash_bytes((partial / TOKENIZER).read_bytes()).hex(),
        )
        _write_manifest(partial, report, refs=refs, special=special, field=field)
    return report


def _write_manifest(
    folder: Path, report: TokenizerReport, *, refs: Sequence[str], special: Sequence[str], field: str
) -> None:
    named = None if tuple(special) == (END,) else list(special)
    command = command_record(
        "grow tokenizer", refs, vocab=report.asked, special=named, field=None if field == FIELD else field
    )
    manifest = build_manifest_of_files(
        KIND, command, inputs={}, files=file_sizes(folder), tensors={}, versions=_versions(), report=report.summary()
    )
    write_manifest(folder, manifest)


def _check_special(special: Sequence[str]) -> None:
    if not special:
        raise usage_error("got none, expected one or more", where="--special", hint=f"Such as {END}.")
    # Single characters would be cut out of ordinary text.
    wrong = [token for token in special if len(token) < 2 or token in _byte_tokens()]
    if wrong or len(set(special)) < len(special):
        raise usage_error(
            f"got {listing(map(repr, special))}, expected different ones, of two characters or more, and no bytes",
            where="--special",
        )


@dataclass(frozen=True)
class _CorpusStatistics:
    """What was counted in the corpus. counts: occurrences of every character. alphabet: sorted by codepoint."""

    documents: int
    counts: Counter[str]
    alphabet: Sequence[str]

    @property
    def covered(self) -> float:
        """The fraction of the corpus's characters that are in the alphabet."""
        return sum(self.counts[character] for character in self.alphabet) / self.counts.total()


def _learn(
    corpus: Iterable[str], special: Sequence[str], vocab: int, progress: Progress
) -> tuple[dict[str, Any], _CorpusStatistics]:
    """Read the corpus once, and learn the alphabet and the merges of a tokenizer with `vocab` tokens."""
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
        learnt = _learn_merges(_known_parts(spool, alphabet, documents, progress), alphabet, vocab - fixed)
    return learnt, _CorpusStatistics(documents, counts, alphabet)


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(N_BYTES)]


def _count(corpus: Iterable[str], spool: IO[str], progress: Progress) -> tuple[Counter[str], int]:
    """Copy the texts to `spool`, one JSON string per line; return the counts of characters and of texts."""
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
    """Open a temporary file. Raises SurgeryError where that is not possible."""
    with _spooling():
        file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115
    try:
        yield file
    finally:
        with suppress(OSError):  # closing flushes again what a full disk refused, which was reported already
            file.close()


@contextmanager
def _spooling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, Path(tempfile.gettempdir())) from error


def _alphabet(counts: Counter[str]) -> list[str]:
    """Return the smallest set of most frequent characters that makes up `COVERAGE` of the text, by codepoint."""
    enough = COVERAGE * counts.total()
    chosen, covered = [], 0
    # Ties by codepoint: the same texts must give the same alphabet.
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= enough:
            break
        chosen.append(character)
        covered += count
    return sorted(chosen)


def _known_parts(spool: IO[str], alphabet: Sequence[str], documents: int, progress: Progress) -> Iterator[list[str]]:
    """Yield the spooled texts, split at characters outside the alphabet: nothing is merged across them."""
    unknown = re.compile(f"[^{''.join(map(re.escape, alphabet))}]+")
    spool.seek(0)
    with progress("Learning", documents, "steps") as advance:
        for line in spool:
            yield [part for part in unknown.split(json.loads(line)) if part]
            advance(1)


def _learn_merges(parts: Iterable[list[str]], alphabet: Sequence[str], size: int) -> dict[str, Any]:
    """Return {"vocab": token → id, "merges": pairs} of the alphabet and merges, at most `size` tokens together."""
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pieces()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
        max_token_length=MAX_TOKEN_LENGTH,
        show_progress=False,
    )
    learner.train_from_iterator((part for some in parts for part in some), trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    return model


def _assemble(learnt: Mapping[str, Any], special: Sequence[str]) -> Any:
    """Return the tokenizer with special tokens and bytes before the learnt tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    # By their ids: the alphabet, then merges in their order.
    ordered = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    vocab = {token: number for number, token in enumerate((*special, *_byte_tokens(), *ordered))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    # Bytes are tokens of the model, not added tokens, which would match a text that contains "<0x41>" literally.
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
        # Decoding must give back the text exactly; clean-up would remove spaces before punctuation.
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(special[1:]),
    )
    save_tokenizer(fast, folder)


def _versions() -> dict[str, str]:
    import tokenizers
    import transformers

    return {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}
