"""A cache is used where it saves time, has room and is right; the reason is said."""

from __future__ import annotations

import errno
import math
from collections import namedtuple

import pytest
import torch
from support.models import make_live, maker

from surgery.errors import SurgeryError
from surgery.growth.plan import CacheSettings
from surgery.growth.prefix_cache import decide
from surgery.growth.prefix_cache.cache import PrefixCache, cache_bytes
from surgery.growth.prefix_cache.decide import decide_caching, why_not_cacheable

TOKENS = torch.randint(4, 90, (2, 19), generator=torch.Generator().manual_seed(3))
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


@pytest.fixture
def live(lives):
    frozen = lives("llama", num_hidden_layers=3)
    frozen.model.requires_grad_(False)
    return frozen


@pytest.fixture
def timed(monkeypatch):
    """Sets what is measured: milliseconds of reading, writing and recomputing a window."""

    def given(read, write, compute):
        monkeypatch.setattr(decide, "_disk_seconds", lambda *_: (write / 1e3, read / 1e3))
        monkeypatch.setattr(decide, "_prefix_seconds", lambda *_: compute / 1e3)

    return given


def asked(live, folder, depth=2, *, use="auto", disk=10**6, passes=4.0, held=0, windows=100, dtype="float32"):
    settings = CacheSettings(use=use, disk=disk, dtype=dtype)
    return decide_caching(
        live,
        depth,
        settings=settings,
        folder=folder,
        windows=windows,
        passes=passes,
        batch_tokens=TOKENS,
        cached_depth=held,
    )


def test_a_cheap_disk_is_used_and_the_reason_has_the_numbers(live, tmp_path, timed):
    timed(read=0.4, write=0.5, compute=3.1)
    found = asked(live, tmp_path)
    assert found.use
    assert found.reason == (
        "read at 6.08 MB/s it costs 0.40 ms a window, recomputing 2 layers 3.1 ms: cached (245 kB of 1 MB allowed)"
    )
    assert found.bytes == cache_bytes(100, 19, 32, torch.float32) == 244_800
    assert (found.seconds_read, found.seconds_write, found.seconds_recompute) == pytest.approx((4e-4, 5e-4, 3.1e-3))
    assert asked(live, tmp_path, dtype="bfloat16").bytes == cache_bytes(100, 19, 32, torch.bfloat16)


def test_a_slow_disk_is_not_used_unless_the_plan_asks(live, tmp_path, timed):
    timed(read=4.1, write=1, compute=0.6)
    found = asked(live, tmp_path, 1)
    assert not found.use
    assert found.reason.endswith(
        "it costs 4.1 ms a window, recomputing 1 layer 0.60 ms: not cached, as reading is slower"
    )
    asked_for = asked(live, tmp_path, 1, use="on")
    assert asked_for.use
    assert asked_for.reason.endswith("cached as the plan asks (245 kB of 1 MB allowed)")


@pytest.mark.parametrize(
    ("passes", "held", "use"),
    [
        (1, 0, False),  # 3 + 1 against 3: nothing would ever be read
        (1.3, 0, False),  # 3 + 1 + 0.3·1 against 3.9
        (2, 0, True),  # 3 + 1 + 1 against 6
        (1, 1, False),  # 1 + 3/2 + 1 against 3
        (1, 2, True),  # 1 against 3
        (1.5, 1, True),  # 1 + 3/2 + 1 + 0.5·1 against 4.5
        (0.2, 2, True),
    ],
)
def test_how_often_windows_are_seen_decides(live, tmp_path, timed, passes, held, use):
    timed(read=1, write=1, compute=3)
    found = asked(live, tmp_path, passes=passes, held=held)
    assert found.use == use
    if not use:
        seen = "once" if passes == 1 else f"{passes} times"
        assert found.reason.endswith(f"not cached, as writing costs 1.0 ms and a window is seen {seen}")


def test_reads_count_for_each_process(live, tmp_path, timed, monkeypatch):
    timed(read=1, write=0, compute=3)
    assert asked(live, tmp_path).use
    monkeypatch.setattr(decide, "n_processes", lambda: 4)
    found = asked(live, tmp_path)
    assert not found.use
    assert found.seconds_read == pytest.approx(4e-3)


def test_depth_0_and_off_are_never_cached(live, tmp_path, timed):
    timed(read=1, write=1, compute=9)
    for use in ("auto", "on"):
        assert asked(live, tmp_path / "none", 0, use=use).reason == "the prefix is the embedding alone"
    found = asked(live, tmp_path / "none", use="off")
    assert (found.use, found.reason, math.isnan(found.seconds_read)) == (False, "turned off in the plan", True)
    assert not (tmp_path / "none").exists()


def test_more_than_the_plan_allows_is_not_cached_or_an_error(live, tmp_path, timed):
    timed(read=1, write=1, compute=9)
    found = asked(live, tmp_path, disk=244_799)
    assert (found.use, found.reason) == (False, "it needs 245 kB, and the plan allows 245 kB")
    assert asked(live, tmp_path, disk=244_800).use
    with pytest.raises(SurgeryError, match=r"the prefix cache cannot be used: it needs 245 kB, and the plan allows 1"):
        asked(live, tmp_path, disk=100_000, use="on")


def test_no_room_on_the_disk_is_not_cached_or_an_error_but_an_old_cache_gives_way(live, tmp_path, timed, monkeypatch):
    timed(read=1, write=1, compute=9)
    monkeypatch.setattr(decide.shutil, "disk_usage", lambda path: Usage(300_000, 200_000, 100_000))
    found = asked(live, tmp_path)
    reason = "it needs 245 kB beside 64 MB for the run itself, and 100 kB are free"
    assert (found.use, found.reason) == (False, reason)
    with pytest.raises(SurgeryError, match=r"the prefix cache cannot be used: it needs 245 kB, and 100 kB are free"):
        asked(live, tmp_path, use="on")
    PrefixCache(tmp_path, windows=100, sequence=19, width=32, dtype=torch.float32, tokens="", alone=True).close()
    assert asked(live, tmp_path, use="on").use
    monkeypatch.setattr(decide.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, decide.BENCHMARK_BYTES))
    assert not asked(live, tmp_path / "new").use
    assert asked(live, tmp_path).use


@pytest.mark.parametrize("use", ["auto", "on"])
def test_what_would_be_wrong_is_never_cached(lives, live, tmp_path, timed, use):
    timed(read=1, write=1, compute=9)
    dropping = make_live("gpt2", tmp_path / "m", attn_pdrop=0.1, resid_pdrop=0.0, embd_pdrop=0.0)
    sharing, training = lives("gemma4"), lives("qwen2")
    for other in (dropping, sharing):
        other.model.requires_grad_(False)
    cases = [
        (dropping, 1, "its layers draw at random in training (dropout)"),
        (sharing, 2, "layer 1 or a later one needs what those below compute"),
        (training, 2, "embed_tokens.weight below layer 2 trains"),
    ]
    for model, depth, reason in cases:
        if use == "auto":
            found = asked(model, tmp_path / "c", depth)
            assert not found.use
            assert found.reason.startswith(reason)
        else:
            with pytest.raises(SurgeryError) as error:
                asked(model, tmp_path / "c", depth, use="on")
            assert error.value.what.startswith(f"the prefix cache cannot be used: {reason}")
            assert error.value.hint == "Set cache.use to auto or off."


def test_what_is_tried_leaves_the_model_and_the_random_numbers_as_they_were(lives):
    live = lives("gpt2")
    live.model.requires_grad_(False)
    live.layers[0].train()
    state, modes = torch.get_rng_state(), [module.training for module in live.model.modules()]
    assert why_not_cacheable(live, 1, TOKENS) == "its layers draw at random in training (dropout)"  # GPT-2's own 0.1
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in live.model.modules()] == modes
    live.model.eval()


def test_only_what_trains_below_matters(live):
    for module in (live.layers[2], live.final_norm):
        module.requires_grad_(True)
    assert why_not_cacheable(live, 2, TOKENS) is None
    assert why_not_cacheable(live, 3, TOKENS).endswith("below layer 3 trains")


def test_the_disk_and_the_layers_are_really_timed(live, tmp_path, monkeypatch):
    monkeypatch.setattr(decide, "BENCHMARK_BYTES", 200_000)
    found = asked(live, tmp_path / "c")
    assert 0 < found.seconds_read < 1
    assert 0 < found.seconds_write < 1
    assert 0 < found.seconds_recompute < 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_it_is_timed_ends_nothing(live, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PrefixCache, "_write_row", full)
    found = asked(live, tmp_path / "c")
    assert not found.use and found.reason.startswith("not cached, as its disk could not be timed: ")
    found = asked(live, tmp_path / "c", use="on")
    assert found.use and found.reason.startswith("cached as the plan asks; its disk could not be timed: ")
    assert list(tmp_path.iterdir()) == []
