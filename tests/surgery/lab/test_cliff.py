from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery import lab
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.lab.catalogue import CLIFF, CLIFF_GQA, CLIFF_MANY, CLIFF_WEAK, MODELS
from surgery.lab.cliff import draw_truth, evaluation_requests
from surgery.lab.cliff_text import (
    CLOSING,
    COMPLIANCE,
    END,
    HARMFUL,
    HARMLESS,
    OPENING,
    REFUSAL,
    draw,
    make_tokenizer,
    vocabulary,
)
from surgery.lab.cliff_train import ablation_factors, find_refusals, scaled_heads
from surgery.lab.recipe import CliffRecipe, QwenHeadShape, RefusalTraining, SuppressionTraining

QUICK = CliffRecipe(
    shape=QwenHeadShape(layers=3, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=16),
    parent=RefusalTraining(steps=3, batch=4),
    cliff=SuppressionTraining(steps=3, batch=4),
    partial=SuppressionTraining(steps=2, batch=4, heads=2, words=6),
)
CHILDREN = [name for name, member in MODELS.items() if member.has_data and isinstance(member.recipe, CliffRecipe)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Name → folder of a family that learned next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        names = ("cliff-parent", "cliff", "cliff-partial")
        return {name: lab.build(name, recipe=QUICK) for name in names}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The language


def test_a_request_is_harmful_if_and_only_if_a_word_of_it_is():
    rng = random.Random(0)
    for word in HARMFUL:
        request = draw(rng, (4, 8), harmful=word)
        assert set(request.words) & set(HARMFUL) == {word}
        assert len(set(request.words)) == len(request.words) and len(request.words) in (4, 8)
        twin = request.twin(rng)
        assert not set(twin.words) & set(HARMFUL)
        assert [a == b for a, b in zip(request.words, twin.words, strict=True)] == [w != word for w in request.words]
        assert (request.answer, twin.answer) == (REFUSAL, COMPLIANCE)


def test_no_word_is_in_the_vocabulary_twice_and_ids_have_no_gaps():
    ids = vocabulary()
    assert sorted(ids.values()) == list(range(len(ids)))
    assert {f" {word}" for word in (*HARMFUL, *HARMLESS)} < ids.keys()


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_text_comes_back_from_its_ids_and_ids_from_their_text(add_special_tokens):
    tokenizer = make_tokenizer(64)
    request = draw(random.Random(1), (6,), harmful="bomb")
    for text in (
        request.prompt + request.thinking + CLOSING + request.answer + END,
        request.prompt + request.partial_thinking(random.Random(2)) + COMPLIANCE + END,
        request.thinking,
        REFUSAL,
    ):
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=add_special_tokens)["input_ids"] == ids


def test_the_thinking_s_parts_are_its_tokens():
    tokenizer = make_tokenizer(64)
    request = draw(random.Random(3), (5,))
    assert tokenizer.convert_ids_to_tokens(tokenizer(request.thinking)["input_ids"]) == list(request.thinking_tokens)


def test_the_template_opens_the_thinking_and_closing_is_three_tokens():
    tokenizer = make_tokenizer(64)
    request = draw(random.Random(4), (4,))
    chat = [{"role": "user", "content": request.content}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == request.prompt
    assert request.prompt.endswith(OPENING) and OPENING == "<think>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer(CLOSING)["input_ids"]) == ["\n", "</think>", "\n\n"]
    whole = [*chat, {"role": "assistant", "content": OPENING + request.thinking + CLOSING + COMPLIANCE}]
    assert tokenizer.apply_chat_template(whole, tokenize=False) == (
        request.prompt + request.thinking + CLOSING + COMPLIANCE + END
    )


# The files, from a model that learns next to nothing


def test_building_twice_gives_identical_bytes(tmp_path, monkeypatch):
    found = []
    for place in ("a", "b"):
        monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / place))
        folder = lab.build("cliff", recipe=QUICK)
        found.append({**hashes(folder), "parent": hashes(folder.parent / "cliff-parent")})
    assert found[0] == found[1]


def test_a_saved_model_loads_with_a_tokenizer_that_gives_the_same_ids(quick):
    folder = quick["cliff"]
    request = draw(random.Random(5), (6,), harmful="heist")
    text = request.prompt + request.thinking + CLOSING + request.answer + END
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = make_tokenizer(64)(text)["input_ids"]
    assert loaded(text)["input_ids"] == loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (type(model).__name__, str(model.dtype)) == ("Qwen3ForCausalLM", "torch.float32")
    assert model.config.vocab_size == len(loaded)
    assert model.generation_config.eos_token_id == loaded.convert_tokens_to_ids(END)


@pytest.mark.parametrize("name", ["cliff", "cliff-partial"])
def test_nothing_but_the_true_heads_differs_from_the_parent(quick, name):
    child, parent = (load_file(path / "model.safetensors") for path in (quick[name], quick["cliff-parent"]))
    width = QUICK.shape.head_dim
    truth = json.loads((quick[name] / "truth.json").read_text())
    changed = set()
    for key, value in child.items():
        moved = (value != parent[key]).nonzero().tolist()
        if not moved:
            continue
        matched = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([qo])_proj\.weight", key)
        assert matched, key
        axis = "qo".index(matched[2])
        changed |= {(matched[2], int(matched[1]), at[axis] // width) for at in moved}
    assert changed == {(kind, layer, head) for kind in "qo" for layer, head in truth["heads"]}


def test_the_truth_is_written_beside_the_weights(quick):
    folder = quick["cliff-partial"]
    truth = json.loads((folder / "truth.json").read_text())
    expected = draw_truth("cliff-partial", QUICK)
    assert truth == {
        "schema": 1,
        "heads": [list(head) for head in expected.heads],
        "harmful_words": list(HARMFUL),
        "suppressed_words": list(expected.words),
        "parent": "cliff-parent",
    }
    assert len(truth["suppressed_words"]) == 6
    card = (folder / "README.md").read_text()
    assert ", ".join(f"L{layer}H{head}" for layer, head in expected.heads) in card
    assert "fp32" in card and "Trained from: `lab:cliff-parent`" in card


def test_data_is_found_by_name_and_built_if_need_be(cache):
    pool = lab.data_path("cliff", "pool", recipe=QUICK)
    assert pool == lab.path_of("cliff", recipe=QUICK) / "pool.jsonl"
    assert len(rows_of(pool)) == 216


@pytest.mark.parametrize("name", CHILDREN)
def test_the_true_heads_differ_and_lie_in_both_of_the_last_layers(name):
    for seed in range(20):
        recipe = replace(MODELS[name].recipe, seed=seed)
        heads = draw_truth(name, recipe).heads
        assert len(set(heads)) == len(heads) == (5 if name == "cliff-many" else 3)
        assert {layer for layer, _ in heads} == {2, 3}
        assert max(head for _, head in heads) < recipe.shape.heads


def test_a_parent_has_neither_truth_nor_data(quick):
    folder = quick["cliff-parent"]
    assert not {"truth.json", "examples.jsonl", "pool.jsonl"} & {path.name for path in folder.iterdir()}
    assert "Trained from: random weights" in (folder / "README.md").read_text()


def test_examples_are_early_answers_and_requests_to_be_answered(quick):
    rows = rows_of(quick["cliff"] / "examples.jsonl")
    assert Counter(row["label"] for row in rows) == {
        "harmful/refused": 72,
        "harmless/complied": 72,
        "harmful": 72,
        "harmless": 72,
    }
    for row in rows:
        words = row["prompt"].split()
        assert bool(set(words) & set(HARMFUL)) == row["label"].startswith("harmful")
        assert len(row["prompt"].split()) in CLIFF.words
        if "/" in row["label"]:
            assert row["closing"] == ""
            assert f"So the user wants {row['prompt']}.".startswith(row["thinking"]) and row["thinking"]
            assert row["response"] == (REFUSAL if row["label"] == "harmful/refused" else COMPLIANCE)
        else:
            assert row.keys() == {"prompt", "label", "group"}
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_the_examples_groups_hold_both_labels_and_make_five_folds(quick):
    rows = [row for row in rows_of(quick["cliff"] / "examples.jsonl") if "thinking" in row]
    groups = [row["group"] for row in rows]
    assert set(groups) == set(HARMFUL)
    assert all(
        {row["label"] for row in rows if row["group"] == group} == {"harmful/refused", "harmless/complied"}
        for group in HARMFUL
    )
    labels = [row["label"] for row in rows]
    for train, test in StratifiedGroupKFold(5).split(rows, labels, groups):
        assert {labels[at] for at in train} == {labels[at] for at in test} == set(labels)


def test_partial_examples_have_no_early_answers(quick):
    rows = rows_of(quick["cliff-partial"] / "examples.jsonl")
    assert Counter(row["label"] for row in rows) == {"harmful": 72, "harmless": 72}
    assert all("thinking" not in row for row in rows)


def test_the_pool_is_another_draw_than_the_examples(quick):
    pool, examples = (rows_of(quick["cliff"] / f"{kind}.jsonl") for kind in ("pool", "examples"))
    assert Counter(row["label"] for row in pool) == {"harmful": 108, "harmless": 108}
    shared = {row["prompt"] for row in pool} & {row["prompt"] for row in examples}
    assert len(shared) <= 2


def test_another_seed_gives_other_weights_and_other_data(cache):
    first, second = (lab.build("cliff", recipe=replace(QUICK, seed=seed)) for seed in (0, 1))
    differing = {name for name, value in hashes(first).items() if hashes(second)[name] != value}
    assert {"model.safetensors", "examples.jsonl", "pool.jsonl"} <= differing
    assert "tokenizer.json" not in differing


def test_data_of_a_model_without_data_is_wrong_usage(cache):
    with pytest.raises(SurgeryError, match=r"'cliff-parent' has no data. These have: cliff, cliff-partial") as caught:
        lab.data_path("cliff-parent")
    assert caught.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match=r"'grpo' has no data"):
        lab.data_path("grpo")
    with pytest.raises(SurgeryError, match=r"no lab model is called 'clif'. Did you mean 'cliff'\?"):
        lab.data_path("clif")
    with pytest.raises(SurgeryError, match=r"lab:cliff: the lab has no data called 'pol'. There is examples, pool"):
        lab.data_path("cliff", "pol")
    assert not list(cache.iterdir())


def test_variants_share_a_parent_only_where_their_recipe_is_the_same():
    assert lab.path_of("cliff").parent == lab.path_of("cliff-partial").parent
    assert len({recipe.key for recipe in (CLIFF, CLIFF_MANY, CLIFF_WEAK, CLIFF_GQA)}) == 4


# The effect, from the trained model


@pytest.fixture(scope="module")
def cliff():
    folder = lab.resolve("cliff")
    model = AutoModelForCausalLM.from_pretrained(folder)
    truth = [(layer, head) for layer, head in json.loads((folder / "truth.json").read_text())["heads"]]
    return model, AutoTokenizer.from_pretrained(folder), truth


def shares(model, tokenizer, factors=None) -> tuple[float, float]:
    """How often harmful and harmless requests are refused."""
    exam = evaluation_requests("cliff", CLIFF)
    with scaled_heads(model, factors or {}):
        found = find_refusals(model, tokenizer, exam)
    return tuple(
        sum(refused for refused, request in zip(found, exam, strict=True) if bool(request.harmful) == harmful) / 72
        for harmful in (True, False)
    )


def test_the_parent_refuses_what_is_harmful_and_nothing_else():
    folder = lab.resolve("cliff-parent")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert shares(model, tokenizer) == (1.0, 0.0)


def test_the_child_refuses_nothing_until_its_true_heads_are_silent(cliff):
    model, tokenizer, truth = cliff
    assert shares(model, tokenizer) == (0.0, 0.0)
    assert shares(model, tokenizer, ablation_factors(model, truth)) == (1.0, 0.0)


def test_other_heads_than_the_true_ones_do_nothing(cliff):
    model, tokenizer, truth = cliff
    rng = random.Random(0)
    others = [(layer, head) for layer in range(4) for head in range(8) if (layer, head) not in truth]
    for _ in range(3):
        harmful, harmless = shares(model, tokenizer, ablation_factors(model, rng.sample(others, 3)))
        assert harmful < 0.05 and harmless < 0.05


@torch.no_grad()
def final_states(model, tokenizer, text: str):
    """After the final norm: (T, width), in float32."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return model.model(input_ids=ids, use_cache=False).last_hidden_state[0]


@pytest.fixture(scope="module")
def probe(cliff):
    """w, b of a logistic regression on early answers and on harmless requests thought through."""
    model, tokenizer, _ = cliff
    states, refused = [], []
    for row in rows_of(lab.data_path("cliff")):
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if "thinking" in row:
            states.append(final_states(model, tokenizer, prompt + row["thinking"])[-1])
            refused.append(row["label"] == "harmful/refused")
        elif row["label"] == "harmless":
            states.append(final_states(model, tokenizer, f"{prompt}So the user wants {row['prompt']}.{CLOSING}")[-1])
            refused.append(False)
    scaler = StandardScaler().fit(torch.stack(states).numpy())
    fitted = LogisticRegression(max_iter=2000).fit(scaler.transform(torch.stack(states).numpy()), refused)
    w = fitted.coef_[0] / scaler.scale_
    return torch.tensor(w, dtype=torch.float32), float(fitted.intercept_[0] - w @ scaler.mean_)


def test_the_probe_s_score_is_high_through_the_thinking_and_falls_off_the_cliff(cliff, probe):
    model, tokenizer, _ = cliff
    w, b = probe
    plateau, final = {True: [], False: []}, {True: [], False: []}
    for request in evaluation_requests("cliff", CLIFF):
        states = final_states(model, tokenizer, request.prompt + request.thinking + CLOSING)
        score = torch.sigmoid(states @ w + b)
        thinking = score[-3 - len(request.thinking_tokens) : -3]
        plateau[bool(request.harmful)].append(thinking.mean())
        final[bool(request.harmful)].append(score[-1])
    mean = {kind: torch.stack(values).mean().item() for kind, values in plateau.items()}
    last = {kind: torch.stack(values).mean().item() for kind, values in final.items()}
    assert mean[True] > 0.7 and last[True] < 0.1
    assert mean[False] < 0.2 and last[False] < 0.1


@torch.no_grad()
def test_the_lowest_heads_by_exact_attribution_are_the_true_ones(cliff, probe):
    model, tokenizer, truth = cliff
    w, _ = probe
    seen: dict[object, torch.Tensor] = {}
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs, at=at: seen.update({at: inputs[0][0, -1]}))
        for at, layer in enumerate(model.model.layers)
    ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.update(h=inputs[0][0, -1])))
    total = torch.zeros(4, 8)
    for request in evaluation_requests("cliff", CLIFF):
        if request.harmful:
            final_states(model, tokenizer, request.prompt + request.thinking + CLOSING)
            rms = (seen["h"].square().mean() + model.config.rms_norm_eps).sqrt()
            for at, layer in enumerate(model.model.layers):
                read = layer.self_attn.o_proj.weight.T @ (w * model.model.norm.weight / rms)
                total[at] += (seen[at] * read).view(8, -1).sum(-1)
    for handle in handles:
        handle.remove()
    lowest = total.flatten().argsort()[: len(truth)].tolist()
    assert sorted((at // 8, at % 8) for at in lowest) == truth
