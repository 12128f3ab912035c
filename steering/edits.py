"""Edits of the residual stream at a hook, as changes Δ(x) that are added to x.

    add     Δ = s·R·v                     R = mean residual norm at the hook, v = unit direction
    clamp   Δ = (c − f)·d                 sets the code f of an SAE feature to c = s·R/|d|, d = its decoder row
            Δ = (s·R − x·v)·v             for a bare direction: sets the projection
    ablate  Δ = −f·d   or   −(x·v)·v      removes the feature, or the projection

Strength s is in units of R for every operation, so one slider means one size. Several edits at one hook are
all computed from the unedited x and summed, so their order does not matter. Position 0 of the context (the
attention sink, whose norm is a hundred times the others') is never edited. Arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cache.errors import UsageError
from steering.direction import Direction

Op = Literal["add", "clamp", "ablate"]
Where = Literal["prompt", "generated", "all"]
HookFn = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One operation with one direction."""

    direction: Direction  # what is written, and at which hook
    op: Op = "add"  # see the head of this file
    strength: float = 0.0  # × unit_norm; not used by ablate
    unit_norm: float = 1.0  # mean residual norm at the hook, from the store's training rows
    where: Where = "all"  # which positions: the prompt's, the generated ones, or both; never position 0

    def __post_init__(self) -> None:
        if self.op not in get_args(Op):
            raise UsageError(f"operation {self.op!r} does not exist: use {', '.join(get_args(Op))}")
        if self.where not in get_args(Where):
            raise UsageError(f"where={self.where!r} does not exist: use {', '.join(get_args(Where))}")
        if not (self.unit_norm > 0 and abs(self.strength) < float("inf")):
            raise UsageError(
                f"strength {self.strength} × residual norm {self.unit_norm}: both must be finite, the norm > 0"
            )

    @property
    def hook(self) -> str:
        return self.direction.hook

    @property
    def is_noop(self) -> bool:
        """True if the edit changes nothing whatever x is."""
        return self.op == "add" and self.strength == 0

    def target_code(self) -> float:
        """The code c that clamp sets an SAE feature to (signed: a negative pole has a negative code)."""
        return self.direction.sign * self.strength * self.unit_norm / self.direction.scale

    def delta(self, x: Tensor) -> Tensor:
        """Δ for residual rows x [n, d_model], float32."""
        rows = x.to(torch.float32)
        v = self.direction.vector.to(rows.device)
        size = self.strength * self.unit_norm
        if self.op == "add":
            return (size * v).expand_as(rows)
        if self.direction.sae is None:
            now = rows @ v
            goal = size if self.op == "clamp" else 0.0
            return (goal - now)[:, None] * v
        code = feature_code(self.direction.sae, rows, int(self.direction.feature or 0))
        goal = self.target_code() if self.op == "clamp" else 0.0
        # v points to the pole `sign`, so the decoder row itself is v · scale · sign.
        row = v * (self.direction.scale * self.direction.sign)
        return (goal - code)[:, None] * row


def feature_code(sae: Any, x: Tensor, feature: int) -> Tensor:
    """The signed code [n] of one feature on rows x [n, d_model]; 0 where it is not selected.

    The whole encoder runs, because top-k selection depends on every pre-activation.
    """
    with torch.no_grad():
        codes = sae.encode(x.to(sae.W_enc.device))
    values = codes.values.reshape(-1)
    hit = torch.where(codes.indices.reshape(-1) == feature, values, torch.zeros_like(values))
    return hit.new_zeros(codes.n_rows).index_add_(0, codes.rows(), hit).to(x.device)


def position_mask(where: Where, positions: Tensor, prompt_length: int) -> Tensor:
    """Which absolute positions an edit may touch."""
    mask = positions > 0
    if where == "prompt":
        mask &= positions < prompt_length
    elif where == "generated":
        mask &= positions >= prompt_length
    return mask


def edit_hooks(
    edits: Sequence[Edit],
    *,
    row: int,
    prompt_length: int,
    offset: int = 0,
    sizes: list[Tensor] | None = None,
) -> dict[str, HookFn]:
    """Hook functions that apply `edits` to one row of a batch [B, T, d_model] and leave the others alone.

    `offset` is the absolute position of the first column (the length of the key-value cache). `sizes` collects
    |Δ|/|x| of every edited position.
    """
    by_hook: dict[str, list[Edit]] = {}
    for edit in edits:
        if not edit.is_noop:
            by_hook.setdefault(edit.hook, []).append(edit)
    return {hook: _hook_fn(group, row, prompt_length, offset, sizes) for hook, group in by_hook.items()}


def _hook_fn(
    edits: list[Edit], row: int, prompt_length: int, offset: int, sizes: list[Tensor] | None
) -> HookFn:
    def apply(x: Tensor) -> Tensor | None:
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        before = x[row].to(torch.float32)
        total = torch.zeros_like(before)
        touched = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        for edit in edits:
            mask = position_mask(edit.where, positions, prompt_length)
            if bool(mask.any()):
                total[mask] += edit.delta(before[mask])
                touched |= mask
        if not bool(touched.any()):
            return None
        out = x.clone()
        out[row, touched] = (before[touched] + total[touched]).to(x.dtype)
        if sizes is not None:
            sizes.append((total[touched].norm(dim=-1) / before[touched].norm(dim=-1)).detach().cpu())
        return out

    return apply
