"""How much of a known dictionary an SAE recovered: W `[m, d]` learned rows against V `[n, d]` true ones. numpy, scipy.

    mmcs      mean largest cosine: recall over true features, precision over learned latents
    mcc       mean cosine of the best one-to-one assignment (Hungarian), min(m, n) pairs;  frr(tau): features above tau
    support   precision, recall, F1 of "latent fires" against "its feature is active", pooled over the matched pairs
    pw_mcc    mcc between dictionaries of several seeds;  mcs_curve: share of rows whose nearest of the other is above tau

Cosines keep their sign for one-sided dictionaries and lose it (|cos|) for signed ones, whose latents have no preferred
pole. Dead latents are left out first (`alive`): they would be matched by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cache.errors import DataError
from saes.compare import unit_rows

TAU = 0.9
TAUS = tuple(np.linspace(0.5, 1.0, 11).round(2))


class MMCS(NamedTuple):
    """Mean largest cosine over true features (recall) and over learned latents (precision)."""

    recall: float
    precision: float


class Matching(NamedTuple):
    """One-to-one pairs: latent of W, feature of V, and their cosine (with its sign)."""

    latent: np.ndarray
    feature: np.ndarray
    cos: np.ndarray


class SupportScore(NamedTuple):
    """Of the matched pairs, pooled; features without a latent count as missed."""

    precision: float
    recall: float
    f1: float


def _array(w: Any) -> np.ndarray:
    return np.asarray(w.detach().cpu() if hasattr(w, "detach") else w)


def cosines(w: Any, v: Any, *, signed: bool = False) -> np.ndarray:
    """`[m, n]` cosines, |cos| where signed."""
    cos = unit_rows(_array(w)) @ unit_rows(_array(v)).T
    return np.abs(cos) if signed else cos


def _alive(w: Any, alive: Any) -> np.ndarray:
    return _array(w) if alive is None else _array(w)[_array(alive).astype(bool)]


def mmcs(w: Any, v: Any, *, signed: bool = False, alive: Any = None) -> MMCS:
    """Mean of the largest cosine, both ways; 0 where no latent is alive."""
    cos = cosines(_alive(w, alive), v, signed=signed)
    if not cos.size:
        return MMCS(0.0, 0.0)
    return MMCS(float(cos.max(0).mean()), float(cos.max(1).mean()))


def frr(w: Any, v: Any, tau: float = TAU, *, signed: bool = False, alive: Any = None) -> float:
    """Feature recovery rate: share of true features with a latent of cosine at least tau."""
    cos = cosines(_alive(w, alive), v, signed=signed)
    return float((cos.max(0) >= tau).mean()) if cos.size else 0.0


def uniqueness(w: Any, v: Any, *, signed: bool = False, alive: Any = None) -> float:
    """Share of learned latents left when those with the same nearest feature count once."""
    cos = cosines(_alive(w, alive), v, signed=signed)
    return len(np.unique(cos.argmax(1))) / len(cos) if cos.size else 0.0


def match(w: Any, v: Any, *, signed: bool = False, alive: Any = None) -> Matching:
    """The one-to-one assignment of alive latents to features with the largest total cosine."""
    from scipy.optimize import linear_sum_assignment

    ids = np.arange(len(_array(w))) if alive is None else np.flatnonzero(_array(alive))
    cos = cosines(_array(w)[ids], v)
    i, j = linear_sum_assignment(np.abs(cos) if signed else cos, maximize=True)
    return Matching(ids[i], j, cos[i, j])


def mcc(w: Any, v: Any, *, signed: bool = False, alive: Any = None) -> float:
    """Mean cosine of `match`: over min(m, n) pairs."""
    cos = match(w, v, signed=signed, alive=alive).cos
    return float((np.abs(cos) if signed else cos).mean()) if len(cos) else 0.0


# ---- activations ----


def support_score(z: Any, h: Any, pairs: Matching) -> SupportScore:
    """Codes z `[N, m]` against true activations h `[N, n]`: does a latent fire where its feature is active?"""
    fires, active = _array(z)[:, pairs.latent] != 0, _array(h) != 0
    hit = int((fires & active[:, pairs.feature]).sum())
    precision, recall = hit / max(1, int(fires.sum())), hit / max(1, int(active.sum()))
    return SupportScore(precision, recall, 2 * precision * recall / max(1e-12, precision + recall))


def coefficient_correlation(z: Any, h: Any, pairs: Matching) -> float:
    """Mean Pearson correlation of codes and true activations over the matched pairs; a constant one counts as 0."""
    a, b = _array(z)[:, pairs.latent].astype(np.float64), _array(h)[:, pairs.feature].astype(np.float64)
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    cov = (a * b).sum(0) * np.sign(pairs.cos)
    return float(np.where(size > 0, cov / np.maximum(size, 1e-30), 0.0).mean()) if len(size) else 0.0


def frequency_error(z: Any, h: Any, pairs: Matching) -> float:
    """Mean |log p - log f| over the matched pairs (nats), counts plus a half so that a silent one stays finite."""
    z, h = _array(z), _array(h)
    p, f = ((a != 0).sum(0) + 0.5 for a in (z[:, pairs.latent], h[:, pairs.feature]))
    return float(np.abs(np.log(p) - np.log(f)).mean()) if len(p) else float("nan")


# ---- between seeds ----


def pw_mcc(dictionaries: Sequence[Any], *, signed: bool = False) -> float:
    """Mean `mcc` over all pairs of dictionaries (alive rows only)."""
    return float(np.mean([mcc(a, b, signed=signed) for a, b in itertools.combinations(dictionaries, 2)]))


def mcs_curve(
    w: Any, other: Any, taus: Sequence[float] = TAUS, *, signed: bool = False
) -> dict[float, float]:
    """Share of rows of w whose nearest row of `other` has a cosine of at least tau, for each tau."""
    nearest = cosines(w, other, signed=signed).max(1)
    return {float(t): float((nearest >= t).mean()) for t in taus}


# ---- an SAE on a suite ----


def recovery_scores(sae: Any, suite: Any, *, tau: float = TAU, map: Any = None) -> dict[str, float]:
    """All measures of an `SAE` on a `Suite` whose rows it can encode, as plain floats.

    On signed suites or with signed SAEs cosines are |cos| and antipodal features are axes. A one-sided SAE on a signed
    suite counts for an axis by its better ray; its support is judged against rays. `map` `[d, d]` is applied to the
    rows of both dictionaries first (a whitening in which cosines are to be taken). Raises DataError for a transcoder, and
    for an SAE of another width than the rows.
    """
    _check(sae, suite)
    suite = suite.as_axes() if sae.cfg.signed else suite
    signed = sae.cfg.signed or suite.config.signed
    z = _codes(sae, suite.x)
    alive = (z != 0).any(0)
    w, v = _array(sae.W_dec), _array(suite.V)
    rays = suite if sae.cfg.signed else suite.as_rays()
    v_rays = _array(rays.V)
    if map is not None:
        w, v, v_rays = (a @ _array(map) for a in (w, v, v_rays))
    both = mmcs(w, v, signed=signed, alive=alive)
    pairs = match(w, v_rays, signed=sae.cfg.signed, alive=alive)
    support = support_score(z, rays.H, pairs)
    x = _array(suite.x).astype(np.float64)
    error = x - (z.astype(np.float64) @ _array(sae.W_dec) + _array(sae.b_dec))
    return {
        "mmcs": both.recall, "mmcs_precision": both.precision,
        "mcc": mcc(w, v, signed=signed, alive=alive), "frr": frr(w, v, tau, signed=signed, alive=alive),
        "uniqueness": uniqueness(w, v, signed=signed, alive=alive), "alive": float(alive.mean()),
        "support_precision": support.precision, "support_recall": support.recall, "support_f1": support.f1,
        "coefficient_correlation": coefficient_correlation(z, rays.H, pairs),
        "frequency_error": frequency_error(z, rays.H, pairs),
        "fvu": float((error**2).sum() / ((x - x.mean(0)) ** 2).sum()), "l0": float((z != 0).sum(1).mean()),
        "true_l0": float(_array(suite.supports).sum(1).mean()),
    }  # fmt: skip


def _check(sae: Any, suite: Any) -> None:
    cfg = getattr(sae, "cfg", None)
    if cfg is None or not hasattr(sae, "encode"):
        raise DataError(f"recovery_scores takes an SAE, got {type(sae).__name__}: SAE.load(folder)")
    if not hasattr(suite, "as_axes"):
        raise DataError(f"recovery_scores takes a suite, got {type(suite).__name__}: make_suite(name, seed)")
    if cfg.transcoder:
        raise DataError("a transcoder's decoder holds other activations than the suite's rows: score an SAE")
    if cfg.d_model != suite.V.shape[1]:
        raise DataError(
            f"the SAE has d_model={cfg.d_model}, the rows of suite {suite.config.name} have {suite.V.shape[1]}: "
            "train one on suite.x"
        )


def _codes(sae: Any, x: Any) -> np.ndarray:
    """Dense codes `[N, d_sae]`, by blocks of rows."""
    import torch

    with torch.no_grad():
        parts = [sae.encode(rows).dense(sae.cfg.d_sae).cpu().numpy() for rows in x.split(16_384)]
    return np.concatenate(parts)
