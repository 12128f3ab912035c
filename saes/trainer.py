"""One SAE under training: its optimiser, dead latents, threshold and running metrics; saes/objectives.py has the loss.

The logged `fvu`, sum ||x_hat - x||^2 / sum ||x - x_mean||^2 over the rows since the last log, leaves out rows with more
than SINK_RATIO times the mean norm (`evaluate` reports it with and without them): attention sinks occur outside
position 0 too (norms a hundred times the rest). For the same reason V, the variance that sets the units of the loss,
is that of the first rows without the thousandth of largest norm.
The decoder rows are unit: their gradient is projected on the sphere's tangent before Adam, and they are
renormalised after it. Nothing in `step` waits for the device, except once every `dead_refresh_steps`, and where the
number of firing latents varies (its count sizes the tensors).
batch_*: theta follows the smallest kept |u| of each batch as a float64 moving average (rate THETA_RATE); `finish` checks
it on rows of the data and, where their mean L0 is more than 5 % off k, puts the threshold where it is k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saes.activations import training_step
from saes.config import BATCH_K, SAEConfig, TrainConfig
from saes.initialise import initialise
from saes.kernels import Dead, Scratch, StepOutput
from saes.metrics import SINK_RATIO
from saes.objectives import loss_terms
from saes.sae import SAE, fix_signs, fold_input_scale
from saes.screening import Screen, screening_gains
from saes.selection import DENSE_SHARE, above_threshold, threshold_for
from saes.sources import Moments

TRIM = 1000
THETA_RATE = 0.01
CHECK_ROWS = 4096
L0_TOLERANCE = 0.05


class Trainer:
    """The training state of one SAE. `sae` is in the space of training until `finish` folds it."""

    def __init__(self, cfg: SAEConfig, train: TrainConfig, moments: Moments, device: torch.device) -> None:
        cfg.check_trainable()
        self.cfg, self.train = cfg, train
        self.sae = SAE(cfg).to(device)
        self.scale = 1.0
        if cfg.space == "scalar":
            self.scale = math.sqrt(cfg.d_model) / max(moments.mean_norm, 1e-30)
        self.mean = torch.zeros(cfg.d_model, device=device)
        self.sink_norm = SINK_RATIO * moments.mean_norm * self.scale
        self.variance = 1.0
        betas = (train.beta1 if cfg.beta1 is None else cfg.beta1, train.beta2)
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=train.peak_lr(cfg.d_sae), betas=betas, eps=train.eps, fused=True
        )
        self.last_fired = torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        self.sign_sum = torch.zeros(cfg.d_sae, dtype=torch.float64, device=device)
        self.rows_seen = 0
        self.dead: Dead | None = None
        self.n_dead = 0
        self.screen = Screen(enabled=train.screen == "on")
        self.eps = 1.0
        self.theta = torch.full((), -1.0, dtype=torch.float64, device=device)
        self._scratch = Scratch()
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._sum_steps = 0

    def start(self, sample: Tensor) -> None:
        """Initialise from raw rows `[N, d_model]`; decide on screening by a probe where it is `auto`."""
        initialise(self.sae, sample * self.scale, seed=self.train.seed)
        usual = torch.linalg.vector_norm(sample * self.scale, dim=1) <= self.sink_norm
        self.mean = (sample[usual] * self.scale).mean(0)
        spread = ((sample * self.scale - self.sae.b_dec.detach()) ** 2).sum(1).sort().values
        self.variance = max(spread[: max(1, len(spread) - len(spread) // TRIM)].mean().item(), 1e-30)
        if self.cfg.activation == "jumprelu":
            self._start_threshold(sample)
        if self.train.screen == "auto" and self.cfg.fixed_k:
            self.screen.enabled = screening_gains(
                self.train.batch_size, self.cfg.d_model, self.cfg.d_sae, self.cfg.k, sample.device
            )

    @torch.no_grad()
    def _start_threshold(self, sample: Tensor) -> None:
        """Threshold and bandwidth in units of u, from the spread of the first pre-activations."""
        s = self.sae
        spread = ((sample[:1024] * self.scale - s.b_dec) @ s.W_enc.T + s.b_enc).std().item()
        s.threshold.fill_(self.cfg.threshold_init * spread)
        self.eps = self.cfg.bandwidth * spread

    def step(self, x: Tensor, step: int) -> None:
        """One optimiser step on raw rows x `[B, d_model]`."""
        x = x * self.scale
        for group in self.optimiser.param_groups:
            group["lr"] = self.train.lr_at(step, self.cfg.d_sae)
        s = self.sae
        # bfloat16 enters through the screen alone: its products are rescored in float32, so the step stays exact
        out = training_step(s, x, dead=self.dead, select=self.screen, eps=self.eps, scratch=self._scratch)
        terms = loss_terms(self.cfg, x, out, self.dead, self.variance, self._sparsity_weight(step))
        self.optimiser.zero_grad(set_to_none=True)
        terms.loss.backward()
        norm = self._project_and_clip()
        self.optimiser.step()
        with torch.no_grad():
            s.W_dec.div_(torch.linalg.vector_norm(s.W_dec, dim=1, keepdim=True).clamp_min(1e-12))
            if self.cfg.activation == "jumprelu":
                s.threshold.clamp_min_(0.0)
            self._track(out, len(x), step)
            fired = (out.values != 0).sum() / len(x)
            usual = torch.linalg.vector_norm(x, dim=1) <= self.sink_norm
            error = torch.where(usual, terms.errors, 0.0).sum()
            spread = torch.where(usual, ((x - self.mean) ** 2).sum(1), 0.0).sum()
            self._sums += torch.stack([error, spread, terms.auxk, fired, norm, terms.sparsity]).double()
            self._sum_steps += 1

    def _sparsity_weight(self, step: int) -> float:
        """Share of l1 or l0 that counts at this step: linear warm-up."""
        return min(1.0, (step + 1) / max(1.0, self.cfg.sparsity_warmup * self.train.steps))

    @torch.no_grad()
    def _project_and_clip(self) -> Tensor:
        """Remove the radial part of the decoder gradient, then scale all gradients to norm <= grad_clip."""
        w, g = self.sae.W_dec, self.sae.W_dec.grad
        assert g is not None
        radial = torch.einsum("fd,fd->f", g, w)
        g.addcmul_(radial[:, None], w, value=-1)
        grads = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in grads]))
        if self.train.grad_clip > 0:
            factor = (self.train.grad_clip / (norm + 1e-6)).clamp_max(1.0)
            torch._foreach_mul_(grads, factor)
        return norm

    @torch.no_grad()
    def _track(self, out: StepOutput, rows: int, step: int) -> None:
        self.rows_seen += rows
        fires = out.values != 0
        if out.indices is None:
            self.last_fired = torch.where(fires.any(0), self.rows_seen, self.last_fired)
        else:
            # a stored latent whose value is 0 did not fire: it goes to a slot past the end
            ids = torch.where(fires, out.indices, self.cfg.d_sae).reshape(-1)
            padded = torch.cat([self.last_fired, self.last_fired.new_zeros(1)])
            self.last_fired = padded.index_fill_(0, ids, self.rows_seen)[:-1]
            if self.cfg.signed:
                self.sign_sum.index_add_(0, out.indices.reshape(-1), out.values.reshape(-1).double())
        if self.cfg.activation in BATCH_K and fires.numel():
            smallest = torch.where(fires, out.values.abs(), torch.inf).min().double()
            moved = torch.where(self.theta < 0, smallest, torch.lerp(self.theta, smallest, THETA_RATE))
            self.theta = torch.where(smallest.isfinite(), moved, self.theta)
        if self.cfg.auxk > 0 and (step + 1) % self.train.dead_refresh_steps == 0:
            self.refresh_dead()

    def refresh_dead(self) -> None:
        """List the latents that have been silent for the dead window (in rows)."""
        ids = (self.rows_seen - self.last_fired > self.train.dead_window()).nonzero().flatten()
        self.n_dead = len(ids)
        self.dead = Dead(ids, min(self.cfg.aux_width(), len(ids))) if len(ids) else None

    @property
    def running_sums(self) -> Tensor:
        """Sums since the last `metrics()`; not finite once a step has gone wrong."""
        return self._sums

    def metrics(self) -> dict[str, float]:
        """Over the steps since the last call: fvu, means of auxk, l0, grad_norm, sparsity; and n_dead. Waits."""
        error, spread, aux, l0, norm, sparsity = (self._sums / max(self._sum_steps, 1)).tolist()
        self._sums.zero_()
        self._sum_steps = 0
        fvu = error / max(spread, 1e-30)
        means = {"auxk": aux, "l0": l0, "grad_norm": norm, "sparsity": sparsity}
        return {"fvu": fvu} | means | {"n_dead": float(self.n_dead)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a bit-exact resume needs, by name."""
        out = {n: p.detach() for n, p in self.sae.named_parameters()}
        for name, p in self.sae.named_parameters():
            state = self.optimiser.state.get(p, {})
            out |= {
                f"{name}.{key}": torch.as_tensor(state[key])
                for key in ("step", "exp_avg", "exp_avg_sq")
                if state
            }
        dead = self.dead.ids if self.dead is not None else self.last_fired.new_zeros(0)
        more = {
            "last_fired": self.last_fired,
            "sign_sum": self.sign_sum,
            "sums": self._sums,
            "mean": self.mean,
            "theta": self.theta,
        }
        return out | more | {"dead": dead}

    def state(self) -> dict[str, Any]:
        return {
            "rows_seen": self.rows_seen,
            "scale": self.scale,
            "variance": self.variance,
            "eps": self.eps,
            "sum_steps": self._sum_steps,
            "screen": self.screen.state(),
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from `tensors()` and `state()`."""
        device = self.last_fired.device
        with torch.no_grad():
            for name, p in self.sae.named_parameters():
                p.copy_(tensors[name])
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{k}" in tensors]
                if keys:
                    self.optimiser.state[p] = {k: tensors[f"{name}.{k}"].to(device).clone() for k in keys}
        self.last_fired = tensors["last_fired"].to(device).clone()
        self.sign_sum = tensors["sign_sum"].to(device).clone()
        self._sums = tensors["sums"].to(device).clone()
        self.mean = tensors["mean"].to(device).clone()
        self.theta = tensors["theta"].to(device).clone()
        ids = tensors["dead"].to(device).clone()
        self.n_dead = len(ids)
        self.dead = Dead(ids, min(self.cfg.aux_width(), len(ids))) if len(ids) else None
        self.rows_seen, self._sum_steps = state["rows_seen"], state["sum_steps"]
        self.scale, self.variance, self.eps = state["scale"], state["variance"], state["eps"]
        self.screen.load_state(state["screen"])

    @property
    def checks_threshold(self) -> bool:
        """Whether `finish` needs rows: a threshold that no gradient trained is compared with k on data."""
        return self.cfg.activation in BATCH_K

    def finish(self, sample: Tensor | None = None) -> SAE:
        """The folded SAE: raw activations in, codes in their units, + the commoner sign of a two-sided latent.

        sample: raw training rows `[N, d_model]`, where `checks_threshold`.
        """
        if self.checks_threshold and sample is not None:
            self._finish_threshold(sample[:CHECK_ROWS] * self.scale)
        fold_input_scale(self.sae, self.scale)
        if self.cfg.signed:
            fix_signs(self.sae, torch.where(self.sign_sum < 0, -1.0, 1.0).to(self.sae.W_dec.dtype))
        return self.sae.requires_grad_(False)

    @torch.no_grad()
    def _finish_threshold(self, x: Tensor) -> None:
        """The moving average, or, where the mean L0 of x at it is not k within L0_TOLERANCE, the value where it is."""
        s, k = self.sae, self.cfg.k
        weights = (x - s.b_dec, s.W_enc, s.b_enc)
        s.threshold.fill_(self.theta.clamp_min(0.0))
        found = above_threshold(*weights, s.threshold, signed=self.cfg.signed, dense_share=DENSE_SHARE)
        if found is None or abs(len(found.values) / len(x) - k) > L0_TOLERANCE * k:
            s.threshold.fill_(threshold_for(*weights, k, signed=self.cfg.signed))
