"""Open the model and the data sets of a probing run, prepare the data, and write the folder with the findings.

`probes.refusal.run.probe_refusal` and `probes.experts.run.probe_experts` share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from probes.data.examples import DataSet
from probes.data.preparation import CACHES, GenerationOptions, PreparedData, open_model, prepare
from probes.data.reader import read_data
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.io.atomic import partial_path
from surgery.io.output_folder import atomic_folder, check_free, check_no_journal, output_lock
from surgery.models.choices import SpecialTokens
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.collectives import entered_on_main, on_main


@dataclass(frozen=True)
class ProbeRun:
    """A model in memory, the data sets it is probed on, and the folder `out` for what is found.

    transfer: a second data set, to test on what was learned from `data`; None without one.
    """

    live: LoadedModel
    data: DataSet
    transfer: DataSet | None
    out: Path
    generation: GenerationOptions
    options: ExecutionOptions

    @cached_property
    def weights_hash(self) -> str:
        """The hash of all weights of the model, by which findings recognise it."""
        return weights_hash(self.live.checkpoint, options=self.options)

    def prepare(self) -> PreparedData:
        """Complete, label and tokenise the examples of `data`. Raises as `probes.data.preparation.prepare`."""
        return self._prepare(self.data, CACHES[0])

    def prepare_transfer(self) -> PreparedData | None:
        """Do the same with the examples of `transfer`; return None where there is no second data set."""
        return None if self.transfer is None else self._prepare(self.transfer, CACHES[1])

    def write(self, write_files: Callable[[Path], None]) -> None:
        """Call `write_files(folder)` on rank 0 and commit the folder to `out`; all ranks return once it is there."""
        on_main(self._write, write_files)

    def _write(self, write_files: Callable[[Path], None]) -> None:
        with atomic_folder(self.out, overwrite=self.options.overwrite, keep=CACHES) as folder:
            write_files(folder)

    def _prepare(self, data: DataSet, cache: str) -> PreparedData:
        return prepare(
            self.live,
            data,
            self.generation,
            # The dtype changes what is generated, so completions of another one are not reused.
            model_id=f"{self.weights_hash} {self.live.model.dtype}",
            cache=partial_path(self.out) / cache,
            device=self.options.device,
            progress=self.options.progress,
        )


@contextmanager
def open_run(
    model: str,
    data: str,
    out: Path,
    *,
    transfer: str | None,
    generation: GenerationOptions,
    special_tokens: SpecialTokens,
    limit: int | None,
    dtype: str,
    options: ExecutionOptions,
) -> Iterator[ProbeRun]:
    """Open what a probing run needs, and let no other process write `out` in the block.

    Args:
        data, transfer: files, Hub data sets or lab:NAME; see `probes.data.reader.read_data`.
        special_tokens: what special tokens in the data are, see `probes.data.reader.read_data`.
        limit: only the first examples of each data set.
        dtype: that the model computes in; auto is the one it is stored in.

    Raises:
        SurgeryError: `out` exists; a data set cannot be read; the model cannot be loaded.
    """
    check_free(out, overwrite=options.overwrite)
    # From now on, as finished completions are kept in the staging folder.
    with entered_on_main(output_lock(out)):
        check_no_journal(partial_path(out), overwrite=options.overwrite)
        # Data before the model: a misspelt file should not cost the minutes in which a large model is loaded.
        dataset = read_data(data, limit=limit, special_tokens=special_tokens)
        second = None if transfer is None else read_data(transfer, limit=limit, special_tokens=special_tokens)
        live = open_model(model, device=options.device, dtype=dtype)
        yield ProbeRun(live, dataset, second, out, generation, options)
