"""Feature-major order: firings sorted by feature and falling value, and what can be read off that order.

A firing with a float16 value is packed into one 64-bit key, (feature, falling value, row), so that the order is one
sort of integers (vectorised in numpy) and equal values come in row order, however the firings arrived. Values that
float16 does not hold take a plain sort of records.
All per-feature numbers follow from the boundaries of the runs: the first rows of a feature are its largest
activations, the last ones its most negative.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

TOP, BANDS, PER_BAND, RANDOM, BINS = 100, 10, 5, 20, 32
KINDS = ("top", *(f"q{band}" for band in range(BANDS)), "random")
MAX_FEATURES = 2**16
"""Features of a block: a key has 16 bits for them."""
MAX_ROWS = 2**32
RECORD = np.dtype([("feature", "<u2"), ("value", "<f4"), ("row", "<u4")])
KEY = np.dtype("<u8")


class Firings(NamedTuple):
    """Non-zero activations: feature int, row int, value float32; equal lengths."""

    feature: np.ndarray
    row: np.ndarray
    value: np.ndarray


def rising_bits(half: np.ndarray) -> np.ndarray:
    """float16 as uint16 whose integer order is the order of the values."""
    bits = half.view(np.uint16)
    return bits ^ np.where(bits & 0x8000, np.uint16(0xFFFF), np.uint16(0x8000))


def pack(local: np.ndarray, row: np.ndarray, value: np.ndarray, *, wide: bool) -> np.ndarray:
    """One item a firing, of dtype KEY, or RECORD where values need float32 (`wide`). local: feature less the block's first."""
    if wide:
        out = np.empty(len(local), dtype=RECORD)
        out["feature"], out["value"], out["row"] = local, value, row
        return out
    key = local.astype(KEY)
    key <<= KEY.type(16)
    key |= ~rising_bits(value.astype(np.float16))
    key <<= KEY.type(32)
    key |= row.astype(KEY)
    return key


def sort_items(items: np.ndarray, first: int) -> Firings:
    """Items of `pack` (sorted in place) as firings by feature, falling value and row; `first`: feature of local 0."""
    if items.dtype == RECORD:
        items = items[np.lexsort((items["row"], -items["value"], items["feature"]))]
        feature, row, value = items["feature"], items["row"].copy(), items["value"].copy()
    else:
        items.sort()
        row = items.astype(np.uint32)
        rising = ~(items >> KEY.type(32)).astype(np.uint16)
        bits = rising ^ np.where(rising & 0x8000, np.uint16(0x8000), np.uint16(0xFFFF))
        value = bits.view(np.float16).astype(np.float32)
        feature = (items >> KEY.type(48)).astype(np.uint16)
    return Firings(feature.astype(np.int32) + np.int32(first), row, value)


def sort_block(f: Firings) -> Firings:
    """Sort firings by feature, then by falling value, then by row. Raises ValueError past MAX_FEATURES features."""
    with np.errstate(over="ignore"):
        wide = not np.array_equal(f.value.astype(np.float16).astype(np.float32), f.value)
    first = int(f.feature.min()) if len(f.feature) else 0
    local = np.asarray(f.feature) - first
    if len(local) and local.max() >= MAX_FEATURES:
        raise ValueError("a block spans more than 65,536 features")
    return sort_items(pack(local, np.asarray(f.row), f.value, wide=wide), first)


class Runs(NamedTuple):
    """Where each feature's firings are in a sorted block: ids, first position, count, count of positive values."""

    feature: np.ndarray
    start: np.ndarray
    n: np.ndarray
    n_pos: np.ndarray


def find_runs(f: Firings, first: int, last: int) -> Runs:
    """Runs of the features `first .. last - 1` in a sorted block; a silent feature has n = 0."""
    features = np.arange(first, last)
    start = np.searchsorted(f.feature, features.astype(f.feature.dtype), side="left")
    n = np.diff(start, append=len(f.feature))
    return Runs(features, start, n, count_above(f.value, start, n, np.zeros(len(n)), strict=True))


def count_above(
    value: np.ndarray, start: np.ndarray, n: np.ndarray, level: np.ndarray, *, strict: bool
) -> np.ndarray:
    """How many of `value[start : start + n]`, which fall, are at or above (`strict`: above) each level; by bisection."""
    low, high = np.zeros(len(n), dtype=np.int64), np.asarray(n, dtype=np.int64).copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        at = value[np.minimum(start + middle, len(value) - 1)]
        above = (at > level) if strict else (at >= level)
        low = np.where(open_ & above, middle + 1, low)
        high = np.where(open_ & ~above, middle, high)
    return low


def statistics(f: Firings, runs: Runs) -> dict[str, np.ndarray]:
    """Per feature: counts by sign, largest and smallest value, mean of the values (summed in float64)."""
    fires = runs.n > 0
    total, largest, smallest = (np.zeros(len(runs.n)) for _ in range(3))
    if fires.any():
        start = runs.start[fires]
        total[fires] = np.add.reduceat(f.value, start, dtype=np.float64)
        largest[fires] = f.value[start]
        smallest[fires] = f.value[start + runs.n[fires] - 1]
    return {
        "n_fire": runs.n,
        "n_pos": runs.n_pos,
        "n_neg": runs.n - runs.n_pos,
        "mean_act": total / np.maximum(runs.n, 1),
        "max_act": np.maximum(largest, 0.0).astype(np.float32),
        "min_act": np.minimum(smallest, 0.0).astype(np.float32),
    }


def histograms(f: Firings, runs: Runs, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Counts `[features, BINS]` of the values of each feature in equal bins from its low to its high (0 is between them)."""
    edges = low[:, None] + (high - low).astype(np.float64)[:, None] * np.arange(1, BINS) / BINS
    start, n = (np.repeat(a, BINS - 1) for a in (runs.start, runs.n))
    above = count_above(f.value, start, n, edges.reshape(-1), strict=False).reshape(edges.shape)
    none = np.zeros((len(low), 1), dtype=np.int64)
    return -np.diff(np.concatenate([runs.n[:, None], above, none], axis=1), axis=1)


def _ranges(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions start[i] .. start[i] + count[i] - 1 of all i, and the running number of each inside its range."""
    rank = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(start, count) + rank, rank


def _lowest(f: Firings, runs: Runs, take: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place, rank) of the `take` most negative firings of each feature; of equal values the smallest rows first."""
    end = runs.start + runs.n
    # values fall but rows of a tie rise: of the tie that is cut, its first rows are taken and not its last ones
    cut = f.value[np.maximum(end - take, 0).clip(max=max(len(f.value) - 1, 0))] if len(f.value) else take
    tie = runs.start + count_above(f.value, runs.start, runs.n, cut, strict=True)
    below = end - runs.start - count_above(f.value, runs.start, runs.n, cut, strict=False)
    first, _ = _ranges(tie, take - np.minimum(below, take))
    rest, _ = _ranges(end - np.minimum(below, take), np.minimum(below, take))
    place = np.concatenate([first, rest])
    place = place[np.lexsort((f.row[place], f.value[place], f.feature[place]))]
    return place, _ranges(np.zeros_like(take), take)[1]


def _draw(
    rng: np.random.Generator, low: np.ndarray, width: np.ndarray, take: np.ndarray
) -> tuple[np.ndarray, ...]:
    """(place, rank, owner): `take` distinct places in `low .. low + width` of each feature, one in each of equal slices."""
    slot, rank = _ranges(np.zeros_like(take), take)
    owner = np.repeat(np.arange(len(take)), take)
    share = np.maximum(take[owner], 1)
    a = width[owner] * slot // share
    b = np.maximum(width[owner] * (slot + 1) // share, a + 1)
    return low[owner] + a + (rng.random(len(a)) * (b - a)).astype(np.int64), rank, owner


def examples(f: Firings, runs: Runs, *, seed: int = 0) -> dict[str, np.ndarray | pa.Array]:
    """Rows to show of each feature: top TOP per sign, PER_BAND of each tenth of the positive firings, RANDOM of all.

    Columns: feature, sign, kind, rank, row, value. Bands q0 (strongest) .. q9 hold distinct firings drawn at random.
    """
    rng = np.random.default_rng(seed)
    place, kind, sign, ranks = [], [], [], []

    def add(name: str, pole: np.ndarray | int, position: np.ndarray, rank: np.ndarray) -> None:
        place.append(position)
        kind.append(np.full(len(position), KINDS.index(name), dtype=np.int8))
        sign.append(np.broadcast_to(np.asarray(pole, dtype=np.int8), position.shape))
        ranks.append(rank)

    position, rank = _ranges(runs.start, np.minimum(runs.n_pos, TOP))
    add("top", 1, position, rank)
    add("top", -1, *_lowest(f, runs, np.minimum(runs.n - runs.n_pos, TOP)))
    for band in range(BANDS):
        low = runs.n_pos * band // BANDS
        width = runs.n_pos * (band + 1) // BANDS - low
        position, rank, _ = _draw(rng, runs.start + low, width, np.minimum(width, PER_BAND))
        add(f"q{band}", 1, position, rank)
    position, rank, _ = _draw(rng, runs.start, runs.n, np.minimum(runs.n, RANDOM))
    add("random", np.where(f.value[position] > 0, 1, -1), position, rank)
    # by feature, so that the rows of one feature lie together in the file
    at = np.concatenate(place)
    order = np.argsort(f.feature[at], kind="stable")
    at = at[order]
    return {
        "feature": f.feature[at], "sign": np.concatenate(sign)[order],
        "kind": pa.DictionaryArray.from_arrays(np.concatenate(kind)[order], list(KINDS)),
        "rank": np.concatenate(ranks)[order].astype(np.int32), "row": f.row[at], "value": f.value[at],
    }  # fmt: skip
