"""`check`: does a loaded SAE do on a sample what its card says, and if not, which convention is off?

L0 and FVU = sum |x - x_hat|^2 / sum |x - x_bar|^2 on rows of a store (sinks left out), beside the stated ones and the
conventions of the store. Where they are off, the usual suspects are tried on a few rows: scaled rows, rows normalised
one by one, centred rows, b_dec not subtracted. What makes the FVU several times smaller is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cache.errors import DataError, MissingDataError
from saes.conventions import differences
from saes.evaluation import check_fit
from saes.metrics import SINK_RATIO
from saes.sae import SAE

BATCH_ROWS = 4096
TRIED_ROWS = 2048
L0_OFF = 1.5
"""Factor between measured and stated L0 that is worth a line."""
FVU_OFF = 0.1
"""The same as a difference of FVU."""
OWN_FVU_OFF, OWN_FVU_SHARE = 0.02, 0.1
"""The same for an SAE that was trained here, on its own text: a difference, and a share of the stated FVU."""
EXPLAINS = 0.5
"""A suspect is named where it leaves at most this share of the FVU."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found; no warnings: the SAE does what its makers say."""

    rows: int
    """Rows of the sample."""
    l0: float
    """Active latents a row."""
    fvu: float
    """Fraction of variance unexplained."""
    fired: float
    """Share of latents that fired on the sample."""
    stated_l0: float | None
    stated_fvu: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"warnings": list(self.warnings)}

    def __str__(self) -> str:
        def beside(stated: float | None) -> str:
            return "" if stated is None else f" (stated {stated:.3g})"

        head = (
            f"L0 {self.l0:.1f}{beside(self.stated_l0)}  FVU {self.fvu:.3f}{beside(self.stated_fvu)}  "
            f"{self.fired:.0%} of latents fired on {self.rows:,} rows"
        )
        return "\n".join([head, *(f"warning: {w}" for w in self.warnings)])


@torch.no_grad()
def check(sae: SAE, store: Any, *, max_rows: int = 20_000) -> Check:
    """Measure an SAE on rows of `store` and compare with its card and conventions.

    Raises DataError where SAE and store do not fit at all, MissingDataError for a store without rows.
    """
    if sae.cfg.transcoder:
        raise DataError("check is for SAEs: `evaluate` measures a transcoder against its targets")
    hook = check_fit(sae, store)
    x = _sample(sae, store, hook, max_rows)
    fvu, l0, fired = _measure(sae, x)
    stated_l0 = sae.conventions.l0 if sae.conventions.l0 is not None else (sae.cfg.k or None)
    warnings = [*differences(sae, store), *_card_off(sae, store, l0, fvu, stated_l0)]
    if len(warnings) or fvu > 0.5:
        warnings += _suspects(sae, x[:TRIED_ROWS])
    return Check(
        rows=len(x),
        l0=l0,
        fvu=fvu,
        fired=fired,
        stated_l0=stated_l0,
        stated_fvu=sae.conventions.fvu,
        warnings=tuple(warnings),
    )


def _sample(sae: SAE, store: Any, hook: str, max_rows: int) -> Tensor:
    """Rows from all over the store; position 0 only where the SAE was trained on it."""
    found: list[Tensor] = []
    stream = store.stream(
        [hook], batch_size=BATCH_ROWS, seed=0, split=None, skip=sae.conventions.skip, epochs=1
    )
    try:
        for batch in stream:
            found.append(batch.x[hook].clone())
            if sum(map(len, found)) >= max_rows:
                break
    finally:
        stream.close()
    if not found:
        raise MissingDataError("the store has no rows to check the SAE on: harvest it")
    x = torch.cat(found)[:max_rows].to(sae.W_enc.device)
    norm = x.norm(dim=1)
    x = x[norm <= SINK_RATIO * norm.median()]
    # its rows had mean 0 over d_model, and so have its reconstructions
    return x - x.mean(dim=1, keepdim=True) if sae.conventions.centred else x


def _measure(sae: SAE, x: Tensor) -> tuple[float, float, float]:
    """FVU, L0 and the share of latents that fired."""
    error, active = 0.0, 0
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x.device)
    for rows in x.split(BATCH_ROWS):
        codes = sae.encode(rows)
        error += float((rows - sae.decode(codes)).double().square().sum())
        firing = codes.values.reshape(-1) != 0
        active += int(firing.sum())
        fired[codes.indices.reshape(-1)[firing].long()] = True
    return error / _spread(x), active / len(x), float(fired.float().mean())


def _spread(x: Tensor) -> float:
    return float((x - x.mean(0)).double().square().sum())


def _card_off(sae: SAE, store: Any, l0: float, fvu: float, stated_l0: float | None) -> list[str]:
    out, stated = [], sae.conventions.fvu
    if l0 == 0:
        out.append("no latent fires on any row")
    elif (
        stated_l0
        and (sae.conventions.l0 or not sae.cfg.fixed_k)
        and not 1 / L0_OFF <= l0 / stated_l0 <= L0_OFF
    ):
        out.append(f"L0 is {l0:.1f}, stated is {stated_l0:.1f}")
    if fvu >= 1:
        out.append(f"FVU is {fvu:.3g}: the mean row alone does better")
    elif stated is not None and fvu > stated + _allowed(sae, store, stated):
        out.append(f"FVU is {fvu:.3f}, stated is {stated:.3f}")
    return out


def _allowed(sae: SAE, store: Any, stated: float) -> float:
    """How far above the stated FVU is unremarkable: less on the text that it was measured on than on another."""
    c, corpus = sae.conventions, store.corpus
    name = corpus.meta.get("name") or ""
    # every list of documents has the same name
    same_text = not c.source and c.dataset == name != "texts" and c.context == corpus.context
    return OWN_FVU_OFF + OWN_FVU_SHARE * stated if same_text else FVU_OFF


def _suspects(sae: SAE, x: Tensor) -> list[str]:
    """The convention that would explain it: the one under which the FVU falls most, if it falls far."""
    fvu, d = _measure(sae, x)[0], x.shape[1]
    mean, square = float(x.norm(dim=1).mean()), float(x.square().sum(1).mean())
    tried: list[tuple[float, str]] = []
    scales = (
        (d**0.5 / mean, "mean norm sqrt(d_model)"),
        ((d / square) ** 0.5, "mean square norm d_model"),
        (square**-0.5, "mean square norm 1"),
    )
    for factor, name in scales:
        line = f"rows scaled to {name}: load it with norm_factor={factor:.4g}, the factor on this sample"
        tried.append((_fvu(x, partial(_scaled, sae, factor)), line))

    def one_by_one(r: Tensor) -> Tensor:
        middle, spread = r.mean(1, keepdim=True), r.std(1, keepdim=True)
        return sae((r - middle) / spread) * spread + middle

    def at_norm(r: Tensor) -> Tensor:
        f = d**0.5 / r.norm(dim=1, keepdim=True)
        return sae(r * f) / f

    tried += [
        (_fvu(x, one_by_one), "rows normalised one by one (layer norm), which is not read here"),
        (_fvu(x, at_norm), "rows of norm sqrt(d_model) each, which is not read here"),
        (
            _fvu(x, lambda r: sae.decode(sae.encode(r + sae.b_dec))),
            "b_dec not subtracted (apply_b_dec_to_input)",
        ),
        (
            _fvu(x - x.mean(1, keepdim=True), sae),
            "rows centred over d_model (center_writing_weights of the model)",
        ),
    ]
    best, line = min(tried, key=lambda t: t[0])
    return [f"it fits {line}: FVU {best:.3f} instead of {fvu:.3f}"] if best <= EXPLAINS * fvu else []


def _scaled(sae: SAE, factor: float, rows: Tensor) -> Tensor:
    return sae(rows * factor) / factor


def _fvu(x: Tensor, reconstruct: Callable[[Tensor], Tensor]) -> float:
    error = sum(float((r - reconstruct(r)).double().square().sum()) for r in x.split(BATCH_ROWS))
    return error / max(_spread(x), 1e-30)
