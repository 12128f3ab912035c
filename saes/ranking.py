"""Feature-major order: firings sorted by feature and falling value, and what can be read off that order.

`sort_block` is two stable radix passes over 16-bit keys (value bits, then feature), ten times a comparison sort.
All per-feature numbers follow from the boundaries of the runs: the first rows of a feature are its largest
activations, the last ones its most negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

TOP, BANDS, PER_BAND, RANDOM, BINS = 100, 10, 5, 20, 32


class Firings(NamedTuple):
    """Non-zero activations: feature int64, row int64, value float32; equal lengths."""

    feature: np.ndarray
    row: np.ndarray
    value: np.ndarray


def sort_block(f: Firings) -> Firings:
    """Sort by feature, then by falling value. Values that are not float16 (a shard in float32) take a plain sort."""
    with np.errstate(over="ignore"):
        half = f.value.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), f.value):
        order = np.lexsort((-f.value, f.feature))
        return Firings(f.feature[order], f.row[order], f.value[order])
    bits = half.view(np.uint16)
    # order-preserving map of float16 bits, inverted so that the largest comes first
    rising = np.where(bits & 0x8000, ~bits, bits | 0x8000).astype(np.uint16)
    order = np.argsort(np.uint16(0xFFFF) - rising, kind="stable")
    base = f.feature.min() if len(f.feature) else 0
    local = f.feature[order] - base
    if len(local) and local.max() >= 2**16:
        raise ValueError("a block spans more than 65,536 features")
    order = order[np.argsort(local.astype(np.uint16), kind="stable")]
    return Firings(f.feature[order], f.row[order], f.value[order])


class Runs(NamedTuple):
    """Where each feature's firings are in a sorted block: ids, first position, count, count of positive values."""

    feature: np.ndarray
    start: np.ndarray
    n: np.ndarray
    n_pos: np.ndarray


def find_runs(f: Firings, first: int, last: int) -> Runs:
    """Runs of the features `first .. last - 1` in a sorted block; a silent feature has n = 0."""
    features = np.arange(first, last)
    start = np.searchsorted(f.feature, features, side="left")
    n = np.searchsorted(f.feature, features, side="right") - start
    positive = np.concatenate([[0], np.cumsum(f.value > 0)])
    return Runs(features, start, n, positive[start + n] - positive[start])


def statistics(f: Firings, runs: Runs) -> dict[str, np.ndarray]:
    """Per feature: counts by sign, largest and smallest value, mean of the values, and a histogram."""
    total = np.concatenate([[0.0], np.cumsum(f.value, dtype=np.float64)])
    end = runs.start + runs.n
    fires = runs.n > 0
    largest = np.zeros(len(runs.n), dtype=np.float32)
    smallest = np.zeros(len(runs.n), dtype=np.float32)
    largest[fires] = f.value[runs.start[fires]]
    smallest[fires] = f.value[end[fires] - 1]
    return {
        "n_fire": runs.n,
        "n_pos": runs.n_pos,
        "n_neg": runs.n - runs.n_pos,
        "mean_act": (total[end] - total[runs.start]) / np.maximum(runs.n, 1),
        "max_act": np.maximum(largest, 0.0),
        "min_act": np.minimum(smallest, 0.0),
    }


def histograms(f: Firings, low: np.ndarray, high: np.ndarray, first: int) -> np.ndarray:
    """Counts `[features, BINS]` of the values of each feature between its low and high (0 belongs to the range)."""
    local = f.feature - first
    width = np.maximum(high - low, 1e-30)[local]
    bins = np.clip(((f.value - low[local]) / width * BINS).astype(np.int64), 0, BINS - 1)
    return np.bincount(local * BINS + bins, minlength=len(low) * BINS).reshape(-1, BINS)


def _ranges(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions start[i] .. start[i] + count[i] - 1 of all i, and the running number of each inside its range."""
    rank = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(start, count) + rank, rank


def examples(f: Firings, runs: Runs, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows to show of each feature: top TOP per sign, PER_BAND of each tenth of the positive firings, RANDOM of all.

    Columns: feature, sign, kind, rank, row, value. Bands q0 (strongest) .. q9 hold distinct firings drawn at random.
    """
    rng = np.random.default_rng(seed)
    parts: list[dict[str, Any]] = []

    def add(kind: str, sign: np.ndarray | int, position: np.ndarray, rank: np.ndarray) -> None:
        parts.append({
            "feature": f.feature[position], "sign": np.broadcast_to(np.int8(sign), position.shape),
            "kind": np.full(len(position), kind), "rank": rank, "row": f.row[position], "value": f.value[position],
        })  # fmt: skip

    position, rank = _ranges(runs.start, np.minimum(runs.n_pos, TOP))
    add("top", 1, position, rank)
    n_neg = np.minimum(runs.n - runs.n_pos, TOP)
    position, rank = _ranges(runs.start + runs.n - n_neg, n_neg)
    add("top", -1, position, np.repeat(n_neg, n_neg) - 1 - rank)
    for band in range(BANDS):
        low = runs.n_pos * band // BANDS
        width = runs.n_pos * (band + 1) // BANDS - low
        # one draw in each of PER_BAND slices of the band: distinct without rejection
        take = np.minimum(width, PER_BAND)
        slot, rank = _ranges(np.zeros_like(take), take)
        owner = np.repeat(np.arange(len(take)), take)
        a = width[owner] * slot // take[owner]
        b = np.maximum(width[owner] * (slot + 1) // take[owner], a + 1)
        pick = a + (rng.random(len(a)) * (b - a)).astype(np.int64)
        add(f"q{band}", 1, runs.start[owner] + low[owner] + pick, rank)
    take = np.minimum(runs.n, RANDOM)
    slot, rank = _ranges(np.zeros_like(take), take)
    owner = np.repeat(np.arange(len(take)), take)
    a = runs.n[owner] * slot // np.maximum(take[owner], 1)
    b = np.maximum(runs.n[owner] * (slot + 1) // np.maximum(take[owner], 1), a + 1)
    position = runs.start[owner] + a + (rng.random(len(a)) * (b - a)).astype(np.int64)
    add("random", np.where(f.value[position] > 0, 1, -1), position, rank)
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
