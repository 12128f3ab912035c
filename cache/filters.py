"""Which rows a reader leaves out, from the two byte columns `split` and `flags` of the token table.

skip: first (position 0 of a context, the attention sink), special (special ids and tokens of a chat template),
not_assistant (rows that are not of an assistant's message), or several joined by "+"; None leaves out nothing.
A row's class is a number below 16: bit 0 not first, bit 1 held out, bit 2 special, bit 3 not assistant; its lowest two
bits index ROW_CLASSES, whose sums every commit record holds. Other filters are summed by reading the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cache.errors import UsageError

if TYPE_CHECKING:
    from cache.records import ShardRecord, Sums
    from cache.store import ActivationStore

ROW_CLASSES = ("train/first", "train/rest", "heldout/first", "heldout/rest")
READ_CLASSES = tuple(f"{ROW_CLASSES[i & 3]}/{i >> 2}" for i in range(16))
_SKIPS = {"special": 1, "not_assistant": 2}
_CHUNK = 8192


def row_classes(split: str | None, skip: str | None) -> list[str]:
    """Names of the classes that `split` and `skip` select: of ROW_CLASSES if they say it, else of READ_CLASSES."""
    if split not in (None, "train", "heldout"):
        raise UsageError(f"split={split!r} is unknown: use 'train', 'heldout' or None (both)")
    parts = skip.split("+") if isinstance(skip, str) else [] if skip is None else [repr(skip)]
    unknown = [p for p in parts if p != "first" and p not in _SKIPS]
    if unknown:
        raise UsageError(
            f"skip={skip!r} is unknown: use 'first' (no first-in-context rows), 'special', 'not_assistant', "
            "several joined by '+', or None"
        )
    found = [
        name
        for name in ROW_CLASSES
        if (split is None or name.startswith(split)) and ("first" not in parts or name.endswith("rest"))
    ]
    gone = sum(_SKIPS[p] for p in set(parts) - {"first"})
    if not gone:
        return found
    return [f"{name}/{bits}" for name in found for bits in range(4) if not bits & gone]


def row_class(flags: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Class of every row, uint8."""
    return (1 - (flags & 1)) + 2 * split + ((flags & 6) << 1)


def class_mask(classes: Sequence[str]) -> np.ndarray:
    """Boolean look-up table over the 16 classes, of names from either list."""
    return np.array([name in classes or name.rpartition("/")[0] in classes for name in READ_CLASSES])


def in_records(classes: Sequence[str]) -> bool:
    """Whether the commit records hold the sums of these classes."""
    return set(classes) <= set(ROW_CLASSES)


def shard_sums(store: ActivationStore, record: ShardRecord, classes: Sequence[str]) -> Sums:
    """Sums over the rows of some classes of one shard: of its record, or by reading its vectors."""
    import torch

    from cache.records import Sums
    from cache.vectors import Vectors
    from cache.writer import TORCH_DTYPE, row_sums

    if in_records(classes):
        return record.sums(classes)
    wanted, vectors = class_mask(classes), Vectors(store.folder(record.hook), [record])
    total = Sums.zero(record.d)
    for a in range(record.row0, record.row0 + record.rows, _CHUNK):
        b = min(a + _CHUNK, record.row0 + record.rows)
        x = torch.empty(b - a, record.d, dtype=TORCH_DTYPE[record.dtype])
        vectors.read_range(a, b, x.view(torch.uint8).numpy())
        kept = np.flatnonzero(wanted[store.row_class(a, b)])
        if len(kept):
            _, sums = row_sums(x[torch.from_numpy(kept)], np.zeros(len(kept), np.uint8))
            total = total + sums[ROW_CLASSES[0]]
    return total
