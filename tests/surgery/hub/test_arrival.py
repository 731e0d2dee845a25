"""How much of a download has come is read off the cache."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from support.hub_models import FETCHED, REPO, folder_of
from support.hub_server import HubServer

from surgery.hub import arrival
from surgery.hub import download as hub
from surgery.runtime import progress, progress_lines


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a program would print, without the seconds for which it waits before the first."""
    printed: list[str] = []
    monkeypatch.setattr(progress, "_print_line", lambda text, stream: printed.append(text))
    monkeypatch.setattr(progress_lines, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(arrival, "_INTERVAL", 0.001)
    return printed


def test_what_lies_in_the_cache_counts_and_what_lay_there_before_does_not(tmp_path: Path, lines: list[str]) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "old").write_bytes(bytes(50))
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = arrival._watch
        patch.setattr(arrival, "_watch", lambda *given: original(*given[:3], lambda n: seen.append(n), given[4]))  # type: ignore[arg-type]
        with arrival.show_arrival("org/x", 100, tmp_path):
            (blobs / "a.incomplete").write_bytes(bytes(30))
            end = time.monotonic() + 30
            while sum(seen) < 30 and time.monotonic() < end:
                time.sleep(0.001)
            assert sum(seen) == 30
            (blobs / "a.incomplete").rename(blobs / "a")
            (blobs / "b").write_bytes(bytes(500))
    assert sum(seen) == 100 and min(seen) >= 0, "no more than was expected, and never less than before"


def test_a_download_without_a_terminal_has_its_lines_and_no_bars(
    server: HubServer, tmp_path: Path, lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    server.add(REPO, folder_of(tmp_path / "model", FETCHED))
    hub.fetch(REPO, progress=False)
    assert lines == []
    (tmp_path / "model" / "more.json").write_bytes(b"{}" * 5000)
    server.add(REPO, tmp_path / "model")
    hub.fetch(REPO)
    assert lines[-1].startswith(f"Downloading {REPO}: done, 9.8 KiB in ")
    assert all(re.match(rf"Downloading {REPO}: (\S+ \S+ of 9\.8 KiB|done)", line) for line in lines), lines
    assert capfd.readouterr() == ("", "")
