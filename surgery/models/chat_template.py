"""Render a model's chat template within bounds, whatever it does: `render_chat`.

Templates are programs, and a stranger's may never end or fill the memory. transformers renders them in a sandbox that
bounds what they can reach, not what they take: here they are rendered by transformers all the same, in a process of
its own (`chat_template_worker`) that the kernel ends where a template takes more than a second or too much memory.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, usage_error

WORKER = Path(__file__).with_name("chat_template_worker.py")
# Seconds by the clock: for the start, from a slow disk; and for one rendering, which is ended after a second of
# computing, and on a busy machine that may be many by the clock.
START_TIMEOUT, TIMEOUT = 120.0, 60.0
MAX_TEMPLATE = 1_000_000  # characters; the longest in use have 30,000
# Variables that say in which language and time zone; tokens and the like are nothing for a template's process.
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LC_TIME", "TZ", "HF_HOME", "SYSTEMROOT")


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return `messages` in the chat template of `tokenizer`, as its `apply_chat_template` would write them.

    Args:
        messages: values of JSON.
        template: in place of the tokenizer's own.
        settings: further variables of the template, such as `enable_thinking`.

    Raises:
        SurgeryError: the template refuses the messages, is no template, or takes too much time, memory or room.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        # A class of transformers that renders without a template, such as Mistral's.
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        )
    chosen = tokenizer.get_chat_template() if template is None else template
    if len(chosen) > MAX_TEMPLATE:
        raise _excess(f"it has {len(chosen):,} characters")
    special = {name: _plain(token) for name, token in tokenizer.special_tokens_map.items()}
    asked = {
        **special,
        **(settings or {}),
        "chat_template": chosen,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    return _ask({"messages": [dict(message) for message in messages], "settings": asked})


class _Worker:
    """The process that renders, started at the first request, and again after a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._rest = b""

    def ask(self, request: bytes) -> dict[str, Any] | None:
        """Return the answer to a request; None where the process has ended over it."""
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(request + b"\n")
                process.stdin.flush()
                line = self._read_line(process, TIMEOUT)
            except OSError:  # a pipe to a process that has ended
                line = b""
            except BaseException:  # interrupted in between: the next answer would be that to this request
                self.stop()
                raise
            if not line:
                self.stop()
                return None
            answer = json.loads(line)
            assert isinstance(answer, dict)
            return answer

    def stop(self) -> None:
        """End the process, if there is one of this process's."""
        process, self._process, self._rest = self._process, None, b""
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        # A forked child shares its parent's pipes, and would read its parent's answers.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.stop()
        self._owner = os.getpid()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603 – this program's own interpreter and file
            [sys.executable, "-I", str(WORKER), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            # Ctrl-C in the terminal is for the process that asked.
            start_new_session=True,
        )
        if self._read_line(self._process, START_TIMEOUT) != b"ready\n":
            self.stop()
            raise SurgeryError(
                "the process that renders chat templates does not start", where=WORKER, hint="Check the installation."
            )
        return self._process

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Return the next line with its line break; less where the process ends before, or takes too long."""
        assert process.stdout is not None
        found = bytearray(self._rest)
        while b"\n" not in found:
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            part = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                return b""
            found += part
        line, _, rest = bytes(found).partition(b"\n")
        self._rest = rest
        return line + b"\n"


_worker = _Worker()
atexit.register(_worker.stop)


def _ask(request: Mapping[str, Any]) -> str:
    answer = _worker.ask(json.dumps(request, default=_placeholder).encode("ascii"))
    if answer is None:
        raise _excess("it takes more than a second, or too much memory")
    if "excess" in answer:
        raise _excess(answer["excess"])
    if "error" in answer:
        raise usage_error(f"the chat template refuses it ({answer['error']})")
    return str(answer["text"])


def _excess(what: str) -> SurgeryError:
    return SurgeryError(
        f"the chat template takes more than it may: {what}",
        hint="Templates that write a conversation take milliseconds: this one is broken, or meant to do harm.",
    )


def _placeholder(value: Any) -> str:
    """Return what a template sees of a value that is none of JSON's, such as a date in a row of Parquet."""
    return f"<{type(value).__name__}>"


def _plain(token: Any) -> Any:
    return [str(each) for each in token] if isinstance(token, (list, tuple)) else str(token)
