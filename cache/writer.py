"""Writes shards of vectors behind the model's back: a bounded queue and one thread.

For each shard: float64 sums per row class, Parquet with doc, pos, tok, norm (float32, ‖x‖₂) and the vectors,
re-read of every row group through the raw path against its xxh3, fsync, rename, and only then the record.
A kill at any point leaves either a committed shard or a data file that no record names. Of two writers of one
shard the first to commit wins, and the other drops its file: a committed shard is never replaced.
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
from cache.filters import ROW_CLASSES
from cache.pages import PageReader, rows_per_group, write_shard
from cache.provenance import provenance
from cache.records import COLUMN, ITEMSIZE, ShardRecord, Sums, record_path
from cache.workspace import atomic_file, locked

if TYPE_CHECKING:
    from cache.store import ActivationStore

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPE_NAME = {v: k for k, v in TORCH_DTYPE.items()}
_CHUNK = 256  # rows; keeps the float64 copy in the cache
_Job = tuple[int, str, Tensor]


class ShardWriter:
    """`submit` hands a shard over and returns; what the thread raised comes out of the next submit or close.

    The submitted tensor belongs to the writer until `wait` or `close`: do not overwrite it before.
    """

    def __init__(self, store: ActivationStore, *, group_rows: int | None = None, queue_size: int = 4) -> None:
        self.store = store
        self.seconds = 0.0
        """Time that the thread spent on writing."""
        self._group_rows = group_rows
        self._tokens = TokenSlices(store.corpus.path / "tokens.parquet")
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._unfinished = 0
        self._finished = threading.Condition()
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
        with self._finished:
            self._unfinished += 1
        self._queue.put((shard, hook, x.detach().to("cpu").contiguous()))
        self._raise()

    def wait(self, pending: int) -> None:
        """Wait until at most `pending` submitted tensors are not written yet: the others may be overwritten."""
        with self._finished:
            self._finished.wait_for(lambda: self._unfinished <= pending or self._error is not None)
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
                record = commit_shard(self.store, self._tokens, *job, group_rows=self._group_rows)
                self.store.add_record(record)
            except BaseException as e:
                self._error = e
            self.seconds += time.monotonic() - started
            del job  # the caller may reuse its memory now
            with self._finished:
                self._unfinished -= 1
                self._finished.notify_all()


def commit_shard(
    store: ActivationStore,
    tokens: TokenSlices,
    shard: int,
    hook: str,
    x: Tensor,
    *,
    group_rows: int | None = None,
) -> ShardRecord:
    """Write shard `shard` of `hook`, read it back, and commit it by its record."""
    started = time.time()
    row0, row1 = store.shards[shard][2:]
    narrow = tokens.read(row0, row1)
    norm, stats = row_sums(x, store.row_class(row0, row1))
    bad = np.flatnonzero(~np.isfinite(norm))
    if len(bad):
        doc, pos = (narrow.column(c)[int(bad[0])].as_py() for c in ("doc", "pos"))
        raise DataError(
            f"{hook}: {len(bad)} rows are NaN or infinite, first at doc {doc} pos {pos}: "
            "store as bf16 or fp32, or check the model"
        )
    narrow = narrow.append_column("norm", pa.array(norm.astype(np.float32)))
    raw = x.view(torch.uint8).numpy()
    folder, d, dtype = store.folder(hook), x.shape[1], DTYPE_NAME[x.dtype]
    name = f"shard-{shard:05d}-{xxhash.xxh3_64_hexdigest(raw.data)[:8]}.parquet"
    path = folder / name
    meta = {"atomscope.hook": hook, "atomscope.dtype": dtype, "atomscope.d": str(d)}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):  # while it is held, `atomscope store gc` deletes nothing here
        with atomic_file(path) as tmp:
            size = group_rows or rows_per_group(ITEMSIZE[dtype] * d)
            groups = write_shard(tmp, narrow, {COLUMN: raw}, size, meta)
            n_bytes = tmp.stat().st_size
            check_digests(PageReader(tmp, groups, n_bytes))
        # From here on another writer of this shard may commit its own and delete this file.
        record = ShardRecord(
            hook=hook, shard=shard, file=name, bytes=n_bytes, row0=row0, rows=row1 - row0,
            d=d, dtype=dtype, groups=groups, stats={k: v.to_json() for k, v in stats.items()},
            provenance=provenance(started=started, host=socket.gethostname()),
        )  # fmt: skip
        record.save(folder)
        kept = ShardRecord.load(record_path(folder, shard))  # another writer's, if that was faster
        _remove_orphans(folder, kept)
    return kept


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
    """Norm of every row (float64 [n]) and the sums of every row class; the lowest two bits of `classes` index ROW_CLASSES.

    The rows of a class are taken together in chunks, so that all sums of a chunk are of one class.
    """
    n, d = x.shape
    sq_norm = torch.empty(n, dtype=torch.float64)
    stage, buffer = (torch.empty(min(n, _CHUNK), d, dtype=t) for t in (x.dtype, torch.float64))
    stats = {}
    for i, name in enumerate(ROW_CLASSES):
        rows = torch.from_numpy(np.flatnonzero(classes & 3 == i))
        total, total_sq = torch.zeros(2, d, dtype=torch.float64)
        peak = 0.0
        for part in rows.split(_CHUNK) if len(rows) else []:
            torch.index_select(x, 0, part, out=stage[: len(part)])
            chunk = buffer[: len(part)].copy_(stage[: len(part)])
            total += chunk.sum(0)
            chunk.mul_(chunk)
            total_sq += chunk.sum(0)
            sq_norm[part] = chunk.sum(1)
            peak = max(peak, float(chunk.amax()))
        of_class = sq_norm[rows]
        stats[name] = Sums(
            n=len(rows), sum=total.numpy(), sumsq=total_sq.numpy(),
            sum_norm=float(of_class.sqrt().sum()), sum_sq_norm=float(of_class.sum()), max_abs=peak**0.5,
        )  # fmt: skip
    return sq_norm.sqrt().numpy(), stats


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
