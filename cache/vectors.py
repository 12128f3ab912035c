"""The committed vectors of one hook as one long array of raw rows, addressed by row id.

A row id is an index into the corpus's token table. Ranges and sorted ids are read with one `preadv` per
run of rows; nothing is cached but open files. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from cache.errors import DataError, MissingDataError
from cache.pages import PageReader
from cache.records import COLUMN, ShardRecord

MAX_OPEN_FILES = 128
GAP_BYTES = 32_768  # rows closer than this are fetched by one read


class Vectors:
    """Reader of the shards that `records` commit in `folder`."""

    def __init__(self, folder: Path, records: list[ShardRecord]) -> None:
        if not records:
            raise MissingDataError(f"{folder} holds no committed shard: run harvest first")
        self.folder = folder
        self.d, self.dtype = records[0].d, records[0].dtype
        if any((r.d, r.dtype) != (self.d, self.dtype) for r in records):
            raise DataError(f"{folder} mixes shards of several widths or dtypes: delete it and harvest again")
        self.width = records[0].groups[0]["pages"][COLUMN]["width"]
        self._records = {r.shard: r for r in records}
        self._open: OrderedDict[int, PageReader] = OrderedDict()
        self._lock = threading.Lock()
        ordered = sorted(records, key=lambda r: r.row0)
        sizes = [[g["rows"] for g in r.groups] for r in ordered]
        starts = [r.row0 + np.cumsum([0, *s[:-1]]) for r, s in zip(ordered, sizes, strict=True)]
        first = np.concatenate(starts).astype(np.int64)
        self.blocks = np.stack([first, first + np.concatenate(sizes)], axis=1)
        """[n, 2] row range of every row group, ascending."""
        self._shard = np.repeat([r.shard for r in ordered], [len(s) for s in sizes])
        self._group = np.concatenate([np.arange(len(s)) for s in sizes])

    def blocks_of(self, shards: Sequence[int]) -> np.ndarray:
        """Row ranges of the row groups of some shards."""
        return self.blocks[np.isin(self._shard, shards)]

    def reader(self, shard: int) -> PageReader:
        """The open file of a shard; the least recently used is let go of past 128."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
            else:
                record = self._records[shard]
                self._open[shard] = PageReader(self.folder / record.file, record.groups, record.bytes)
                if len(self._open) > MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            return self._open[shard]

    def will_need(self, row: int) -> None:
        """Have the system read the row group of a row ahead, while another is being used."""
        b = int(np.searchsorted(self.blocks[:, 0], row, side="right")) - 1
        if b >= 0 and row < self.blocks[b, 1]:
            self.reader(int(self._shard[b])).will_need(int(self._group[b]), COLUMN)

    def read_range(self, row0: int, row1: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [row1 - row0, width], with consecutive rows."""
        at = row0
        while at < row1:
            b = int(np.searchsorted(self.blocks[:, 0], at, side="right")) - 1
            if b < 0 or at >= self.blocks[b, 1]:
                self._missing(at)
            start, stop = int(self.blocks[b, 0]), min(row1, int(self.blocks[b, 1]))
            reader = self.reader(int(self._shard[b]))
            reader.read_into(int(self._group[b]), COLUMN, out[at - row0 : stop - row0], at - start)
            at = stop

    def _missing(self, row: int) -> None:
        raise MissingDataError(f"row {row:,} is not in {self.folder}: run harvest again to complete it")

    def read_ids(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Fill `out`, uint8 [n, width], with the rows `ids` (ascending)."""
        if not len(ids):
            return
        block = np.searchsorted(self.blocks[:, 0], ids, side="right") - 1
        lost = ids[(block < 0) | (ids >= self.blocks[block, 1])]
        if len(lost):
            self._missing(int(lost[0]))
        far = np.diff(ids) > max(1, GAP_BYTES // self.width)
        cuts = np.flatnonzero(far | (np.diff(block) > 0)) + 1  # a shard may be missing between two blocks
        bounds = np.array([0, *cuts.tolist(), len(ids)])
        first, last, blocks = ids[bounds[:-1]], ids[bounds[1:] - 1], block[bounds[:-1]]
        starts = (first - self.blocks[blocks, 0]).tolist()
        spans = (last - first + 1).tolist()
        here, reader = -1, None
        for i, ((a, b), block_, start, span) in enumerate(
            zip(pairwise(bounds.tolist()), blocks.tolist(), starts, spans)
        ):
            if block_ != here or reader is None:
                here, group, reader = block_, int(self._group[block_]), self.reader(int(self._shard[block_]))
            if span == b - a:
                reader.read_into(group, COLUMN, out[a:b], start)
                continue
            rows = np.empty((span, self.width), np.uint8)
            reader.read_into(group, COLUMN, rows, start)
            np.take(rows, ids[a:b] - first[i], axis=0, out=out[a:b], mode="clip")
