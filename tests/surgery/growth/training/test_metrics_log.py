"""Promises of surgery.growth.training.metrics_log: TensorBoard finds every step, against tokens."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.growth.training.loop import TrainingStep
from surgery.growth.training.metrics_log import tensorboard

STEPS = [TrainingStep(64, 5.25, 1e-3, 800.0, 1.5), TrainingStep(128, 5.0, 2e-3, 900.0, 1.25)]


def test_every_number_of_every_step_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with tensorboard(tmp_path / "logs") as log:
        for step in STEPS:
            log(step)
    (file,) = (tmp_path / "logs").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    found = scalars(file.read_bytes())
    for name, values in {
        "loss": (5.25, 5.0),
        "learning_rate": (1e-3, 2e-3),
        "tokens_per_second": (800.0, 900.0),
        "gradient_norm": (1.5, 1.25),
    }.items():
        assert found[name] == [(64, pytest.approx(values[0])), (128, pytest.approx(values[1]))]


def test_nothing_is_written_where_nothing_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with tensorboard(tmp_path / "logs"):
        pass
    assert not (tmp_path / "logs").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with (
        pytest.raises(SurgeryError, match=r"need the package tensorboardX. pip install 'model-surgery\[logs\]'"),
        tensorboard(tmp_path),
    ):
        pass


def scalars(content: bytes) -> dict[str, list[tuple[int, float]]]:
    """name → (step, value) of an event file: records of a length, its checksum, an event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    at = 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + size])
        at += 12 + size + 4
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
