"""How far the atoms of a dictionary are from each other, and how many codes that makes unique (arXiv 2509.20784).

    mu = max_{i != j} |cos(d_i, d_j)|;  K-sparse codes are unique, and found by l1, where mu < 1 / (2 K - 1)
    q* = sup{ q : mu_q < 1 / (2 K_q - 1) },  mu_q and K_q the q-quantiles of pairwise |cos| and of the L0 of rows
    Welch: mu >= sqrt((n - d) / (d (n - 1))), so the strict bound excludes all K past (1 + 1 / welch) / 2

Both quantiles rise with q, so the predicate fails once and stays failed: the sup is the first failure (both are given, as
a check). q* is nearly a function of L0: read it beside that of random unit atoms and of a tight frame of the same shape
at the same L0s. Cosines go into 10^4 logarithmic bins, block by block; a quantile is the upper edge of its bin, which is
at most 0.2 % above it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.products import product

BINS = 10_000
SMALLEST = 1e-8
TILE = 2048
GRID = 10_000


class Coherence(NamedTuple):
    """Counts of pairwise |cos| in logarithmic bins (the first holds all below SMALLEST), and the largest one."""

    counts: np.ndarray
    edges: np.ndarray
    largest: float

    @property
    def pairs(self) -> int:
        """Unordered pairs of different atoms."""
        return int(self.counts.sum())

    def quantile(self, q: np.ndarray | float) -> np.ndarray:
        """|cos| below which a share q of the pairs lies, from above, exact up to a bin."""
        if self.pairs == 0:
            return np.zeros_like(np.asarray(q, dtype=np.float64))
        total = np.cumsum(self.counts)
        rank = np.ceil(np.asarray(q, dtype=np.float64) * total[-1] - 1e-9).clip(1)
        return np.minimum(self.edges[1:][np.searchsorted(total, rank)], self.largest)


@torch.inference_mode()
def coherence(atoms: Tensor, *, tile: int = TILE) -> Coherence:
    """Of the rows of atoms `[n, d]`, in the geometry they are given in (whiten them for the AIP). Memory: one tile."""
    unit = torch.nn.functional.normalize(atoms.float(), dim=1)
    low = math.log10(SMALLEST)
    counts = np.zeros(BINS, dtype=np.int64)
    largest = 0.0
    for i in range(0, len(unit), tile):
        for j in range(i, len(unit), tile):
            size = product(unit[i : i + tile], unit[j : j + tile].T).abs().clamp_max(1.0)
            if i == j:
                k, m = torch.triu_indices(len(size), len(size), offset=1, device=size.device)
                size = size[k, m]
            if not size.numel():
                continue
            largest = max(largest, float(size.max()))
            at = (
                ((size.flatten().clamp_min(SMALLEST).log10() - low) * (BINS / -low))
                .long()
                .clamp_(0, BINS - 1)
            )
            counts += torch.bincount(at, minlength=BINS).cpu().numpy()
    return Coherence(counts, np.logspace(low, 0.0, BINS + 1), largest)


class Stability(NamedTuple):
    """q*: the sup as defined, and the first q of the grid that fails; mu and K are the quantiles at q*."""

    q_star: float
    first_failure: float
    mu: float
    k: int


def q_star(found: Coherence, l0: np.ndarray) -> Stability:
    """q* of pairwise cosines at the support sizes l0 `[rows]` of a set of rows; a row without atoms counts as one."""
    q = np.arange(1, GRID + 1) / GRID
    k = np.maximum(np.quantile(np.asarray(l0), q, method="inverted_cdf"), 1)
    mu = found.quantile(q)
    holds = mu < 1 / (2 * k - 1)
    best = int(np.flatnonzero(holds)[-1]) if holds.any() else -1
    fails = np.flatnonzero(~holds)
    first = float(q[fails[0]]) if len(fails) else 1.0
    if best < 0:
        return Stability(0.0, first, float(mu[0]), int(k[0]))
    return Stability(float(q[best]), first, float(mu[best]), int(k[best]))


def welch(n: int, d: int) -> float:
    """The least coherence that n unit vectors in d dimensions can have."""
    return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def largest_unique(mu: float) -> float:
    """The largest K whose strict bound mu < 1 / (2 K - 1) a coherence of mu allows; infinite at 0."""
    return math.inf if mu <= 0 else math.ceil((1 + 1 / mu) / 2) - 1


def random_unit(n: int, d: int, *, seed: int = 0) -> Tensor:
    """n random unit vectors `[n, d]`."""
    gen = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=gen), dim=1)


@torch.inference_mode()
def tight_frame(n: int, d: int, *, seed: int = 0, rounds: int = 200) -> Tensor:
    """n unit vectors with X^T X = (n / d) I to 1e-6 (n >= d), by alternating the two conditions from random ones."""
    x = random_unit(n, d, seed=seed).double()
    for _ in range(rounds if n >= d else 0):
        eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
        if (eigenvalues - n / d).abs().max() < 1e-6 * n / d:
            break
        x = x @ ((vectors * eigenvalues.clamp_min(1e-12).rsqrt()) @ vectors.T)
        x = torch.nn.functional.normalize(x, dim=1)
    return x.float()
