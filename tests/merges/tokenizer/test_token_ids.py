"""Promises of merges.tokenizer.token_ids."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from merges.tokenizer.token_ids import remap_ids
from surgery.checkpoint.vocabulary import Vocabulary


def vocabulary(tokens: str) -> Vocabulary:
    return Vocabulary({token: i for i, token in enumerate(tokens.split())}, Path("tokenizer.json"))


BEFORE = vocabulary("<s> </s> <pad> <image> a b")
AFTER = vocabulary("a b c </s> <s> <image>")


def test_ids_follow_their_tokens_at_any_depth() -> None:
    config = {
        "model_type": "llava",
        "bos_token_id": 0,
        "eos_token_id": [1, 0],
        "image_token_index": 3,
        "text_config": {"bos_token_id": 0, "num_hidden_layers": 1},
        "suppress_tokens": [4, 5],
        "bad_words_ids": [[4, 5], [1]],
        "decoder_start_token_id": None,
        "sep_token_id": -1,
        "hidden_size": 4,
    }
    assert remap_ids(config, before=BEFORE, after=AFTER) == (
        {
            "model_type": "llava",
            "bos_token_id": 4,
            "eos_token_id": [3, 4],
            "image_token_index": 5,
            "text_config": {"bos_token_id": 4, "num_hidden_layers": 1},
            "suppress_tokens": [0, 1],
            "bad_words_ids": [[0, 1], [3]],
            "decoder_start_token_id": None,
            "sep_token_id": -1,
            "hidden_size": 4,
        },
        (),
    )


def test_lost_tokens_leave_null_or_their_list_and_are_named() -> None:
    config = {
        "pad_token_id": 2,
        "eos_token_id": [1, 2],
        "bad_words_ids": [[2, 4], [5]],
        "text_config": {"pad_token_id": 2},
    }
    got, warnings = remap_ids(config, before=BEFORE, after=AFTER)
    assert got == {
        "pad_token_id": None,
        "eos_token_id": [3],
        "bad_words_ids": [[1]],
        "text_config": {"pad_token_id": None},
    }
    assert warnings == tuple(
        f"{place}: the output has no token '<pad>', so it stands there no more"
        for place in ("pad_token_id", "eos_token_id", "bad_words_ids", "text_config.pad_token_id")
    )
    assert remap_ids({"eos_token_id": [2], "suppress_tokens": []}, before=BEFORE, after=AFTER)[0] == {
        "eos_token_id": None,
        "suppress_tokens": [],
    }


def test_the_donor_of_the_tokenizer_says_which_tokens_bound_a_text() -> None:
    config = {"bos_token_id": 0, "pad_token_id": 2, "image_token_index": 3, "eos_token_id": 1}
    donor = {"bos_token_id": 4, "eos_token_id": [3, 2], "pad_token_id": None, "image_token_index": 0}
    assert remap_ids(config, before=BEFORE, after=AFTER, donor=donor) == (
        {"bos_token_id": 4, "pad_token_id": None, "image_token_index": 5, "eos_token_id": [3, 2]},
        (),
    )
    assert remap_ids({}, before=BEFORE, after=AFTER, donor={"eos_token_id": 3})[0] == {"eos_token_id": 3}


ids = st.integers(-1, 9)


@given(
    st.dictionaries(
        st.sampled_from(["bos_token_id", "eos_token_id", "suppress_tokens", "text_config", "x"]),
        st.one_of(
            ids, st.none(), st.lists(ids), st.lists(st.lists(ids)), st.dictionaries(st.just("pad_token_id"), ids)
        ),
    )
)
def test_the_same_vocabulary_or_a_longer_one_changes_nothing(config: dict[str, object]) -> None:
    longer = vocabulary("<s> </s> <pad> <image> a b c d")
    assert remap_ids(config, before=BEFORE, after=longer) == (config, ())
