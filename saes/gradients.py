"""Where a sparse step writes the gradients of its two weight matrices: buffers that live as long as the run.

A fresh `[d_sae, d_model]` tensor for each gradient costs its page faults, and each pass over it costs its bytes. Here
the sums are made in slices of latents that stay in cache; a slice leaves it once, for the buffer. On the way the radial
part of the decoder's gradient goes: r_f = g_f . d_f is sum_b z_bf (g_b . d_f), and the inner products are the gradients
of the values, which the backward has already; so no pass over the matrix is needed for it either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from saes.top_products import Scratch

SLICE_BYTES = 4 * 2**20


class GradientBuffers:
    """Buffers for W_enc and W_dec of one SAE; `fill` writes, `attach` hands them to the optimiser.

    They are taken from `scratch`, so SAEs that step one after the other share them.
    """

    def __init__(self, w_enc: nn.Parameter, w_dec: nn.Parameter, scratch: Scratch) -> None:
        self._of = {"enc": w_enc, "dec": w_dec}
        self._scratch = scratch
        self._buffers: dict[str, Tensor] = {}
        self._written: set[str] = set()

    def fill(
        self,
        name: str,
        sums: SlicedSums,
        *,
        radial: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write the sums, less `radial[f] w[f]`, plus rows `extra = (ids, rows)`; a second call before `attach` adds."""
        w, again = self._of[name].detach(), name in self._written
        out = self._scratch.get(f"gradient {name}", tuple(w.shape), w.dtype, w.device)
        self._buffers[name] = out
        for f0, f1, part in sums.slices(max(1, SLICE_BYTES // (w.shape[1] * w.element_size()))):
            if again:
                part = part.add_(out[f0:f1])
            if radial is None:
                out[f0:f1].copy_(part)
            else:
                torch.addcmul(part, radial[f0:f1, None], w[f0:f1], value=-1, out=out[f0:f1])
        if extra is not None:
            out.index_add_(0, *extra)
        self._written.add(name)

    def attach(self) -> bool:
        """Make what was written since the last call the parameters' gradients; whether there was anything.

        Call it after a backward that began with `zero_grad(set_to_none=True)`.
        """
        for name in self._written:
            p, buffer = self._of[name], self._buffers[name]
            p.grad = buffer if p.grad is None else p.grad + buffer
        found = bool(self._written)
        self._written.clear()
        self._buffers.clear()
        return found


class SlicedSums:
    """`out[f] = sum over entries of latent f of weight * x[row]`, some latents at a time.

    rows int32, weights `[nnz]`: entries sorted by latent; starts int32 `[d_sae]`: where each latent's begin.
    """

    def __init__(self, rows: Tensor, weights: Tensor, starts: Tensor, x: Tensor) -> None:
        self.rows, self.weights, self.starts, self.x = rows, weights, starts, x

    def whole(self) -> Tensor:
        return nn.functional.embedding_bag(
            self.rows, self.x, self.starts, per_sample_weights=self.weights, mode="sum"
        )

    def slices(self, size: int) -> Iterator[tuple[int, int, Tensor]]:
        """(first, end, sums) of slices of at most `size` latents; all at once where asking for borders would wait."""
        n = len(self.starts)
        if self.starts.is_cuda:
            yield 0, n, self.whole()
            return
        borders = [*self.starts[::size].tolist(), len(self.rows)]
        for i, f0 in enumerate(range(0, n, size)):
            f1, a, b = min(f0 + size, n), borders[i], borders[i + 1]
            yield (
                f0,
                f1,
                nn.functional.embedding_bag(
                    self.rows[a:b],
                    self.x,
                    self.starts[f0:f1] - a,
                    per_sample_weights=self.weights[a:b],
                    mode="sum",
                ),
            )
