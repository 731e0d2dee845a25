"""What several test files share: a Hub of our own for the real client, and for `datasets`."""

from __future__ import annotations

import gc
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import hypothesis
import pytest
from huggingface_hub import constants, file_download
from hypothesis import HealthCheck
from support.hub_server import HubServer

# On a machine with other work everything takes long, which is no fault of a test's.
hypothesis.settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("busy machine")

# Commands that run in the background of a shell ignore Ctrl-C, and what they start does too: not so what tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config) -> None:
    """Keep the order of `pytest_collection_modifyitems`: xdist would begin with the files of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no process of several ends with one while the others are done.

    They are those that start processes, which often hold one test alone; then those of most tests.
    """
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, -counts[item.path], item.path))


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """Keep what is there before a file's tests, such as torch and transformers, out of each garbage collection.

    To look through those takes half a second each time, and models are collected hundreds of times.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where the client keeps what it fetches from `server`."""
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on 127.0.0.1 that `huggingface_hub` takes for the only one; no token, nothing cached."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    # The factory of tiny models turns progress bars off for the whole process.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "progress_bar_states", {})
    huggingface_hub.close_session()  # an open one keeps the proxies it was made with
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def data_server(server: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """`server`, as `datasets` sees it too: that reads the environment once, when it is imported."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data")
    return server


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tiny models of `pushing.make_results`."""
    from support.publish import make_results

    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def out(results: Path, tmp_path: Path) -> Path:
    """A model that surgery wrote, for one test alone."""
    from support.publish import copy_of

    return copy_of(results / "model", tmp_path / "reasoner")


@pytest.fixture
def writable(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that `server` accepts, and uploads by the protocol that it speaks."""
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
