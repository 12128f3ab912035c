"""Sparse SAE kernels in plain torch: selection, decoding and every gradient, without a dense `[B, d_sae]` backward.

    u = (x - b_dec) W_enc^T + b_enc        z = TopK(u) (ReLU), or AbsTopK(u) (k largest |u|, signed)
    x_hat = sum_j z_j W_dec[i_j] + b_dec

One autograd Function computes the step. Its backward sorts the B*k latent ids once and then takes both weight
gradients as embedding bags with *latents as bags and rows as members*: one write per latent, no atomics, no
`[B*k, d_model]` scratch. The gradient of b_dec uses sum(g) - grad_b_enc @ W_enc, so nothing of width d_sae is
multiplied out. Exact: tests/test_kernels.py checks each term against a dense reference in float64.
The AuxK reconstruction (Gao et al. 2024) runs on the compact sub-matrix of dead latents and reaches the encoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 64 * 2**20
"""Pre-activations are made in blocks of rows of about this size: they stay in cache for the selection."""


class Selection(NamedTuple):
    """k kept pre-activations of each row: values `[B, k]` (ReLU applied unless signed), indices int64 `[B, k]`."""

    values: Tensor
    indices: Tensor


class Scratch:
    """Reusable buffers: a fresh 100 MB allocation a step costs more in page faults than its arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = 1
        for s in shape:
            size *= s
        old = self._buffers.get(name)
        if old is None or old.numel() < size or old.dtype != dtype or old.device != device:
            old = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return old[:size].view(shape)


def top_pre_activations(
    xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Values and ids `[B, k]` of the k largest (signed: largest in magnitude) of `xc @ w_enc.T + b_enc`.

    xc `[B, d_model]` is already centred. Works block by block, so memory is CHUNK_BYTES, not B * d_sae.
    """
    scratch = scratch or Scratch()
    rows, d_sae = xc.shape[0], w_enc.shape[0]
    block = max(1, min(rows, CHUNK_BYTES // (d_sae * xc.element_size())))
    values = xc.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int64, device=xc.device)
    for i in range(0, rows, block):
        part = xc[i : i + block]
        u = scratch.get("u", (len(part), d_sae), xc.dtype, xc.device)
        torch.addmm(b_enc, part, w_enc.T, out=u)
        if signed:
            size = torch.abs(u, out=scratch.get("abs", (len(part), d_sae), xc.dtype, xc.device))
            ids = torch.topk(size, k, dim=1, sorted=False).indices
            indices[i : i + block] = ids
            values[i : i + block] = u.gather(1, ids)
        else:
            top = torch.topk(u, k, dim=1, sorted=False)
            values[i : i + block] = top.values
            indices[i : i + block] = top.indices
    return values, indices


def row_dots(g: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    """`out[b, j] = g[b] . w[indices[b, j]]` for g `[B, d]`, w `[F, d]`, indices int64 `[B, k]`; no `[B, k, d]` gather.

    Uses the private aten op behind embedding_bag's own backward; where this torch lacks it, a chunked gather.
    """
    rows, k = indices.shape
    op = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    if op is None or rows == 0:
        return _row_dots_by_gather(g, w, indices)
    offsets = torch.arange(0, rows * k, k, device=g.device)
    bag_of = torch.arange(rows, device=g.device).repeat_interleave(k)
    return op(g.contiguous(), w, indices.reshape(-1), offsets, bag_of, 0, -1).view(rows, k)


def _row_dots_by_gather(g: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    out = g.new_empty(indices.shape)
    block = max(1, CHUNK_BYTES // max(1, indices.shape[1] * g.shape[1] * g.element_size()))
    for i in range(0, len(g), block):
        part = indices[i : i + block]
        out[i : i + block] = torch.einsum("bd,bkd->bk", g[i : i + block], w[part])
    return out


def decode_rows(values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
    """`sum_j values[b, j] w_dec[indices[b, j]]`, `[B, d_model]`."""
    return F.embedding_bag(indices.int(), w_dec, per_sample_weights=values.to(w_dec.dtype), mode="sum")


class LatentBags:
    """The transpose of a code: for each latent, the rows on which it was selected. Sorted once, used twice."""

    def __init__(self, indices: Tensor, d_sae: int) -> None:
        k = indices.shape[1]
        flat = indices.reshape(-1)
        key = flat.to(torch.int16) if d_sae <= 2**15 else flat.to(torch.int32)
        self.order = torch.sort(key, stable=True).indices
        counts = torch.bincount(flat, minlength=d_sae)
        # int32 ids and offsets take the vectorised CPU path of embedding_bag, 5 times the int64 one
        self.offsets = (counts.cumsum(0) - counts).int()
        self.rows = torch.div(self.order, k, rounding_mode="floor").int()

    def weighted_sum(self, weights: Tensor, rows: Tensor) -> Tensor:
        """`out[f] = sum over (b, j) with indices[b, j] = f of weights[b, j] * rows[b]`, `[d_sae, d]`."""
        sorted_weights = weights.reshape(-1)[self.order]
        return F.embedding_bag(self.rows, rows, self.offsets, per_sample_weights=sorted_weights, mode="sum")


class Dead(NamedTuple):
    """Dead latents offered to AuxK: their ids int64 `[n]`, and how many may be used on a row."""

    ids: Tensor
    k_aux: int


class _SparseStep(torch.autograd.Function):
    """(x, W_enc, b_enc, W_dec, b_dec) -> (x_hat, values, indices, e_hat); see the head of the file."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        w_dec: Tensor,
        b_dec: Tensor,
        k: int,
        signed: bool,
        dead: Dead | None,
        select: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        xc = x - b_dec
        values, indices = select(xc, w_enc, b_enc, k, signed=signed)
        if not signed:
            values = values.relu_()
        x_hat = decode_rows(values, indices, w_dec).add_(b_dec)
        aux: tuple[Tensor, ...] = ()
        e_hat = x.new_zeros(0)
        if dead is not None:
            u = torch.addmm(b_enc[dead.ids], xc, w_enc[dead.ids].T)
            z = keep_largest(u, dead.k_aux, signed=signed)
            e_hat = z @ w_dec[dead.ids]
            aux = (dead.ids, z)
        ctx.save_for_backward(xc, w_enc, w_dec, values, indices, *aux)
        ctx.signed = signed
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return x_hat, values, indices, e_hat

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g_out: Tensor | None, g_values: Tensor | None, _: Any, g_aux: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        xc, w_enc, w_dec, values, indices, *aux = ctx.saved_tensors
        g_u = torch.zeros_like(values) if g_out is None else row_dots(g_out, w_dec, indices)
        if g_values is not None:
            g_u = g_u + g_values
        if not ctx.signed:
            # a selected latent with u <= 0 did not fire: ReLU has no gradient there
            g_u = g_u * (values > 0)
        bags = LatentBags(indices, len(w_enc))
        g_w_enc = bags.weighted_sum(g_u, xc)
        g_b_enc = torch.zeros_like(w_enc[:, 0]).index_add_(0, indices.reshape(-1), g_u.reshape(-1))
        g_w_dec = torch.zeros_like(w_dec) if g_out is None else bags.weighted_sum(values, g_out.contiguous())
        g_x = decode_rows(g_u, indices, w_enc) if ctx.needs_input_grad[0] else None
        if aux and g_aux is not None:
            ids, z = aux
            g_z = (g_aux @ w_dec[ids].T).mul_(z != 0)
            g_w_dec.index_add_(0, ids, z.T @ g_aux)
            g_w_enc.index_add_(0, ids, g_z.T @ xc)
            g_b_enc.index_add_(0, ids, g_z.sum(0))
            if g_x is not None:
                g_x += g_z @ w_enc[ids]
        g_b_dec = -(g_b_enc @ w_enc)
        if g_out is not None:
            g_b_dec += g_out.sum(0)
        return g_x, g_w_enc, g_b_enc, g_w_dec, g_b_dec, None, None, None, None


def keep_largest(u: Tensor, k: int, *, signed: bool) -> Tensor:
    """`u` with all but the k largest (signed: in magnitude) of each row set to 0. No ReLU: dead latents must learn."""
    if k >= u.shape[1]:
        return u
    ids = torch.topk(u.abs() if signed else u, k, dim=1, sorted=False).indices
    return torch.zeros_like(u).scatter_(1, ids, u.gather(1, ids))


class StepOutput(NamedTuple):
    """x_hat `[B, d_model]`, values and int64 indices `[B, k]`, e_hat `[B, d_model]` (empty without dead latents)."""

    x_hat: Tensor
    values: Tensor
    indices: Tensor
    e_hat: Tensor


def sparse_step(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    *,
    k: int,
    signed: bool = False,
    dead: Dead | None = None,
    select: Any = top_pre_activations,
) -> StepOutput:
    """Encode, select, decode and (with `dead`) reconstruct from dead latents; differentiable in all five tensors.

    x `[B, d_model]`; w_enc, w_dec `[d_sae, d_model]` (a row per latent); b_enc `[d_sae]`; b_dec `[d_model]`.
    `select` finds the k latents of each row: `top_pre_activations`, or a `screening.Screen`.
    """
    return StepOutput(*_SparseStep.apply(x, w_enc, b_enc, w_dec, b_dec, k, signed, dead, select))
