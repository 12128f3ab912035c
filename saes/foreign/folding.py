"""Fold what an SAE does to its input into its weights, so that it takes plain rows x like every SAE here.

    apply_b_dec_to_input = False   u = x W + b  =  (x - b_dec) W + (b + b_dec W)
    rows times s in training       W_enc * s, W_dec / s, b_dec / s            codes stay those of the scaled rows
    selection by u ||d||           W_enc, b_enc * ||d||, W_dec / ||d||        codes u ||d||
    centred rows x - mean(x)       W_enc less its mean over d_model, b_enc as the first line

All are exact. Tensors go by their names in memory, W_enc and W_dec `[d_sae, d_model]`; gated has b_mag and r_mag too.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def fold_input_bias(t: Tensors) -> None:
    """For an encoder that does not subtract b_dec."""
    _shift(t, t["W_enc"] @ t["b_dec"])


def fold_input_factor(t: Tensors, factor: float) -> None:
    """For an SAE trained on `factor * x`."""
    t["W_enc"] = t["W_enc"] * factor
    t["W_dec"] = t["W_dec"] / factor
    t["b_dec"] = t["b_dec"] / factor


def fold_decoder_norms(t: Tensors) -> None:
    """Unit decoder rows; pre-activations, thresholds and codes times the old norms. A zero row stays as it is."""
    norm = t["W_dec"].norm(dim=1)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    t["W_dec"] = t["W_dec"] / norm[:, None]
    t["W_enc"] = t["W_enc"] * norm[:, None]
    for name in ("b_enc", "b_mag", "threshold"):
        if name in t:
            t[name] = t[name] * norm


def fold_centring(t: Tensors) -> None:
    """For an SAE trained on rows less their mean over d_model. Folding twice changes nothing."""
    before = t["W_enc"]
    t["W_enc"] = before - before.mean(dim=1, keepdim=True)
    # (x - mean(x) - b_dec) W = (x - b_dec) W' + b_dec (W' - W)
    _shift(t, (t["W_enc"] - before) @ t["b_dec"])


def _shift(t: Tensors, by: Tensor) -> None:
    t["b_enc"] = t["b_enc"] + by
    if "b_mag" in t:
        # the magnitude is e^r (u - b_enc) + b_mag: what b_enc gained is taken away there
        t["b_mag"] = t["b_mag"] + t["r_mag"].exp() * by
