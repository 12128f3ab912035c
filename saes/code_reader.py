"""Codes of any rows, read where they lie: the token-major side of an index, for contexts, documents and rare tokens.

Files are mapped, so a row costs its own pages of the file cache and nothing is read for the rest. Every row group's
header is checked when it is first used (its bytes are hashed when the index is built, not here). No torch.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from cache.errors import MissingDataError
from cache.pages import PageReader
from cache.workspace import read_json
from saes.code_files import BLOCK, CodeBlock, counts_file, data_file, record_file
from saes.ranking import MAX_ROWS


class _Shard:
    """One open shard: its record, mapped values and ids, and where each row's codes begin."""

    def __init__(self, folder: Path, shard: int) -> None:
        path = record_file(folder, shard)
        if not path.is_file():
            raise MissingDataError(f"{folder} lacks the codes of shard {shard}: run `atomscope index` again")
        self.record: dict[str, Any] = read_json(path)
        self.row0: int = self.record["row0"]
        self._width: int = self.record["k"] or BLOCK
        self._groups = self.record["groups"]
        self._reader = PageReader(data_file(folder, shard), self._groups, self.record["bytes"])
        with data_file(folder, shard).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._views: dict[tuple[int, str], np.ndarray] = {}
        rows = np.array([g["rows"] for g in self._groups], dtype=np.int64)
        self._group_ends = np.cumsum(rows)
        if not self.record["k"]:
            n = pq.read_table(counts_file(folder, shard), columns=["n"])["n"].to_numpy()
            self._ends = np.cumsum(n, dtype=np.int64)
            self._group_ends *= self._width

    def codes(self, rows: np.ndarray) -> CodeBlock:
        """Of rising row ids of this shard."""
        local = rows - self.row0
        if self.record["k"]:
            ids, values = (self._take(column, local) for column in ("ids", "values"))
            return CodeBlock(np.repeat(rows, self._width), ids.reshape(-1), values.reshape(-1).astype("f4"))
        start = np.where(local > 0, self._ends[local - 1], 0)
        n = self._ends[local] - start
        at = np.repeat(start - (np.cumsum(n) - n), n) + np.arange(int(n.sum()))
        return CodeBlock(np.repeat(rows, n), self._take("ids", at), self._take("values", at).astype("f4"))

    def _take(self, column: str, at: np.ndarray) -> np.ndarray:
        """Entries at rising places: rows of codes `[n, k]`, or of a flat shard values `[n]`."""
        parts, first, base = [], 0, 0
        for g, last in enumerate(np.searchsorted(at, self._group_ends).tolist()):
            if last > first:
                parts.append(self._page(g, column)[at[first:last] - base])
            first, base = last, int(self._group_ends[g])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self._page(0, column)[:0]])

    def _page(self, group: int, column: str) -> np.ndarray:
        """Values of one row group in the file cache."""
        view = self._views.get((group, column))
        if view is None:
            g = self._groups[group]
            # reading a row checks the page header
            self._reader.read_into(group, column, np.empty((1, self._width), self.record[column]))
            size, offset = g["rows"] * self._width, g["pages"][column]["offset"]
            view = np.frombuffer(self._map, self.record[column], size, offset=offset)
            view = view.reshape(-1, self._width) if self.record["k"] else view
            self._views[(group, column)] = view
        return view


class CodeReader:
    """Codes of rows of an index by row id. Threads may share one."""

    def __init__(self, folder: Path, shards: Sequence[int], row0: Sequence[int]) -> None:
        """folder: `codes/` of an index. shards: those it covers, rising; row0: the first row of each."""
        self._folder, self._ids = folder, list(shards)
        self._row0 = np.asarray(row0, dtype=np.int64)
        self._open: dict[int, _Shard] = {}
        self._lock = threading.Lock()

    def codes(self, rows: np.ndarray) -> CodeBlock:
        """Firings (no zeros) of row ids, which rise; rows that the index does not cover have none."""
        rows = np.asarray(rows, dtype=np.int64)
        cuts = np.searchsorted(rows, np.append(self._row0, MAX_ROWS)).tolist()
        parts = []
        for i, (first, last) in enumerate(pairwise(cuts)):
            if first < last:
                shard = self._shard(self._ids[i])
                inside = np.searchsorted(rows[first:last], shard.row0 + shard.record["rows"])
                parts.append(shard.codes(rows[first : first + inside]))
        if not parts:
            return CodeBlock(np.empty(0, np.int64), np.empty(0, np.uint32), np.empty(0, np.float32))
        out = CodeBlock(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        fires = out.values != 0
        return CodeBlock(*(column[fires] for column in out))

    def _shard(self, shard: int) -> _Shard:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = _Shard(self._folder, shard)
            return self._open[shard]


class FeatureSums(NamedTuple):
    """Of each feature that fires on some rows, the strongest first: n, largest and smallest value, sum of |value|."""

    feature: np.ndarray
    n: np.ndarray
    max_act: np.ndarray
    min_act: np.ndarray
    mass: np.ndarray


def sum_features(codes: CodeBlock) -> FeatureSums:
    """Firings added up by feature; by falling mass, then by feature."""
    order = np.argsort(codes.ids, kind="stable")
    ids, values = codes.ids[order].astype(np.int64), codes.values[order]
    if not len(ids):
        return FeatureSums(*(np.zeros(0, dtype=t) for t in (np.int64, np.int64, "f4", "f4", "f8")))
    start = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    mass = np.add.reduceat(np.abs(values), start, dtype=np.float64)
    best = np.lexsort((ids[start], -mass))
    found = (
        ids[start], np.diff(np.r_[start, len(ids)]),
        np.maximum(np.maximum.reduceat(values, start), 0), np.minimum(np.minimum.reduceat(values, start), 0), mass,
    )  # fmt: skip
    return FeatureSums(*(column[best] for column in found))


__all__ = ["CodeReader", "FeatureSums", "sum_features"]
