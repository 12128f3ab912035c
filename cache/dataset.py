"""A store's shuffled rows as a torch `IterableDataset`: right under DataLoader workers, ranks, and both.

    data = store.dataset(hook, batch_size=4096, rank=rank, world=world)
    for batch in DataLoader(data, batch_size=None, num_workers=2):
        step(batch.x[hook]); data.done(batch)
    state = data.state_dict()     # JSON; load_state_dict goes on with the very next batch
Each worker of each rank is one reader of `Stream`: over all of them every row comes exactly once an epoch.
Batches are whole (`batch_size=None`); each reader's last one of the last epoch may be short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cache.errors import DataError, UsageError
from cache.store import ActivationStore
from cache.stream import Stream

if TYPE_CHECKING:
    from pathlib import Path


class LoadedBatch(NamedTuple):
    """A batch of its own memory, and where its reader is after it."""

    x: dict[str, Tensor]
    """hook -> [B, d]"""
    row: Tensor
    """Row ids, int64 [B]."""
    place: dict[str, Any]
    """For `RowDataset.done`."""


class RowDataset(IterableDataset[LoadedBatch]):
    """See the head of this file; made by `store.dataset(hooks, ...)`. Epochs start at 0, or at `set_epoch`."""

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
        rank: int = 0,
        world: int = 1,
        epochs: int | None = 1,
    ) -> None:
        super().__init__()
        if epochs is not None and epochs < 1:
            raise UsageError(f"epochs is {epochs}: give at least 1, or None for no end")
        self.path: Path = store.path
        self.rank, self.world, self.epochs, self.window = rank, world, epochs, window
        self._options: dict[str, Any] = {
            "hooks": hooks, "batch_size": batch_size, "seed": seed, "split": split, "skip": skip,
            "dtype": dtype,
        }  # fmt: skip
        names = [hooks] if isinstance(hooks, str) else list(hooks)
        # What is there now: workers that look for themselves could see more, and deal it out differently.
        self._options["shards"] = sorted(set.intersection(*(store.committed(h) for h in names)))
        probe = Stream(store, prefetch=False, window=window, rank=rank, world=world, **self._options)
        self.rows_per_epoch = probe.rows_per_epoch
        """Rows that all ranks and workers together see in an epoch."""
        self._epoch = 0
        self._start: dict[str, Any] | None = None
        self._done: dict[str, Any] = self._fresh()

    def _fresh(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "workers": None, "batches": 0, "readers": {}}

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at this epoch (not with persistent workers: they keep a copy of their own)."""
        self._epoch, self._start = epoch, None
        self._done = self._fresh()

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches = 0
        if self._start is not None and self._start["workers"] is not None:
            if self._start["workers"] != workers:
                raise DataError(
                    f"the state is of {self._start['workers']} readers, here are {workers}: "
                    f"resume with num_workers={self._start['workers']} (0 for one reader without a worker)"
                )
            batches = self._start["batches"]
        # DataLoader asks worker 0 first: the reader whose turn it was takes that place.
        reader = (worker + batches) % workers
        stream = self._stream(reader, workers, prefetch=info is None)
        try:
            for batch in stream:
                place = {"reader": reader, "workers": workers, "state": stream.state_dict()}
                # A worker sends tensors some time after it has made them, and the stream uses its memory again.
                yield LoadedBatch({h: x.clone() for h, x in batch.x.items()}, batch.row.clone(), place)
        finally:
            stream.close()

    def _stream(self, reader: int, workers: int, *, prefetch: bool) -> Stream:
        state = None if self._start is None else self._start["readers"].get(str(reader))
        stream = Stream(
            ActivationStore.open(self.path),
            rank=self.rank * workers + reader,
            world=self.world * workers,
            window=max(1, self.window // workers),  # the workers together hold as much as one reader would
            epochs=None if self.epochs is None else self._epoch + self.epochs,
            state=state,
            prefetch=prefetch,
            **self._options,
        )
        if state is None:
            stream.epoch = self._epoch
        return stream

    # ---- resuming ----

    def done(self, batch: LoadedBatch) -> None:
        """Count a batch as used. A loader runs ahead of the training loop, so only the loop knows."""
        place = batch.place
        self._done["workers"] = place["workers"]
        self._done["batches"] += 1
        self._done["readers"][str(place["reader"])] = place["state"]

    def state_dict(self) -> dict[str, Any]:
        """After the last batch that was `done`; JSON."""
        return self._done | {"readers": dict(self._done["readers"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that batch, in the same order, with as many workers."""
        self._epoch = int(state["epoch"])
        self._start = state | {"readers": dict(state["readers"])}
        self._done = state | {"readers": dict(state["readers"])}
