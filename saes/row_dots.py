"""Some entries of a product g w^T, one dot product each: what the gradient of a stored value is.

Three ways, all exact, none with an `[nnz, d]` gather of everything: torch's sampled matrix product on a CPU, which takes a
half to nine tenths of the time of the second; the private aten op behind embedding_bag's own backward, elsewhere; a
gather in chunks, where this torch has neither.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from saes.top_products import CHUNK_BYTES


def row_dots(g: Tensor, w: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """`g[row of entry] . w[indices[entry]]` for g `[B, d]`, w `[F, d]`, in the shape of `indices`.

    indices int64 `[B, k]`, or flat `[nnz]` with offsets int64 `[B + 1]`.
    """
    if indices.numel() == 0:
        return g.new_zeros(indices.shape)
    if (
        g.device.type == "cpu"
        and g.dtype == w.dtype
        and g.dtype in (torch.float32, torch.float64)
        and has_sampled()
    ):
        return by_sampled(g, w, indices, offsets)
    if private_op() is not None:
        return by_private_op(g, w, indices, offsets)
    return by_gather(g, w, indices, offsets)


def bags(indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Start of each row's entries int64 `[B]`, and the row of each entry int64 `[nnz]`."""
    if offsets is not None:
        rows = torch.arange(len(offsets) - 1, device=indices.device)
        return offsets[:-1], rows.repeat_interleave(offsets.diff(), output_size=indices.numel())
    n, k = indices.shape
    starts = torch.arange(0, n * k, k, device=indices.device) if k else indices.new_zeros(n)
    return starts, torch.arange(n, device=indices.device).repeat_interleave(k)


def by_sampled(g: Tensor, w: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """`torch.sparse.sampled_addmm` on the CSR pattern of the entries, whose ids need not rise."""
    if offsets is None:
        n, k = indices.shape
        offsets = torch.arange(0, n * k + 1, k, device=indices.device)
    ids = indices.reshape(-1)
    pattern = torch.sparse_csr_tensor(
        offsets, ids, g.new_zeros(len(ids)), (len(g), len(w)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, g, w.T, beta=0.0).values().view(indices.shape)


def by_private_op(g: Tensor, w: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    op = private_op()
    assert op is not None
    starts, bag_of = bags(indices, offsets)
    return op(g.contiguous(), w, indices.reshape(-1), starts, bag_of, 0, -1).view(indices.shape)


def by_gather(g: Tensor, w: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    flat, rows = indices.reshape(-1), bags(indices, offsets)[1]
    out = g.new_empty(flat.shape)
    block = max(1, CHUNK_BYTES // max(1, g.shape[1] * g.element_size()))
    for i in range(0, len(flat), block):
        at = slice(i, i + block)
        out[at] = torch.einsum("nd,nd->n", g[rows[at]], w[flat[at]])
    return out.view(indices.shape)


def private_op() -> torch._ops.OpOverloadPacket | None:
    return getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)


@lru_cache
def has_sampled() -> bool:
    """Whether this torch has the sampled product for CPUs; its note that CSR tensors are in beta comes here, once, and is
    dropped."""
    g, at = torch.ones(2, 3), torch.tensor([1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(by_sampled(g, g, at, torch.tensor([0, 0, 1])).item() == 3.0)
        except (RuntimeError, NotImplementedError):
            return False
