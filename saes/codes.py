"""Codes: the one sparse currency, from encoder to decoder, feature index and app.

`values[b, j]` is the activation of latent `indices[b, j]` on row b. With `offsets is None` every row has the
same count k and both tensors are `[B, k]`; otherwise they are flat and row b owns `offsets[b]:offsets[b+1]`.
A latent fires where its value is not zero: a signed SAE (AbsTopK) has negative activations too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Sparse activations of B rows.

    values:  float32 `[B, k]`, or `[nnz]` with offsets
    indices: int32 or int64 `[B, k]`, or `[nnz]` with offsets; latent ids
    offsets: int64 `[B + 1]`, or None for a fixed count k
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return self.values.shape[0] if self.offsets is None else len(self.offsets) - 1

    def dense(self, d_sae: int) -> Tensor:
        """The same activations as a `[B, d_sae]` tensor (differentiable). Ids may repeat only with value 0."""
        out = self.values.new_zeros(self.n_rows, d_sae)
        return out.index_put((self.rows(), self.indices.reshape(-1).long()), self.values.reshape(-1), True)

    def rows(self) -> Tensor:
        """Row number of each stored value, int64 `[nnz]`."""
        device = self.values.device
        if self.offsets is None:
            return torch.arange(self.n_rows, device=device).repeat_interleave(self.values.shape[1])
        return torch.arange(self.n_rows, device=device).repeat_interleave(self.offsets.diff())

    def l0(self) -> Tensor:
        """Number of non-zero activations of each row, int64 `[B]`."""
        if self.offsets is None:
            return (self.values != 0).sum(1)
        counts = self.values.new_zeros(self.n_rows, dtype=torch.int64)
        return counts.index_add_(0, self.rows(), (self.values != 0).long())
