"""How the cost of a training step grows with the width of the dictionary and of the model, beside two bounds.

    flops  2 B d F (encoder) + 8 B k d (decode, three gradients) + 2 d F (b_dec) + 10 B n d (AuxK on n dead latents),
           at the rate of the float32 product that the step uses (saes/products.py), measured in the same round
    bytes  28 for each of the 2 d F parameters (fused Adam reads p, g, m, v and writes p, m, v), 8 for each (gradient written,
           decoder projected and renormalised), and 2 * 4 B F of pre-activations (written, selected from), at the
           rate of a copy between two large buffers, both directions counted

Both are bounds of their own part: a step does one after the other, so it cannot be faster than the larger one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from saes.products import linear_into

WIDTHS = ((576, 4096), (576, 8192), (576, 16_384), (576, 32_768), (576, 65_536), (576, 131_072))
MODELS = ((256, 16_384), (1024, 16_384), (2304, 16_384))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 256 MB; best of 5."""
    a, b = torch.zeros(2**26), torch.ones(2**26)
    best = min(_timed(lambda: b.copy_(a)) for _ in range(5))
    return 2 * a.numel() * 4 / best


def _timed(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _rounds(trainer: Any, x: torch.Tensor, rounds: int) -> list[list[float]]:
    """Seconds of `torch.addmm` of the encoder, of that product as the step makes it, and of the step, in turns; the first
    round warms up."""
    w, b = trainer.sae.W_enc.detach(), trainer.sae.b_enc.detach()
    out = x.new_empty(len(x), len(w))
    runs = (
        lambda: torch.addmm(b, x, w.T),
        lambda: linear_into(out, x, w, b),
        lambda: trainer.step(x, 0),
    )
    times = [[_timed(run) for run in runs] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*times[1:], strict=True)]


def growth(
    make: Callable[[torch.Tensor, int], Any], batch: int, k: int, dead_share: float, rounds: int
) -> list[dict]:
    """A row a size; `make(rows, d_sae)` gives a trainer without screening."""
    rate, table = copy_rate(), []
    print(f"copy {rate / 1e9:.1f} GB/s; times in ms, batch {batch}, k {k}, float32", flush=True)
    print(
        f"{'d_model':>8}{'d_sae':>9}{'GEMM':>9}{'product':>9}{'step':>9}{'ratio':>7}{'flops':>9}{'bytes':>9}",
        flush=True,
    )
    for d, f in (*WIDTHS, *MODELS):
        x = torch.randn(batch * 2, d, generator=torch.Generator().manual_seed(0))
        trainer = make(x, f)
        gemm, product, step = _rounds(trainer, x[:batch], rounds)
        flops = 2 * batch * d * f + 8 * batch * k * d + 2 * d * f + 10 * batch * int(dead_share * f) * d
        bound = flops * statistics.median(product) / (2 * batch * d * f)
        moved = (36 * 2 * d * f + 8 * batch * f) / rate
        row = {
            "d_model": d, "d_sae": f, "gemm_ms": round(statistics.median(gemm) * 1e3, 1),
            "product_ms": round(statistics.median(product) * 1e3, 1),
            "step_ms": round(statistics.median(step) * 1e3, 1),
            "step_over_gemm": round(statistics.median(b / a for a, b in zip(gemm, step, strict=True)), 3),
            "flop_bound_ms": round(bound * 1e3, 1), "byte_bound_ms": round(moved * 1e3, 1),
        }  # fmt: skip
        print(f"{d:>8}{f:>9}{row['gemm_ms']:>9}{row['product_ms']:>9}{row['step_ms']:>9}{row['step_over_gemm']:>7}"
              f"{row['flop_bound_ms']:>9}{row['byte_bound_ms']:>9}", flush=True)  # fmt: skip
        table.append(row)
        del trainer
    return table
