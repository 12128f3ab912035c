"""Synthetic suites are what they say, and recovery measures have their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cache.errors import UsageError
from saes import make_suite, recovery_scores
from saes.config import SAEConfig
from saes.recovery import (
    coefficient_correlation,
    frequency_error,
    frr,
    match,
    mcc,
    mcs_curve,
    mmcs,
    pw_mcc,
    support_score,
    uniqueness,
)
from saes.sae import SAE
from saes.synthetic import SUITES

N, D = 40, 24


def dictionary(seed: int = 0, n: int = N, d: int = D) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal((n, d))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def shuffled(v: np.ndarray, signs: bool = False) -> np.ndarray:
    rng = np.random.default_rng(7)
    scale = rng.uniform(0.5, 3.0, (len(v), 1)) * (rng.choice([-1, 1], (len(v), 1)) if signs else 1)
    return (v * scale)[rng.permutation(len(v))]


def test_a_permuted_and_rescaled_dictionary_is_recovered_in_full() -> None:
    v = dictionary()
    w = shuffled(v)
    assert mmcs(w, v) == pytest.approx((1, 1)) and mcc(w, v) == pytest.approx(1)
    assert frr(w, v, 0.999) == 1 and uniqueness(w, v) == 1


def test_a_flipped_sign_is_a_miss_for_one_sided_and_no_matter_for_signed() -> None:
    v = dictionary()
    w = shuffled(v, signs=True)
    assert mmcs(w, v, signed=True) == pytest.approx((1, 1)) and mcc(w, v, signed=True) == pytest.approx(1)
    assert mcc(w, v) < 0.8 and frr(w, v) < 0.8


def test_half_a_dictionary_has_full_precision_and_half_the_recall() -> None:
    v = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0]
    assert mmcs(v[: D // 2], v) == pytest.approx((0.5, 1), abs=1e-6) and frr(v[: D // 2], v) == 0.5


def test_a_random_dictionary_scores_what_chance_gives() -> None:
    """The largest of n cosines in d dimensions is near sqrt(2 ln n / d), and assignment can only lower it."""
    v, w = dictionary(0, 2000, 256), dictionary(1, 2000, 256)
    chance = math.sqrt(2 * math.log(2000) / 256)
    assert mmcs(w, v).recall == pytest.approx(chance, rel=0.15)
    assert mcc(w[:300], v[:300]) <= mmcs(w[:300], v[:300]).recall


def test_dead_latents_and_copies_do_not_count_as_recovery() -> None:
    v = dictionary()
    alive = np.arange(N) < N // 2
    assert frr(v, v, alive=alive) < 0.6 and mcc(v, v, alive=alive) == pytest.approx(1)
    assert mmcs(v, v, alive=np.zeros(N, dtype=bool)) == (0, 0)
    assert uniqueness(np.concatenate([v, v]), v) == 0.5
    assert len(match(v, v, alive=alive).latent) == N // 2


def test_activations_are_compared_through_the_matching_and_its_sign() -> None:
    rng = np.random.default_rng(0)
    v = dictionary()
    h = rng.standard_normal((500, N)) * (rng.random((500, N)) < 0.1)
    order, sign = rng.permutation(N), rng.choice([-1.0, 1.0], N)
    w, z = (v * sign[:, None])[order], (h * sign)[:, order] * 2.5
    pairs = match(w, v, signed=True)
    assert (pairs.feature == order[pairs.latent]).all()
    assert support_score(z, h, pairs) == pytest.approx((1, 1, 1))
    assert coefficient_correlation(z, h, pairs) == pytest.approx(1)
    assert frequency_error(z, h, pairs) == 0
    half = z * (rng.random(z.shape) < 0.5)
    p, r, f1 = support_score(half, h, pairs)
    assert p == 1 and r == pytest.approx(0.5, abs=0.03) and f1 == pytest.approx(2 * r / (1 + r))
    assert frequency_error(half, h, pairs) == pytest.approx(math.log(2), abs=0.15)


def test_dictionaries_of_seeds_are_compared_in_pairs() -> None:
    v = dictionary()
    other = dictionary(3)
    assert pw_mcc([v, shuffled(v), shuffled(v[::-1])]) == pytest.approx(1)
    assert pw_mcc([v, v, other]) == pytest.approx((1 + 2 * mcc(v, other)) / 3)
    curve = mcs_curve(np.concatenate([v, other[:10]]), v)
    assert curve[1.0] <= curve[0.9] == pytest.approx(0.8, abs=0.001)
    assert list(curve.values()) == sorted(curve.values(), reverse=True)


# ---- suites ----


@pytest.mark.parametrize("name", SUITES)
def test_rows_are_the_dictionary_times_the_activations(name: str) -> None:
    s = make_suite(name, 3, n_rows=400)
    rest = s.x - s.H @ s.V
    if s.sink is None:
        assert rest.abs().max() < 1e-4
    else:
        assert rest[~s.sink].abs().max() < 1e-4 and torch.linalg.matrix_rank(rest[s.sink], rtol=1e-3) == 1
    again, other = make_suite(name, 3, n_rows=400), make_suite(name, 3, n_rows=400, draw=1)
    assert torch.equal(s.x, again.x) and torch.equal(s.V, other.V) and not torch.equal(s.x, other.x)
    assert not torch.equal(s.V, make_suite(name, 4, n_rows=4).V)
    if s.map is None:
        torch.testing.assert_close(s.V.norm(dim=1), torch.ones(len(s.V)))


def test_each_suite_has_its_law() -> None:
    rows = 20_000
    made = {name: make_suite(name, 0, n_rows=rows) for name in SUITES}
    for name, l0 in (("S0", 2), ("S1", 3), ("S4", 3), ("S5", 3), ("S8", 3), ("S9", 3), ("S10", 3)):
        assert (made[name].supports.sum(1) == l0).all(), name
    for name in ("S2", "S2-rows"):
        assert set(made[name].supports.sum(1).tolist()) == {3, 20}
    group = made["S2"].group
    assert made["S2"].frequency[group == 1].mean() / made["S2"].frequency[group == 0].mean() == pytest.approx(
        20 / 3, rel=0.05
    )
    p = made["S3"].frequency
    assert p[0] == pytest.approx(0.3, abs=0.02) and p[9] == pytest.approx(0.03, abs=0.006)
    assert (made["S4"].H < 0).float().sum() / made["S4"].supports.sum() == pytest.approx(0.5, abs=0.02)
    assert not (made["S5"].supports[:, :32] & made["S5"].supports[:, 32:]).any()
    tree = made["S6"]
    child = tree.parent >= 0
    assert (tree.H[:, child] <= tree.H[:, tree.parent[child]]).all()
    assert tree.supports.sum(1).float().mean() == pytest.approx(3, abs=0.1)
    active = made["S7"].supports.float()
    together = torch.corrcoef(active.T).abs().fill_diagonal_(0)
    assert together.max() > 0.3 and made["S7"].supports.sum(1).float().mean() == pytest.approx(8, abs=0.3)
    s8 = made["S8"]
    norms = s8.x.norm(dim=1)
    assert s8.sink.float().mean() == pytest.approx(0.01, abs=0.004)
    assert (norms[s8.sink] / norms[~s8.sink].mean()).mean() == pytest.approx(50, rel=0.05)
    singular = torch.linalg.svdvals(made["S9"].map)
    assert singular[0] / singular[-1] == pytest.approx(32, rel=1e-3)
    zipf = made["S9-zipf"].frequency
    assert zipf[:10].mean() > 8 * zipf[64:].mean()


def test_antipodal_features_and_signed_axes_are_two_views_of_one_truth() -> None:
    axes = make_suite("S5", 0, n_rows=100).as_axes()
    assert axes.V.shape == (32, 24) and axes.config.signed and (axes.H < 0).any()
    torch.testing.assert_close(axes.H @ axes.V, axes.x, rtol=1e-4, atol=1e-5)
    rays = make_suite("S4", 0, n_rows=100).as_rays()
    assert rays.V.shape == (128, 32) and (rays.H >= 0).all()
    torch.testing.assert_close(rays.as_axes().H, make_suite("S4", 0, n_rows=100).H)


def test_the_separable_suite_meets_its_condition_and_a_threshold_finds_every_support() -> None:
    """arXiv 2509.20784: with coherence e, e K dmax < tau < dmin - e (K - 1) dmax keeps exactly the active features."""
    for seed in range(3):
        s = make_suite("S10", seed, n_rows=2000)
        cfg = s.config
        gram = (s.V @ s.V.T).abs().fill_diagonal_(0)
        e = gram.max().item()
        assert e * cfg.l0 * cfg.high < cfg.threshold < cfg.low - e * (cfg.l0 - 1) * cfg.high
        assert torch.equal(s.x @ s.V.T > cfg.threshold, s.supports)


def test_variants_and_unknown_suites() -> None:
    plain, noisy = (make_suite("S1", 0, n_rows=500, noise=n) for n in (0.0, 0.1))
    assert (noisy.x - plain.x).std() == pytest.approx(0.1, rel=0.05)
    shifted = make_suite("S1", 0, n_rows=500, bias=7.0)
    assert (shifted.x - plain.x)[0].norm() == pytest.approx(7, rel=1e-4)
    assert make_suite("S1", n=64, d=20, n_rows=5).V.shape == (64, 20)
    with pytest.raises(UsageError, match=r"S11.*S0, S1"):
        make_suite("S11")
    with pytest.raises(UsageError, match="one size"):
        make_suite("S10", n=3)


def oracle(suite, threshold: float, activation: str = "jumprelu", **more) -> SAE:
    cfg = SAEConfig(d_sae=len(suite.V), d_model=suite.V.shape[1], activation=activation, **more)
    sae = SAE(cfg)
    with torch.no_grad():
        sae.W_enc.copy_(suite.V)
        sae.W_dec.copy_(suite.V)
        if cfg.has_threshold:
            sae.threshold.fill_(threshold)
    return sae.requires_grad_(False)


def test_an_sae_with_the_true_weights_scores_full_marks() -> None:
    s = make_suite("S10", 0, n_rows=1000)
    scores = recovery_scores(oracle(s, s.config.threshold), s)
    for name in ("mmcs", "mmcs_precision", "mcc", "frr", "uniqueness", "alive", "support_f1"):
        assert scores[name] == pytest.approx(1, abs=1e-5), name
    assert scores["l0"] == scores["true_l0"] == 3 and scores["frequency_error"] == 0
    assert scores["coefficient_correlation"] > 0.95 and scores["fvu"] < 0.1


def test_rays_and_axes_are_scored_alike() -> None:
    """A signed SAE of the axes and a one-sided one of all rays both have recovered signed and antipodal features."""
    for name in ("S4", "S5"):
        s = make_suite(name, 0, n_rows=1000, n=32, d=32)
        axes = s if name == "S4" else s.as_axes()
        signed = recovery_scores(oracle(axes, 0, "abs_topk", k=3), s)
        rays = recovery_scores(oracle(s.as_rays(), 0, "topk", k=3), s)
        assert signed["mcc"] == pytest.approx(1, abs=1e-5) and signed["true_l0"] == 3
        assert rays["frr"] == 1 and rays["support_f1"] == pytest.approx(signed["support_f1"], abs=0.15)
