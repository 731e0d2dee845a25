"""What can go wrong while something is sent to the Hub: each fault in one line, with the next step, without secrets.

In comes what huggingface_hub raises and logs, out come a `SurgeryError`, or seconds to wait, or a line for people.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.hub.errors import NO_SPACE, NOT_A_HUB, Repository, failure, transport_error, wrong_token
from surgery.hub.settings import cache, endpoint

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

AGAIN = "Run the same command again: what has arrived is not sent twice."
CLIENT = "huggingface_hub"
MOVED = (409, 412)
LONGEST_QUOTE = 200  # characters of the Hub's own words that a line repeats
_WAITING = re.compile(r"(?:Rate limited\. Waiting|Retrying in) ([\d.]+)s")
_BAD_CARD = "validating metadata in README.md"


class MovedError(SurgeryError):
    """Somebody else pushed in between."""


@contextmanager
def capture_hub_logs(notify: Callable[[str], None], *, bars: bool) -> Iterator[None]:
    """huggingface_hub with its talk turned into lines for `notify`: its own quote addresses that carry signatures."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger(CLIENT)
    handlers, propagates = logger.handlers, logger.propagate
    hides = not bars and not are_progress_bars_disabled()
    # record: the client passes files to its HTTP library in a way that is deprecated there.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            logger.handlers, logger.propagate = [_Waits(notify)], False
            if hides:
                disable_progress_bars()
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagates
            if hides:
                enable_progress_bars()
    for warning in caught:
        if _BAD_CARD in str(warning.message):
            notify(f"The Hub says of the card: {_scrubbed(str(warning.message).partition(':')[2], '')}")


class _Waits(logging.Handler):
    """Passes on for how long the client waits, and nothing else."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if waiting := _WAITING.match(message):
            why = "asks to wait" if message.startswith("Rate") else "did not answer as it should"
            self._notify(f"The Hub {why}: trying again in {float(waiting[1]):g} s.")


def seconds_to_wait(error: BaseException, attempt: int, *, again: bool) -> float | None:
    """How long to wait before a request is made again; None where that helps nothing or, without `again`, may harm."""
    response = getattr(error, "response", None)
    if response is None:
        return 2.0**attempt if again and _is_transport(error) else None
    if response.status_code == 429:
        return _asked_to_wait(response.headers) or 2.0**attempt
    return 2.0**attempt if again and response.status_code >= 500 else None


@contextmanager
def translate_upload_errors(
    to: Repository, token: str, *, passing: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turns what huggingface_hub raises in the block into a `SurgeryError`, but for the types in `passing`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, transport_error()) as error:
        if isinstance(error, passing):
            raise
        # A traceback shows the causes' texts, and the Hub's may quote the token.
        quotes = token and any(token in str(each) for each in _causes(error))
        raise _explain(error, to, token) from None if quotes else error


def _explain(error: BaseException, to: Repository, token: str) -> SurgeryError:
    from huggingface_hub import errors

    chain = list(_causes(error))
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        said = _scrubbed(str(error).partition("\n")[2], token)
        return SurgeryError(f"the Hub refuses the card's metadata: {said}", where=to, hint="Mend README.md.")
    if isinstance(error, ValueError) and "LFS batch API" in str(error):
        said = _scrubbed(str(error).rpartition("`")[2], token)
        return SurgeryError(f"the Hub's storage refuses a file: {said}", where=to)
    if refusal := next((each for each in chain if isinstance(each, errors.HfHubHTTPError)), None):
        return _refused(refusal, to, token)
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return SurgeryError("offline mode is on", where=to, hint="Unset HF_HUB_OFFLINE.")
    if full := next((each for each in chain if isinstance(each, OSError) and each.errno in NO_SPACE), None):
        where = full.filename or cache()
        return SurgeryError("the disk filled up while sending", where=where, hint=f"Free some space. {AGAIN}")
    if any(_is_transport(each) for each in chain):
        return _unreachable(to, error)
    if isinstance(error, OSError):
        return SurgeryError(f"cannot be read ({error.strerror or type(error).__name__})", where=error.filename or to)
    if isinstance(error, ValueError):  # not JSON, or not what was asked: a login page, or a wrong HF_ENDPOINT
        return SurgeryError(
            f"cannot push to {endpoint()} ({NOT_A_HUB})", where=to, hint="Check HF_ENDPOINT and the network."
        )
    return SurgeryError("the upload broke off", where=to, hint=AGAIN)  # hf_xet has no class of its own for it


def _refused(error: HfHubHTTPError, to: Repository, token: str) -> SurgeryError:
    """What the Hub's refusal means for a push."""
    from huggingface_hub import errors

    status = error.response.status_code
    said = _scrubbed(error.server_message or "", token)
    quoted = f": {said}" if said else ""
    page, org = f"{endpoint()}/{to.repo_id}", to.repo_id.partition("/")[0]
    if status >= 500 or status == 408:
        return SurgeryError(f"the Hub fails (HTTP {status})", where=to, hint=f"Wait a little. {AGAIN}")
    if status == 429:
        wait = _asked_to_wait(error.response.headers)
        hint = f"It asks to wait {wait:,.0f} seconds. {AGAIN}" if wait else f"Wait some minutes. {AGAIN}"
        return SurgeryError("the Hub limits how often you may ask (HTTP 429)", where=to, hint=hint)
    if not str(error.response.url).startswith(endpoint()):
        return SurgeryError(f"the Hub's storage refuses a file (HTTP {status})", where=to, hint=AGAIN)
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return wrong_token(to)
    if status in (401, 403):
        return SurgeryError(
            f"your token may not write here (HTTP {status}{quoted})",
            where=to,
            hint=f"Use one with write access to {org} ({endpoint()}/settings/tokens), or propose it with --pr.",
        )
    if status in MOVED:
        return MovedError(f"somebody else pushed in between (HTTP {status})", where=to, hint=AGAIN)
    if isinstance(error, errors.RevisionNotFoundError):
        return SurgeryError("has no such branch", where=to, hint=f"They are listed at {page}/tree/main.")
    if status == 404:
        return SurgeryError(
            f"no user or organisation {org}, or your token has no access to it (HTTP 404)",
            where=to,
            hint="Check the spelling, and what the token may write.",
        )
    return SurgeryError(f"the Hub refuses (HTTP {status}{quoted})", where=to)


def _unreachable(to: Repository, error: BaseException) -> SurgeryError:
    return SurgeryError(
        f"cannot reach the Hub at {endpoint()} ({failure(error)})",
        where=to,
        hint=f"Check the connection (and HF_ENDPOINT, if set). {AGAIN}",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub import errors

    offline = isinstance(error, errors.OfflineModeIsEnabled)
    return isinstance(error, (transport_error(), ConnectionError, TimeoutError)) and not offline


def _asked_to_wait(headers: Any) -> float | None:
    """The seconds that an answer asks to wait: `Retry-After: 30`, or `RateLimit: "api";r=0;t=30`."""
    if (value := str(headers.get("Retry-After", "")).strip()).isdecimal():
        return float(value)
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", str(headers.get("RateLimit", "")))
    return float(limit[1]) if limit else None


def _scrubbed(text: str, token: str) -> str:
    """The Hub's own words in one line: without the token, anything that looks like one, and signed addresses."""
    if token:
        text = text.replace(token, "…")
    text = re.sub(r"\b(?:hf|api_org)_\w+|\beyJ[\w.-]+", "…", text)
    return _one_line(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text))


def _one_line(text: str) -> str:
    line = " ".join(text.split()).lstrip("- ").rstrip(".")
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}…"
