"""Promises of growth.prefix_cache.cache: what was written whole comes back, and nothing else is ever believed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forks import Fork

from surgery.errors import SurgeryError
from surgery.growth.prefix_cache import cache as module
from surgery.growth.prefix_cache.cache import METADATA, STATES, WINDOWS, PrefixCache, cache_bytes, cached_prefixes

SIZES = {"windows": 10, "sequence": 6, "width": 8}
MADE = {1: "first", 2: "second", 3: "third"}


def opened(folder, *, dtype=torch.float32, tokens="text", depth=2, prefixes=MADE, **sizes):
    cache = PrefixCache(folder, **{**SIZES, **sizes}, dtype=dtype, tokens=tokens)
    cache.start_depth(depth, prefixes)
    return cache


def states(count, *, seed=0):
    return torch.randn(count, SIZES["sequence"], SIZES["width"], generator=torch.Generator().manual_seed(seed))


def test_what_is_written_is_read_in_any_order(tmp_path):
    cache, hidden = opened(tmp_path / "c"), states(3)
    assert torch.equal(cache.write([7, 0, 4], 2, hidden), hidden)
    assert torch.equal(cache.read([4, 7, 7], 2), hidden[[2, 0, 0]])
    assert cache.depths([0, 1, 4, 7]) == [2, -1, 2, 2]
    assert cache.read([0, 1], 2) is None
    assert cache.read([0, 4], 1) is None


def test_a_copy_is_read(tmp_path):
    cache, hidden = opened(tmp_path / "c"), states(1)
    cache.write([0], 2, hidden)
    cache.read([0], 2).zero_()
    assert torch.equal(cache.read([0], 2), hidden)


def test_bf16_gives_the_rounded_state_at_once_and_later(tmp_path):
    cache, hidden = opened(tmp_path / "c", dtype=torch.bfloat16), states(2)
    used = cache.write([1, 2], 2, hidden)
    assert used.dtype == torch.float32
    assert torch.equal(used, hidden.bfloat16().float())
    assert torch.equal(used, cache.round_to_stored(hidden))
    assert torch.equal(cache.read([1, 2], 2), used)


@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=25, deadline=None)
def test_every_shape_and_dtype_comes_back(tmp_path_factory, windows, sequence, width, kept, given_in):
    folder = tmp_path_factory.mktemp("c")
    cache = opened(folder, dtype=kept, windows=windows, sequence=sequence, width=width)
    hidden = torch.randn(windows, sequence, width, dtype=torch.float64).to(given_in)
    hidden[0, 0, 0] = float("inf")
    numbers = list(reversed(range(windows)))
    used = cache.write(numbers, 2, hidden)
    assert used.dtype == given_in
    assert torch.equal(cache.read(numbers, 2).to(given_in), used)
    assert torch.equal(used, hidden.to(kept).to(given_in))
    assert sum(path.stat().st_size for path in (folder / STATES, folder / WINDOWS)) == cache_bytes(
        windows, sequence, width, kept
    )
    shutil.rmtree(folder)


def test_an_opened_cache_goes_on_where_it_was_closed(tmp_path):
    cache, hidden = opened(tmp_path / "c"), states(2)
    cache.write([3, 5], 2, hidden)
    cache.flush()
    cache.close()
    again = opened(tmp_path / "c")
    assert torch.equal(again.read([3, 5], 2), hidden)


@pytest.mark.parametrize(
    "other", [{"tokens": "other text"}, {"windows": 11}, {"sequence": 3}, {"width": 16}, {"dtype": torch.bfloat16}]
)
def test_another_cache_starts_empty(tmp_path, other):
    opened(tmp_path / "c").write([3], 2, states(1))
    assert opened(tmp_path / "c", **other).depths(range(10)) == [-1] * 10


def test_states_of_another_prefix_are_forgotten_and_those_below_are_kept(tmp_path):
    cache = opened(tmp_path / "c", depth=1)
    cache.write([0, 1], 1, states(2))
    cache.start_depth(2, MADE)
    cache.write([1, 2], 2, states(2))
    changed = opened(tmp_path / "c", depth=2, prefixes={1: "first", 2: "another"})
    assert changed.depths([0, 1, 2]) == [1, -1, -1]
    assert torch.equal(changed.read([0], 1), states(2)[:1])
    changed.start_depth(3, {1: "another", 3: "third"})
    assert changed.depths([0, 1, 2]) == [-1, -1, -1]
    assert changed.prefixes == {3: "third"}


def test_states_of_a_deeper_prefix_that_is_not_built_upon_are_forgotten(tmp_path):
    cache = opened(tmp_path / "c", depth=3)
    cache.write([0], 3, states(1))
    assert opened(tmp_path / "c", depth=2, prefixes={2: "second"}).depths([0]) == [-1]


def test_states_that_another_run_wrote_meanwhile_are_not_believed(tmp_path):
    mine = opened(tmp_path / "c")
    other = opened(tmp_path / "c", prefixes={2: "another model"})
    other.write([0], 2, states(1))
    assert mine.depths([0]) == [2]
    assert mine.read([0], 2) is None


@pytest.mark.parametrize("where", [0, 100, 191])
def test_a_torn_state_is_noticed_and_forgotten(tmp_path, where):
    cache, hidden = opened(tmp_path / "c"), states(3)
    cache.write([0, 1, 2], 2, hidden)
    cache.close()
    data = bytearray((tmp_path / "c" / STATES).read_bytes())
    data[cache.bytes_per_window + where] ^= 1
    (tmp_path / "c" / STATES).write_bytes(data)
    again = opened(tmp_path / "c")
    assert again.depths([0, 1, 2]) == [2, 2, 2]
    assert again.read([0, 1, 2], 2) is None
    assert (again.depths([0, 1, 2]), again.damaged) == ([2, -1, 2], 1)
    assert torch.equal(again.read([0, 2], 2), hidden[[0, 2]])


def test_a_file_that_lost_its_end_is_made_whole_and_what_lay_there_is_missing(tmp_path):
    cache, hidden = opened(tmp_path / "c"), states(10)
    cache.write(range(10), 2, hidden)
    cache.close()
    os.truncate(tmp_path / "c" / STATES, 4 * cache.bytes_per_window + 5)
    again = opened(tmp_path / "c")
    assert torch.equal(again.read(range(4), 2), hidden[:4])
    for number in range(4, 10):
        assert again.read([number], 2) is None
    again.write([9], 2, hidden[9:])
    assert torch.equal(again.read([9], 2), hidden[9:])


def test_a_kill_between_marking_and_writing_leaves_nothing_that_is_believed(tmp_path, monkeypatch):
    cache = opened(tmp_path / "c")
    cache.write([0, 1, 2], 2, states(3))
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    original = cache._hash
    monkeypatch.setattr(cache, "_hash", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.write([0, 1, 2], 2, states(3, seed=1))
    monkeypatch.undo()
    assert cache.depths([0, 1, 2]) == [2, -1, -1]
    assert torch.equal(cache.read([0], 2), states(3, seed=1)[:1])


WRITING = """
import sys
from pathlib import Path
import torch
from surgery.growth.prefix_cache.cache import PrefixCache

cache = PrefixCache(Path(sys.argv[1]), windows=64, sequence=64, width=256, dtype=torch.float32, tokens="text")
for depth in range(1, 1000):
    cache.start_depth(depth, {at: str(at) for at in range(1, depth + 1)})
    for start in range(0, 64, 8):
        states = torch.arange(start, start + 8)[:, None, None].expand(8, 64, 256) + 1000.0 * depth
        cache.write(range(start, start + 8), depth, states)
        print(depth, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines", [3, 11, 26])
def test_after_a_real_kill_every_state_is_whole_or_missing(tmp_path, lines):
    writing = Fork(WRITING, tmp_path / "c")
    for _ in range(lines):
        writing.stdout.readline()
    writing.kill()
    code, _, complaints = writing.wait()
    assert code == -signal.SIGKILL, complaints
    cache = PrefixCache(
        tmp_path / "c", windows=64, sequence=64, width=256, dtype=torch.float32, tokens="text", alone=True
    )
    standing = [(number, depth) for number, depth in enumerate(cache.depths(range(64))) if depth > 0]
    assert len(standing) >= min(8 * lines, 56)
    for number, depth in standing:
        assert torch.equal(cache.read([number], depth), torch.full((1, 64, 256), number + 1000.0 * depth))


def test_a_state_does_not_stand_at_a_depth_it_was_not_written_for(tmp_path):
    cache = opened(tmp_path / "c", depth=1)
    cache.write([0], 1, states(1))
    cache.start_depth(2, MADE)
    cache._depths[0] = 2
    assert cache.read([0], 2) is None


def test_what_lies_in_a_folder_is_seen_without_opening_it(tmp_path):
    asked = {**SIZES, "dtype": torch.float32, "tokens": "text"}
    assert cached_prefixes(tmp_path / "c", **asked) is None
    opened(tmp_path / "c", depth=1).start_depth(2, MADE)
    assert cached_prefixes(tmp_path / "c", **asked) == {1: "first", 2: "second"}
    assert cached_prefixes(tmp_path / "c", **asked | {"tokens": "other"}) is None


def test_garbage_in_place_of_what_describes_it_starts_empty(tmp_path):
    opened(tmp_path / "c").write([3], 2, states(1))
    for garbage in ("", "[1]", '{"prefixes": 3}', '{"prefixes": {"x": "y"}}'):
        (tmp_path / "c" / "cache.json").write_text(garbage)
        assert opened(tmp_path / "c").depths([3]) == [-1]
    (tmp_path / "c" / WINDOWS).write_bytes(b"short")
    assert opened(tmp_path / "c").depths([3]) == [-1]


def test_its_room_is_taken_from_the_start(tmp_path):
    cache = opened(tmp_path / "c", windows=1000)
    assert (tmp_path / "c" / STATES).stat().st_blocks * 512 >= 1000 * cache.bytes_per_window
    cache.remove()
    assert not (tmp_path / "c").exists()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unsupported(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("allocate", [full, unsupported])
def test_a_disk_without_room_is_an_error_with_both_numbers(tmp_path, monkeypatch, allocate):
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(2000, 1000, 1000))
    with pytest.raises(SurgeryError) as error:
        opened(tmp_path / "c")
    assert error.value.what == "the prefix cache needs 1.92 kB (1,920 bytes), and 1 kB (1,000 bytes) are free"
    assert (tmp_path / "c" / STATES).stat().st_size == 0


def test_a_disk_that_reserves_nothing_is_used_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    cache, hidden = opened(tmp_path / "c"), states(1)
    cache.write([9], 2, hidden)
    assert torch.equal(cache.read([9], 2), hidden)


def test_wrong_requests_are_errors(tmp_path):
    cache = opened(tmp_path / "c")
    with pytest.raises(SurgeryError, match=r"c: has no window 10, only 0 to 9"):
        cache.read([0, 10], 2)
    with pytest.raises(SurgeryError, match=r"has no window -1"):
        cache.depths([-1])
    with pytest.raises(SurgeryError, match=r"got states of shape \(2, 6, 8\), expected \(1, 6, 8\)"):
        cache.write([0], 2, states(2))
    with pytest.raises(SurgeryError, match=r"got 10 windows of 6 × 8 in torch.float16, expected at least one of each"):
        opened(tmp_path / "d", dtype=torch.float16)
    with pytest.raises(SurgeryError, match=r"got 0 windows"):
        opened(tmp_path / "d", windows=0)


def test_states_are_texts_that_only_their_owner_may_read(tmp_path):
    opened(tmp_path / "c").close()
    files = list((tmp_path / "c").iterdir())
    assert files and {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", [METADATA, STATES, WINDOWS])
def test_what_is_no_file_of_the_cache_is_made_anew_and_what_a_link_leads_to_stays(tmp_path, name, kind):
    cache, hidden = opened(tmp_path / "c"), states(1)
    cache.write([3], 2, hidden)
    cache.flush()
    cache.close()
    path, outside = tmp_path / "c" / name, tmp_path / "outside"
    path.rename(outside)
    before = outside.read_bytes()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    again = opened(tmp_path / "c")
    assert again.depths([3]) == [-1] and again.read([3], 2) is None
    again.write([3], 2, -hidden)
    again.flush()
    assert torch.equal(again.read([3], 2), -hidden)
    assert outside.read_bytes() == before and path.is_file() and not path.is_symlink()
