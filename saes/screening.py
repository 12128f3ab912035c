"""bf16 screening: find 48 candidates a row in bfloat16, rescore them in float32, keep k. Exact where nothing is missed.

The encoder GEMM is the floor of an exact TopK step; where the processor multiplies bfloat16 several times faster
than float32, screening goes below it. bfloat16 ranks coarsely, so half as many candidates again as k are kept.
Every AUDIT_STEPS steps a batch is also selected in float32; one missed latent switches screening off for good.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from saes.kernels import row_dots
from saes.top_products import Also, Scratch, top_pre_activations

AUDIT_STEPS = 500
AUDIT_ROWS = 1024


def candidates(k: int) -> int:
    """Candidates kept for k latents: 48 for k = 32, and the same margin for other k."""
    return k + max(8, k // 2)


class Screen:
    """A drop-in for `top_pre_activations` that screens in bfloat16 while its audits find no miss."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.misses = 0
        self.audits = 0
        self._calls = 0
        self._scratch = Scratch()

    def __call__(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool, also: Also | None = None
    ) -> tuple[Tensor, Tensor]:
        n = candidates(k)
        if not self.enabled or n >= w_enc.shape[0]:
            return self._exact(xc, w_enc, b_enc, k, signed, also)
        if self._calls % AUDIT_STEPS == 0:
            self._audit(xc[:AUDIT_ROWS], w_enc, b_enc, k, signed)
        self._calls += 1
        if not self.enabled:
            return self._exact(xc, w_enc, b_enc, k, signed, also)
        return self.select(xc, w_enc, b_enc, k, signed=signed)

    def _exact(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, signed: bool, also: Also | None
    ) -> tuple[Tensor, Tensor]:
        return top_pre_activations(xc, w_enc, b_enc, k, signed=signed, scratch=self._scratch, also=also)

    def select(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool
    ) -> tuple[Tensor, Tensor]:
        """Screened selection: values are float32-exact, the set is right unless a latent fell out of the candidates."""
        half = torch.bfloat16
        _, ids = top_pre_activations(
            xc.to(half), w_enc.to(half), b_enc.to(half), candidates(k), signed=signed, scratch=self._scratch
        )
        exact = row_dots(xc, w_enc, ids) + b_enc[ids]
        best = torch.topk(exact.abs() if signed else exact, k, dim=1, sorted=False).indices
        return exact.gather(1, best), ids.gather(1, best)

    def _audit(self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, signed: bool) -> None:
        fast, _ = self.select(xc, w_enc, b_enc, k, signed=signed)
        true, _ = top_pre_activations(xc, w_enc, b_enc, k, signed=signed)
        # compare the kept values, not the ids: at a tie either latent is right
        fast, true = (fast.abs(), true.abs()) if signed else (fast.relu(), true.relu())
        gap = (fast.sort(1).values - true.sort(1).values).abs()
        missed = int((gap > 1e-4 * true.amax(1, keepdim=True).clamp_min(1e-12)).any(1).sum())
        self.audits += 1
        self.misses += missed
        if missed:
            self.enabled = False

    def state(self) -> dict[str, int | bool]:
        return {"enabled": self.enabled, "misses": self.misses, "audits": self.audits, "calls": self._calls}

    def load_state(self, state: dict[str, int | bool]) -> None:
        self.enabled = bool(state["enabled"])
        self.misses, self.audits, self._calls = (
            int(state["misses"]),
            int(state["audits"]),
            int(state["calls"]),
        )


def screening_gains(rows: int, d_model: int, d_sae: int, k: int, device: torch.device) -> bool:
    """Whether screening beats the float32 selection on this machine: best of 3 interleaved pairs on random data."""
    if candidates(k) * 8 > d_sae:
        return False
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(min(rows, 1024), d_model, generator=gen).to(device)
    w = torch.randn(d_sae, d_model, generator=gen).to(device)
    b = torch.zeros(d_sae, device=device)
    screen, scratch = Screen(enabled=True), Scratch()
    best = [float("inf"), float("inf")]
    for _ in range(3):
        for i, run in enumerate(
            (
                lambda: screen.select(x, w, b, k, signed=False),
                lambda: top_pre_activations(x, w, b, k, signed=False, scratch=scratch),
            )
        ):
            start = time.perf_counter()
            out, _ = run()
            out.sum().item()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] < 0.9 * best[1]
