"""Configurations: flat, frozen, keyword-only. One line under each field says what it is and its unit.

An SAE is a point on orthogonal axes (docs/architecture.md): activation x objective x bias rule x data order x space.
Objective terms are floats that default to 0. Combinations that are not legal are refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from cache.errors import UsageError
from saes.checked_config import CheckedConfig

Activation = Literal["topk", "abs_topk", "batch_topk", "batch_abs_topk", "jumprelu", "relu", "gated"]
Space = Literal["raw", "scalar", "aip", "unit"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
SPACES: tuple[str, ...] = get_args(Space)
FIXED_K = ("topk", "abs_topk")
BATCH_K = ("batch_topk", "batch_abs_topk")
BIAS_RULES = ("gradient", "gba", "frozen")
GBA_ACTIVATIONS = ("jumprelu", "relu")
L1_OF_NORM = 0.1
"""l1 by default, over the norm of a row: a latent shrinks by l1 / 2, so one that adds less than a twentieth of the norm is
not worth its price, at any width. 5, the value of Anthropic's April 2024 update, is this at d_model 2,500."""
MULTI = 4
"""Times k: what the reconstruction of `multi_topk` may use (Gao et al. 2024)."""
# objective terms and the activations they are defined for
TERMS: dict[str, tuple[str, ...]] = {
    "auxk": (*FIXED_K, *BATCH_K, "jumprelu", "relu"),
    "l1": ("relu", "gated"),
    "l0": ("jumprelu",),
    "multi_topk": (*FIXED_K, *BATCH_K),
    "matryoshka": (*FIXED_K, *BATCH_K),
    "separability": (*FIXED_K, *BATCH_K, "jumprelu"),
}


@dataclass(frozen=True, kw_only=True)
class SAEConfig(CheckedConfig):
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
    multi_topk: float = 0.0
    """Weight of the squared error with 4 k latents beside that with k (Gao et al. 2024: 1/8), so that k can be changed after
    training; TopK families without prefixes."""
    l1: float | None = 0.0
    """relu, gated: weight of the mean L1 norm of a row's codes beside its squared error, both in the space of training.
    None: L1_OF_NORM of the norm of a row there, sqrt(d_model), or 1 in space unit."""
    l0: float = 0.0
    """jumprelu: weight of the L0 term, relative to the normalised squared error."""
    l0_target: float = 0.0
    """jumprelu: 0 penalises the mean L0 itself; above 0 the term is (L0 / l0_target - 1)^2."""
    separability: float = 0.0
    """Weight of the mean of relu(|cos(d_i, d_j)| - 1 / (2 K - 1))^2 over each atom and its nearest one, K the mean L0;
    beside the normalised squared error. The nearest ones are looked up every dead_refresh_steps."""
    sparsity_warmup: float = 0.05
    """Share of the run over which l1 or l0 rises linearly from 0."""
    threshold_init: float = 0.05
    """jumprelu: first threshold, in standard deviations of the first pre-activations. Adam moves it by at most lr a
    step: a run too short for that to reach 1 or 2 should start higher, with a wider bandwidth."""
    bandwidth: float = 0.05
    """jumprelu: width of the rectangle that passes gradients to a threshold, in the same unit."""
    matryoshka: tuple[int, ...] = ()
    """Prefixes of the latents that must reconstruct alone, rising and below d_sae; empty: none. TopK families only."""
    bias_rule: Literal["gradient", "gba", "frozen"] = "gradient"
    """frozen: b_enc (gated: b_mag too) stays at 0 in the space of training. gba: group bias adaptation (saes/gba.py) sets b by firing rates; weights are tied, W_dec = a W_enc with unit rows
    of W_enc. jumprelu is its un-shifted form (the threshold is -b), relu the shifted one (b_enc is b)."""
    gba_groups: int = 10
    """gba: groups of latents, each with a target frequency; 1: plain bias adaptation at gba_htf."""
    gba_htf: float = 0.1
    """gba: highest target frequency, of the first group. The paper's 0.5 is for wide dictionaries: a top group of more
    than d_model latents that fire on half the rows reconstructs densely and leaves the others nothing to learn."""
    gba_ltf: float = 1e-3
    """gba: lowest target frequency, of the last group; geometric in between."""
    gba_sizes: Literal["equal", "inverse"] = "equal"
    """gba: latents of a group: equal numbers, or inverse to its target, so that all groups have the same share of L0."""
    gba_l0_budget: float = 0.0
    """gba: above 0, gba_htf is chosen so that L0 is at most this once the rule has converged."""
    gba_gamma_up: float = 0.01
    """gba: how far a silent latent's bias rises in gba_every steps, in mean head-rooms of its group."""
    gba_gamma_down: float = 0.01
    """gba: share of its head-room that an over-active latent loses in gba_every steps."""
    gba_every: int = 50
    """gba: steps between two updates of the biases, at most; fewer in runs that are too short for it."""
    gba_events: float = 10.0
    """gba: a group waits for a window of this many rows over its target frequency, but for no more than a twentieth of the run."""
    gba_folds: float = 20.0
    """gba: over the run, head-room can fall by e to this power: runs too short for the gammas take larger ones; 0: never."""
    gba_eps: float = 1e-6
    """gba: a latent that fires less often than this in its window is silent."""
    gba_b_dec: Literal["fixed", "trained"] = "fixed"
    """gba: whether b_dec stays at the geometric median of the rows; the paper does not say."""
    gba_freeze: float = 0.05
    """gba: last share of the run in which biases stay, so that weights settle under the thresholds that are saved."""
    beta1: float | None = None
    """First Adam moment of this SAE; None: the run's."""
    lr: float | None = None
    """Peak learning rate of this SAE; None: the run's."""
    space: Space = "scalar"
    """Space of training, folded into the weights on save. scalar: rows times sqrt(d_model) / E||x||; aip: rows whitened
    by their second moment (saes/aip.py). unit: rows less their geometric median, each at unit norm, which cannot be folded:
    it stays a rule of the saved SAE, z = |x - b_dec| act((x - b_dec) / |x - b_dec| W_enc^T + b_enc)."""
    aip_ridge: float = 1e-6
    """aip: ridge on the second moment, relative to its mean eigenvalue."""
    aip_centred: bool = False
    """aip: whiten by the covariance instead of the second moment."""
    encoder_init: Literal["auto", "quarter", "scaled", "tied"] = "auto"
    """First encoder. scaled: the decoder's rows times the factor that fits the first rows best (Gao et al. 2024); quarter:
    a quarter of that, from which Adam's steps turn directions faster (docs/performance.md); tied: the rows themselves.
    auto: quarter where the largest k are kept, whatever their scale; scaled where thresholds or a penalty have one."""
    data: Literal["any", "fast"] = "any"
    """Data path that training insists on. fast: dialogues that each ran alone through the model (corpus mode dialogue),
    all their rows, template and position 0 included, mixed as activations (arXiv 2506.07691)."""
    d_model: int = 0
    """Width of the input."""
    hook: str = ""
    """Where the input lives, in TransformerLens names."""
    out_hook: str = ""
    """Transcoder: where the activations live that it predicts; empty: an SAE, which reconstructs its input."""
    d_out: int = 0
    """Width of the output of a transcoder; 0: an SAE."""
    model: str = ""
    """Name of the model."""
    model_sha: str = ""
    """sha256 of the model's weights."""
    name: str = ""
    """Short name for folders and plots; empty: made from activation, d_sae and k."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"([\w-][\w.-]{0,60})?", self.name, re.ASCII):
            raise UsageError(
                f"name {self.name!r} becomes a folder: give text of letters, digits, dots, dashes, underscores"
            )
        self._check_numbers()
        self._check_prefixes()
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.space not in SPACES:
            raise UsageError(f"space {self.space!r} is not one of {', '.join(SPACES)}")
        self._fill_l1()
        for field in ("auxk", "multi_topk", "l0", "l0_target", "separability", "threshold_init", "aip_ridge"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UsageError(f"{field} cannot be negative, got {getattr(self, field)}")
        if self.encoder_init not in ("auto", "quarter", "scaled", "tied"):
            raise UsageError(f"encoder_init must be auto, quarter, scaled or tied, got {self.encoder_init!r}")
        self._check_whole(1, "d_sae", "k_aux")
        self._check_whole(0, "k")
        self._check_moment("beta1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.sparsity_warmup <= 1:
            raise UsageError(f"sparsity_warmup is a share of the run, got {self.sparsity_warmup}")
        if not 0 < self.bandwidth < math.inf:
            raise UsageError(f"bandwidth must be above 0 or no threshold moves, got {self.bandwidth}")
        if self.data not in ("any", "fast"):
            raise UsageError(f"data is any or fast, got {self.data!r}")
        if self.out_hook and self.out_hook == self.hook:
            raise UsageError(f"out_hook is the input's own hook {self.hook}: leave it out to train an SAE")
        if (self.out_hook or self.d_out) and self.space not in ("raw", "scalar"):
            raise UsageError(f"space {self.space} is for SAEs: train a transcoder in raw or scalar space")
        self._check_gba()
        self._check_combination()

    def _check_prefixes(self) -> None:
        given = self.matryoshka
        found = tuple(given) if isinstance(given, Iterable) else (None,)
        if not all(isinstance(width, int) for width in found):
            raise UsageError(f"matryoshka must be a list of whole numbers, as in [256, 1024], got {given!r}")
        object.__setattr__(self, "matryoshka", found)

    def _fill_l1(self) -> None:
        """Turn an l1 of None into its number as soon as the width is known."""
        if self.l1 is None and self.activation not in TERMS["l1"]:
            raise UsageError(f"l1 is for {', '.join(TERMS['l1'])}, not for {self.activation}: leave it out")
        if self.l1 is None and self.space == "raw":
            raise UsageError("rows of space raw may have any norm: give l1 a number, or use scalar space")
        if self.l1 is None and self.width_out:
            norm = 1.0 if self.space == "unit" else math.sqrt(self.width_out)
            object.__setattr__(self, "l1", L1_OF_NORM * norm)
        if self.l1 is not None and not 0 <= self.l1 < math.inf:
            raise UsageError(f"l1 cannot be negative, got {self.l1}")

    def _check_gba(self) -> None:
        if self.bias_rule not in BIAS_RULES:
            raise UsageError(f"bias_rule {self.bias_rule!r} is not one of {', '.join(BIAS_RULES)}")
        if self.gba_sizes not in ("equal", "inverse"):
            raise UsageError(f"gba_sizes is equal or inverse, got {self.gba_sizes!r}")
        if self.gba_b_dec not in ("fixed", "trained"):
            raise UsageError(f"gba_b_dec is fixed or trained, got {self.gba_b_dec!r}")
        if self.gba_b_dec == "trained" and self.space == "unit":
            raise UsageError("space unit measures rows from a centre that stays: leave gba_b_dec fixed")
        for field in ("gba_gamma_up", "gba_gamma_down", "gba_freeze"):
            if not 0 <= getattr(self, field) < 1:
                raise UsageError(f"{field} is a share of 1, got {getattr(self, field)}")
        for field in ("gba_groups", "gba_every"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("gba_events", "gba_folds", "gba_eps", "gba_l0_budget"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UsageError(f"{field} cannot be negative, got {getattr(self, field)}")
        if not 0 < self.gba_ltf <= self.gba_htf < 1:
            raise UsageError(
                f"target frequencies fall from gba_htf to gba_ltf between 1 and 0, got {self.gba_htf} and {self.gba_ltf}"
            )
        if self.bias_rule != "gba":
            return
        if self.activation not in GBA_ACTIVATIONS:
            raise UsageError(
                f"bias_rule gba is for {' and '.join(GBA_ACTIVATIONS)}, not for {self.activation}"
            )
        terms = [t for t in TERMS if getattr(self, t)]
        if terms:
            raise UsageError(f"bias_rule gba has no sparsity or auxiliary term: leave out {', '.join(terms)}")
        if self.out_hook or self.d_out:
            raise UsageError("bias_rule gba ties decoder and encoder, a transcoder cannot: no out_hook")
        if self.gba_groups > self.d_sae:
            raise UsageError(
                f"gba_groups={self.gba_groups} is more than the {self.d_sae} latents: take fewer groups"
            )

    def _check_combination(self) -> None:
        """Refuse what the table of docs/architecture.md does not list."""
        if self.has_k and not 0 < self.k <= self.d_sae:
            raise UsageError(f"k must be between 1 and d_sae={self.d_sae}, got {self.k}")
        if not self.has_k and self.k:
            raise UsageError(f"{self.activation} has no k, its threshold decides: leave k out, got {self.k}")
        for term, kinds in TERMS.items():
            if getattr(self, term) and self.activation not in kinds:
                raise UsageError(f"{term} is for {', '.join(kinds)}, not for {self.activation}: leave it out")
        if self.multi_topk and self.matryoshka:
            raise UsageError("multi_topk and matryoshka prefixes both nest reconstructions: take one of them")
        if self.multi_topk and MULTI * self.k > self.d_sae:
            raise UsageError(
                f"multi_topk keeps {MULTI} k = {MULTI * self.k} latents, d_sae is {self.d_sae}: lower k"
            )
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
        if need and not getattr(self, need) and self.bias_rule != "gba":
            raise UsageError(f"{self.activation} needs {need} above 0 to become sparse: see presets")

    @property
    def has_k(self) -> bool:
        """Whether the number of active latents is set, on each row or on the mean row."""
        return self.activation in FIXED_K + BATCH_K

    @property
    def selected(self) -> int:
        """Latents that a step of training selects on a row, or on the mean row."""
        return self.k * (MULTI if self.multi_topk else 1)

    @property
    def fixed_k(self) -> bool:
        """Whether codes are `[B, k]`; otherwise their number varies from row to row."""
        return self.activation in FIXED_K

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold per latent is part of the weights."""
        return self.activation in (*BATCH_K, "jumprelu")

    @property
    def transcoder(self) -> bool:
        """Whether it predicts other activations than its input: b_dec belongs to the output alone."""
        return self.d_out > 0

    @property
    def width_out(self) -> int:
        """Width of what is reconstructed or predicted."""
        return self.d_out or self.d_model

    @property
    def signed(self) -> bool:
        """Whether activations can be negative."""
        return self.activation in ("abs_topk", "batch_abs_topk")

    @property
    def label(self) -> str:
        """`name`, or a name made from the architecture."""
        nested = "matryoshka-" if self.matryoshka else ""
        k = f"-k{self.k}" if self.has_k else ""
        rule = "" if self.bias_rule == "gradient" else f"{self.bias_rule}-"
        nested = "multi-" if self.multi_topk else nested
        kind = "-transcoder" if self.transcoder or self.out_hook else ""
        nested = f"fast-{nested}" if self.data == "fast" else nested
        return self.name or f"{nested}{rule}{self.activation.replace('_', '-')}{kind}-{self.d_sae}{k}"

    def aux_width(self) -> int:
        """Dead latents that AuxK may use on a row: `k_aux`, or the power of two nearest half the width of the output."""
        return self.k_aux or 2 ** max(0, round(math.log2(max(self.width_out / 2, 1.0))))
