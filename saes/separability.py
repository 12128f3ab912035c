"""The separability penalty: atoms closer than unique K-sparse codes allow are pushed apart (arXiv 2509.20784).

    penalty = mean over pairs (i, nearest of i) of relu(|cos(d_i, d_j)| - 1 / (2 K - 1))^2

Codes with K atoms are unique, and found by l1, where the coherence of the atoms is below 1 / (2 K - 1). K is k, or the mean
L0 of the batch. Only the closest pairs can break the bound, so each atom is held against its nearest one; the pairs are
looked up again every `dead_refresh_steps`, in blocks of rows. Cosines are those of the space of training: the AIP's in
`aip` space. The paper states the bound; the penalty is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cache.products import product

BLOCK = 1024


@torch.no_grad()
def nearest_atoms(w_dec: Tensor) -> Tensor:
    """int64 `[d_sae]`: for each row of w_dec the other row with the largest |cosine|."""
    unit = torch.nn.functional.normalize(w_dec, dim=1)
    out = []
    for i in range(0, len(unit), BLOCK):
        size = product(unit[i : i + BLOCK], unit.T).abs()
        mine = torch.arange(len(size), device=size.device)
        size[mine, mine + i] = -1.0
        out.append(size.argmax(1))
    return torch.cat(out)


def separability(w_dec: Tensor, nearest: Tensor, k: Tensor | float) -> Tensor:
    """The penalty, differentiable in w_dec `[d_sae, d_model]`; k is the mean L0, at least 1."""
    k = torch.as_tensor(k, dtype=w_dec.dtype, device=w_dec.device).detach().clamp_min(1.0)
    cos = torch.nn.functional.cosine_similarity(w_dec, w_dec.index_select(0, nearest), dim=1)
    return ((cos.abs() - 1 / (2 * k - 1)).relu() ** 2).mean()
