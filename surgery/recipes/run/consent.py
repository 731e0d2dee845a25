"""Ask before a recipe's file decides what leaves this machine, or is written outside of the run.

A repository that only the file names, and a folder outside of RUN that a file names, need consent: `--allow-push` and
`--allow-write` on the command line, or an answer at a terminal. It is asked for before any step runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import usage_error
from surgery.hub import download as hub
from surgery.publish.privacy import check_may_be_public
from surgery.recipes.run.access import AccessList, PushAccess, WriteAccess

PUSH, WRITE = "--allow-push", "--allow-write"


@dataclass(frozen=True)
class Consent:
    """What the person who runs a recipe agrees to.

    Attributes:
        pushes: repositories, `org/name`, that may be pushed to though the file names them.
        writes: folders that may be written to, and all that are in them.
        public: whether everybody may have what was made from local files, where it goes to a public repository.
        ask: asks a question that is answered by yes or no; None where nobody can answer.
    """

    pushes: tuple[str, ...] = ()
    writes: tuple[Path, ...] = ()
    public: bool = False
    ask: Callable[[str], bool] | None = None


NO_CONSENT = Consent()


def check_consent(access: AccessList, consent: Consent) -> None:
    """Ask for what is missing. Raises SurgeryError where it is not given, or where something must not be public."""
    repos = {each.push.repo_id for each in access.pushes}
    for repo_id in consent.pushes:
        if not hub.is_repo_id(repo_id) or "@" in repo_id:
            raise usage_error(f"got {repo_id!r}, expected org/name", where=PUSH)
        if repo_id not in repos:
            pushes = f"to {', '.join(sorted(repos))}" if repos else "nothing"
            raise usage_error(f"got {repo_id}, but this recipe pushes {pushes}", where=PUSH)
    for each in access.pushes:
        if each.is_public:
            # Before hours of work, not after them; the push itself looks once more, at what was really read.
            check_may_be_public(each.destination, each.inputs, vouched=consent.public)
    missing = [(_push_question(each), f"{PUSH} {each.push.repo_id}") for each in access.pushes if _lacks(each, consent)]
    missing += [
        (_write_question(each), f"{WRITE} {each.path}") for each in access.writes if _lacks_folder(each, consent)
    ]
    if not missing:
        return
    if consent.ask is None:
        options = " ".join(dict.fromkeys(option for _, option in missing))
        raise usage_error(
            "the file, and not the command line, says: "
            + "; ".join(question.rstrip("?") for question, _ in missing)
            + ", so this needs your consent",
            where="recipe",
            hint=f"If you agree, add {options} to the command.",
        )
    for question, option in missing:
        if not consent.ask(question):
            raise usage_error("not agreed to, so nothing was done", where=option)


def _lacks(access: PushAccess, consent: Consent) -> bool:
    return not access.push.is_allowed and access.push.repo_id not in consent.pushes


def _lacks_folder(access: WriteAccess, consent: Consent) -> bool:
    allowed = [path.expanduser().resolve() for path in consent.writes]
    return access.needs_consent and not any(access.path.resolve().is_relative_to(path) for path in allowed)


def _push_question(access: PushAccess) -> str:
    return f"push the output of {access.push.node} to {access.destination} ({access.visibility})?"


def _write_question(access: WriteAccess) -> str:
    return f"write to {access.path} ({access.what})?"
