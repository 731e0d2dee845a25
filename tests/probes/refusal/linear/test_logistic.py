"""Logistic regression equals a direct fit, and an optimiser that does not converge is an error."""

from __future__ import annotations

import numpy as np
import pytest
from support.linear_probes import make_data

from probes.refusal.linear import logistic
from probes.refusal.linear.logistic import fit_logistic, sigmoid, to_row_space
from surgery.errors import SurgeryError


def test_the_solution_in_the_row_space_is_the_direct_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    states = generator.normal(size=(40, 200)) * np.exp(generator.normal(size=200)) + 5
    states[:, 7] = 1.5
    verdicts = [generator.random(40) < 0.5 for _ in range(3)]
    weights = [generator.uniform(0.2, 3, size=40) for _ in range(3)]
    rotated, bias = fit_logistic(states, verdicts, weights, C=0.7)
    monkeypatch.setattr(logistic, "to_row_space", None)  # were it called, the fit would fail
    features = np.concatenate([states] * 6)  # six times the examples at a sixth of the weight: too many to rotate
    direct, direct_bias = fit_logistic(
        features, [np.tile(v, 6) for v in verdicts], [np.tile(w, 6) / 6 for w in weights], C=0.7
    )
    assert rotated == pytest.approx(direct, abs=1e-6 * np.abs(direct).max())
    assert bias == pytest.approx(direct_bias, abs=1e-5)
    assert (rotated[:, 7] == 0).all()


def test_the_row_space_has_an_orthonormal_basis_that_keeps_every_feature() -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(10, 50))
    features[9] = features[8] + features[7]  # of rank 9
    inside, basis = to_row_space(features)
    assert inside.shape == (10, 9) and basis.shape == (50, 9)
    assert basis.T @ basis == pytest.approx(np.eye(9), abs=1e-10)
    assert inside @ basis.T == pytest.approx(features, abs=1e-10)


def test_an_optimiser_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "MAX_STEPS", 1)
    with pytest.raises(SurgeryError, match=r"did not converge: the gradient is .* Regularise more"):
        make_data(20, 4).train()


def test_sigmoid_is_scipys_and_does_not_overflow() -> None:
    from scipy.special import expit

    logits = np.array([-1e4, -40.0, -0.3, 0.0, 1.7, 800.0])
    assert sigmoid(logits) == pytest.approx(expit(logits), abs=1e-15)
