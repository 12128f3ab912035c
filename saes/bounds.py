"""Upper bounds of all pre-activations from one bfloat16 product: whatever passes a threshold is found, never missed.

    u = x w + b,   x = x' + dx, w = w' + dw   with x', w' in bfloat16 and dx, dw known exactly, so (Cauchy-Schwarz)
    |u - x' w' - b| <= |dx| |w'| + |x| |dw|        about .003 |x| |w|

The bound rides in the product as four columns: [x', 1, 1, |dx|, |x|] [w', hi, lo, |w'|, |dw|]^T with hi + lo >= b - low is
positive wherever u > low, and rounding its result to bfloat16 leaves the sign alone. |dw| is widened by what sums of
d_model products in float32 can err, here and where u itself is computed. Two-sided latents: |x' w' + b| against a bound of
its own for each row, with m, the largest such margin of the row.

The k largest of a row: of groups of its latents, take the maxima of x' w' + b. k latents are at or above t, the k-th largest
maximum, so k of the true scores are at or above t - m, and what may be among the k largest has x' w' + b >= t - 2 m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saes.places import positive_places
from saes.top_products import CHUNK_BYTES, Scratch

HALF = torch.bfloat16
UP = 1 + 2.0**-7
"""bfloat16 rounds by at most 2^-8 of a number: one multiplied by this is at least itself after it."""
LARGE = 1e30
SLICE = 2**22
"""Entries that are searched at a time: few enough to stay in cache, enough for every thread."""
GROUPS = 4
"""Groups of latents for each that is kept: with so many, an eighth more than k pass the k-th largest maximum."""
EVEN = 32
"""Rows that are searched at a time are a multiple of this, so that they fill words whatever d_sae is."""


class Bounds:
    """Rows `[B, d_model]` and encoder weights in bfloat16, with what that took from them; made anew each step."""

    def __init__(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, scratch: Scratch, widen: float = 1.0
    ) -> None:
        """widen: times the proven margin; below 1 latents can be missed (audits are tested with it)."""
        self.b, self.d, self.scratch = b_enc, xc.shape[1], scratch
        self.x, self.x_norm, self.x_gap = self._cast("x16", xc)
        self.w, w_norm, w_gap = self._cast("w16", w_enc)
        self.slack = (self.d + 8) * 2.0**-23
        self.w_norm, self.w_gap = (w_norm + w_gap) * UP, w_gap * UP + self.slack * w_norm
        self.widen = widen
        self.x[:, self.d : self.d + 2] = 1
        self._x_margin = torch.stack([self.x_gap, self.x_norm], 1) * UP
        self.w[:, self.d + 2], self.w[:, self.d + 3] = self.w_norm * UP * widen, self.w_gap * UP * widen

    def _cast(self, name: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t in bfloat16 with room for four columns, the norms of its rows, and of what the cast took from them."""
        # products of a whole number of eights take less time
        out = self.scratch.get(name, (len(t), -(-(self.d + 4) // 8) * 8), HALF, t.device)
        out[:, self.d + 4 :] = 0
        norm, gap = t.new_empty(len(t)), t.new_empty(len(t))
        block = max(1, SLICE // self.d)
        for i in range(0, len(t), block):
            part, half = t[i : i + block], out[i : i + block, : self.d]
            half.copy_(part)
            back = self.scratch.get("back", tuple(part.shape), t.dtype, t.device).copy_(half)
            torch.linalg.vector_norm(part, dim=1, out=norm[i : i + block])
            torch.linalg.vector_norm(back.sub_(part), dim=1, out=gap[i : i + block])
        return out, norm, gap

    @property
    def finite(self) -> bool:
        """Rows or weights with NaN or infinity have no bound."""
        return bool((self.x_gap.sum() + self.w_gap.sum()).isfinite())

    def _shift(self, low: Tensor | float) -> None:
        """Columns hi, lo: hi + lo >= b - low, in spite of the sums' errors too."""
        size = self.b.abs() + (low.abs() if isinstance(low, Tensor) else abs(low))
        shift = (self.b - low).clamp(-LARGE, LARGE)
        hi = shift.to(HALF)
        self.w[:, self.d] = hi
        self.w[:, self.d + 1] = shift - hi.float() + (self.slack + 2.0**-14) * size.clamp_max(LARGE)

    def estimate(self, rows: Tensor, *, signed: bool) -> Tensor:
        """u (signed: |u|) of some rows in bfloat16, without a bound."""
        self._shift(0.0)
        u = self.x[rows, : self.d + 2] @ self.w[:, : self.d + 2].T
        return u.abs() if signed else u

    def above(self, low: Tensor | float, *, signed: bool, at_most: float) -> tuple[Tensor, Tensor] | None:
        """Places (row * d_sae + latent, rising) of all u > low (signed: |u| > low, one low for all), and what the product
        has there: u - low plus its margin (signed: |u|), in float32. None past `at_most` places."""
        self._shift(0.0 if signed else low)
        self.x[:, self.d + 2 : self.d + 4] = 0 if signed else self._x_margin
        bound = self._row_bounds(low) if signed else None
        d_sae, count = len(self.w), 0
        places, values = [], []
        block = max(1, CHUNK_BYTES // (d_sae * self.x.element_size()))
        step = block if self.x.is_cuda else max(EVEN, SLICE // d_sae // EVEN * EVEN)
        for i in range(0, len(self.x), block):
            x = self.x[i : i + block]
            u = self.scratch.get("u16", (len(x), d_sae), HALF, x.device)
            torch.mm(x, self.w.T, out=u)
            # of positive numbers, the bits compare as the numbers do, and as int16 several times faster
            bits = u.view(torch.int16)
            for j in range(0, len(x), step):
                part = bits[j : j + step]
                if bound is not None:
                    part.bitwise_and_(0x7FFF).sub_(bound[i + j : i + j + len(part)])
                at = positive_places(part)
                count += len(at)
                if count > at_most:
                    return None
                found = part.view(-1)[at]
                if bound is not None:
                    found += bound.view(-1)[i + j + torch.div(at, d_sae, rounding_mode="floor")]
                places.append(at + (i + j) * d_sae)
                values.append(found.view(HALF))
        if not places:
            return torch.zeros(0, dtype=torch.int64, device=self.x.device), self.b.new_zeros(0)
        return torch.cat(places), torch.cat(values).float()

    def top(self, k: int, *, signed: bool, at_most: float) -> Tensor | None:
        """Places, rising, of all that can be among the k largest (signed: in magnitude) of a row; None past `at_most`.

        None of rows whose bound is not a positive number.
        """
        self._shift(0.0)
        self.x[:, self.d + 2 : self.d + 4] = 0
        margin, d_sae, count = 2 * self._row_margin(), len(self.w), 0
        size = next(n for n in range(max(1, d_sae // (GROUPS * k)), 0, -1) if d_sae % n == 0)
        places = []
        block = max(1, CHUNK_BYTES // (d_sae * self.x.element_size()))
        step = block if self.x.is_cuda else max(EVEN, SLICE // d_sae // EVEN * EVEN)
        for i in range(0, len(self.x), block):
            x = self.x[i : i + block]
            u = self.scratch.get("u16", (len(x), d_sae), HALF, x.device)
            bits = torch.mm(x, self.w.T, out=u).view(torch.int16)
            for j in range(0, len(x), step):
                part = bits[j : j + step]
                part = part.bitwise_and_(0x7FFF) if signed else part.clamp_min_(0)
                maxima = part.view(len(part), size, -1).amax(1) if size > 1 else part
                kth = torch.topk(maxima, k, dim=1, sorted=False).values.amin(1).view(HALF).float()
                low = kth * (1 - 2.0**-8) - margin[i + j : i + j + len(part)]
                bound = torch.where(low > 0, low.to(HALF).view(torch.int16) - 1, 0x7FFF).to(torch.int16)
                at = positive_places(part.sub_(bound[:, None]))
                count += len(at)
                if count > at_most:
                    return None
                places.append(at + (i + j) * d_sae)
        return torch.cat(places)

    def _row_margin(self) -> Tensor:
        """How far any u of a row can be from the product `[B]`."""
        gap = self.x_gap * self.w_norm.max() + self.x_norm * self.w_gap.max()
        return (gap * UP + self._bias_error().max()) * self.widen

    def _row_bounds(self, low: Tensor | float) -> Tensor:
        """int16 `[B, 1]`: |u| > low has bits above it in bfloat16."""
        bound = low - self._row_margin()
        # what is above the bound may round to the bound's own bits: one less than they
        return bound.clamp_min(0.0).to(HALF).view(torch.int16)[:, None] - 1

    def _bias_error(self) -> Tensor:
        return (2 * self.slack + 2.0**-13) * self.b.abs()

    def margin(self, rows: Tensor, ids: Tensor) -> Tensor:
        """How far u can be from the product at these entries; at least the margin that the columns add."""
        gap = self.x_gap[rows] * self.w_norm[ids] + self.x_norm[rows] * self.w_gap[ids]
        return (gap * UP + self._bias_error()[ids]) * self.widen
