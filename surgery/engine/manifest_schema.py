"""The types of a manifest's fields, as readers rely on them: surgery.json may be a stranger's, or damaged."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from surgery.checkpoint.dtypes import DTYPES
from surgery.errors import SurgeryError
from surgery.hub.download import check_revision, is_repo_id


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError("a dtype of safetensors")
    return name


def _repo_id(text: str) -> str:
    if "@" in text or not is_repo_id(text):
        raise ValueError("org/name")
    return text


def _revision(text: str) -> str:
    try:
        check_revision("", text)
    except SurgeryError as error:
        raise ValueError("a branch, tag or commit") from error
    return text


Size = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Entry(BaseModel):
    # Strict: true is no number, and "3" is none. Further keys are allowed, as kinds of outputs have some of their own.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class TensorEntry(_Entry):
    """An output tensor: its dtype, shape and hash."""

    dtype: Annotated[str, AfterValidator(_dtype)]
    shape: list[Size]
    xxh3: str
    edited: bool = False


class InputEntry(_Entry):
    """What an output was made from: what the user typed, and the repository and commit if it is from the Hub."""

    ref: str | None = None
    repo_id: Annotated[str, AfterValidator(_repo_id)] | None = None
    revision: Annotated[str, AfterValidator(_revision)] | None = None
    xxh3: str | None = None


class CommandEntry(_Entry):
    """The command that made an output, and what is needed to run it again."""

    name: str = ""
    arguments: list[str] = []
    options: dict[str, Any] = {}
    line: str | None = None
    first: list[str] = []
    inside: str = ""
    files: dict[str, str] = {}


class VectorEntry(_Entry):
    """What a task vector says of itself: its format, and the tensors that it does not store."""

    format: int
    zero: list[str]
    left_out: list[str] = []


class Manifest(_Entry):
    """surgery.json. Only a part of these fields is in the manifests of what is no checkpoint (findings, sweeps)."""

    kind: str
    command: CommandEntry = CommandEntry()
    versions: dict[str, str | None] = {}
    inputs: dict[str, InputEntry] = {}
    report: dict[str, Any] = {}
    files: dict[str, Size] = {}
    tensors: dict[str, TensorEntry] = {}
    vector: VectorEntry | None = None
