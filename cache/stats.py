"""Mean, variance and norms of a set of rows, from the float64 sums of the commit records (records.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.records import Sums


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of a set of rows, in the units of the activations, float64."""

    n: int
    mean: np.ndarray  # [d]
    var: np.ndarray  # [d], population
    mean_norm: float
    mean_sq_norm: float
    max_abs: float

    @property
    def total_variance(self) -> float:
        """E‖x − mean‖²: the denominator of the fraction of variance unexplained."""
        return float(self.var.sum())

    @classmethod
    def of(cls, sums: Sums) -> Stats:
        mean = sums.sum / sums.n
        return cls(
            n=sums.n,
            mean=mean,
            var=np.maximum(sums.sumsq / sums.n - mean**2, 0.0),
            mean_norm=sums.sum_norm / sums.n,
            mean_sq_norm=sums.sum_sq_norm / sums.n,
            max_abs=sums.max_abs,
        )
