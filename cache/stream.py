"""Shuffled batches of activations from disk, resumable from four integers.

1. The row groups of a store are permuted by (seed, epoch) and taken in windows of about 32.
2. A thread reads the next window into a preallocated buffer while the current one is consumed.
3. Eligible rows of a window (split, skip) are permuted by (seed, epoch, window) and gathered into batches;
   a batch that a window cannot fill goes on in the next one, over epochs too, so every batch is full.
The order of rows is a function of (store, split, skip, window, seed) alone: a state (epoch, window, offset)
resumes it exactly, with another batch size or more hooks too. Raw values; normalisation belongs to the SAE.
With `world` readers the permuted row groups are dealt out, reader `rank` takes every world-th: in each epoch
all readers together see every row once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from cache.devices import known_device
from cache.errors import DataError, MissingDataError, UsageError
from cache.filters import row_classes
from cache.workspace import canonical_json
from cache.writer import TORCH_DTYPE

if TYPE_CHECKING:
    from cache.store import ActivationStore


class Batch(NamedTuple):
    """Activations of the same rows at several hooks."""

    x: dict[str, Tensor]
    """hook -> [B, d]"""
    row: Tensor
    """Row ids, int64 [B], on the CPU."""


class _Buffer:
    """Rows of the row groups `picks`, one after another, in the store's dtype."""

    def __init__(self, shapes: dict[str, tuple[int, int, torch.dtype]]) -> None:
        self.x = {hook: torch.empty(n, d, dtype=dtype) for hook, (n, d, dtype) in shapes.items()}
        self.raw = {hook: x.view(torch.uint8).numpy() for hook, x in self.x.items()}
        self.picks: np.ndarray | None = None


class _Window:
    """One window in reading order: positions in a buffer and row ids."""

    def __init__(self, buffer: _Buffer) -> None:
        self.buffer = buffer
        self.key: tuple[int, int] | None = None
        self.index = self.row = torch.empty(0, dtype=torch.int64)


class _Output:
    """Preallocated tensors of one batch: `stage` in the store's dtype on the CPU, `x` as handed out."""

    def __init__(
        self, shapes: dict[str, tuple[int, int, torch.dtype]], dtype: torch.dtype, device: torch.device
    ):
        pin = device.type == "cuda"
        self.stage = {h: torch.empty(n, d, dtype=t, pin_memory=pin) for h, (n, d, t) in shapes.items()}
        self.x = {
            h: s
            if s.dtype == dtype and device.type == "cpu"
            else torch.empty(s.shape, dtype=dtype, device=device)
            for h, s in self.stage.items()
        }
        self.row = torch.empty(next(iter(shapes.values()))[0], dtype=torch.int64)
        self.copied = torch.cuda.Event() if pin else None

    def deliver(self, n: int) -> Batch:
        """The first `n` rows; only the last batch of all has fewer than the whole."""
        for hook, stage in self.stage.items():
            if self.x[hook] is stage:
                continue
            moved = stage.to(self.x[hook].device, non_blocking=self.copied is not None)
            self.x[hook].copy_(moved)
        if self.copied is not None:
            self.copied.record()
        if n < len(self.row):
            return Batch(x={h: x[:n] for h, x in self.x.items()}, row=self.row[:n])
        return Batch(x=dict(self.x), row=self.row)

    def wait(self) -> None:
        """The stage may be overwritten once its copy to the device has finished."""
        if self.copied is not None:
            self.copied.synchronize()


class Stream(Iterator[Batch]):
    """Endless iterator of full batches. The tensors of a batch are valid until the next but one call.

    With `epochs` it ends after that many, counted from the very first one; the last batch may be short.
    `rank` of `world` readers get a part each; `shards` limits all of them to what was there at one moment.
    """

    def __init__(
        self,
        store: ActivationStore,
        hooks: str | Sequence[str],
        *,
        batch_size: int,
        seed: int = 0,
        split: str | None = "train",
        skip: str | None = "first",
        window: int = 32,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        state: dict[str, Any] | None = None,
        prefetch: bool = True,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        shards: Sequence[int] | None = None,
    ) -> None:
        self.store = store
        self.hooks = [hooks] if isinstance(hooks, str) else list(hooks)
        if not self.hooks or batch_size < 1 or window < 1 or seed < 0:
            raise UsageError("a stream needs a hook, batch_size >= 1, window >= 1 and seed >= 0")
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} of {world} readers does not exist: ranks are 0..{world - 1}")
        self.batch_size, self.seed, self._per_window = batch_size, seed, window
        self.rank, self.world, self.epochs = rank, world, epochs
        classes = row_classes(split, skip)
        self._wanted = store.class_mask(classes)
        there = set.intersection(*(store.committed(hook) for hook in self.hooks))
        chosen = sorted(there if shards is None else there & set(shards))
        self._vectors = {hook: store.vectors(hook) for hook in self.hooks}
        self.rows_per_epoch = store.count(self.hooks[0], classes, chosen)
        """Rows that all readers together see in an epoch."""
        if not self.rows_per_epoch:
            raise MissingDataError(
                f"no {split or ''} rows that all of {', '.join(self.hooks)} hold: run harvest for these hooks"
            )
        self._blocks = self._vectors[self.hooks[0]].blocks_of(chosen)
        self._n_own = len(range(rank, len(self._blocks), world))
        if not self._n_own:
            raise UsageError(
                f"{world} readers share {len(self._blocks)} row groups: use at most {len(self._blocks)} ranks x workers"
            )
        self.n_windows = -(-self._n_own // window)
        plan = [self._blocks.tolist(), window, split, skip] + ([rank, world] if world > 1 else [])
        self._plan = xxhash.xxh3_64_hexdigest(canonical_json(plan).encode())
        self.epoch = self.window = self.offset = 0
        if state is not None:
            self._restore(state)
        self._allocate(dtype, known_device("cpu" if device is None else device))
        self._pool = ThreadPoolExecutor(1, "stream") if prefetch else None
        self._pending: Future[None] | None = None

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        largest = int((self._blocks[:, 1] - self._blocks[:, 0]).max())
        stored = {h: (v.d, TORCH_DTYPE[v.dtype]) for h, v in self._vectors.items()}
        room = {h: (largest * min(self._per_window, self._n_own), d, t) for h, (d, t) in stored.items()}
        first = _Buffer(room)  # a store of one window is read once and then stays
        stays = self._n_own == len(self._blocks) and self.n_windows == 1
        self._now, self._spare = _Window(first), _Window(first if stays else _Buffer(room))
        shapes = {h: (self.batch_size, d, t) for h, (d, t) in stored.items()}
        self._outputs = [_Output(shapes, dtype, device) for _ in range(2)]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts; JSON."""
        at = {"epoch": self.epoch, "window": self.window, "offset": self.offset}
        return {"seed": self.seed, "plan": self._plan} | at

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("plan") != self._plan:
            raise DataError(
                "the stream state belongs to another store, split, skip, window size, rank or world, or shards "
                "were added since: resume with the settings it was made with"
            )
        self.seed = int(state["seed"])
        self.epoch, self.window, self.offset = (int(state[k]) for k in ("epoch", "window", "offset"))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        self._outputs.reverse()
        out = self._outputs[0]
        out.wait()
        done = 0
        while done < self.batch_size and not self._ended(self.epoch):
            if self._now.key != (self.epoch, self.window):
                self._open_window()
            now = self._now
            take = min(self.batch_size - done, len(now.index) - self.offset)
            if take:
                index = now.index[self.offset : self.offset + take]
                for hook, stage in out.stage.items():
                    torch.index_select(now.buffer.x[hook], 0, index, out=stage[done : done + take])
                out.row[done : done + take] = now.row[self.offset : self.offset + take]
                done, self.offset = done + take, self.offset + take
            else:
                self.epoch, self.window = self._after((self.epoch, self.window))
                self.offset = 0
        if not done:
            raise StopIteration
        return out.deliver(done)

    def _ended(self, epoch: int) -> bool:
        return self.epochs is not None and epoch >= self.epochs

    def close(self) -> None:
        """Stop the reading thread (it also ends with the object)."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._pending = None

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, window = key
        return (epoch, window + 1) if window + 1 < self.n_windows else (epoch + 1, 0)

    def _open_window(self) -> None:
        """Make the window at the current state the current one and start to read the one after it."""
        key = (self.epoch, self.window)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
        if self._spare.key != key:
            self._load(self._spare, key)
        self._now, self._spare = self._spare, self._now
        after = self._after(key)
        if self._pool is not None and not self._ended(after[0]):
            self._pending = self._pool.submit(self._load, self._spare, after)

    def _load(self, window: _Window, key: tuple[int, int]) -> None:
        window.key = None
        picks = window_picks(len(self._blocks), self._per_window, self.seed, key, self.rank, self.world)
        blocks, buffer = self._blocks[picks], window.buffer
        starts = np.cumsum([0, *(blocks[:, 1] - blocks[:, 0])])
        if buffer.picks is None or not np.array_equal(buffer.picks, picks):
            buffer.picks = None
            for hook, raw in buffer.raw.items():
                vectors = self._vectors[hook]
                for (row0, row1), at, ahead in zip(
                    blocks.tolist(), starts.tolist(), [*blocks[1:, 0].tolist(), -1]
                ):
                    vectors.will_need(ahead)
                    vectors.read_range(row0, row1, raw[at : at + row1 - row0])
            buffer.picks = picks
        kept = [np.flatnonzero(self._wanted[self.store.row_class(a, b)]) for a, b in blocks.tolist()]
        index = np.concatenate([k + at for k, at in zip(kept, starts[:-1])])
        row = np.concatenate([k + a for k, a in zip(kept, blocks[:, 0])])
        shuffle = permutation(len(index), self.seed, *key)
        window.index, window.row = torch.from_numpy(index[shuffle]), torch.from_numpy(row[shuffle])
        window.key = key


def window_picks(
    n_blocks: int, per_window: int, seed: int, key: tuple[int, int], rank: int = 0, world: int = 1
) -> np.ndarray:
    """Row groups of window `key` = (epoch, window) of a reader, ascending."""
    order = permutation(n_blocks, seed, key[0])[rank::world]
    return np.sort(order[key[1] * per_window : (key[1] + 1) * per_window])


def permutation(n: int, *key: int) -> np.ndarray:
    """Random order of range(n): an argsort of raw PCG64 words, which no numpy version may change.

    Words are 64 bits, so a tie, whose order an unstable sort leaves open, is not to be expected in 10^9 windows.
    """
    words = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(n)
    return np.argsort(words)
