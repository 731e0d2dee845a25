"""The card that goes up: completed from the manifest, the scores and the cache, in words that the Hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support.hostile_names import HOSTILE_NAMES, hidden_characters
from support.hub_server import HubServer
from support.publish import REPO, edit_manifest, failure, files_at, folder_with

from surgery.publish.model_card import build_hub_card
from surgery.publish.package import collect_files
from surgery.publish.upload import preview_push, push

pytestmark = pytest.mark.usefixtures("writable")


def test_the_card_is_completed_and_its_own_words_stay(server: HubServer, out: Path) -> None:
    models = {"tuned": "org/tuned", "base": "org/base", "target": "org/instruct"}

    def edit(manifest: dict[str, Any]) -> None:
        for role, repo_id in models.items():
            manifest["inputs"][role].update(repo_id=repo_id, revision="0" * 40)
        manifest["report"]["prompts"] = ["open/math/main@" + "1" * 40 + ":train[0:200]", "no data"]

    edit_manifest(out, edit)
    body = (out / "README.md").read_text().split("---\n", 2)[2]
    push(out, REPO)
    card = ModelCard(files_at(server)["README.md"].decode())
    assert card.data.base_model == ["org/instruct", "org/tuned", "org/base"]
    assert card.data.base_model_relation == "merge"
    assert card.data.datasets == ["open/math"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["model-surgery", "task-vector", "merge"]
    assert card.data.license is None
    assert files_at(server)["README.md"].decode().endswith(body)
    assert json.loads(server.bodies["/api/validate-yaml"])["content"] == files_at(server)["README.md"].decode()


def test_the_texts_that_a_plan_trained_on_are_the_card_s_data_sets_and_those_it_was_measured_on_are_not(
    out: Path,
) -> None:
    plan = (
        "corpus: [open/stories:train, 'open/code/py@main:train[0:9]', notes.txt]\nevaluate: {texts: [open/held:test]}"
    )
    files = {"plan.yml": plan, "notes.txt": "a text: [of its own"}
    edit_manifest(out, lambda found: found["command"].update(files=files))
    card = preview_push(out, REPO).card
    assert ModelCard(card.text).data.datasets == ["open/code", "open/stories"]
    edit_manifest(out, lambda found: found["command"].update(files={"plan.yml": "a: ["}))
    assert "surgery.json: its copy of plan.yml is no YAML" in failure(out)


def test_what_the_card_says_is_not_overruled(out: Path) -> None:
    (out / "README.md").write_text("---\npipeline_tag: any-to-any\ntags: mine\nlicense: mit\n---\n\n# By hand\n")
    card = preview_push(out, REPO).card
    assert card.metadata == {
        "pipeline_tag": "any-to-any",
        "tags": ["mine", "model-surgery"],
        "license": "mit",
        "library_name": "transformers",
    }
    assert card.text.endswith("---\n\n# By hand\n")


def test_without_a_card_one_is_made(out: Path) -> None:
    (out / "README.md").unlink()
    text = preview_push(out, REPO).card.text
    assert "# reasoner" in text and "surgery vector transfer" in text


@pytest.mark.parametrize("front", ["a: [", "- a", "model-index: 3", "a: !!bool maybe", "a: !!timestamp noon"])
def test_metadata_that_nobody_can_read_are_an_error_before_anything_is_sent(
    server: HubServer, out: Path, front: str
) -> None:
    (out / "README.md").write_text(f"---\n{front}\n---\n# Card\n")
    assert "README.md: its metadata are no" in failure(out)
    assert not server.requests


@pytest.mark.parametrize(
    ("kind", "command", "relation", "library"),
    [
        ("model", "edit heads", "finetune", "transformers"),
        ("model", "merge weights", "merge", "transformers"),
        ("ensemble", "merge logits", "merge", "transformers"),
        ("adapter", "vector extract", "adapter", "peft"),
        ("vector", "vector extract", "adapter", None),
        ("embedding", "grow embed", None, None),
    ],
)
def test_the_relation_to_the_base_follows_kind_and_command(
    out: Path, kind: str, command: str, relation: str | None, library: str | None
) -> None:
    (out / "README.md").unlink()
    edit_manifest(
        out,
        lambda found: found.update(
            kind=kind, command={"name": command, "line": command}, inputs={"model": {"ref": "o/m", "repo_id": "o/m"}}
        ),
    )
    data = preview_push(out, REPO).card.metadata
    assert data.get("base_model_relation") == relation
    assert data.get("base_model") == (["o/m"] if relation else None)
    assert data.get("library_name") == library
    assert data.get("pipeline_tag") == ("text-generation" if library else None)


def test_the_licence_is_taken_from_the_cached_cards_where_all_agree(
    server: HubServer, cache: Path, out: Path, tmp_path: Path
) -> None:
    import huggingface_hub

    server.add("o/a", folder_with(tmp_path / "a", {"README.md": b"---\nlicense: apache-2.0\n---\n"}))
    server.add("o/b", folder_with(tmp_path / "b", {"README.md": b"---\nlicense: mit\n---\n"}))
    inputs = {}
    for name in "ab":
        commit = server.repos[f"o/{name}"].revisions["main"]
        inputs[name] = {"ref": f"o/{name}", "repo_id": f"o/{name}", "revision": commit}

    def licence(**of: dict[str, str]) -> object:
        edit_manifest(out, lambda found: found.update(inputs=of))
        return preview_push(out, REPO).card.metadata.get("license")

    assert licence(a=inputs["a"]) is None, "nothing is cached"
    for name in "ab":
        huggingface_hub.hf_hub_download(f"o/{name}", "README.md", endpoint=server.url, cache_dir=cache)
    assert licence(a=inputs["a"]) == "apache-2.0"
    assert licence(a=inputs["a"], same=inputs["a"]) == "apache-2.0"
    assert licence(a=inputs["a"], b=inputs["b"]) is None
    assert licence(a=inputs["a"], mine={"ref": "/home/me/model"}) is None


def test_scores_are_the_hub_s_results(server: HubServer, out: Path) -> None:
    from surgery.evaluation.scorecard import write_scores
    from surgery.evaluation.scoring import Score

    scores = [
        Score(str(out), "sums", "acc", 0.88, 0.83, 0.92, 400, True),
        Score("other", "sums", "acc", 0.1, 0.0, 0.2, 400, True),
        Score(str(out), "sums", "f1", float("nan"), 0.0, 0.0, 4),
    ]
    write_scores(out, scores, "surgery eval")
    push(out, REPO)
    card = ModelCard(files_at(server)["README.md"].decode())
    (result,) = card.data.eval_results
    assert card.data.model_name == "reasoner"
    assert (result.task_type, result.dataset_type, result.metric_type, result.metric_value) == (
        "text-generation",
        "sums",
        "acc",
        0.88,
    )
    assert result.metric_name == "acc, 95 % interval 0.83 to 0.92, n = 400"


def test_what_the_hub_says_of_the_card_is_passed_on(server: HubServer, out: Path) -> None:
    messages: list[str] = []
    server.card_says = {"warnings": [{"message": "no licence"}]}
    push(out, REPO, notify=messages.append)
    assert "The Hub says of the card: no licence" in messages
    server.card_says = {"errors": [{"message": '"license" must be one of …'}]}
    (out / "README.md").write_text("# New words\n")
    assert failure(out).startswith(f'{REPO}: the Hub refuses the card\'s metadata: "license" must be one of')


def test_a_preview_asks_nothing_and_lists_what_would_go(server: HubServer, out: Path) -> None:
    preview = preview_push(out, REPO)
    assert not server.requests
    pushed = push(out, REPO)
    assert (pushed.files, pushed.n_bytes) == (len(preview.files), preview.n_bytes)
    assert {name: len(data) for name, data in files_at(server).items() if name != ".gitattributes"} == preview.files


def test_who_pushes_is_told_what_nobody_else_has(server: HubServer, out: Path, results: Path) -> None:
    messages: list[str] = []
    push(out, REPO, notify=messages.append)
    assert messages == [
        "Nobody else has what it was made from, so nobody can make it again: "
        + ", ".join(str(results / name) for name in ("target", "tuned", "base")),
        f"{REPO}: is new, and private.",
    ]


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_no_name_in_a_recipe_or_command_acts_in_the_card(name: str, out: Path) -> None:
    (out / "README.md").unlink(missing_ok=True)
    package = collect_files(out)
    package.manifest["command"]["line"] = name
    text = build_hub_card(package, name, recipe=(name, f"recipe: {name}")).text
    assert hidden_characters(text) == []
    # Two blocks of code, and no element, picture or link.
    tokens = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(ModelCard(text).text)
    kinds = [token.type for token in tokens] + [child.type for token in tokens for child in token.children or ()]
    assert kinds.count("fence") == 1 + bool(name)
    assert kinds.count("heading_open") == 2
    assert {*kinds} <= {
        *("inline", "text", "code_inline", "softbreak", "fence"),
        *("heading_open", "heading_close", "paragraph_open", "paragraph_close"),
    }
