"""Push an output folder to the Hub: one commit of `org/name`, of its branch, or a pull request.

What has arrived of an upload that broke off stays on the Hub unseen, and is not sent again; the commit comes last, so
that readers see all of the new files or none. OUT is only read. The token is taken from HF_TOKEN or the stored login,
and is in no text that leaves this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub.client import guarded
from surgery.hub.errors import TOKEN_HINT
from surgery.hub.file_selection import WEIGHTS_SUFFIX
from surgery.hub.settings import endpoint, is_offline
from surgery.io.redaction import redact
from surgery.publish.commit_plan import (
    HubDestination,
    UploadPrivacy,
    parse_destination,
    upload_sizes,
)
from surgery.publish.model_card import HubCard, build_hub_card
from surgery.publish.package import CARD, UploadPackage, check_hashes, collect_files
from surgery.publish.upload_errors import MovedError, capture_hub_logs, translate_upload_errors
from surgery.publish.upload_session import Notify, PushResult, UploadSession

TOKEN_SCAN_BYTES = 10_000_000  # largest file that is searched for the token: notes and configs are far smaller


@dataclass(frozen=True)
class PushPreview:
    """What `push` would send: name → size in bytes of every file, and the metadata of the card."""

    repo_id: str
    files: Mapping[str, int]
    n_bytes: int
    card: HubCard


def preview_push(out: Path, repo_id: str, *, revision: str | None = None, pr: bool = False) -> PushPreview:
    """Return what `push` would send, without asking the Hub or reading a tensor. Raises SurgeryError as `push`."""
    target = parse_destination(repo_id, revision, pr)
    package = collect_files(out)
    card = build_hub_card(package, _model_name(target))
    files = upload_sizes(package, card)
    return PushPreview(repo_id, files, sum(files.values()), card)


def push(
    out: Path,
    repo_id: str,
    *,
    private: bool = False,
    public: bool = False,
    vouched: bool | None = None,
    revision: str | None = None,
    pr: bool = False,
    message: str | None = None,
    verify: bool = True,
    recipe: tuple[str, str] | None = None,
    options: ExecutionOptions = ExecutionOptions(),
    notify: Notify = lambda text: None,
    bars: bool = False,
) -> PushResult:
    """Send the folder `out` to `repo_id` on the Hub as one commit; create the repository or branch if missing.

    A repository that is created is private, unless `public` says otherwise; one that exists stays as it is.

    Example:
        surgery.push(Path("OUT"), "org/name")

    Args:
        private: refuse a repository that exists and is public.
        public: make a repository that is created public.
        vouched: whether the user says that everybody may have what was made from local files; by default `public` says
            so. What was made from private repositories never becomes public.
        revision: the branch to push to; refs/pr/N adds to a pull request.
        pr: open a pull request with the commit, against main.
        message: the commit's; by default it names the command that made `out`.
        verify: read every tensor and compare its hash with surgery.json's before anything is sent.
        recipe: name and YAML text of the recipe that `out` is a step of, for the card.
        notify: called with a line of text that people should know while they wait.
        bars: whether huggingface_hub draws its bars on stderr.

    Raises:
        SurgeryError: no token, or one that may not write there; offline mode; `out` was not written by surgery, or is
            not what its manifest says; it would become public, and was made from what is private; the Hub holds weights
            of another origin; it cannot be reached, or refuses.
    """
    if private and public:
        raise usage_error("got private and public, expected one of them", where=repo_id)
    target = parse_destination(repo_id, revision, pr)
    token = _read_token(target)
    package = collect_files(out)
    card = build_hub_card(package, _model_name(target), recipe=recipe)
    _check_no_token(package, card, token)
    from huggingface_hub import HfApi

    with guarded(), capture_hub_logs(notify, bars=bars):
        privacy = UploadPrivacy(package, private, public, vouched=public if vouched is None else vouched)
        session = UploadSession(HfApi(endpoint=endpoint(), token=token), target, privacy, notify)
        # What the Hub forbids shows here, before hours of hashing; nothing is created before the hashes are right.
        session.check_token()
        session.check_allowed(session.read_remote(), package)
        if package.local_refs:
            notify(f"Nobody else has what it was made from, so nobody can make it again: {listing(package.local_refs)}")
        if verify:
            check_hashes(package, options=options)
        text = redact(message or f"Push {package.kind} made by {package.command.get('name', 'surgery')}")
        return _send_twice(session, package, card, text, notify)


def _send_twice(
    session: UploadSession, package: UploadPackage, card: HubCard, message: str, notify: Notify
) -> PushResult:
    """Send `package`, and again if the branch moved meanwhile."""
    try:
        return session.send(package, card, message=message)
    except MovedError as moved:
        notify(f"{moved.where}: {moved.what}. Looking again.")
    # Once more only: uploaded files are not sent again, but a branch that keeps moving is for people to settle.
    return session.send(package, card, message=message)


def _read_token(target: HubDestination) -> str:
    from huggingface_hub import get_token

    if is_offline():
        raise usage_error("offline mode is on, so nothing can be pushed", where=target, hint="Unset HF_HUB_OFFLINE.")
    with translate_upload_errors(target):
        token = get_token()
    if not token:
        raise usage_error("pushing needs a token", where=target, hint=f"To give one {TOKEN_HINT}.")
    return token


def _check_no_token(package: UploadPackage, card: HubCard, token: str) -> None:
    """Raise SurgeryError where a file to upload contains the token."""
    secret = token.encode()
    for file in package.files:
        is_searched = file.size <= TOKEN_SCAN_BYTES and not file.name.endswith(WEIGHTS_SUFFIX)
        # Of the card, what is uploaded is not the folder's file but the completed text.
        if is_searched and secret in (card.text.encode() if file.name == CARD else file.path.read_bytes()):
            raise SurgeryError(
                "holds your Hub token, so nothing was sent",
                where=file.path,
                hint="Remove it from the file, and replace the token: others may have read it.",
            )


def _model_name(target: HubDestination) -> str:
    return target.repo_id.partition("/")[2]
