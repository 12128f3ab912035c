"""Configurations: flat, frozen, keyword-only. One line under each field says what it is and its unit.

An SAE is a point on orthogonal axes (docs/architecture.md): activation x objective x bias rule x data order x space.
Objective terms are floats that default to 0. Combinations that are not legal are refused here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from cache.errors import UsageError
from cache.filters import row_classes

Activation = Literal["topk", "abs_topk", "batch_topk", "batch_abs_topk", "jumprelu", "relu", "gated"]
Space = Literal["raw", "scalar"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
SPACES: tuple[str, ...] = get_args(Space)
FIXED_K = ("topk", "abs_topk")
BATCH_K = ("batch_topk", "batch_abs_topk")
# objective terms and the activations they are defined for
TERMS: dict[str, tuple[str, ...]] = {
    "auxk": (*FIXED_K, *BATCH_K, "jumprelu", "relu"),
    "l1": ("relu", "gated"),
    "l0": ("jumprelu",),
    "matryoshka": (*FIXED_K, *BATCH_K),
}


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
    k: int = 0
    """Latents that fire on a row (batch_*: on the mean row); 0 where a threshold decides: jumprelu, relu, gated."""
    activation: Activation = "topk"
    """topk: k largest, no negative ones; abs_topk: k largest |u|, signed; batch_*: the same over a batch, a global
    threshold afterwards; jumprelu: u above a trained threshold; relu: u above 0; gated: gate and magnitude apart."""
    auxk: float = 0.0
    """Weight of the AuxK term, relative to the normalised squared error (Gao et al. 2024: 1/32)."""
    k_aux: int | None = None
    """Dead latents used by AuxK on a row; None: the power of two nearest d_model / 2."""
    l1: float = 0.0
    """relu, gated: weight of the mean L1 norm of a row's codes beside its squared error, both in the space of training."""
    l0: float = 0.0
    """jumprelu: weight of the L0 term, relative to the normalised squared error."""
    l0_target: float = 0.0
    """jumprelu: 0 penalises the mean L0 itself; above 0 the term is (L0 / l0_target - 1)^2."""
    sparsity_warmup: float = 0.05
    """Share of the run over which l1 or l0 rises linearly from 0."""
    threshold_init: float = 0.05
    """jumprelu: first threshold, in standard deviations of the first pre-activations. Adam moves it by at most lr a
    step: a run too short for that to reach 1 or 2 should start higher, with a wider bandwidth."""
    bandwidth: float = 0.05
    """jumprelu: width of the rectangle that passes gradients to a threshold, in the same unit."""
    matryoshka: tuple[int, ...] = ()
    """Prefixes of the latents that must reconstruct alone, rising and below d_sae; empty: none. TopK families only."""
    beta1: float | None = None
    """First Adam moment of this SAE; None: the run's."""
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
        if self.name and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,60}", self.name):
            raise UsageError(
                f"name {self.name!r} becomes a folder: use letters, digits, dots, dashes, underscores"
            )
        object.__setattr__(self, "matryoshka", tuple(self.matryoshka))
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.space not in SPACES:
            raise UsageError(f"space {self.space!r} is not one of {', '.join(SPACES)}")
        for field in ("auxk", "l1", "l0", "l0_target", "threshold_init"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UsageError(f"{field} cannot be negative, got {getattr(self, field)}")
        if self.k_aux is not None and self.k_aux < 1:
            raise UsageError(f"k_aux must be at least 1, got {self.k_aux}")
        if not 0 <= self.sparsity_warmup <= 1:
            raise UsageError(f"sparsity_warmup is a share of the run, got {self.sparsity_warmup}")
        if self.bandwidth <= 0:
            raise UsageError(f"bandwidth must be above 0 or no threshold moves, got {self.bandwidth}")
        self._check_combination()

    def _check_combination(self) -> None:
        """Refuse what the table of docs/architecture.md does not list."""
        if self.has_k and not 0 < self.k <= self.d_sae:
            raise UsageError(f"k must be between 1 and d_sae={self.d_sae}, got {self.k}")
        if not self.has_k and self.k:
            raise UsageError(f"{self.activation} has no k, its threshold decides: leave k out, got {self.k}")
        for term, kinds in TERMS.items():
            if getattr(self, term) and self.activation not in kinds:
                raise UsageError(f"{term} is for {', '.join(kinds)}, not for {self.activation}: leave it out")
        if self.l0_target and not self.l0:
            raise UsageError("l0_target needs l0, the weight of its term")
        rising = all(a < b for a, b in zip((0, *self.matryoshka), (*self.matryoshka, self.d_sae)))
        if not rising:
            raise UsageError(
                f"matryoshka prefixes rise from 1 to below d_sae={self.d_sae}, got {self.matryoshka}"
            )

    def check_trainable(self) -> None:
        """Refuse a config that is a fine SAE to load but leaves the training without a sparsity term."""
        need = {"relu": "l1", "gated": "l1", "jumprelu": "l0"}.get(self.activation)
        if need and not getattr(self, need):
            raise UsageError(f"{self.activation} needs {need} above 0 to become sparse: see presets")

    @property
    def has_k(self) -> bool:
        """Whether the number of active latents is set, on each row or on the mean row."""
        return self.activation in FIXED_K + BATCH_K

    @property
    def fixed_k(self) -> bool:
        """Whether codes are `[B, k]`; otherwise their number varies from row to row."""
        return self.activation in FIXED_K

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold per latent is part of the weights."""
        return self.activation in (*BATCH_K, "jumprelu")

    @property
    def signed(self) -> bool:
        """Whether activations can be negative."""
        return self.activation in ("abs_topk", "batch_abs_topk")

    @property
    def label(self) -> str:
        """`name`, or a name made from the architecture."""
        nested = "matryoshka-" if self.matryoshka else ""
        k = f"-k{self.k}" if self.has_k else ""
        return self.name or f"{nested}{self.activation.replace('_', '-')}-{self.d_sae}{k}"

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
    skip: str | None = "first"
    """Rows left out: first (position 0 of a context, the attention sink), special, not_assistant, joined by +."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "log_every", "dead_refresh_steps"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, got {getattr(self, field)}")
        row_classes(self.split, self.skip)
        if not 0 <= self.decay_fraction <= 1:
            raise UsageError(f"decay_fraction is a share of the run, got {self.decay_fraction}")
        if self.screen not in ("auto", "on", "off"):
            raise UsageError(f"screen must be auto, on or off, got {self.screen!r}")

    def peak_lr(self, d_sae: int) -> float:
        return self.lr if self.lr is not None else 2e-4 / (d_sae / 2**14) ** 0.5

    def lr_at(self, step: int, d_sae: int) -> float:
        """Learning rate of step `step` (0-based): linear warm-up, plateau, linear decay."""
        warm = max(1, min(self.warmup_steps, self.steps // 10))
        decay = max(1, round(self.steps * self.decay_fraction))
        rise = min(1.0, (step + 1) / warm)
        fall = min(1.0, (self.steps - step) / decay)
        return self.peak_lr(d_sae) * min(rise, fall)

    def dead_window(self) -> int:
        return self.dead_window_tokens or max(1, min(10_000_000, self.steps * self.batch_size // 20))
