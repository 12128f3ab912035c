"""Which latents a row keeps when their number varies: all past a threshold, or the B*k largest of a batch.

    above_threshold   u > low (signed: |u| > low), per latent; the inference rule of every variable-L0 SAE
    batch_largest     the n largest u > 0 (signed: |u|) of all rows together: BatchTopK with n = B*k

Both work block by block on a reused buffer, so memory is a block and what is kept, never B * d_sae. `batch_largest` is
exact: a sample of rows gives a bound, candidates above it are collected, and the bound is lowered until it has let
through n of them.

`screened_above`, `screened_largest` and `screened_rows` (the k largest of each row) find the same entries with one bfloat16 product, whose error is bounded
(saes/bounds.py): what may pass is computed in float32, entry by entry. None where that would cost more than the float32
product, or where rows or weights are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saes.bounds import Bounds
from saes.places import largest_places, true_places
from saes.products import linear_into
from saes.row_dots import row_dots
from saes.top_products import CHUNK_BYTES, Scratch, top_pre_activations

DENSE_SHARE = 1 / 8
"""Where more of the latents fire, dense products are cheaper than bags."""
SAMPLE_ROWS = 64
CROWDED = 1 / 24
"""Share of all entries past which computing them one by one costs more than the float32 product."""
SCREENED_SAMPLE = 128
WIDEST = 6
"""Times k: rows with more candidates than that are ties."""
SPARE = 1 / 20
"""More than n entries are computed by this share: bfloat16 knows the n-th largest only nearly."""


class Flat(NamedTuple):
    """Kept pre-activations in row order, ids rising within a row: values `[nnz]`, int64 indices `[nnz]`, offsets `[B + 1]`."""

    values: Tensor
    indices: Tensor
    offsets: Tensor

    @property
    def rows(self) -> Tensor:
        """Row of each entry, int64 `[nnz]`."""
        return torch.arange(len(self.offsets) - 1, device=self.offsets.device).repeat_interleave(
            self.offsets.diff()
        )

    def places(self, d_sae: int) -> Tensor:
        """row * d_sae + latent of each entry, rising, int64 `[nnz]`."""
        return self.rows * d_sae + self.indices


def _blocks(
    xc: Tensor, w_enc: Tensor, b_enc: Tensor, scratch: Scratch, signed: bool, head: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, u, u or |u|) of blocks of rows; the tensors are overwritten by the next block.

    head: rows of a first block of its own, on which a caller decides whether to go on.
    """
    d_sae = len(w_enc)
    block = max(1, min(len(xc), CHUNK_BYTES // (d_sae * xc.element_size())))
    head = min(head, block, len(xc))
    starts = [*range(0, head, head or 1), *range(head, len(xc), block), len(xc)]
    for i, end in pairwise(starts):
        shape = (end - i, d_sae)
        u = scratch.get("u", shape, xc.dtype, xc.device)
        linear_into(u, xc[i:end], w_enc, b_enc)
        size = torch.abs(u, out=scratch.get("abs", shape, xc.dtype, xc.device)) if signed else u
        yield i, u, size


def _take(u: Tensor, size: Tensor, low: Tensor | float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Values of u where size > low, and their places in the flattened block."""
    mask = scratch.get("mask", tuple(u.shape), torch.bool, u.device)
    torch.gt(size, low, out=mask)
    at = true_places(mask)
    return u.view(-1)[at], at


@torch.no_grad()
def above_threshold(
    xc: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    low: Tensor,
    *,
    signed: bool = False,
    scratch: Scratch | None = None,
    dense_share: float | None = None,
) -> Flat | None:
    """All u = xc @ w_enc.T + b_enc with u > low `[d_sae]` (signed: |u| > low).

    With `dense_share` the answer is None where more than that share of the first SAMPLE_ROWS rows passes: the dense
    switch, which costs one small product.
    """
    scratch = scratch or Scratch()
    d_sae = len(w_enc)
    values, places = [], []
    head = 0 if dense_share is None else SAMPLE_ROWS
    for i, u, size in _blocks(xc, w_enc, b_enc, scratch, signed, head):
        v, at = _take(u, size, low, scratch)
        if i == 0 and dense_share is not None and len(at) > dense_share * u.numel():
            return None
        values.append(v)
        places.append(at + i * d_sae)
    return _flat(values, places, xc, d_sae)


@torch.no_grad()
def batch_largest(
    xc: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    n: int,
    *,
    signed: bool = False,
    scratch: Scratch | None = None,
    low: float | None = None,
) -> Flat:
    """The n largest u > 0 (signed: largest |u| > 0) of all rows of xc `[B, d_model]` together; fewer if fewer exist.

    low: a bound that somewhat more than n are likely to pass; without it, or where fewer do, a sample gives one.
    """
    scratch = scratch or Scratch()
    d_sae = len(w_enc)
    guessed = low is None
    while True:
        values, places = [], []
        for i, u, size in _blocks(xc, w_enc, b_enc, scratch, signed):
            if low is None:
                low = _guess(size[:SAMPLE_ROWS], n / (len(xc) * d_sae))
            v, at = _take(u, size, low, scratch)
            values.append(v)
            places.append(at + i * d_sae)
        if low is None or low <= 0 or sum(map(len, values)) >= n:
            break
        low = None if not guessed else low / 4 if low > 1e-20 else 0.0
        guessed = True
    value, place = _join(values, places, xc)
    if len(value) > n:
        best = largest_places(value.abs() if signed else value, n)
        value, place = value[best], place[best]
    return _flat([value], [place], xc, d_sae)


@torch.no_grad()
def screened_above(
    xc: Tensor, w_enc: Tensor, b_enc: Tensor, low: Tensor, *, scratch: Scratch, widen: float = 1.0
) -> Flat | None:
    """As `above_threshold` of one-sided latents, from a bfloat16 product; None: see the head of this file."""
    bounds = Bounds(xc, w_enc, b_enc, scratch, widen)
    found = bounds.above(low, signed=False, at_most=CROWDED * len(xc) * len(w_enc)) if bounds.finite else None
    if found is None:
        return None
    entries = _Entries(found[0], len(w_enc))
    value = entries.values(xc, w_enc, b_enc)
    passes = (value > low[entries.ids]).nonzero().squeeze(1)
    return entries.flat(value, passes, len(xc))


@torch.no_grad()
def screened_largest(
    xc: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    n: int,
    *,
    signed: bool = False,
    scratch: Scratch,
    low: float | None = None,
    widen: float = 1.0,
) -> Flat | None:
    """As `batch_largest`, from a bfloat16 product; None: see the head of this file, or fewer than n are positive."""
    bounds, d_sae = Bounds(xc, w_enc, b_enc, scratch, widen), len(w_enc)
    if not bounds.finite:
        return None
    sample = torch.arange(0, len(xc), max(1, len(xc) // SCREENED_SAMPLE), device=xc.device)
    for bound in (low, None):
        if bound is None:
            bound = _guess(bounds.estimate(sample, signed=signed), n / (len(xc) * d_sae))
        if bound <= 0:
            continue
        found = bounds.above(bound, signed=signed, at_most=max(4 * n, CROWDED * len(xc) * d_sae))
        if found is None or len(found[0]) < n:
            continue
        entries = _Entries(found[0], d_sae)
        for higher, some in _likely(bounds, entries, found[1], n, bound, signed):
            value = some.values(xc, w_enc, b_enc)
            size = value.abs() if signed else value
            # all that are above the bound are among these: if they are n, the n largest are here
            if int((size > higher).sum()) >= n:
                return some.flat(value, largest_places(size, n), len(xc))
    return None


def _likely(
    bounds: Bounds, entries: _Entries, product: Tensor, n: int, low: float, signed: bool
) -> Iterator[tuple[float, _Entries]]:
    """(bound, all entries above it): of far more than n first a higher bound that hardly more than n pass."""
    rank = int(n * (1 + SPARE)) + SAMPLE_ROWS
    if max(rank, 2 * n) < len(product):
        margin = bounds.margin(entries.rows, entries.ids)
        about, upper = (product, product + margin) if signed else (product + (low - margin), product + low)
        higher = max(low, torch.topk(about, rank, sorted=False).values.min().item())
        yield higher, entries.at((upper + upper.abs() * 2.0**-7 >= higher).nonzero().squeeze(1))
    yield low, entries


@torch.no_grad()
def screened_rows(
    xc: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    signed: bool,
    scratch: Scratch,
    widen: float = 1.0,
) -> tuple[Tensor, Tensor] | None:
    """As `top_pre_activations`, from a bfloat16 product; None: see the head of this file."""
    n, d_sae = len(xc), len(w_enc)
    bounds = Bounds(xc, w_enc, b_enc, scratch, widen)
    places = bounds.top(k, signed=signed, at_most=max(2 * WIDEST * k * n // 3, CROWDED * n * d_sae))
    if places is None:
        return None
    entries = _Entries(places, d_sae)
    counts = torch.bincount(entries.rows, minlength=n)
    # rows without a bound (fewer than k positive, not finite) and rows of ties are few: they are multiplied in float32
    apart = (counts < k) | (counts > WIDEST * k)
    others = apart.nonzero().squeeze(1)
    if len(others) > n * CROWDED:
        return None
    if len(others):
        entries = entries.at((~apart[entries.rows]).nonzero().squeeze(1))
    counts = counts.masked_fill(apart, 0)
    value = entries.values(xc, w_enc, b_enc)
    first = counts.cumsum(0) - counts
    slot = torch.arange(len(value), device=value.device) - first[entries.rows]
    width = max(k, int(counts.max()) if n else 0)
    size = value.new_full((n, width), -torch.inf)
    size[entries.rows, slot] = value.abs() if signed else value
    at = torch.topk(size, k, dim=1, sorted=False).indices + first[:, None]
    at = at.masked_fill(apart[:, None], 0) if len(others) else at
    values, indices = value[at], entries.ids[at]
    if len(others):
        values[others], indices[others] = top_pre_activations(xc[others], w_enc, b_enc, k, signed=signed)
    return values, indices


class _Entries:
    """Some entries of the matrix of pre-activations, in row order with ids rising within a row."""

    def __init__(self, places: Tensor, d_sae: int) -> None:
        self.places, self.d_sae = places, d_sae
        self.rows = torch.div(places, d_sae, rounding_mode="floor")
        self.ids = places - self.rows * d_sae

    def at(self, which: Tensor) -> _Entries:
        return _Entries(self.places[which], self.d_sae)

    def values(self, xc: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Pre-activations in float32; they differ from those of a matrix product in the order of summation alone."""
        return row_dots(xc, w_enc, self.ids, _offsets(self.rows, len(xc))) + b_enc[self.ids]

    def flat(self, values: Tensor, which: Tensor, n_rows: int) -> Flat:
        """What is kept of them."""
        return Flat(values[which], self.ids[which], _offsets(self.rows[which], n_rows))


def _guess(size: Tensor, share: float) -> float:
    """A bound that about twice `share` of the entries of `size` pass; 0 where that is not a positive number."""
    count = int(2 * share * size.numel()) + 8
    if count >= size.numel():
        return 0.0
    return max(0.0, torch.topk(size.reshape(-1), count, sorted=False).values.min().item())


def _join(values: list[Tensor], places: list[Tensor], xc: Tensor) -> tuple[Tensor, Tensor]:
    if not values:
        return xc.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=xc.device)
    return torch.cat(values), torch.cat(places)


def _flat(values: list[Tensor], places: list[Tensor], xc: Tensor, d_sae: int) -> Flat:
    value, place = _join(values, places, xc)
    rows = torch.div(place, d_sae, rounding_mode="floor")
    return Flat(value, place - rows * d_sae, _offsets(rows, len(xc)))


def _offsets(rows: Tensor, n_rows: int) -> Tensor:
    """Where each row's entries start int64 `[n_rows + 1]`, from the row of each entry, which rises."""
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=offsets[1:])
    return offsets


@torch.no_grad()
def threshold_for(xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool) -> float:
    """The one threshold at which xc `[N, d_model]` has a mean L0 of k, midway between the N*k-th value and the next."""
    n = len(xc) * k
    size = batch_largest(xc, w_enc, b_enc, n + 1, signed=signed).values.abs()
    return torch.topk(size, 2, largest=False).values.mean().item() if len(size) > n else 0.0
