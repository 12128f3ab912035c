"""The control `initial`: the SAE itself before its first step, so that a figure shows what training has added.

Architecture and rule of the trained SAE, weights as training starts from (saes/initialise.py: random unit directions,
encoder tied to them, b_dec at the geometric median of the rows), with the encoder at the scale that fits the rows best even
where training starts below it: a control should be as good as it can be. Thresholds too: jumprelu's in standard
deviations of the first pre-activations, the one of batch_* where the mean L0 is k; relu and gated start with half of
their latents active. `untrained` beside it has the L0 of the trained SAE instead, whatever the architecture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saes.activations import unit_rows
from saes.controls import Dictionary, paired_rows
from saes.initialise import geometric_median, initialise
from saes.metrics import RowSums, l1_norms
from saes.sae import SAE, fold_transcoder
from saes.selection import threshold_for

SAMPLE_ROWS = 8192
LEVEL_ROWS = 4096
BLOCK_VALUES = 2**23


class Initial(Dictionary):
    """x -> (x_hat, sums of the codes), in blocks of rows: half of the latents may fire."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:  # codes are sums here
        parts = []
        for rows in x.to(self.sae.W_enc.device).split(max(1, BLOCK_VALUES // self.sae.cfg.d_sae)):
            codes = self.sae.encode(rows)
            parts.append((self.sae.decode(codes), codes.l0(), l1_norms(codes)))
        x_hat, n, size = (torch.cat(column) for column in zip(*parts, strict=True))
        return x_hat.to(x.device), RowSums(n, size)


@torch.no_grad()
def initial_sae(sae: SAE, store: Any, hook: str, *, seed: int = 0, skip: str | None = "first") -> Initial:
    """The SAE of `sae.cfg` as training would start it on the first train rows of `store` (raw, as saved SAEs are)."""
    cfg = replace(
        sae.cfg, name="initial", encoder_init="tied" if sae.cfg.encoder_init == "tied" else "scaled"
    )
    fresh = SAE(cfg).to(sae.W_enc.device)
    target = cfg.out_hook if cfg.transcoder else hook
    x, y, _ = next(paired_rows(store, hook, target, batch_size=SAMPLE_ROWS, split="train", skip=skip))
    x, y = x.to(fresh.W_enc.device), y.to(fresh.W_enc.device)
    seen = x
    if cfg.transcoder:
        centre = geometric_median(x)
        initialise(fresh, x - centre, seed=seed, target=y)
        fold_transcoder(fresh, 1.0, 1.0, centre)
    elif cfg.space == "unit":
        centre = geometric_median(x)
        seen = unit_rows(x - centre)[0]
        initialise(fresh, seen, seed=seed)
        fresh.b_dec.copy_(centre)
    else:
        initialise(fresh, x, seed=seed)
    xc = seen if cfg.space == "unit" else seen - fresh.centre
    if cfg.activation == "jumprelu":
        spread = (xc[:1024] @ fresh.W_enc.T + fresh.b_enc).std()
        fresh.threshold.fill_(cfg.threshold_init * spread.item())
    elif cfg.has_threshold:
        fresh.threshold.fill_(
            threshold_for(xc[:LEVEL_ROWS], fresh.W_enc, fresh.b_enc, cfg.k, signed=cfg.signed)
        )
    return Initial(fresh.requires_grad_(False), "initial")


__all__ = ["Initial", "initial_sae"]
