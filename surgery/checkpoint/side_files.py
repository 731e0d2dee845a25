"""Find a model's side files: what lies beside its weights, belongs to the model, and is carried along unchanged.

These are its configs, its tokenizer and chat templates, its licence, and the modules of code that its configs name. All
else in its folder stays there: adapters, pickles, states and scores of a training, another model's index, notes. Model
card and manifest describe the weights that they came with, and so are written anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.io.input_files import MB, read_utf8
from surgery.io.json_io import read_json
from surgery.io.safe_paths import check_contained, find_file, list_folder

INDEXES = "*.safetensors.index.json"
# What tools of quantisation write beside the weights, instead of or besides config.json → their scheme.
QUANTISATION_FILES: Mapping[str, str] = {
    "hf_quant_config.json": "ModelOpt",
    "quant_config.json": "AWQ",
    "quantization_config.json": "unknown",
    "quantize_config.json": "GPTQ",
    "quanto_qmap.json": "Quanto",
    "quant_model_description.json": "ModelSlim",
}
# Configs of the model, and of what prepares its input or its output: images, sounds, sentence embeddings.
CONFIGS = (
    *QUANTISATION_FILES,
    "config.json",
    "config_sentence_transformers.json",
    "configuration.json",
    "feature_extractor_config.json",
    "generation_config.json",
    "image_processor.json",
    "image_processor_config.json",
    "modules.json",
    "params.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "video_preprocessor_config.json",
)
# As the tokenizers of transformers, sentencepiece, tiktoken and mistral-common call them.
TOKENIZERS = (
    "*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "added_tokens.json",
    "bpe.codes",
    "chat_template.json",
    "emoji.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer*.json",
    "vocab*.json",
    "vocab*.txt",
)
LICENCES = ("COPYING*", "LICENCE*", "LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*")
_PATTERNS = (*CONFIGS, *TOKENIZERS, *LICENCES)
# Where code is named: `"auto_map": {"AutoModel": "modeling_x.Model"}`.
_NAMING_CODE = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
_CODE = ".py"
_MODULE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.([A-Za-z_]\w*)", re.ASCII | re.MULTILINE)
# What is opened here is copied, loaded or pushed later: what of it leads elsewhere is an error before it is needed.
_CHECKED = (".json", ".txt", ".model", ".jinja", ".tiktoken", _CODE)


def find_side_files(folder: Path) -> list[Path]:
    """Return the side files in `folder`, sorted; hidden ones do not count.

    Raises:
        SurgeryError: one of them, or another small file beside the weights, is a link that leads out of the folder, or
            something else than a file.
    """
    paths, code = [], set[str]()
    for path in list_folder(folder):
        # Folders may have such names (LICENSES), and are not carried along. Whoever expects a file there will say so.
        if path.is_dir() and not path.is_symlink():
            continue
        if is_side_file(path.name) or path.name.endswith(_CHECKED):
            check_contained(folder, path)
        if path.suffix == _CODE:
            code.add(path.stem)
        elif is_side_file(path.name):
            paths.append(path)
    named = _named_modules(folder, code) if code else ()
    return sorted([*paths, *(folder / f"{module}{_CODE}" for module in named)])


def is_side_file(name: str) -> bool:
    """Return whether a file of this name may be carried along; code is only where a config of its folder names it."""
    return name.endswith(_CODE) or any(fnmatchcase(name, pattern) for pattern in _PATTERNS)


def _named_modules(folder: Path, present: set[str]) -> set[str]:
    """Return those of the modules `present` in `folder` that its configs name, and those that these import."""
    found: set[str] = set()
    waiting = [module for name in _NAMING_CODE for module in _modules_in(folder, name)]
    while waiting:
        module = waiting.pop()
        if module in present and module not in found:
            found.add(module)
            waiting += _RELATIVE_IMPORT.findall(read_utf8(folder / f"{module}{_CODE}", limit=MB))
    return found


def _modules_in(folder: Path, name: str) -> Iterator[str]:
    path = find_file(folder, name)
    if path is None:
        return
    try:
        auto_map = read_json(path).get("auto_map")
    except SurgeryError:
        # A damaged file is an error of whoever reads what it says; it names no code.
        return
    entries: list[Any] = list(auto_map.values()) if isinstance(auto_map, Mapping) else [auto_map]
    for entry in entries:
        for reference in entry if isinstance(entry, list) else [entry]:
            # `org/repo--module.Class` names code of another repository.
            if isinstance(reference, str) and _MODULE.fullmatch(module := reference.partition(".")[0]):
                yield module
