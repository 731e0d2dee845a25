"""What becomes of a job whose sources, clock or disk change while it is at work: a helpful error, or the same bytes."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hub_server import HubServer

from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError
from surgery.vectors.application import transfer

ROLES = ("target", "tuned", "base")
ONE_THREAD = ExecutionOptions(threads=1)  # in this process, where calls of `os` can be replaced


def write_model(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(30, 40, generator=base) + 0.1 * torch.randn(30, 40, generator=generator) for name in "abc"
    }
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, role in enumerate(ROLES, start=1):
        write_model(tmp_path / f"{role}.safetensors", seed)
    return tmp_path


def run(models: Path, out: Path, *, overwrite: bool = False) -> dict[str, bytes]:
    """Transfer, and return the files of `out` that depend on values."""
    tuned, base, target = (str(models / f"{role}.safetensors") for role in ("tuned", "base", "target"))
    transfer(tuned, base, target, out, options=replace(ONE_THREAD, overwrite=overwrite))
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def at_read(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call `act` before the `number`-th read of a tensor's bytes."""
    read, count = os.preadv, itertools.count(1)

    def disturbed(descriptor: int, *arguments: object) -> int:
        if next(count) == number:
            act()
        return read(descriptor, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", disturbed)


@pytest.fixture
def reads(models: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many reads an undisturbed job takes."""
    with pytest.MonkeyPatch.context() as patch:
        read, count = os.preadv, itertools.count()
        patch.setattr(os, "preadv", lambda *arguments: (next(count), read(*arguments))[1])
        run(models, tmp_path_factory.mktemp("counted") / "out")
        return next(count)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_source_that_vanishes_midway_is_named_and_once_back_gives_the_same_bytes(
    models: Path, monkeypatch: pytest.MonkeyPatch, reads: int, share: float
) -> None:
    expected = run(models, models / "expected")
    source = models / "base.safetensors"
    with monkeypatch.context() as patch:
        at_read(patch, int(share * reads), lambda: source.rename(models / "away"))
        with pytest.raises(SurgeryError, match=r"base\.safetensors: vanished while it was being read"):
            run(models, models / "out")
    assert not (models / "out").exists()
    (models / "away").rename(source)
    assert run(models, models / "out") == expected


def test_a_source_that_is_written_midway_never_mixes_two_versions(
    models: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    source = models / "tuned.safetensors"

    def rewrite() -> None:
        write_model(models / "new", 9)
        source.write_bytes((models / "new").read_bytes())  # in place: the open file has the new values

    with monkeypatch.context() as patch:
        at_read(patch, reads // 2, rewrite)
        with pytest.raises(SurgeryError, match=r"tuned\.safetensors: changed while it was being read"):
            run(models, models / "out")
    # What was done with the old values is neither continued nor thrown away unasked.
    with pytest.raises(SurgeryError, match=r"another job \(or its sources have changed since\)"):
        run(models, models / "out")
    assert run(models, models / "out", overwrite=True) == run(models, models / "expected")


def test_a_disk_that_cannot_read_is_named_with_the_tensor(
    models: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    expected = run(models, models / "expected")

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        at_read(patch, reads // 2, fail)
        with pytest.raises(SurgeryError, match=r'\.safetensors: "[abc]" cannot be read \(Input/output error\)'):
            run(models, models / "out")
    assert run(models, models / "out") == expected


def test_clocks_decide_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(models, models / "expected")
    for role, year in zip(ROLES, (0, 4_102_444_800, 1), strict=True):  # 1970, 2100, and a second later
        os.utime(models / f"{role}.safetensors", (year, year))
    backwards = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    monkeypatch.setattr(time, "time_ns", lambda: next(backwards) * 10**9)
    assert run(models, models / "out") == expected


def test_an_output_may_lie_on_another_file_system(models: Path) -> None:
    memory = Path("/dev/shm")  # noqa: S108 - files in memory; the folder in it gets a name of its own
    if not memory.is_dir() or memory.stat().st_dev == models.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        assert run(models, Path(folder) / "out") == run(models, models / "expected")
        assert [path.name for path in Path(folder).iterdir()] == ["out"]


@pytest.fixture
def on_hub(models: Path, server: HubServer) -> list[str]:
    """The models as repositories of a Hub; their names in the order of `transfer`."""
    names = []
    for role in ("tuned", "base", "target"):
        (models / role).mkdir()
        (models / f"{role}.safetensors").rename(models / role / "model.safetensors")
        (models / role / "config.json").write_text("{}")
        names.append(f"lab/{role}")
        server.add(names[-1], models / role)
    return names


def run_from_hub(names: list[str], out: Path) -> bytes:
    transfer(*names, out, options=ONE_THREAD)
    return (out / "model.safetensors").read_bytes()


def test_a_repository_that_vanishes_midway_is_named_and_once_back_gives_the_same_bytes(
    on_hub: list[str], models: Path, server: HubServer
) -> None:
    server.before("/lab/target/resolve/", lambda: server.repos.pop("lab/target"), method="HEAD")
    with pytest.raises(SurgeryError, match=r"lab/target: no such model at http\S+, or it is private"):
        run_from_hub(on_hub, models / "out")
    assert not list(models.glob("out*"))
    server.add("lab/target", models / "target")
    assert run_from_hub(on_hub, models / "out") == run_from_hub(
        [str(models / n) for n in ("tuned", "base", "target")], models / "e"
    )


def test_a_hub_that_falls_silent_midway_is_named(on_hub: list[str], models: Path, server: HubServer) -> None:
    for each in ("GET", "HEAD"):
        server.fail("/lab/target/resolve/", 503, times=100, method=each)
    with pytest.raises(SurgeryError, match=r"lab/target: cannot reach the Hub at http\S+ \(HTTP 503\)"):
        run_from_hub(on_hub, models / "out")
    assert not list(models.glob("out*"))


def test_a_cached_copy_that_vanishes_midway_is_named_and_fetched_again(
    reads: int, on_hub: list[str], models: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_from_hub(on_hub, models / "expected")
    with monkeypatch.context() as patch:
        at_read(patch, reads // 2, lambda: shutil.rmtree(cache / "models--lab--base"))
        with pytest.raises(SurgeryError, match=r"lab--base/.*: vanished while it was being read .*fetch it again"):
            run_from_hub(on_hub, models / "out")
    assert not (models / "out").exists()
    # What is fetched anew has another time, by which it may be another version.
    with pytest.raises(SurgeryError, match=r"another job \(or its sources have changed since\)"):
        run_from_hub(on_hub, models / "out")
    transfer(*on_hub, models / "out", options=replace(ONE_THREAD, overwrite=True))
    assert (models / "out" / "model.safetensors").read_bytes() == expected
