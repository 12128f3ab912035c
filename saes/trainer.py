"""One SAE under training: its optimiser, dead latents, threshold and running metrics; saes/objectives.py has the loss.

The logged `fvu`, sum ||x_hat - x||^2 / sum ||x - x_mean||^2 over the rows since the last log, leaves out rows with more
than SINK_RATIO times the mean norm (`evaluate` reports it with and without them): attention sinks occur outside
position 0 too (norms a hundred times the rest). For the same reason V, the variance that sets the units of the loss,
is that of the first rows without the thousandth of largest norm.
The decoder rows are unit: their gradient is projected on the sphere's tangent before Adam, and they are
renormalised after it. Nothing in `step` waits for the device, except once every `dead_refresh_steps`, and where the
number of firing latents, or of those that a screen computes, varies (its count sizes the tensors).
batch_*: theta follows the smallest kept |u| of each batch as a float64 moving average (rate THETA_RATE); `finish` checks
it on rows of the data and, where their mean L0 is more than 5 % off k, puts the threshold where it is k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from saes.activations import training_step, unit_rows
from saes.aip import AIP
from saes.config import BATCH_K, SAEConfig
from saes.gba import GroupBias
from saes.gradients import GradientBuffers
from saes.initialise import MEDIAN_ROWS, geometric_median, initialise
from saes.kernels import Dead, StepOutput
from saes.metrics import SINK_RATIO
from saes.objectives import loss_terms
from saes.sae import SAE, fix_signs, fold_input_scale, fold_transcoder, fold_whitening
from saes.screening import Screen, screening_gains
from saes.selection import DENSE_SHARE, above_threshold, threshold_for
from saes.separability import nearest_atoms, separability
from saes.sources import Moments
from saes.top_products import Scratch
from saes.train_config import TrainConfig

TRIM = 1000
THETA_RATE = 0.01
CHECK_ROWS = 4096
L0_TOLERANCE = 0.05


class Trainer:
    """The training state of one SAE. `sae` is in the space of training until `finish` folds it."""

    def __init__(
        self,
        cfg: SAEConfig,
        train: TrainConfig,
        moments: Moments,
        device: torch.device,
        target: Moments | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """moments: of the input rows; target: of what a transcoder predicts; scratch: buffers of a step, which trainers that
        step one after the other share. Space `aip` needs `whiten` before `start`."""
        cfg.check_trainable()
        self.cfg, self.train = cfg, train
        self.sae = SAE(cfg).to(device)
        self.scale = 1.0
        if cfg.space == "scalar":
            self.scale = math.sqrt(cfg.d_model) / max(moments.mean_norm, 1e-30)
        self.scale_out = self.scale
        if cfg.space == "scalar" and target is not None:
            self.scale_out = math.sqrt(cfg.d_out) / max(target.mean_norm, 1e-30)
        # a transcoder has no b_dec on its input: this is subtracted from it instead, and folded into b_enc
        self.shift = torch.zeros(cfg.d_model, device=device)
        self.mean = torch.zeros(cfg.width_out, device=device)
        self.sink_norm = SINK_RATIO * (target or moments).mean_norm * self.scale_out
        self.variance = 1.0
        self.bias = GroupBias(cfg, train, device) if cfg.bias_rule == "gba" else None
        if self.bias is not None:
            self.bias.prepare(self.sae)
        if cfg.bias_rule == "frozen":
            for name in ("b_enc", "b_mag"):
                if hasattr(self.sae, name):
                    getattr(self.sae, name).requires_grad_(False)
        if cfg.space == "unit":
            # the centre of the rows, found at the start, stands for it; the rule of the saved SAE needs it as b_dec
            self.sink_norm = SINK_RATIO
            self.sae.b_dec.requires_grad_(False)
        self.aip: AIP | None = None
        self.nearest: Tensor | None = None
        betas = (train.beta1 if cfg.beta1 is None else cfg.beta1, train.beta2)
        self.optimiser = torch.optim.Adam(
            [p for p in self.sae.parameters() if p.requires_grad],
            lr=train.peak_lr(cfg.d_sae, cfg.lr),
            betas=betas,
            eps=train.eps,
            fused=True,
        )
        self.last_fired = torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        self.sign_sum = torch.zeros(cfg.d_sae, dtype=torch.float64, device=device)
        self.rows_seen = 0
        self.dead: Dead | None = None
        self._scratch = scratch or Scratch()
        self.screen = Screen(enabled=train.screen == "on", scratch=self._scratch)
        self.half = train.autocast == "on" or (train.autocast == "auto" and device.type == "cuda")
        self.eps = 1.0
        self.theta = torch.full((), -1.0, dtype=torch.float64, device=device)
        # where W_enc and W_dec have no gradient but that of the step (a tied decoder and separability have)
        tied = cfg.bias_rule == "gba" or cfg.separability > 0
        self._into = None if tied else GradientBuffers(self.sae.W_enc, self.sae.W_dec, self._scratch)
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._sum_steps = 0
        # of these steps, those until the first whose loss or gradient is not finite
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    def whiten(self, aip: AIP) -> None:
        """Train in the space of this AIP: E||x||^2 = d_model, and more where a centred one leaves the rows their mean."""
        self.aip, self._root = aip, aip.root.float().to(self.mean.device)
        self.sink_norm = SINK_RATIO * math.sqrt(aip.record.get("mean_square_norm", self.cfg.d_model))

    def start(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Initialise from raw rows `[N, d_model]`; decide on screening where it is `auto`.

        target: raw rows `[N, d_out]` that a transcoder predicts from them.
        """
        if self.cfg.space == "aip" and self.aip is None:
            raise UsageError("space aip needs the second moment of the rows: call whiten before start")
        if target is not None:
            self.shift = geometric_median((sample * self.scale)[:MEDIAN_ROWS])
        if self.cfg.space == "unit":
            self.shift = geometric_median(sample[:MEDIAN_ROWS])
        x, y = self._rows(sample, target)
        initialise(self.sae, x, seed=self.train.seed, target=None if target is None else y)
        if self.cfg.space == "unit":
            self.sae.b_dec.detach().zero_()
        usual = torch.linalg.vector_norm(y, dim=1) <= self.sink_norm
        if not usual.any():
            raise DataError(
                f"every one of the first {len(y):,} rows is more than {SINK_RATIO:g} times as long as the mean row: the first "
                "rows of this store are not like the rest"
            )
        if self.bias is not None:
            self.bias.start(self.sae, x[usual])
        self.mean = y[usual].mean(0)
        spread = ((y - self.sae.b_dec.detach()) ** 2).sum(1).sort().values
        # where position 0 is trained on, sinks are more than a thousandth of the rows
        kept = max(1, min(len(spread) - len(spread) // TRIM, int(usual.sum())))
        self.variance = max(spread[:kept].mean().item(), 1e-30)
        if self.cfg.activation == "jumprelu" and self.bias is None:
            self._start_threshold(x[usual])
        if self.train.screen == "auto":
            self.screen.enabled = screening_gains(self.cfg, sample.device)

    def _rows(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Input and wanted output in the space of training, of raw rows: the same rows twice but for a transcoder."""
        if self.cfg.space == "unit":
            x = unit_rows(x - self.shift)[0]
            return x, x
        x = x * self.scale if self.aip is None else x @ self._root
        return (x, x) if target is None else (x - self.shift, target * self.scale_out)

    def input_rows(self, x: Tensor) -> Tensor:
        """Raw rows as the encoder of training takes them."""
        x = self._rows(x, None)[0]
        return x - self.shift if self.cfg.transcoder else x

    @torch.no_grad()
    def _start_threshold(self, x: Tensor) -> None:
        """Threshold and bandwidth in units of u, from the spread of the first pre-activations."""
        s = self.sae
        spread = ((x[:1024] - s.centre) @ s.W_enc.T + s.b_enc).std().item()
        s.threshold.fill_(self.cfg.threshold_init * spread)
        self.eps = self.cfg.bandwidth * spread

    def step(self, x: Tensor, step: int, target: Tensor | None = None) -> None:
        """One optimiser step on raw rows x `[B, d_model]`, and the `[B, d_out]` that a transcoder predicts from them."""
        x, y = self._rows(x, target)
        for group in self.optimiser.param_groups:
            group["lr"] = self.train.lr_at(step, self.cfg.d_sae, self.cfg.lr)
        s = self.sae
        # the screen rescores its products in float32, and AuxK is an auxiliary term
        coarse = self.screen.enabled or self.half
        dead = None if self.dead is None else self.dead._replace(coarse=coarse)
        out = training_step(
            s, x, dead=dead, select=self.screen, eps=self.eps, scratch=self._scratch, into=self._into,
            half=self.half,
        )  # fmt: skip
        terms = loss_terms(self.cfg, y, out, self.dead, self.variance, self._sparsity_weight(step))
        loss = terms.loss
        if self.nearest is not None:
            k = self.cfg.k if self.cfg.has_k else terms.sparsity
            weight = self.cfg.separability * self._sparsity_weight(step)
            loss = loss + weight * separability(s.W_dec, self.nearest, k)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = self._project_and_clip(projected=self._into is not None and self._into.attach())
        self.optimiser.step()
        # the next SAE of the run writes its gradients where these are
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            w = self._unit_rows
            w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-12))
            usual = torch.linalg.vector_norm(y, dim=1) <= self.sink_norm
            if self.bias is not None:
                self.bias.after_step(s, out, step, usual)
            elif self.cfg.activation == "jumprelu":
                s.threshold.clamp_min_(0.0)
            self._track(out, len(x), step)
            fired = (out.values != 0).sum() / len(x)
            error = torch.where(usual, terms.errors, 0.0).sum()
            spread = torch.where(usual, ((y - self.mean) ** 2).sum(1), 0.0).sum()
            self._sums += torch.stack([error, spread, terms.auxk, fired, norm, terms.sparsity]).double()
            self._sum_steps += 1
            self._finite_steps += self._sums.isfinite().all()

    def _sparsity_weight(self, step: int) -> float:
        """Share of l1 or l0 that counts at this step: linear warm-up."""
        return min(1.0, (step + 1) / max(1.0, self.cfg.sparsity_warmup * self.train.steps))

    @property
    def _unit_rows(self) -> Tensor:
        """The weights whose rows stay at norm 1: of the decoder, or, where it is tied to them, of the encoder."""
        return self.sae.W_dec if self.bias is None else self.sae.W_enc

    @torch.no_grad()
    def _project_and_clip(self, *, projected: bool) -> Tensor:
        """Remove the radial part of the gradient of the unit rows, then have all gradients scaled to norm <= grad_clip.

        `projected`: the step has removed it. The fused optimiser divides by `grad_scale` as it reads the gradients.
        """
        w, g = self._unit_rows, self._unit_rows.grad
        assert g is not None
        if not projected:
            radial = torch.einsum("fd,fd->f", g, w)
            g.addcmul_(radial[:, None], w, value=-1)
        grads = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in grads]))
        if self.train.grad_clip > 0:
            scale = ((norm + 1e-6) / self.train.grad_clip).clamp_min(1.0)
            # attributes that torch's own GradScaler sets; absent from the types of Adam
            vars(self.optimiser).update(grad_scale=scale, found_inf=torch.zeros_like(norm))
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
        if self.cfg.separability and (step + 1) % self.train.dead_refresh_steps == 0:
            self.nearest = nearest_atoms(self.sae.W_dec)

    def refresh_dead(self) -> None:
        """List the dead latents for AuxK."""
        ids = self._silent().nonzero().flatten()
        self.dead = Dead(ids, min(self.cfg.aux_width(), len(ids))) if len(ids) else None

    def _silent(self) -> Tensor:
        """Of each latent: no firing for the dead window (in rows)."""
        return self.rows_seen - self.last_fired > self.train.dead_window()

    @property
    def wrong_steps(self) -> int:
        """Of the steps since the last `metrics()`, how many are not finite: from the first such one on, all. Waits."""
        return self._sum_steps - int(self._finite_steps)

    def metrics(self) -> dict[str, float]:
        """Over the steps since the last call: fvu, means of auxk, l0, grad_norm, sparsity; and n_dead. Waits."""
        error, spread, aux, l0, norm, sparsity = (self._sums / max(self._sum_steps, 1)).tolist()
        self._sums.zero_()
        self._finite_steps.zero_()
        self._sum_steps = 0
        fvu = error / max(spread, 1e-30)
        means = {"auxk": aux, "l0": l0, "grad_norm": norm, "sparsity": sparsity}
        return {"fvu": fvu} | means | {"n_dead": float(self._silent().sum())}

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
            "shift": self.shift,
            "theta": self.theta,
        }
        if self.aip is not None:
            more |= {"aip_root": self.aip.root, "aip_inverse": self.aip.inverse}
        if self.nearest is not None:
            more |= {"nearest": self.nearest}
        rule = {} if self.bias is None else self.bias.tensors()
        return out | more | {"dead": dead} | rule

    def state(self) -> dict[str, Any]:
        return {
            "rows_seen": self.rows_seen,
            "scale": self.scale,
            "scale_out": self.scale_out,
            "variance": self.variance,
            "eps": self.eps,
            "sum_steps": self._sum_steps,
            "bias": None if self.bias is None else self.bias.span,
            "screen": self.screen.state(),
            "aip": None if self.aip is None else self.aip.record,
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
        self.shift = tensors["shift"].to(device).clone()
        self.theta = tensors["theta"].to(device).clone()
        ids = tensors["dead"].to(device).clone()
        self.dead = Dead(ids, min(self.cfg.aux_width(), len(ids))) if len(ids) else None
        self.rows_seen, self._sum_steps = state["rows_seen"], state["sum_steps"]
        self._finite_steps.fill_(self._sum_steps)  # no other state is saved
        self.scale, self.variance, self.eps = state["scale"], state["variance"], state["eps"]
        self.scale_out = state["scale_out"]
        self.screen.load_state(state["screen"])
        if self.bias is not None:
            self.bias.load(tensors, state["bias"])
        if state["aip"] is not None:
            self.whiten(AIP(tensors["aip_root"], tensors["aip_inverse"], state["aip"]))
        if "nearest" in tensors:
            self.nearest = tensors["nearest"].to(device).clone()

    @property
    def checks_rows(self) -> bool:
        """Whether `finish` needs rows: to compare a threshold that no gradient trained with k, or to find the + poles."""
        return self.cfg.activation in BATCH_K or self.cfg.signed

    def finish(self, sample: Tensor | None = None) -> SAE:
        """The folded SAE: raw activations in, codes in their units, + the commoner sign of a two-sided latent.

        sample: raw training rows `[N, d_model]`, where `checks_rows`.
        """
        if self.cfg.activation in BATCH_K and sample is not None:
            self._finish_threshold(self.input_rows(sample[:CHECK_ROWS]))
        if self.bias is not None:
            self.bias.finish(self.sae)
        if self.cfg.transcoder:
            fold_transcoder(self.sae, self.scale, self.scale_out, self.shift)
        elif self.aip is not None:
            fold_whitening(self.sae, self.aip.root, self.aip.inverse)
        elif self.cfg.space == "unit":
            self.sae.b_dec.detach().copy_(self.shift)
        else:
            fold_input_scale(self.sae, self.scale)
        if self.cfg.signed:
            fix_signs(self.sae, torch.where(self._sign_sums(sample) < 0, -1.0, 1.0).to(self.sae.W_dec.dtype))
        return self.sae.requires_grad_(False)

    @torch.no_grad()
    def _sign_sums(self, sample: Tensor | None) -> Tensor:
        """Sum of each latent's activations `[d_sae]` on sample rows, or, where it is silent there, over the run."""
        sums, silent = torch.zeros_like(self.sign_sum), torch.ones_like(self.sign_sum, dtype=torch.bool)
        for rows in () if sample is None else sample.split(CHECK_ROWS):
            codes = self.sae.encode(rows)
            ids = codes.indices.reshape(-1).long()
            sums.index_add_(0, ids, codes.values.reshape(-1).double())
            silent[ids] = False
        return torch.where(silent, self.sign_sum, sums)

    @torch.no_grad()
    def _finish_threshold(self, x: Tensor) -> None:
        """The moving average, or, where the mean L0 of x at it is not k within L0_TOLERANCE, the value where it is."""
        s, k = self.sae, self.cfg.k
        weights = (x - s.centre, s.W_enc, s.b_enc)
        s.threshold.fill_(self.theta.clamp_min(0.0))
        found = above_threshold(*weights, s.threshold, signed=self.cfg.signed, dense_share=DENSE_SHARE)
        if found is None or abs(len(found.values) / len(x) - k) > L0_TOLERANCE * k:
            s.threshold.fill_(threshold_for(*weights, k, signed=self.cfg.signed))
