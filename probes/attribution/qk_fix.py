"""QK fix: the effect of a changed query or key through the softmax itself, linear only after it.

s are the logits as the softmax sees them (after 1/√d, soft-cap, QK-norm, RoPE and mask), p = softmax(s) of the clean run,
g_ij = ∂L/∂p_ij = (∂L/∂z_i)·v_j. A query changes its whole row, a key t changes column t of every row by δ_it:

    I_Q(i) = Σ_j (softmax(s')_ij − p_ij) g_ij
    I_K(t) = Σ_i r_it (g_it − ḡ_i∖t),   r = σ(logit(p) + δ) − p,   ḡ_i∖t = Σ_{j≠t} p_ij g_ij / (1 − p_it)

I_K is exact in O(T²): the other keys of a row keep their ratios. logit(p) and ḡ without t come from the scores by leaving
the largest key of a row out, so nothing is lost where p is within 1e-40 of 1; δ is not clamped. (arXiv 2403.00745 §3.1.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention on a batch: q, k as the scores see them, v, and what the noise run has for q and k."""

    q: Tensor
    """[B, T, H, d]"""
    k: Tensor
    """[B, T, KV, d]"""
    v: Tensor
    """[B, T, KV, d]"""
    q_noise: Tensor
    k_noise: Tensor
    mask: Tensor
    """bool [1 or B, 1, T, T], true where a query sees a key."""
    scale: float
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.q.shape[2] // self.k.shape[2]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits [B, H, T, T] before the mask, in float32 or better."""
        k = k.repeat_interleave(self.group, dim=2)
        work = torch.promote_types(q.dtype, torch.float32)
        s = torch.einsum("bihd,bjhd->bhij", q.to(work), k.to(work)) * self.scale
        return s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)

    def clean_scores(self) -> Tensor:
        return self.scores(self.q, self.k)

    def pattern(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.mask, -torch.inf).softmax(-1)

    def output(self) -> Tensor:
        """Head outputs [B, T, H, d] of the clean run, to compare with the model's own."""
        v = self.v.repeat_interleave(self.group, dim=2)
        p = self.pattern(self.clean_scores())
        return torch.einsum("bhij,bjhd->bihd", p, v.to(p.dtype))


def pattern_gradient(attention: Attention, grad_z: Tensor) -> Tensor:
    """∂L/∂pattern [R, B, H, T, T] of gradients [R, B, T, H, d] at the head outputs; 0 outside the mask."""
    v = attention.v.repeat_interleave(attention.group, dim=2)
    work = torch.promote_types(grad_z.dtype, torch.float32)
    g = torch.einsum("rbihd,bjhd->rbhij", grad_z.to(work), v.to(work))
    return g.masked_fill(~attention.mask, 0.0)


def query_effects(attention: Attention, g: Tensor) -> Tensor:
    """I_Q [R, B, T, H] for gradients g [R, B, H, T, T]."""
    clean = attention.pattern(attention.clean_scores())
    moved = attention.pattern(attention.scores(attention.q_noise, attention.k))
    centred = g - (clean * g).sum(-1, keepdim=True)
    return ((moved - clean) * centred).sum(-1).transpose(-1, -2)


def key_effects(attention: Attention, g: Tensor) -> Tensor:
    """I_K [R, B, T, KV], each summed over the query heads of its group."""
    s, mask = attention.clean_scores(), attention.mask
    delta = attention.scores(attention.q, attention.k_noise) - s
    without, r, top, p = _column_change(s, delta, mask)
    g = g - (p * g).sum(-1, keepdim=True)
    share = torch.where(top, torch.zeros_like(p), p)
    # Of all but the largest key 1 − p is at least a half; the largest is left out of the softmax instead.
    rest = torch.where(top, (without * g).sum(-1, keepdim=True), -share * g / (1 - share))
    effect = (r * (g - rest)).sum(-2)
    return effect.unflatten(-2, (-1, attention.group)).sum(-2).transpose(-1, -2)


def _column_change(s: Tensor, delta: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax without the largest key, r = σ(logit(p) + δ) − p of every key, where the largest is, and p."""
    masked = s.masked_fill(~mask, -torch.inf)
    p = masked.softmax(-1)
    top = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, masked.argmax(-1, keepdim=True), True)
    others = masked.masked_fill(top, -torch.inf)
    without = others.softmax(-1).nan_to_num(0.0)
    logp = masked - masked.logsumexp(-1, keepdim=True)
    small = torch.where(top | ~mask, torch.full_like(p, 0.5), p)
    logit = torch.where(top, s - others.logsumexp(-1, keepdim=True), logp - torch.log1p(-small))
    return without, _sigmoid_step(logit, delta).masked_fill(~mask, 0.0), top, p


def _sigmoid_step(a: Tensor, delta: Tensor) -> Tensor:
    """σ(a + δ) − σ(a) without cancellation or overflow: σ(x) − σ(y) = σ(x) σ(−y) (1 − e^(y − x))."""
    up = torch.exp(logsigmoid(a + delta) + logsigmoid(-a)) * -torch.expm1(-delta.clamp(min=0))
    down = torch.exp(logsigmoid(a) + logsigmoid(-a - delta)) * torch.expm1(delta.clamp(max=0))
    return torch.where(delta >= 0, up, down)
