"""The objective axis: what a step minimises. Terms are weights of SAEConfig that default to 0.

    loss = [ mean_b ||x_hat - x||^2 + l1 mean_b ||z||_1 + mean_b ||x_gate - x||^2 ] / V
         + auxk s sum ||e_hat - e||^2 / sum ||e - e_mean||^2 + l0 (L0 | (L0 / l0_target - 1)^2),   e = x - x_hat (detached)

Squared errors are summed over d_model. V is a fixed variance of the rows, so the first term is an FVU, and auxk and l0 are
relative to it; l1 is in the units of the papers (rows of norm sqrt(d_model) in `scalar` space). Decoder rows are unit, so
the L1 norm weighted by decoder norms is the plain one. gated: z is the gate max(pi, 0) in the L1 term, and x_gate its
reconstruction through a frozen decoder. matryoshka: the first term is the mean over the nested prefixes and the whole
(arXiv 2503.17547 sums them). multi_topk: it gains that weight times the squared error with 4 k latents. s = min(1, n_dead / k_aux). l1 and l0 warm up linearly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saes.config import SAEConfig
from saes.kernels import Dead, StepOutput


class Terms(NamedTuple):
    """loss: scalar to differentiate. Detached: squared error of each row `[B]`, AuxK term, L1 or L0 of the mean row."""

    loss: Tensor
    errors: Tensor
    auxk: Tensor
    sparsity: Tensor


def loss_terms(
    cfg: SAEConfig, x: Tensor, out: StepOutput, dead: Dead | None, variance: float, warm: float
) -> Terms:
    """Loss of a forward pass whose wanted output is x `[B, d_model]`: the input, or a transcoder's target.

    warm is the share of l1 or l0 that counts.
    """
    error = out.x_hat - x
    errors = (error**2).sum(1)
    fit = errors.sum()
    if out.nested is not None:
        fit = out.nested.error(x)
    if out.gate is not None:
        fit = fit + ((out.gate - x) ** 2).sum()
    loss = fit / (len(x) * variance)
    zero = errors.new_zeros(())
    sparsity = zero if out.sparsity is None else out.sparsity
    if cfg.l1:
        loss = loss + warm * cfg.l1 / variance * sparsity
    if cfg.l0:
        excess = sparsity if not cfg.l0_target else (sparsity / cfg.l0_target - 1) ** 2
        loss = loss + warm * cfg.l0 * excess
    aux = zero if dead is None else _auxk(cfg, error, out.e_hat, dead)
    return Terms(loss + cfg.auxk * aux, errors.detach(), aux.detach(), sparsity.detach())


def _auxk(cfg: SAEConfig, error: Tensor, e_hat: Tensor, dead: Dead) -> Tensor:
    """How badly the dead latents reconstruct what the others left over, relative to its variance."""
    e = -error.detach()
    with torch.no_grad():
        spread = ((e - e.mean(0)) ** 2).sum().clamp_min(1e-30)
    share = min(1.0, len(dead.ids) / cfg.aux_width())
    return share * ((e_hat - e) ** 2).sum() / spread
