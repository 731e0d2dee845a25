"""What can go wrong while something is fetched from the Hub: each fault in one line, with the next step.

In comes what huggingface_hub raises, out comes a `SurgeryError`. Its text is never repeated: it may quote a token.
What is said of writing stands in `surgery.publish.upload_errors`, which shares the words and the kinds of faults of
this one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from surgery.errors import SurgeryError
from surgery.hub.settings import cache, endpoint

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_A_HUB = "the answer is not a Hub's"
TOKEN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


class Repository(Protocol):
    """The one that is read or written: its text is the `where` of errors."""

    @property
    def repo_id(self) -> str:
        """org/name."""


class UnreachableError(SurgeryError):
    """The Hub did not answer, or not as a Hub does."""


@contextmanager
def translate_errors(place: Repository) -> Iterator[None]:
    """Turns what huggingface_hub raises in the block into a `SurgeryError`."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, OSError, transport_error()) as error:
        raise _explain(error, place) from error
    except ValueError as error:  # not JSON: a login page of the network, or a wrong HF_ENDPOINT
        raise _unreachable(place, NOT_A_HUB) from error
    except RuntimeError as error:  # hf_xet, which moves large files, has no class of its own for a failed transfer
        raise SurgeryError(
            "the download broke off", where=place, hint="Run the command again; finished files are kept."
        ) from error


def transport_error() -> type[Exception]:
    """The base of all that the HTTP library of huggingface_hub raises: httpx, and httpx2 from some version on."""
    from huggingface_hub import errors

    base: type[Exception] = vars(errors)["HTTPError"]
    return base


def failure(error: BaseException) -> str:
    """What kept us from the Hub, by kind: the innermost system error's words, else the exception's name."""
    name = type(error).__name__
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return name


def no_space(what: str, place: Repository) -> SurgeryError:
    """The error where the cache's disk is too small."""
    return SurgeryError(what, where=place, hint="Free some space, or set HF_HUB_CACHE to a folder on a larger disk.")


def wrong_token(where: object) -> SurgeryError:
    """The error where the Hub does not know the token that it was given."""
    return SurgeryError(
        "the Hub does not accept your token", where=where, hint=f"To replace it {TOKEN_HINT}; or unset it."
    )


def _explain(error: BaseException, place: Repository) -> SurgeryError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # "could not ask, and nothing is cached": why not?
        return _explain(error.__cause__, place) if error.__cause__ else _unreachable(place, "no answer")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, place)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return no_space(f"the disk filled up while downloading to {cache()}", place)
    if isinstance(error, PermissionError):
        return SurgeryError(
            f"the cache at {cache()} cannot be written",
            where=place,
            hint="Set HF_HUB_CACHE to a folder of yours.",
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return SurgeryError(
            "a file arrived with the wrong size", where=place, hint="Run the command again to fetch it anew."
        )
    if isinstance(error, errors.FileMetadataError):
        return _unreachable(place, NOT_A_HUB)
    return _unreachable(place, failure(error))


def _refused(error: HfHubHTTPError, place: Repository) -> SurgeryError:
    """What the Hub's refusal means for one who reads."""
    from huggingface_hub import errors, get_token

    status = error.response.status_code
    page = f"{endpoint()}/{place.repo_id}"
    if status >= 500:
        return _unreachable(place, f"HTTP {status}")
    if isinstance(error, errors.GatedRepoError):
        then = "then ask again" if get_token() else f"then {TOKEN_HINT}"
        what, hint = "is gated: its authors ask you to accept terms first", f"Accept them at {page}, {then}."
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = "has no such revision", f"Its branches and tags are listed at {page}/tree/main."
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"no such model at {endpoint()}, or it is private and"
        if get_token():
            what, hint = f"{what} your token may not read it", "Check the spelling, and what the token may read."
        else:
            what, hint = f"{what} needs a token", f"Check the spelling; for a private model {TOKEN_HINT}."
    elif status == 401:
        return wrong_token(place)
    elif status == 404:
        what, hint = "a file of its listing is not there (HTTP 404)", "Run the command again."
    elif status == 429:
        what = "the Hub limits how often you may ask (HTTP 429)"
        hint = f"Wait some minutes; with a token the limit is higher: {TOKEN_HINT}."
    else:
        what, hint = f"the Hub refuses (HTTP {status})", f"See {page} for the reason."
    return SurgeryError(what, where=place, hint=hint)


def _unreachable(place: Repository, reason: str) -> UnreachableError:
    hint = "Check the connection (and HF_ENDPOINT, if set), or give a local folder."
    return UnreachableError(f"cannot reach the Hub at {endpoint()} ({reason})", where=place, hint=hint)
