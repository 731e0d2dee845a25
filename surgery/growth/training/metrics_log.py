"""Write training steps as TensorBoard event files, with tensorboardX (the extra `logs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.growth.training.loop import TrainingStep


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[TrainingStep], None]]:
    """Yield a function that writes a `TrainingStep` to event files in `folder`, with tokens on the x-axis.

    Where a training is resumed from a state, what was logged after that state is marked as replaced.

    Raises:
        SurgeryError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise SurgeryError(
            "logs for TensorBoard need the package tensorboardX", hint="pip install 'model-surgery[logs]'"
        ) from error
    writer: Any = None

    def log(step: TrainingStep) -> None:
        nonlocal writer
        # Opened at the first step, because only then is it known where a resumed training continues.
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=step.tokens)
        values = {
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "tokens_per_second": step.tokens_per_second,
            "gradient_norm": step.grad_norm,
        }
        for name, value in values.items():
            writer.add_scalar(name, value, step.tokens)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()
