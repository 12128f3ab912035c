"""Warm start: training goes on from another SAE's weights, with a fresh optimiser and fresh statistics.

A saved SAE is folded, so folding is undone first, exactly: b_enc, b_mag, thresholds and b_dec times the input scale (of a
transcoder: both scales and the shift of its input; in space `aip`: the whitening). Rows of W_dec are then made unit, with
the norm moved into W_enc, b_enc, b_mag and the threshold; where k latents of largest u are kept that would change which,
so rows that are not unit are refused there. k, weights of the objective and learning rate are the new run's:
`sparsity_warmup=0` keeps the sparsity that the SAE has. sae-lens saves a BatchTopK SAE as a JumpReLU one with the same
threshold everywhere: `batch_topk` starts from that too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from saes.config import SAEConfig
from saes.sae import SAE, fold_input_scale, fold_whitening

WarmStart = SAE | str | Path | None
UNIT_TOLERANCE = 1e-3
FROZEN_TOLERANCE = 1e-3
ONE_THRESHOLD = 1e-5
"""Thresholds of a JumpReLU SAE are one where they differ by at most this share of the largest."""


def resolve(warm_start: WarmStart | Sequence[WarmStart], configs: Sequence[SAEConfig]) -> list[SAE | None]:
    """The SAE each config starts from: the one given for all of them, or one (or None) for each."""
    given = _one_each(warm_start, len(configs))
    if len(given) != len(configs):
        raise UsageError(
            f"warm_start has {len(given)} SAEs for {len(configs)} configs: give one, or one for each"
        )
    found = [w if w is None or isinstance(w, SAE) else SAE.load(w) for w in given]
    for sae, cfg in zip(found, configs, strict=True):
        if sae is not None:
            check(sae, cfg)
    return found


def _one_each(given: Any, n: int) -> list[WarmStart]:
    return list(given) if isinstance(given, list | tuple) else [given] * n


def check(sae: SAE, cfg: SAEConfig) -> None:
    """Refuse a start from another architecture, shape or model, and the rules that have no folded form to undo."""
    have = sae.cfg
    for what, a, b in (
        ("activation", _kind(sae, cfg), cfg.activation),
        ("d_sae", have.d_sae, cfg.d_sae),
        ("d_model", have.d_model, cfg.d_model),
        ("d_out", have.d_out, cfg.d_out),
    ):
        if a != b:
            raise DataError(
                f"warm start of {cfg.label}: the given SAE has {what} {a}, the run asks for {b}: "
                "train the same architecture and widths"
            )
    if have.model_sha and cfg.model_sha and have.model_sha != cfg.model_sha:
        raise DataError(
            f"warm start of {cfg.label}: the given SAE is of other weights ({have.model_sha[:12]}) than the data "
            f"({cfg.model_sha[:12]})"
        )
    if cfg.bias_rule == "gba" or "unit" in (cfg.space, have.space):
        rule = "gba" if cfg.bias_rule == "gba" else "space unit"
        raise UsageError(f"{rule} has state that a saved SAE does not hold: train {cfg.label} from the start")


def _kind(sae: SAE, cfg: SAEConfig) -> str:
    """Activation that the SAE can start: a JumpReLU SAE with one threshold is what becomes of a BatchTopK one."""
    if (sae.cfg.activation, cfg.activation) != ("jumprelu", "batch_topk"):
        return sae.cfg.activation
    low, high = sae.threshold.aminmax()
    if float(high - low) <= ONE_THRESHOLD * float(high):
        return cfg.activation
    return f"jumprelu (with thresholds from {float(low):.3g} to {float(high):.3g}: batch_topk has one)"


@torch.no_grad()
def warm_start(trainer: Any, sae: SAE, sample: Tensor) -> None:
    """Put the folded `sae` into a `Trainer` that has started; sample: raw rows `[N, d_model]`."""
    s, cfg = trainer.sae, trainer.cfg
    for name, p in s.named_parameters():
        p.copy_(sae.get_parameter(name))
    if cfg.transcoder:
        _unfold_transcoder(s, trainer.scale, trainer.scale_out, trainer.shift)
    elif trainer.aip is not None:
        fold_whitening(s, trainer.aip.inverse, trainer.aip.root)
    else:
        fold_input_scale(s, 1 / trainer.scale)
    _unit_rows(s)
    if cfg.bias_rule == "frozen":
        _refuse_biases(s)
    if not cfg.fixed_k and cfg.has_k:
        trainer.theta.fill_(s.threshold.double().mean())
    if cfg.activation == "jumprelu":
        x = trainer.input_rows(sample[:1024])
        trainer.eps = cfg.bandwidth * ((x - s.centre) @ s.W_enc.T + s.b_enc).std().item()


def _refuse_biases(s: SAE) -> None:
    """A frozen bias is 0 in the space of training; another one would stay for ever."""
    size = float(s.W_enc.abs().mean())
    for name in ("b_enc", "b_mag"):
        if hasattr(s, name) and float(getattr(s, name).abs().max()) > FROZEN_TOLERANCE * size:
            raise DataError(
                f"warm start of {s.cfg.label}: frozen biases stay at 0, and the given SAE has a {name} of its own: take "
                "bias_rule='gradient', or an SAE that was trained with frozen biases on the same data"
            )


def _unfold_transcoder(s: SAE, scale: float, scale_out: float, shift: Tensor) -> None:
    """The inverse of `fold_transcoder`."""
    s.W_enc.mul_(scale_out / scale)
    lost = s.W_enc @ shift
    s.b_enc.mul_(scale_out).add_(lost)
    s.b_dec.mul_(scale_out)
    if hasattr(s, "b_mag"):
        s.b_mag.mul_(scale_out).add_(s.r_mag.exp() * lost)
    if hasattr(s, "threshold"):
        s.threshold.mul_(scale_out)


def _unit_rows(s: SAE) -> None:
    """Decoder rows of norm 1 and the same function of x; rows of norm 0 stay."""
    norm = torch.linalg.vector_norm(s.W_dec, dim=1)
    norm = torch.where(norm > 0, norm, 1.0)
    off = (norm - 1).abs().max().item()
    if s.cfg.has_k and off > UNIT_TOLERANCE:
        raise DataError(
            f"warm start of {s.cfg.label}: decoder rows are off unit norm by {off:.2g}, and to make them unit would "
            "change which latents are kept: give an SAE with unit rows (sae-lens: fold_W_dec_norm before training)"
        )
    s.W_dec.div_(norm[:, None])
    s.W_enc.mul_(norm[:, None])
    for name in ("b_enc", "b_mag", "threshold"):
        if hasattr(s, name):
            getattr(s, name).mul_(norm)


def described(
    saes: Sequence[SAE | None], given: WarmStart | Sequence[WarmStart]
) -> list[dict[str, Any] | None]:
    """What run.json keeps: the id of each SAE that was started from, and the path or release it was given as."""
    names = _one_each(given, len(saes))
    return [
        None if s is None else {"sae_id": s.sae_id, "source": None if isinstance(n, SAE) else str(n)}
        for s, n in zip(saes, names, strict=True)
    ]
