"""Send one push to the Hub: every request that it makes, repeated while the Hub is busy or fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from surgery.errors import SurgeryError, listing
from surgery.hub.client import MAX_WAIT
from surgery.hub.settings import shown_endpoint
from surgery.publish.commit_plan import (
    MAIN,
    PULL_REQUESTS,
    HubDestination,
    RemoteState,
    UploadPrivacy,
    check_destination,
    files_to_add,
    files_to_delete,
    upload_sizes,
)
from surgery.publish.model_card import HubCard
from surgery.publish.package import CARD, UploadPackage
from surgery.publish.upload_errors import retry_delay, translate_upload_errors
from surgery.runtime.progress import lines

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

# Files sent per request. Those of finished requests are not sent again, should the upload break off later.
FILES_PER_UPLOAD = 5
MAX_ATTEMPTS = 4  # of a request that the client does not repeat by itself

Result = TypeVar("Result")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class PushResult:
    """Where OUT is now.

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


class UploadSession:
    """The requests of one push to `target`; `notify` gets a line for each wait and each deletion."""

    def __init__(self, api: HfApi, target: HubDestination, privacy: UploadPrivacy, notify: Notify) -> None:
        self._api, self._target, self._privacy, self._notify = api, target, privacy, notify
        self._initial_commit: str | None = None  # the head of the branch before the first attempt

    def check_token(self) -> None:
        """Raise SurgeryError where the Hub does not know the token, or it can only read."""
        user = self._request(self._api.whoami)
        role: Any = user
        for key in ("auth", "accessToken", "role"):
            role = role.get(key) if isinstance(role, dict) else None
        # Whoever may read may open a pull request.
        if role == "read" and not self._target.pr:
            raise SurgeryError(
                "your token can only read",
                where=self._target,
                hint=f"Make one that may write at {shown_endpoint()}/settings/tokens, and set HF_TOKEN to it.",
            )

    def read_remote(self) -> RemoteState | None:
        """Return the state of the repository; None where there is none, or none that the token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        target = self._target
        try:
            info = self._request(lambda: self._api.model_info(target.repo_id), passthrough=RepositoryNotFoundError)
        except RepositoryNotFoundError:
            return None
        is_new = False
        if target.revision:
            try:
                info = self._request(
                    lambda: self._api.model_info(target.repo_id, revision=target.revision),
                    passthrough=RevisionNotFoundError,
                )
            except RevisionNotFoundError as error:
                if target.revision.startswith(PULL_REQUESTS):
                    raise SurgeryError("has no such pull request", where=target) from error
                is_new = True
        files = frozenset(file.rfilename for file in info.siblings or ())
        return RemoteState(str(info.sha), bool(info.private), files, is_new)

    def check_allowed(self, remote: RemoteState | None, package: UploadPackage) -> None:
        """Raise SurgeryError where the state of the repository forbids the push, or where it would become public."""
        check_destination(remote, self._target, package, self._privacy.private)
        self._privacy.check(remote, self._target)

    def send(self, package: UploadPackage, card: HubCard, *, message: str) -> PushResult:
        """Upload the files and commit them, creating the repository or the branch where it is missing.

        Raises:
            MovedError: the branch moved meanwhile; the caller may try again.
            SurgeryError: the Hub refuses or cannot be reached; a file changed since it was collected.
        """
        remote = self._prepare_remote(package)
        adding = files_to_add(package, card, remote)
        deleting = files_to_delete(package, remote)
        # The card first: it is small, and whether one may write here shows before gigabytes are read.
        self._upload([operation for operation in adding if operation.path_in_repo == CARD])
        # On a terminal the client draws its own bars.
        with lines(f"Uploading to {self._target}", _n_bytes(adding), "bytes") as advance:
            for start in range(0, len(adding), FILES_PER_UPLOAD):
                batch = adding[start : start + FILES_PER_UPLOAD]
                self._upload(batch)
                advance(_n_bytes(batch))
        removed = tuple(operation.path_in_repo for operation in deleting)
        if removed:
            self._notify(
                f"{self._target}: what an earlier push left, and {package.folder} lacks, goes: {listing(removed)}"
            )
        package.check_unchanged()
        commit = self._commit([*deleting, *adding], remote.commit, message)
        revision, url = self._page(commit)
        sizes = upload_sizes(package, card)
        # Compared with the head before the first attempt: the commit may be an earlier attempt's whose answer was lost.
        changed = commit.oid != self._initial_commit
        repo_id = self._target.repo_id
        return PushResult(repo_id, revision, commit.oid, url, changed, len(sizes), sum(sizes.values()), removed)

    def _prepare_remote(self, package: UploadPackage) -> RemoteState:
        """Create what is missing, check that the push is allowed, and return the state of the repository."""
        remote = self.read_remote()
        if remote is None:
            self._create_repo()
            remote = self.read_remote()
        # exist_ok: creating a repository that is there, but out of sight, is no error.
        if remote is None:
            raise SurgeryError(
                "is taken, but your token may not see it",
                where=self._target,
                hint="Choose another name, or use a token with access to it.",
            )
        # Again: somebody else, or a setting of the organisation, may have made it public in between.
        self.check_allowed(remote, package)
        self._initial_commit = self._initial_commit or remote.commit
        if remote.is_new:
            self._create_branch(remote.commit)
        return remote

    def _create_repo(self) -> None:
        repo_id, private = self._target.repo_id, not self._privacy.public
        # None, not False: an organisation may make its repositories private by default.
        self._request(lambda: self._api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not self._privacy.private:
            self._notify(f"{self._target}: is new, and private.")

    def _create_branch(self, commit: str) -> None:
        target = self._target
        self._request(
            lambda: self._api.create_branch(target.repo_id, branch=target.branch, revision=commit, exist_ok=True)
        )

    def _upload(self, files: Sequence[CommitOperationAdd]) -> None:
        with translate_upload_errors(self._target):  # the client itself tries again
            self._api.preupload_lfs_files(
                self._target.repo_id,
                files,
                revision=self._target.branch,
                create_pr=self._target.pr,
                free_memory=False,
                gitignore_content="",  # the repository's own would leave files out in silence
            )

    def _commit(
        self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], parent: str, message: str
    ) -> CommitInfo:
        target = self._target
        return self._request(
            lambda: self._api.create_commit(
                target.repo_id,
                operations,
                commit_message=message,
                revision=target.branch,
                create_pr=target.pr,
                # The Hub refuses where the branch moved since: the operations were planned for this commit.
                parent_commit=parent,
            ),
            # Whether a pull request was opened cannot be told from an answer that did not come.
            retry=not target.pr,
        )

    def _page(self, commit: CommitInfo) -> tuple[str, str]:
        """Return the branch that has the commit, and the address of the page to open."""
        page = f"{shown_endpoint()}/{self._target.repo_id}"
        branch = self._target.branch
        if commit.pr_url:
            return commit.pr_revision or branch, commit.pr_url
        if branch.startswith(PULL_REQUESTS):
            return branch, f"{page}/discussions/{branch.removeprefix(PULL_REQUESTS)}"
        return branch, page if branch == MAIN else f"{page}/tree/{quote(branch, safe='')}"

    def _request(
        self,
        call: Callable[[], Result],
        *,
        passthrough: type[Exception] | tuple[type[Exception], ...] = (),
        retry: bool = True,
    ) -> Result:
        """Return the result of `call`, repeated while the Hub is busy, and with `retry` also when it fails.

        Errors of the types `passthrough` are raised as they are, all others as SurgeryError.
        """
        for attempt in range(MAX_ATTEMPTS):
            with translate_upload_errors(self._target, passthrough=passthrough):
                try:
                    return call()
                except Exception as error:
                    seconds = retry_delay(error, attempt, retry=retry)
                    if seconds is None or seconds > MAX_WAIT or attempt + 1 == MAX_ATTEMPTS:
                        raise
            self._notify(f"{self._target}: the Hub is busy or did not answer; asking again in {seconds:g} s.")
            time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")


def _n_bytes(files: Sequence[CommitOperationAdd]) -> int:
    return sum(file.upload_info.size for file in files)
