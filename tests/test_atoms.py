"""Coherence, q*, pursuits and `evaluate_atoms`, each against brute force, a closed form or a peer."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from saes.aip import SecondMoment
from saes.atoms import _sample, evaluate_atoms, kmeans_atoms
from saes.coherence import (
    Coherence,
    coherence,
    largest_unique,
    q_star,
    random_unit,
    tight_frame,
    welch,
)
from saes.config import SAEConfig
from saes.evaluation import load_evaluation
from saes.presets import threshold_atoms, topk
from saes.pursuit import basis_pursuit, matching_pursuit, recovers
from saes.sae import SAE
from saes.synthetic import make_suite
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import HOOK, OTHER, empty_store, fill, make_corpus, make_store
from tests.test_cli import run


def brute(atoms: Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(atoms, dim=1)
    i, j = torch.triu_indices(len(atoms), len(atoms), offset=1)
    return (unit @ unit.T)[i, j].abs().numpy()


@pytest.mark.parametrize("tile", [7, 64, 5000])
def test_tiles_count_the_pairs_of_brute_force(tile: int) -> None:
    atoms = torch.randn(150, 20, generator=torch.Generator().manual_seed(0))
    found, all_pairs = coherence(atoms, tile=tile), np.sort(brute(atoms))
    assert found.pairs == 150 * 149 // 2 == len(all_pairs)
    assert found.largest == pytest.approx(all_pairs[-1])
    for q in (0.01, 0.3, 0.5, 0.9, 0.999, 1.0):
        exact = all_pairs[math.ceil(q * len(all_pairs)) - 1]
        assert exact * 0.999 <= found.quantile(q) <= exact * 1.002


def test_orthogonal_and_single_atoms_have_no_coherence() -> None:
    assert coherence(torch.eye(5)).largest == 0 and coherence(torch.ones(1, 4)).pairs == 0
    assert q_star(coherence(torch.eye(5)), np.full(9, 5)).q_star == 1.0
    twins = coherence(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert twins.largest == pytest.approx(1.0) and q_star(twins, np.array([1])).q_star == 0.0


def by_hand(cosines: list[float]) -> Coherence:
    edges = np.logspace(-8, 0, 10_001)
    counts, _ = np.histogram(cosines, bins=edges)
    return Coherence(counts, edges, max(cosines))


def test_q_star_of_an_example_done_by_hand() -> None:
    """Ten pairs, K = 2, 3, 5 on rows: bounds 1/3, 1/5 and 1/9."""
    found = by_hand([0.01, 0.02, 0.05, 0.1, 0.15, 0.18, 0.19, 0.3, 0.4, 0.6])
    # K = 2 everywhere: .3 < 1/3 holds up to the 8th of 10 pairs
    assert q_star(found, np.full(4, 2)).q_star == pytest.approx(0.8)
    # K is 2 on half of the rows and 5 on the rest: up to q = .5 mu is at most .15 < 1/3, after it .18 > 1/9
    two = q_star(found, np.array([2, 5, 2, 5]))
    assert two.q_star == pytest.approx(0.5) and two.k == 2 and two.mu == pytest.approx(0.15, rel=2e-3)
    assert two.first_failure == pytest.approx(0.5001)
    # K = 3 until q = .75: mu reaches .19 < 1/5 at q = .7 and .3 past it
    assert q_star(found, np.array([3, 3, 3, 5])).q_star == pytest.approx(0.7)
    # rows without atoms count as K = 1, whose bound is 1
    assert q_star(found, np.zeros(3)).q_star == 1.0


def test_q_star_at_a_large_scale_is_that_of_the_quantiles() -> None:
    atoms, rng = random_unit(200, 24, seed=1), np.random.default_rng(0)
    l0 = rng.poisson(6, 500)
    pairs, best = brute(atoms), 0.0
    for q in np.arange(1, 1001) / 1000:
        k = max(1, np.quantile(l0, q, method="inverted_cdf"))
        if np.quantile(pairs, q, method="inverted_cdf") < 1 / (2 * k - 1):
            best = q
    assert q_star(coherence(atoms), l0).q_star == pytest.approx(best, abs=0.002)


def test_welch_bound_and_the_k_that_it_excludes() -> None:
    assert welch(4 * 2304, 2304) == pytest.approx(0.018043, abs=1e-6)
    assert largest_unique(welch(4 * 2304, 2304)) == 28
    assert welch(10, 10) == 0 and largest_unique(0.0) == math.inf
    # a simplex reaches it: n = d + 1 vectors of |cos| 1 / d
    simplex = torch.eye(6) - 1 / 6
    assert coherence(simplex).largest == pytest.approx(welch(6, 5), rel=1e-5)
    # strict: a coherence of exactly 1 / (2 K - 1) does not allow K
    assert largest_unique(1 / 5) == 2 and largest_unique(1 / 5 - 1e-9) == 3
    assert coherence(random_unit(80, 20)).largest >= coherence(tight_frame(80, 20)).largest >= welch(80, 20)


def test_the_tight_frame_is_tight_and_unit() -> None:
    x = tight_frame(48, 16, seed=3).double()
    torch.testing.assert_close(x.T @ x, 3 * torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(48, dtype=torch.float64))


# ---- pursuits ----


def test_matching_pursuit_equals_sklearns() -> None:
    from sklearn.linear_model import orthogonal_mp

    atoms, gen = random_unit(60, 16, seed=2), torch.Generator().manual_seed(3)
    x = torch.randn(20, 16, generator=gen)
    for k in (1, 3, 8):
        want = (
            orthogonal_mp(atoms.T.double().numpy(), x.T.double().numpy(), n_nonzero_coefs=k).T @ atoms.numpy()
        )
        np.testing.assert_allclose(matching_pursuit(x, atoms, k, batch=7).numpy(), want, atol=1e-4)
    torch.testing.assert_close(matching_pursuit(x, torch.eye(16), 99), x)


def test_matching_pursuit_with_most_of_the_atoms_and_with_equal_ones_stays_a_projection() -> None:
    gen = torch.Generator().manual_seed(3)
    atoms = torch.nn.functional.normalize(torch.randn(40, 24, generator=gen), dim=1)
    atoms = torch.cat([atoms, atoms[:20]])
    x = torch.randn(9, 24, generator=gen)
    fit = matching_pursuit(x, atoms, 20)
    assert float(((x - fit) * fit).sum(1).abs().max()) < 1e-5, (
        "what is left stands at right angles to the fit"
    )
    assert float(((x - matching_pursuit(x, atoms, 24)) ** 2).sum()) < 1e-8


def test_l1_recovers_codes_on_spread_atoms_and_not_on_close_ones() -> None:
    rng = np.random.default_rng(0)
    spread = tight_frame(60, 30, seed=0).double().numpy()
    # crowded into 8 of 30 dimensions
    close = np.concatenate([tight_frame(60, 8, seed=0).double().numpy(), np.zeros((60, 22))], axis=1)
    for signed in (True, False):
        hits = [0, 0]
        for _ in range(12):
            code = np.zeros(60)
            support = rng.choice(60, 6, replace=False)
            code[support] = rng.uniform(0.5, 1.5, 6) * (rng.choice([-1, 1], 6) if signed else 1)
            for i, atoms in enumerate((spread, close)):
                hits[i] += recovers(code, atoms, signed=signed)
        assert hits[0] == 12 and hits[1] == 0, signed
    code = np.zeros(60)
    code[0] = -1.0
    assert not recovers(code, spread, signed=False), "a negative code has no one-sided solution of its own"
    assert np.abs(basis_pursuit(code @ spread, spread, signed=True) - code).max() < 1e-9


def test_l1_fails_where_two_atoms_are_the_same() -> None:
    atoms = np.eye(4)[[0, 0, 1, 2]]
    assert not recovers(np.array([0.0, 1.0, 0.0, 0.0]), atoms, signed=False) or not recovers(
        np.array([1.0, 0.0, 0.0, 0.0]), atoms, signed=False
    )


# ---- the theorem ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_oracle_weights_in_the_aip_give_every_support_and_in_plain_space_do_not(seed: int) -> None:
    """S10 under a map of condition 32: W_enc = D^T S and one threshold reproduce the supports exactly (values carry
    cross-talk). S is (D D^T)^-1 itself, up to a factor: the second moment of the atoms."""
    suite = make_suite("S10", seed, n_rows=2000)
    gen = torch.Generator().manual_seed(seed)
    q1, q2 = (torch.linalg.qr(torch.randn(64, 64, generator=gen)).Q for _ in range(2))
    skew = q1 * torch.logspace(0, -math.log10(32), 64) @ q2
    atoms, x = suite.V @ skew, suite.x @ skew
    oracle = SecondMoment(64)
    oracle.add(torch.cat([atoms] * 10))
    aip = oracle.aip(ridge=0.0)
    for space in ("aip", "plain"):
        weight = atoms.double() @ aip.root @ aip.root if space == "aip" else atoms.double()
        size = (weight * atoms).sum(1, keepdim=True)  # so that u_i of atom i alone is its coefficient
        sae = oracle_sae((weight / size).float(), atoms, suite.config.threshold)
        found = sae.encode(x).dense(128) != 0
        assert torch.equal(found, suite.supports) == (space == "aip")
        if space == "aip":
            codes, right = sae.encode(x).dense(128), suite.H
            assert 0.0 < (codes - right)[suite.supports].abs().max() < 2 * 1.2 / 8 + 1e-3


def oracle_sae(w_enc: Tensor, w_dec: Tensor, threshold: float) -> SAE:
    sae = SAE(SAEConfig(d_sae=len(w_enc), d_model=w_enc.shape[1], activation="jumprelu", hook=HOOK))
    with torch.no_grad():
        sae.W_enc.copy_(w_enc)
        sae.W_dec.copy_(w_dec)
        sae.threshold.fill_(threshold)
    return sae.requires_grad_(False)


# ---- the evaluation ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """S9 rows in a store; atoms and a TopK SAE trained on it, measured."""
    root = tmp_path_factory.mktemp("atoms")
    corpus = make_corpus(root, [60] * 100)
    suite = make_suite("S9", 0, n_rows=corpus.n_tokens, n=48, d=16)
    store = empty_store(root, corpus, rows_per_shard=1000)
    fill(store, {HOOK: suite.x})
    config = TrainConfig(steps=250, batch_size=256, lr=1e-2, warmup_steps=20, screen="off", log_every=250)
    job = [threshold_atoms(d_sae=64, l0=0.02, bandwidth=0.2, threshold_init=1.0), topk(d_sae=64, k=3)]
    atoms, plain = (r.sae for r in train(store, job, config))
    result = evaluate_atoms(atoms, store, beside={"topk": plain}, pursuit_rows=200, recovery=6)
    return store, atoms, plain, result


def test_every_subject_stands_beside_the_sae_with_what_it_is_compared_by(measured) -> None:
    _, _, _, result = measured
    have = {(r["subject"], r["metric"]) for r in result.rows}
    for who in ("sae", "topk", "random", "pca", "kmeans"):
        for metric in ("q_star", "excess_random", "pursuit_r2_train", "pursuit_r2_heldout", "coherence"):
            assert (f"atoms:{who}", metric) in have or (who, metric) == ("pca", "excess_tight"), (who, metric)
    for who in ("sae", "topk"):
        assert {
            (f"atoms:{who}", m) for m in ("r2_train", "r2_heldout", "r2_all_heldout", "l1_recovery", "l0")
        } <= have
    assert ("atoms:tight-frame", "q_star") in have and ("atoms:random", "l1_recovery") in have
    # orthogonal in the AIP by construction
    assert result.value("q_star", "atoms:pca") == 1.0
    known = [r for r in result.rows if r["ci_low"] is not None]
    assert {r["metric"] for r in known} >= {"r2_train", "r2_heldout", "r2_all_heldout", "l1_recovery"}
    for r in known:
        assert r["ci_low"] - 1e-9 <= r["value"] <= r["ci_high"] + 1e-9, r


def test_the_measures_are_those_of_the_definitions(measured) -> None:
    store, sae, _, result = measured
    x = store.rows(HOOK, where="split = 1 AND pos > 0")
    codes, x_hat = sae.encode(x), sae(x)
    want = 1 - float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert result.value("r2_all_heldout", "atoms:sae") == pytest.approx(want, rel=1e-5)
    assert result.value("l0", "atoms:sae") == pytest.approx(codes.l0().float().mean().item())
    train_x = store.rows(HOOK, where="split = 0 AND pos > 0").double()
    s = torch.linalg.inv(train_x.T @ train_x / len(train_x))
    w = sae.W_dec.double()
    cos = (w @ s @ w.T) / (w @ s * w).sum(1).sqrt().outer((w @ s * w).sum(1).sqrt())
    i, j = torch.triu_indices(64, 64, offset=1)
    assert result.value("coherence", "atoms:sae") == pytest.approx(float(cos[i, j].abs().max()), abs=1e-3)
    counts = sum(
        r["value"] for r in result.rows if r["metric"] == "coherence_count" and r["subject"] == "atoms:sae"
    )
    assert counts == pytest.approx((cos[i, j].abs() > 1e-4).sum().item(), abs=2)
    random = q_star(coherence(random_unit(64, 16, seed=0)), codes.l0().numpy()).q_star
    assert result.value("excess_random", "atoms:sae") == pytest.approx(
        result.value("q_star", "atoms:sae") - random
    )


def test_atoms_stay_out_of_the_tables_of_the_other_evaluation(measured) -> None:
    from app.catalogue import measure_table, read_catalogue
    from app.demo import evaluation_lines
    from saes.compare import frontier
    from saes.evaluation import evaluate

    store, sae, _, result = measured
    evaluate(sae, store)
    kept = load_evaluation(sae, store)
    assert {r["subject"] for r in result.rows} <= {r["subject"] for r in kept.rows}
    measures = read_catalogue(store.workspace).measures
    shown = set(measure_table(measures, sae.sae_id).index) | set(frontier(store.workspace)["subject"])
    assert "sae" in shown and not any(s.startswith("atoms:") for s in shown)
    assert "atoms:" not in "\n".join(evaluation_lines(kept.rows))


def test_kmeans_has_as_many_atoms_as_there_are_rows_at_most(measured) -> None:
    store, *_ = measured
    assert kmeans_atoms(store, HOOK, 10).shape == (10, 16)
    rows = int(store.stats(HOOK, split="train", skip="first").n)
    assert len(kmeans_atoms(store, HOOK, rows + 50)) <= rows


def test_the_command_prints_the_table_and_the_json(measured, capsys) -> None:
    store, sae, plain, _ = measured
    args = [
        "atoms",
        sae.sae_id,
        "latest",
        "--beside",
        plain.sae_id,
        "--recovery",
        "0",
        "-w",
        str(store.workspace),
    ]
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert "over random" in out and "k-means" in out and plain.sae_id in out and "AIP of" in out
    code, out, _ = run(capsys, *args, "--json")
    assert code == 0 and any(r["subject"] == "atoms:sae" for r in json.loads(out))


def test_the_first_page_shows_the_atoms_beside_their_controls(measured, monkeypatch) -> None:
    from tests.test_app import open_page, words

    page = words(open_page("home", measured[0].workspace, monkeypatch))
    assert "over random" in page and "random unit atoms" in page and "k-means" in page


def test_an_sae_of_another_width_and_a_transcoder_are_refused(measured) -> None:
    store, *_ = measured
    with pytest.raises(DataError, match="d_model"):
        evaluate_atoms(oracle_sae(torch.eye(5), torch.eye(5), 0.1), store)
    with pytest.raises(UsageError, match="is a transcoder"):
        evaluate_atoms(SAE(SAEConfig(d_sae=8, k=2, d_model=16, d_out=4, out_hook="mlp", hook=HOOK)), store)


def test_saes_of_two_hooks_or_an_aip_of_another_width_are_not_measured_on_each_other(tmp_path) -> None:
    corpus = make_corpus(tmp_path, [60] * 8)
    store = empty_store(tmp_path, corpus)
    gen = torch.Generator().manual_seed(0)
    fill(store, {h: torch.randn(corpus.n_tokens, 16, generator=gen) for h in (HOOK, OTHER)})
    here, there = (SAE(SAEConfig(d_sae=8, k=2, d_model=16, hook=h)) for h in (HOOK, OTHER))
    with pytest.raises(DataError, match="of one hook"):
        evaluate_atoms(here, store, beside={"other": there})
    narrow = SecondMoment(5)
    narrow.add(torch.randn(100, 5, generator=gen))
    with pytest.raises(DataError, match="width 5"):
        evaluate_atoms(here, store, aip=narrow.aip())


@pytest.mark.parametrize("wanted", [50, 100, 190, 400])
def test_rows_for_the_controls_come_from_all_of_the_store(wanted: int, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [20] * 20, d=4)
    n = store.stats(HOOK, split="train", skip="first").n
    part = _sample(store, HOOK, "train", wanted).x
    x = torch.cat([b.x[HOOK] for b in store.sequential(HOOK, batch_size=64, split="train", skip="first")])
    at = [int((x == row).all(1).nonzero()[0]) for row in part]
    assert len(at) <= wanted and len(at) >= min(wanted, n) // 2
    assert at[-1] >= 0.9 * n and at == sorted(at)
