"""The activation axis: for each kind, what a training step computes and how a finished SAE encodes.

    topk, abs_topk              k largest u (|u|) of a row                        fixed count
    batch_topk, batch_abs_topk  B*k largest u (|u|) of a batch; encode: u > theta (|u| > theta), one theta for all
    jumprelu                    z = u 1[u > theta], theta per latent, >= 0 (arXiv 2407.14435)
    relu                        z = max(u, 0)
    gated                       pi = xc W^T + b_enc;  z = 1[pi > 0] max(e^r (pi - b_enc) + b_mag, 0) (arXiv 2404.16014)

JumpReLU's threshold learns through a rectangle of width eps around it, under reconstruction and under the L0 term:
dz/dtheta = -(theta/eps) rect, d1[u > theta]/dtheta = -(1/eps) rect; u itself gets dz/du = 1[u > theta] and nothing from
L0. So a step stores every u above theta - eps/2: those below theta carry the value 0. Where more than an eighth of the
latents would be stored, the same formulas run on dense tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saes.codes import Codes
from saes.gradients import GradientBuffers
from saes.kernels import Dead, StepOutput, Support, decode_from, encode_at
from saes.nested import Nested
from saes.places import largest_places
from saes.products import decode_dense, encode_dense
from saes.row_topk import keep_largest
from saes.screening import Screen
from saes.selection import DENSE_SHARE, above_threshold
from saes.top_products import Also, Scratch, top_pre_activations


class _Jump(torch.autograd.Function):
    """(u, theta) -> u 1[u > theta], elementwise; eps is the width of the rectangle."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(u, theta)
        ctx.eps = eps
        return u * (u > theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        u, theta = ctx.saved_tensors
        near = (u - theta).abs() < ctx.eps / 2
        return g * (u > theta), -(theta / ctx.eps) * near * g, None


class _Step(torch.autograd.Function):
    """(u, theta) -> 1[u > theta], elementwise; the gradient reaches theta alone (DeepMind's form)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(u, theta)
        ctx.eps = eps
        return (u > theta).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        u, theta = ctx.saved_tensors
        near = (u - theta).abs() < ctx.eps / 2
        return None, -near.to(g.dtype) / ctx.eps * g, None


class _Pre(NamedTuple):
    """Differentiable pre-activations: at a support, or dense `[B, d_sae]` where support is None; and of the dead."""

    u: Tensor
    u_dead: Tensor | None
    support: Support | None
    half: bool = False
    """Whether products of dense codes are made in bfloat16."""

    def of(self, p: Tensor) -> Tensor:
        """A parameter `[d_sae]` beside each pre-activation."""
        return p.expand_as(self.u) if self.support is None else p.index_select(0, self.support.ids)

    def codes(self, z: Tensor) -> dict[str, Tensor | None]:
        if self.support is None:
            return {"values": z, "indices": None}
        return {"values": z, "indices": self.support.indices, "offsets": self.support.offsets}


def training_step(
    sae: Any,
    x: Tensor,
    *,
    dead: Dead | None = None,
    select: Screen | None = None,
    eps: float = 1.0,
    scratch: Scratch | None = None,
    into: GradientBuffers | None = None,
    half: bool = False,
) -> StepOutput:
    """Forward pass of training of an `SAE` on rows x `[B, d_model]`, differentiable in its parameters and x.

    `select` finds the latents to store, in float32 throughout without it; eps is the rectangle's width in units of u (jumprelu). With
    `into`, a sparse step's gradients of W_enc and W_dec (less its radial part) go there. half: products of dense steps are
    made in bfloat16.
    """
    cfg, scratch, select = sae.cfg, scratch or Scratch(), select or Screen(enabled=False)
    with torch.no_grad():
        xc = x - sae.centre
    if cfg.has_k:
        return _top(sae, x, xc, dead, select, scratch, into)
    if cfg.bias_rule == "gba":
        return _adapted(sae, x, xc, select, scratch, half)
    low = torch.zeros_like(sae.b_enc) if cfg.activation != "jumprelu" else sae.threshold.detach() - eps / 2
    pre = _pre_above(sae, x, xc, low, dead, select, scratch, into, half)
    if cfg.activation == "gated":
        return _gated(sae, x, pre)
    if cfg.activation == "relu":
        z = pre.u.relu()
        sparsity = z.sum() / len(x)
    else:
        theta = pre.of(sae.threshold)
        z = _Jump.apply(pre.u, theta, eps)
        sparsity = _Step.apply(pre.u, theta, eps).sum() / len(x)
    return _reconstruct(sae, pre, z, dead)._replace(sparsity=sparsity)


def _top(
    sae: Any,
    x: Tensor,
    xc: Tensor,
    dead: Dead | None,
    select: Screen,
    scratch: Scratch,
    into: GradientBuffers | None = None,
) -> StepOutput:
    """TopK and BatchTopK, signed or not, with nested prefixes or 4 k latents where the config names them."""
    cfg = sae.cfg
    counts = None
    offsets = None
    also = None if dead is None else Also(dead.ids)
    if cfg.fixed_k:
        with torch.no_grad():
            found, indices = select(xc, sae.W_enc, sae.b_enc, cfg.selected, signed=cfg.signed, also=also)
            if cfg.multi_topk:
                found, indices, counts = _best_first(found, indices, cfg.k, signed=cfg.signed)
            if cfg.matryoshka:
                indices, order = indices.sort(dim=1)
                found = found.gather(1, order)
    else:
        found, indices, offsets = select.largest(
            xc, sae.W_enc, sae.b_enc, len(x) * cfg.selected, signed=cfg.signed, scratch=scratch
        )
        if cfg.multi_topk:
            found, indices, counts = _best_of_batch_first(
                found, indices, offsets, len(x) * cfg.k, signed=cfg.signed
            )
    support = Support(indices, cfg.d_sae, offsets, into)
    kept = None if also is None else also.values
    u, u_dead = encode_at(x, sae.W_enc, sae.b_enc, sae.centre, support, found, xc=xc, dead=dead, u_dead=kept)
    pre, z = _Pre(u, u_dead, support), u if cfg.signed else u.relu()
    if counts is not None:
        return _multi(sae, pre, z, dead, scratch, counts)
    return _reconstruct(sae, pre, z, dead, scratch=scratch)


def _best_first(u: Tensor, indices: Tensor, k: int, *, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Entries `[B, n]` with the k largest of each row in front; and how many are in the two parts of each row."""
    order = (u.abs() if signed else u).argsort(dim=1, descending=True)
    counts = torch.tensor([k, u.shape[1] - k], device=u.device).repeat(len(u))
    return u.gather(1, order), indices.gather(1, order), counts


def _best_of_batch_first(
    u: Tensor, indices: Tensor, offsets: Tensor, n: int, *, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for flat entries: in front those of a row that are among the n largest of the batch."""
    rows = len(offsets) - 1
    part = torch.arange(rows, device=u.device).repeat_interleave(offsets.diff()) * 2 + 1
    part[largest_places(u.abs() if signed else u, n)] -= 1
    order = part.argsort(stable=True)
    return u[order], indices[order], torch.bincount(part, minlength=2 * rows)


def _multi(sae: Any, pre: _Pre, z: Tensor, dead: Dead | None, scratch: Scratch, counts: Tensor) -> StepOutput:
    """Multi-TopK: reconstructions with k latents and with 4 k; codes are those of the k."""
    assert pre.support is not None
    cfg, parts = sae.cfg, pre.support.runs(counts)
    z_dead = (
        None
        if pre.u_dead is None or dead is None
        else keep_largest(pre.u_dead, dead.k_aux, signed=cfg.signed)
    )
    summed, e_hat = decode_from(z.reshape(-1), parts, sae.W_dec, z_dead=z_dead, dead=dead)
    both = summed.view(pre.support.n_rows, 2, cfg.width_out)
    nested = Nested(both, sae.b_dec, scratch, (1.0, cfg.multi_topk))
    first = counts.view(-1, 2)[:, 0]
    codes: dict[str, Any]
    if cfg.fixed_k:
        codes = {"values": z[:, : cfg.k], "indices": pre.support.indices[:, : cfg.k]}
    else:
        kept = torch.arange(len(counts), device=z.device).repeat_interleave(counts) % 2 == 0
        offsets = F.pad(first.cumsum(0), (1, 0))
        codes = {"values": z[kept], "indices": pre.support.ids[kept], "offsets": offsets}
    empty = z.new_zeros(0) if e_hat is None else e_hat
    return StepOutput(x_hat=both[:, 0] + sae.b_dec, e_hat=empty, nested=nested, **codes)


def _pre_above(
    sae: Any,
    x: Tensor,
    xc: Tensor,
    low: Tensor,
    dead: Dead | None,
    select: Screen,
    scratch: Scratch,
    into: GradientBuffers | None = None,
    half: bool = False,
) -> _Pre:
    found = select.above(xc, sae.W_enc, sae.b_enc, low, scratch=scratch, dense_share=DENSE_SHARE)
    if found is None:
        # bfloat16 is coarser than the window through which a threshold learns
        exact = sae.cfg.activation == "jumprelu"
        u = encode_dense(x - sae.centre, sae.W_enc, sae.b_enc, half=half and not exact)
        return _Pre(u, None if dead is None else u[:, dead.ids], None, half)
    support = Support(found.indices, sae.cfg.d_sae, found.offsets, into)
    u, u_dead = encode_at(x, sae.W_enc, sae.b_enc, sae.centre, support, found.values, xc=xc, dead=dead)
    return _Pre(u, u_dead, support)


def _adapted(sae: Any, x: Tensor, xc: Tensor, select: Screen, scratch: Scratch, half: bool) -> StepOutput:
    """GBA: biases are data to a step, decoder rows are a_m w_m (saes/gba.py); `values` are z without a_m."""
    low = inference_threshold(sae)
    pre = _pre_above(sae, x, xc, low, None, select, scratch, half=half)
    z = pre.u * (pre.u > pre.of(low))
    out = _reconstruct(sae, pre, z * pre.of(sae.gain), None, sae.W_enc)
    return out._replace(values=z.detach())


def _reconstruct(
    sae: Any,
    pre: _Pre,
    z: Tensor,
    dead: Dead | None,
    w_dec: Tensor | None = None,
    scratch: Scratch | None = None,
) -> StepOutput:
    cfg, w_dec = sae.cfg, sae.W_dec if w_dec is None else w_dec
    z_dead = (
        None
        if pre.u_dead is None or dead is None
        else keep_largest(pre.u_dead, dead.k_aux, signed=cfg.signed)
    )
    nested = None
    if pre.support is None:
        x_hat = decode_dense(z, w_dec, half=pre.half)
        e_hat = (
            None if z_dead is None or dead is None else decode_dense(z_dead, w_dec[dead.ids], half=pre.half)
        )
    elif not cfg.matryoshka:
        x_hat, e_hat = decode_from(z, pre.support, w_dec, z_dead=z_dead, dead=dead)
    else:
        parts = pre.support.split((*cfg.matryoshka, cfg.d_sae))
        summed, e_hat = decode_from(z.reshape(-1), parts, w_dec, z_dead=z_dead, dead=dead)
        nested = Nested(
            summed.view(pre.support.n_rows, -1, cfg.width_out),
            sae.b_dec,
            scratch or Scratch(),
            (1 / (1 + len(cfg.matryoshka)),) * (1 + len(cfg.matryoshka)),
        )
        x_hat = nested.parts.sum(1)
    empty = z.new_zeros(0) if e_hat is None else e_hat
    return StepOutput(x_hat=x_hat + sae.b_dec, e_hat=empty, nested=nested, **pre.codes(z))  # type: ignore[arg-type]


def _gated(sae: Any, x: Tensor, pre: _Pre) -> StepOutput:
    """Gate and magnitude share W_enc. The L1 term and a second reconstruction, from the gate through a frozen decoder,
    train the gate, whose step has no gradient of its own."""
    magnitude = pre.of(sae.r_mag.exp()) * (pre.u - pre.of(sae.b_enc)) + pre.of(sae.b_mag)
    gate = pre.u.relu()
    z = magnitude.relu() * (pre.u > 0)
    w_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    if pre.support is None:
        frozen = decode_dense(gate, w_dec, half=pre.half)
    else:
        frozen = decode_from(gate, pre.support, w_dec)[0]
    return _reconstruct(sae, pre, z, None)._replace(gate=frozen + b_dec, sparsity=gate.sum() / len(x))


def inference_threshold(sae: Any) -> Tensor:
    """`[d_sae]`: a latent of a variable-L0 SAE fires where u (signed: |u|) is above it."""
    kind = sae.cfg.activation
    if kind == "relu":
        return torch.zeros_like(sae.b_enc)
    if kind == "gated":
        # the magnitude e^r (u - b_enc) + b_mag must be positive too
        return (sae.b_enc - sae.b_mag * torch.exp(-sae.r_mag)).clamp_min(0.0).detach()
    return sae.threshold.detach()


def unit_rows(xc: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at unit norm, and their norms `[B, 1]`: the input rule of space `unit`."""
    norm = torch.linalg.vector_norm(xc, dim=1, keepdim=True).clamp_min(1e-30)
    return xc / norm, norm


def encode(sae: Any, x: Tensor) -> Codes:
    """Codes of rows x `[B, d_model]`; differentiable in x, W_enc, b_enc, b_dec (and r_mag, b_mag) where one asks for it."""
    if sae.cfg.space != "unit":
        return _encode(sae, x, sae.centre)
    # codes in units of x, so that decoding needs no norms
    unit, norm = unit_rows(x - sae.centre)
    codes = _encode(sae, unit, torch.zeros_like(sae.centre))
    if codes.offsets is not None:
        norm = norm.view(-1).repeat_interleave(codes.offsets.diff())
    return codes._replace(values=codes.values * norm)


def _encode(sae: Any, x: Tensor, centre: Tensor) -> Codes:
    cfg = sae.cfg
    tracked = torch.is_grad_enabled() and (x.requires_grad or sae.W_enc.requires_grad)
    offsets = None
    with torch.no_grad():
        xc = x - centre
        if cfg.fixed_k:
            u, indices = top_pre_activations(xc, sae.W_enc, sae.b_enc, cfg.k, signed=cfg.signed)
        else:
            found = above_threshold(xc, sae.W_enc, sae.b_enc, inference_threshold(sae), signed=cfg.signed)
            assert found is not None
            u, indices, offsets = found
    if tracked:
        support = Support(indices, cfg.d_sae, offsets)
        u, _ = encode_at(x, sae.W_enc, sae.b_enc, centre, support, u, xc=xc)
    if cfg.activation == "gated":
        u = sae.r_mag.exp()[indices] * (u - sae.b_enc[indices]) + sae.b_mag[indices]
    values = u if cfg.signed else u.relu()
    return Codes(values, indices.int(), offsets)
