"""bf16 screening: a bfloat16 product tells which pre-activations may be kept, and these are computed in float32.

The encoder GEMM is the floor of an exact step; where the processor multiplies bfloat16 several times faster than float32,
screening goes below it. How far bfloat16 can be from float32 is known (saes/bounds.py), so no latent is missed: of the k
largest of a row, the B*k largest of a batch, and those past a threshold. Where so many may be kept that computing them one by
one costs more than the product, the exact pass is made, for REST steps.

Every AUDIT_STEPS steps a batch is also selected in float32; one missed latent (a device whose product is worse than
bfloat16 with float32 sums) switches screening off for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from saes.config import SAEConfig
from saes.products import linear_into
from saes.selection import (
    CROWDED,
    SAMPLE_ROWS,
    Flat,
    above_threshold,
    batch_largest,
    screened_above,
    screened_largest,
    screened_rows,
)
from saes.top_products import Also, Scratch, top_pre_activations

AUDIT_STEPS = 500
AUDIT_ROWS = 1024
MIN_LATENTS, MIN_WEIGHTS = 2048, 2**20
MAX_SHARE = 0.75
REST = 100
NEXT = 0.98
"""The smallest value that a batch kept, times this, is the first bound of the next batch."""


class Screen:
    """Selections of a training step that screen in bfloat16 while audits find no miss; float32 ones where not enabled.

    A call is a drop-in for `top_pre_activations`, `above` for `above_threshold`, `largest` for `batch_largest`.
    """

    def __init__(self, *, enabled: bool, scratch: Scratch | None = None) -> None:
        self.enabled = enabled
        self.misses = 0
        self.audits = 0
        self.crowded = 0
        self.widen = 1.0
        self._calls = 0
        self._rest = 0
        self._low: float | None = None
        self._scratch = scratch or Scratch()

    def __call__(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool, also: Also | None = None
    ) -> tuple[Tensor, Tensor]:
        if (
            2 * k < len(w_enc)
            and self._can(xc)
            and self._turn(lambda: self._missed_of_rows(xc[:AUDIT_ROWS], w_enc, b_enc, k, signed))
        ):
            found = screened_rows(xc, w_enc, b_enc, k, signed=signed, scratch=self._scratch, widen=self.widen)
            self._crowd(found)
            if found is not None:
                return found
        return top_pre_activations(xc, w_enc, b_enc, k, signed=signed, scratch=self._scratch, also=also)

    def above(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, low: Tensor, *, scratch: Scratch, dense_share: float
    ) -> Flat | None:
        """All u > low; None where more than `dense_share` of the latents pass on the first rows: the dense switch."""
        first = xc[:SAMPLE_ROWS]
        if not self.enabled or self._rest or len(xc) == len(first) or not self._can(xc):
            self._rest = max(0, self._rest - 1)
            return above_threshold(xc, w_enc, b_enc, low, scratch=scratch, dense_share=dense_share)
        head = above_threshold(first, w_enc, b_enc, low, scratch=scratch, dense_share=dense_share)
        if head is None:
            return None
        rest = None
        if len(head.values) < CROWDED / 2 * len(first) * len(w_enc) and self._turn(
            lambda: self._missed_above(xc[:AUDIT_ROWS], w_enc, b_enc, low)
        ):
            rest = screened_above(
                xc[len(first) :], w_enc, b_enc, low, scratch=self._scratch, widen=self.widen
            )
            self._crowd(rest)
        if rest is None:
            rest = above_threshold(xc[len(first) :], w_enc, b_enc, low, scratch=scratch)
        assert rest is not None
        offsets = torch.cat([head.offsets, rest.offsets[1:] + len(head.values)])
        return Flat(torch.cat([head.values, rest.values]), torch.cat([head.indices, rest.indices]), offsets)

    def largest(
        self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, n: int, *, signed: bool, scratch: Scratch
    ) -> Flat:
        """The n largest u > 0 (signed: |u|) of the batch."""
        found, rows = None, min(AUDIT_ROWS, len(xc))
        if self._can(xc) and self._turn(
            lambda: self._missed_of_batch(xc[:rows], w_enc, b_enc, n * rows // len(xc), signed)
        ):
            found = screened_largest(
                xc, w_enc, b_enc, n, signed=signed, scratch=self._scratch, low=self._low, widen=self.widen
            )
            self._crowd(found)
        if found is None:
            found = batch_largest(xc, w_enc, b_enc, n, signed=signed, scratch=scratch, low=self._low)
        smallest = found.values.abs().min().item() if len(found.values) == n > 0 else 0.0
        self._low = NEXT * smallest if smallest > 0 else None
        return found

    @staticmethod
    def _can(xc: Tensor) -> bool:
        return len(xc) > 0 and xc.dtype == torch.float32

    def _turn(self, missed: Callable[[], int]) -> bool:
        """Whether this call is screened; where an audit is due, it comes first."""
        if not self.enabled:
            return False
        if self._rest:
            self._rest -= 1
            return False
        if self._calls % AUDIT_STEPS == 0:
            with _full_float32():
                found = missed()
            self.audits += 1
            self.misses += found
            self.enabled = not found
        self._calls += 1
        return self.enabled

    def _crowd(self, found: tuple[Tensor, ...] | None) -> None:
        """Where a screened pass gave up, the next ones would: the exact pass is made for a while."""
        if found is None:
            self.crowded += 1
            self._rest = REST

    def _missed_of_rows(self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, signed: bool) -> int:
        """Rows of which a latent was missed."""
        found = screened_rows(xc, w_enc, b_enc, k, signed=signed, scratch=self._scratch, widen=self.widen)
        if found is None:
            return 0
        fast = found[0]
        true, _ = top_pre_activations(xc, w_enc, b_enc, k, signed=signed)
        # compare the kept values, not the ids: at a tie either latent is right
        fast, true = (fast.abs(), true.abs()) if signed else (fast.relu(), true.relu())
        gap = (fast.sort(1).values - true.sort(1).values).abs()
        return int((gap > 1e-4 * true.amax(1, keepdim=True).clamp_min(1e-12)).any(1).sum())

    def _missed_above(self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, low: Tensor) -> int:
        """Entries of the exact selection that the screened one has not; but for those at the threshold, which rounding
        puts on either side of it."""
        fast = screened_above(xc, w_enc, b_enc, low, scratch=self._scratch, widen=self.widen)
        true = above_threshold(xc, w_enc, b_enc, low)
        if fast is None or true is None:
            return 0
        size = torch.linalg.vector_norm(xc, dim=1)[true.rows] * torch.linalg.vector_norm(
            w_enc[true.indices], dim=1
        )
        clear = true.values - low[true.indices] > 1e-5 * (size + b_enc[true.indices].abs())
        return int((~torch.isin(true.places(len(w_enc)), fast.places(len(w_enc))) & clear).sum())

    def _missed_of_batch(self, xc: Tensor, w_enc: Tensor, b_enc: Tensor, n: int, signed: bool) -> int:
        """Entries whose value is not that of the entry of the same rank in the exact selection."""
        fast = screened_largest(
            xc, w_enc, b_enc, n, signed=signed, scratch=self._scratch, low=self._low, widen=self.widen
        )
        true = batch_largest(xc, w_enc, b_enc, n, signed=signed)
        if fast is None or not n:
            return 0
        a, b = (t.values.abs().sort().values for t in (fast, true))
        return int(((a - b).abs() > 1e-4 * b).sum()) if len(a) == len(b) else len(b)

    def state(self) -> dict[str, int | bool | float | None]:
        return {
            "enabled": self.enabled,
            "misses": self.misses,
            "audits": self.audits,
            "calls": self._calls,
            "crowded": self.crowded,
            "rest": self._rest,
            "low": self._low,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.enabled = bool(state["enabled"])
        self.misses, self.audits, self._calls = (state[name] for name in ("misses", "audits", "calls"))
        # absent from the checkpoints of an earlier version
        self.crowded, self._rest, self._low = state.get("crowded", 0), state.get("rest", 0), state.get("low")


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products in float32 throughout, whatever the user allows elsewhere (TF32): what an audit compares with."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def screening_gains(cfg: SAEConfig, device: torch.device) -> bool:
    """Whether `auto` screens: by the size of the encoder, and by whether this device multiplies bfloat16 fast.

    Screened and exact runs differ in the last bits, so the answer must not hang on a close race: the same command
    on the same machine gives the same SAE. Not on a GPU, where nobody has measured it yet: `on` is for that. The size is a rule (from 2,304 latents on, screened selection took .56 to .93 of the
    exact one at every d_model measured; at 1,152 up to 1.02); the device's answer is far from the limit on either side.
    """
    return (
        device.type == "cpu"
        and cfg.selected <= cfg.d_sae * CROWDED
        and cfg.d_sae >= MIN_LATENTS
        and cfg.d_model * cfg.d_sae >= MIN_WEIGHTS
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
