"""Tokenise a corpus into one stream of token ids on disk, cut into windows, only as far as windows are required.

A folder holds `tokens.bin`, the ids as little-endian uint16 (uint32 for vocabularies of more than 65,536), and
`tokens.json`: what they were made of, and how many documents and tokens of the file are committed. Documents are
shuffled, and each is followed by the end-of-text id. After a kill the same command continues with the same bytes: what
is beyond the committed tokens is cut off, and committed documents are skipped, not tokenised again. One process at a
time writes, under the folder's lock, and begins with what others have committed by then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError, usage_error
from surgery.growth.data.corpus import (
    BUFFER_CHARACTERS,
    BUFFER_DOCUMENTS,
    FIELD,
    Document,
    commits_of,
    open_corpus,
    shuffle,
)
from surgery.growth.data.token_index import StreamState, check_size, no_index, read_index
from surgery.io.atomic import disk_error, write_file
from surgery.io.escaping import json_text
from surgery.io.hashing import hash_text
from surgery.io.locks import exclusive_lock
from surgery.io.private_files import FILE_MODE, make_private_folder
from surgery.models.special_tokens import backend_copy
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import n_processes
from surgery.runtime.progress import Progress, silent

TOKENS, INDEX, LOCK = "tokens.bin", "tokens.json", ".lock"
# Incremented when equal documents would give another stream.
VERSION = 1
# A batch for the tokenizer: large enough for all threads, small enough for memory, of which it takes thirty bytes or
# more per character.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 1_000_000
# Longer documents are cut after the next line end, so that threads share them too.
PIECE = 100_000
# Tokens that are written between two commits: each costs two fsyncs.
COMMIT = 2**21
# Tokens after which several processes synchronise: about a minute, before those that wait time out.
ROUND = 2**26


class TokenStore:
    """The token stream of a corpus, read through a memory map. Window i starts at token i·sequence.

    All processes construct it together, and call `require` together; the main one writes, all read.
    """

    def __init__(
        self,
        folder: Path,
        refs: Sequence[str],
        tokenizer: Any,
        *,
        sequence: int,
        seed: int,
        field: str = FIELD,
        eos: int,
        vocab_size: int,
        parse_special: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Open the stream in `folder`, or start a new one; nothing is tokenised yet.

        Args:
            refs: the corpus, see `surgery.growth.data.corpus`.
            tokenizer: a fast tokenizer of transformers; the special tokens that it adds to texts are left out.
            sequence: tokens of a window, without the last one, which is only predicted.
            eos: the id that follows each document.
            vocab_size: rows of the embedding.
            parse_special: whether the text of a special token in the corpus becomes that token.

        Raises:
            SurgeryError: the corpus cannot be opened; the tokenizer cannot be used, or is not this embedding's; the
                stream in `folder` was made of something else, or is damaged.
        """
        if not 0 <= eos < vocab_size:
            raise _mismatch(f"the end-of-text id is {eos:,}", vocab_size)
        self.sequence = sequence
        self._folder, self._refs, self._field, self._seed = folder, tuple(refs), field, seed
        self._eos, self._vocab_size, self._progress = eos, vocab_size, progress
        # Little-endian on every machine, as the file may be moved.
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._parse_special = parse_special
        self._tokenizer = backend_copy(tokenizer, parse_special=parse_special)
        self._tokenizer_hash = hash_text(backend_copy(tokenizer).to_str())
        self._stream: Iterator[Document] | None = None
        self._made_of: dict[str, Any]
        self._state: StreamState
        self._made_of, self._state = on_main(self._open)
        # State on the disk. The writing process may be ahead of `_state` if an error kept it from reporting.
        self._written = self._state
        self._map = self._mapped()

    @property
    def identity(self) -> str:
        """A hash of everything that the windows depend on."""
        return hash_text(json.dumps([self._made_of, self.sequence], sort_keys=True))

    @property
    def made_of(self) -> Mapping[str, Any]:
        """Everything that the stream's tokens depend on; its entry `corpus` is the corpus's fingerprint."""
        return self._made_of

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._state.tokens

    @property
    def documents(self) -> int:
        """Number of documents tokenised so far."""
        return self._state.documents

    @property
    def known(self) -> int:
        """Number of windows so far."""
        return max(0, (self._state.tokens - 1) // self.sequence)

    @property
    def count(self) -> int | None:
        """Number of windows in the whole corpus; None until its end has been read."""
        return self.known if self._state.whole else None

    def require(self, n_windows: int) -> None:
        """Tokenise until the first `n_windows` windows can be read, or the corpus ends.

        Raises:
            SurgeryError: as reading the corpus; a token is not in the embedding; the whole corpus has no window; the
                disk is full. What was committed before is kept.
        """
        needed = n_windows * self.sequence + 1
        most = needed if n_processes() == 1 else ROUND
        while self._state.tokens < needed and not self._state.whole:
            self._state = on_main(self._tokenise, min(needed, self._state.tokens + most))
            self._map = self._mapped()
        if self._state.whole and not self.known:
            raise usage_error(
                f"holds {self.tokens:,} tokens, fewer than one window of {self.sequence + 1:,}",
                where=", ".join(self._refs),
                hint="Give more text, or a shorter sequence.",
            )

    def window_at(self, position: int) -> int:
        """Return the index of the window that is drawn at `position`, counted from 0; there is no last one.

        In the first pass windows are drawn in the order of the stream, in every later one in a permutation that
        depends on the seed and the pass.
        """
        if position < self.known:
            return position
        if self.count is None:
            raise IndexError(f"window {position} is not there yet: require it first")
        epoch, at = divmod(position, self.count)
        return int(_permutation(self._seed, epoch, self.count)[at])

    def windows(self, indices: Sequence[int]) -> Tensor:
        """Return the windows with these indices: (n, sequence + 1) int64."""
        windows = np.empty((len(indices), self.sequence + 1), np.int64)
        for row, index in enumerate(indices):
            if not 0 <= index < self.known:
                raise IndexError(f"there is no window {index}: {self.known} are known")
            windows[row] = self._map[index * self.sequence : (index + 1) * self.sequence + 1]
        return torch.from_numpy(windows)

    def _open(self) -> tuple[dict[str, Any], StreamState]:
        """Return what the stream is made of, and its committed state, after checking both against the files."""
        index = self._folder / INDEX
        found = read_index(index)
        if found is None:
            made_of = self._settings(open_corpus(self._refs, field=self._field).fingerprint())
            return made_of, StreamState()
        before, state = found
        try:
            commits = commits_of(before["corpus"])
        except (AttributeError, KeyError, TypeError) as error:
            raise no_index(index) from error
        # A data set whose branch has moved on the Hub is read on at its old commit.
        made_of = self._settings(open_corpus(self._refs, field=self._field, commits=commits).fingerprint())
        self._check_same(made_of, before)
        check_size(self._folder / TOKENS, state, self._dtype.itemsize)
        return made_of, state

    def _check_same(self, made_of: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        changed = [name for name in dict.fromkeys([*made_of, *before]) if made_of.get(name) != before.get(name)]
        if changed:
            raise SurgeryError(
                f"these tokens were made with another {' and '.join(changed)}",
                where=self._folder,
                hint="Put back what was changed, or begin anew in another folder.",
            )

    def _settings(self, corpus: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "version": VERSION,
            "corpus": corpus,
            "tokenizer": self._tokenizer_hash,
            "seed": self._seed,
            "end-of-text id": self._eos,
            "dtype": self._dtype.name,
            "shuffle": [BUFFER_DOCUMENTS, BUFFER_CHARACTERS],
            # Only where they are text: streams that are older than the choice were made with it the other way.
            **({} if self._parse_special else {"reading of special tokens": "text"}),
        }

    def _tokenise(self, needed: int) -> StreamState:
        """Add tokens until there are `needed`, or no more documents; return the new state."""
        # Without this each process forked from here would warn that it turns the tokenizer's threads off.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        path = self._folder / TOKENS
        try:
            # Texts as numbers are still texts: whoever may read the data need not be whoever may read the run.
            make_private_folder(self._folder)
            with exclusive_lock(
                self._folder / LOCK,
                where=self._folder,
                busy="another run is writing tokens here",
                hint="Wait until it is done, and run the same command again: it goes on where it stopped.",
                remove=True,
            ):
                self._adopt_written()
                path.touch(FILE_MODE)
                return self._extend(path, self._written, needed)
        except BaseException as error:
            self._stream = None  # it is ahead of the committed state
            if isinstance(error, OSError):
                raise disk_error(error, path) from error
            raise

    def _adopt_written(self) -> None:
        """Go on from what another run has written into the folder since it was opened."""
        found = read_index(self._folder / INDEX)
        made_of, state = found or (self._made_of, StreamState())
        if state == self._written and found:
            return
        self._check_same(self._made_of, made_of)
        check_size(self._folder / TOKENS, state, self._dtype.itemsize)
        if state.tokens < self._written.tokens:
            raise SurgeryError("was begun anew by another run", where=self._folder, hint="Run the command again.")
        # The open documents follow the state that this store knew.
        self._written, self._stream = state, None

    def _extend(self, path: Path, state: StreamState, needed: int) -> StreamState:
        width = self._dtype.itemsize
        with (
            path.open("r+b") as file,
            self._progress("Tokenising", max(0, needed - state.tokens), "tokens") as advance,
        ):
            # Remove what a kill or an error left uncommitted.
            file.truncate(state.tokens * width)
            file.seek(0, os.SEEK_END)
            while state.tokens < needed and not state.whole:
                before = state.tokens
                state = self._add_batch(file, state)
                advance(state.tokens - before)
                if state.tokens - self._written.tokens >= COMMIT:
                    self._commit(file, state)
            self._commit(file, state)
        return state

    def _add_batch(self, file: Any, state: StreamState) -> StreamState:
        if self._stream is None:
            self._stream = self._documents_from(state)
        batch = _batch(self._stream)
        if not batch:
            return StreamState(state.documents, state.tokens, state.last, whole=True)
        tokens = state.tokens
        for pieces in _chunk(piece for document in batch for piece in _pieces(document.text)):
            tokens += self._write_tokens(file, pieces)
        return StreamState(state.documents + len(batch), tokens, hash_text(batch[-1].text))

    def _write_tokens(self, file: Any, pieces: Sequence[_Piece]) -> int:
        """Write the tokens of some pieces; return their number."""
        ids: list[int] = []
        encoded = self._tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        for piece, encoding in zip(pieces, encoded, strict=True):
            ids += encoding.ids
            if piece.is_last:
                ids.append(self._eos)
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            name = self._tokenizer.id_to_token(largest)
            raise _mismatch(f"the tokenizer gives id {largest:,} ({name!r})", self._vocab_size)
        file.write(np.array(ids, self._dtype).tobytes())
        return len(ids)

    def _documents_from(self, state: StreamState) -> Iterator[Document]:
        """Yield the shuffled documents after those that are committed."""
        commits = commits_of(self._made_of["corpus"])
        corpus = open_corpus(self._refs, field=self._field, commits=commits)
        stream = shuffle(corpus.documents(), seed=self._seed)
        if not state.documents:
            return stream
        last = ""
        with self._progress("Reading to where it stopped", state.documents, "steps") as advance:
            for document in islice(stream, state.documents):
                last = document.text
                advance(1)
        # The fingerprint of a large corpus has only sizes and times; this catches a change in what was read.
        if hash_text(last) != state.last:
            raise SurgeryError(
                f"document {state.documents:,} is another than before: the corpus was changed",
                where=self._folder,
                hint="Begin anew in another folder.",
            )
        return stream

    def _commit(self, file: Any, state: StreamState) -> None:
        if state == self._written:
            return
        file.flush()
        os.fsync(file.fileno())
        content = {"made_of": self._made_of, "state": asdict(state)}
        write_file(self._folder / INDEX, json_text(json.dumps(content, indent=2, ensure_ascii=False)) + "\n").chmod(
            FILE_MODE
        )
        self._written = state

    def _mapped(self) -> Any:
        if not self._state.tokens:
            return np.empty(0, self._dtype)
        # Opened anew after each extension, as a map does not grow with its file.
        return np.memmap(self._folder / TOKENS, self._dtype, "r", shape=(self._state.tokens,))


def _mismatch(what: str, vocab_size: int) -> SurgeryError:
    return usage_error(
        f"{what}, but the embedding has {vocab_size:,} rows",
        where="vocabulary",
        hint="Tokenizer and embedding do not belong together: make the embedding with this tokenizer.",
    )


def _batch(stream: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    characters = 0
    for document in islice(stream, BATCH_DOCUMENTS):
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            break
    return batch


@dataclass(frozen=True)
class _Piece:
    """A part of a document's text. is_last: the document ends with it."""

    text: str
    is_last: bool


def _pieces(text: str) -> Iterator[_Piece]:
    """Cut `text` after the first line end that follows every `PIECE` characters."""
    start = 0
    while (stop := text.find("\n", start + PIECE) + 1) and stop < len(text):
        yield _Piece(text[start:stop], is_last=False)
        start = stop
    yield _Piece(text[start:], is_last=True)


def _chunk(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Group `pieces` into lists of `BATCH_CHARACTERS` characters, or little more."""
    chunk: list[_Piece] = []
    characters = 0
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of the windows in one pass: a permutation of 0 to `count` − 1."""
    generator = torch.Generator().manual_seed(int(hash_text(f"{seed} {epoch}")[:15], 16))
    return torch.randperm(count, generator=generator)
