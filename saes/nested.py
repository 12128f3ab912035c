"""Squared error of nested reconstructions, and its gradient, in one pass that stays in cache.

    r_g = b_dec + sum_{h <= g} part_h - y     error = sum_b sum_g w_g |r_g|^2     d error / d part_h = 2 sum_{g >= h} w_g r_g

part_h `[B, d_out]` is what the latents between two prefixes reconstruct (Matryoshka, arXiv 2503.17547; w_g = 1 / G), or the
k largest latents and those between k and 4 k (Multi-TopK, arXiv 2406.04093; w = 1, 1/8). As plain autograd this is a dozen passes over
`[B, G, d_out]`, each into fresh pages: more than the rest of the step where the dictionary is small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saes.top_products import Scratch

BLOCK_BYTES = 2**20


class Nested(NamedTuple):
    """parts `[B, G, d_out]` of G nested reconstructions, without b_dec `[d_out]`; both differentiable."""

    parts: Tensor
    b_dec: Tensor
    scratch: Scratch
    weights: tuple[float, ...]

    @property
    def prefixes(self) -> Tensor:
        """The nested reconstructions `[B, G, d_out]`, the whole one last."""
        return self.parts.cumsum(1) + self.b_dec

    def error(self, y: Tensor) -> Tensor:
        """Weighted sum of the squared errors of all rows and prefixes against y `[B, d_out]`, a scalar."""
        return _Error.apply(self.parts, self.b_dec, y, self.scratch, self.weights)


class _Error(torch.autograd.Function):
    """Its gradient is made on the way, in a buffer that stays, so a graph can be walked back once."""

    @staticmethod
    def forward(
        ctx: Any, parts: Tensor, b_dec: Tensor, y: Tensor, scratch: Scratch, weights: tuple[float, ...]
    ) -> Tensor:  # type: ignore[override]
        n, groups, d = parts.shape
        after = scratch.get("nested", (n, groups, d), parts.dtype, parts.device)
        rows = n if parts.is_cuda else max(1, BLOCK_BYTES // (groups * d * parts.element_size()))
        total = parts.new_zeros(())
        for i in range(0, n, rows):
            part, out = parts[i : i + rows], after[i : i + rows]
            r = b_dec - y[i : i + rows]
            for g in range(groups):
                torch.add(r, part[:, g], out=r)
                total += weights[g] * torch.linalg.vector_norm(r) ** 2
                torch.mul(r, weights[g], out=out[:, g])
            for g in range(groups - 2, -1, -1):
                out[:, g] += out[:, g + 1]
        ctx.after, ctx.version = after, after._version
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.after is None or ctx.after._version != ctx.version:
            raise RuntimeError(
                "the gradient of nested errors can be asked for once, before the next error: compute it again"
            )
        g_parts, ctx.after = ctx.after.mul_(2 * g), None
        rows = g_parts[:, 0]
        return g_parts, rows.sum(0), -rows if ctx.needs_input_grad[2] else None, None, None
