"""How many forward passes a method needs to find the nodes that matter most, its own passes counted.

A method spends its own passes, then patches nodes exactly in its order, one pass a node. The curve is the share of the
true K nodes of largest |I| that has been patched after so many passes. Searches without gradients, to compare with:

    iterative          every node in order of execution
    subset_sampling    mean(y | n ∈ S) − mean(y | n ∉ S) over random subsets S, then in order of |Î|
    blocks             groups of neighbouring nodes patched together, then node by node in order of the groups' |effect|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probes.attribution.diagnose import draw_subsets, subset_bounds
from probes.attribution.patching import ExactPatching


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A method's order of all nodes and what it spent to get it."""

    method: str
    order: np.ndarray
    passes: float
    """Forward-equivalents spent before the first node is patched."""


def iterative(exact: ExactPatching) -> Ranking:
    """Brute force in order of execution, over the nodes that can have an effect."""
    ids = np.arange(len(exact.space))
    live = exact.live(ids)
    return Ranking(method="iterative", order=np.concatenate([ids[live], ids[~live]]), passes=0)


def subset_sampling(exact: ExactPatching, *, n_samples: int = 200, p: float = 0.2, seed: int = 0) -> Ranking:
    """Order by the mean difference between random subsets with and without a node."""
    ids = np.arange(len(exact.space))
    live = ids[exact.live(ids)]
    member = draw_subsets(len(live), n_samples, p, seed)
    estimate, _, _ = subset_bounds(member, exact.patched([live[row] for row in member]))
    score = np.zeros(len(ids))
    score[live] = np.abs(estimate)
    return Ranking(method="subset_sampling", order=np.argsort(-score, kind="stable"), passes=n_samples)


def blocks(exact: ExactPatching, *, size: int = 24) -> Ranking:
    """Order by the effect of groups of `size` neighbours patched together."""
    ids = np.arange(len(exact.space))
    live = ids[exact.live(ids)]
    groups = np.array_split(live, max(1, len(live) // size))
    effect = np.abs(exact.patched(groups))
    order = np.concatenate([groups[i] for i in np.argsort(-effect, kind="stable")])
    return Ranking(
        method="blocks", order=np.concatenate([order, np.setdiff1d(ids, live)]), passes=len(groups)
    )


def true_top(truth: np.ndarray, k: int) -> np.ndarray:
    """Ids of the `k` largest |I|."""
    return np.argsort(-np.abs(truth), kind="stable")[:k]


def recall_at(order: np.ndarray, truth: np.ndarray, k: int, n: int) -> float:
    """Share of the true top `k` among the first `n` of an order."""
    return len(np.intersect1d(true_top(truth, k), order[:n])) / k


def recall_curve(ranking: Ranking, truth: np.ndarray, k: int) -> np.ndarray:
    """Forward-equivalents after which the 1st, 2nd, ... of the true top `k` has been patched, [k]."""
    place = np.empty(len(ranking.order), dtype=np.int64)
    place[ranking.order] = np.arange(len(ranking.order))
    return ranking.passes + 1 + np.sort(place[true_top(truth, k)])


def recall_table(rankings: Sequence[Ranking], truth: np.ndarray, k: int) -> pd.DataFrame:
    """Columns method, passes, recall: a step each time one more of the true top `k` is found."""
    parts = [
        pd.DataFrame({
            "method": r.method, "passes": recall_curve(r, truth, k), "recall": np.arange(1, k + 1) / k,
        })
        for r in rankings
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)
