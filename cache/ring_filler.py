"""Fills a ring of shards ahead of the one stream that reads it, and never holds more than the disk bound.

The windows a stream will read are known in advance (epoch by epoch, a permutation of row groups), so the model runs
over the shards in the order in which the stream will want them. Where there is no room, the shard goes whose next
use is furthest away; shards of windows that are harvested but not yet in the reader's memory never go. Where every
shard is such a one, the filler waits for the reader. Bytes are counted with what stands beside the vectors.
"""

from __future__ import annotations

import fcntl
import shutil
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from cache.errors import AtomscopeError, UsageError
from cache.records import ITEMSIZE, ShardRecord, list_records, record_path
from cache.stream import permutation, window_picks
from cache.vectors import Vectors
from cache.workspace import fsync_dir
from cache.writer import TokenSlices, commit_shard

if TYPE_CHECKING:
    from cache.ring import Ring

Key = tuple[int, int]
"""(epoch, window)"""


class Stopped(AtomscopeError):
    """The ring was closed while somebody waited for it."""


def shard_bytes(rows: int, widths: list[tuple[int, int]]) -> int:
    """Upper bound of the disk bytes of a shard: vectors, token columns, footers and records of hooks (d, itemsize)."""
    # a row: doc, pos, tok, norm; a record: 8 float64 sums of d in base64
    return sum(rows * (d * itemsize + 20) + 96 * d + 16_384 for d, itemsize in widths)


class WindowOrder:
    """Which shards each window of a stream needs; the same order as `Stream`'s."""

    def __init__(self, blocks: np.ndarray, shard_of: np.ndarray, *, seed: int, window: int) -> None:
        self.n_windows = -(-len(blocks) // window)
        self._n, self._shard_of, self._seed, self._window = len(blocks), shard_of, seed, window
        self._first = np.searchsorted(shard_of, np.arange(int(shard_of[-1]) + 1))
        self._windows: dict[int, np.ndarray] = {}

    def after(self, key: Key) -> Key:
        return (key[0], key[1] + 1) if key[1] + 1 < self.n_windows else (key[0] + 1, 0)

    def shards(self, key: Key) -> list[int]:
        """Shards of a window, ascending."""
        picks = window_picks(self._n, self._window, self._seed, key)
        return np.unique(self._shard_of[picks]).tolist()

    def next_uses(self, key: Key) -> np.ndarray:
        """For every shard, how many windows into the epoch of `key` the next window after it is that needs the shard."""
        this, rest = self._window_of(key[0]), self._window_of(key[0] + 1) + self.n_windows
        later = np.where(this > key[1], this, rest)
        return np.minimum(np.minimum.reduceat(later, self._first), np.minimum.reduceat(rest, self._first))

    def _window_of(self, epoch: int) -> np.ndarray:
        """Window of every row group in an epoch."""
        if epoch not in self._windows:
            self._windows = {e: w for e, w in self._windows.items() if e >= epoch - 1}
            found = np.empty(self._n, np.int64)
            found[permutation(self._n, self._seed, epoch)] = np.arange(self._n) // self._window
            self._windows[epoch] = found
        return self._windows[epoch]


class Filler:
    """Holds the ring's lock while it lives. `start` fills in a thread, `fill` one window in this one."""

    def __init__(self, ring: Ring, order: WindowOrder, first: Key) -> None:
        self.ring, self.order = ring, order
        self._next = first
        self._changed = threading.Condition()
        self._ahead: deque[tuple[Key, list[int]]] = deque()  # windows not yet in the reader's memory
        self._ready: set[Key] = set()
        self._error: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._lock = take_lock(ring.path)
        try:
            self.shelf = clean(ring)
            uses = order.next_uses((first[0], first[1] - 1))
            while self._full(0):
                self._drop(max(self.shelf, key=uses.__getitem__))
            self._tokens = TokenSlices(ring.corpus.path / "tokens.parquet")
        except BaseException:
            self._lock.close()
            raise

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ring-filler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the batch in hand, and let others use the ring."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._lock.close()

    # ---- the reader's side ----

    def wait(self, key: Key) -> None:
        """Return when all shards of window `key` are on disk; raise what stopped the filler."""
        with self._changed:
            while key not in self._ready:
                if self._error is not None:
                    raise self._error
                if self._stopping:
                    raise Stopped("the ring was closed: open another stream")
                self._changed.wait()

    def read(self, hook: str, shard: int, row0: int, row1: int, out: np.ndarray) -> None:
        """Rows of a shard of a window that is waited for and not yet done."""
        Vectors(self.ring.store.folder(hook), [self.shelf[shard][hook]]).read_range(row0, row1, out)

    def done(self, key: Key) -> None:
        """Window `key` is in memory: its shards may go."""
        with self._changed:
            self._ready.discard(key)
            self._ahead = deque(w for w in self._ahead if w[0] != key)
            self._changed.notify_all()

    # ---- the model's side ----

    def _run(self) -> None:
        try:
            while True:
                self.fill()
        except BaseException as e:
            with self._changed:
                self._error = readable(e, self.ring)
                self._changed.notify_all()

    def fill(self, tick: Callable[[int], None] | None = None) -> None:
        """Harvest what the next window lacks; `tick` counts its tokens."""
        key, wanted = self._next, self.order.shards(self._next)
        with self._changed:
            # A ring that holds everything would run through epochs without end.
            while len(self._ahead) > self.order.n_windows:
                self._pause()
            self._ahead.append((key, wanted))
        for shard in wanted:
            if shard in self.shelf:
                self._check_stop()
            else:
                self._make_room(shard, key)
                self._harvest(shard, tick)
        with self._changed:
            self._ready.add(key)
            self._changed.notify_all()
        self._next = self.order.after(key)

    def _pause(self) -> None:
        self._check_stop()
        self._changed.wait()

    def _check_stop(self) -> None:
        if self._stopping:
            raise Stopped("the ring was closed")

    def _make_room(self, shard: int, key: Key) -> None:
        with self._changed:
            while self._full(self.ring.shard_bytes(shard)):
                needed = {s for _, shards in self._ahead for s in shards}
                free = [s for s in self.shelf if s not in needed]
                if free:
                    self._drop(max(free, key=self.order.next_uses(key).__getitem__))
                else:
                    self._pause()

    def _full(self, more: int) -> bool:
        return sum(map(self.ring.shard_bytes, self.shelf)) + more > self.ring.disk_bytes

    def _drop(self, shard: int) -> None:
        for hook, record in self.shelf.pop(shard).items():
            folder = self.ring.store.folder(hook)
            record_path(folder, shard).unlink()
            (folder / record.file).unlink()

    def _harvest(self, shard: int, tick: Callable[[int], None] | None) -> None:
        from cache.harvesting import run_shard

        def counted(n: int) -> None:
            self._check_stop()
            if tick is not None:
                tick(n)

        ring, store = self.ring, self.ring.store
        values, _ = run_shard(ring.model, store, shard, ring.dtypes, ring.batch_tokens, counted)
        records = {h: commit_shard(store, self._tokens, shard, h, x) for h, x in values.items()}
        ring.harvested_tokens += store.shards[shard][3] - store.shards[shard][2]
        with self._changed:
            self.shelf[shard] = {h: replace(r, stats={}) for h, r in records.items()}


def readable(e: BaseException, ring: Ring) -> BaseException:
    """A full or broken disk as one line that says what to do."""
    if not isinstance(e, OSError):
        return e
    why = e.strerror or str(e)
    return AtomscopeError(
        f"the ring {ring.path} cannot be written ({why}): free disk space or give fewer disk_bytes "
        f"(now {ring.disk_bytes:,}); the same call goes on from its last checkpoint"
    )


def take_lock(folder: Path) -> IO[bytes]:
    """The ring's lock file, held until it is closed or the process ends."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(
            f"the ring {folder} feeds another stream: close that one, or train all SAEs in one call"
        ) from None
    return file


def clean(ring: Ring) -> dict[int, dict[str, ShardRecord]]:
    """What an earlier process left: shards whole at every hook; anything else is deleted."""
    shutil.rmtree(ring.path / "_tmp", ignore_errors=True)
    (ring.path / "_tmp").mkdir()
    there: dict[str, dict[int, ShardRecord]] = {}
    for hook in ring.hooks:
        folder = ring.store.folder(hook)
        folder.mkdir(parents=True, exist_ok=True)
        there[hook] = {}
        for shard in list_records(folder):
            try:
                record = ShardRecord.load(record_path(folder, shard))
                whole = (folder / record.file).stat().st_size == record.bytes
            except (AtomscopeError, OSError):
                continue
            if whole and record.dtype in ITEMSIZE:
                there[hook][shard] = replace(record, stats={})
    common = set.intersection(*(set(r) for r in there.values()))
    for hook, records in there.items():
        folder = ring.store.folder(hook)
        keep = {record_path(folder, s).name for s in common} | {records[s].file for s in common}
        for path in folder.iterdir():
            if path.name not in keep:
                path.unlink()
        fsync_dir(folder)
    return {s: {h: there[h][s] for h in ring.hooks} for s in sorted(common)}
