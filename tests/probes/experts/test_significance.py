"""Promises of probes.experts.significance: false-discovery rates are those of the literature."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from probes.experts.significance import false_discovery_rates


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_rates_are_those_of_scipy(p: list[float]) -> None:
    assert false_discovery_rates(p) == pytest.approx(false_discovery_control(p), abs=1e-15)
