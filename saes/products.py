"""Matrix products of SAEs: float32 by the faster library of this machine (cache/products.py), or bfloat16 where allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache import products
from cache.products import onednn_linear, onednn_wins

COLUMNS, ROWS = 1024, 1024
"""Latents of a block of columns, about: 2,048 rows of it in float32 are 8 MB and stay in cache. Rows that oneDNN is given at
once: 4 MB of output, which the allocator keeps, where 8 MB go back to the system each time."""


def linear_into(out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`out = x @ w.T + b` for x `[B, d]`, w `[F, d]`, b `[F]`, out `[B, F]`. Not differentiable."""
    if not onednn_wins(x, w):
        return torch.addmm(b, x, w.T, out=out)
    # oneDNN returns a new tensor: in blocks that stay in cache the copy costs little, and out keeps its pages
    for i in range(0, len(w), COLUMNS):
        at = slice(i, i + COLUMNS)
        for j in range(0, len(x), ROWS):
            out[j : j + ROWS, at].copy_(onednn_linear(x[j : j + ROWS], w[at], b[at]))
    return out


def product(a: Tensor, b: Tensor, *, half: bool = False) -> Tensor:
    """`a @ b`, of any strides; half: of the factors in bfloat16, as `a`'s dtype. Not differentiable."""
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if half else products.product(a, b)


class _Encode(torch.autograd.Function):
    """(x, W_enc, b_enc) -> x @ W_enc.T + b_enc."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, half: bool) -> Tensor:  # type: ignore[override]
        ctx.half = half
        ctx.save_for_backward(x, w)
        if half:
            return product(x, w.T, half=True).add_(b)
        return linear_into(x.new_empty(len(x), len(w)), x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        g_x = product(g, w, half=ctx.half) if ctx.needs_input_grad[0] else None
        g_w = product(g.T, x, half=ctx.half) if ctx.needs_input_grad[1] else None
        return g_x, g_w, g.sum(0) if ctx.needs_input_grad[2] else None, None


class _Decode(torch.autograd.Function):
    """(z, W_dec) -> z @ W_dec."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, half: bool) -> Tensor:  # type: ignore[override]
        ctx.half = half
        ctx.save_for_backward(z, w)
        return product(z, w, half=half)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, w = ctx.saved_tensors
        g_z = product(g, w.T, half=ctx.half) if ctx.needs_input_grad[0] else None
        return g_z, product(z.T, g, half=ctx.half) if ctx.needs_input_grad[1] else None, None


def encode_dense(x: Tensor, w_enc: Tensor, b_enc: Tensor, *, half: bool = False) -> Tensor:
    """All pre-activations `[B, d_sae]`, differentiable; half: all three products of the pass in bfloat16."""
    return _Encode.apply(x, w_enc, b_enc, half)


def decode_dense(z: Tensor, w_dec: Tensor, *, half: bool = False) -> Tensor:
    """`z @ W_dec` for dense z `[B, d_sae]`, differentiable; half as in `encode_dense`."""
    return _Decode.apply(z, w_dec, half)
