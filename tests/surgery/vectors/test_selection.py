"""Which tensors an edit touches, and how strongly."""

from __future__ import annotations

import math

import pytest

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.vectors.selection import TensorSelection, parse_scale_globs

NAMES = [
    "lm_head.weight",
    *(f"model.layers.{i}.{part}.weight" for i in (0, 1, 10) for part in ("mlp.up_proj", "self_attn.q_proj")),
    "model.norm.weight",
]


def scales(selection: TensorSelection) -> dict[str, float]:
    return {name.removesuffix(".weight"): selection.scale_of(name) for name in NAMES if selection.scale_of(name)}


def failure(selection: TensorSelection) -> str:
    with pytest.raises(SurgeryError) as caught:
        selection.check_names(NAMES)
    assert caught.value.exit_code == WRONG_USAGE
    return str(caught.value)


def test_empty_selection_edits_everything_at_its_scale() -> None:
    assert all(
        TensorSelection().scale_of(name) == 1.0 and TensorSelection(-0.5).scale_of(name) == -0.5 for name in NAMES
    )
    TensorSelection().check_names(NAMES)


@pytest.mark.parametrize(
    ("glob", "selected"),
    [
        ("*.mlp.*", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"]),
        ("model.layers.1.*", ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1?.*", ["model.layers.10.mlp.up_proj", "model.layers.10.self_attn.q_proj"]),
        ("model.layers.[!0]*.mlp.*", ["model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"]),
        ("lm_head.weight", ["lm_head"]),
    ],
)
def test_glob_matches_whole_names(glob: str, selected: list[str]) -> None:
    assert list(scales(TensorSelection(include=(glob,)))) == selected
    left = scales(TensorSelection(exclude=(glob,)))
    assert set(left) == {name.removesuffix(".weight") for name in NAMES} - set(selected)


@pytest.mark.parametrize("glob", ["mlp", "model.layers.0", "LM_HEAD.weight", "norm.weight"])
def test_part_of_a_name_and_other_case_do_not_match(glob: str) -> None:
    message = failure(TensorSelection(include=(glob,)))
    assert message == (
        f"--include '{glob}': matches none of 8 tensors, such as "
        "lm_head.weight, model.layers.0.mlp.up_proj.weight, model.layers.0.self_attn.q_proj.weight and 5 more"
    )


def test_exclude_wins_over_include() -> None:
    selection = TensorSelection(2.0, include=("*.mlp.*", "lm_head*"), exclude=("*.0.*",))
    assert scales(selection) == {"lm_head": 2.0, "model.layers.1.mlp.up_proj": 2.0, "model.layers.10.mlp.up_proj": 2.0}


def test_last_matching_scale_counts() -> None:
    selection = TensorSelection(1.0, scale_for={"model.*": 2.0, "*.mlp.*": 3.0, "*.0.*": 4.0})
    assert selection.scale_of("lm_head.weight") == 1.0
    assert selection.scale_of("model.norm.weight") == 2.0
    assert selection.scale_of("model.layers.1.mlp.up_proj.weight") == 3.0
    assert selection.scale_of("model.layers.0.mlp.up_proj.weight") == 4.0


def test_scale_for_does_not_bring_back_what_the_globs_leave_out() -> None:
    selection = TensorSelection(include=("*.mlp.*",), exclude=("*.0.*",), scale_for={"*": 5.0})
    assert scales(selection) == {"model.layers.1.mlp.up_proj": 5.0, "model.layers.10.mlp.up_proj": 5.0}
    assert not selection.selects("model.layers.0.mlp.up_proj.weight")


def test_tensor_at_scale_zero_is_still_selected() -> None:
    selection = TensorSelection(scale_for={"lm_head*": 0.0})
    assert selection.scale_of("lm_head.weight") == 0.0 and selection.selects("lm_head.weight")
    selection.check_names(NAMES)


@pytest.mark.parametrize("option", ["include", "exclude", "scale_for"])
def test_every_glob_must_match_something(option: str) -> None:
    globs = {"*": 1.0, "*.moe.*": 1.0} if option == "scale_for" else ("lm_head*", "*.moe.*")
    assert failure(TensorSelection(**{option: globs})).startswith(  # type: ignore[arg-type]
        f"--{option.replace('_', '-')} '*.moe.*': matches none of 8 tensors, such as lm_head.weight, "
    )


def test_globs_that_leave_nothing_are_refused() -> None:
    assert failure(TensorSelection(include=("*.mlp.*",), exclude=("model.*",))) == (
        "--include and --exclude: leave none of 8 tensors to edit"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_must_be_finite(value: float) -> None:
    with pytest.raises(SurgeryError, match=rf"^--scale: got {value}, expected a finite number$") as caught:
        TensorSelection(value)
    assert caught.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match=rf"^--scale-for x: got {value}, expected a finite number$"):
        TensorSelection(scale_for={"x": value})


def test_scale_options_are_parsed_in_order() -> None:
    assert parse_scale_globs([]) == {}
    assert parse_scale_globs(["*.mlp.*=0.5", "a=b=-1e-3"]) == {"*.mlp.*": 0.5, "a=b": -0.001}
    assert list(parse_scale_globs(["a*=1", "ab=2", "a*=3"]).items()) == [("ab", 2.0), ("a*", 3.0)]


def test_last_option_counts_where_a_glob_is_given_twice() -> None:
    assert TensorSelection(scale_for=parse_scale_globs(["a*=1", "ab=2", "a*=3"])).scale_of("ab") == 3.0


@pytest.mark.parametrize("text", ["", "0.5", "=0.5", "x=", "x=big", "x", "x=1,5"])
def test_scale_option_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        parse_scale_globs([text])
    assert str(caught.value) == f"--scale-for: got {text!r}, expected GLOB=NUMBER"
    assert caught.value.exit_code == WRONG_USAGE
