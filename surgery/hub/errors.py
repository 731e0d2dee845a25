"""Translate errors of Hub downloads into `SurgeryError`: one line each, with the next step.

The text of what huggingface_hub raises is never repeated, because it may quote a token. The errors of uploads are in
`surgery.publish.upload_errors`, which uses the helpers of this module.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from surgery.errors import SurgeryError
from surgery.hub.settings import cache_dir, shown_endpoint
from surgery.io.redaction import holds_secret

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_A_HUB = "the answer is not a Hub's"
TOKEN_HINT = "log in with `hf auth login`, or set HF_TOKEN"  # noqa: S105  # no token, but how to give one


class Repository(Protocol):
    """A repository that is read or written; its text becomes the `where` of errors."""

    @property
    def repo_id(self) -> str:
        """org/name."""


class UnreachableError(SurgeryError):
    """The Hub did not answer, or not as a Hub does."""


class RefusedAnswerError(Exception):
    """An answer that no Hub may give, whatever asked for it: `what` is wrong, and `hint`, the next step.

    Raised inside of huggingface_hub, by what `surgery.hub.client` has it call; so it is no OSError or ValueError, which
    that would take for a failure of the network.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


# What huggingface_hub fails with when an answer has another form than it believes, e.g. a list for a table.
MALFORMED = (TypeError, LookupError, AttributeError, NameError, AssertionError, RecursionError, OverflowError)


@contextmanager
def translate_errors(repository: Repository) -> Iterator[None]:
    """Raise what huggingface_hub raises in the block as a `SurgeryError` about `repository`.

    In the block stand calls of huggingface_hub alone: a TypeError of it means an answer of another form.
    """
    from huggingface_hub import errors

    try:
        yield
    except (RefusedAnswerError, errors.LocalEntryNotFoundError, OSError, *http_error_types()) as error:
        raise _translated(error, repository) from shown_cause(error)
    except (ValueError, *MALFORMED) as error:  # not JSON: a login page of the network, or a wrong HF_ENDPOINT
        raise _unreachable(repository, NOT_A_HUB) from shown_cause(error)
    except RuntimeError as error:  # hf_xet, which moves large files, has no class of its own for a failed transfer
        raise _translated(error, repository) from shown_cause(error)


def shown_cause(error: BaseException) -> BaseException | None:
    """Return `error` to raise another from, or None where its text or that of a cause quotes a token.

    Tracebacks show all of these texts, and those of a server may quote what was sent to it.
    """
    return None if any(holds_secret(f"{each} {each!r}") for each in causes(error)) else error


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and all that it came from; the library wraps errors in each other."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def refused_answer(error: BaseException) -> RefusedAnswerError | None:
    """Return the RefusedAnswerError that `error` came from, which the client may have wrapped; None without any."""
    return next((cause for cause in causes(error) if isinstance(cause, RefusedAnswerError)), None)


def http_error_types() -> tuple[type[Exception], type[Exception]]:
    """Return what huggingface_hub's HTTP library raises: its base class, and that of addresses it cannot read.

    An answer may lead to such an address.
    """
    library = http_library()
    return library.HTTPError, library.InvalidURL


def http_library() -> Any:
    """Return the HTTP library of huggingface_hub: httpx, and httpx2 from some version on."""
    from huggingface_hub import errors

    # Its error is imported by huggingface_hub but not exported, so that type checkers do not find it as an attribute.
    return import_module(vars(errors)["HTTPError"].__module__.partition(".")[0])


def connection_failure(error: BaseException) -> str:
    """Return why the Hub was not reached: the first system error's text in the chain, else the exception's name."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if isinstance(cause, http_library().TimeoutException):
            return "it does not answer in time, or too slowly"
    return type(error).__name__


def no_space_error(what: str, repository: Repository) -> SurgeryError:
    """Return the error for a cache on a disk that is too small."""
    hint = "Free some space, or set HF_HUB_CACHE to a folder on a larger disk."
    return SurgeryError(what, where=repository, hint=hint)


def cache_error(error: OSError, repository: Repository) -> SurgeryError:
    """Return the error for a cache that cannot be written."""
    if error.errno in NO_SPACE:
        return no_space_error(f"the disk filled up while downloading to {cache_dir()}", repository)
    return SurgeryError(
        f"the cache at {cache_dir()} cannot be written", where=repository, hint="Set HF_HUB_CACHE to a folder of yours."
    )


def invalid_token_error(where: object) -> SurgeryError:
    """Return the error for a token that the Hub does not know."""
    return SurgeryError(
        "the Hub does not accept your token", where=where, hint=f"To replace it {TOKEN_HINT}; or unset it."
    )


def _translated(error: BaseException, repository: Repository) -> SurgeryError:
    from huggingface_hub import errors

    if refused := refused_answer(error):
        return SurgeryError(refused.what, where=repository, hint=refused.hint)
    if isinstance(error, RuntimeError):
        hint = "Run the command again; finished files are kept."
        return SurgeryError("the download broke off", where=repository, hint=hint)
    # LocalEntryNotFoundError means "could not ask, and nothing is cached". Why not is in its cause.
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _translated(error.__cause__, repository) if error.__cause__ else _unreachable(repository, "no answer")
    # From here on the order matters: HTTP errors and FileMetadataError are OSErrors too.
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repository)
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in NO_SPACE):
        return cache_error(error, repository)
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return SurgeryError(
            "a file arrived with the wrong size", where=repository, hint="Run the command again to fetch it anew."
        )
    if isinstance(error, errors.FileMetadataError):
        return _unreachable(repository, NOT_A_HUB)
    return _unreachable(repository, connection_failure(error))


def _refused(error: HfHubHTTPError, repository: Repository) -> SurgeryError:
    """Return what a refused request means for a download."""
    from huggingface_hub import errors, get_token

    status = error.response.status_code
    page = f"{shown_endpoint()}/{repository.repo_id}"
    if status >= 500:
        return _unreachable(repository, f"HTTP {status}")
    # Classes before the status: the Hub answers 401 also for a repository that is missing, so as not to tell whether a
    # private one exists. And GatedRepoError is a subclass of RepositoryNotFoundError.
    if isinstance(error, errors.GatedRepoError):
        then = "then ask again" if get_token() else f"then {TOKEN_HINT}"
        what, hint = "is gated: its authors ask you to accept terms first", f"Accept them at {page}, {then}."
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = "has no such revision", f"Its branches and tags are listed at {page}/tree/main."
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"no such model at {shown_endpoint()}, or it is private and"
        if get_token():
            what, hint = f"{what} your token may not read it", "Check the spelling, and what the token may read."
        else:
            what, hint = f"{what} needs a token", f"Check the spelling; for a private model {TOKEN_HINT}."
    elif status == 401:
        return invalid_token_error(repository)
    elif status == 404:
        what, hint = "a file of its listing is not there (HTTP 404)", "Run the command again."
    elif status == 429:
        what = "the Hub limits how often you may ask (HTTP 429)"
        hint = f"Wait some minutes; with a token the limit is higher: {TOKEN_HINT}."
    else:
        what, hint = f"the Hub refuses (HTTP {status})", f"See {page} for the reason."
    return SurgeryError(what, where=repository, hint=hint)


def _unreachable(repository: Repository, reason: str) -> UnreachableError:
    hint = "Check the connection (and HF_ENDPOINT, if set), or give a local folder."
    return UnreachableError(f"cannot reach the Hub at {shown_endpoint()} ({reason})", where=repository, hint=hint)
