"""Processes of their own that begin at once: forks of one that has imported torch, transformers and the rest before.

Starting Python takes each of them three seconds, most of what such a test takes. What it is about stays the same: a
memory of its own, a rank of its own, a death of its own. A test about what a start imports, or about a real launcher,
starts a real process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[2]
# What a process may take before it counts as hanging, on a machine with ten others at work; it takes about ten.
SECONDS = 600
IMPORTS = (
    "pytest",
    "accelerate",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "cli.main",
    "probes.experts.run",
    "probes.refusal.run",
    "surgery.growth.run",
    "support.growth",
    "support.growth_runs",
)
_context = multiprocessing.get_context("forkserver")


class Fork:
    """A process that runs a script; `stdout` is what it prints, to be read while it runs."""

    def __init__(
        self,
        script: str,
        *arguments: object,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            script: its text, run as a program's, with `arguments` in `sys.argv` from 1 on.
            environment: what differs from that of this process.
        """
        _start_server()
        reading, writing = _context.Pipe(duplex=False)
        self.stdout: TextIO = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()
        with tempfile.NamedTemporaryFile(delete=False) as errors:
            self._errors = Path(errors.name)
        variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
        words = ["script", *map(str, arguments)]
        place = str(cwd or Path.cwd())
        self._process = _context.Process(
            target=_run, args=(script, words, place, variables, writing, str(self._errors))
        )
        self._process.start()
        writing.close()
        self._has_ended = False

    def kill(self) -> None:
        """End it by SIGKILL, where it has not ended."""
        if not self._has_ended:
            self._process.kill()

    def wait(self, timeout: float = SECONDS) -> tuple[int, str, str]:
        """Return its exit code, a signal's negative, and what is left of its output, and its complaints.

        Raises:
            TimeoutError: it did not end within `timeout` seconds, and was killed.
        """
        printed: list[str] = []
        # It could not end where what it prints did not fit into the pipe.
        reader = threading.Thread(target=lambda: printed.append(self.stdout.read()))
        reader.start()
        self._process.join(timeout)
        is_late = self._process.exitcode is None
        if is_late:
            self._process.kill()
            self._process.join()
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        self._has_ended = True
        reader.join()
        self.stdout.close()
        errors = self._errors.read_text(encoding="utf-8", errors="replace")
        self._errors.unlink()
        if is_late:
            raise TimeoutError(f"it did not end within {timeout} seconds: {errors}")
        return code, "".join(printed), errors


def _start_server() -> None:
    """Start the process that all others are forks of, once, with one thread and the paths of the tests."""
    _context.set_forkserver_preload(list(IMPORTS))
    before = dict(os.environ)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ.update(PYTHONPATH=paths, OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    script: str,
    words: list[str],
    cwd: str,
    environment: Mapping[str, str],
    writing: multiprocessing.connection.Connection,
    errors: str,
) -> None:
    """Run the script in this process, which is a fork."""
    gc.freeze()  # what was imported is no garbage, and to look through it takes half a second
    os.dup2(writing.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    # Anew: those of the server took what it writes to for a file, in which one can seek.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})  # noqa: S102 - a test's own text
