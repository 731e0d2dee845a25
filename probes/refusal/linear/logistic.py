"""L2-regularised logistic regression on standardised features, with the scaling folded into w and b. All in float64.

Legend: N examples, D features, S label sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probes.refusal.linear.splits import Bools
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Floats

# lbfgs stops where no partial derivative of the mean loss is larger, or where float64 has no more to give.
TOLERANCE = 1e-10
MAX_STEPS = 10_000
# A larger gradient of the mean loss than this is a failure to converge.
LARGEST_GRADIENT = 1e-5


def fit_logistic(
    states_ND: Floats, verdicts_SN: Sequence[Bools], weights_SN: Sequence[Floats], *, C: float
) -> tuple[Floats, Floats]:
    """Fit a logistic regression to each label set, and return w (S, D) and b (S,) for raw states.

    Minimises Σᵢ sᵢ · loss(w_s·z + b_s, yᵢ) + ‖w_s‖² / 2C for z = (h − μ) / σ. Then w = w_s / σ and b = b_s − w·μ. μ
    and σ are plain mean and standard deviation; a constant feature has weight 0.

    Args:
        weights_SN: sᵢ, the weights of the examples under each label set.

    Raises:
        SurgeryError: the optimiser does not converge.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = states_ND.mean(axis=0), states_ND.std(axis=0)
    # A constant feature may have a tiny spread by rounding, and dividing by it would blow up noise.
    constant = states_ND.max(axis=0) == states_ND.min(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=~constant & (spread > 0))
    features = (states_ND - mean) * scale
    basis = None
    # With many more features than examples the regression is solved in the examples' own, smaller space.
    if 2 * len(features) <= features.shape[1]:
        features, basis = to_row_space(features)
    weights, biases = [], []
    for verdicts, counts in zip(verdicts_SN, weights_SN, strict=True):
        model = LogisticRegression(C=C, tol=TOLERANCE, max_iter=MAX_STEPS)
        model.fit(features, verdicts, sample_weight=counts)
        inner, bias = model.coef_[0], float(model.intercept_[0])
        error = counts * (sigmoid(features @ inner + bias) - verdicts)
        gradient = max(np.abs(features.T @ error + inner / C).max(), abs(error.sum())) / counts.sum()
        # `not <=` and not `>`: a NaN is a failure, too.
        if not gradient <= LARGEST_GRADIENT:
            raise SurgeryError(
                f"the probe's training did not converge: the gradient is {gradient:.1e}, expected at most "
                f"{LARGEST_GRADIENT:.0e}",
                hint="Regularise more: a smaller C.",
            )
        outer = (inner if basis is None else basis @ inner) * scale
        weights.append(outer)
        biases.append(bias - float(outer @ mean))
    return np.array(weights), np.array(biases)


def to_row_space(features_ND: Floats) -> tuple[Floats, Floats]:
    """Return Z (N, D) in coordinates of its own row space: F (N, r) and a basis B (D, r) with F = Z·B and BᵀB = 1.

    Under an L2 penalty the best weights have no component outside the row space, which would cost and change no score:
    the solution on Z is B times the solution on F. F and B come from the eigenvectors of Z·Zᵀ, which at N ≪ D is
    cheaper than a QR of Z. Directions whose share of its trace is lost in float64's rounding are left out.
    """
    values, vectors = np.linalg.eigh(features_ND @ features_ND.T)
    significant = values > len(values) * np.finfo(np.float64).eps * values[-1]
    if not significant.any():  # no feature varies: a single feature that is 0 replaces them
        return np.zeros((len(values), 1)), np.zeros((features_ND.shape[1], 1))
    lengths = np.sqrt(values[significant])
    return vectors[:, significant] * lengths, features_ND.T @ (vectors[:, significant] / lengths)


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + e^−x) without overflow."""
    # `scipy.special.expit` rounds differently in the last place, and results.json has every digit of what is computed
    # from these scores.
    scores: Floats = 0.5 * (1 + np.tanh(0.5 * logits))
    return scores
