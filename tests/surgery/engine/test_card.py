"""Model cards: whatever the models are called, a card is what we wrote, and nothing in it acts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from support.architectures import add_tokenizer, build, sibling
from support.hostile_names import HOSTILE_NAMES, hidden_characters

from merges.ensemble.average import average_logits
from merges.run import merge
from surgery.checkpoint.selectors import Head
from surgery.edits.heads import scale_heads
from surgery.edits.undo_file import undo
from surgery.engine.card import CardContent, write_card
from surgery.evaluation.scorecard import write_scores
from surgery.evaluation.scoring import Score
from surgery.growth.layers.add import add_layers
from surgery.io.hashing import KEY
from surgery.vectors.application import apply, transfer
from surgery.vectors.extraction import extract

# What a folder can be called: everything but a slash.
NAME = (
    "m <img src=x onerror=alert(1)> ![x](http:t) `tick` ``` a|b\\| **b** \n# H\n---\n- [l](j:x)\x1b[31m\u202e$x$ &lt; "
)
OURS = "https://arxiv.org/abs/"
PLAIN = {
    *("paragraph", "heading", "table", "thead", "tbody", "tr", "th", "td"),
    *("strong", "bullet_list", "list_item", "link"),
}
ENDS = {f"{tag}_{end}" for tag in PLAIN for end in ("open", "close")}
ALLOWED = {"inline", "text", "code_inline", "softbreak", "fence", *ENDS}


def check(card: str) -> None:
    """Nothing in a card acts: no tag, no picture, no link but to a method's paper, no heading of a name."""
    assert hidden_characters(card) == []
    _, front, body = card.split("---\n", 2)
    assert isinstance(yaml.safe_load(front), dict)
    tokens = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(body)
    everything = [*tokens, *(child for token in tokens for child in token.children or ())]
    # The markers around the scores are comments of ours.
    kinds = {token.type for token in everything if not token.content.startswith("<!-- surgery eval")}
    assert kinds <= ALLOWED
    assert all(str(token.attrGet("href")).startswith(OURS) for token in everything if token.type == "link_open")
    headings = [token.content for token in tokens if token.type == "inline" and token.level == 1 and token.map]
    assert "H" not in headings
    for table in body.split("\n\n"):
        if table.startswith("|"):
            columns = {len(row.replace("\\|", "").split("|")) for row in table.splitlines()}
            assert len(columns) == 1, table


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models") / NAME
    base = add_tokenizer(build("llama", folder / "a"))
    return str(base), str(add_tokenizer(sibling(base, folder / NAME, seed=1)))


def config(a: str, b: str) -> str:
    models = [{"model": a}, {"model": b}]
    return yaml.safe_dump({"models": models, "merge_method": "linear", "parameters": {"weight": 1}})


def merged(a: str, b: str, out: Path) -> None:
    path = out.with_suffix(".yml")
    path.write_text(config(a, b))
    merge(path, out)


def edited(a: str, b: str, out: Path) -> None:
    scale_heads(a, out / NAME, scales={Head(0, 1): 0.5})
    undo(str(out / NAME), out / "undone")


def applied(a: str, b: str, out: Path) -> None:
    extract(b, a, out / NAME)
    apply(str(out / NAME), a, out / "applied")


WRITERS: dict[str, Callable[[str, str, Path], object]] = {
    "merge": merged,
    "ensemble": lambda a, b, out: average_logits([a, b], out),
    "transfer": lambda a, b, out: transfer(b, a, a, out),
    "vector": applied,
    "edit": edited,
    "layers": lambda a, b, out: add_layers(a, out, layers=1),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nothing_acts_in_the_card_of_models_with_hostile_names(
    write: Callable[[str, str, Path], object], models: tuple[str, str], tmp_path: Path
) -> None:
    write(*models, tmp_path / "out")
    cards = sorted((tmp_path / "out").rglob("README.md"))
    assert cards
    for card in cards:
        check(card.read_text(encoding="utf-8"))
        write_scores(card.parent, [Score(models[1], NAME, "acc", 0.5, 0.4, 0.6, 10, True)], f"surgery eval '{NAME}'")
        check(card.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_no_name_in_a_manifest_acts_in_the_card(name: str, tmp_path: Path) -> None:
    manifest = {
        "kind": "model",
        "inputs": {name: {"repo_id": None, "ref": name, "revision": name, KEY: name}},
        "versions": {"torch": name},
        "command": {"line": name},
    }
    write_card(tmp_path, manifest, {}, CardContent(name, "A sentence."))
    text = (tmp_path / "README.md").read_bytes().decode()
    check(text)
    assert len(text) < 200_000
