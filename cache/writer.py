"""Writes shards of vectors behind the model's back: a bounded queue and one thread.

For each shard: float64 sums per row class, Parquet with doc, pos, tok, norm (float32, ‖x‖₂) and the vectors,
fsync, rename, re-read of every row group through the raw path against its xxh3, and only then the record.
A kill at any point leaves either a committed shard or a data file that no record names.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from cache.errors import AtomscopeError, DataError, UsageError
from cache.pages import PageReader, rows_per_group, write_shard
from cache.provenance import provenance
from cache.records import COLUMN, ITEMSIZE, ROW_CLASSES, ShardRecord, Sums
from cache.workspace import atomic_file

if TYPE_CHECKING:
    from cache.store import ActivationStore

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPE_NAME = {v: k for k, v in TORCH_DTYPE.items()}
_CHUNK = 512  # rows; keeps the float64 copy in the cache
_Job = tuple[int, str, Tensor]


class ShardWriter:
    """`submit` hands a shard over and returns; what the thread raised comes out of the next submit or close.

    The submitted tensor belongs to the writer until close: do not overwrite it.
    """

    def __init__(self, store: ActivationStore, *, group_rows: int | None = None, queue_size: int = 4) -> None:
        self.store = store
        self.seconds = 0.0
        """Time that the thread spent on writing."""
        self._group_rows = group_rows
        self._tokens = TokenSlices(store.corpus.path / "tokens.parquet")
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if error is None:
            self._raise()

    def submit(self, shard: int, hook: str, x: Tensor | np.ndarray) -> None:
        """Queue shard `shard` of `hook`: [rows of the shard, d] in the dtype to store."""
        self._raise()
        if not self._thread.is_alive():
            raise UsageError("this writer is closed: take another with store.writer()")
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        row0, row1 = self.store.shards[shard][2:]
        if x.dtype not in DTYPE_NAME:
            raise UsageError(f"{hook}: {x.dtype} cannot be stored, cast to one of {', '.join(TORCH_DTYPE)}")
        if x.ndim != 2 or len(x) != row1 - row0:
            raise DataError(f"{hook}: shard {shard} has {row1 - row0} rows, got a tensor of {tuple(x.shape)}")
        self.store.check_matches(hook, x.shape[1], DTYPE_NAME[x.dtype])
        self._queue.put((shard, hook, x.detach().to("cpu").contiguous()))
        self._raise()

    def close(self) -> None:
        """Wait until everything is committed."""
        self._stop()
        self._raise()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep the queue moving, so that the caller gets to see the error
            started = time.monotonic()
            try:
                self.store.add_record(self._write(*job))
            except BaseException as e:
                self._error = e
            self.seconds += time.monotonic() - started

    def _write(self, shard: int, hook: str, x: Tensor) -> ShardRecord:
        started = time.time()
        row0, row1 = self.store.shards[shard][2:]
        narrow = self._tokens.read(row0, row1)
        norm, stats = row_sums(x, self.store.row_class(row0, row1))
        bad = np.flatnonzero(~np.isfinite(norm))
        if len(bad):
            doc, pos = (narrow.column(c)[int(bad[0])].as_py() for c in ("doc", "pos"))
            raise DataError(
                f"{hook}: {len(bad)} rows are NaN or infinite, first at doc {doc} pos {pos}: "
                "store as bf16 or fp32, or check the model"
            )
        narrow = narrow.append_column("norm", pa.array(norm.astype(np.float32)))
        raw = x.view(torch.uint8).numpy()
        folder, d, dtype = self.store.folder(hook), x.shape[1], DTYPE_NAME[x.dtype]
        name = f"shard-{shard:05d}-{xxhash.xxh3_64_hexdigest(raw.data)[:8]}.parquet"
        path = folder / name
        meta = {"atomscope.hook": hook, "atomscope.dtype": dtype, "atomscope.d": str(d)}
        with atomic_file(path) as tmp:
            size = self._group_rows or rows_per_group(ITEMSIZE[dtype] * d)
            groups = write_shard(tmp, narrow, {COLUMN: raw}, size, meta)
        record = ShardRecord(
            hook=hook, shard=shard, file=name, bytes=path.stat().st_size, row0=row0, rows=row1 - row0,
            d=d, dtype=dtype, groups=groups, stats={k: v.to_json() for k, v in stats.items()},
            provenance=provenance(started=started, host=socket.gethostname()),
        )  # fmt: skip
        check_digests(PageReader(path, groups, record.bytes))
        record.save(folder)
        _remove_orphans(folder, record)
        return record


def check_digests(reader: PageReader) -> None:
    """Compare every row group on disk with its xxh3."""
    for g, group in enumerate(reader.groups):
        for column, page in group["pages"].items():
            if reader.digest(g, column) != page["xxh3"]:
                raise AtomscopeError(f"{reader.path}: row group {g} reads back differently: check the disk")


def _remove_orphans(folder: Path, record: ShardRecord) -> None:
    """Delete data files of this shard that a killed writer left without a record."""
    for path in folder.glob(f"shard-{record.shard:05d}-*.parquet"):
        if path.name != record.file:
            path.unlink(missing_ok=True)


def row_sums(x: Tensor, classes: np.ndarray) -> tuple[np.ndarray, dict[str, Sums]]:
    """Norm of every row (float64 [n]) and the sums of every row class; `classes` indexes ROW_CLASSES."""
    n, d = x.shape
    k = len(ROW_CLASSES)
    member = torch.zeros(k, n, dtype=torch.float64)
    member[torch.from_numpy(classes.astype(np.int64)), torch.arange(n)] = 1.0
    total, total_sq = torch.zeros(k, d, dtype=torch.float64), torch.zeros(k, d, dtype=torch.float64)
    sq_norm, peak = torch.empty(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    buffer = torch.empty(min(n, _CHUNK), d, dtype=torch.float64)
    for a in range(0, n, _CHUNK):
        rows = slice(a, min(a + _CHUNK, n))
        chunk = buffer[: rows.stop - a].copy_(x[rows])
        total.addmm_(member[:, rows], chunk)
        chunk.mul_(chunk)
        total_sq.addmm_(member[:, rows], chunk)
        torch.sum(chunk, dim=1, out=sq_norm[rows])
        peak[rows] = chunk.amax(dim=1).sqrt()
    norm = sq_norm.sqrt()
    stats = {}
    for i, name in enumerate(ROW_CLASSES):
        at = member[i] > 0
        stats[name] = Sums(
            n=int(at.sum()), sum=total[i].numpy(), sumsq=total_sq[i].numpy(),
            sum_norm=float(norm[at].sum()), sum_sq_norm=float(sq_norm[at].sum()),
            max_abs=float(peak[at].max()) if at.any() else 0.0,
        )  # fmt: skip
    return norm.numpy(), stats


class TokenSlices:
    """doc, pos and tok of a row range, read from the token table by row group: it may exceed memory."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        meta = self._file.metadata
        self._starts = np.cumsum([0, *(meta.row_group(g).num_rows for g in range(meta.num_row_groups))])

    def read(self, row0: int, row1: int) -> pa.Table:
        first = int(np.searchsorted(self._starts, row0, side="right")) - 1
        last = int(np.searchsorted(self._starts, row1, side="left"))
        table = self._file.read_row_groups(list(range(first, last)), columns=["doc", "pos", "tok"])
        return table.select(["doc", "pos", "tok"]).slice(row0 - int(self._starts[first]), row1 - row0)
