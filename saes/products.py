"""Matrix products of SAEs: float32 by the faster library of this machine, or in bfloat16 where the caller allows it.

On a CPU `torch.matmul` of float32 goes to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which torch
has too, uses AVX-512 there and takes half the time. `onednn_gains` asks the machine once a process; both are float32
throughout and differ in the last bits. Elsewhere (GPU, float64, a torch without oneDNN) the products are torch's own.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

GAIN = 0.8
"""oneDNN is taken where it needs less than this share of torch's time: .5 on AMD with AVX-512, about 1 elsewhere."""
COLUMNS = 1024
"""Outputs of a block, about: 2,048 rows of it in float32 are 8 MB and stay in cache."""


def linear_into(out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`out = x @ w.T + b` for x `[B, d]`, w `[F, d]`, b `[F]`, out `[B, F]`. Not differentiable."""
    if not _by_onednn(x, w):
        return torch.addmm(b, x, w.T, out=out)
    # oneDNN returns a new tensor: in blocks that stay in cache the copy costs little, and out keeps its pages
    for i in range(0, len(w), COLUMNS):
        at = slice(i, i + COLUMNS)
        out[:, at].copy_(torch.ops.mkldnn._linear_pointwise(x, w[at], b[at], "none", [], ""))
    return out


def product(a: Tensor, b: Tensor, *, half: bool = False) -> Tensor:
    """`a @ b`, of any strides; half: of the factors in bfloat16, as `a`'s dtype. Not differentiable."""
    if half:
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)
    if not _by_onednn(a, b):
        return a @ b
    if a.stride(0) == 1 and a.shape[0] > 1 and b.stride(1) == 1:
        # a is a transposed view: its transpose in the place of the weights is the faster of the two ways
        return torch.ops.mkldnn._linear_pointwise(b.T, a, None, "none", [], "").T.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


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


def _by_onednn(*tensors: Tensor) -> bool:
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in tensors)
    return plain and onednn_gains()


@lru_cache
def onednn_gains() -> bool:
    """Whether oneDNN multiplies float32 faster than torch's default on this processor: best of 4 interleaved pairs."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, w, b = torch.ones(1024, 512), torch.ones(4096, 512), torch.zeros(4096)
    best = [float("inf"), float("inf")]
    for _ in range(4):
        for i, run in enumerate(
            (
                lambda: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""),
                lambda: torch.addmm(b, x, w.T),
            )
        ):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] < GAIN * best[1]
