"""Select which files of a Hub repository are fetched: weights in safetensors, and what is needed to use them.

That is JSON, tokenizer and chat-template files at the top of the repository, and the members of a logit ensemble; or
only the files that match given patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from surgery.errors import SurgeryError, listing
from surgery.hub.errors import Repository

# *.safetensors.index.json is among *.json; *.txt is for merges.txt and vocab.txt, *.model for sentencepiece.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
# The one folder that tokenizers read from. All others hold copies: original/, onnx/, training checkpoints.
CHAT_TEMPLATES = "additional_chat_templates"
# What a logit ensemble keeps of its members besides their weights, to give them back as they were.
MEMBERS = "members"
MEMBER_FILES = (*(pattern for pattern in MODEL_FILES if pattern != "*.safetensors"), "*.md", "LICENSE*", "NOTICE*")
# Mistral's own format, beside the same weights as model-0000k-of-n.safetensors.
DUPLICATES = "consolidated*"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS_SUFFIX = ".safetensors"


def select_files(names: Sequence[str], repository: Repository, patterns: Sequence[str] | None = None) -> list[str]:
    """Return those of `names` to fetch, sorted.

    Args:
        names: the paths of all files of the repository.
        repository: the `where` of errors.
        patterns: the files to select instead, when no weights are needed; in folders only chat templates.

    Raises:
        SurgeryError: there are no weights in safetensors; no file matches `patterns`.
    """
    if patterns is not None:
        # tokenizer.json of a subfolder belongs to a copy, or to another model.
        near = sorted(name for name in names if name.rpartition("/")[0] in ("", CHAT_TEMPLATES))
        chosen = [name for name in near if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not chosen:
            raise SurgeryError(
                f"has none of the files that are needed among its {len(names)} files ({listing(sorted(names), 5)})",
                where=repository,
            )
        return chosen
    wanted = sorted(name for name in names if _is_model_file(name))
    weights = [name for name in wanted if name.endswith(WEIGHTS_SUFFIX)]
    if not weights:
        raise _no_weights_error(names, repository)
    if all(fnmatchcase(name, DUPLICATES) for name in weights):
        return wanted  # Mistral's own format is all there is: no duplicate
    return [name for name in wanted if not fnmatchcase(name, DUPLICATES)]


def _is_model_file(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder == CHAT_TEMPLATES:
        return file.endswith(".jinja")
    if folder == MEMBERS or folder.startswith(f"{MEMBERS}/"):
        return any(fnmatchcase(file, pattern) for pattern in MEMBER_FILES)
    return not folder and any(fnmatchcase(file, pattern) for pattern in MODEL_FILES)


def _no_weights_error(names: Sequence[str], repository: Repository) -> SurgeryError:
    repo_id = repository.repo_id
    pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return SurgeryError(
            f"holds weights only as Python pickles ({listing(pickles, 3)}), which can run code when opened",
            where=repository,
            hint="Look on its page for a pull request that adds safetensors, and give "
            f"{repo_id}@refs/pr/N; or convert it in a throw-away environment, "
            f'AutoModelForCausalLM.from_pretrained("{repo_id}").save_pretrained("DIR"), and give DIR.',
        )
    nested = sorted(name for name in names if name.endswith(WEIGHTS_SUFFIX))
    if nested:
        return SurgeryError(
            f"has its .safetensors files only in subfolders ({listing(nested, 3)})",
            where=repository,
            hint="Download the subfolder with `hf download`, and give its path.",
        )
    return SurgeryError(
        f"has no .safetensors file among its {len(names)} files ({listing(sorted(names), 5)})",
        where=repository,
        hint="Give a repository that holds a model's weights.",
    )
