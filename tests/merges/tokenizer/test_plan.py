"""The reference is a dict of token → vector, and mergekit itself where MERGEKIT names it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.architectures import SPECIAL_TOKENS, VOCABULARY, add_tokenizer, build

from merges.config.schema import ModelToken, TokenizerRule, TokenRule, ZeroToken
from merges.tokenizer.plan import TokenModel, TokenPlan, plan_tokens, token_model
from surgery.checkpoint.checkpoint import read_file, read_folder
from surgery.errors import SurgeryError
from surgery.vectors.align import aligned_model

Matrix = npt.NDArray[np.float64]
WIDTH = 3


def write(folder: Path, ids: Mapping[str, int], added: Sequence[str] = ()) -> Path:
    """A word-level tokenizer of just these ids, whatever their order and gaps."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"id": ids[token], "content": token, "special": True} for token in added]
    tokenizer = {"added_tokens": entries, "model": {"type": "WordLevel", "vocab": dict(ids), "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def model(folder: Path, tokens: str | Mapping[str, int], rows: int | None = None, added: str = "") -> TokenModel:
    """A model called like its folder; `tokens` as "a b c" have the ids 0, 1, 2."""
    ids = {token: i for i, token in enumerate(tokens.split())} if isinstance(tokens, str) else tokens
    return TokenModel(folder.name, write(folder, ids, added.split()), max(ids.values()) + 1 if rows is None else rows)


def matrix(ref: str, rows: int) -> Matrix:
    """Row i is full of 1000 · (place of the name in the alphabet) + i."""
    return np.repeat((1000.0 * (ord(ref[0]) - ord("A") + 1) + np.arange(rows))[:, None], WIDTH, axis=1)


def aligned(plan: TokenPlan, ref: str, matrices: Mapping[str, Matrix]) -> Matrix:
    """What `TokenPlan` promises, in numpy."""
    total = np.zeros((plan.size, *matrices[ref].shape[1:]))
    count = np.zeros(plan.size)
    for other, rows in plan.contributions(ref).items():
        at = rows >= 0
        total[at] += matrices[other][rows[at]]
        count[at] += 1
    total /= np.maximum(count, 1).reshape(-1, *[1] * (total.ndim - 1))
    total[plan.averaged] = np.delete(total, plan.averaged, axis=0).mean(axis=0)
    return total


def columns(plan: TokenPlan, models: Sequence[TokenModel]) -> dict[str, list[float]]:
    """Token → what stands in its row in each model's aligned matrix, in the order of ids."""
    matrices = {m.ref: matrix(m.ref, m.rows) for m in models}
    parts = [aligned(plan, m.ref, matrices)[:, 0] for m in models]
    return {
        token: [part[row] for part in parts] for token, row in sorted(plan.vocabulary.ids.items(), key=lambda i: i[1])
    }


@pytest.fixture
def three(tmp_path: Path) -> list[TokenModel]:
    """A, B and C share a, b, c or a part of them under different ids, and each has tokens of its own."""
    return [
        model(tmp_path / "A", "<s> a b c d", added="<s>"),
        model(tmp_path / "B", "<s> b a x y c <bx>", added="<s> <bx>"),
        model(tmp_path / "C", "<s> z x c b <cx>", added="<s> <cx>"),
    ]


# What mergekit 0.1.5 computes for these three, but for the order of the new tokens.
UNION_OF_THREE = {
    "<s>": [1000, 2000, 3000],
    "a": [1001, 2002, 1001],
    "b": [1002, 2001, 3004],
    "c": [1003, 2005, 3003],
    "d": [1004, 1004, 1004],
    "x": [2502.5, 2003, 3002],
    "y": [2004, 2004, 2004],
    "<bx>": [2006, 2006, 2006],
    "z": [3001, 3001, 3001],
    "<cx>": [3005, 3005, 3005],
}


def test_union_keeps_the_bases_ids_and_appends_the_others_tokens_in_order(three: list[TokenModel]) -> None:
    plan = plan_tokens(three, TokenizerRule(source="union"), base="A")
    assert columns(plan, three) == UNION_OF_THREE
    assert plan.vocabulary.ids == {token: row for row, token in enumerate(UNION_OF_THREE)}
    assert (plan.size, plan.donor, plan.averaged.tolist(), plan.warnings) == (10, "A", [], ())
    assert plan.facts == (
        "the tokenizer of A and 5 tokens that it lacks: 10 tokens",
        "10 rows in the embedding, before 5 or 6 or 7",
    )


def test_without_a_base_the_first_model_gives_the_ids_and_lacking_tokens_get_the_mean(three: list[TokenModel]) -> None:
    plan = plan_tokens(three, TokenizerRule(source="union"), base=None)
    assert columns(plan, three) == {**UNION_OF_THREE, "a": [1001, 2002, 1501.5]}
    assert plan.donor == "A"


def test_base_keeps_only_the_bases_tokens_and_its_files_byte_for_byte(three: list[TokenModel]) -> None:
    plan = plan_tokens(three, TokenizerRule(source="base"), base="A")
    assert columns(plan, three) == {token: UNION_OF_THREE[token] for token in ["<s>", "a", "b", "c", "d"]}
    assert three[0].tokenizer is not None
    assert plan.files == {"tokenizer.json": (three[0].tokenizer / "tokenizer.json").read_bytes()}


def test_a_models_own_tokenizer_can_be_the_outputs(three: list[TokenModel]) -> None:
    plan = plan_tokens(three, TokenizerRule(source="B"), base="A")
    tokens = ["<s>", "b", "a", "x", "y", "c", "<bx>"]
    assert columns(plan, three) == {token: UNION_OF_THREE[token] for token in tokens}
    assert plan.unchanged("B", 7)
    assert not plan.unchanged("B", 8)
    assert not plan.unchanged("A", 7)
    assert plan.donor == "B"


def test_a_tokenizer_from_outside_the_merge_gives_ids_and_no_rows(tmp_path: Path, three: list[TokenModel]) -> None:
    outside = model(tmp_path / "X", "c new a")
    plan = plan_tokens(three, TokenizerRule(source="X"), base="A", donor=outside)
    got = columns(plan, three)
    assert list(got) == ["c", "new", "a"]
    assert got["c"] == [1003, 2005, 3003]
    assert got["new"] == [(1003 + 1001) / 2, (2005 + 2002) / 2, (3003 + 1001) / 2]
    assert plan.warnings == (
        "no model's embedding has a row for 'new': the mean of all rows stands there. "
        "Say under tokenizer: tokens: what it shall be.",
    )
    stranger = model(tmp_path / "Y", "p q")
    with pytest.raises(SurgeryError, match=r"tokenizer\.source: no token of Y is in any of A, B, C"):
        plan_tokens(three, TokenizerRule(source="Y"), base="A", donor=stranger)


@pytest.mark.parametrize(
    ("token", "rule", "expected"),
    [
        ("x", TokenRule(source="C"), [3002, 2003, 3002]),
        ("x", TokenRule(source="C", force=True), [3002, 3002, 3002]),
        ("a", TokenRule(source="B"), [1001, 2002, 2002]),
        ("a", TokenRule(source="B", force=True), [2002, 2002, 2002]),
        ("a", TokenRule(), [1001, 2002, 1001]),
        ("d", TokenRule(source=ZeroToken()), [1004, 0, 0]),
        ("d", TokenRule(source=ZeroToken(), force=True), [0, 0, 0]),
        ("d", TokenRule(source=ModelToken(model="B", token="a")), [1004, 2002, 2002]),
        ("d", TokenRule(source=ModelToken(model="B", token_id=6), force=True), [2006, 2006, 2006]),
        ("new", TokenRule(source=ModelToken(model="B", token="a")), [2002, 2002, 2002]),
        ("new", TokenRule(source=ZeroToken()), [0, 0, 0]),
    ],
)
def test_rules_for_single_tokens(
    three: list[TokenModel], token: str, rule: TokenRule, expected: Sequence[float]
) -> None:
    plan = plan_tokens(three, TokenizerRule(source="union", tokens={token: rule}), base="A")
    assert columns(plan, three) == {**UNION_OF_THREE, token: expected}
    assert len(plan.averaged) == 0


def test_a_rule_adds_its_token_to_the_bases_tokenizer(three: list[TokenModel]) -> None:
    rule = TokenizerRule(source="base", tokens={"x": TokenRule(source="B"), "<bx>": TokenRule()})
    plan = plan_tokens(three, rule, base="A")
    got = columns(plan, three)
    assert list(got) == ["<s>", "a", "b", "c", "d", "x", "<bx>"]
    assert got["x"] == [2003, 2003, 3002]
    written = json.loads(plan.files["tokenizer.json"])
    assert [entry["content"] for entry in written["added_tokens"]] == ["<s>", "<bx>"]


def test_rows_are_rounded_up_and_the_new_ones_are_the_mean_of_the_others(three: list[TokenModel]) -> None:
    plan = plan_tokens(three, TokenizerRule(source="union", pad_to_multiple_of=8), base="A")
    assert plan.size == 16
    assert plan.averaged.tolist() == [10, 11, 12, 13, 14, 15]
    matrices = {m.ref: matrix(m.ref, m.rows) for m in three}
    mean = np.mean([row[0] for row in UNION_OF_THREE.values()])
    np.testing.assert_allclose(aligned(plan, "A", matrices)[10:], mean)
    assert plan_tokens(three, TokenizerRule(source="union", pad_to_multiple_of=5), base="A").size == 10


def test_rows_that_no_model_uses_stay_as_they_are_where_all_have_them(tmp_path: Path) -> None:
    models = [model(tmp_path / "A", "a b c", rows=8), model(tmp_path / "B", "a b c", rows=6)]
    whole = plan_tokens(models, TokenizerRule(source="union", pad_to_multiple_of=6), base="A")
    assert (whole.size, whole.averaged.tolist()) == (6, [])
    assert whole.unchanged("B", 6)
    assert not whole.unchanged("A", 8)
    assert plan_tokens(models, TokenizerRule(source="union", pad_to_multiple_of=8), base="A").averaged.tolist() == [
        6,
        7,
    ]
    assert plan_tokens(models, TokenizerRule(source="union"), base="A").size == 3


def test_a_row_is_spare_only_if_no_model_holds_a_token_there(tmp_path: Path) -> None:
    models = [model(tmp_path / "A", {"a": 0, "b": 2}, rows=4), model(tmp_path / "B", {"a": 0, "b": 1}, rows=4)]
    plan = plan_tokens(models, TokenizerRule(source="base", pad_to_multiple_of=4), base="A")
    assert plan.averaged.tolist() == [1]
    assert plan.contributions("B") == {"B": pytest.approx(np.array([0, -1, 1, 3]))}


def test_a_token_beyond_a_matrix_counts_as_lacking(tmp_path: Path) -> None:
    models = [model(tmp_path / "A", "a b pad", rows=2), model(tmp_path / "B", "a b pad", rows=3)]
    assert columns(plan_tokens(models, TokenizerRule(source="base"), base="A"), models)["pad"] == [2002, 2002]
    short = [models[0], model(tmp_path / "B", "a b pad", rows=2)]
    plan = plan_tokens(short, TokenizerRule(source="base"), base="A")
    assert columns(plan, short)["pad"] == [1000.5, 2000.5]
    assert plan.warnings[0].startswith("no model's embedding has a row for 'pad'")
    told = TokenizerRule(source="base", tokens={"pad": TokenRule(source=ZeroToken())})
    plan = plan_tokens(short, told, base="A")
    assert columns(plan, short)["pad"] == [0, 0]
    assert plan.warnings == ()


def test_the_same_tokenizers_leave_every_matrix_as_it_lies(tmp_path: Path) -> None:
    models = [model(tmp_path / ref, "a b c") for ref in "AB"]
    for source in ("union", "base", "B"):
        plan = plan_tokens([*models, models[1]], TokenizerRule(source=source), base="A")
        assert all(plan.unchanged(m.ref, m.rows) for m in models)
        assert [list(plan.contributions(m.ref)) for m in models] == [["A"], ["B"]]


def test_the_rows_of_a_vector_are_aligned_too(three: list[TokenModel]) -> None:
    plan = plan_tokens(three, TokenizerRule(source="union", pad_to_multiple_of=16), base="A")
    bias = {m.ref: matrix(m.ref, m.rows)[:, 0] for m in three}
    whole = {m.ref: matrix(m.ref, m.rows) for m in three}
    np.testing.assert_array_equal(aligned(plan, "C", bias), aligned(plan, "C", whole)[:, 0])


def refusal(models: Sequence[TokenModel], rule: TokenizerRule, base: str | None = "A") -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        plan_tokens(models, rule, base=base)
    return caught.value


def test_all_faults_of_the_rules_are_named_at_once(three: list[TokenModel]) -> None:
    rule = TokenizerRule(
        source="base",
        pad_to_multiple_of=0,
        tokens={
            "a": TokenRule(force=True),
            "b": TokenRule(source=ModelToken(model="B", token="a", token_id=1)),
            "c": TokenRule(source=ModelToken(model="B")),
            "d": TokenRule(source="Z"),
        },
    )
    error = refusal(three, rule, base=None)
    assert error.exit_code == 2
    assert str(error).splitlines() == [
        "tokenizer: source: says base, and there is no base_model",
        "pad_to_multiple_of: got 0, expected a whole number from 1",
        "tokens.a: force without a source says nothing. Add the source whose row all models take",
        "tokens.b: expected exactly one of token and token_id",
        "tokens.c: expected exactly one of token and token_id",
        "tokens.d: Z is none of the merged models, A, B, C",
    ]


def test_tokens_that_are_not_there_are_named(tmp_path: Path, three: list[TokenModel]) -> None:
    short = model(tmp_path / "D", "a b pad", rows=2)
    rule = TokenizerRule(
        source="union",
        tokens={
            "nobodys": TokenRule(),
            "x": TokenRule(source="A"),
            "d": TokenRule(source=ModelToken(model="B", token="q")),
            "y": TokenRule(source=ModelToken(model="B", token_id=99)),
            "pad": TokenRule(source="D"),
        },
    )
    assert str(refusal([*three, short], rule)).splitlines() == [
        "tokenizer: tokens.nobodys: none of the models has this token. Say with source: where its row is from",
        "tokens.x: A has no token 'x'",
        "tokens.d: B has no token 'q'",
        "tokens.y: got token_id 99, but the embedding of B has 7 rows",
        "tokens.pad: token 'pad' has id 2, but the embedding of D has 2 rows",
    ]


def test_a_source_outside_the_merge_and_a_model_without_tokenizer_are_refused(
    tmp_path: Path, three: list[TokenModel]
) -> None:
    assert str(refusal(three, TokenizerRule(source="Z"))) == (
        "tokenizer.source: Z is none of the merged models, A, B, C"
    )
    (tmp_path / "E").mkdir()
    for bare in (TokenModel("E", tmp_path / "E", 5), TokenModel("E", None, 5)):
        assert str(refusal([*three, bare], TokenizerRule(source="base"))) == (
            "E: has no tokenizer files, so nothing says which token a row of its embedding belongs to. "
            "Put the tokenizer files it was trained with beside its weights, or leave out the tokenizer entry."
        )


def test_ids_far_beyond_every_embedding_are_refused(tmp_path: Path) -> None:
    wild = model(tmp_path / "A", {"a": 0, "b": 2**31 - 1}, rows=10)
    error = refusal([wild], TokenizerRule(source="base"))
    assert "gives 'b' id 2147483647, and the largest embedding has 10 rows" in str(error)


def test_a_model_is_measured_by_the_rows_that_all_its_matrices_have(tmp_path: Path) -> None:
    folder = add_tokenizer(build("llama", tmp_path / "llama", tied=False))
    checkpoint = read_folder(folder)
    assert token_model(aligned_model(checkpoint)) == TokenModel(str(folder), folder, 96)
    (tmp_path / "bare").mkdir()
    torch_file = tmp_path / "bare" / "model.safetensors"
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}, torch_file)
    with pytest.raises(SurgeryError, match="no token embedding was found in it"):
        token_model(aligned_model(read_file(torch_file)))


# --- against the reference ---------------------------------------------------------------------------------------

TOKENS = "abcdefg"
rule_sources = st.one_of(
    st.builds(ZeroToken),
    st.sampled_from("ABC"),
    st.builds(ModelToken, model=st.sampled_from("ABC"), token=st.sampled_from(TOKENS)),
    st.builds(ModelToken, model=st.sampled_from("ABC"), token_id=st.integers(0, 9)),
)


@st.composite
def vocabularies(draw: st.DrawFn) -> list[tuple[dict[str, int], int]]:
    """Three times token → id, with gaps, and the rows of the matrix, which may be too many or too few."""
    found = []
    for _ in range(3):
        tokens = draw(st.lists(st.sampled_from(TOKENS), min_size=1, unique=True))
        places = draw(st.permutations(range(len(tokens) + 2)))
        ids = dict(zip(tokens, places, strict=False))
        least = max(min(ids.values()) + 1, max(ids.values()) - 1)
        found.append((ids, draw(st.integers(least, max(ids.values()) + 4))))
    return found


def reference(
    plan: TokenPlan, models: Mapping[str, tuple[dict[str, int], int]], rule: TokenizerRule, base: str | None
) -> dict[str, dict[str, Any]]:
    """Model → token → its value by the rules; None for a token that no model has."""
    rows = {
        ref: {token: float(matrix(ref, n)[row, 0]) for token, row in ids.items() if row < n}
        for ref, (ids, n) in models.items()
    }

    def value(ref: str, token: str) -> float | None:
        choice = rule.tokens.get(token, TokenRule())
        if token in rows[ref] and not choice.force:
            return rows[ref][token]
        if isinstance(choice.source, ZeroToken):
            return 0.0
        if isinstance(choice.source, str):
            return rows[choice.source][token]
        if isinstance(choice.source, ModelToken):
            other, name, row = choice.source.model, choice.source.token, choice.source.token_id
            return rows[other][name] if name is not None else float(matrix(other, models[other][1])[row, 0])
        if base is not None and token in rows[base]:
            return rows[base][token]
        having = [held[token] for held in rows.values() if token in held]
        return sum(having) / len(having) if having else None

    return {ref: {token: value(ref, token) for token in plan.vocabulary.ids} for ref in models}


def names_nothing(rule: TokenizerRule, models: Mapping[str, tuple[dict[str, int], int]], base: str | None) -> bool:
    """Whether the rule speaks of a base, a token or a row that is not there."""

    def lacks(token: str, choice: TokenRule) -> bool:
        named = ModelToken(model=choice.source, token=token) if isinstance(choice.source, str) else choice.source
        if not isinstance(named, ModelToken):
            return False
        ids, rows = models[named.model]
        row = named.token_id if named.token is None else ids.get(named.token)
        return row is None or row >= rows

    return (rule.source == "base" and base is None) or any(lacks(t, choice) for t, choice in rule.tokens.items())


@settings(deadline=None, max_examples=150)
@given(
    found=vocabularies(),
    source=st.sampled_from(["union", "base", "A", "B", "C"]),
    base=st.sampled_from(["A", "B", None]),
    tokens=st.dictionaries(
        st.sampled_from([*TOKENS, "new"]), st.builds(TokenRule, source=rule_sources, force=st.booleans()), max_size=3
    ),
    multiple=st.sampled_from([None, 1, 4, 7]),
)
def test_any_vocabularies_align_as_the_reference_says(
    tmp_path_factory: pytest.TempPathFactory,
    found: list[tuple[dict[str, int], int]],
    source: str,
    base: str | None,
    tokens: dict[str, TokenRule],
    multiple: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    models = [model(folder / ref, ids, rows) for ref, (ids, rows) in zip("ABC", found, strict=True)]
    known = dict(zip("ABC", found, strict=True))
    rule = TokenizerRule(source=source, tokens=tokens, pad_to_multiple_of=multiple)
    if names_nothing(rule, known, base):
        assert refusal(models, rule, base).exit_code == 2
        return
    plan = plan_tokens(models, rule, base=base)
    ids = plan.vocabulary.ids
    assert plan.size == -(-(max(ids.values()) + 1) // (multiple or 1)) * (multiple or 1)
    assert sorted(json.loads(plan.files["tokenizer.json"])["model"]["vocab"].items()) == sorted(ids.items())
    donor = known[plan.donor][0]
    assert {token: ids[token] for token in donor} == donor
    wanted = {*donor, *tokens} if source != "union" else {*tokens, *(token for held, _ in found for token in held)}
    assert set(ids) == wanted

    expected = reference(plan, known, rule, base)
    matrices = {m.ref: matrix(m.ref, m.rows) for m in models}
    held = set(ids.values())
    for ref, values in expected.items():
        got = aligned(plan, ref, matrices)[:, 0]
        for token, value in values.items():
            assert (value is None) == (ids[token] in plan.averaged)
            if value is not None:
                assert got[ids[token]] == pytest.approx(value)
        for row in set(range(plan.size)) - held - set(plan.averaged.tolist()):
            assert got[row] == matrices[ref][row, 0]  # a spare row of its own
    again = plan_tokens(models, rule, base=base)
    assert (again.files, dict(again.vocabulary.ids)) == (plan.files, dict(ids))


# --- against mergekit --------------------------------------------------------------------------------------------

MERGEKIT = os.environ.get("MERGEKIT", "")
SHARES = {"A": 0.25, "B": 0.25, "C": 0.5}


@pytest.mark.skipif(not MERGEKIT, reason="MERGEKIT names no mergekit-yaml")
@pytest.mark.parametrize(
    "rule",
    [
        TokenizerRule(source="union"),
        TokenizerRule(source="base"),
        TokenizerRule(source="C"),
        TokenizerRule(source="union", pad_to_multiple_of=64),
        TokenizerRule(source="union", tokens={"x": TokenRule(source="C"), "d": TokenRule(source=ZeroToken())}),
        TokenizerRule(source="union", tokens={"d": TokenRule(source=ModelToken(model="B", token="a"), force=True)}),
    ],
    ids=["union", "base", "model", "padded", "tokens", "force"],
)
def test_mergekit_computes_the_same_rows(tmp_path: Path, rule: TokenizerRule) -> None:
    tokens = {"A": "a b c d", "B": "b a x y c", "C": "z x c b"}
    filler = [f"w{i}" for i in range(VOCABULARY)]
    models = []
    for seed, (ref, words) in enumerate(tokens.items()):
        every = [*words.split(), *filler][: VOCABULARY - len(SPECIAL_TOKENS)]  # so that no row is spare
        folder = add_tokenizer(build("llama", tmp_path / ref, seed=seed, dtype=torch.float32), every)
        models.append(TokenModel(ref, folder, VOCABULARY))
    plan = plan_tokens(models, rule, base="A")
    weights = {m.ref: load_file(tmp_path / m.ref / "model.safetensors")["model.embed_tokens.weight"] for m in models}
    matrices = {ref: weight.double().numpy() for ref, weight in weights.items()}
    parts = {ref: aligned(plan, ref, matrices) for ref in tokens}
    ours = sum(share * parts[ref] for ref, share in SHARES.items())

    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "A"),
        "models": [
            {"model": str(tmp_path / ref), "parameters": {"weight": 0.0 if ref == "A" else SHARES[ref]}}
            for ref in tokens
        ],
        "dtype": "float32",
        "tokenizer": _as_mergekit_writes(rule, tmp_path),
    }
    (tmp_path / "config.yml").write_text(json.dumps(config), encoding="utf-8")
    command = [MERGEKIT, str(tmp_path / "config.yml"), str(tmp_path / "out"), "--no-write-model-card"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].double().numpy()
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**written["model"]["vocab"], **{entry["content"]: entry["id"] for entry in written["added_tokens"]}}
    assert set(ids) == set(plan.vocabulary.ids)
    assert theirs.shape[0] == plan.size
    for token, row in plan.vocabulary.ids.items():
        np.testing.assert_allclose(theirs[ids[token]], ours[row], atol=1e-6, err_msg=token)
    for row in plan.averaged:
        np.testing.assert_allclose(theirs[row], ours[row], atol=1e-6)


def _as_mergekit_writes(rule: TokenizerRule, folder: Path) -> dict[str, Any]:
    def source(choice: TokenRule) -> Any:
        if isinstance(choice.source, ZeroToken):
            return {"kind": "zero"}
        if isinstance(choice.source, ModelToken):
            return {"kind": "model_token", "model": str(folder / choice.source.model), "token": choice.source.token}
        return str(folder / str(choice.source))

    return {
        "source": rule.source if rule.source in ("union", "base") else str(folder / rule.source),
        "tokens": {token: {"source": source(choice), "force": choice.force} for token, choice in rule.tokens.items()},
        **({} if rule.pad_to_multiple_of is None else {"pad_to_multiple_of": rule.pad_to_multiple_of}),
    }
