"""Bounding what verification missed, by patching random subsets of the nodes that were not verified.

m subsets S of the unverified nodes U, each node in with probability p; y_S = L(all of S patched) − L(clean). For a node
Î = mean(y | n ∈ S) − mean(y | n ∉ S) with Welch's standard error se and ν degrees of freedom. "Some node of U has
|I| ≥ θ" is rejected at α iff max_n P(T_ν > (θ − |Î_n|) / se_n) ≤ α (intersection-union: no correction), so the bound is

    θ*(α) = max over U of |Î_n| + t_{1−α, ν_n} · se_n                                     (arXiv 2403.00745 §4.2)

It bounds the effect of a node averaged over the subsets, which is its own effect only where effects add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.errors import UsageError
from probes.attribution.patching import ExactPatching

CAVEAT = (
    "The bound is on a node's effect averaged over random subsets of patched nodes, "
    "not on patching it alone in the clean run; the two are the same where effects add up."
)
ALPHAS = (0.1, 0.01, 0.001)
SHARE = 0.2
"""Chance of a node to be in a subset."""
MIN_EXPECTED = 16


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Subset-averaged effects of the unverified nodes, and the largest that they can be."""

    nodes: np.ndarray
    """Ids of the unverified nodes that can have an effect."""
    estimate: np.ndarray
    """Î of each, in the metric's units."""
    se: np.ndarray
    bounds: dict[float, float]
    """α → θ*."""
    n_samples: int
    p: float
    caveat: str = CAVEAT

    def lines(self) -> list[str]:
        """What to print."""
        found = f"{len(self.nodes):,} unverified nodes, {self.n_samples} subsets at p = {self.p:g}"
        rows = [f"no effect above {b:.4g} at confidence {1 - a:g}" for a, b in self.bounds.items()]
        return [found, *rows, self.caveat]


def subset_bounds(member: np.ndarray, y: np.ndarray, alphas: Sequence[float] = ALPHAS) -> tuple[np.ndarray, np.ndarray, dict[float, float]]:  # fmt: skip
    """Î, se [U] and θ*(α) from membership [m, U] (bool) and effects y [m]. A node needs two subsets of either kind."""
    from scipy import stats

    inside, y = member.astype(np.float64), np.asarray(y, dtype=np.float64)
    y = y - y.mean()
    n1 = inside.sum(0)
    n0 = len(y) - n1
    if not len(n1):
        return np.zeros(0), np.zeros(0), dict.fromkeys(alphas, 0.0)
    if min(n1.min(), n0.min()) < 2:
        raise UsageError(
            f"a node is in {int(n1.min())} of {len(y)} subsets: draw more (n_samples), or take p nearer 0.5"
        )
    sums, squares = inside.T @ y, inside.T @ y**2
    mean1, mean0 = sums / n1, (y.sum() - sums) / n0
    v1 = np.maximum(squares - n1 * mean1**2, 0) / (n1 - 1) / n1
    v0 = np.maximum((y**2).sum() - squares - n0 * mean0**2, 0) / (n0 - 1) / n0
    se = np.sqrt(v1 + v0)
    with np.errstate(divide="ignore", invalid="ignore"):
        nu = np.where(se > 0, (v1 + v0) ** 2 / (v1**2 / (n1 - 1) + v0**2 / (n0 - 1)), 1.0)
    estimate = mean1 - mean0
    bounds = {a: float((np.abs(estimate) + stats.t.ppf(1 - a, nu) * se).max()) for a in alphas}
    return estimate, se, bounds


def check_sampling(n_samples: int, p: float) -> None:
    """UsageError where a node would be in too few subsets, or in too many, for its statistics."""
    if not 0 < p < 1 or n_samples * min(p, 1 - p) < MIN_EXPECTED:
        raise UsageError(
            f"{n_samples} subsets at p = {p:g} hold a node {n_samples * p:g} times on average: "
            f"it must be in and out at least {MIN_EXPECTED} times, so draw more subsets (200 is usual)"
        )


def draw_subsets(n: int, n_samples: int, p: float, seed: int) -> np.ndarray:
    """Membership [m, n], bool."""
    check_sampling(n_samples, p)
    return np.random.default_rng(seed).random((n_samples, n)) < p


def diagnose(
    exact: ExactPatching, verified: np.ndarray, *, n_samples: int = 200, p: float = SHARE,
    alphas: Sequence[float] = ALPHAS, seed: int = 0,
) -> Diagnosis:  # fmt: skip
    """Bound the effects of all nodes that are not in `verified`, with `n_samples` patched passes."""
    rest = np.setdiff1d(np.arange(len(exact.space)), verified)
    rest = rest[exact.live(rest)]
    member = draw_subsets(len(rest), n_samples, p, seed)
    y = exact.patched([rest[row] for row in member])
    estimate, se, bounds = subset_bounds(member, y, alphas)
    return Diagnosis(nodes=rest, estimate=estimate, se=se, bounds=bounds, n_samples=n_samples, p=p)
