"""Initial weights (Gao et al. 2024): tied random unit directions, b_dec at the geometric median, one encoder scale.

The scale is that of the best first reconstruction (theirs) or, by default where the largest k are kept, a quarter of it:
Adam moves every weight by about the learning rate, so rows a quarter as long turn four times as fast.

A transcoder has no tied start: decoder row i is the direction in which the least-squares map M from input to target
sends encoder row i, d_i = w_i M / ||w_i M||. With the input as target M is the identity, and that is the tied start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saes.kernels import decode_rows
from saes.sae import SAE
from saes.top_products import top_pre_activations

MEDIAN_ROWS = 8192
QUARTER = 0.25


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Point `[d]` with the least summed distance to the rows of x `[N, d]` (Weiszfeld, float64).

    Distances are kept above 1e-12 of the spread: without it the iteration divides by zero on a data point.
    """
    x = x.double()
    m = x.mean(0)
    floor = (x - m).norm(dim=1).mean() * 1e-12 + 1e-300
    for _ in range(iterations):
        w = 1 / (x - m).norm(dim=1).clamp_min(floor)
        new = (w[:, None] * x).sum(0) / w.sum()
        if (new - m).norm() <= tolerance * floor / 1e-12:
            return new.float()
        m = new
    return m.float()


def linear_map(x: Tensor, y: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """M `[d_in, d_out]` with the least sum ||y - x M||^2 on centred rows, plus ridge times the mean eigenvalue (float64)."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return torch.linalg.solve(ridged(x.T @ x, ridge), x.T @ y).float()


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """Gram matrix plus ridge times its mean eigenvalue."""
    return gram + (ridge * gram.diagonal().mean() + 1e-300) * torch.eye(len(gram)).to(gram)


@torch.no_grad()
def initialise(sae: SAE, x: Tensor, *, seed: int, target: Tensor | None = None) -> None:
    """Fill the SAE's tensors in place from a sample x `[N, d_model]` in the space of training.

    target: of a transcoder, what the rows should give, `[N, d_out]`; x is centred already.
    """
    gen = torch.Generator().manual_seed(seed)
    directions = torch.randn(sae.cfg.d_sae, sae.cfg.d_model, generator=gen)
    directions /= directions.norm(dim=1, keepdim=True)
    if target is None:
        target = x
        sae.W_dec.copy_(directions)
    else:
        sent = directions.to(x.device) @ linear_map(x, target)
        sae.W_dec.copy_(sent / sent.norm(dim=1, keepdim=True).clamp_min(1e-12))
    sae.b_enc.zero_()
    sae.b_dec.copy_(geometric_median(target[:MEDIAN_ROWS]))
    sae.W_enc.copy_(directions)
    if sae.cfg.encoder_init == "tied":
        return
    # one factor on the encoder: the one whose first reconstruction has the best scale in least squares, or a share of it
    xc, wanted = x[:1024] - sae.centre, target[:1024] - sae.b_dec
    guess = _first_reconstruction(sae, xc)
    size = (guess**2).sum()
    quarter = sae.cfg.encoder_init == "quarter" or (sae.cfg.encoder_init == "auto" and sae.cfg.has_k)
    share = QUARTER if quarter else 1.0
    if size > 0:
        sae.W_enc.mul_(share * ((guess * wanted).sum() / size).clamp_min(1e-3))


def _first_reconstruction(sae: SAE, xc: Tensor) -> Tensor:
    """Of centred rows, with a zero threshold where there is one: half the latents fire."""
    cfg = sae.cfg
    if not cfg.has_k:
        return (xc @ sae.W_enc.T).relu() @ sae.W_dec
    values, ids = top_pre_activations(xc, sae.W_enc, sae.b_enc, cfg.k, signed=cfg.signed)
    return decode_rows(values if cfg.signed else values.relu(), ids, sae.W_dec)
