"""Which latents a row keeps when their number varies: all past a threshold, or the B*k largest of a batch.

    above_threshold   u > low (signed: |u| > low), per latent; the inference rule of every variable-L0 SAE
    batch_largest     the n largest u > 0 (signed: |u|) of all rows together: BatchTopK with n = B*k

Both work block by block on a reused buffer, so memory is a block and what is kept, never B * d_sae. `batch_largest` is
exact: a sample of rows gives a bound, candidates above it are collected, and the bound is lowered until it has let
through n of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saes import kernels
from saes.products import linear_into
from saes.top_products import Scratch

DENSE_SHARE = 1 / 8
"""Where more of the latents fire, dense products are cheaper than bags."""
SAMPLE_ROWS = 64


class Flat(NamedTuple):
    """Kept pre-activations in row order, ids rising within a row: values `[nnz]`, int64 indices `[nnz]`, offsets `[B + 1]`."""

    values: Tensor
    indices: Tensor
    offsets: Tensor


def _blocks(
    xc: Tensor, w_enc: Tensor, b_enc: Tensor, scratch: Scratch, signed: bool, head: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, u, u or |u|) of blocks of rows; the tensors are overwritten by the next block.

    head: rows of a first block of its own, on which a caller decides whether to go on.
    """
    d_sae = len(w_enc)
    block = max(1, min(len(xc), kernels.CHUNK_BYTES // (d_sae * xc.element_size())))
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
    at = mask.view(-1).nonzero().squeeze(1)
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
    xc: Tensor, w_enc: Tensor, b_enc: Tensor, n: int, *, signed: bool = False, scratch: Scratch | None = None
) -> Flat:
    """The n largest u > 0 (signed: largest |u| > 0) of all rows of xc `[B, d_model]` together; fewer if fewer exist."""
    scratch = scratch or Scratch()
    d_sae = len(w_enc)
    low: float | None = None
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
        low = low / 4 if low > 1e-20 else 0.0
    value, place = _join(values, places, xc)
    if len(value) > n:
        best = torch.topk(value.abs() if signed else value, n, sorted=False).indices.sort().values
        value, place = value[best], place[best]
    return _flat([value], [place], xc, d_sae)


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
    offsets = torch.zeros(len(xc) + 1, dtype=torch.int64, device=xc.device)
    torch.cumsum(torch.bincount(rows, minlength=len(xc)), 0, out=offsets[1:])
    return Flat(value, place - rows * d_sae, offsets)


@torch.no_grad()
def threshold_for(xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool) -> float:
    """The one threshold at which xc `[N, d_model]` has a mean L0 of k, midway between the N*k-th value and the next."""
    n = len(xc) * k
    size = batch_largest(xc, w_enc, b_enc, n + 1, signed=signed).values.abs()
    return torch.topk(size, 2, largest=False).values.mean().item() if len(size) > n else 0.0
