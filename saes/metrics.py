"""Reconstruction and firing metrics, accumulated in float64, so that they do not depend on the batch size.

fvu   = sum ||x - x_hat||^2 / sum ||x - x_mean||^2      x_mean: mean of the rows evaluated; 1 for predicting it
mse   = mean ||x - x_hat||^2;   nmse = sum ||x - x_hat||^2 / sum ||x||^2
l0    = mean number of non-zero activations (z != 0, so signed codes count);   l1 = mean sum |z|
cos   = mean cosine of x and x_hat;   norm_ratio = mean ||x_hat|| / ||x||
bias  = sum ||x_hat||^2 / sum <x, x_hat>    relative reconstruction bias: 1 where no rescaling helps, below 1: shrunk
    fvu_usual: fvu without rows of more than SINK_RATIO times the mean norm. Attention sinks outside position 0 are rare
    (one row in ten thousand of SmolLM2) but hold most of the variance where they occur, and flatter the plain fvu.

Intervals (95 %) resample contexts: the tokens of one context are not independent. The spread in them is that about the
same x_mean, so that value and interval are of one quantity: with s_c = sum of x - ref over context c and m = x_mean,
sum_c ||x - m||^2 = sum_c ||x - ref||^2 - 2 <m - ref, s_c> + n_c ||m - ref||^2. Where s_c of all contexts would take more
than GROUP_BYTES, contexts are resampled in groups (context i in the order seen belongs to group i mod their number).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saes.codes import Codes

SINK_RATIO = 10.0
BOOTSTRAP = 1000
GROUP_BYTES = 64 << 20
"""Memory that the sums of a `Reconstruction`'s contexts may take: 3,600 of d_model 2,304, 14,000 of 576."""
_SUMS = ("n", "error", "square", "spread", "cos", "ratio", "square_hat", "dot", "l0", "l1")
_RATIOS = {
    "fvu": ("error", "spread"), "mse": ("error", "n"), "nmse": ("error", "square"), "cos": ("cos", "n"),
    "norm_ratio": ("ratio", "n"), "bias": ("square_hat", "dot"), "l0": ("l0", "n"), "l1": ("l1", "n"),
}  # fmt: skip


def bootstrap(
    sums: np.ndarray, value: Callable[[np.ndarray], np.ndarray], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `value(sums over contexts)`; sums `[contexts, columns]`, value maps `[..., columns]` to `[...]`."""
    rng, n = np.random.default_rng(seed), len(sums)
    totals = np.stack([
        np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64) @ sums for _ in range(BOOTSTRAP)
    ])  # fmt: skip
    low, high = np.quantile(value(totals), [0.025, 0.975])
    return float(low), float(high)


class Reconstruction:
    """Sums over rows of x and x_hat; `add` batches, then read `values()`, and `intervals()` where contexts were given.

    reference: any vector near the mean of the rows, from which sums are taken so that they keep their digits; results do
    not depend on it.
    """

    def __init__(self, d_model: int, reference: Tensor | None = None) -> None:
        self.n = 0
        zeros = torch.zeros(d_model, dtype=torch.float64)
        self._reference = zeros if reference is None else reference.detach().double().cpu()
        self._sum = zeros.clone()
        """Of x - reference."""
        self._totals = np.zeros(len(_SUMS))
        self._group: dict[int, int] = {}
        """Of each context seen."""
        most = max(2, GROUP_BYTES // (8 * (d_model + len(_SUMS))))
        # pages of zeros that no context has touched take no memory
        self._sums, self._shift = np.zeros((most, len(_SUMS))), torch.from_numpy(np.zeros((most, d_model)))
        self._has_codes = False

    @property
    def groups(self) -> int:
        """Parts that intervals resample: contexts, or groups of them."""
        return min(len(self._group), len(self._sums))

    def add(
        self,
        x: Tensor,
        x_hat: Tensor,
        codes: Codes | RowSums | None = None,
        context: np.ndarray | None = None,
    ) -> None:
        """Rows `[B, d_model]`, their codes, and the context (any id) that each row is from."""
        x, x_hat = x.detach().double().cpu(), x_hat.detach().double().cpu()
        norm, norm_hat, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        l0 = l1 = torch.zeros(len(x), dtype=torch.float64)
        if codes is not None:
            self._has_codes = True
            l0, l1 = codes.l0().double().cpu(), l1_norms(codes).cpu()
        shift = x - self._reference
        columns = (
            torch.ones_like(norm), ((x - x_hat) ** 2).sum(1), norm**2, (shift**2).sum(1),
            dot / (norm * norm_hat).clamp_min(1e-30), norm_hat / norm.clamp_min(1e-30), norm_hat**2, dot, l0, l1,
        )  # fmt: skip
        rows = torch.stack(columns, dim=1).numpy()
        self.n += len(x)
        self._sum += shift.sum(0)
        self._totals += rows.sum(0)
        if context is not None and len(x):
            groups = self._groups_of(context)
            np.add.at(self._sums, groups, rows)
            self._shift.index_add_(0, torch.from_numpy(groups), shift)

    def _groups_of(self, context: np.ndarray) -> np.ndarray:
        """Group of each row, int64 `[B]`; contexts that were not seen before get the next ones."""
        ids, inverse = np.unique(context, return_inverse=True)
        found = [self._group.setdefault(c, len(self._group) % len(self._sums)) for c in ids.tolist()]
        return np.array(found, dtype=np.int64)[inverse]

    def values(self) -> dict[str, float]:
        """fvu, mse (summed over d_model), nmse, cos, norm_ratio, bias, and l0 and l1 where codes were given."""
        total = dict(zip(_SUMS, self._totals.tolist(), strict=True))
        total["spread"] -= (self._sum**2).sum().item() / max(self.n, 1)
        return {m: total[a] / float(_no_zeros(np.asarray(total[b]))) for m, (a, b) in self._metrics().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of each metric over contexts; none from fewer than two contexts."""
        if self.groups < 2:
            return {}
        sums, at = self._sums[: self.groups].copy(), {name: i for i, name in enumerate(_SUMS)}
        mean = self._sum / self.n
        about = sums[:, at["spread"]] - 2 * (self._shift[: self.groups] @ mean).numpy()
        sums[:, at["spread"]] = about + sums[:, at["n"]] * (mean**2).sum().item()
        return {
            m: bootstrap(sums, lambda t, a=a, b=b: t[:, at[a]] / _no_zeros(t[:, at[b]]))  # type: ignore[misc]
            for m, (a, b) in self._metrics().items()
        }

    def _metrics(self) -> dict[str, tuple[str, str]]:
        return {m: r for m, r in _RATIOS.items() if self._has_codes or m not in ("l0", "l1")}


def _no_zeros(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) > 1e-300, values, 1e-300)


class RowSums(NamedTuple):
    """L0 and L1 of each row `[B]`, where the codes themselves are too many to keep."""

    n: Tensor
    size: Tensor

    def l0(self) -> Tensor:
        return self.n


def l1_norms(codes: Codes | RowSums) -> Tensor:
    """Sum of |z| of each row, float64 `[B]`."""
    if isinstance(codes, RowSums):
        return codes.size
    size = codes.values.detach().double().abs()
    if codes.offsets is None:
        return size.sum(1)
    return size.new_zeros(codes.n_rows).index_add_(0, codes.rows(), size)


class Firing:
    """How often each latent fires, and on how many contexts."""

    def __init__(self, d_sae: int) -> None:
        self.rows = 0
        self.counts = torch.zeros(d_sae, dtype=torch.int64)
        self.contexts = torch.zeros(d_sae, dtype=torch.int64)
        self._last: tuple[int, Tensor] = (-1, torch.zeros(d_sae, dtype=torch.bool))

    def add(self, codes: Codes, context: np.ndarray | None = None) -> None:
        """context: id of each row's context, not falling from row to row or from batch to batch."""
        self.rows += codes.n_rows
        fires = (codes.values.reshape(-1) != 0).cpu()
        fired = codes.indices.reshape(-1).cpu()[fires].long()
        d_sae = len(self.counts)
        self.counts += torch.bincount(fired, minlength=d_sae)
        if context is None or codes.n_rows == 0:
            return
        owner = torch.from_numpy(np.asarray(context, dtype=np.int64))[codes.rows().cpu()[fires]]
        pairs = torch.unique(owner * d_sae + fired)
        seen = torch.bincount(pairs % d_sae, minlength=d_sae)
        # a context that goes on from the batch before has had some of its latents counted
        first, last = int(context[0]), int(context[-1])
        before, known = self._last
        again = _latents_of(pairs, first, d_sae) & known if first == before else torch.zeros_like(known)
        self.contexts += seen - again.long()
        now = _latents_of(pairs, last, d_sae)
        self._last = (last, now | known if last == before else now)

    def density(self) -> np.ndarray:
        """Share of rows on which each latent fires, float64 `[d_sae]`."""
        return self.counts.double().numpy() / max(self.rows, 1)

    def consistency(self) -> np.ndarray:
        """Firings a context among contexts with at least one (the consistent-activation heuristic); NaN if silent."""
        contexts = self.contexts.double().numpy()
        return np.divide(
            self.counts.double().numpy(), contexts, out=np.full(len(contexts), np.nan), where=contexts > 0
        )

    def values(self) -> dict[str, float]:
        """Shares of latents: alive (fired at all), dense (on more than a tenth of rows), dense_1pct; mean consistency."""
        density, consistency = self.density(), self.consistency()
        out = {
            "alive": float((density > 0).mean()),
            "dense": float((density > 0.1).mean()),
            "dense_1pct": float((density > 0.01).mean()),
        }
        known = consistency[np.isfinite(consistency)]
        return out | ({"consistency": float(known.mean())} if len(known) else {})

    def histogram(self, bins: int = 40) -> list[dict[str, Any]]:
        """Counts of log10 density over the latents that fired: rows of lo, hi, count."""
        density = self.density()
        log = np.log10(density[density > 0])
        low = np.floor(np.log10(1 / max(self.rows, 10)))
        counts, edges = np.histogram(log, bins=bins, range=(low, 0.0))
        return [
            {"lo": float(a), "hi": float(b), "count": int(c)} for a, b, c in zip(edges, edges[1:], counts)
        ]


def _latents_of(pairs: Tensor, context: int, d_sae: int) -> Tensor:
    out = torch.zeros(d_sae, dtype=torch.bool)
    out[pairs[pairs // d_sae == context] % d_sae] = True
    return out
