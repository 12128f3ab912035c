"""Controls that stand beside every SAE: PCA with as many components as it has active latents, and a random dictionary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saes.codes import Codes
from saes.initialise import initialise
from saes.sae import SAE

CONTROL_ROWS = 200_000


class PCA:
    """Projection on the `k` directions of largest variance of the train rows: the best linear code of k numbers."""

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        self.mean, self.components = mean, components
        self.name = f"pca-{len(components)}"

    def __call__(self, x: Tensor) -> tuple[Tensor, Codes | None]:
        xc = x - self.mean
        return self.mean + (xc @ self.components.T) @ self.components, None


def fit_pca(store: Any, hook: str, k: int, *, batch_size: int = 8192) -> PCA:
    """PCA of up to CONTROL_ROWS train rows, covariance in float64."""
    d, n = store.d(hook), 0
    total, outer = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for batch in store.sequential(hook, batch_size=batch_size, split="train", skip="first"):
        x = batch.x[hook].double()
        total += x.sum(0)
        outer += x.T @ x
        n += len(x)
        if n >= CONTROL_ROWS:
            break
    mean = total / n
    _, vectors = torch.linalg.eigh(outer / n - torch.outer(mean, mean))
    return PCA(mean.float(), vectors[:, -k:].T.flip(0).float().contiguous())


class Dictionary:
    """An SAE as a reconstruction: x -> (x_hat, codes)."""

    def __init__(self, sae: SAE, name: str) -> None:
        self.sae, self.name = sae, name

    def __call__(self, x: Tensor) -> tuple[Tensor, Codes | None]:
        codes = self.sae.encode(x)
        return self.sae.decode(codes), codes


def random_dictionary(sae: SAE, store: Any, hook: str, *, seed: int = 0) -> Dictionary:
    """The same architecture with random unit atoms (tied encoder, best single scale): an SAE before training."""
    random = SAE(replace(sae.cfg, space="raw", name="random"))
    for batch in store.sequential(hook, batch_size=8192, split="train", skip="first"):
        initialise(random, batch.x[hook], seed=seed)
        break
    return Dictionary(random.requires_grad_(False), "random")
