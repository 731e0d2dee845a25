"""Plan one vocabulary from several: which rows of which models make each row of the output's embedding.

From the models' tokenizers and the config's rule follows a `TokenPlan`: the output's tokenizer, and for each model the
rows that align its matrices with it. No tensor is read; the merge method runs on the aligned matrices.

The rules are mergekit's (checked by running 0.1.5):

- `base` and a model reference: the output has that model's tokenizer. `union`: it has the base's (without one, the
  first model's), all ids kept, and after them the tokens that only others have. A token named under `tokens` that this
  leaves out is added too. Rows beyond the last token are cut off, then padded up to a multiple of `pad_to_multiple_of`.
- A model that has a token keeps its own row for it. One that lacks it takes what `tokens` says; else the base's row;
  else, where the base lacks it or there is none, the mean of the rows of all models that have it. With `force` every
  model takes what `tokens` says. A model has a token if its matrix has the row, too.
- A row that no token holds is the mean of the model's other rows.

Deviations, each where mergekit is wrong or left to chance:

- New tokens follow in the order of the models, then of their ids; in mergekit the order of a set changes with each run.
- Ordinary tokens become part of the tokenizer's model, not added tokens: see `merges.tokenizer.files`.
- A token of `tokens` that the tokenizer's own model lacks takes its row as the rule says; mergekit gives that model
  whatever row of its padding comes next.
- Rows that no token holds stay as they are where every model has such a row; mergekit overwrites them.
- A token whose id is beyond the matrices of all models gets a mean row and a warning; mergekit crashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merges.config.schema import ModelToken, TokenizerRule, TokenRule, ZeroToken
from merges.tokenizer.files import Entry, added_tokens, extend_tokenizer, read_tokenizer_files
from surgery.checkpoint.structure import model_structure
from surgery.checkpoint.vocabulary import MISSING, Vocabulary, check_rows, read_vocabulary
from surgery.errors import SurgeryError, listing, usage_error
from surgery.vectors.align import AlignedModel

UNION = "union"
BASE = "base"
EXAMPLES = 5  # tokens or models named in a message
WHERE = "tokenizer"

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenModel:
    """A model's tokenizer folder and the number of rows of its embedding."""

    ref: str
    tokenizer: Path | None
    rows: int


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """The output's tokenizer, and how each model's matrices are aligned with it.

    A row of a model's aligned matrix is its own row `own[ref]` where that is not −1; else the mean of the rows
    `shared[other]` of all others where those are not −1; zeros where there is none. The rows in `averaged` are then
    set to the mean of all rows not in it.

    Args:
        size: rows of the output's embedding.
        own: ref → (size,) int64.
        shared: ref → (size,) int64, the same for all models that use them; who contributes none is absent.
        averaged: (n,) int64, ascending.
        donor: the reference of the model whose tokenizer the output has, or extends.
        files: the output's tokenizer files, by their paths in its folder. It has no others.
    """

    size: int
    own: Mapping[str, Rows]
    shared: Mapping[str, Rows]
    averaged: Rows
    donor: str
    vocabulary: Vocabulary
    files: Mapping[str, bytes]
    facts: tuple[str, ...]
    warnings: tuple[str, ...]

    def contributions(self, ref: str) -> dict[str, Rows]:
        """Return model → (size,) int64: its row that contributes to each row of `ref`'s aligned matrix, −1 for none.

        The aligned row is the mean of the contributing rows. `ref` always comes first; others only if they contribute.
        """
        own = self.own[ref]
        rows = {ref: own}
        for other, shared in self.shared.items():
            # Only where the model has no row of its own.
            borrowed = np.where(own == MISSING, shared, MISSING)
            if other == ref:
                # In every place one of the two is −1, so the larger is the row.
                rows[ref] = np.maximum(own, borrowed)
            elif (borrowed != MISSING).any():
                rows[other] = borrowed
        return rows

    def unchanged(self, ref: str, rows: int) -> bool:
        """Return whether a matrix of `ref` with this many rows is aligned already."""
        # Its rows are then read where they lie, without a table of rows, and a mere copy stays one of bytes.
        same = rows == self.size and not len(self.averaged)
        return same and bool(np.array_equal(self.own[ref], np.arange(self.size)))


def token_model(side: AlignedModel) -> TokenModel:
    """Return a model as `plan_tokens` takes it; of several token matrices, the rows that all of them have.

    Raises:
        SurgeryError: no tensor has one row per token.
    """
    names = model_structure(side.checkpoint).token_rows
    if not names:
        raise SurgeryError("no token embedding was found in it", where=side.ref)
    rows = min(side.checkpoint.tensors[name].shape[0] for name in names)
    check_rows(rows, side.ref)
    return TokenModel(side.ref, side.tokenizer, rows)


def plan_tokens(
    models: Sequence[TokenModel], rule: TokenizerRule, *, base: str | None, donor: TokenModel | None = None
) -> TokenPlan:
    """Decide the output's vocabulary, and which rows align each model with it.

    Args:
        models: every model of the merge, the base among them; a reference that stands twice counts once.
        base: the base model's reference.
        donor: the model that `rule.source` names, where it is none of `models`: it gives its tokenizer, and no row.

    Raises:
        SurgeryError: a model has no tokenizer that can be read; `rule` speaks of models or tokens that are not there;
            the tokenizer cannot be extended.
    """
    known = {model.ref: model for model in models}
    _check_rule(rule, known, base)
    vocabularies = {ref: _vocabulary(model) for ref, model in known.items()}
    # The tokenizer that the output's begins with: its tokens keep their ids.
    start = donor or known[_donor(rule.source, list(known), base)]
    origin = vocabularies.get(start.ref) or _vocabulary(start)
    _check_ids(origin, max(model.rows for model in known.values()))
    named_rows = _named_rows(rule.tokens, known, vocabularies)

    extra = rule.tokens if rule.source != UNION else (*_by_id(vocabularies.values()), *rule.tokens)
    new = [token for token in dict.fromkeys(extra) if token not in origin.ids]
    ids = {**origin.ids, **{token: row for row, token in enumerate(new, start=origin.size)}}
    size = _rounded(max(ids.values()) + 1, rule.pad_to_multiple_of)
    # Ids may have gaps, and the size may have been rounded up: rows without a token.
    has_token = np.zeros(size, bool)
    has_token[list(ids.values())] = True

    own = {ref: _own_rows(ids, vocabularies[ref], model.rows, size) for ref, model in known.items()}
    # Every row of the output would be a mean: the tokenizer is of another model altogether.
    if all((rows == MISSING).all() for rows in own.values()):
        raise usage_error(f"no token of {start.ref} is in any of {listing(known, EXAMPLES)}", where=f"{WHERE}.source")
    spare = _spare_rows(known, vocabularies, has_token)
    for rows in own.values():  # padding that every model has stays as it is, instead of becoming a mean
        rows[spare] = spare
    shared = _shared_rows(own, base)
    ownerless = np.all([rows == MISSING for rows in own.values()], axis=0)
    for token, source in named_rows.items():
        row = ids[token]
        ownerless[row] = False
        for ref in known:
            shared[ref][row] = source[1] if source and source[0] == ref else MISSING
            # With `force` also those models take the named row that have a row of their own.
            own[ref][row] = MISSING if rule.tokens[token].force else own[ref][row]
    return TokenPlan(
        size=size,
        own=own,
        shared={ref: rows for ref, rows in shared.items() if (rows != MISSING).any()},
        averaged=np.flatnonzero(ownerless),
        donor=start.ref,
        vocabulary=Vocabulary(ids, origin.source),
        files=_files(start, new, ids, known, vocabularies),
        facts=_facts(start.ref, len(ids), len(new), size, known),
        warnings=_warnings(ids, ownerless),
    )


def _check_rule(rule: TokenizerRule, known: Mapping[str, TokenModel], base: str | None) -> None:
    """Raise SurgeryError where `rule` contradicts itself or names a model that is not merged."""
    errors = []
    if rule.source == BASE and base is None:
        errors.append("source: says base, and there is no base_model")
    if rule.pad_to_multiple_of is not None and rule.pad_to_multiple_of < 1:
        errors.append(f"pad_to_multiple_of: got {rule.pad_to_multiple_of}, expected a whole number from 1")
    for token, choice in rule.tokens.items():
        source = choice.source
        if source is None and choice.force:
            errors.append(
                f"tokens.{token}: force without a source says nothing. Add the source whose row all models take"
            )
        if isinstance(source, ModelToken) and (source.token is None) == (source.token_id is None):
            errors.append(f"tokens.{token}: expected exactly one of token and token_id")
        ref = source.model if isinstance(source, ModelToken) else source
        if isinstance(ref, str) and ref not in known:
            errors.append(f"tokens.{token}: {ref} is none of the merged models, {listing(known, EXAMPLES)}")
    _raise_if_any(errors)


def _named_rows(
    tokens: Mapping[str, TokenRule], known: Mapping[str, TokenModel], vocabularies: Mapping[str, Vocabulary]
) -> dict[str, tuple[str, int] | None]:
    """Return token → (model, row) as its rule names them; None for zeros. Tokens whose rule names no row are absent."""
    errors = []
    rows_of: dict[str, tuple[str, int] | None] = {}
    for token, choice in tokens.items():
        source = choice.source
        if isinstance(source, ZeroToken):
            rows_of[token] = None
        elif source is None:
            if not any(token in vocabulary.ids for vocabulary in vocabularies.values()):
                errors.append(
                    f"tokens.{token}: none of the models has this token. Say with source: where its row is from"
                )
        else:
            named = source if isinstance(source, ModelToken) else ModelToken(model=source, token=token)
            rows = known[named.model].rows
            row = vocabularies[named.model].ids.get(named.token) if named.token is not None else named.token_id
            if row is None:
                errors.append(f"tokens.{token}: {named.model} has no token {named.token!r}")
            elif not 0 <= row < rows:
                what = f"token {named.token!r} has id {row}" if named.token is not None else f"got token_id {row}"
                errors.append(f"tokens.{token}: {what}, but the embedding of {named.model} has {rows:,} rows")
            else:
                rows_of[token] = named.model, row
    _raise_if_any(errors)
    return rows_of


def _raise_if_any(errors: Sequence[str]) -> None:
    if errors:
        raise usage_error(errors, where=WHERE)


def _donor(source: str, refs: Sequence[str], base: str | None) -> str:
    if source in (UNION, BASE):
        return base or refs[0]
    if source not in refs:
        raise usage_error(f"{source} is none of the merged models, {listing(refs, EXAMPLES)}", where=f"{WHERE}.source")
    return source


def _vocabulary(model: TokenModel) -> Vocabulary:
    vocabulary = read_vocabulary(_folder(model))
    if vocabulary is None or not vocabulary.ids:
        raise _no_tokenizer(model)
    return vocabulary


def _check_ids(vocabulary: Vocabulary, rows: int) -> None:
    """Raise SurgeryError where the ids would need a matrix that is mostly padding, which only damaged files do."""
    if vocabulary.size > len(vocabulary.ids) + rows:
        token = max(vocabulary.ids, key=vocabulary.ids.__getitem__)
        raise SurgeryError(
            f"gives {token!r} id {vocabulary.size - 1}, and the largest embedding has {rows:,} rows",
            where=vocabulary.source,
            hint="Put the tokenizer there that belongs to the model.",
        )


def _folder(model: TokenModel) -> Path:
    if model.tokenizer is None:
        raise _no_tokenizer(model)
    return model.tokenizer


def _no_tokenizer(model: TokenModel) -> SurgeryError:
    return usage_error(
        "has no tokenizer files, so nothing says which token a row of its embedding belongs to",
        where=model.ref,
        hint="Put the tokenizer files it was trained with beside its weights, or leave out the tokenizer entry.",
    )


def _by_id(vocabularies: Iterable[Vocabulary]) -> list[str]:
    return [token for v in vocabularies for token in sorted(v.ids, key=v.ids.__getitem__)]


def _rounded(rows: int, multiple: int | None) -> int:
    return rows if multiple is None else -(-rows // multiple) * multiple


def _own_rows(ids: Mapping[str, int], vocabulary: Vocabulary, n_rows: int, size: int) -> Rows:
    sources = np.fromiter((vocabulary.ids.get(token, MISSING) for token in ids), np.int64, len(ids))
    sources[sources >= n_rows] = MISSING  # a token whose row the matrix does not have is no token of the model
    rows = np.full(size, MISSING, np.int64)
    rows[list(ids.values())] = sources
    return rows


def _spare_rows(
    known: Mapping[str, TokenModel], vocabularies: Mapping[str, Vocabulary], has_token: npt.NDArray[np.bool_]
) -> Rows:
    """Return the output's rows without a token at which every model has a row without a token, too."""
    spare = ~has_token
    for ref, model in known.items():
        spare[model.rows :] = False
        taken = np.fromiter(vocabularies[ref].ids.values(), np.int64)
        spare[taken[taken < len(spare)]] = False
    return np.flatnonzero(spare)


def _shared_rows(own: Mapping[str, Rows], base: str | None) -> dict[str, Rows]:
    """Return the rows that stand in for a token that a model lacks, where no rule names it."""
    if base is None:
        return {ref: rows.copy() for ref, rows in own.items()}
    # The base's row comes before a mean over the models.
    at_base = own[base] != MISSING
    return {ref: rows.copy() if ref == base else np.where(at_base, MISSING, rows) for ref, rows in own.items()}


def _files(
    start: TokenModel,
    new: Sequence[str],
    ids: Mapping[str, int],
    known: Mapping[str, TokenModel],
    vocabularies: Mapping[str, Vocabulary],
) -> dict[str, bytes]:
    """Return the output's tokenizer files: byte for byte those of `start`, unless there are new tokens."""
    files = read_tokenizer_files(_folder(start))
    if not new:
        return files
    flags: dict[str, Entry] = {}
    for model in known.values():
        # Of models that disagree about a token's flags the first counts.
        flags = {**added_tokens(_folder(model)), **flags}
    ordinary = {token for vocabulary in vocabularies.values() for token in vocabulary.ids} - flags.keys()
    added = {token: flags.get(token, {}) for token in new if token not in ordinary}
    return extend_tokenizer(files, ids, new, added, where=_folder(start))


def _facts(donor: str, n_tokens: int, n_new: int, size: int, known: Mapping[str, TokenModel]) -> tuple[str, ...]:
    whose = f"the tokenizer of {donor}" + (f" and {n_new:,} tokens that it lacks" if n_new else "")
    before = sorted({model.rows for model in known.values()})
    return (
        f"{whose}: {n_tokens:,} tokens",
        f"{size:,} rows in the embedding, before {' or '.join(f'{n:,}' for n in before)}",
    )


def _warnings(ids: Mapping[str, int], ownerless: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    tokens = [repr(token) for token, row in ids.items() if ownerless[row]]
    if not tokens:
        return ()
    return (
        f"no model's embedding has a row for {listing(tokens, EXAMPLES)}: the mean of all rows stands there. "
        "Say under tokenizer: tokens: what it shall be.",
    )
