"""Render chat templates in a process of its own, with bounds on time, memory and files; `chat_template` starts it.

Run as a script: `python -I chat_template_worker.py PATHS`, with the caller's `sys.path` as JSON. Requests come as lines
of JSON on stdin, answers go out as lines on stdout. A template is a stranger's program in a language with loops and
arithmetic: the kernel sees to what it may take, and no template can talk the kernel out of it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS = 1.0
MEMORY = 400_000_000  # bytes of address space beside what the process takes when it is ready
OUTPUT = 1_000_000  # characters of a text, beside those of the conversation
MESSAGE = 300  # characters of an error's text


def main() -> None:
    """Answer requests until there are no more."""
    sys.path[:] = json.loads(sys.argv[1])
    from transformers.utils.chat_template_utils import render_jinja_template as render

    # What is imported or opened at the first use is so now: from here on no file is opened.
    render([[{"role": "user", "content": "x"}]], chat_template="{{ messages | tojson }}{{ strftime_now('%Y') }}")
    for broken in ("{{ raise_exception('x') }}", "{% for %}"):
        _answer(render, {"messages": [], "settings": {"chat_template": broken}}, 0)
    _limit(resource.RLIMIT_AS, _address_space() + MEMORY)
    _limit(resource.RLIMIT_NOFILE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    print("ready", flush=True)
    for line in sys.stdin:
        # The default action of its signal ends the process wherever it is, in a function of C as well.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(render, json.loads(line), len(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


def _answer(render: Any, request: dict[str, Any], size: int) -> str:
    try:
        ((text,), _) = render([request["messages"]], **request["settings"])
        if len(text) > OUTPUT + size:
            return json.dumps({"excess": f"it writes {len(text):,} characters"})
        return json.dumps({"text": text})
    except MemoryError:
        return json.dumps({"excess": "it takes too much memory"})
    except RecursionError:
        return json.dumps({"excess": "it calls itself too often"})
    except Exception as error:  # whatever a stranger's template raises
        return json.dumps({"error": (str(error) or type(error).__name__)[:MESSAGE]})


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux; more than it takes anywhere
        return 4_000_000_000


def _limit(what: int, value: int) -> None:
    try:
        _, most = resource.getrlimit(what)
        resource.setrlimit(what, (value, value if most == resource.RLIM_INFINITY else min(value, most)))
    except (OSError, ValueError):  # macOS has no limit of the address space; time bounds memory there
        return


if __name__ == "__main__":
    main()
