"""Sparse SAE kernels in plain torch: selection, decoding and every gradient, without a dense `[B, d_sae]` backward.

    u = (x - b_dec) W_enc^T + b_enc        z = act(u), kept on a support: k latents a row, or as many as fire
    x_hat = sum_j z_j W_dec[i_j] + b_dec

A step is `encode_at` and `decode_from` with the activation between them as plain autograd on the stored values. Their
backward sorts the latent ids once (`Support`) and then takes both weight gradients as embedding bags with *latents as
bags and rows as members*: one write per latent, no atomics, no `[B*k, d_model]` scratch. The gradient of b_dec uses
sum(g) - grad_b_enc @ W_enc, so nothing of width d_sae is multiplied out. Exact: tests/test_kernels.py checks each term
against a dense reference in float64. AuxK (Gao et al. 2024) runs on the dead latents alone and reaches the encoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saes.gradients import GradientBuffers, SlicedSums
from saes.nested import Nested
from saes.products import product
from saes.row_dots import bags, row_dots
from saes.row_topk import keep_largest
from saes.top_products import Also, top_pre_activations


def decode_rows(values: Tensor, indices: Tensor, w_dec: Tensor, offsets: Tensor | None = None) -> Tensor:
    """`sum_j values[b, j] w_dec[indices[b, j]]`, `[B, d_model]`; flat with offsets int64 `[B + 1]`."""
    weights = values.to(w_dec.dtype)
    if offsets is None:
        return F.embedding_bag(indices.int(), w_dec, per_sample_weights=weights, mode="sum")
    # int32 ids and offsets take the vectorised CPU path of embedding_bag, 5 times the int64 one
    return F.embedding_bag(indices.int(), w_dec, offsets[:-1].int(), per_sample_weights=weights, mode="sum")


class Support:
    """Which latents are stored for which row: ids int64 `[B, k]`, or flat `[nnz]` in row order with offsets `[B + 1]`.

    Its transpose (for each latent, the entries that name it) is sorted once, on first use, and used by both weight
    gradients. With `into`, these go to the trainer's buffers, the decoder's without its radial part, and not to autograd.
    """

    def __init__(
        self,
        indices: Tensor,
        d_sae: int,
        offsets: Tensor | None = None,
        into: GradientBuffers | None = None,
    ) -> None:
        self.indices, self.d_sae, self.offsets, self.into = indices, d_sae, offsets, into
        self._order: Tensor | None = None
        self._starts: Tensor | None = None
        self._whole: Support | None = None

    @property
    def n_rows(self) -> int:
        return len(self.indices) if self.offsets is None else len(self.offsets) - 1

    @property
    def ids(self) -> Tensor:
        """Latent of each entry, int64 `[nnz]`."""
        return self.indices.reshape(-1)

    def rows(self) -> Tensor:
        """Row of each entry, int64 `[nnz]`."""
        return bags(self.indices, self.offsets)[1]

    def split(self, widths: tuple[int, ...]) -> Support:
        """The same entries with `len(widths)` rows for each row: one for the ids below each width and not the last.

        Ids must rise within a row. The transpose is shared: only the rows that entries belong to change.
        """
        edges = torch.tensor(widths, device=self.ids.device)
        part = self.rows() * len(widths) + torch.bucketize(self.ids, edges, right=True)
        return self.runs(torch.bincount(part, minlength=self.n_rows * len(widths)))

    def runs(self, counts: Tensor) -> Support:
        """The same entries in runs of `counts` int64 `[rows * parts]`: several rows for each row. The transpose is shared."""
        out = Support(self.ids, self.d_sae, F.pad(counts.cumsum(0), (1, 0)), self.into)
        out._whole = self
        return out

    def by_latent(self) -> tuple[Tensor, Tensor]:
        """Entries sorted by latent, int64 `[nnz]`, and where each latent starts, int32 `[d_sae]`."""
        if self._whole is not None:
            return self._whole.by_latent()
        if self._order is None or self._starts is None:
            flat = self.ids
            key = flat.to(torch.int16) if self.d_sae <= 2**15 else flat.to(torch.int32)
            self._order = torch.sort(key, stable=True).indices
            counts = torch.bincount(flat, minlength=self.d_sae)
            self._starts = (counts.cumsum(0) - counts).int()
        return self._order, self._starts

    def sums_by_latent(self, weights: Tensor, x: Tensor) -> SlicedSums:
        """`out[f] = sum over entries of latent f of weight * x[row of the entry]`, `[d_sae, d]`, to be made as asked for."""
        order, starts = self.by_latent()
        if self.offsets is None:
            members = torch.div(order, self.indices.shape[1], rounding_mode="floor").int()
        else:
            members = self.rows().int()[order]
        return SlicedSums(members, weights.reshape(-1)[order], starts, x)


class Dead(NamedTuple):
    """Dead latents offered to AuxK: their ids int64 `[n]`, how many may be used on a row, and whether the products of this
    auxiliary term may be made in bfloat16 (results are float32)."""

    ids: Tensor
    k_aux: int
    coarse: bool = False


def _product(a: Tensor, b: Tensor, dead: Dead) -> Tensor:
    """`a @ b` for AuxK."""
    return product(a, b, half=dead.coarse)


class _Encode(torch.autograd.Function):
    """(x, W_enc, b_enc, b_dec) -> pre-activations at the support, and of all dead latents `[B, n_dead]`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # noqa: ARG004 (named for its gradient; the selection has used it as xc)
        w_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,  # noqa: ARG004 (as x)
        found: tuple[Tensor, Tensor, Tensor | None],
        support: Support,
        dead: Dead | None,
    ) -> tuple[Tensor, Tensor | None]:
        xc, u, u_dead = found
        ctx.save_for_backward(xc, w_enc)
        ctx.support, ctx.dead = support, dead
        ctx.set_materialize_grads(False)
        if dead is None:
            return u, None
        if u_dead is None:
            u_dead = _product(xc, w_enc[dead.ids].T, dead) + b_enc[dead.ids]
        return u, u_dead

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g_u: Tensor | None, g_dead: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        xc, w_enc = ctx.saved_tensors
        support: Support = ctx.support
        want_x, want_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        g_b = torch.zeros_like(w_enc[:, 0])
        g_w = g_x = sums = extra = None
        if g_u is not None:
            g_b.index_add_(0, support.ids, g_u.reshape(-1))
            sums = support.sums_by_latent(g_u, xc) if want_w else None
            g_x = decode_rows(g_u, support.indices, w_enc, support.offsets) if want_x else None
        if g_dead is not None:
            ids = ctx.dead.ids
            g_b.index_add_(0, ids, g_dead.sum(0))
            extra = (ids, _product(g_dead.T, xc, ctx.dead)) if want_w else None
            if want_x:
                more = g_dead @ w_enc[ids]
                g_x = more if g_x is None else g_x + more
        if want_w:
            g_w = _weight_gradient("enc", w_enc, support, sums, extra)
        return g_x, g_w, g_b, -(g_b @ w_enc), None, None, None


class _Decode(torch.autograd.Function):
    """(values, W_dec, b_dec, z_dead) -> (x_hat without AuxK, e_hat): both reconstructions share one decoder gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        values: Tensor,
        w_dec: Tensor,
        z_dead: Tensor | None,
        support: Support,
        dead: Dead | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(values, w_dec, z_dead)
        ctx.support, ctx.dead = support, dead
        ctx.set_materialize_grads(False)
        out = decode_rows(values, support.indices, w_dec, support.offsets)
        return out, None if dead is None or z_dead is None else _product(z_dead, w_dec[dead.ids], dead)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g_out: Tensor | None, g_aux: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        values, w_dec, z_dead = ctx.saved_tensors
        support: Support = ctx.support
        g_values = g_w = g_z = sums = extra = None
        want_w, radial = ctx.needs_input_grad[1], torch.zeros_like(w_dec[:, 0])
        if g_out is not None:
            g_out = g_out.contiguous()
            g_values = row_dots(g_out, w_dec, support.indices, support.offsets).view(values.shape)
            if want_w:
                sums = support.sums_by_latent(values, g_out)
                radial.index_add_(0, support.ids, (values * g_values).reshape(-1))
        if g_aux is not None:
            ids = ctx.dead.ids
            g_z = _product(g_aux, w_dec[ids].T, ctx.dead)
            if want_w:
                extra = (ids, _product(z_dead.T, g_aux, ctx.dead))
                radial.index_add_(0, ids, (z_dead * g_z).sum(0))
        if want_w:
            g_w = _weight_gradient("dec", w_dec, support, sums, extra, radial)
        return g_values, g_w, g_z, None, None


def _weight_gradient(
    name: str,
    w: Tensor,
    support: Support,
    sums: SlicedSums | None,
    extra: tuple[Tensor, Tensor] | None,
    radial: Tensor | None = None,
) -> Tensor | None:
    """Sums by latent plus rows of dead latents; None where they went to the trainer's buffers."""
    if support.into is not None and sums is not None:
        support.into.fill(name, sums, radial=radial, extra=extra)
        return None
    out = torch.zeros_like(w) if sums is None else sums.whole()
    return out if extra is None else out.index_add_(0, *extra)


def encode_at(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    support: Support,
    u: Tensor,
    *,
    xc: Tensor,
    dead: Dead | None = None,
    u_dead: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Make pre-activations `u` that a selection found at `support` differentiable in x, W_enc, b_enc and b_dec.

    xc = x - b_dec, as the selection used it. Second result: pre-activations of the dead latents `[B, n_dead]`, or None;
    `u_dead` are these where the selection kept them.
    """
    return _Encode.apply(x, w_enc, b_enc, b_dec, (xc, u, u_dead), support, dead)


def decode_from(
    values: Tensor,
    support: Support,
    w_dec: Tensor,
    *,
    z_dead: Tensor | None = None,
    dead: Dead | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums of decoder rows for each row of the support `[rows, d_model]`, without b_dec; and e_hat of the dead, or None."""
    return _Decode.apply(values, w_dec, z_dead, support, dead)


class StepOutput(NamedTuple):
    """What a forward pass of training made.

    x_hat `[B, d_model]`; values and int64 indices `[B, k]`, or flat with offsets int64 `[B + 1]`, or (indices None,
    the dense switch) values `[B, d_sae]`; e_hat `[B, d_model]` (empty without dead latents). nested: the
    reconstructions of a matryoshka SAE's prefixes; gate: the reconstruction of a gated
    SAE from its gate alone; sparsity: mean L1 or L0 of a row, differentiable.
    """

    x_hat: Tensor
    values: Tensor
    indices: Tensor | None
    e_hat: Tensor
    offsets: Tensor | None = None
    nested: Nested | None = None
    gate: Tensor | None = None
    sparsity: Tensor | None = None


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
    """TopK (signed: AbsTopK): encode, select, decode and (with `dead`) reconstruct from dead latents.

    Differentiable in all five tensors. x `[B, d_model]`; w_enc, w_dec `[d_sae, d_model]` (a row per latent);
    b_enc `[d_sae]`; b_dec `[d_model]`. `select` finds the k latents of each row: `top_pre_activations`, or a
    `screening.Screen`.
    """
    also = None if dead is None else Also(dead.ids)
    with torch.no_grad():
        xc = x - b_dec
        found, indices = select(xc, w_enc, b_enc, k, signed=signed, also=also)
    support, kept = Support(indices, len(w_enc)), None if also is None else also.values
    u, u_dead = encode_at(x, w_enc, b_enc, b_dec, support, found, xc=xc, dead=dead, u_dead=kept)
    # a selected latent with u <= 0 did not fire: ReLU has no gradient there
    values = u if signed else u.relu()
    z_dead = None if u_dead is None or dead is None else keep_largest(u_dead, dead.k_aux, signed=signed)
    out, e_hat = decode_from(values, support, w_dec, z_dead=z_dead, dead=dead)
    return StepOutput(out + b_dec, values, indices, x.new_zeros(0) if e_hat is None else e_hat)
