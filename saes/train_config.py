"""How SAEs are trained: steps, learning rate, dead latents, screening. Flat, frozen, keyword-only, as saes/config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cache.errors import UsageError
from cache.filters import row_classes
from saes.checked_config import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CheckedConfig):
    """How SAEs are trained. The same for all SAEs of one run: they see the same batches."""

    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 4096
    """Rows (tokens) of a step."""
    lr: float | None = None
    """Peak learning rate of Adam; None: 2e-4 / sqrt(d_sae / 2^14), the rule of both large libraries."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    decay_fraction: float = 0.2
    """Last share of the run over which the learning rate falls linearly to 0."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate between warm-up and decay, if there is anything between. cosine: from the peak down to its share lr_end."""
    lr_end: float = 0.1
    """cosine: share of the peak at which the decay begins."""
    beta1: float = 0.9
    """First Adam moment."""
    beta2: float = 0.999
    """Second Adam moment."""
    eps: float = 6.25e-10
    """Adam epsilon (Gao et al. 2024)."""
    grad_clip: float = 1.0
    """Largest gradient norm, after the decoder projection; 0 switches it off."""
    dead_window_tokens: int | None = None
    """A latent silent for this many rows is dead; None: min(10M, a twentieth of the run)."""
    dead_refresh_steps: int = 50
    """Steps between two refreshes of the list of dead latents."""
    screen: Literal["auto", "on", "off"] = "auto"
    """bf16 screening of the encoder. auto: from 2,048 latents on, where the device multiplies bf16 fast."""
    autocast: Literal["auto", "on", "off"] = "auto"
    """bf16 products of AuxK and of steps on dense tensors (relu, gated, early jumprelu). auto: on a GPU."""
    seed: int = 0
    """Seed of the initialisation and of the order of the data."""
    split: Literal["train", "heldout"] | None = "train"
    """Rows used: of train documents, of held-out ones, or of all."""
    skip: str | None = "first"
    """Rows left out: first (position 0 of a context, the attention sink), special, not_assistant, joined by +."""
    window: int = 32
    """Row groups of a store that are mixed at a time, each about 6 MiB of a hook: 175,000 rows at d 576, 44,000 at d 2,304
    (fp16). Papers mix 2^18 rows and more: 49 and 193 row groups. Two windows stay in memory; a ring has its own."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_whole(
            1, "steps", "batch_size", "window", "log_every", "dead_refresh_steps", "dead_window_tokens"
        )
        self._check_whole(0, "warmup_steps", "seed")
        self._check_moment("beta1", "beta2")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"lr must be above 0, got {self.lr}")
        for field in ("eps", "grad_clip"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UsageError(f"{field} cannot be negative, got {getattr(self, field)}")
        row_classes(self.split, self.skip)
        if not 0 <= self.decay_fraction <= 1:
            raise UsageError(f"decay_fraction is a share of the run, got {self.decay_fraction}")
        if self.lr_schedule not in ("constant", "cosine"):
            raise UsageError(f"lr_schedule is constant or cosine, got {self.lr_schedule!r}")
        if not 0 <= self.lr_end <= 1:
            raise UsageError(f"lr_end is a share of the peak learning rate, got {self.lr_end}")
        for switch in ("screen", "autocast"):
            if getattr(self, switch) not in ("auto", "on", "off"):
                raise UsageError(f"{switch} must be auto, on or off, got {getattr(self, switch)!r}")

    def peak_lr(self, d_sae: int, own: float | None = None) -> float:
        """Of an SAE of `d_sae` latents: its own (`SAEConfig.lr`), the run's, or by the rule."""
        if own is not None:
            return own
        return self.lr if self.lr is not None else 2e-4 / (d_sae / 2**14) ** 0.5

    def lr_at(self, step: int, d_sae: int, own: float | None = None) -> float:
        """Learning rate of step `step` (0-based): linear warm-up, plateau or cosine, linear decay."""
        warm = max(1, min(self.warmup_steps, self.steps // 10))
        decay = round(self.steps * self.decay_fraction)
        rise = min(1.0, (step + 1) / warm)
        fall = min(1.0, (self.steps - step) / max(1, decay))
        level = 1.0
        between = self.steps - warm - decay
        if self.lr_schedule == "cosine" and between > 0:
            done = min(1.0, max(0, step - warm) / between)
            level = self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * done)) / 2
        return self.peak_lr(d_sae, own) * min(rise, fall) * level

    def dead_window(self) -> int:
        return self.dead_window_tokens or max(1, min(10_000_000, self.steps * self.batch_size // 20))
