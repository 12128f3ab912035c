"""One SAE under training: the loss of a step, its optimiser, dead latents and running metrics.

    loss = sum ||x_hat - x||^2 / (B V) + auxk * s * sum ||e_hat - e||^2 / sum ||e - e_mean||^2,   e = x - x_hat (detached)

V is the variance of the first rows without the thousandth of largest norm: attention sinks occur outside position
0 too (norms a hundred times the rest), and a handful would otherwise set the units of the run. For the same reason the
logged `fvu`, sum ||x_hat - x||^2 / sum ||x - x_mean||^2 over the rows since the last log, leaves out rows with more
than SINK_RATIO times the mean norm (`evaluate` reports it with and without them). s = min(1, n_dead / k_aux).
The decoder rows are unit: their gradient is projected on the sphere's tangent before Adam, and they are
renormalised after it. Nothing in `step` waits for the device, except once every `dead_refresh_steps`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saes.config import SAEConfig, TrainConfig
from saes.initialise import initialise
from saes.kernels import Dead, StepOutput, sparse_step
from saes.metrics import SINK_RATIO
from saes.sae import SAE, fix_signs, fold_input_scale
from saes.screening import Screen, screening_gains
from saes.sources import Moments

TRIM = 1000
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class Trainer:
    """The training state of one SAE. `sae` is in the space of training until `finish` folds it."""

    def __init__(self, cfg: SAEConfig, train: TrainConfig, moments: Moments, device: torch.device) -> None:
        self.cfg, self.train = cfg, train
        self.sae = SAE(cfg).to(device)
        self.scale = 1.0
        if cfg.space == "scalar":
            self.scale = math.sqrt(cfg.d_model) / max(moments.mean_norm, 1e-30)
        self.mean = torch.zeros(cfg.d_model, device=device)
        self.sink_norm = SINK_RATIO * moments.mean_norm * self.scale
        self.variance = 1.0
        betas = (train.beta1, train.beta2)
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=train.peak_lr(cfg.d_sae), betas=betas, eps=train.eps, fused=True
        )
        self.last_fired = torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        self.sign_sum = torch.zeros(cfg.d_sae, dtype=torch.float64, device=device)
        self.rows_seen = 0
        self.dead: Dead | None = None
        self.n_dead = 0
        self.screen = Screen(enabled=train.screen == "on")
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._sum_steps = 0

    def start(self, sample: Tensor) -> None:
        """Initialise from raw rows `[N, d_model]`; decide on screening by a probe where it is `auto`."""
        initialise(self.sae, sample * self.scale, seed=self.train.seed)
        usual = torch.linalg.vector_norm(sample * self.scale, dim=1) <= self.sink_norm
        self.mean = (sample[usual] * self.scale).mean(0)
        spread = ((sample * self.scale - self.sae.b_dec.detach()) ** 2).sum(1).sort().values
        self.variance = max(spread[: max(1, len(spread) - len(spread) // TRIM)].mean().item(), 1e-30)
        if self.train.screen == "auto":
            self.screen.enabled = screening_gains(
                self.train.batch_size, self.cfg.d_model, self.cfg.d_sae, self.cfg.k, sample.device
            )

    def step(self, x: Tensor, step: int) -> None:
        """One optimiser step on raw rows x `[B, d_model]`."""
        x = x * self.scale
        for group in self.optimiser.param_groups:
            group["lr"] = self.train.lr_at(step, self.cfg.d_sae)
        s = self.sae
        # bfloat16 enters through the screen alone: its products are rescored in float32, so the step stays exact
        out = sparse_step(
            x, s.W_enc, s.b_enc, s.W_dec, s.b_dec,
            k=self.cfg.k, signed=self.cfg.signed, dead=self.dead, select=self.screen,
        )  # fmt: skip
        errors, aux = self._losses(x, out)
        self.optimiser.zero_grad(set_to_none=True)
        (errors.sum() / (len(x) * self.variance) + self.cfg.auxk * aux).backward()
        norm = self._project_and_clip()
        self.optimiser.step()
        with torch.no_grad():
            s.W_dec.div_(torch.linalg.vector_norm(s.W_dec, dim=1, keepdim=True).clamp_min(1e-12))
            self._track(out, len(x), step)
            fired = (out.values != 0).sum() / len(x)
            usual = torch.linalg.vector_norm(x, dim=1) <= self.sink_norm
            error = torch.where(usual, errors.detach(), 0.0).sum()
            spread = torch.where(usual, ((x - self.mean) ** 2).sum(1), 0.0).sum()
            self._sums += torch.stack([error, spread, aux.detach(), fired, norm]).double()
            self._sum_steps += 1

    def _losses(self, x: Tensor, out: StepOutput) -> tuple[Tensor, Tensor]:
        """Squared error of each row `[B]`, and the AuxK term (0 without dead latents)."""
        error = out.x_hat - x
        errors = (error**2).sum(1)
        if self.dead is None:
            return errors, errors.new_zeros(())
        e = -error.detach()
        spread = ((e - e.mean(0)) ** 2).sum().clamp_min(1e-30)
        share = min(1.0, len(self.dead.ids) / self.cfg.aux_width())
        return errors, share * ((out.e_hat - e) ** 2).sum() / spread

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
        # a selected latent whose value is 0 did not fire: it goes to a slot past the end
        ids = torch.where(out.values != 0, out.indices, self.cfg.d_sae).reshape(-1)
        padded = torch.cat([self.last_fired, self.last_fired.new_zeros(1)])
        self.last_fired = padded.index_fill_(0, ids, self.rows_seen)[:-1]
        if self.cfg.signed:
            self.sign_sum.index_add_(0, out.indices.reshape(-1), out.values.reshape(-1).double())
        if self.cfg.auxk > 0 and (step + 1) % self.train.dead_refresh_steps == 0:
            self.refresh_dead()

    def refresh_dead(self) -> None:
        """List the latents that have been silent for the dead window (in rows)."""
        ids = (self.rows_seen - self.last_fired > self.train.dead_window()).nonzero().flatten()
        self.n_dead = len(ids)
        self.dead = Dead(ids, min(self.cfg.aux_width(), len(ids))) if len(ids) else None

    def metrics(self) -> dict[str, float]:
        """Over the steps since the last call: fvu, means of auxk, l0, grad_norm; and n_dead. Waits for the device."""
        error, spread, aux, l0, norm = (self._sums / max(self._sum_steps, 1)).tolist()
        self._sums.zero_()
        self._sum_steps = 0
        fvu = error / max(spread, 1e-30)
        return {"fvu": fvu, "auxk": aux, "l0": l0, "grad_norm": norm, "n_dead": float(self.n_dead)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a bit-exact resume needs, by name."""
        out = {n: getattr(self.sae, n).detach() for n in _NAMES}
        for name in _NAMES:
            state = self.optimiser.state.get(getattr(self.sae, name), {})
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
        }
        return out | more | {"dead": dead}

    def state(self) -> dict[str, Any]:
        return {
            "rows_seen": self.rows_seen,
            "scale": self.scale,
            "variance": self.variance,
            "sum_steps": self._sum_steps,
            "screen": self.screen.state(),
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from `tensors()` and `state()`."""
        device = self.last_fired.device
        with torch.no_grad():
            for name in _NAMES:
                p = getattr(self.sae, name)
                p.copy_(tensors[name])
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{k}" in tensors]
                if keys:
                    self.optimiser.state[p] = {k: tensors[f"{name}.{k}"].to(device).clone() for k in keys}
        self.last_fired = tensors["last_fired"].to(device).clone()
        self.sign_sum = tensors["sign_sum"].to(device).clone()
        self._sums = tensors["sums"].to(device).clone()
        self.mean = tensors["mean"].to(device).clone()
        ids = tensors["dead"].to(device).clone()
        self.n_dead = len(ids)
        self.dead = Dead(ids, min(self.cfg.aux_width(), len(ids))) if len(ids) else None
        self.rows_seen, self._sum_steps = state["rows_seen"], state["sum_steps"]
        self.scale, self.variance = state["scale"], state["variance"]
        self.screen.load_state(state["screen"])

    def finish(self) -> SAE:
        """The folded SAE: raw activations in, codes in their units, + the commoner sign of a two-sided latent."""
        fold_input_scale(self.sae, self.scale)
        if self.cfg.signed:
            fix_signs(self.sae, torch.where(self.sign_sum < 0, -1.0, 1.0).to(self.sae.W_dec.dtype))
        return self.sae.requires_grad_(False)
