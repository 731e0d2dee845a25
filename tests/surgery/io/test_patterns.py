"""Globs and PEFT's keys from files: matched as in a shell and in PEFT, in bounded time, each folder looked at once."""

from __future__ import annotations

import re
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.io import patterns
from surgery.io.patterns import SuffixPatterns, glob_paths, matches_glob

MODULES = [f"model.layers.{layer}.{part}" for layer in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]


@settings(max_examples=1_000, deadline=None)
@given(st.text("ab.*?[]!-", max_size=10), st.text("ab.-", max_size=8))
def test_globs_match_as_in_a_shell(glob: str, name: str) -> None:
    assert matches_glob(name, glob) == fnmatchcase(name, glob)


@pytest.mark.parametrize("glob", ["*a" * 400 + "b", "*" * 900 + "b", "*?" * 450 + "b", "*[ab]" * 180 + "c"])
def test_a_glob_of_many_stars_is_answered_at_once(glob: str) -> None:
    begin = time.perf_counter()
    assert not matches_glob("a" * 5_000, glob)
    assert time.perf_counter() - begin < 2


def test_a_glob_that_is_too_long_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"has 1,001 characters, more than 1,000"):
        matches_glob("a", "a" * 1_001)


def test_files_are_found_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "b.txt", ".hidden.py", "x/c.py", "x/y/d.py", ".git/e.py", "x[1]/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert glob_paths("*.py") == ["a.py"]
    assert glob_paths("**/*.py") == ["a.py", "x/c.py", "x/y/d.py", "x[1]/f.py"]
    assert glob_paths(f"{tmp_path}/x/**") == sorted(f"{tmp_path}/{name}" for name in ("x", "x/c.py", "x/y", "x/y/d.py"))
    assert glob_paths("x/?.py") == ["x/c.py"]
    assert glob_paths(".h*") == [".hidden.py"]
    assert glob_paths("x[[]1]/*") == ["x[1]/f.py"]
    assert glob_paths("*/y/../*.py") == ["x/y/../c.py"]
    assert glob_paths("nothing/*") == []


def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f.txt").touch()
    for name in ("up", "again", "more"):
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path)
    begin = time.perf_counter()
    found = glob_paths(f"{tmp_path}/**/**/**/*/**/*.txt")
    assert {Path(path).resolve() for path in found} == {tmp_path / "a" / "b" / "f.txt"}
    assert time.perf_counter() - begin < 2


def test_a_glob_over_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_VISITED", 50)
    for number in range(60):
        (tmp_path / str(number)).touch()
    with pytest.raises(SurgeryError, match="more than 50 files and folders would have to be looked at"):
        glob_paths(f"{tmp_path}/**/*")


@pytest.mark.parametrize(
    "keys",
    [
        ("q_proj", "up_proj"),
        ("layers.1.self_attn.q_proj", "q_proj"),
        ("proj",),
        (r".*\.(1|2|3)\..*", "up_proj"),
        (r"^model\.layers\.\d\.mlp\.up_proj$", "mlp.up_proj"),
        ("^layers.1.self_attn.q_proj",),
        (r"layers\.1[01]\.mlp\.(up|down)_proj", r"q_pro.*"),
    ],
)
def test_the_first_key_counts_as_in_peft(keys: tuple[str, ...]) -> None:
    table = SuffixPatterns(keys, where="adapter_config.json")
    for module in MODULES:
        # peft.utils.other.get_pattern_key
        expected = next((at for at, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", module)), None)
        assert table.first_match(module) == expected, module


@pytest.mark.parametrize("key", ["(a+)+$", "(a|aa)+$", "(.*)*x", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_hostile_keys_take_no_time(key: str) -> None:
    begin = time.perf_counter()
    assert SuffixPatterns([key], where="f").first_match("a" * 4_000 + "!") is None
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("key", ["a)|(b", r"(a)\1", "(", "x" * 1_001, "a{1000000}"])
def test_keys_that_cannot_be_matched_are_refused(key: str) -> None:
    with pytest.raises(SurgeryError, match=r"^f: the pattern"):
        SuffixPatterns([key], where="f")


def test_many_expressions_and_long_names_are_bounded() -> None:
    with pytest.raises(SurgeryError, match="more than 1,000 regular expressions"):
        SuffixPatterns([f".*{number}" for number in range(1_001)], where="f")
    table = SuffixPatterns([f"(.*a){{100}}{number}" for number in range(100)], where="f")
    begin = time.perf_counter()
    with pytest.raises(SurgeryError, match="f: its patterns take too long to match"):
        [table.first_match("a" * length) for length in range(4_000)]
    assert time.perf_counter() - begin < 20
    with pytest.raises(SurgeryError, match=r"f: the name 'a\.a\..*'… has 20,000 characters"):
        table.first_match("a." * 10_000)
