"""Ask the Hub whether a repository is private."""

from __future__ import annotations

from typing import Literal

from surgery.hub.client import guarded, quiet_client
from surgery.hub.errors import MALFORMED, RefusedAnswerError, http_error_types
from surgery.hub.settings import endpoint, is_offline, request_timeout

RepositoryKind = Literal["model", "dataset"]
Visibility = Literal["public", "private", "hidden", "unknown"]
"""hidden: there is no such repository, or none that the token may see. unknown: the Hub cannot be asked."""


def visibility(repo_id: str, kind: RepositoryKind = "model") -> Visibility:
    """Return who may see a repository. Nothing is raised: who asks treats what is not known as private."""
    from huggingface_hub import HfApi, errors

    if is_offline():
        return "unknown"
    api, timeout = HfApi(endpoint=endpoint()), request_timeout()
    try:
        with guarded(), quiet_client():
            if kind == "dataset":
                private = api.dataset_info(repo_id, timeout=timeout).private
            else:
                private = api.model_info(repo_id, timeout=timeout).private
    # Gated ones are listed for everybody: `model_info` succeeds.
    except errors.RepositoryNotFoundError:
        return "hidden"
    except (errors.HfHubHTTPError, *http_error_types(), OSError, ValueError, RefusedAnswerError, *MALFORMED):
        return "unknown"
    # `is False`: an answer that does not say so is none.
    return "public" if private is False else "private"
