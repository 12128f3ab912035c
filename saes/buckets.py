"""Firings from token order into ranges of features, in one pass over the codes and with bounded memory.

Features are cut into ranges of about `limit` firings (from a first pass that counts them). The pass packs each firing
into one item (ranking.py) and appends it to the file of its range; each range then fits in memory and is sorted there.
Where everything is one range, nothing is written. 8 bytes a firing on disk while it runs, 14 with float32 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from saes.code_files import CodeBlock
from saes.ranking import KEY, MAX_FEATURES, RECORD, Firings, pack, sort_items


def plan_ranges(counts: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Ranges of at most MAX_FEATURES features whose firings fit `limit` (a single feature may exceed it)."""
    out, first, total = [], 0, 0
    for f, n in enumerate(counts.tolist()):
        if f > first and (total + n > limit or f - first >= MAX_FEATURES):
            out.append((first, f))
            first, total = f, 0
        total += n
    return [*out, (first, len(counts))]


def sorted_ranges(
    blocks: Iterable[CodeBlock], ranges: list[tuple[int, int]], scratch: Path, *, wide: bool,
    done: Callable[[int], None],
) -> Iterator[tuple[int, int, Firings]]:  # fmt: skip
    """(first, last, sorted firings) of each range of features. scratch: a folder for the files of the ranges.

    wide: values need float32. done: told the number of stored values of each block that was read.
    """
    ends = np.array([last for _, last in ranges])
    firsts = np.array([first for first, _ in ranges])
    of = np.repeat(np.arange(len(ranges), dtype=np.uint16), np.diff(ends, prepend=0))
    held: list[np.ndarray] = []
    files = [(scratch / f"range-{i}").open("wb") for i in range(len(ranges))] if len(ranges) > 1 else []
    try:
        for block in blocks:
            fires = block.values != 0
            ids, rows, values = block.ids[fires].astype(np.int64), block.rows[fires], block.values[fires]
            done(len(block.ids))
            mine = of[ids]
            items = pack(ids - firsts[mine], rows, values, wide=wide)
            if not files:
                held.append(items)
                continue
            items = items[np.argsort(mine, kind="stable")]
            cuts = np.cumsum(np.bincount(mine, minlength=len(ranges)))
            for i, part in enumerate(np.split(items, cuts[:-1])):
                # bytes: numpy's tofile is slow for records and wants a real file position
                files[i].write(np.ascontiguousarray(part).data)
    finally:
        for file in files:
            file.close()
    dtype = RECORD if wide else KEY
    for i, (first, last) in enumerate(ranges):
        path = scratch / f"range-{i}"
        items = np.fromfile(path, dtype=dtype) if files else np.concatenate([*held, np.empty(0, dtype)])
        held.clear()
        yield first, last, sort_items(items, first)
        path.unlink(missing_ok=True)


__all__ = ["plan_ranges", "sorted_ranges"]
