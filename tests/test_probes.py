"""Linear probes: scikit-learn's own conformance suite, closed forms, and planted directions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes import LogisticProbe, MeanDifference

PROBES = [MeanDifference(), LogisticProbe()]


@parametrize_with_checks(PROBES)
def test_probe_behaves_as_a_scikit_learn_classifier(estimator, check) -> None:
    check(estimator)


def planted(n: int = 400, d: int = 12, shift: float = 3.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d)
    w /= np.linalg.norm(w)
    y = rng.integers(0, 2, n)
    return rng.normal(size=(n, d)) + np.outer(y - 0.5, w) * shift + 50, y, w


def test_mean_difference_is_the_closed_form() -> None:
    X, y, _ = planted()
    probe = MeanDifference().fit(X, y)
    w = X[y == 1].mean(0) - X[y == 0].mean(0)
    np.testing.assert_allclose(probe.direction_, w / np.linalg.norm(w))
    middle = (X[y == 1].mean(0) + X[y == 0].mean(0)) / 2
    assert probe.decision_function(middle[None])[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("probe", PROBES)
def test_planted_direction_is_found_in_raw_coordinates(probe) -> None:
    X, y, w = planted(4000, shift=4.0)
    fitted = probe.fit(X, y)
    assert fitted.direction_ @ w > 0.97
    assert np.linalg.norm(fitted.direction_) == pytest.approx(1)
    assert fitted.score(X, y) > 0.95


def test_logistic_probe_gives_the_same_decisions_as_scikit_learn() -> None:
    X, y, _ = planted()
    scaled = (X - X.mean(0)) / X.std(0)
    want = LogisticRegression(max_iter=1000).fit(scaled, y).decision_function(scaled)
    got = LogisticProbe().fit(X, y).decision_function(X)
    np.testing.assert_allclose(got / got.std(), want / want.std(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("probe", PROBES)
def test_three_classes_are_refused(probe) -> None:
    with pytest.raises(ValueError, match="two classes"):
        probe.fit(np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3)


def test_any_two_labels_are_kept() -> None:
    X, y, _ = planted()
    words = np.array(["no", "yes"])[y]
    assert set(MeanDifference().fit(X, words).predict(X)) == {"no", "yes"}
