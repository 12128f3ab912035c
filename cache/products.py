"""float32 products on a CPU by oneDNN where it is faster than torch's own choice.

`torch.matmul` of float32 goes to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which torch has
too, uses AVX-512 there and takes half the time. `onednn_gains` asks the machine once a process. Both are float32
throughout and differ in the last bits. Elsewhere (GPU, float64, a torch without oneDNN) products stay torch's own.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache

import torch
from torch import Tensor

GAIN = 0.8
"""oneDNN is taken where it needs less than this share of torch's time: .5 on AMD with AVX-512, about 1 elsewhere."""
# what oneDNN and torch's layer over it keep of each shape they have met, several MB apiece: of a few shapes, not of 1,024
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

MIN_ROWS, MIN_WEIGHTS = 8, 2**16
"""Smaller products are not worth the microseconds that oneDNN takes to begin."""


def onednn_wins(x: Tensor, w: Tensor) -> bool:
    """Whether `onednn_linear` is the way to make x @ w.T for x `[..., K]` and w `[N, K]`."""
    return (
        x.dtype == torch.float32 == w.dtype
        and x.device.type == "cpu" == w.device.type
        and x.shape[-1] == w.shape[1]
        and w.numel() >= MIN_WEIGHTS
        and x.numel() >= MIN_ROWS * w.shape[1]
        and onednn_gains()
    )


def onednn_linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w.T + b for x `[..., K]`, w `[N, K]`, b `[N]` of any strides; a new tensor, not differentiable."""
    # the op reads b as if it were dense
    return torch.ops.mkldnn._linear_pointwise(x, w, None if b is None else b.contiguous(), "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices of any strides; differentiable, then by torch."""
    differentiable = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if differentiable or not onednn_wins(a, b.T):
        return a @ b
    if a.stride(0) == 1 and a.shape[0] > 1 and b.stride(1) == 1:
        # a is a transposed view: its transpose in the place of the weights is the faster of the two ways
        return onednn_linear(b.T, a).T.contiguous()
    return onednn_linear(a, b.T)


@lru_cache
def onednn_gains() -> bool:
    """Whether oneDNN multiplies float32 faster than torch's default on this processor: best of 4 interleaved pairs."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    best = [float("inf"), float("inf")]
    # whatever the first caller has switched on: the answer is kept
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, w, b = (
            torch.ones(s, dtype=torch.float32, device="cpu") for s in ((1024, 512), (4096, 512), (4096,))
        )
        for _ in range(4):
            for i, run in enumerate((lambda: onednn_linear(x, w, b), lambda: torch.addmm(b, x, w.T))):
                start = time.perf_counter()
                run()
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] < GAIN * best[1]
