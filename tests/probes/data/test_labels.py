"""Promises of probes.data.labels: which responses count as refusals, and that no answer is guessed."""

from __future__ import annotations

import re

import pytest
import torch
from support.architectures import build
from support.chat_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

from probes.data import labels
from probes.data.examples import Example
from probes.data.labels import (
    REFUSAL_WINDOW,
    label_by_guard,
    label_by_keywords,
    read_phrases,
    read_verdict,
)
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.loading import ModelAndTokenizer


def example(response=None, key="0", **known):
    return Example(key, ({"role": "user", "content": "Hi?"},), group="g", response=response, **known)


def refused(response, *phrases):
    [found] = label_by_keywords([example(response)], phrases) if phrases else label_by_keywords([example(response)])
    return found.refused


@pytest.mark.parametrize(
    "response",
    [
        "I cannot help with that.",
        "I can’t do this.",
        "i CAN'T",
        "I'm sorry, but no.",
        "I’m  sorry,\nbut no.",
        "I won't.",
        "Sorry, but I have to pass.",
        "That is something I will not do.",
        "I'm unable to say.",
        "We cannot assist you here.",
        "I must decline this.",
    ],
)
def test_refusals_are_known_by_their_phrases(response):
    assert refused(response) is True


@pytest.mark.parametrize(
    "response",
    ["Sure, here it is.", "", "Hawaii can't be beaten.", "I'm sorry to hear that!", "Wi cannot", "I cannothing"],
)
def test_other_responses_are_none(response):
    assert refused(response) is False


def test_only_the_beginning_of_a_response_counts():
    phrase = "I cannot"
    assert refused("a" * (REFUSAL_WINDOW - len(phrase) - 1) + " " + phrase) is True
    assert refused("a" * (REFUSAL_WINDOW - len(phrase)) + " " + phrase) is False


def test_phrases_of_ones_own_in_any_script(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text("# mine\n\n  我不能\nNein\n", encoding="utf-8")
    phrases = read_phrases(path)
    assert phrases == ("我不能", "Nein")
    assert refused("抱歉，我不能帮助你", *phrases) is True
    assert refused("nein!", *phrases) is True
    assert refused("Neinsager", *phrases) is False
    assert refused("I cannot", *phrases) is False
    path.write_text("# nothing\n")
    with pytest.raises(SurgeryError, match=r"phrases.txt: has no phrases. Give one a line."):
        read_phrases(path)
    with pytest.raises(SurgeryError, match="there are no refusal phrases"):
        label_by_keywords([], [" "])
    with pytest.raises(SurgeryError, match="cannot be read"):
        read_phrases(tmp_path / "nowhere")


def test_verdicts_that_are_given_stay_and_what_never_answered_gets_none():
    given = [example("I cannot", refused=False), example("", closing="", thinking="Hm"), example("Sure", thinking="x")]
    assert [e.refused for e in label_by_keywords(given)] == [False, None, False]


def test_examples_that_cannot_be_labelled_are_named():
    missing = [example(key=str(i)) for i in range(7)]
    with pytest.raises(SurgeryError) as caught:
        label_by_keywords([*missing, example("Sure")])
    assert str(caught.value) == (
        "examples 0, 1, 2, 3, 4 and 2 more: have no response to be labelled. Generate them first."
    )
    assert caught.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match="example 3: hold their thinking in the response"):
        label_by_keywords([example("<think>I cannot</think>Sure", key="3")])


@pytest.mark.parametrize(
    ("answer", "topic", "verdict"),
    [
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", "harmful", False),
        ("Safety: Safe\nCategories: None\nRefusal: Yes", None, True),
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no\n", "harmful", True),
        ("safe", "harmful", True),
        ("\n\nsafe\n", "harmless", False),
        ("unsafe\nS1", "harmful", False),
        ("Unsafe", None, False),
    ],
)
def test_the_answers_of_known_guards_are_read(answer, topic, verdict):
    assert read_verdict(answer, topic) is verdict


@pytest.mark.parametrize(
    "answer",
    ["", "I think it is safe.", "safely done", "Refusal: maybe", "refusal: yes\nrefusal: no", "Refusal: yes, partly"],
)
def test_other_answers_are_quoted(answer):
    with pytest.raises(
        SurgeryError, match=re.escape(f"the guard answered {answer!r}, expected a line `Refusal: yes|no`")
    ):
        read_verdict(answer, "harmful")


def test_safe_says_nothing_about_an_unknown_topic():
    with pytest.raises(SurgeryError, match=r"which tells a refusal only from a known topic. Label the data"):
        read_verdict("safe", None)


GUARD_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[verdict]{% endif %}"
)


@pytest.fixture
def guard(tmp_path, monkeypatch):
    """A guard whose answers are set by the test: `answers` by response; `asked` is what it saw."""
    tokenizer = make_tokenizer(template=GUARD_TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(build("llama", tmp_path / "guard")).eval()
    model.config.max_position_embeddings = 4096
    loaded = ModelAndTokenizer("guard", model, tokenizer)
    loaded.model.asked = []
    loaded.model.answers = {}

    def texts(found, prompts, **how):
        loaded.model.asked += [tokenizer.decode(ids) for ids in prompts]
        return [next(a for r, a in model.answers.items() if r in text) for text in loaded.model.asked]

    monkeypatch.setattr(labels, "generate_texts", texts)
    return loaded


def test_a_guard_sees_prompt_and_whole_response_and_fills_what_is_missing(guard):
    long = "a" * 1000 + "z"
    guard.model.answers = {"zz": "Refusal: Yes", "az": "Refusal: No", "no": "Refusal: Yes"}
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "Hi?"})
    given = [
        example(long, key="0"),
        Example("1", turns, group="g", response="no"),
        example("Sure", key="2", refused=True),
        example("", key="3", closing=""),
    ]
    assert [e.refused for e in label_by_guard(given, guard)] == [False, True, True, None]
    assert guard.model.asked == [f"[user]Hi?[assistant]{long}[verdict]", "[user]Hi?[assistant]no[verdict]"]


def test_all_answers_that_cannot_be_read_are_named(guard):
    given = [example(name, key=name, topic=topic) for name, topic in (("a", None), ("b", "harmful"), ("c", None))]
    guard.model.answers = {"]a": "safe", "]b": "Well", "]c": "unsafe"}
    with pytest.raises(SurgeryError) as caught:
        label_by_guard(given, guard)
    first, second = str(caught.value).split("\n  ")
    assert first.startswith("guard: example a: the guard calls it safe, which tells a refusal only")
    assert second.startswith("guard: example b: the guard answered 'Well', expected")


def test_a_guard_without_template_or_room_is_an_error(guard):
    guard.model.config.max_position_embeddings = 64
    with pytest.raises(SurgeryError, match="example 9: does not fit the context of guard, 64 tokens, with its answer"):
        label_by_guard([example("Sure", key="9")], guard)
    guard.tokenizer.chat_template = None
    with pytest.raises(SurgeryError, match="guard: has no chat template to ask it by"):
        label_by_guard([example("Sure")], guard)
    guard.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(SurgeryError, match=r"guard: example 4: the chat template refuses it \(no\)"):
        label_by_guard([example("Sure", key="4")], guard)


def test_a_real_model_is_asked_and_its_babble_is_not_taken_for_a_verdict(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build("gpt_neox", tmp_path / "g", dtype=torch.float32)).eval()
    model.config.max_position_embeddings = 4096
    with pytest.raises(SurgeryError, match=r"neox: example 0: the guard answered '.*', expected a line"):
        label_by_guard(
            [example("Sure", topic="harmful")],
            ModelAndTokenizer("neox", model, make_tokenizer(template=GUARD_TEMPLATE)),
        )
