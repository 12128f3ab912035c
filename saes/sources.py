"""Where training rows come from: an activation store, a ring, or tensors in memory: statistics and a stream.

The stream contract is the store's (cache/stream.py): an endless iterator of full batches with an exact
`state_dict()`, so that training resumes on the very next row. For a transcoder each row comes with its target: the
same token's activation at another hook, or the same row of a second tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cache.devices import known_device
from cache.errors import DataError, MissingDataError, UsageError
from saes.config import SAEConfig
from saes.metrics import SINK_RATIO
from saes.sae import as_tensor
from saes.train_config import TrainConfig

FEWEST = 0.01
"""Share of the rows that those past position 0 must be for their norm to be the usual one."""


class Moments(NamedTuple):
    """Of the training rows without attention sinks, which would set the units of a run: their number, E||x||."""

    n: int
    mean_norm: float


class Rows(NamedTuple):
    """A batch: x float32 `[B, d_model]`, and for a transcoder the target `[B, d_out]` of the same tokens."""

    x: Tensor
    target: Tensor | None = None


class RowStream(Protocol):
    """Endless batches with a state from which they go on exactly."""

    rows_per_epoch: int

    def __iter__(self) -> Iterator[Rows]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Source(Protocol):
    """What `train` needs of its data."""

    d_model: int
    d_out: int
    """Width of the target, 0 without one."""
    provenance: dict[str, Any]

    def moments(self, cfg: TrainConfig) -> Moments: ...
    def target_moments(self, cfg: TrainConfig) -> Moments | None: ...
    def stream(self, cfg: TrainConfig, state: dict[str, Any] | None, device: torch.device) -> RowStream: ...


@dataclass
class StoreSource:
    """Rows of one hook of an `ActivationStore`; with `out_hook`, beside the rows of that hook."""

    store: Any
    hook: str
    out_hook: str | None = None

    def __post_init__(self) -> None:
        self.hooks = [self.hook] if self.out_hook is None else [self.hook, self.out_hook]
        self._check()
        self.d_model = self.store.d(self.hook)
        self.d_out = self.store.d(self.out_hook) if self.out_hook else 0
        identity = self.store.identity
        self.provenance = {
            "store": self.store.path.name,
            "hook": self.hook,
            "model": identity.get("model", ""),
            "model_sha": identity.get("weights_sha256", ""),
        }
        self.mode: str = self.store.corpus.meta.get("mode", "")
        if self.out_hook:
            self.provenance["out_hook"] = self.out_hook

    def _check(self) -> None:
        for hook in self.hooks:
            self.store.require_complete(hook)

    def moments(self, cfg: TrainConfig) -> Moments:
        return self._moments(self.hook, cfg)

    def target_moments(self, cfg: TrainConfig) -> Moments | None:
        return self._moments(self.out_hook, cfg) if self.out_hook else None

    def _moments(self, hook: str, cfg: TrainConfig) -> Moments:
        return _usual_moments(self.store, hook, cfg)

    def stream(self, cfg: TrainConfig, state: dict[str, Any] | None, device: torch.device) -> RowStream:
        inner = self.store.stream(
            self.hooks,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            split=cfg.split,
            skip=cfg.skip,
            state=state,
            device=device,
            **self._mixing(cfg),
        )
        return _StoreRows(inner, self.hook, self.out_hook)

    def _mixing(self, cfg: TrainConfig) -> dict[str, int]:
        return {"window": cfg.window}


@dataclass
class RingSource(StoreSource):
    """Rows of a `Ring`: the model computes them while they are trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.provenance["ring"] = self.store.provenance

    def _check(self) -> None:
        """A ring is never complete: it is filled while it is read. It refuses hooks that it does not hold itself."""

    @property
    def ring_window(self) -> int:
        return self.store.window

    def _mixing(self, cfg: TrainConfig) -> dict[str, int]:  # noqa: ARG002 (a ring was made with its window)
        return {}

    def _moments(self, hook: str, cfg: TrainConfig) -> Moments:
        """Of the first window: an estimate, kept beside the ring so that a resumed run has the same."""
        return _usual_moments(self.store, hook, cfg, seed=cfg.seed)


def _usual_moments(store: Any, hook: str, cfg: TrainConfig, **more: Any) -> Moments:
    """Position 0 is left out even where it is trained on; where hardly another row is, it is what there is."""
    parts = cfg.skip.split("+") if cfg.skip else []
    usual = cfg.skip if "first" in parts else "+".join(["first", *parts])
    s = store.stats(hook, split=cfg.split, skip=cfg.skip, **more)
    if usual != cfg.skip:
        with suppress(MissingDataError):
            others = store.stats(hook, split=cfg.split, skip=usual, **more)
            s = others if others.n > FEWEST * s.n else s
    return Moments(s.n, float(s.mean_norm))


class _StoreRows:
    def __init__(self, inner: Any, hook: str, out_hook: str | None) -> None:
        self._inner, self._hook, self._out = inner, hook, out_hook
        self.rows_per_epoch: int = inner.rows_per_epoch

    def __iter__(self) -> Iterator[Rows]:
        for batch in self._inner:
            yield Rows(batch.x[self._hook], batch.x[self._out] if self._out else None)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def close(self) -> None:
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()


@dataclass
class TensorSource:
    """Rows of a tensor `[N, d_model]` in memory, and of a target `[N, d_out]`, for notebooks and tests.

    `hook` and `out_hook` say where they are from, if anyone knows: the SAEs keep it.
    """

    x: Tensor
    target: Tensor | None = None
    hook: str = ""
    out_hook: str = ""

    def __post_init__(self) -> None:
        self.x = _checked(self.x, "training rows")
        self.d_model = self.x.shape[1]
        name = f"tensor-{_digest(self.x)}"
        self.provenance = {"store": name, "hook": self.hook, "model": "", "model_sha": ""}
        if self.out_hook:
            self.provenance["out_hook"] = self.out_hook
        self.d_out = 0
        if self.target is not None:
            self.target = _checked(self.target, "targets")
            if len(self.target) != len(self.x):
                raise DataError(f"{len(self.x)} rows have {len(self.target)} targets: give one for each row")
            self.d_out = self.target.shape[1]
            self.provenance["target"] = f"tensor-{_digest(self.target)}"

    def moments(self, cfg: TrainConfig) -> Moments:  # noqa: ARG002 (all rows of a tensor are training rows)
        return _tensor_moments(self.x)

    def target_moments(self, cfg: TrainConfig) -> Moments | None:  # noqa: ARG002 (as `moments`)
        if self.target is None:
            return None
        return _tensor_moments(self.target)

    def stream(self, cfg: TrainConfig, state: dict[str, Any] | None, device: torch.device) -> RowStream:
        return _TensorRows(self.x, self.target, cfg, state or {"epoch": 0, "offset": 0}, device)


def tensor_source(data: Any, hook: str | None, out_hook: str | None) -> TensorSource | None:
    """Rows of a tensor or array, or of two (x, target); None for a store or ring. Raises UsageError for anything else."""
    if isinstance(data, list):
        raise UsageError(
            "train takes one tensor, got a list: torch.cat(data) for SAEs, or a tuple (x, target) for transcoders"
        )
    given = tuple(as_tensor(x) for x in (data if isinstance(data, tuple) else (data,)))
    if not isinstance(data, tuple) and not isinstance(given[0], Tensor):
        if hasattr(data, "hooks") and hasattr(data, "stream"):
            return None
        raise UsageError(
            f"train takes a store (harvest, ActivationStore.open), a ring, or a tensor [N, d_model] of numbers, "
            f"got {type(data).__name__}"
        )
    wrong = [type(x).__name__ for x in given if not isinstance(x, Tensor)]
    if wrong:
        raise UsageError(f"train takes two tensors (x, target) for transcoders, got {wrong[0]} among them")
    if len(given) > 2 or not given:
        raise UsageError(f"{len(given)} tensors were given: one trains SAEs, two (x, target) transcoders")
    if out_hook and (len(given) == 1 or not hook):
        missing = "give two tensors (x, target)" if len(given) == 1 else "give hook= as well, where x is from"
        raise UsageError(f"out_hook names where the targets of a transcoder are from: {missing}")
    if out_hook and out_hook == hook:
        raise UsageError(f"out_hook is the input's own hook {hook}: leave it out to train SAEs")
    return TensorSource(given[0], given[1] if len(given) == 2 else None, hook or "", out_hook or "")


def training_arguments(
    saes: Any, config: Any, device: Any
) -> tuple[list[SAEConfig], TrainConfig, torch.device | None]:
    """What `train` was given beside its data: a list of configs, how to train, and where. Raises UsageError."""
    saes = [saes] if isinstance(saes, SAEConfig) else saes
    listed = isinstance(saes, Sequence) and not isinstance(saes, str)
    wrong = [type(c).__name__ for c in (saes if listed else [saes]) if not isinstance(c, SAEConfig)]
    if wrong or not len(saes):
        got = f", got {wrong[0]}" if wrong else ""
        raise UsageError(
            f"train needs at least one SAEConfig, for example presets.topk(d_sae=4096, k=32){got}"
        )
    if config is not None and not isinstance(config, TrainConfig):
        given = config if isinstance(config, dict) else {"steps": 1000}
        wanted = f"TrainConfig({', '.join(f'{k}={v!r}' for k, v in given.items())})"
        raise UsageError(f"the third argument is a TrainConfig, got {type(config).__name__}: write {wanted}")
    return list(saes), config or TrainConfig(), None if device is None else known_device(device)


def _tensor_moments(x: Tensor) -> Moments:
    """Rows of more than SINK_RATIO times the median norm are left out."""
    norms = x.double().norm(dim=1)
    usual = norms[norms <= SINK_RATIO * norms.median()]
    if not usual.any():
        usual = norms
    return Moments(len(usual), usual.mean().item())


def _checked(x: Tensor, what: str) -> Tensor:
    if x.ndim != 2 or not len(x):
        raise DataError(f"{what} must be a tensor [N, d_model], got shape {tuple(x.shape)}")
    x = x.detach().float()
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        raise DataError(
            f"row {int((~finite).nonzero()[0])} of the training tensor holds NaN or infinite values"
        )
    return x


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


class _TensorRows:
    """Rows permuted anew in each epoch; a batch may cross into the next epoch."""

    def __init__(
        self, x: Tensor, target: Tensor | None, cfg: TrainConfig, state: dict[str, Any], device: torch.device
    ) -> None:
        self._target = target
        self._x, self._batch, self._seed, self._device = x, cfg.batch_size, cfg.seed, device
        self.rows_per_epoch = len(x)
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])

    def _order(self, epoch: int) -> Tensor:
        gen = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._x), generator=gen)

    def __iter__(self) -> Iterator[Rows]:
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
            at = torch.cat(ids)
            target = None if self._target is None else self._target[at].to(self._device)
            yield Rows(self._x[at].to(self._device), target)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "offset": self._offset}

    def close(self) -> None:
        """Nothing to release."""
