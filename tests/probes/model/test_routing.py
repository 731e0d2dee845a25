"""Promises of probes.model.routing: counts are those of a brute-force count, whatever batches, order and processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.chat_tokenizer import make_tokenizer
from support.moe import MARKER, PLANTED, Lives, plant, planter, texts, watch_experts
from support.moe_families import EXPERTS, FAMILIES, TOP_K, WITH_ZERO_EXPERTS
from support.processes import fork_ranks
from torch import Tensor

from probes.data.examples import TokenSequence
from probes.experts.scoring import score_experts
from probes.model.routers import find_routers, intercept_routing
from probes.model.routing import MAX_BLOCKS, PARTS, Marker, RoutingCounts, block_count, count_routing, parse_marker
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.loaded_model import LoadedModel

ROOT = Path(__file__).parents[3]
PHRASE, AGAIN = (11, 12), (12, 11, 13)
MARKERS = (Marker("think", 1.0, ((MARKER,),)), Marker("phrase", -0.5, (PHRASE, AGAIN)))
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return planter(tmp_path_factory.mktemp("routing"))


def mixed(number: int) -> list[TokenSequence]:
    """Sequences of very different lengths with both markers, some of them twice, one of them at the very end."""
    found = []
    for at, length in enumerate((5, 23, 11, 30, 8, 17, 14)[:number]):
        found += texts(1, length=length, seed=at, markers=((MARKER,), PHRASE, AGAIN) if at % 2 else ((MARKER,),))
    last = found[-1]
    return [*found[:-1], TokenSequence(last.key, (*last.ids, *PHRASE), (*last.ends[:3], len(last.ids) + 2))]


def brute(live: LoadedModel, sequences: Sequence[TokenSequence], blocks: int) -> tuple[dict, dict]:
    """Every routing decision kept, then counted one by one: (block, layer, expert, part, column) → positions."""
    hits: dict[tuple[int, ...], int] = {}
    positions: dict[tuple[int, ...], int] = {}
    for number, sequence in enumerate(sequences):
        seen = watch_experts(live, torch.tensor([sequence.ids]))
        for at in range(len(sequence.ids)):
            part = next(
                part
                for part, segments in enumerate((("prompt",), ("thinking", "closing"), ("answer",)))
                if any(at in sequence.span(segment) for segment in segments)
            )
            columns = [0]
            for column, marker in enumerate(MARKERS, start=1):
                ending = [sequence.ids[: at + 1][-len(spelling) :] == spelling for spelling in marker.spellings]
                columns += [column] if any(ending) else []
            for column in columns:
                here = (number % blocks, part, column)
                positions[here] = positions.get(here, 0) + 1
                for layer, (_, index, _) in enumerate(seen.values()):
                    for expert in set(index[at].tolist()):
                        key = (number % blocks, layer, expert, part, column)
                        hits[key] = hits.get(key, 0) + 1
    return hits, positions


def entries(tensor: Tensor) -> dict[tuple[int, ...], int]:
    return {tuple(at): int(tensor[tuple(at)]) for at in tensor.nonzero().tolist()}


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_a_brute_force_count(name: str, lives: Lives) -> None:
    live, sequences = lives(name), mixed(7)
    found = count_routing(live, find_routers(live), sequences, MARKERS, blocks=3, max_tokens=70)
    hits, positions = brute(live, sequences, 3)
    # What computes nothing is no expert.
    assert entries(found.hits) == {key: value for key, value in hits.items() if key[2] < EXPERTS}
    assert (len(hits) > len(entries(found.hits))) == (name in WITH_ZERO_EXPERTS)
    assert entries(found.positions) == positions
    assert found.hits.dtype == torch.int64 and found.sequences == 7 and set(found.experts) == {EXPERTS}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_planted_expert_ranks_first(name: str, lives: Lives) -> None:
    live = lives(name)
    found = count_routing(live, find_routers(live), texts(60), MARKERS[:1])
    first = score_experts(found, MARKERS[:1])[0]
    assert first.name == PLANTED and first.rank == 1 and first.npmi > 0.8


def test_batches_and_order_do_not_matter(lives: Lives) -> None:
    live, sequences = lives("qwen3_moe"), mixed(7)
    routers = find_routers(live)
    whole = count_routing(live, routers, sequences, MARKERS, blocks=4, max_tokens=10_000)
    for tokens in (1, 40, 90):
        other = count_routing(live, routers, sequences, MARKERS, blocks=4, max_tokens=tokens)
        assert torch.equal(other.hits, whole.hits) and torch.equal(other.positions, whole.positions)
    assert torch.equal(count_routing(live, routers, sequences, MARKERS, blocks=4).hits, whole.hits)
    shuffled = random.Random(0).sample(sequences, len(sequences))
    other = count_routing(live, routers, shuffled, MARKERS, blocks=1)
    assert torch.equal(other.hits, whole.hits.sum(0, keepdim=True))
    assert torch.equal(other.positions, whole.positions.sum(0, keepdim=True))


def test_every_token_counts_once_and_padding_never(lives: Lives) -> None:
    live, sequences = lives("mixtral"), mixed(7)
    found = count_routing(live, find_routers(live), sequences, MARKERS, max_tokens=10_000)
    assert int(found.positions[..., 0].sum()) == sum(len(sequence.ids) for sequence in sequences)
    assert torch.equal(found.hits.sum(2), TOP_K * found.positions[:, None].expand(-1, len(found.layers), -1, -1))


def test_blocks_are_dealt_by_number(lives: Lives) -> None:
    live, sequences = lives("olmoe"), mixed(7)
    routers = find_routers(live)
    found = count_routing(live, routers, sequences, MARKERS, blocks=2)
    odd = [sequence for at, sequence in enumerate(sequences) if at % 2]
    assert torch.equal(found.hits[1], count_routing(live, routers, odd, MARKERS, blocks=1).hits[0])


def test_an_expert_that_a_token_is_sent_to_twice_counts_once(lives: Lives) -> None:
    live, sequences = lives("mixtral"), mixed(3)
    routers = find_routers(live)
    with intercept_routing(routers, lambda layer, index, weights: (torch.full_like(index, 3), weights)):
        found = count_routing(live, routers, sequences, MARKERS[:1])
    assert torch.equal(found.hits[:, 0, 3], found.positions) and int(found.hits.sum()) == int(found.hits[:, :, 3].sum())


@pytest.mark.parametrize(
    ("layers", "experts", "markers", "expected"),
    [
        (2, 8, 2, MAX_BLOCKS),
        (48, 128, 3, 14),
        (94, 128, 3, 7),
        (64, 256, 3, 5),
        (61, 256, 4, 4),
        (61, 384, 3, 4),
    ],
)
def test_the_counts_of_the_largest_models_stay_below_10_mb(
    layers: int, experts: int, markers: int, expected: int
) -> None:
    blocks = block_count(layers, experts, markers)
    assert blocks == expected
    assert blocks * layers * (experts + 1) * len(PARTS) * (1 + markers) * 8 < 10e6


def test_the_counts_do_not_grow_with_the_texts(lives: Lives) -> None:
    live = lives("qwen3_moe")
    sizes = {count_routing(live, find_routers(live), texts(number), MARKERS[:1]).hits.nbytes for number in (1, 40)}
    assert sizes == {MAX_BLOCKS * 2 * EXPERTS * len(PARTS) * 2 * 8}


def test_without_texts_or_where_a_marker_never_occurs_there_is_nothing_to_count(lives: Lives) -> None:
    live = lives("mixtral")
    routers = find_routers(live)
    with pytest.raises(SurgeryError, match="there is no text to count on"):
        count_routing(live, routers, [], MARKERS)
    with pytest.raises(SurgeryError, match="--token: 'phrase' never occurs in 3 texts") as caught:
        count_routing(live, routers, texts(3), MARKERS)
    assert caught.value.exit_code == WRONG_USAGE


# Markers


@pytest.mark.parametrize(
    ("text", "word", "weight"),
    [
        ("<think>", "<think>", 1.0),
        ("-</think>", "</think>", -1.0),
        ("+hm", "hm", 1.0),
        ("-0.5*Wait", "Wait", -0.5),
        ("2*Wait", "Wait", 2.0),
        ("- Wait", " Wait", -1.0),
        ("1e-3*a", "a", 1e-3),
    ],
)
def test_a_marker_is_a_text_with_a_signed_weight(text: str, word: str, weight: float) -> None:
    found = parse_marker(text, TOKENIZER)
    assert (found.text, found.weight) == (word, weight)
    spellings = (word, f" {word}")
    assert found.spellings == tuple(
        tuple(TOKENIZER(spelled, add_special_tokens=False)["input_ids"]) for spelled in spellings
    )


@pytest.mark.parametrize("text", ["", "-", "+", " ", "-2*", "3* "])
def test_a_marker_without_a_text_is_none(text: str) -> None:
    with pytest.raises(SurgeryError, match=r"--token: got .* expected a marker such as") as caught:
        parse_marker(text, TOKENIZER)
    assert caught.value.exit_code == WRONG_USAGE


@pytest.mark.parametrize("text", ["漢", "-Wait漢", "-2*漢字"])
def test_a_marker_that_the_vocabulary_cannot_spell_is_told(text: str) -> None:
    with pytest.raises(SurgeryError, match="is not in the model's vocabulary") as caught:
        parse_marker(text, TOKENIZER)
    assert caught.value.exit_code == WRONG_USAGE


def test_a_star_may_belong_to_a_marker() -> None:
    class Letters:
        unk_token_id = None

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    assert parse_marker("a*b", Letters()) == Marker("a*b", 1.0, ((97, 42, 98), (32, 97, 42, 98)))
    assert parse_marker("-*", Letters()).weight == -1


@given(
    st.lists(st.integers(0, 2), min_size=0, max_size=30),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3),
)
def test_an_occurrence_stands_at_its_last_token(ids: list[int], spellings: list[tuple[int, ...]]) -> None:
    expected = [at for at in range(len(ids)) if any(tuple(ids[: at + 1][-len(s) :]) == s for s in spellings)]
    assert Marker("x", 1.0, tuple(spellings)).positions(ids) == expected
    assert Marker("x", 1.0, tuple(spellings)).positions(tuple(ids)) == expected


# Processes

SCRIPT = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = sys.argv[3:]
from test_routing import everything
from support.models import open_folder
from surgery.runtime.environment import rank

torch.set_num_threads(1)
save_file(everything(open_folder(Path(sys.argv[1]))), Path(sys.argv[2]) / f"{rank()}.safetensors")
"""


def everything(live: LoadedModel) -> dict[str, Tensor]:
    from probes.model.expert_norms import norm_ratios
    from surgery.checkpoint.selectors import Expert

    found: RoutingCounts = count_routing(live, find_routers(live), mixed(7), MARKERS, blocks=3, max_tokens=40)
    asked = [Expert(0, number) for number in range(EXPERTS)]
    ratios = norm_ratios(live, find_routers(live), mixed(7), asked, max_tokens=40)
    numbers = torch.tensor([-1.0 if ratios[expert] is None else ratios[expert] for expert in asked])
    return {"hits": found.hits, "positions": found.positions, "ratios": numbers}


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path: Path) -> None:
    live = plant("qwen3_moe", tmp_path / "m")
    paths = [ROOT, ROOT / "tests", Path(__file__).parent]
    codes, said, _ = fork_ranks(SCRIPT, tmp_path / "m", tmp_path, *paths)
    assert codes == [0, 0], said
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = everything(live)
    finally:
        torch.set_num_threads(threads)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert sorted(found) == sorted(alone)
        for name, tensor in alone.items():
            assert torch.equal(found[name], tensor), name
