"""Where training rows come from: an activation store, a ring, or a tensor in memory: statistics and a stream.

The stream contract is the store's (cache/stream.py): an endless iterator of full batches with an exact
`state_dict()`, so that training resumes on the very next row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cache.errors import DataError
from saes.config import TrainConfig


class Moments(NamedTuple):
    """Moments of the training rows: their number, E||x||."""

    n: int
    mean_norm: float


class RowStream(Protocol):
    """Endless batches `[B, d_model]` float32 with a state from which they go on exactly."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Source(Protocol):
    """What `train` needs of its data."""

    d_model: int
    provenance: dict[str, Any]

    def moments(self, cfg: TrainConfig) -> Moments: ...
    def stream(self, cfg: TrainConfig, state: dict[str, Any] | None, device: torch.device) -> RowStream: ...


@dataclass
class StoreSource:
    """Rows of one hook of an `ActivationStore`."""

    store: Any
    hook: str

    def __post_init__(self) -> None:
        self.store.require_complete(self.hook)
        self.d_model = self.store.d(self.hook)
        identity = self.store.identity
        self.provenance = {
            "store": self.store.path.name,
            "hook": self.hook,
            "model": identity.get("model", ""),
            "model_sha": identity.get("weights_sha256", ""),
        }

    def moments(self, cfg: TrainConfig) -> Moments:
        s = self.store.stats(self.hook, split=cfg.split, skip=cfg.skip)
        return Moments(s.n, float(s.mean_norm))

    def stream(self, cfg: TrainConfig, state: dict[str, Any] | None, device: torch.device) -> RowStream:
        inner = self.store.stream(
            [self.hook],
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            split=cfg.split,
            skip=cfg.skip,
            state=state,
            device=device,
        )
        return _StoreRows(inner, self.hook)


@dataclass
class RingSource(StoreSource):
    """Rows of one hook of a `Ring`: the model computes them while they are trained on."""

    def __post_init__(self) -> None:
        self.d_model = self.store.d(self.hook)
        identity = self.store.identity
        self.provenance = {
            "store": self.store.path.name,
            "hook": self.hook,
            "model": identity.get("model", ""),
            "model_sha": identity.get("weights_sha256", ""),
            "ring": self.store.provenance,
        }

    def moments(self, cfg: TrainConfig) -> Moments:
        """Of the first window: an estimate, kept beside the ring so that a resumed run has the same."""
        s = self.store.stats(self.hook, split=cfg.split, skip=cfg.skip, seed=cfg.seed)
        return Moments(s.n, float(s.mean_norm))


class _StoreRows:
    def __init__(self, inner: Any, hook: str) -> None:
        self._inner, self._hook = inner, hook

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._inner:
            yield batch.x[self._hook]

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def close(self) -> None:
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()


@dataclass
class TensorSource:
    """Rows of a tensor `[N, d_model]` in memory, for notebooks and tests."""

    x: Tensor

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or not len(self.x):
            raise DataError(f"training rows must be a tensor [N, d_model], got shape {tuple(self.x.shape)}")
        self.x = self.x.detach().float()
        finite = torch.isfinite(self.x).all(1)
        if not finite.all():
            raise DataError(
                f"row {int((~finite).nonzero()[0])} of the training tensor holds NaN or infinite values"
            )
        self.d_model = self.x.shape[1]
        digest = hashlib.sha256(self.x.cpu().contiguous().numpy().tobytes()).hexdigest()
        self.provenance = {"store": f"tensor-{digest[:16]}", "hook": "", "model": "", "model_sha": ""}

    def moments(self, cfg: TrainConfig) -> Moments:  # noqa: ARG002 (all rows of a tensor are training rows)
        return Moments(len(self.x), self.x.double().norm(dim=1).mean().item())

    def stream(self, cfg: TrainConfig, state: dict[str, Any] | None, device: torch.device) -> RowStream:
        return _TensorRows(self.x, cfg, state or {"epoch": 0, "offset": 0}, device)


class _TensorRows:
    """Rows permuted anew in each epoch; a batch may cross into the next epoch."""

    def __init__(self, x: Tensor, cfg: TrainConfig, state: dict[str, Any], device: torch.device) -> None:
        self._x, self._batch, self._seed, self._device = x, cfg.batch_size, cfg.seed, device
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])

    def _order(self, epoch: int) -> Tensor:
        gen = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._x), generator=gen)

    def __iter__(self) -> Iterator[Tensor]:
        order = self._order(self._epoch)
        while True:
            need, ids = self._batch, []
            while need:
                part = order[self._offset : self._offset + need]
                ids.append(part)
                need -= len(part)
                self._offset += len(part)
                if self._offset == len(order):
                    self._epoch, self._offset = self._epoch + 1, 0
                    order = self._order(self._epoch)
            yield self._x[torch.cat(ids)].to(self._device)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "offset": self._offset}

    def close(self) -> None:
        """Nothing to release."""
