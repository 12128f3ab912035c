"""The bias rule "gba": group bias adaptation (arXiv 2506.14002). Biases are set from firing rates, not by gradient.

    x_hat = sum_m a_m w_m phi(w_m (x - b_dec) + b_m) + b_dec,   |w_m| = 1, a_m trained, loss |x_hat - x|^2 alone
    p_k = HTF (LTF / HTF)^(k / (K - 1)), k = 0..K-1: target frequency of group k; after each window of rows, with
    p = share of them on which m fired, r = max(0, its largest pre-activation), r_mean = mean r > 0 of its group:
        p > p_k:   b <- max(b - gamma_down r, -span)           p < eps:   b <- min(b + gamma_up r_mean, 0)
    phi un-shifted (activation jumprelu): passes w (x - b_dec) where it is above -b; shifted (relu): adds b.

In between, b stays: p_k bounds the frequency from above, and sum_k M_k p_k bounds L0 once the rule has converged. b_dec
is the geometric median of the rows and stays (`gba_b_dec` "trained": starts there); span is the mean norm of a centred row (1 in space `unit`). A window
holds `gba_events` / p_k rows (at most a twentieth of the run), so rare groups wait longer. Counts and maxima run on; pre-activations are never
kept. Time constants: the paper takes gamma = 0.01 every 50 steps over some 200,000; a run too short for that takes
larger or more frequent steps, so that an over-active latent's head-room can still shrink by e^`gba_folds`. The step of
a window of W steps is 1 - e^(-rate W).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.errors import UsageError
from saes.config import SAEConfig
from saes.kernels import StepOutput
from saes.train_config import TrainConfig

TOP_FREQUENCY = 0.5
CONVERGED = 0.05


class Groups(NamedTuple):
    """Target frequency and number of latents of each group, the most frequent first; latents stand in that order."""

    targets: list[float]
    sizes: list[int]

    @property
    def l0_bound(self) -> float:
        """L0 of the mean row if every latent fired at its target: the most that a converged rule allows."""
        return math.fsum(p * m for p, m in zip(self.targets, self.sizes, strict=True))

    @property
    def top_share(self) -> float:
        """Share of the bound that is the first group's."""
        return self.targets[0] * self.sizes[0] / self.l0_bound

    def per_latent(self) -> Tensor:
        """Target frequency of each latent, float64 `[d_sae]`."""
        return torch.tensor(self.targets, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def __str__(self) -> str:
        return (
            f"{len(self.sizes)} groups, target frequencies {self.targets[0]:.3g} to {self.targets[-1]:.3g}: L0 at most "
            f"{self.l0_bound:.1f} once converged, {self.top_share:.0%} of it from the {self.sizes[0]} latents on top"
        )


def groups_of(cfg: SAEConfig) -> Groups:
    """Groups of a config; with `gba_l0_budget`, HTF is chosen so that the bound on L0 is the budget."""
    if not cfg.gba_l0_budget:
        return _groups(cfg, cfg.gba_htf)
    low, high = cfg.gba_ltf, TOP_FREQUENCY
    if not _groups(cfg, low).l0_bound <= cfg.gba_l0_budget <= _groups(cfg, high).l0_bound:
        raise UsageError(
            f"gba_l0_budget={cfg.gba_l0_budget:g} is out of reach: {cfg.d_sae} latents in {cfg.gba_groups} groups down to "
            f"gba_ltf={cfg.gba_ltf:g} give {_groups(cfg, low).l0_bound:.3g} to {_groups(cfg, high).l0_bound:.3g}"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _groups(cfg, middle).l0_bound < cfg.gba_l0_budget else (low, middle)
    return _groups(cfg, high)


def _groups(cfg: SAEConfig, htf: float) -> Groups:
    n = cfg.gba_groups
    targets = [htf * (cfg.gba_ltf / htf) ** (k / (n - 1)) for k in range(n)] if n > 1 else [htf]
    weights = [1 / p for p in targets] if cfg.gba_sizes == "inverse" else [1.0] * n
    # one latent for every group, the rest by weight; what rounding leaves over goes to the rare groups
    edges = [round((cfg.d_sae - n) * sum(weights[:k]) / sum(weights)) for k in range(n + 1)]
    return Groups(targets, [b - a + 1 for a, b in pairwise(edges)])


class Rates(NamedTuple):
    """Of each group: steps between two updates, and the share of the head-room that one update takes or gives."""

    windows: list[int]
    down: list[float]
    up: list[float]
    stop: int
    """First step without updates: biases are final for the statistics of what follows."""


def rates_of(cfg: SAEConfig, train: TrainConfig, groups: Groups) -> Rates:
    """Windows and steps of the rule for a run of this length."""
    stop = max(1, math.floor(train.steps * (1 - cfg.gba_freeze)))
    fold = cfg.gba_folds / stop
    longest = max(1, stop // 20)
    windows = []
    for p in groups.targets:
        enough = math.ceil(cfg.gba_events / (p * train.batch_size))
        # the paper's 50 steps where the run has room for 2,000 windows of them
        windows.append(min(longest, max(enough, 1, min(cfg.gba_every, stop // 2000))))

    def steps(gamma: float) -> list[float]:
        rate = max(-math.log1p(-gamma) / cfg.gba_every, fold)
        return [-math.expm1(-rate * w) for w in windows]

    return Rates(windows, steps(cfg.gba_gamma_down), steps(cfg.gba_gamma_up), stop)


class GroupBias:
    """Running firing counts and maxima of one SAE under training, and the update of its biases."""

    def __init__(self, cfg: SAEConfig, train: TrainConfig, device: torch.device) -> None:
        self.cfg, self.batch = cfg, train.batch_size
        self.groups = groups_of(cfg)
        self.rates = rates_of(cfg, train, self.groups)
        self.edges = [0, *torch.tensor(self.groups.sizes).cumsum(0).tolist()]
        self.counts = torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        self.peaks = torch.zeros(cfg.d_sae, device=device)
        # last mean head-room of each group; 0: none of its latents has fired yet
        self.room = torch.zeros(len(self.groups.sizes), device=device)
        self.span = 1.0

    def prepare(self, sae: Any) -> None:
        """Give an SAE the parameter a_m (`gain`), and take the tied decoder and the biases from the optimiser."""
        sae.gain = torch.nn.Parameter(torch.ones_like(sae.b_enc))
        fixed = ("b_dec",) if self.cfg.gba_b_dec == "fixed" else ()
        for name in ("W_dec", "b_enc", "threshold", *fixed):
            if hasattr(sae, name):
                getattr(sae, name).requires_grad_(False)

    @torch.no_grad()
    def start(self, sae: Any, x: Tensor) -> None:
        """b = 0, unit w, and a where the first reconstruction of rows x `[N, d_model]` of training has its best scale.

        With `encoder_init` tied, a = 1.
        """
        size = torch.linalg.vector_norm(sae.W_enc, dim=1)
        sae.gain.copy_(size)
        sae.W_enc.div_(size[:, None])
        self.span = torch.linalg.vector_norm(x - sae.b_dec, dim=1).mean().item()

    @torch.no_grad()
    def finish(self, sae: Any) -> None:
        """Untie: decoder rows a_m w_m, which is what is saved."""
        sae.W_dec.copy_(sae.gain[:, None] * sae.W_enc)
        del sae.gain

    @torch.no_grad()
    def after_step(self, sae: Any, out: StepOutput, step: int, usual: Tensor) -> None:
        """Count the firings of step `step` (0-based), and move the biases of the groups whose window ends with it.

        usual: of each row `[B]`, whether it counts. One attention sink of a hundred times the mean norm would be the
        maximum of most latents and send their biases to the clamp, where its own firings would hold them.
        """
        self._observe(out, usual, sae.threshold if self.cfg.activation == "jumprelu" else None)
        if step >= self.rates.stop:
            return
        for k, window in enumerate(self.rates.windows):
            if (step + 1) % window == 0:
                self._update(sae, k, window * self.batch)

    def _observe(self, out: StepOutput, usual: Tensor, threshold: Tensor | None) -> None:
        """Add a batch to the counts and maxima of y = u - threshold (un-shifted) or y = u (shifted)."""
        if out.indices is None:
            y = out.values if threshold is None else (out.values - threshold)
            self.counts += ((out.values > 0) & usual[:, None]).sum(0)
            self.peaks = torch.maximum(self.peaks, torch.where(usual[:, None], y, 0.0).amax(0))
            return
        assert out.offsets is not None, "codes of varying L0 have offsets"
        counted = usual.repeat_interleave(out.offsets.diff(), output_size=len(out.indices))
        y = out.values if threshold is None else out.values - threshold[out.indices]
        self.counts.index_add_(0, out.indices, counted.long())
        self.peaks.scatter_reduce_(0, out.indices, torch.where(counted, y, 0.0), "amax")

    def _update(self, sae: Any, k: int, rows: int) -> None:
        at = slice(self.edges[k], self.edges[k + 1])
        frequency, r = self.counts[at] / rows, self.peaks[at]
        fired = (r > 0).sum()
        self.room[k] = torch.where(fired > 0, r.sum() / fired.clamp_min(1), self.room[k])
        known = (self.room > 0).sum()
        others = torch.where(known > 0, self.room.sum() / known.clamp_min(1), self.span)
        room = torch.where(self.room[k] > 0, self.room[k], others)
        b = bias_of(sae)[at]
        lower = (b - self.rates.down[k] * r).clamp_min(-self.span)
        higher = (b + self.rates.up[k] * room).clamp_max(0.0)
        new = torch.where(frequency > self.groups.targets[k], lower, b)
        set_bias(sae, at, torch.where(frequency < self.cfg.gba_eps, higher, new))
        self.counts[at] = 0
        self.peaks[at] = 0

    def record(self, steps: int | None = None) -> dict[str, Any]:
        """For run.json: groups and bound; after `steps` steps, the share of latents still above their target."""
        g = self.groups
        out = {"targets": g.targets, "sizes": g.sizes, "l0_bound": g.l0_bound, "top_share": g.top_share}
        out |= {"windows": self.rates.windows, "span": self.span}
        return out if steps is None else out | {"over_target": self.over_target(steps)}

    def over_target(self, steps: int) -> float:
        """Of the firings since the last update, at the end of a run: while biases stood still."""
        frequency = torch.zeros(self.cfg.d_sae, dtype=torch.float64)
        rows = steps * self.batch
        for k, window in enumerate(self.rates.windows):
            at = slice(self.edges[k], self.edges[k + 1])
            since = max(1, steps - self.rates.stop // window * window) * self.batch
            frequency[at] = self.counts[at].double().cpu() / since
            rows = min(rows, since)
        return over_target(self.cfg, frequency, rows=rows)

    def tensors(self) -> dict[str, Tensor]:
        """What a bit-exact resume needs beside the SAE's own tensors, by name."""
        return {"gba_counts": self.counts, "gba_peaks": self.peaks, "gba_room": self.room}

    def load(self, tensors: dict[str, Tensor], span: float) -> None:
        """Go on from `tensors()` and `span`."""
        device = self.counts.device
        self.counts = tensors["gba_counts"].to(device).clone()
        self.peaks = tensors["gba_peaks"].to(device).clone()
        self.room = tensors["gba_room"].to(device).clone()
        self.span = span


def bias_of(sae: Any) -> Tensor:
    """b `[d_sae]` <= 0 of an SAE under this rule: minus the threshold (un-shifted), or b_enc (shifted)."""
    return (-sae.threshold if sae.cfg.activation == "jumprelu" else sae.b_enc).detach()


@torch.no_grad()
def set_bias(sae: Any, at: slice, b: Tensor) -> None:
    if sae.cfg.activation == "jumprelu":
        sae.threshold[at] = -b
    else:
        sae.b_enc[at] = b


def over_target(cfg: SAEConfig, frequency: Tensor, *, rows: int) -> float:
    """Share of latents that fire more often than their target, past the noise of a sample of that many rows.

    frequency `[d_sae]`. Claims about target frequencies hold for a converged rule only: below CONVERGED.
    """
    p = groups_of(cfg).per_latent()
    noise = 2 * torch.sqrt(p * (1 - p) / rows)
    return (frequency.double().cpu() > p + noise).double().mean().item()


def warning(label: str, record: dict[str, Any]) -> str | None:
    """One line where the rule has not converged: L0 may then exceed its bound."""
    if record["over_target"] < CONVERGED:
        return None
    return (
        f"{label}: {record['over_target']:.0%} of the latents still fire more often than their target: train longer, or "
        "raise gba_folds"
    )
