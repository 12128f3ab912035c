"""The k largest pre-activations of each row: the encoder product and the search, one block at a time.

    u = xc W_enc^T + b_enc        kept: the k largest of each row (signed: in magnitude)

On a CPU the product is made in blocks of about COLUMNS latents whose output is still in cache when the maxima of its groups
are taken (saes/row_topk.py: only the k groups of largest maximum can hold one of the k largest); u is read once more at the
members of these groups alone. Elsewhere, and where groups gain nothing, the product is made in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from saes.products import COLUMNS, linear_into
from saes.row_topk import PER_GROUP, gains, largest, largest_by_groups

CHUNK_BYTES = 128 * 2**20
"""Pre-activations are made in blocks of rows of this size; each block packs the weights again."""


class Scratch:
    """Reusable buffers: a fresh 100 MB allocation a step costs more in page faults than its arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        old = self._buffers.get(name)
        if old is None or old.numel() < size or old.dtype != dtype or old.device != device:
            old = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return old[:size].view(shape)


class Also:
    """Latents (rising ids int64 `[n]`) whose pre-activations `[B, n]` a selection keeps where it has them anyway."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.values: Tensor | None = None

    def keep(self, u: Tensor, first: int, rows: int) -> None:
        """From u `[b, d_sae]` of the rows from `first` on, of `rows` in all."""
        if self.values is None:
            self.values = u.new_empty(rows, len(self.ids))
        torch.index_select(u, 1, self.ids, out=self.values[first : first + len(u)])

    def keep_columns(self, u: Tensor, first: int, rows: int, column: int) -> None:
        """From u `[b, width]` of the latents from `column` on."""
        if self.values is None:
            self.values = u.new_empty(rows, len(self.ids))
        edges = torch.tensor([column, column + u.shape[1]])
        a, b = torch.searchsorted(self.ids, edges).tolist()
        if b > a:
            # gather uses all threads, index_select of columns one
            here = u.gather(1, (self.ids[a:b] - column).expand(len(u), b - a))
            self.values[first : first + len(u), a:b] = here


def top_pre_activations(
    xc: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    signed: bool,
    scratch: Scratch | None = None,
    also: Also | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and ids `[B, k]` of the k largest (signed: largest in magnitude) of `xc @ w_enc.T + b_enc`, in no order.

    xc `[B, d_model]` is already centred. Works block by block, so memory is CHUNK_BYTES, not B * d_sae.
    """
    scratch = scratch or Scratch()
    rows, d_sae = xc.shape[0], w_enc.shape[0]
    block = max(1, min(rows, CHUNK_BYTES // (d_sae * xc.element_size())))
    values = xc.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int64, device=xc.device)
    width = 0 if xc.is_cuda or not gains(d_sae, k) else column_width(d_sae)
    for i in range(0, rows, block):
        part, at = xc[i : i + block], slice(i, i + block)
        if width:
            blocks, maxima = _product_by_columns(part, w_enc, b_enc, width, signed, scratch, also, i, rows)
            values[at], indices[at] = largest_by_groups(blocks, maxima, k, signed=signed)
            continue
        u = scratch.get("u", (len(part), d_sae), xc.dtype, xc.device)
        linear_into(u, part, w_enc, b_enc)
        if also is not None:
            also.keep(u, i, rows)
        if signed:
            size = torch.abs(u, out=scratch.get("abs", (len(part), d_sae), xc.dtype, xc.device))
            ids = largest(size, k)[1]
            values[at], indices[at] = u.gather(1, ids), ids
        else:
            values[at], indices[at] = largest(u, k)
    return values, indices


def column_width(d_sae: int) -> int:
    """Latents of a block of columns: a divisor of d_sae near COLUMNS that groups divide; 0 where there is none."""
    near = [n for n in _divisors(d_sae) if COLUMNS // 2 <= n <= COLUMNS * 2 and n % PER_GROUP == 0]
    return min(near, key=lambda n: abs(n - COLUMNS), default=0)


def _divisors(n: int) -> Iterator[int]:
    return (i for i in range(1, min(n, COLUMNS * 2) + 1) if n % i == 0)


def _product_by_columns(
    part: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    width: int,
    signed: bool,
    scratch: Scratch,
    also: Also | None,
    first: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """u `[blocks, b, width]` of some rows, and the maxima of its groups `[b, d_sae / PER_GROUP]` (signed: of |u|)."""
    n, groups = len(w_enc) // width, width // PER_GROUP
    u = scratch.get("u", (n, len(part), width), part.dtype, part.device)
    maxima = scratch.get("maxima", (len(part), n * groups), part.dtype, part.device)
    for i in range(n):
        columns = slice(i * width, (i + 1) * width)
        linear_into(u[i], part, w_enc[columns], b_enc[columns])
        size = u[i]
        if signed:
            size = torch.abs(u[i], out=scratch.get("abs", (len(part), width), part.dtype, part.device))
        torch.amax(size.view(len(part), PER_GROUP, groups), 1, out=maxima[:, i * groups : (i + 1) * groups])
        if also is not None:
            also.keep_columns(u[i], first, rows, i * width)
    return u, maxima
