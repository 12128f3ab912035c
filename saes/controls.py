"""Controls that stand beside every SAE: PCA with as many components as it has active latents, and an untrained one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saes.codes import Codes
from saes.config import SAEConfig
from saes.initialise import initialise
from saes.sae import SAE

CONTROL_ROWS = 200_000
LEVEL_ROWS = 16_384


class PCA:
    """Projection on the `k` directions of largest variance of the train rows: the best linear code of k numbers."""

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        self.mean, self.components = mean, components
        self.name = f"pca-{len(components)}"

    def __call__(self, x: Tensor) -> tuple[Tensor, Codes | None]:
        home = x.device
        xc = x.to(self.mean.device) - self.mean
        return (self.mean + (xc @ self.components.T) @ self.components).to(home), None


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
        codes = self.sae.encode(x.to(self.sae.W_enc.device))
        return self.sae.decode(codes).to(x.device), codes


def matched_k(sae: SAE, store: Any, hook: str) -> int:
    """Active latents that the controls may use: k, or where it varies the mean L0 of up to LEVEL_ROWS held-out rows."""
    if sae.cfg.fixed_k:
        return sae.cfg.k
    total = n = 0
    for batch in store.sequential(hook, batch_size=4096, split="heldout", skip="first"):
        codes = sae.encode(batch.x[hook].to(sae.W_enc.device))
        total, n = total + int(codes.l0().sum()), n + codes.n_rows
        if n >= LEVEL_ROWS:
            break
    return min(max(1, round(total / max(n, 1))), sae.cfg.d_sae)


def untrained_dictionary(sae: SAE, store: Any, hook: str, k: int, *, seed: int = 0) -> Dictionary:
    """A TopK dictionary of the same shape that keeps k latents of random unit atoms (tied encoder, best single scale)."""
    cfg = sae.cfg
    untrained = SAE(SAEConfig(
        d_sae=cfg.d_sae, k=k, activation="abs_topk" if cfg.signed else "topk", space="raw", d_model=cfg.d_model,
        hook=cfg.hook, model=cfg.model, model_sha=cfg.model_sha, name="untrained",
    )).to(sae.W_enc.device)  # fmt: skip
    for batch in store.sequential(hook, batch_size=8192, split="train", skip="first"):
        initialise(untrained, batch.x[hook].to(sae.W_enc.device), seed=seed)
        break
    return Dictionary(untrained.requires_grad_(False), "untrained")
