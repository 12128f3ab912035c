"""The AIP estimate against closed forms, training in its space, folding, files and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.errors import DataError, MissingDataError, UsageError
from saes import training
from saes.aip import AIP, SecondMoment, angle_histogram, histogram_median, store_aip
from saes.config import ACTIVATIONS, SAEConfig
from saes.presets import threshold_atoms, topk
from saes.recovery import recovery_scores
from saes.sae import SAE, fold_whitening
from saes.separability import nearest_atoms, separability
from saes.synthetic import make_suite
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import HOOK, make_store

D = 12


def skewed(n: int = 4000, seed: int = 0, condition: float = 50.0) -> Tensor:
    """Rows with a second moment of this condition number, away from 0."""
    gen = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -0.5 * torch.log10(torch.tensor(condition)).item(), D)
    mix = torch.linalg.qr(torch.randn(D, D, generator=gen)).Q
    return torch.randn(n, D, generator=gen) * scale @ mix + 0.3


def estimate(x: Tensor, **options) -> AIP:
    moment = SecondMoment(x.shape[1])
    for part in x.split(700):
        moment.add(part)
    return moment.aip(**options)


def test_the_aip_cosine_is_the_plain_cosine_of_whitened_rows() -> None:
    x = skewed()
    aip, u, v = estimate(x), x[:5].double(), x[5:12].double()
    s = torch.linalg.inv(x.double().T @ x.double() / len(x))
    size_u, size_v = ((t @ s * t).sum(1).sqrt() for t in (u, v))
    want = u @ s @ v.T / size_u[:, None] / size_v
    torch.testing.assert_close(aip.cosine(u, v), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(aip.whiten(u)[:, None], aip.whiten(v)[None], dim=2), want,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(aip.unwhiten(aip.whiten(u)), u)


def test_whitened_rows_have_the_identity_as_second_moment() -> None:
    x = skewed(condition=1e4)
    white = estimate(x, ridge=0.0).whiten(x.double())
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(D, dtype=torch.float64))
    centred = estimate(x, ridge=0.0, centred=True).whiten(x.double())
    torch.testing.assert_close(torch.cov(centred.T, correction=0), torch.eye(D, dtype=torch.float64))


def test_the_estimate_of_sparse_sums_is_the_inverse_of_d_dt_up_to_a_factor() -> None:
    """Signs make the activations uncorrelated: E[x x^T] is a multiple of D D^T."""
    suite = make_suite("S9", 0, n_rows=60_000)
    gen = torch.Generator().manual_seed(0)
    h = suite.H * (torch.randint(0, 2, suite.H.shape, generator=gen) * 2 - 1)
    found = estimate(h @ suite.V, ridge=0.0)
    oracle = torch.linalg.inv(suite.V.double().T @ suite.V.double())
    s = found.root @ found.root
    s *= oracle.trace() / s.trace()
    assert (s - oracle).norm() / oracle.norm() < 0.05
    cos, want = found.cosine(suite.V, suite.V), AIP(_root(oracle), _root(oracle), {}).cosine(suite.V, suite.V)
    assert (cos - want).abs().max() < 0.05


def _root(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.sqrt() @ vectors.T


def test_the_batch_size_changes_nothing_but_the_halves() -> None:
    x = skewed(2000)
    one, many = SecondMoment(D), SecondMoment(D)
    one.add(x)
    for part in x.split(37):
        many.add(part)
    assert one.n == many.n == 2000
    torch.testing.assert_close(one.moment(), many.moment(), rtol=1e-12, atol=1e-12)


def test_too_few_rows_and_singular_moments_are_refused_with_the_fix() -> None:
    with pytest.raises(DataError, match="there are 119: harvest more"):
        estimate(skewed(119))
    flat = skewed()
    flat[:, 0] = 0
    with pytest.raises(DataError, match="singular"):
        estimate(flat, ridge=0.0)
    assert torch.isfinite(estimate(flat, ridge=1e-4).root).all()
    with pytest.raises(DataError, match="at least"):
        train(skewed(100), [threshold_atoms(d_sae=20)], TrainConfig(steps=2, batch_size=10))


def test_the_record_tells_condition_halves_and_angles() -> None:
    x = skewed(8000, condition=400.0) - 0.3
    record = estimate(x, ridge=0.0).record
    values = torch.linalg.eigvalsh(x.double().T @ x.double())
    assert record["condition"] == pytest.approx(float(values[-1] / values[0]))
    assert record["rows"] == 8000 and abs(record["angle_centre"] - 90) < 1
    # halves with the same rows agree; halves of different laws do not
    same, other = SecondMoment(D), SecondMoment(D)
    same.add(torch.cat([x[:500], x[:500]]))
    other.add(torch.cat([x[:500], x[:500] * torch.linspace(0.1, 10, D)]))
    assert same.aip().record["angle_change"] == 0 and other.aip().record["angle_change"] > 0.2


def test_whitening_centres_the_angles_of_any_data() -> None:
    """The control of the paper's shift test: no atoms here."""
    x = skewed(4000) + 2.0
    assert histogram_median(angle_histogram(x[:400])) < 60
    # the mean keeps a norm below 1 of sqrt(D): an average cosine of at most 1 / D
    assert abs(histogram_median(angle_histogram(estimate(x).whiten(x[:400]))) - 90) < 6


def test_an_aip_is_the_same_from_its_files_and_damage_is_refused(tmp_path: Path) -> None:
    aip = estimate(skewed())
    aip.save(tmp_path)
    again = AIP.load(tmp_path)
    assert torch.equal(again.root, aip.root) and torch.equal(again.inverse, aip.inverse)
    assert again.record == aip.record
    written = (tmp_path / "aip.json").read_text()
    (tmp_path / "aip.json").write_text("{}")
    with pytest.raises(DataError, match="two roots"):
        AIP.load(tmp_path)
    (tmp_path / "aip.json").write_text(written)
    (tmp_path / "aip.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(DataError, match="train the SAE again"):
        AIP.load(tmp_path)
    with pytest.raises(MissingDataError, match="no AIP"):
        AIP.load(tmp_path / "nowhere")


def test_a_store_is_estimated_from_its_train_rows_alone(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path, [40] * 20, d=6)
    pos, split = store.corpus.column("pos"), store.corpus.column("split")
    x = vectors[HOOK][torch.from_numpy((pos > 0) & (split == 0))].double()
    found = store_aip(store, HOOK, ridge=0.0)
    assert found.record["rows"] == len(x)
    torch.testing.assert_close(found.inverse @ found.inverse, x.T @ x / len(x), rtol=1e-5, atol=1e-4)


# ---- folding ----


def whitened_sae(activation: str) -> SAE:
    gen = torch.Generator().manual_seed(1)
    k = {"k": 4} if "topk" in activation else {}
    sae = SAE(SAEConfig(d_sae=40, d_model=D, activation=activation, space="aip", hook="h", **k))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.5)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if sae.cfg.has_threshold:
            sae.threshold.fill_(0.8)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_folding_the_whitening_keeps_selection_codes_and_reconstruction(activation: str) -> None:
    x = skewed(300)
    aip, white, folded = estimate(skewed()), whitened_sae(activation), whitened_sae(activation)
    fold_whitening(folded, aip.root, aip.inverse)
    before, after = white.encode(aip.whiten(x)).dense(40), folded.encode(x).dense(40)
    assert torch.equal(before != 0, after != 0) and (before != 0).any()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded(x), aip.unwhiten(white(aip.whiten(x))), rtol=1e-5, atol=1e-5)


# ---- training ----


def test_a_killed_whitened_run_goes_on_bit_for_bit_without_a_new_estimate(
    tmp_path: Path, monkeypatch
) -> None:
    x = skewed(3000)
    job = [
        threshold_atoms(d_sae=32, l0=0.01, separability=0.1),
        topk(d_sae=32, k=3, space="aip", aip_centred=True),
    ]
    config = TrainConfig(steps=60, batch_size=64, screen="off", log_every=10, lr=3e-3, dead_refresh_steps=5)
    whole = train(x, job, config, workspace=tmp_path / "a")
    real, calls = training.save_checkpoint, []

    def stop_after_some(run: Path, checkpoint):
        path = real(run, checkpoint)
        calls.append(checkpoint.step)
        if len(calls) == 33:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(training, "save_checkpoint", stop_after_some)
    with pytest.raises(KeyboardInterrupt):
        often = TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0}))
        train(x, job, often, workspace=tmp_path / "b")
    monkeypatch.setattr(training, "save_checkpoint", real)
    monkeypatch.setattr(training, "_second_moment", lambda *_: pytest.fail("estimated again"))
    for a, b in zip(whole, train(x, job, config, workspace=tmp_path / "b"), strict=True):
        for name, tensor in a.sae.state_dict().items():
            assert torch.equal(tensor, b.sae.state_dict()[name]), f"{a.sae.cfg.label}: {name}"
        assert AIP.load(a.path).record == AIP.load(b.path).record


def test_whitened_training_finds_atoms_that_plain_space_misses() -> None:
    """S9: a dictionary under a map of condition 32, the same weight of the L0 term in both spaces."""
    suite = make_suite("S9", 0, n_rows=8192)
    config = TrainConfig(steps=550, batch_size=256, lr=1e-2, warmup_steps=30, screen="off", log_every=550)
    more = {"l0": 0.01, "bandwidth": 0.2, "threshold_init": 1.0}
    job = [threshold_atoms(d_sae=160, space=s, **more) for s in ("aip", "scalar")]
    aip, plain = (recovery_scores(r.sae, suite) for r in train(suite.x, job, config))
    assert aip["frr"] > 0.9 and aip["support_f1"] > 0.85, aip
    assert plain["frr"] < 0.5 and plain["support_f1"] < 0.6, plain


def test_the_plain_variant_is_named_so_and_d_sae_defaults_to_four_d_model() -> None:
    assert threshold_atoms(d_model=16).d_sae == 64 and threshold_atoms(d_sae=64).space == "aip"
    assert threshold_atoms(d_sae=64, space="scalar").label == "threshold-atoms-plain-64"
    assert threshold_atoms(d_sae=64).label == "threshold-atoms-64"
    with pytest.raises(UsageError, match="d_sae, or d_model"):
        threshold_atoms()
    with pytest.raises(UsageError, match="space aip"):
        threshold_atoms(d_sae=8, out_hook="b", d_out=3)


# ---- separability ----


def test_separability_is_the_mean_over_nearest_pairs_past_the_bound() -> None:
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(30, 6, generator=gen, dtype=torch.float64, requires_grad=True)
    unit = w.detach() / w.detach().norm(dim=1, keepdim=True)
    cos = (unit @ unit.T).abs().fill_diagonal_(0)
    near = nearest_atoms(w.detach())
    assert torch.equal(near, cos.argmax(1))
    for k in (1, 2.5, 4):
        want = ((cos.max(1).values - 1 / (2 * k - 1)).clamp_min(0) ** 2).mean()
        torch.testing.assert_close(separability(w, near, k), want)
    assert torch.autograd.gradcheck(lambda v: separability(v, near, 3.0), (w,))


def test_the_penalty_pushes_close_atoms_apart() -> None:
    x = make_suite("S1", 0, n_rows=4096).x
    config = TrainConfig(steps=300, batch_size=256, lr=5e-3, warmup_steps=10, screen="off", log_every=300)
    job = [threshold_atoms(d_sae=128, l0=0.01, separability=s) for s in (0.0, 20.0)]
    close = []
    for result in train(x, job, config):
        aip = estimate(x)
        white = torch.nn.functional.normalize(aip.whiten(result.sae.W_dec), dim=1)
        close.append(float((white @ white.T).abs().fill_diagonal_(0).max(1).values.mean()))
    assert close[1] < close[0] - 0.03, close


@pytest.mark.parametrize(
    "config", [threshold_atoms(d_sae=48), topk(d_sae=48, k=4, space="aip")], ids=["atoms", "topk"]
)
def test_a_centred_geometry_trains_on_rows_far_from_the_origin(config: SAEConfig) -> None:
    """Rows keep their mean there, so their norms are nowhere near sqrt(d_model); none of them is an attention sink."""
    x = torch.randn(4000, D, generator=torch.Generator().manual_seed(0)) + 11.0
    plan = TrainConfig(steps=60, batch_size=256, lr=3e-3, warmup_steps=5, log_every=20)
    result = train(x, [replace(config, aip_centred=True)], plan)[0]
    assert all(t.isfinite().all() for t in result.sae.state_dict().values())
    error = (x - result.sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert result.metrics[-1]["fvu"] == pytest.approx(error.item(), rel=0.25), (
        "the log says what the SAE does"
    )
