"""Cached, extended or computed, the same states come out, and which is counted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.models import FAMILIES, MORE, make_live, maker, open_folder
from support.processes import fork_ranks
from torch import nn

from surgery.errors import SurgeryError
from surgery.growth.prefix_cache.cache import STATES, PrefixCache
from surgery.growth.prefix_cache.prefix import Prefix, PrefixStatistics, fingerprints, prefix_tensors
from surgery.models.forward_pass import trace_layers
from surgery.models.loaded_model import hooks

WINDOWS, LENGTH = 12, 19
TOKENS = torch.randint(4, 90, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(2))
FAULTY = ("gemma3n", "gemma4")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


@pytest.fixture
def live(lives):
    """Three layers and a quick family."""
    return lives("llama", num_hidden_layers=3)


def opened(folder, live, dtype=torch.float32):
    return PrefixCache(folder, windows=WINDOWS, sequence=LENGTH, width=live.width, dtype=dtype, tokens="text")


def seen(prefix, *batches):
    return [prefix.hidden(batch, TOKENS[list(batch)]) for batch in batches]


@torch.no_grad()
def plain(live, depth, numbers):
    ids = TOKENS[list(numbers)]
    return trace_layers(live, lambda: live.body(input_ids=ids, use_cache=False))[1][depth]


@pytest.mark.parametrize("name", [name for name in (*FAMILIES, *MORE) if name not in FAULTY])
def test_cached_states_are_those_of_the_plain_pass(name, lives, tmp_path):
    live, batches = lives(name), [(0, 1, 2), (3, 4, 5)]
    cache = opened(tmp_path / "c", live)
    for depth in range(1, len(live.layers)):
        prefix = Prefix(live, depth, cache)
        for _ in range(2):
            for batch, hidden in zip(batches, seen(prefix, *batches), strict=True):
                assert torch.equal(hidden, plain(live, depth, batch))
                assert not hidden.requires_grad
        done = prefix.statistics
        assert (done.read, done.extended, done.computed) == ((6, 0, 6) if depth == 1 else (6, 6, 0))
    prefix = Prefix(live, len(live.layers), cache)
    assert torch.equal(*seen(prefix, (0, 1, 2), (0, 1, 2)))


def test_without_a_cache_everything_is_computed(live):
    for depth in range(3):
        prefix = Prefix(live, depth)
        assert torch.equal(seen(prefix, (4, 5))[0], plain(live, depth, (4, 5)))
        assert prefix.statistics == PrefixStatistics(computed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extending_is_computing_anew(live, tmp_path, dtype):
    batches = [(0, 1, 2, 3), (4, 5, 6, 7)]
    cache, other = opened(tmp_path / "c", live, dtype), opened(tmp_path / "d", live, dtype)
    for depth in (1, 2, 3):
        extended = Prefix(live, depth, cache)
        first = seen(extended, *batches)
        assert (extended.statistics.extended, extended.statistics.computed) == ((8, 0) if depth > 1 else (0, 8))
        # The other cache has gone the same way without ever seeing these windows.
        anew = Prefix(live, depth, other)
        if depth < 3:
            seen(anew, (8, 9, 10, 11))
            continue
        for one, two, again in zip(first, seen(anew, *batches), seen(anew, *batches), strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, again)
        assert (anew.statistics.computed, anew.statistics.read) == (8, 8)


def test_bf16_uses_what_it_keeps(live, tmp_path):
    prefix = Prefix(live, 2, opened(tmp_path / "c", live, torch.bfloat16))
    first, again = seen(prefix, (0, 1), (0, 1))
    assert torch.equal(first, plain(live, 2, (0, 1)).bfloat16().float())
    assert torch.equal(first, again)


def test_a_damaged_state_is_computed_anew_with_the_same_bits(live, tmp_path):
    cache = opened(tmp_path / "c", live)
    (first,) = seen(Prefix(live, 2, cache), (0, 1, 2))
    cache.close()
    data = bytearray((tmp_path / "c" / STATES).read_bytes())
    data[cache.bytes_per_window + 40 : cache.bytes_per_window + 90] = bytes(50)
    (tmp_path / "c" / STATES).write_bytes(data)
    prefix = Prefix(live, 2, opened(tmp_path / "c", live))
    again, read = seen(prefix, (0, 1, 2), (0, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, read)
    done = prefix.statistics
    assert (done.damaged, done.computed, done.read) == (1, 1, 5)


@given(
    batches=st.lists(st.lists(st.integers(0, WINDOWS - 1), min_size=1, max_size=4), min_size=2, max_size=6),
    stop=st.integers(1, 5),
    again=st.integers(0, 4),
    ahead=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_a_training_that_is_resumed_sees_the_states_it_would_have_seen(
    lives, tmp_path_factory, batches, stop, again, ahead
):
    live = lives("llama", num_hidden_layers=3)
    whole, resumed = (opened(tmp_path_factory.mktemp("c"), live, torch.bfloat16) for _ in range(2))
    for depth in (1, 2):
        straight = seen(Prefix(live, depth, whole), *batches)
        # Killed after `stop` batches, and taken up at one of those before.
        seen(Prefix(live, depth, resumed), *batches[:stop])
        start, prefix = min(again, stop, len(batches) - 1), Prefix(live, depth, resumed)
        for batch, expected in zip(batches[start:], straight[start:], strict=True):
            (hidden,) = seen(prefix, batch)
            assert torch.equal(hidden, expected)
            if ahead:
                prefix.prefetch(batches[0])
        prefix.close()


def test_a_window_twice_in_a_batch_has_one_state(live, tmp_path):
    prefix = Prefix(live, 1, opened(tmp_path / "c", live))
    first, again = seen(prefix, (3, 5, 3), (3, 5, 3))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[2])
    assert prefix.statistics.computed == 2


def test_reading_ahead_gives_the_same_and_does_not_compute(live, tmp_path):
    prefix = Prefix(live, 1, opened(tmp_path / "c", live))
    expected = seen(prefix, (0, 1), (2, 3))
    calls = []
    with hooks(live.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))):
        prefix.prefetch((0, 1))
        prefix.prefetch((2, 3))  # one batch is read ahead at a time
        assert torch.equal(seen(prefix, (0, 1))[0], expected[0])
        prefix.prefetch((0, 1))
        assert torch.equal(seen(prefix, (2, 3))[0], expected[1])  # another than was told
    assert not calls
    prefix.prefetch((8, 9))  # not there yet
    assert torch.equal(seen(prefix, (8, 9))[0], plain(live, 1, (8, 9)))
    prefix.close()
    size = 2 * LENGTH * live.width * 4
    assert prefix.statistics == PrefixStatistics(read=4, computed=6, bytes_read=2 * size, bytes_written=3 * size)


def test_the_cache_knows_its_prefix(live, tmp_path):
    changed = copy.deepcopy(live)
    cache = opened(tmp_path / "c", live)
    seen(Prefix(live, 1, cache), (0, 1), (2, 3))
    seen(Prefix(live, 2, cache), (0, 1))
    with torch.no_grad():
        changed.layers[2].mlp.down_proj.weight.add_(1)
        changed.final_norm.weight.add_(1)
    Prefix(changed, 2, cache)
    assert cache.depths([0, 2]) == [2, 1]  # what lies above does not matter
    with torch.no_grad():
        changed.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    (hidden,) = seen(Prefix(changed, 2, cache), (0, 1))
    assert torch.equal(hidden, plain(changed, 2, (0, 1)))
    assert cache.depths([2]) == [1]  # the first layer is as it was
    with torch.no_grad():
        changed.model.get_input_embeddings().weight[50, 0] += 1e-3
    Prefix(changed, 2, cache)
    assert cache.depths([0, 2]) == [-1, -1]


def test_a_fingerprint_is_of_what_decides_the_states(live, lives, tmp_path):
    deeper = lives("llama", num_hidden_layers=4)
    with torch.no_grad():
        for target, source in zip(prefix_tensors(deeper, 3).values(), prefix_tensors(live, 3).values(), strict=True):
            target.copy_(source)
    own = fingerprints(live, [1, 3])
    assert fingerprints(deeper, [1, 3]) == own
    assert len({own[1], own[3], fingerprints(live, [1], torch.bfloat16)[1]}) == 3
    turned = copy.deepcopy(live)
    turned.model.config.rms_norm_eps = 1e-5
    assert fingerprints(turned, [1])[1] != own[1]


def test_computes_in_the_dtype_it_is_told(live):
    ids = TOKENS[:2]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = trace_layers(live, lambda: live.body(input_ids=ids, use_cache=False))[1][2]
        exact = seen(Prefix(live, 2), (0, 1))[0]
    assert torch.equal(seen(Prefix(live, 2, autocast=torch.bfloat16), (0, 1))[0], expected)
    assert torch.equal(exact, plain(live, 2, (0, 1)))


def test_a_model_in_bf16_gets_bf16_states(tmp_path):
    live = make_live("llama", tmp_path / "m", dtype=torch.bfloat16, num_hidden_layers=3)
    prefix = Prefix(live, 2, opened(tmp_path / "c", live, torch.bfloat16))
    first, again = seen(prefix, (0, 1), (0, 1))
    assert first.dtype == again.dtype == torch.bfloat16
    assert torch.equal(first, plain(live, 2, (0, 1)))
    assert torch.equal(first, again)


def test_no_dtype_or_mode_of_the_model_is_changed(live, tmp_path):
    live.model.train()
    prefix = Prefix(live, 1, opened(tmp_path / "c", live))
    seen(prefix, (0, 1))
    assert all(module.training for module in live.model.modules() if isinstance(module, nn.Linear))
    live.model.eval()


BATCHES = [(0, 1, 2), (3, 4, 5)]
SHARING = """
import sys
from pathlib import Path

sys.path[:0] = sys.argv[3:]
import torch
from support.models import open_folder
from safetensors.torch import save_file
from test_prefix import BATCHES, opened, seen
from surgery.growth.prefix_cache.prefix import Prefix
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.environment import rank

torch.set_num_threads(1)
live, out = open_folder(Path(sys.argv[1])), Path(sys.argv[2])
cache = opened(out / "cache", live)
found = {}
for depth in (1, 2):
    prefix = Prefix(live, depth, cache)
    (found[f"own {depth}"],) = seen(prefix, BATCHES[rank()])
    map_over_ranks([0, 1], int)  # until both are here
    (found[f"other {depth}"],) = seen(prefix, BATCHES[1 - rank()])
    map_over_ranks([0, 1], int)  # until both are here
    assert prefix.statistics.read == 3, prefix.statistics
save_file(found, out / f"{rank()}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_share_a_cache(live, tmp_path):
    live.model.save_pretrained(tmp_path / "llama")
    here = Path(__file__).parent
    paths = [here.parents[3], here.parents[2], here]
    codes, complaints, _ = fork_ranks(SHARING, tmp_path / "llama", tmp_path, *paths)
    assert codes == [0, 0], complaints
    alone = open_folder(tmp_path / "llama")
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for depth in (1, 2):
            for whose, batch in zip(("own", "other") if rank == 0 else ("other", "own"), BATCHES, strict=True):
                expected = plain(alone, depth, batch)
                assert torch.allclose(found[f"{whose} {depth}"], expected, rtol=1e-6, atol=1e-6)


def test_wrong_requests_are_errors(live, tmp_path):
    cache = opened(tmp_path / "c", live)
    with pytest.raises(SurgeryError, match=r"depth: got 0, expected 1 to 3"):
        Prefix(live, 0, cache)
    with pytest.raises(SurgeryError, match=r"depth: got 4, expected 0 to 3"):
        Prefix(live, 4)
    prefix = Prefix(live, 1, cache)
    with pytest.raises(SurgeryError, match=r"tokens: got tokens of shape \(2, 18\), expected \(2, 19\)"):
        prefix.hidden([0, 1], TOKENS[:2, :-1])
    with pytest.raises(SurgeryError, match=r"has no window 12, only 0 to 11"):
        prefix.hidden([0, 12], TOKENS[:2])
