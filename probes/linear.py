"""Linear probes of a residual stream, as scikit-learn estimators that end in a direction and a threshold.

    score(x) = x . direction_ + bias_        direction_ unit, in raw residual coordinates; positive means class 1

MeanDifference: direction = mean of class 1 - mean of class 0, threshold half-way between the two projected means.
LogisticProbe:  L2-regularised logistic regression on standardised features, mapped back to raw coordinates.
Both take arrays `[n, d_model]`; rows come from `store.rows(hook, where=...)`. Labels are 0/1 or any two classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data


class _LinearProbe(ClassifierMixin, BaseEstimator, ABC):
    """Shared contract: `_direction` gives an unscaled weight vector and offset, the rest follows."""

    hook_name: str | None

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on X `[n, d_model]` and two classes y `[n]`. Raises ValueError on NaN or another number of classes."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_ = unique_labels(y)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported: this probe separates two classes, the labels have "
                f"{len(self.classes_)} class(es); choose two."
            )
        weights, offset = self._direction(X, (np.asarray(y) == self.classes_[1]).astype(int))
        norm = float(np.linalg.norm(weights))
        if norm == 0:
            raise ValueError(
                "the two classes have the same mean in every coordinate: there is no direction to find"
            )
        self.direction_ = weights / norm
        self.bias_ = offset / norm
        return self

    @abstractmethod
    def _direction(self, X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
        """Weight vector `[d_model]` of any length, and offset, from X and labels 0 and 1."""

    def decision_function(self, X: Any) -> np.ndarray:
        """Signed distance from the threshold along the direction, float64 `[n]`, in residual units."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.direction_ + self.bias_

    def predict(self, X: Any) -> np.ndarray:
        """Class of each row."""
        check_is_fitted(self)
        return self.classes_[(self.decision_function(X) > 0).astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class MeanDifference(_LinearProbe):
    """Difference of class means (the difference-in-means direction of the steering literature)."""

    def __init__(self, *, hook_name: str | None = None) -> None:
        self.hook_name = hook_name

    def _direction(self, X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
        one, zero = X[y == 1].mean(0), X[y == 0].mean(0)
        w = one - zero
        return w, -float((one + zero) @ w) / 2


class LogisticProbe(_LinearProbe):
    """Logistic regression on standardised coordinates; C is scikit-learn's inverse regularisation."""

    def __init__(self, *, C: float = 1.0, max_iter: int = 1000, hook_name: str | None = None) -> None:
        self.C = C
        self.max_iter = max_iter
        self.hook_name = hook_name

    def _direction(self, X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
        scaler = StandardScaler().fit(X)
        model = LogisticRegression(C=self.C, max_iter=self.max_iter).fit(scaler.transform(X), y)
        self.n_iter_ = int(model.n_iter_.max())
        w = model.coef_[0] / scaler.scale_
        return w, float(model.intercept_[0] - scaler.mean_ @ w)
