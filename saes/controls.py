"""Controls that stand beside every SAE: PCA with as many components as it has active latents, and an untrained one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saes.codes import Codes
from saes.config import SAEConfig
from saes.initialise import geometric_median, initialise, ridged
from saes.sae import SAE, fold_transcoder

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


def fit_pca(store: Any, hook: str, k: int, *, batch_size: int = 8192, skip: str | None = "first") -> PCA:
    """PCA of up to CONTROL_ROWS train rows, covariance in float64."""
    d, n = store.d(hook), 0
    total, outer = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for batch in store.sequential(hook, batch_size=batch_size, split="train", skip=skip):
        x = batch.x[hook].double()
        total += x.sum(0)
        outer += x.T @ x
        n += len(x)
        if n >= CONTROL_ROWS:
            break
    mean = total / n
    _, vectors = torch.linalg.eigh(outer / n - torch.outer(mean, mean))
    return PCA(mean.float(), vectors[:, -k:].T.flip(0).float().contiguous())


def paired_rows(
    store: Any, hook: str, target: str, *, batch_size: int, split: str | None, skip: str | None = "first"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x, y, row ids) in row order: rows of `hook` and of `target` of the same tokens, which may be the same hook."""
    options: dict[str, Any] = {"batch_size": batch_size, "split": split, "skip": skip}
    first = store.sequential(hook, **options)
    second = store.sequential(target, **options) if target != hook else None
    for batch in first:
        y = batch.x[hook] if second is None else next(second).x[target]
        yield batch.x[hook], y, batch.row


class Linear:
    """x -> y through k numbers: `(x - mean_x) @ down @ up + mean_y`."""

    def __init__(self, mean_x: Tensor, mean_y: Tensor, down: Tensor, up: Tensor) -> None:
        self.mean_x, self.mean_y, self.down, self.up = mean_x, mean_y, down, up
        self.name = f"linear-{down.shape[1]}"

    def __call__(self, x: Tensor) -> tuple[Tensor, Codes | None]:
        xc = x.to(self.mean_x.device) - self.mean_x
        return (xc @ self.down @ self.up + self.mean_y).to(x.device), None


def fit_reduced_rank(
    store: Any, hook: str, target: str, k: int, *, batch_size: int = 8192, skip: str | None = "first"
) -> Linear:
    """Reduced-rank regression of y on x from up to CONTROL_ROWS train rows: least squares, then the k directions in
    which its predictions vary most (Izenman 1975), in float64. Only sums of products are kept."""
    wide, tall, n = store.d(hook), store.d(target), 0
    mean_x, mean_y = torch.zeros(wide, dtype=torch.float64), torch.zeros(tall, dtype=torch.float64)
    xx, xy = mean_x.new_zeros(wide, wide), mean_x.new_zeros(wide, tall)
    pairs = paired_rows(store, hook, target, batch_size=batch_size, split="train", skip=skip)
    for rows, wanted, _ in pairs:
        x, y = rows.double(), wanted.double()
        mean_x += x.sum(0)
        mean_y += y.sum(0)
        xx += x.T @ x
        xy += x.T @ y
        n += len(x)
        if n >= CONTROL_ROWS:
            break
    mean_x, mean_y = mean_x / n, mean_y / n
    xx, xy = xx - n * torch.outer(mean_x, mean_x), xy - n * torch.outer(mean_x, mean_y)
    whole = torch.linalg.solve(ridged(xx, 1e-6), xy)
    _, vectors = torch.linalg.eigh(whole.T @ xx @ whole)
    best = vectors[:, -k:]
    return Linear(mean_x.float(), mean_y.float(), (whole @ best).float(), best.T.float().contiguous())


class Dictionary:
    """An SAE as a reconstruction: x -> (x_hat, codes)."""

    def __init__(self, sae: SAE, name: str) -> None:
        self.sae, self.name = sae, name

    def __call__(self, x: Tensor) -> tuple[Tensor, Codes | None]:
        codes = self.sae.encode(x.to(self.sae.W_enc.device))
        return self.sae.decode(codes).to(x.device), codes


def matched_k(sae: SAE, store: Any, hook: str, skip: str | None = "first") -> int:
    """Active latents that the controls may use: k, or where it varies the mean L0 of up to LEVEL_ROWS held-out rows."""
    if sae.cfg.fixed_k:
        return sae.cfg.k
    total = n = 0
    for batch in store.sequential(hook, batch_size=4096, split="heldout", skip=skip):
        codes = sae.encode(batch.x[hook].to(sae.W_enc.device))
        total, n = total + int(codes.l0().sum()), n + codes.n_rows
        if n >= LEVEL_ROWS:
            break
    return min(max(1, round(total / max(n, 1))), sae.cfg.d_sae)


def untrained_dictionary(
    sae: SAE, store: Any, hook: str, k: int, *, seed: int = 1, skip: str | None = "first"
) -> Dictionary:
    """A TopK dictionary of the same shape that keeps k latents of random unit atoms (tied encoder, best single scale).

    Beside a TopK SAE it differs from the control `initial` in the draw of the atoms alone, hence another seed.
    """
    cfg = sae.cfg
    untrained = SAE(SAEConfig(
        d_sae=cfg.d_sae, k=k, activation="abs_topk" if cfg.signed else "topk", space="raw", d_model=cfg.d_model,
        hook=cfg.hook, model=cfg.model, model_sha=cfg.model_sha, name="untrained", out_hook=cfg.out_hook, d_out=cfg.d_out,
        encoder_init="scaled",
    )).to(sae.W_enc.device)  # fmt: skip
    target = cfg.out_hook if cfg.transcoder else hook
    for x, y, _ in paired_rows(store, hook, target, batch_size=8192, split="train", skip=skip):
        x, y = x.to(sae.W_enc.device), y.to(sae.W_enc.device)
        if not cfg.transcoder:
            initialise(untrained, x, seed=seed)
        else:
            centre = geometric_median(x)
            initialise(untrained, x - centre, seed=seed, target=y)
            fold_transcoder(untrained, 1.0, 1.0, centre)
        break
    return Dictionary(untrained.requires_grad_(False), "untrained")
