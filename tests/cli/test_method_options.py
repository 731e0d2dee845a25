"""The table of method options on the command line is held to the methods' own specifications."""

from __future__ import annotations

from cli.method_options import METHOD_OPTIONS
from merges.methods import METHODS


def test_every_parameter_of_a_method_is_an_option_of_the_same_kind() -> None:
    specified = {spec.name: spec.kind for method in METHODS.values() for spec in method.spec.parameters}
    assert {option.name: option.is_flag for option in METHOD_OPTIONS} == {
        name: kind == "boolean" for name, kind in specified.items()
    }
