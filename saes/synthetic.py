"""Synthetic truth: suites S0-S10 of rows x = H V (+ bias + noise) whose dictionary V and activations H are known.

    S0 easy   S1 uniform   S2 imbalanced (S2-rows)   S3 Zipf   S4 signed   S5 antipodal pairs   S6 hierarchy
    S7 correlated   S8 sinks   S9 anisotropic (S9-zipf)   S10 separable: support identity by a threshold (2509.20784)

V `[n, d]` has unit rows when H is drawn and is never normalised after x: x = H V holds exactly (S8 adds its sink rows).
One (name, seed) is one dictionary; `draw` takes other rows of the same one, for instance held-out ones.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.errors import UsageError

MAX_RATE = 0.3
"""Largest firing rate of a Zipf feature."""
SINK_RATE, SINK_NORM = 0.01, 50.0


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What a suite is made of; `make_suite` fills in name, seed, draw and n_rows."""

    n: int
    """Features."""
    d: int
    """Width of x."""
    l0: int = 3
    """Active features of a row, exactly or (Zipf, hierarchy, correlated) on average."""
    low: float = 0.5
    """Smallest magnitude of the uniform law."""
    high: float = 1.5
    """Largest magnitude of the uniform law."""
    signed: bool = False
    """Whether H has negative values."""
    condition: float = 1.0
    """Condition number of the map applied to V (S9)."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise added to each coordinate."""
    bias: float = 0.0
    """Norm of a constant vector added to every row."""
    threshold: float = 0.0
    """S10: a threshold on V x that keeps exactly the active features."""
    name: str = ""
    """Suite."""
    seed: int = 0
    """Seed of the dictionary, and with `draw` of the rows."""
    draw: int = 0
    """Which sample of rows of this dictionary."""
    n_rows: int = 0
    """Rows."""


@dataclass(frozen=True)
class Suite:
    """Rows and what they are made of.

    x float32 `[N, d]`; V float32 `[n, d]`; H float32 `[N, n]`. parent int64 `[n]`: the feature without which this one
    does not fire, -1 for none (S6); group int64 `[n]`: which part of the law a feature belongs to (S2); sink bool
    `[N]` (S8); map float32 `[d, d]`: V = unit rows @ map (S9).
    """

    x: Tensor
    V: Tensor
    H: Tensor
    config: SuiteConfig
    parent: Tensor | None = None
    group: Tensor | None = None
    sink: Tensor | None = None
    map: Tensor | None = None

    @property
    def supports(self) -> Tensor:
        """Which features are active, bool `[N, n]`."""
        return self.H != 0

    @property
    def frequency(self) -> Tensor:
        """Share of rows on which each feature is active, `[n]`."""
        return self.supports.float().mean(0)

    def as_rays(self) -> Suite:
        """A signed suite as 2n one-sided features: v and -v."""
        if not self.config.signed:
            return self
        cfg = dataclasses.replace(self.config, n=2 * self.config.n, signed=False)
        rays = torch.cat([self.H.relu(), (-self.H).relu()], dim=1)
        return dataclasses.replace(self, V=torch.cat([self.V, -self.V]), H=rays, config=cfg)

    def as_axes(self) -> Suite:
        """Antipodal pairs (S5, or `as_rays`) as n / 2 signed features: the first of each pair is the positive pole."""
        half = len(self.V) // 2
        if self.config.signed or not torch.equal(self.V[:half], -self.V[half:]):
            return self
        cfg = dataclasses.replace(self.config, n=half, signed=True)
        return dataclasses.replace(self, V=self.V[:half], H=self.H[:, :half] - self.H[:, half:], config=cfg)


class _Drawn(NamedTuple):
    """What a law draws: active `[N, n]`, and a Suite's further fields."""

    active: np.ndarray
    extra: dict[str, Tensor]


def make_suite(
    name: str,
    seed: int = 0,
    *,
    n_rows: int = 32_768,
    draw: int = 0,
    noise: float = 0.0,
    bias: float = 0.0,
    n: int | None = None,
    d: int | None = None,
) -> Suite:
    """Rows of suite `name`; `noise`, `bias` and another size (S10 has none) are variants of it.

    Raises UsageError for an unknown suite, no rows, a noise that is not a standard deviation, or too few features.
    """
    if name not in SUITES:
        raise UsageError(f"suite {name!r} is not one of {', '.join(SUITES)}")
    base, law = SUITES[name]
    if name == "S10" and (n is not None or d is not None):
        raise UsageError("S10 has one size: its dictionary is a Hadamard matrix beside the identity")
    n, d = base.n if n is None else n, base.d if d is None else d
    cfg = dataclasses.replace(
        base, name=name, seed=seed, draw=draw, n_rows=n_rows, noise=noise, bias=bias, n=n, d=d
    )
    _check(cfg)
    made, rows = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2, draw])
    v, extra = _dictionary(cfg, made)
    drawn = law(cfg, made, rows)
    h = drawn.active * _magnitudes(cfg, rows)
    x = h @ v
    x, more = _sinks(cfg, x, made, rows) if name == "S8" else (x, {})
    if bias:
        x = x + bias * _unit(made.standard_normal((1, cfg.d)))
    if noise:
        x = x + noise * rows.standard_normal(x.shape)
    tensors = {key: torch.from_numpy(a.astype(np.float32)) for key, a in (("x", x), ("V", v), ("H", h))}
    return Suite(**tensors, config=cfg, **extra, **drawn.extra, **more)


def _check(cfg: SuiteConfig) -> None:
    """Refuse what would give no rows, NaN, or a law that cannot be drawn from."""
    for field, least in (("n_rows", 1), ("seed", 0), ("draw", 0), ("n", 1), ("d", 1)):
        value = getattr(cfg, field)
        if not isinstance(value, numbers.Integral) or value < least:
            raise UsageError(f"{field}={value!r} must be a whole number of at least {least}")
    for field in ("noise", "bias"):
        value = getattr(cfg, field)
        if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
            raise UsageError(f"{field}={value!r} must be a finite number of at least 0")
    least = {"S2": 41, "S2-rows": 21, "S5": 2 * cfg.l0 + 2}.get(cfg.name, cfg.l0 + 1)
    parts = {"S5": 2, "S6": 5}.get(cfg.name, 1)
    if cfg.n < least or cfg.n % parts:
        many = f" in multiples of {parts}" if parts > 1 else ""
        raise UsageError(f"suite {cfg.name} cannot be made of n={cfg.n} features: at least {least}{many}")


# ---- dictionaries ----


def _unit(w: np.ndarray) -> np.ndarray:
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def _dictionary(cfg: SuiteConfig, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Tensor]]:
    if cfg.name == "S10":
        return _hadamard(cfg.d) @ _rotation(cfg.d, rng), {}
    if cfg.name == "S5":
        half = _unit(rng.standard_normal((cfg.n // 2, cfg.d)))
        return np.concatenate([half, -half]), {}
    v = _unit(rng.standard_normal((cfg.n, cfg.d)))
    if cfg.condition == 1:
        return v, {}
    scale = np.geomspace(1.0, 1 / cfg.condition, cfg.d)
    a = _rotation(cfg.d, rng) * scale @ _rotation(cfg.d, rng)
    return v @ a, {"map": torch.from_numpy(a.astype(np.float32))}


def _rotation(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def _hadamard(d: int) -> np.ndarray:
    """Identity beside a Hadamard matrix: 2d unit rows of coherence d^-1/2."""
    from scipy.linalg import hadamard

    return np.concatenate([np.eye(d), hadamard(d) / math.sqrt(d)])


# ---- magnitudes and supports ----


def _magnitudes(cfg: SuiteConfig, rng: np.random.Generator) -> np.ndarray:
    shape = (cfg.n_rows, cfg.n)
    if cfg.name == "S3":
        return np.abs(rng.normal(1.0, 0.15, shape))
    if cfg.low == cfg.high:
        return np.full(shape, cfg.low)
    size = rng.uniform(cfg.low, cfg.high, shape)
    return size * rng.choice([-1.0, 1.0], shape) if cfg.signed else size


def _exactly(rows: int, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly k of n features on each row."""
    out = np.zeros((rows, n), dtype=bool)
    if rows:
        ids = rng.random((rows, n), dtype=np.float32).argpartition(k, axis=1)[:, :k]
        np.put_along_axis(out, ids, True, axis=1)
    return out


def _uniform(cfg: SuiteConfig, _: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    return _Drawn(_exactly(cfg.n_rows, cfg.n, cfg.l0, rows), {})


def _two_groups(cfg: SuiteConfig, _: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    """A row draws 3 of the first half of the features or 20 of the second: frequencies differ by 20 / 3."""
    half, first = cfg.n // 2, rows.random(cfg.n_rows) < 0.5
    out = np.zeros((cfg.n_rows, cfg.n), dtype=bool)
    out[first, :half] = _exactly(int(first.sum()), half, 3, rows)
    out[~first, half:] = _exactly(int((~first).sum()), cfg.n - half, 20, rows)
    return _Drawn(out, {"group": (torch.arange(cfg.n) >= half).long()})


def _two_sparsities(cfg: SuiteConfig, _: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    """Half of the rows have 3 active features, half 20, all of one law: no k is right."""
    many = rows.random(cfg.n_rows) < 0.5
    out = _exactly(cfg.n_rows, cfg.n, 3, rows)
    out[many] = _exactly(int(many.sum()), cfg.n, 20, rows)
    return _Drawn(out, {})


def _zipf(cfg: SuiteConfig, _: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    """Feature i fires with probability proportional to 1 / i, at most MAX_RATE; of mean l0 where the suite has one."""
    p = 1 / np.arange(1, cfg.n + 1)
    p = np.minimum(MAX_RATE, p * (MAX_RATE if cfg.name == "S3" else cfg.l0 / p.sum()))
    return _Drawn(rows.random((cfg.n_rows, cfg.n)) < p, {})


def _antipodal(cfg: SuiteConfig, _: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    pairs = _exactly(cfg.n_rows, cfg.n // 2, cfg.l0, rows)
    plus = rows.random(pairs.shape) < 0.5
    return _Drawn(np.concatenate([pairs & plus, pairs & ~plus], axis=1), {})


def _hierarchy(cfg: SuiteConfig, _: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    """A fifth of the features are parents; a parent that fires brings one of its four children with probability 0.6."""
    parents = cfg.n // 5
    on = rows.random((cfg.n_rows, parents)) < cfg.l0 / parents / 1.6
    child = on & (rows.random(on.shape) < 0.6)
    which = rows.integers(0, 4, on.shape)
    children = (child[..., None] & (which[..., None] == np.arange(4))).reshape(cfg.n_rows, 4 * parents)
    above = np.concatenate([np.full(parents, -1), np.repeat(np.arange(parents), 4)])
    return _Drawn(np.concatenate([on, children], axis=1), {"parent": torch.from_numpy(above)})


def _copula(cfg: SuiteConfig, made: np.random.Generator, rows: np.random.Generator) -> _Drawn:
    """Low-rank Gaussian copula: 8 factors carry 0.7 of the variance of each feature's latent, all of one frequency."""
    from scipy.stats import norm

    load = math.sqrt(0.7) * _unit(made.standard_normal((cfg.n, 8)))
    latent = rows.standard_normal((cfg.n_rows, 8)) @ load.T
    latent += math.sqrt(0.3) * rows.standard_normal(latent.shape)
    return _Drawn(latent > norm.isf(cfg.l0 / cfg.n), {})


def _sinks(
    cfg: SuiteConfig, x: np.ndarray, made: np.random.Generator, rows: np.random.Generator
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """One row in a hundred gains SINK_NORM times the mean norm along one direction."""
    sink = rows.random(len(x)) < SINK_RATE
    direction = _unit(made.standard_normal((1, cfg.d)))
    size = SINK_NORM * np.linalg.norm(x, axis=1).mean()
    return x + sink[:, None] * size * direction, {"sink": torch.from_numpy(sink)}


Law = Callable[[SuiteConfig, np.random.Generator, np.random.Generator], _Drawn]
_S9 = SuiteConfig(n=128, d=64, condition=32.0)
SUITES: dict[str, tuple[SuiteConfig, Law]] = {
    "S0": (SuiteConfig(n=48, d=24, l0=2), _uniform),
    "S1": (SuiteConfig(n=128, d=42), _uniform),
    "S2": (SuiteConfig(n=128, d=42), _two_groups),
    "S2-rows": (SuiteConfig(n=128, d=42), _two_sparsities),
    "S3": (SuiteConfig(n=512, d=64), _zipf),
    "S4": (SuiteConfig(n=64, d=32, signed=True), _uniform),
    "S5": (SuiteConfig(n=64, d=24), _antipodal),
    "S6": (SuiteConfig(n=80, d=40, low=1.0, high=1.0), _hierarchy),
    "S7": (SuiteConfig(n=128, d=42, l0=8), _copula),
    "S8": (SuiteConfig(n=128, d=42), _uniform),
    "S9": (_S9, _uniform),
    "S9-zipf": (_S9, _zipf),
    # coherence 1/8: 3 * 1.2 / 8 < 0.475 < 0.8 - 2 * 1.2 / 8
    "S10": (SuiteConfig(n=128, d=64, low=0.8, high=1.2, threshold=0.475), _uniform),
}
