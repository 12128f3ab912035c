"""What the weights alone say: norms, cos(encoder row, decoder row), and how near the nearest other row is.

max_cos[i] = max over j != i of cos(w_i, w_j), |cos| where latents are signed: near 1 means duplicates. Computed in
blocks; past SAMPLE latents a fixed random sample of rows is held against all rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cache.products import product
from saes.sae import SAE

BLOCK = 1024
SAMPLE = 16_384


@torch.inference_mode()
def weight_statistics(sae: SAE, *, sample: int = SAMPLE, seed: int = 0) -> dict[str, np.ndarray]:
    """Per latent: enc_norm, dec_norm, b_enc, cos_enc_dec; and max_dec_cos, max_enc_cos of (a sample of) them."""
    w_enc, w_dec = sae.W_enc.detach().float(), sae.W_dec.detach().float()
    rows = torch.arange(len(w_dec))
    if len(rows) > sample:
        rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:sample].sort().values
    out = {
        "enc_norm": torch.linalg.vector_norm(w_enc, dim=1),
        "dec_norm": torch.linalg.vector_norm(w_dec, dim=1),
        "b_enc": sae.b_enc.detach().float(),
        "max_dec_cos": max_cosine(w_dec, rows.to(w_dec.device), signed=sae.cfg.signed),
        "max_enc_cos": max_cosine(w_enc, rows.to(w_enc.device), signed=sae.cfg.signed),
    }
    if not sae.cfg.transcoder:
        # a transcoder's two sides live in different spaces
        out["cos_enc_dec"] = torch.nn.functional.cosine_similarity(w_enc, w_dec, dim=1)
    return {name: value.double().cpu().numpy() for name, value in out.items()}


def max_cosine(w: Tensor, rows: Tensor, *, signed: bool) -> Tensor:
    """Largest cosine (|cosine| if signed) of each of `rows` with any other row of w `[n, d]`."""
    unit = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-12)
    out = []
    for part in rows.split(BLOCK):
        cos = product(unit[part], unit.T)
        cos = cos.abs() if signed else cos
        cos[torch.arange(len(part), device=cos.device), part] = -1.0
        out.append(cos.max(dim=1).values)
    return torch.cat(out)


def weight_values(sae: SAE) -> list[tuple[str, float, int]]:
    """(metric, value, latents) of an evaluation: the mean of each statistic, and the 95 % quantile of the nearest rows."""
    rows = []
    for name, values in weight_statistics(sae).items():
        rows.append((name, float(values.mean()), len(values)))
        if name.startswith("max_"):
            rows.append((f"{name}_p95", float(np.quantile(values, 0.95)), len(values)))
    return rows
