"""Writing to the Hub: a folder that surgery wrote → one commit of `org/name`, its branch, or a pull request.

In comes OUT, out comes a `PushResult` with the page's address. What has arrived of an upload that broke off stays on
the Hub unseen, and is not sent again; the commit comes last, so that readers see all of the new files or none. OUT is
only read. The token is taken from HF_TOKEN or the stored login, and is in no text that leaves this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub import download as hub
from surgery.hub.errors import TOKEN_HINT
from surgery.hub.settings import endpoint, is_offline
from surgery.publish.commit_plan import (
    MAIN,
    PULL_REQUESTS,
    Destination,
    Remote,
    additions,
    check_destination,
    destination,
    removals,
    sizes,
)
from surgery.publish.model_card import HubCard, hub_card
from surgery.publish.package import CARD, UploadPackage, check_hashes, collect_files
from surgery.publish.upload_errors import MovedError, capture_hub_logs, seconds_to_wait, translate_upload_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

# Files sent at a time: what of them has arrived counts, should the upload break off later.
AT_ONCE = 5
TRIES = 4  # of a request that the client does not repeat by itself
LONGEST_WAIT = 900  # seconds that a busy Hub may ask us to wait
SEARCHED = 10_000_000  # bytes up to which files are searched for the token

Result = TypeVar("Result")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class PushResult:
    """Where OUT lies now.

    url: the page to open: the pull request's, the branch's, else the repository's. revision: a branch, or refs/pr/N.
    commit: 40 hex digits. changed: False where the Hub had every file already, and no commit was made. removed: files
    of what was there before.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    changed: bool
    files: int
    n_bytes: int
    removed: Sequence[str]


@dataclass(frozen=True)
class PushPreview:
    """What `push` would send: name → size in bytes of every file, and the metadata of the card."""

    repo_id: str
    files: Mapping[str, int]
    n_bytes: int
    card: HubCard


def preview_push(out: Path, repo_id: str, *, revision: str | None = None, pr: bool = False) -> PushPreview:
    """What `push` would send; the Hub is not asked, and no tensor is read. Raises SurgeryError as `push`."""
    to = destination(repo_id, revision, pr)
    parcel = collect_files(out)
    card = hub_card(parcel, _name(to))
    files = sizes(parcel, card)
    return PushPreview(repo_id, files, sum(files.values()), card)


def push(
    out: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pr: bool = False,
    message: str | None = None,
    verify: bool = True,
    recipe: tuple[str, str] | None = None,
    options: ExecutionOptions = ExecutionOptions(),
    notify: Notify = lambda text: None,
    bars: bool = False,
) -> PushResult:
    """Sends the folder `out` to `repo_id` on the Hub, as one commit; a repository or branch that is missing is made.

    Args:
        private: make the repository private.
        revision: the branch to push to; refs/pr/N adds to a pull request.
        pr: open a pull request with the commit, against main.
        message: the commit's; by default it names the command that made `out`.
        verify: read every tensor and compare its hash with surgery.json's before anything is sent.
        recipe: name and YAML text of the recipe that `out` is a step of, for the card.
        notify: is told, in a line, what people should know while they wait.
        bars: whether huggingface_hub draws its bars on stderr.

    Raises:
        SurgeryError: no token, or one that may not write there; offline mode; `out` was not written by surgery, or is
            not what its manifest says; the Hub holds weights of another origin; it cannot be reached, or refuses.
    """
    to = destination(repo_id, revision, pr)
    token = _token(to)
    parcel = collect_files(out)
    card = hub_card(parcel, _name(to), recipe=recipe)
    _check_secret(parcel, card, token)
    from huggingface_hub import HfApi

    with capture_hub_logs(notify, bars=bars):
        session = _Session(HfApi(endpoint=endpoint(), token=token), to, token, notify)
        session.check_token()
        check_destination(session.look(), to, parcel, private)
        if parcel.local_refs:
            notify(f"Nobody else has what it was made from, so nobody can make it again: {listing(parcel.local_refs)}")
        if verify:
            check_hashes(parcel, options=options)
        text = message or f"Push {parcel.kind} made by {parcel.command.get('name', 'surgery')}"
        for last in (False, True):
            try:
                return session.send(parcel, card, private=private, message=text)
            except MovedError as moved:
                if last:
                    raise
                notify(f"{moved.where}: {moved.what}. Looking again.")
    raise AssertionError("the second try returns or raises")


class _Session:
    """One push: every request to the Hub is made here."""

    def __init__(self, api: HfApi, to: Destination, token: str, notify: Notify) -> None:
        self._api, self._to, self._token, self._notify = api, to, token, notify
        self._before: str | None = None  # the commit that was there first

    def check_token(self) -> None:
        """Raises SurgeryError where the Hub does not know the token, or it can only read."""
        who = self._ask(self._api.whoami)
        access = (who.get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read" and not self._to.pr:
            raise SurgeryError(
                "your token can only read",
                where=self._to,
                hint=f"Make one that may write at {endpoint()}/settings/tokens, and set HF_TOKEN to it.",
            )

    def look(self) -> Remote | None:
        """What is there now; None where there is no such repository, or none that the token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        to = self._to
        try:
            info = self._ask(lambda: self._api.model_info(to.repo_id), passing=RepositoryNotFoundError)
        except RepositoryNotFoundError:
            return None
        is_new = False
        if to.revision:
            try:
                there = self._ask(
                    lambda: self._api.model_info(to.repo_id, revision=to.revision), passing=RevisionNotFoundError
                )
                info = there
            except RevisionNotFoundError as error:
                if to.revision.startswith(PULL_REQUESTS):
                    raise SurgeryError("has no such pull request", where=to) from error
                is_new = True
        files = frozenset(file.rfilename for file in info.siblings or ())
        return Remote(str(info.sha), bool(info.private), files, is_new)

    def send(self, parcel: UploadPackage, card: HubCard, *, private: bool, message: str) -> PushResult:
        """Uploads and commits. Raises MovedError where the branch moved meanwhile, else SurgeryError."""
        remote = self.look()
        if remote is None:
            self._make(private)
            remote = self.look()
        if remote is None:
            raise SurgeryError(
                "is taken, but your token may not see it",
                where=self._to,
                hint="Choose another name, or use a token with access to it.",
            )
        check_destination(remote, self._to, parcel, private)
        self._before = self._before or remote.commit
        if remote.is_new:
            self._make_branch(remote.commit)
        adding = additions(parcel, card, remote)
        removing = removals(parcel, remote)
        # The card first: it is small, and whether one may write here shows before gigabytes are read.
        self._upload([each for each in adding if each.path_in_repo == CARD])
        for first in range(0, len(adding), AT_ONCE):
            self._upload(adding[first : first + AT_ONCE])
        removed = tuple(each.path_in_repo for each in removing)
        if removed:
            self._notify(f"{self._to}: what an earlier push left, and {parcel.folder} lacks, goes: {listing(removed)}")
        parcel.check_unchanged()
        made = self._commit([*removing, *adding], remote.commit, message)
        revision, url = self._page(made)
        files = sizes(parcel, card)
        # Not the commit of this try: the answer to an earlier one, which was made, may have been lost.
        changed = made.oid != self._before
        repo_id = self._to.repo_id
        return PushResult(repo_id, revision, made.oid, url, changed, len(files), sum(files.values()), removed)

    def _make(self, private: bool) -> None:
        repo_id = self._to.repo_id
        self._ask(lambda: self._api.create_repo(repo_id, private=private or None, exist_ok=True))

    def _make_branch(self, commit: str) -> None:
        to = self._to
        self._ask(lambda: self._api.create_branch(to.repo_id, branch=to.branch, revision=commit, exist_ok=True))

    def _upload(self, files: Sequence[CommitOperationAdd]) -> None:
        with translate_upload_errors(self._to, self._token):  # the client itself tries again
            self._api.preupload_lfs_files(
                self._to.repo_id,
                files,
                revision=self._to.branch,
                create_pr=self._to.pr,
                free_memory=False,
                gitignore_content="",  # the repository's own would leave files out in silence
            )

    def _commit(
        self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], parent: str, message: str
    ) -> CommitInfo:
        to = self._to
        return self._ask(
            lambda: self._api.create_commit(
                to.repo_id,
                operations,
                commit_message=message,
                revision=to.branch,
                create_pr=to.pr,
                parent_commit=parent,
            ),
            # Whether a pull request was opened cannot be told from an answer that did not come.
            again=not to.pr,
        )

    def _page(self, made: CommitInfo) -> tuple[str, str]:
        """The branch that holds the commit, and the page to look at."""
        page = f"{endpoint()}/{self._to.repo_id}"
        branch = self._to.branch
        if made.pr_url:
            return made.pr_revision or branch, made.pr_url
        if branch.startswith(PULL_REQUESTS):
            return branch, f"{page}/discussions/{branch.removeprefix(PULL_REQUESTS)}"
        return branch, page if branch == MAIN else f"{page}/tree/{quote(branch, safe='')}"

    def _ask(
        self,
        request: Callable[[], Result],
        *,
        passing: type[Exception] | tuple[type[Exception], ...] = (),
        again: bool = True,
    ) -> Result:
        """`request`, made again when the Hub is busy, and with `again` when it fails. `passing` are not explained."""
        for attempt in range(TRIES):
            with translate_upload_errors(self._to, self._token, passing=passing):
                try:
                    return request()
                except Exception as error:
                    seconds = seconds_to_wait(error, attempt, again=again)
                    if seconds is None or seconds > LONGEST_WAIT or attempt + 1 == TRIES:
                        raise
            self._notify(f"{self._to}: the Hub is busy or did not answer; asking again in {seconds:g} s.")
            time.sleep(seconds)
        raise AssertionError("the last try returns or raises")


def _token(to: Destination) -> str:
    from huggingface_hub import get_token

    if is_offline():
        raise usage_error("offline mode is on, so nothing can be pushed", where=to, hint="Unset HF_HUB_OFFLINE.")
    with translate_upload_errors(to, ""):
        token = get_token()
    if not token:
        raise usage_error("pushing needs a token", where=to, hint=f"To give one {TOKEN_HINT}.")
    return token


def _check_secret(parcel: UploadPackage, card: HubCard, token: str) -> None:
    """Raises SurgeryError where a file that leaves holds the token."""
    secret = token.encode()
    for file in parcel.files:
        small = file.size <= SEARCHED and not file.name.endswith(hub.WEIGHTS)
        if small and secret in (card.text.encode() if file.name == CARD else file.path.read_bytes()):
            raise SurgeryError(
                "holds your Hub token, so nothing was sent",
                where=file.path,
                hint="Remove it from the file, and replace the token: others may have read it.",
            )


def _name(to: Destination) -> str:
    return to.repo_id.partition("/")[2]
