"""Translate errors, waits and logs of Hub uploads: one line each, with the next step, without secrets."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.hub.client import CLIENT_LOGGER, requested_delay
from surgery.hub.errors import (
    MALFORMED,
    NO_SPACE,
    NOT_A_HUB,
    RefusedAnswerError,
    Repository,
    causes,
    connection_failure,
    http_error_types,
    invalid_token_error,
    refused_answer,
    shown_cause,
)
from surgery.hub.settings import cache_dir, endpoint, shown_endpoint
from surgery.io.redaction import SHOWN, redact
from surgery.runtime.terminal import library_bars

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

RESUME_HINT = "Run the same command again: what has arrived is not sent twice."
MOVED = (409, 412)  # HTTP status of a commit whose parent is no longer the branch's head
MAX_QUOTE = 200  # characters of the Hub's own words that a message repeats
# What the client logs before it waits by itself. Its words are no part of its API: without a match no line appears.
_WAITING = re.compile(r"(?:Rate limited\. Waiting|Retrying in) ([\d.]+)s")
_BAD_CARD = "validating metadata in README.md"


class MovedError(SurgeryError):
    """Somebody else pushed in between."""


@contextmanager
def capture_hub_logs(notify: Callable[[str], None], *, bars: bool) -> Iterator[None]:
    """Replace what huggingface_hub logs in the block by lines for `notify`: its own texts quote signed addresses."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger(CLIENT_LOGGER)
    handlers, propagates = logger.handlers, logger.propagate
    hides = not bars and not are_progress_bars_disabled()
    # Recorded, not raised: the client calls its HTTP library in a way that is deprecated there.
    with warnings.catch_warnings(record=True) as caught:
        # By default Python reports a warning once per place, so that a second push would lose what the Hub says.
        warnings.simplefilter("always")
        try:
            logger.handlers, logger.propagate = [_WaitHandler(notify)], False
            if hides:
                disable_progress_bars()
            with library_bars() if bars else nullcontext():
                yield
        finally:
            logger.handlers, logger.propagate = handlers, propagates
            if hides:
                enable_progress_bars()
    for warning in caught:
        if _BAD_CARD in str(warning.message):
            notify(f"The Hub says of the card: {_quotable(str(warning.message).partition(':')[2])}")


class _WaitHandler(logging.Handler):
    """Log handler that passes on how long the client waits, and nothing else."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if waiting := _WAITING.match(message):
            why = "asks to wait" if message.startswith("Rate") else "did not answer as it should"
            self._notify(f"The Hub {why}: trying again in {float(waiting[1]):g} s.")


def retry_delay(error: BaseException, attempt: int, *, retry: bool) -> float | None:
    """Return the seconds to wait before a repetition; None where that helps nothing or, without `retry`, is risky."""
    response = getattr(error, "response", None)
    if response is None:
        return 2.0**attempt if retry and _is_transport(error) else None
    # Refused before anything was done: safe to repeat even without `retry`.
    if response.status_code == 429:
        return requested_delay(response.headers) or 2.0**attempt
    return 2.0**attempt if retry and response.status_code >= 500 else None


@contextmanager
def translate_upload_errors(
    target: Repository, *, passthrough: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise what huggingface_hub raises in the block as a `SurgeryError`, except errors of the types `passthrough`."""
    try:
        yield
    except (RefusedAnswerError, OSError, ValueError, RuntimeError, *http_error_types(), *MALFORMED) as error:
        if isinstance(error, passthrough):
            raise
        raise _translated(error, target) from shown_cause(error)


def _translated(error: BaseException, target: Repository) -> SurgeryError:
    from huggingface_hub import errors

    if refused := refused_answer(error):
        return SurgeryError(refused.what, where=target, hint=refused.hint)

    # The client wraps errors; what tells them apart may be any of the causes.
    chain = list(causes(error))
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        quote = _quotable(str(error).partition("\n")[2])
        return SurgeryError(f"the Hub refuses the card's metadata: {quote}", where=target, hint="Mend README.md.")
    if isinstance(error, ValueError) and "LFS batch API" in str(error):
        quote = _quotable(str(error).rpartition("`")[2])
        return SurgeryError(f"the Hub's storage refuses a file: {quote}", where=target)
    if refusal := next((each for each in chain if isinstance(each, errors.HfHubHTTPError)), None):
        return _refused(refusal, target)
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return SurgeryError("offline mode is on", where=target, hint="Unset HF_HUB_OFFLINE.")
    if full := next((each for each in chain if isinstance(each, OSError) and each.errno in NO_SPACE), None):
        where = full.filename or cache_dir()
        return SurgeryError("the disk filled up while sending", where=where, hint=f"Free some space. {RESUME_HINT}")
    if any(_is_transport(each) for each in chain):
        return _unreachable(target, error)
    if isinstance(error, OSError):
        return SurgeryError(
            f"cannot be read ({error.strerror or type(error).__name__})", where=error.filename or target
        )
    if isinstance(
        error, (ValueError, *MALFORMED)
    ):  # not JSON, or not what was asked: a login page, or a wrong HF_ENDPOINT
        return SurgeryError(
            f"cannot push to {shown_endpoint()} ({NOT_A_HUB})", where=target, hint="Check HF_ENDPOINT and the network."
        )
    return SurgeryError("the upload broke off", where=target, hint=RESUME_HINT)  # hf_xet has no class of its own for it


def _refused(error: HfHubHTTPError, target: Repository) -> SurgeryError:
    """Return what a refused request means for a push."""
    from huggingface_hub import errors

    status = error.response.status_code
    quote = _quotable(error.server_message or "")
    quoted = f": {quote}" if quote else ""
    page, org = f"{shown_endpoint()}/{target.repo_id}", target.repo_id.partition("/")[0]
    if status >= 500 or status == 408:
        return SurgeryError(f"the Hub fails (HTTP {status})", where=target, hint=f"Wait a little. {RESUME_HINT}")
    if status == 429:
        wait = requested_delay(error.response.headers)
        hint = f"It asks to wait {wait:,.0f} seconds. {RESUME_HINT}" if wait else f"Wait some minutes. {RESUME_HINT}"
        return SurgeryError("the Hub limits how often you may ask (HTTP 429)", where=target, hint=hint)
    # The storage answers for itself: its 403 is an expired signature, not a missing right.
    if not str(error.response.url).startswith(endpoint()):
        return SurgeryError(f"the Hub's storage refuses a file (HTTP {status})", where=target, hint=RESUME_HINT)
    # A 401 with RepositoryNotFoundError is a valid token without access.
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return invalid_token_error(target)
    if status in (401, 403):
        return SurgeryError(
            f"your token may not write here (HTTP {status}{quoted})",
            where=target,
            hint=f"Use one with write access to {org} ({shown_endpoint()}/settings/tokens), or propose it with --pr.",
        )
    if status in MOVED:
        return MovedError(f"somebody else pushed in between (HTTP {status})", where=target, hint=RESUME_HINT)
    if isinstance(error, errors.RevisionNotFoundError):
        return SurgeryError("has no such branch", where=target, hint=f"They are listed at {page}/tree/main.")
    if status == 404:
        return SurgeryError(
            f"no user or organisation {org}, or your token has no access to it (HTTP 404)",
            where=target,
            hint="Check the spelling, and what the token may write.",
        )
    return SurgeryError(f"the Hub refuses (HTTP {status}{quoted})", where=target)


def _unreachable(target: Repository, error: BaseException) -> SurgeryError:
    return SurgeryError(
        f"cannot reach the Hub at {shown_endpoint()} ({connection_failure(error)})",
        where=target,
        hint=f"Check the connection (and HF_ENDPOINT, if set). {RESUME_HINT}",
    )


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub import errors

    # A ConnectionError too, but asking again cannot help.
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    return isinstance(error, (*http_error_types(), ConnectionError, TimeoutError)) and not offline


def _quotable(text: str) -> str:
    """Return the Hub's own words as one line without tokens, anything that looks like one, and signed addresses."""
    text = re.sub(r"\b(?:hf|api_org)_\w+|\beyJ[\w.-]+", SHOWN, redact(text))
    # A storage address is signed by its query: who has it may upload.
    return _one_line(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text))


def _one_line(text: str) -> str:
    line = " ".join(text.split()).lstrip("- ").rstrip(".")
    return line if len(line) <= MAX_QUOTE else f"{line[:MAX_QUOTE]}…"
