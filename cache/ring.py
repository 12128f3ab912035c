"""Train without keeping: a bounded ring of shards on disk, filled by the model while a trainer drains it.

A ring looks like a complete activation store to a stream: same `Batch`, same order, same state. A shard is one row
group (about 6 MB), the unit that the stream permutes, so each epoch runs the model over every token once, in the
order of the stream, and rows are mixed over the whole corpus however small the ring is. What is streamed is bit for
bit what the store of the same model, corpus, hooks and `rows_per_shard` streams: vectors go through the same files.
Resume: the state is the cursor (epoch, window, offset); shards that the ring no longer has are harvested again.

500M tokens at d_model 2,304 in fp16 are a store of 2.3 TB; a ring of them takes `disk_bytes`. What grows with the
corpus is the token table only: 500M x 23 bytes = 11.5 GB before compression, 10 bytes a token of it in memory.
Each further epoch costs the model's time again, less the share of the corpus that the ring holds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cache.errors import MissingDataError, UsageError
from cache.filters import row_classes, shard_sums
from cache.pages import rows_per_group
from cache.progress import progress
from cache.records import ITEMSIZE, ShardRecord, Sums, record_path
from cache.ring_filler import Filler, Key, WindowOrder, readable, shard_bytes
from cache.store import ActivationStore, Stats, plan_shards
from cache.stream import Stream
from cache.workspace import canonical_json, read_json, write_json
from cache.writer import DTYPE_NAME, TORCH_DTYPE

if TYPE_CHECKING:
    from cache.corpus import Corpus
    from cache.protocol import HookedModel

DISK_BYTES = 4 * 10**9
WINDOW = 32
_COUNT_ROWS = 2**24


def harvest_ring(
    model: HookedModel,
    corpus: Corpus,
    *,
    hooks: str | Sequence[str],
    workspace: str | os.PathLike[str] | None = None,
    disk_bytes: int = DISK_BYTES,
    batch_tokens: int | None = None,
    rows_per_shard: int | None = None,
    window: int = WINDOW,
    dtype: str = "auto",
    stats: Mapping[str, Stats] | None = None,
) -> Ring:
    """A ring for `train`, or for `ring.stream(...)`; nothing is harvested before one of them asks.

    `disk_bytes` bounds everything that the ring puts on disk; it must hold one window of `window` row groups.
    `stats` gives the statistics of a hook where the estimate from the first window will not do.
    """
    from cache.harvesting import BATCH_TOKENS, check_request, probed_dtypes, store_identity

    wanted = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    batch_tokens = BATCH_TOKENS if batch_tokens is None else batch_tokens
    check_request(model, corpus, wanted, batch_tokens, dtype)
    if window < 1:
        raise UsageError(f"a window needs at least one row group, got window={window}")
    width = max(model.d_hook(h) for h in wanted) * ITEMSIZE.get(dtype, 2)  # auto is fp16 or bf16
    rows = rows_per_shard or rows_per_group(width)
    if dtype == "auto":
        dtypes = probed_dtypes(model, corpus, plan_shards(corpus.seq_offsets, rows)[0][:2], wanted)
    else:
        dtypes = dict.fromkeys(wanted, TORCH_DTYPE[dtype])
    rule = {"hooks": {h: DTYPE_NAME[t] for h, t in dtypes.items()}, "rows_per_shard": rows}
    store = ActivationStore.create(
        workspace,
        store_identity(model, corpus) | {"ring": rule},
        corpus,
        rows_per_shard=rows,
        model_source=model.source,
        kind="rings",
    )
    return Ring(
        store, model, dtypes, disk_bytes=disk_bytes, batch_tokens=batch_tokens, window=window, stats=stats
    )


class Ring:
    """Made by `harvest_ring`. Feeds one stream at a time; `close` ends it, `remove` deletes the folder as well.

    Files: `rings/<hash>/` in the workspace, laid out as a store of which only some shards are there. They stay
    after `close`, within `disk_bytes`, so that the next run or a resumed one finds them.
    """

    def __init__(
        self,
        store: ActivationStore,
        model: HookedModel,
        dtypes: dict[str, torch.dtype],
        *,
        disk_bytes: int,
        batch_tokens: int,
        window: int,
        stats: Mapping[str, Stats] | None,
    ) -> None:
        self.store, self.model, self.dtypes = store, model, dtypes
        self.disk_bytes, self.batch_tokens, self.window = disk_bytes, batch_tokens, window
        self.hooks = list(dtypes)
        self.harvested_tokens = 0
        """Tokens that the model ran over since this object was made."""
        self._widths = [(model.d_hook(h), ITEMSIZE[DTYPE_NAME[t]]) for h, t in dtypes.items()]
        self._given = dict(stats or {})
        self._stream: RingStream | None = None
        self._check_room()

    def _check_room(self) -> None:
        sizes = sorted((self.shard_bytes(s) for s in range(len(self.store.shards))), reverse=True)
        need = sum(sizes[: self.window])
        if self.disk_bytes < need:
            raise UsageError(
                f"disk_bytes={self.disk_bytes:,} is too small: a shard takes up to {sizes[0]:,} bytes, and the "
                f"{min(self.window, len(sizes))} of one window {need:,}: give that much, or a smaller window"
            )

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream and the thread that fills it; what is on disk stays."""
        if self._stream is not None:
            self._stream.close()

    def remove(self) -> None:
        """Close, and delete everything on disk."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    # ---- what a stream asks of a store ----

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def workspace(self) -> Path:
        return self.store.workspace

    @property
    def corpus(self) -> Corpus:
        return self.store.corpus

    @property
    def identity(self) -> dict[str, Any]:
        return self.store.identity

    @property
    def provenance(self) -> dict[str, Any]:
        """What determines the rows and their order, for the record of a run; the disk bound does not."""
        given = {h: [s.n, s.mean_norm] for h, s in self._given.items()}
        digest = hashlib.sha256(canonical_json(given).encode()).hexdigest()[:16]
        return {
            "rows_per_shard": self.store.meta["rows_per_shard"],
            "window": self.window,
            "statistics": digest if given else "first window",
        }

    def d(self, hook: str) -> int:
        self._check_hook(hook)
        return self.model.d_hook(hook)

    def dtype(self, hook: str) -> str:
        """fp16, bf16 or fp32, as streamed."""
        self._check_hook(hook)
        return DTYPE_NAME[self.dtypes[hook]]

    def _check_hook(self, hook: str) -> None:
        if hook not in self.dtypes:
            raise UsageError(f"this ring harvests {', '.join(self.hooks)}, not {hook!r}: name it in hooks=")

    def committed(self, hook: str) -> set[int]:
        """All shards: those that are not on disk come when they are needed."""
        self._check_hook(hook)
        return set(range(len(self.store.shards)))

    def class_mask(self, classes: Sequence[str]) -> np.ndarray:
        return self.store.class_mask(classes)

    def row_class(self, row0: int, row1: int) -> np.ndarray:
        return self.store.row_class(row0, row1)

    def count(self, hook: str, classes: Sequence[str], shards: Sequence[int]) -> int:  # noqa: ARG002
        """Rows of some row classes in the whole corpus."""
        wanted, n = self.class_mask(classes), self.corpus.n_tokens
        starts = range(0, n, _COUNT_ROWS)
        return sum(int(wanted[self.row_class(a, min(n, a + _COUNT_ROWS))].sum()) for a in starts)

    def vectors(self, hook: str) -> RingVectors:
        return RingVectors(self, hook)

    def shard_bytes(self, shard: int) -> int:
        """Upper bound of what the shard takes on disk, at all hooks."""
        row0, row1 = self.store.shards[shard][2:]
        return shard_bytes(row1 - row0, self._widths)

    # ---- reading ----

    def stats(
        self, hook: str, split: str | None = "train", skip: str | None = "first", seed: int = 0
    ) -> Stats:
        """Statistics of the first window that a stream of `seed` sees: an estimate from shards drawn at random.

        They are kept in the folder, so a resumed run uses the same; given ones are returned as they are.
        """
        self._check_hook(hook)
        if hook in self._given:
            return self._given[hook]
        key = hashlib.sha256(canonical_json([hook, split, skip, seed, self.window]).encode()).hexdigest()
        path = self.path / "statistics" / f"{key[:16]}.json"
        if not path.exists():
            write_json(path, self._measure(hook, row_classes(split, skip), seed).to_json())
        sums = Sums.from_json(read_json(path))
        if not sums.n:
            raise MissingDataError(
                f"{hook}: no {split or ''} rows in the first window: give a larger window or more text"
            )
        return Stats.of(sums)

    def _measure(self, hook: str, classes: list[str], seed: int) -> Sums:
        first: Key = (0, 0)
        order = self.vectors(hook).order(seed)
        shards = order.shards(first)
        rows = sum(self.store.shards[s][3] - self.store.shards[s][2] for s in shards)
        filler = Filler(self, order, first)
        try:
            have = sum(self.store.shards[s][3] - self.store.shards[s][2] for s in shards if s in filler.shelf)
            with progress("first window", rows, unit="tok", done=have) as bar:
                filler.fill(bar.advance)
            total = Sums.zero(self.d(hook))
            for shard in shards:
                record = ShardRecord.load(record_path(self.store.folder(hook), shard))
                total = total + shard_sums(self.store, record, classes)
        except OSError as e:
            raise readable(e, self) from e
        finally:
            filler.stop()
        return total

    def stream(
        self,
        hooks: str | Sequence[str],
        *,
        batch_size: int,
        seed: int = 0,
        split: str | None = "train",
        skip: str | None = "first",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        state: dict[str, Any] | None = None,
        prefetch: bool = True,
    ) -> RingStream:
        """Endless shuffled batches, as of a store; the model starts to run in the background."""
        self._stream = RingStream(
            self,
            hooks,
            batch_size=batch_size,
            seed=seed,
            split=split,
            skip=skip,
            dtype=dtype,
            device=device,
            state=state,
            prefetch=prefetch,
            window=self.window,
        )
        return self._stream


class RingVectors:
    """The rows of one hook, of which only those of the windows at hand can be read."""

    def __init__(self, ring: Ring, hook: str) -> None:
        self.ring, self.hook = ring, hook
        self.d, self.dtype = ring.d(hook), ring.dtype(hook)
        rows = np.array([s[2:] for s in ring.store.shards], np.int64)
        size = rows_per_group(ITEMSIZE[self.dtype] * self.d)
        groups = -(-(rows[:, 1] - rows[:, 0]) // size)
        self._row0 = rows[:, 0]
        self._shard = np.repeat(np.arange(len(rows)), groups)
        within = np.arange(len(self._shard)) - np.repeat(np.cumsum(groups) - groups, groups)
        first = rows[self._shard, 0] + within * size
        self.blocks = np.stack([first, np.minimum(first + size, rows[self._shard, 1])], axis=1)
        """[n, 2] row range of every row group, ascending: as the writer will cut them."""
        self.filler: Filler | None = None

    def blocks_of(self, shards: Sequence[int]) -> np.ndarray:
        return self.blocks[np.isin(self._shard, shards)]

    def order(self, seed: int) -> WindowOrder:
        return WindowOrder(self.blocks, self._shard, seed=seed, window=self.ring.window)

    def will_need(self, row0: int) -> None:
        """Nothing to fetch ahead: what the ring holds was just written, so it is in the page cache."""

    def read_range(self, row0: int, row1: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [row1 - row0, width], with the rows of a row group or part of one."""
        assert self.filler is not None
        shard = int(np.searchsorted(self._row0, row0, side="right")) - 1
        self.filler.read(self.hook, shard, row0, row1, out)


class RingStream(Stream):
    """`Stream` that waits for a window to be harvested before it reads it, and then lets its shards go."""

    def __init__(self, ring: Ring, hooks: str | Sequence[str], **options: Any) -> None:
        super().__init__(ring, hooks, **options)  # type: ignore[arg-type]
        first: RingVectors = self._vectors[self.hooks[0]]  # type: ignore[assignment]
        self._filler = Filler(ring, first.order(self.seed), (self.epoch, self.window))
        for vectors in self._vectors.values():
            vectors.filler = self._filler  # type: ignore[attr-defined]
        self._filler.start()

    def _load(self, window: Any, key: Key) -> None:
        self._filler.wait(key)
        super()._load(window, key)
        self._filler.done(key)

    def close(self) -> None:
        self._filler.stop()
        super().close()
