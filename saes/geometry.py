"""What the decoder alone says of a feature: direct effect on the next token, nearest features, a 2-D map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.products import product

LOGIT_TOKENS = 15
NEIGHBOURS = 20
BLOCK = 512


@torch.inference_mode()
def logit_lens(w_dec: Tensor, model: Any) -> dict[str, np.ndarray] | None:
    """Tokens that each decoder row raises and lowers most: ids and centred logits `[d_sae, 15]`, or None without a model.

    The direct path only: the row through the final norm's gain and the unembedding, minus the mean over the
    vocabulary (a softmax does not see it). Attention and MLPs after the hook are left out.
    """
    if model is None:
        return None
    parts: dict[str, list[Tensor]] = {
        k: [] for k in ("logit_top_tok", "logit_top", "logit_bottom_tok", "logit_bottom")
    }
    for i in range(0, len(w_dec), BLOCK):
        logits = model.logit_lens(w_dec[i : i + BLOCK].to(model.device)).float()
        logits -= logits.mean(1, keepdim=True)
        for side, largest in (("top", True), ("bottom", False)):
            best = torch.topk(logits, min(LOGIT_TOKENS, logits.shape[1]), dim=1, largest=largest)
            parts[f"logit_{side}"].append(best.values.cpu())
            parts[f"logit_{side}_tok"].append(best.indices.cpu())
    return {k: torch.cat(v).numpy() for k, v in parts.items()}


@torch.inference_mode()
def neighbours(w_dec: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(feature, other, cos) of the NEIGHBOURS features with the largest |cosine| of decoder rows, antipodes included."""
    unit = w_dec / w_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = min(NEIGHBOURS, len(unit) - 1)
    ids, cosines = [], []
    for i in range(0, len(unit), BLOCK):
        cos = product(unit[i : i + BLOCK], unit.T)
        mine = torch.arange(len(cos), device=cos.device)
        size = cos.abs()
        size[mine, mine + i] = -1.0
        best = size.topk(n, dim=1).indices
        ids.append(best.cpu())
        cosines.append(cos.gather(1, best).cpu())
    feature = np.repeat(np.arange(len(unit), dtype=np.int32), n)
    return feature, torch.cat(ids).flatten().int().numpy(), torch.cat(cosines).flatten().numpy()


@torch.inference_mode()
def feature_map(w_dec: Tensor) -> np.ndarray:
    """First two principal components of the unit decoder rows, float32 `[d_sae, 2]`; signs fixed by the largest entry."""
    unit = w_dec / w_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    centred = (unit - unit.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -2:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return (centred @ axes).float().cpu().numpy()
