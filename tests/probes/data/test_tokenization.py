"""Where the thinking is, and which tokens lie on which side of it."""

from __future__ import annotations

import re

import pytest
from hypothesis import example as tried
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_tokenizer import CHARACTERS, MARKS, TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizer

from probes.data.examples import Example
from probes.data.markers import Markers, find_markers, never_closed, split_completion, split_responses, starts_open
from probes.data.tokenization import (
    build_sequences,
    encode,
    render_prompt,
    template_hash,
    text_before_answer,
    tokenizer_hash,
)
from surgery.errors import WRONG_USAGE, SurgeryError

THINK = Markers("<think>", "</think>")
PLAIN = make_tokenizer()


def example(prompt="Hi?", key="0", **known):
    return Example(key, ({"role": "user", "content": prompt},), group=prompt, **known)


def pieces(tokenizer, sequence):
    """The text of each segment."""
    return tuple(
        tokenizer.decode([sequence.ids[at] for at in sequence.span(name)])
        for name in ("prompt", "thinking", "closing", "answer")
    )


def build(tokenizer, *examples, markers=THINK, **asked):
    return build_sequences(tokenizer, examples, markers, where="d.jsonl", **asked)


def failure(tokenizer, *examples, **asked):
    with pytest.raises(SurgeryError) as caught:
        build(tokenizer, *examples, **asked)
    return str(caught.value)


# Markers


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>\n", "\n</think>\n\n"),
        ("<thinking>\n", "\n</thinking>\n\n"),
        ("<reasoning>\n", "\n</reasoning>\n\n"),
        ("<thought>\n", "\n</thought>\n\n"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<seed:think>", "</seed:think>"),
        ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ],
)
def test_known_pairs_are_found_among_the_tokens_and_in_templates(opening, closing):
    signs = (opening.strip(), closing.strip().removesuffix("<|START_RESPONSE|>"))
    by_tokens = make_tokenizer(marks=signs, template=None)
    by_template = make_tokenizer(marks=(), template=f"{{# {signs[0]} {signs[1]} #}}")
    by_both = make_tokenizer(marks=signs[:1], template=f"{{# {signs[1]} #}}")
    for tokenizer in (by_tokens, by_template, by_both):
        markers = find_markers(tokenizer, where="m")
        assert (markers.opening, markers.closing) == (opening, closing)


def test_channels_are_a_pair_of_texts_too():
    template = "{{ '<|start|>assistant<|channel|>analysis<|message|>' }}{{ '<|channel|>final<|message|>' }}"
    markers = find_markers(make_tokenizer(marks=(), template=template), where="m")
    written = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So."
    assert split_completion(written, markers) == (
        "Hm.",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "So.",
    )
    gemma = find_markers(make_tokenizer(marks=("<|channel>", "<channel|>"), template=None), where="m")
    assert split_completion("<|channel>thought\nHm.\n<channel|>So.", gemma) == ("Hm.", "\n<channel|>", "So.")


def test_the_template_decides_between_pairs_and_nothing_is_guessed():
    both = ("<think>", "</think>", "[THINK]", "[/THINK]")
    assert find_markers(make_tokenizer(marks=both, template="[THINK] [/THINK]"), where="m").open == "[THINK]"
    with pytest.raises(
        SurgeryError, match=re.escape("m: has several pairs of thinking markers: <think> … </think>, [")
    ):
        find_markers(make_tokenizer(marks=both, template=None), where="m")
    with pytest.raises(SurgeryError) as caught:
        find_markers(make_tokenizer(marks=()), where="m")
    assert caught.value.exit_code == WRONG_USAGE
    assert str(caught.value) == (
        "m: no thinking markers are known from its tokens or its chat template. Name them with --think-open and "
        "--think-close, or give --no-thinking for a model that does not think."
    )


@pytest.mark.parametrize(
    ("opening", "closing", "expected"),
    [
        ("<t>", "</t>", Markers("<t>", "</t>")),
        ("[THINK]", None, Markers("[THINK]", "[/THINK]", "", "", "")),
        (None, "</think>", THINK),
        ("<think>", "</t>", Markers("<think>", "</t>")),
        ("<t> ", "</t>\n", Markers("<t>", "</t>", " ", "", "\n")),
        (None, "</think>\n", Markers("<think>", "</think>", "\n", "", "\n")),
    ],
)
def test_given_markers_count_as_they_stand(opening, closing, expected):
    assert find_markers(make_tokenizer(marks=()), opening=opening, closing=closing, where="m") == expected


@pytest.mark.parametrize(
    ("opening", "closing", "message"),
    [
        ("<t>", None, "--think-open: <t> belongs to no known pair of markers. Add --think-close."),
        (None, "</t>", "--think-close: </t> belongs to no known pair of markers. Add --think-open."),
        ("<t>", "<t>", "--think-open and --think-close are both '<t>', expected two different texts."),
        (" ", "</t>", "--think-open: got ' ', expected a text that is not blank"),
    ],
)
def test_half_a_pair_is_an_error(opening, closing, message):
    with pytest.raises(SurgeryError, match=re.escape(message)):
        find_markers(PLAIN, opening=opening, closing=closing, where="m")


# Completions


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hm.\n</think>\n\nSo.", ("Hm.", "\n</think>\n\n", "So.")),
        ("<think>\nHm.</think>So.", ("Hm.", "</think>", "So.")),
        ("\n<think>\n\nHm. \n\n</think> So. ", ("\nHm.", " \n\n</think> ", "So. ")),
        ("<think>Hm.\n</think>\n\n", ("Hm.", "\n</think>\n\n", "")),
        ("</think>So.", ("", "</think>", "So.")),
        ("<think>\n\n</think>\n\nSo.", ("", "\n</think>\n\n", "So.")),
        ("a</think>b</think>c", ("a", "</think>", "b</think>c")),
        ("Hm. And", ("Hm. And", "", "")),
        ("<think>\nHm", ("Hm", "", "")),
        ("", ("", "", "")),
    ],
)
def test_a_completion_is_cut_at_its_first_closing_marker(text, parts):
    assert split_completion(text, THINK) == parts


@given(st.text("ab \n</think>", max_size=30))
def test_the_parts_are_the_text_again(text):
    thinking, closing, response = split_completion(text, THINK)
    if not starts_open(text, THINK):
        assert thinking + closing + response == text
    if closing:
        assert closing.strip() == "</think>" and thinking == thinking.rstrip() and response == response.lstrip()


def test_given_responses_are_split_once():
    whole, apart, other, open_ = split_responses(
        [
            example(response="<think>Hm</think>So"),
            example(thinking="x", response="So"),
            example(response="So"),
            example(response="<think>Hm"),
        ],
        THINK,
    )
    assert (whole.thinking, whole.closing, whole.response) == ("Hm", "</think>", "So")
    assert (apart.thinking, apart.closing) == ("x", None) and (other.thinking, other.response) == (None, "So")
    assert never_closed([whole, apart, other, open_]) == [open_]
    assert split_responses([whole, other], None) == [whole, other]


# Sequences


def test_the_segments_are_what_their_texts_are():
    [found] = build(PLAIN, example(thinking="Hm.", response="So."))
    assert pieces(PLAIN, found) == ("<s><user>Hi?</s><bot><think>\n", "Hm.", "\n</think>\n\n", "So.")
    assert PLAIN.decode([found.ids[found.decision]]) == "\n"
    assert found.ids.count(PLAIN.bos_token_id) == 1 and found.key == "0"


def test_the_ids_are_those_of_the_whole_text_tokenised_once():
    given_ = example(thinking="Hm.", response="So.")
    [found] = build(PLAIN, given_)
    text = render_prompt(PLAIN, given_, THINK) + "Hm." + THINK.closing + "So."
    assert list(found.ids) == PLAIN(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("end", "prompt"),
    [
        ("<bot>", "<bot><think>\n"),
        ("<bot><think>\n", "<bot><think>\n"),
        ("<bot><think>", "<bot><think>"),
        ("<bot>\n", "<bot>\n<think>\n"),
    ],
)
def test_the_opening_marker_is_there_once(end, prompt):
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] + '" + end.replace("\n", "\\n") + "' }}")
    assert render_prompt(tokenizer, example(), THINK) == "Hi?" + prompt


def test_a_template_that_closes_the_thinking_is_an_error_and_is_asked_not_to():
    hybrid = "{% if enable_thinking %}<bot>{% else %}<bot><think>\n\n</think>\n\n{% endif %}"
    tokenizer = make_tokenizer(template=hybrid)
    assert render_prompt(tokenizer, example(), THINK) == "<bot><think>\n"
    assert render_prompt(tokenizer, example(), None) == "<bot><think>\n\n</think>\n\n"
    closing = make_tokenizer(template="<think></think>\n")
    assert "d.jsonl: example 0: the chat template ends the thinking before it begins, with </think>" in failure(
        closing, example(thinking="x", response="y")
    )
    opening = make_tokenizer(template="<think>\n")
    assert "begins a thinking with <think>. Drop --no-thinking." in failure(
        opening, example(response="y"), markers=None
    )


def test_a_date_in_the_template_is_always_the_same():
    tokenizer = make_tokenizer(
        template="\n{{ strftime_now('%Y-%m-%d') }}{% set day = strftime_now('%d %b') %}{{ day }}"
    )
    assert render_prompt(tokenizer, example(), None) == "\n2025-01-0101 Jan"


def test_without_template_the_parts_follow_each_other_after_the_tokenizers_own_bos():
    tokenizer = make_tokenizer(template=None, adds_bos=True)
    thought = example(thinking="Hm.", response="So.")
    [found] = build(tokenizer, thought, markers=None)
    assert pieces(tokenizer, found) == ("<s>Hi?", "Hm.", "", "So.")
    assert found.decision == found.ends[1] - 1
    [found] = build(tokenizer, thought)
    assert pieces(tokenizer, found) == ("<s>Hi?<think>\n", "Hm.", "\n</think>\n\n", "So.")
    assert list(encode(tokenizer, "Hi?")) == list(found.ids[:4])
    # With a template the tokenizer's own is left out, for the template writes it.
    tokenizer = make_tokenizer(adds_bos=True)
    [found] = build(tokenizer, thought)
    assert found.ids.count(tokenizer.bos_token_id) == 1
    assert pieces(tokenizer, found)[3] == "So."


def test_a_conversation_goes_through_the_template_whole():
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    long = Example("7", turns, group="g", response="d")
    [found] = build(PLAIN, long, markers=None)
    assert pieces(PLAIN, found) == ("<s><user>a</s><bot>b</s><user>c</s><bot>", "", "", "d")
    assert "example 7: is a conversation of 3 messages, and the tokenizer has no chat template" in failure(
        make_tokenizer(template=None), long, markers=None
    )


def test_the_answer_can_be_left_out_and_need_not_be_known():
    known, open_ = example(thinking="Hm.", response="So."), example(thinking="Hm.")
    [whole] = build(PLAIN, known)
    for short in (build(PLAIN, known, answer=False)[0], build(PLAIN, open_, answer=False)[0]):
        assert short.ids == whole.before_answer and short.ends == (*whole.ends[:3], whole.ends[2])
        assert short.decision == whole.decision
    [bare] = build(PLAIN, example(), markers=None, answer=False)
    assert pieces(PLAIN, bare) == ("<s><user>Hi?</s><bot>", "", "", "")
    assert list(encode(PLAIN, text_before_answer(PLAIN, open_, THINK))) == list(whole.before_answer)


def test_a_token_over_a_border_belongs_to_the_later_segment():
    tokenizer = make_tokenizer(merges=[(".", "\n"), (" ", "S"), ("\n", "H")])
    [found] = build(tokenizer, example(thinking="Hm.", closing="\n</think> ", response="So."))
    assert pieces(tokenizer, found) == ("<s><user>Hi?</s><bot><think>", "\nHm", ".\n</think>", " So.")
    # The white space that the answer's first token took along is the answer's whether or not the answer is kept.
    [short] = build(tokenizer, example(thinking="Hm.", closing="\n</think> ", response="So."), answer=False)
    assert short.ids == found.before_answer and tokenizer.decode([short.ids[short.decision]]) == "</think>"


def test_the_closing_marker_is_never_part_of_the_answer():
    tokenizer = make_tokenizer(marks=(), merges=[(">", "S"), ("?", "S")])
    [found] = build(tokenizer, example(thinking="Hm.", closing="\n</think>", response="So."))
    assert pieces(tokenizer, found)[2:] == ("\n</think>", "So.")
    assert tokenizer.decode([found.ids[found.decision]]) == ">"
    bare = make_tokenizer(template=None, merges=[("?", "S")], adds_bos=True)
    [found] = build(bare, example(response="So."), markers=None)
    assert pieces(bare, found) == ("<s>Hi?", "", "", "So.")


class Slow(PreTrainedTokenizer):
    """The same tokens from a tokenizer that knows no offsets."""

    def __init__(self, fast, **settings):
        self.fast = fast
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return len(self.fast)

    def get_vocab(self):
        return self.fast.get_vocab()

    def _tokenize(self, text, **_):
        return self.fast.tokenize(text)

    def _convert_token_to_id(self, token):
        return self.fast.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, number):
        return self.fast.convert_ids_to_tokens(number)


TEXT = st.text(CHARACTERS, max_size=12)
MERGED = make_tokenizer(merges=[(".", "\n"), (" ", "S"), ("\n", "\n"), (">", "\n"), ("\n", "H")])
SLOW = Slow(MERGED, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
SLOW.chat_template = TEMPLATE


@settings(deadline=None)
@given(TEXT, TEXT, st.sampled_from([" ", "\n", "\n\n", ""]), TEXT)
@tried("", ">\n", " ", "")  # of the thinking alone, its end would be one token
def test_a_slow_tokenizer_is_cut_where_a_fast_one_is(prompt, thinking, space, response):
    if starts_open(thinking, THINK) or "</think>" in thinking + response:
        return
    given_ = example(f"q{prompt}", thinking=thinking, closing=f"\n</think>{space}", response=f"a{response}")
    [fast], [slow] = build(MERGED, given_), build(SLOW, given_)
    assert fast == slow
    assert "".join(pieces(MERGED, fast)) == MERGED.decode(fast.ids)
    assert MERGED.decode(fast.before_answer).rstrip().endswith("</think>")


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"thinking": "a</think>b", "response": "c"}, "its thinking holds the closing marker </think>. Give the text"),
        ({"thinking": "<think>a", "response": "c"}, "its thinking begins with the marker <think>."),
        ({"thinking": "a", "closing": "\n", "response": "c"}, "its closing '\\n' lacks the marker </think>"),
        ({"response": "c"}, "has a response, but no thinking, in the field or between <think> and </think>."),
        ({"closing": "</think>", "response": "c"}, "has a response, but no thinking"),
        ({"closing": "</think>"}, 'has a closing, but no thinking. Add "thinking", or leave "closing" out.'),
        ({"thinking": "a", "response": "b</think>c"}, "has its thinking apart, and </think> in its response too."),
        (
            {"thinking": "a", "closing": "", "response": ""},
            "its thinking was never closed, so that there is no answer.",
        ),
        ({}, "its thinking is not known yet. Generate it first."),
        ({"thinking": "a"}, "its response is not known yet. Generate it first."),
    ],
)
def test_what_does_not_fit_the_markers_names_its_example(known, message):
    assert f"d.jsonl: example 5: {message}" in failure(PLAIN, example(key="5", **known))


def test_all_examples_that_cannot_be_used_are_named():
    long = example("a" * 50, key="2", thinking="Hm.", response="So.")
    fine = example(key="1", thinking="Hm.", response="So.")
    said = failure(PLAIN, fine, long, example(key="3"), max_tokens=50).split("\n  ")
    assert said == [
        "d.jsonl: example 3: its thinking is not known yet. Generate it first.",
        "d.jsonl: example 2: has 66 tokens, and the model reads 50",
    ]
    assert len(build(PLAIN, fine, max_tokens=50)) == 1


def test_a_thinking_for_a_model_that_does_not_think_is_an_error():
    assert "has a thinking, and its model is said not to think. Drop --no-thinking." in failure(
        PLAIN, example(thinking="Hm.", response="So."), markers=None
    )
    assert len(build(PLAIN, example(thinking="", response="So."), markers=None)) == 1


def test_what_the_template_says_against_a_conversation_is_passed_on():
    tokenizer = make_tokenizer(template="{{ raise_exception('No system prompts!') }}")
    assert failure(tokenizer, example(thinking="a", response="b")) == (
        "d.jsonl: example 0: the chat template refuses it (No system prompts!)"
    )


def test_a_prompt_without_tokens_is_an_error():
    tokenizer = make_tokenizer(template=None, adds_bos=True)
    assert "example 0: its prompt has no tokens of its own" in failure(
        tokenizer, example("", response="a"), markers=None
    )


# Hashes


def test_hashes_tell_templates_and_tokenizers_apart_and_do_not_depend_on_use():
    one, other = make_tokenizer(), make_tokenizer(merges=[("a", "b")], template="x")
    assert template_hash(one) == template_hash(make_tokenizer()) != template_hash(other)
    assert template_hash(make_tokenizer(template=None)) not in (template_hash(one), template_hash(other))
    before = tokenizer_hash(one)
    assert before == tokenizer_hash(make_tokenizer()) != tokenizer_hash(other)
    one(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(one) == before
    assert tokenizer_hash(make_tokenizer(adds_bos=True)) != before
    assert tokenizer_hash(SLOW) != tokenizer_hash(Slow(one))


def test_the_tokenizer_of_these_tests_loses_nothing():
    assert PLAIN.decode(PLAIN(CHARACTERS + "".join(MARKS))["input_ids"]) == CHARACTERS + "".join(MARKS)
