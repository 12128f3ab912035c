"""Configurations: flat, frozen, keyword-only. One line under each field says what it is and its unit.

An SAE is a point on orthogonal axes (docs/architecture.md): activation x objective x bias rule x data order x space.
Objective terms are floats that default to 0. Combinations that are not legal are refused here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from cache.errors import UsageError

Activation = Literal["topk", "abs_topk"]
Space = Literal["raw", "scalar"]
ACTIVATIONS: tuple[str, ...] = ("topk", "abs_topk")
SPACES: tuple[str, ...] = ("raw", "scalar")


class _Config:
    """JSON round trip shared by the configs; unknown keys are refused."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(
                f"{cls.__name__} has no field {', '.join(unknown)}: known are {', '.join(sorted(known))}"
            )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SAEConfig(_Config):
    """What one SAE is. `d_model`, `hook` and `model` are filled in by `train` from the data."""

    d_sae: int
    """Number of latents."""
    k: int
    """Latents that fire on a row."""
    activation: Activation = "topk"
    """topk keeps the k largest pre-activations and drops negative ones; abs_topk keeps the k largest |u| with sign."""
    auxk: float = 0.0
    """Weight of the AuxK term, relative to the normalised squared error (Gao et al. 2024: 1/32)."""
    k_aux: int | None = None
    """Dead latents used by AuxK on a row; None: the power of two nearest d_model / 2."""
    space: Space = "scalar"
    """Space of training. scalar: rows times sqrt(d_model / E||x||^2), folded into the weights on save."""
    d_model: int = 0
    """Width of the input."""
    hook: str = ""
    """Where the input lives, in TransformerLens names."""
    model: str = ""
    """Name of the model."""
    model_sha: str = ""
    """sha256 of the model's weights."""
    name: str = ""
    """Short name for folders and plots; empty: made from activation, d_sae and k."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.space not in SPACES:
            raise UsageError(f"space {self.space!r} is not one of {', '.join(SPACES)}")
        if not 0 < self.k <= self.d_sae:
            raise UsageError(f"k must be between 1 and d_sae={self.d_sae}, got {self.k}")
        if self.auxk < 0:
            raise UsageError(f"auxk is a weight and cannot be negative, got {self.auxk}")
        if self.k_aux is not None and self.k_aux < 1:
            raise UsageError(f"k_aux must be at least 1, got {self.k_aux}")

    @property
    def signed(self) -> bool:
        """Whether activations can be negative."""
        return self.activation == "abs_topk"

    @property
    def label(self) -> str:
        """`name`, or a name made from the architecture."""
        return self.name or f"{self.activation.replace('_', '-')}-{self.d_sae}-k{self.k}"

    def aux_width(self) -> int:
        """Dead latents that AuxK may use on a row: `k_aux`, or the power of two nearest d_model / 2."""
        return self.k_aux or 2 ** max(0, round(math.log2(max(self.d_model / 2, 1.0))))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Config):
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
    """bf16 screening of the encoder: auto switches it on only where a start-up probe shows a gain."""
    seed: int = 0
    """Seed of the initialisation and of the order of the data."""
    split: Literal["train", "heldout"] | None = "train"
    """Rows used: of train documents, of held-out ones, or of all."""
    skip: Literal["first"] | None = "first"
    """first leaves out position 0 of every context (the attention sink)."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "log_every", "dead_refresh_steps"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 <= self.decay_fraction <= 1:
            raise UsageError(f"decay_fraction is a share of the run, got {self.decay_fraction}")
        if self.screen not in ("auto", "on", "off"):
            raise UsageError(f"screen must be auto, on or off, got {self.screen!r}")

    def peak_lr(self, d_sae: int) -> float:
        return self.lr if self.lr is not None else 2e-4 / (d_sae / 2**14) ** 0.5

    def lr_at(self, step: int, d_sae: int) -> float:
        """Learning rate of step `step` (0-based): linear warm-up, plateau, linear decay."""
        warm = min(self.warmup_steps, max(1, self.steps // 10))
        decay = max(1, round(self.steps * self.decay_fraction))
        rise = min(1.0, (step + 1) / warm)
        fall = min(1.0, (self.steps - step) / decay)
        return self.peak_lr(d_sae) * min(rise, fall)

    def dead_window(self) -> int:
        return self.dead_window_tokens or max(1, min(10_000_000, self.steps * self.batch_size // 20))
