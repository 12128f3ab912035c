"""Reconstruction metrics, accumulated in float64, so that they do not depend on the batch size.

fvu   = sum ||x - x_hat||^2 / sum ||x - x_mean||^2      x_mean: mean of the rows evaluated; 1 for predicting it
l0    = mean number of non-zero activations (z != 0, so signed codes count)
cos   = mean cosine of x and x_hat;   norm_ratio = mean ||x_hat|| / ||x||
    fvu_usual: fvu without rows of more than SINK_RATIO times the mean norm. Attention sinks outside position 0 are rare
    (one row in ten thousand of SmolLM2) but hold most of the variance where they occur, and flatter the plain fvu.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saes.codes import Codes

SINK_RATIO = 10.0


class Reconstruction:
    """Sums over rows of x and x_hat; `add` batches, then read `values()`."""

    def __init__(self, d_model: int) -> None:
        self.n = 0
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._square = self._error = self._cos = self._ratio = self._l0 = 0.0
        self._has_codes = False

    def add(self, x: Tensor, x_hat: Tensor, codes: Codes | None = None) -> None:
        x, x_hat = x.detach().double().cpu(), x_hat.detach().double().cpu()
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        self.n += len(x)
        self._sum += x.sum(0)
        self._square += (x**2).sum().item()
        self._error += ((x - x_hat) ** 2).sum().item()
        self._cos += ((x * x_hat).sum(1) / (norm * norm_hat).clamp_min(1e-30)).sum().item()
        self._ratio += (norm_hat / norm.clamp_min(1e-30)).sum().item()
        if codes is not None:
            self._has_codes = True
            self._l0 += codes.l0().sum().item()

    def values(self) -> dict[str, float]:
        """fvu, mse (summed over d_model), cos, norm_ratio, and l0 where codes were given."""
        spread = self._square - (self._sum**2).sum().item() / max(self.n, 1)
        n = max(self.n, 1)
        out = {
            "fvu": self._error / max(spread, 1e-300),
            "mse": self._error / n,
            "cos": self._cos / n,
            "norm_ratio": self._ratio / n,
        }
        return out | ({"l0": self._l0 / n} if self._has_codes else {})


class Firing:
    """How often each latent fires."""

    def __init__(self, d_sae: int) -> None:
        self.rows = 0
        self.counts = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, codes: Codes) -> None:
        self.rows += codes.n_rows
        fired = codes.indices.reshape(-1)[codes.values.reshape(-1) != 0].long().cpu()
        self.counts += torch.bincount(fired, minlength=len(self.counts))

    def density(self) -> np.ndarray:
        """Share of rows on which each latent fires, float64 `[d_sae]`."""
        return self.counts.double().numpy() / max(self.rows, 1)

    def values(self) -> dict[str, float]:
        """alive: share of latents that fired at all; dense: share that fire on more than a tenth of rows."""
        density = self.density()
        return {"alive": float((density > 0).mean()), "dense": float((density > 0.1).mean())}

    def histogram(self, bins: int = 40) -> list[dict[str, Any]]:
        """Counts of log10 density over the latents that fired: rows of lo, hi, count."""
        density = self.density()
        log = np.log10(density[density > 0])
        low = np.floor(np.log10(1 / max(self.rows, 10)))
        counts, edges = np.histogram(log, bins=bins, range=(low, 0.0))
        return [
            {"lo": float(a), "hi": float(b), "count": int(c)} for a, b, c in zip(edges, edges[1:], counts)
        ]
