"""bf16 screening: find 48 candidates a row in bfloat16, rescore them in float32, keep k. Exact where nothing is missed.

The encoder GEMM is the floor of an exact TopK step; where the processor multiplies bfloat16 several times faster
than float32, screening goes below it. bfloat16 ranks coarsely, so half as many candidates again as k are kept.
Every AUDIT_STEPS steps a batch is also selected in float32; one missed latent switches screening off for good.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from saes.kernels import row_dots
from saes.products import linear_into
from saes.top_products import Also, Scratch, top_pre_activations

AUDIT_STEPS = 500
AUDIT_ROWS = 1024
MIN_LATENTS, MIN_WEIGHTS = 4096, 2**20
MAX_SHARE = 0.75


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


def screening_gains(d_model: int, d_sae: int, k: int, device: torch.device) -> bool:
    """Whether `auto` screens: by the size of the encoder, and by whether this device multiplies bfloat16 fast.

    Screened and exact runs differ in the last bits, so the answer must not hang on a close race: the same command
    on the same machine gives the same SAE. The size is a rule (from 4,096 latents on, screened selection took .74 to .95
    of the exact one at every d_model measured, below up to 1.08); the device's answer is far from the limit on either side.
    """
    return (
        candidates(k) * 8 <= d_sae
        and d_sae >= MIN_LATENTS
        and d_model * d_sae >= MIN_WEIGHTS
        and bf16_product_share(str(device)) < MAX_SHARE
    )


@lru_cache
def bf16_product_share(device: str) -> float:
    """Seconds of a bfloat16 product by those of the float32 one in use: .1 to .6 with units for it, above 1 without."""
    x, w = (torch.ones(n, 512, device=device) for n in (1024, 4096))
    out, b = torch.empty(1024, 4096, device=device), torch.zeros(4096, device=device)
    half = x.bfloat16(), w.bfloat16()
    best = [float("inf"), float("inf")]
    for _ in range(4):
        for i, run in enumerate((lambda: half[0] @ half[1].T, lambda: linear_into(out, x, w, b))):
            start = time.perf_counter()
            run()[0, 0].item()  # waits for the device
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]
