"""Core metrics with known answers, against sae-lens where it is right, and intervals that cover."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import saes.metrics
from saes.codes import Codes
from saes.config import SAEConfig
from saes.evaluation import evaluate
from saes.metrics import Firing, Reconstruction, bootstrap
from saes.predictions import clean_contexts, context_sums, prediction_rows, scored_logits
from saes.sae import SAE
from saes.weights import max_cosine, weight_statistics
from tests.corpora import HOOK, make_store

pytest_plugins = ("tests.workspaces",)
TINY_HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


def measured(
    x: torch.Tensor, x_hat: torch.Tensor, codes: Codes | None = None, context=None
) -> Reconstruction:
    r = Reconstruction(x.shape[1], x.double().mean(0))
    r.add(x, x_hat, codes, context)
    return r


def test_a_shrunk_copy_has_the_bias_by_which_it_was_shrunk() -> None:
    x = torch.randn(300, 7, dtype=torch.float64)
    values = measured(x, 0.8 * x).values()
    assert values["bias"] == pytest.approx(0.8) and values["norm_ratio"] == pytest.approx(0.8)
    assert values["nmse"] == pytest.approx(0.04) and values["mse"] == pytest.approx(
        0.04 * (x**2).sum(1).mean().item()
    )
    assert values["cos"] == pytest.approx(1.0)
    assert measured(x, x).values()["bias"] == pytest.approx(1.0)
    assert measured(x, torch.zeros_like(x)).values()["bias"] == 0.0, (
        "nothing reconstructed is no division by zero"
    )


def test_nmse_ignores_the_mean_and_fvu_does_not() -> None:
    x = torch.randn(500, 4, dtype=torch.float64) + 50
    values = measured(x, x.mean(0).expand_as(x)).values()
    assert values["fvu"] == pytest.approx(1.0) and values["nmse"] < 1e-3


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 2, 4])])
def test_l1_counts_the_size_of_negative_activations(offsets) -> None:
    values, indices = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[0, 1], [1, 2]]).int()
    codes = Codes(values, indices) if offsets is None else Codes(values.flatten(), indices.flatten(), offsets)
    found = measured(torch.randn(2, 3), torch.randn(2, 3), codes).values()
    assert found["l1"] == 3.0 and found["l0"] == 1.5


def test_reconstruction_agrees_with_sae_lens_on_the_same_tensors() -> None:
    evals = pytest.importorskip("sae_lens.evals", reason="sae-lens is not installed: pip install -e '.[dev]'")
    x = torch.randn(400, 6) * 2 + 1
    x_hat = 0.9 * x + 0.2 * torch.randn(400, 6)
    ours = measured(x, x_hat).values()
    calculator = evals.ExplainedVarianceCalculator()
    calculator.add_batch(x_hat, x)
    assert 1 - ours["fvu"] == pytest.approx(float(calculator.compute()), rel=1e-4)
    # the other formulas of sae_lens.evals.get_sparsity_and_variance_metrics, as they stand there
    norm_in, norm_out = torch.norm(x, dim=-1), torch.norm(x_hat, dim=-1)
    assert ours["norm_ratio"] == pytest.approx((norm_out / norm_in).mean().item(), rel=1e-5)
    assert ours["bias"] == pytest.approx(((norm_out**2).mean() / (x_hat * x).sum(-1).mean()).item(), rel=1e-5)
    assert ours["mse"] == pytest.approx((x - x_hat).pow(2).sum(-1).mean().item(), rel=1e-5)
    assert ours["cos"] == pytest.approx(F.cosine_similarity(x, x_hat, dim=-1).mean().item(), rel=1e-5)


def test_float32_batches_are_summed_in_float64() -> None:
    big, x = Reconstruction(1), torch.ones(1000, 1)
    for _ in range(200):
        big.add(x * 4097, x * 4096)
    assert big.values()["mse"] == 1.0 and big.values()["nmse"] == 1 / 4097**2


def test_intervals_cover_the_truth_and_come_from_contexts_not_tokens() -> None:
    rng, hits, wide = np.random.default_rng(0), 0, 0.0
    for _ in range(60):
        # tokens of a context share their error: only the number of contexts is evidence
        error = torch.from_numpy(np.repeat(rng.exponential(1.0, size=40), 25)).sqrt()[:, None]
        x = torch.zeros(1000, 1, dtype=torch.float64)
        low, high = measured(x, error, context=np.repeat(np.arange(40), 25)).intervals()["mse"]
        hits += low <= 1.0 <= high
        wide += (high - low) / 60
    assert 48 <= hits <= 60, "about 95 % of the intervals hold the true mean of 1"
    assert wide > 4 * 1.96 / np.sqrt(1000), "an interval over tokens would be a fifth as wide"
    assert measured(x, error, context=np.zeros(1000)).intervals() == {}, "one context says nothing of others"


def test_an_interval_does_not_depend_on_how_rows_were_batched() -> None:
    x, context = torch.randn(90, 3), np.repeat(np.arange(9), 10)
    x_hat = 0.9 * x + 0.3 * torch.randn(90, 3)
    whole, parts = measured(x, x_hat, context=context), Reconstruction(3, x.double().mean(0))
    for i in range(0, 90, 7):
        parts.add(x[i : i + 7], x_hat[i : i + 7], None, context[i : i + 7])
    assert whole.values() == pytest.approx(parts.values())
    for metric, interval in whole.intervals().items():
        assert interval == pytest.approx(parts.intervals()[metric]), metric
        assert interval[0] <= whole.values()[metric] <= interval[1], metric


SHIFTS = ("none", "reference", "all", "a tenth of the contexts")


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n_contexts", [3, 40])
@pytest.mark.parametrize("kind", ["shrunk", "noisy", "mean"])
def test_no_metric_lies_outside_its_own_interval(shift: str, n_contexts: int, kind: str) -> None:
    x, context = torch.randn(2000, 16), np.arange(2000) * n_contexts // 2000
    if shift == "all":
        x += 3.0
    if shift == "a tenth of the contexts":
        x[torch.from_numpy(context) < max(1, n_contexts // 10)] += 3.0
    x_hat = {"shrunk": 0.3 * x, "noisy": x + torch.randn(2000, 16), "mean": x.mean(0).expand_as(x)}[kind]
    codes = Codes(torch.randn(2000, 4).relu(), torch.arange(4).expand(2000, 4).int())
    r = Reconstruction(16, torch.full((16,), 0.4) if shift == "reference" else None)
    r.add(x, x_hat, codes, context)
    values, intervals = r.values(), r.intervals()
    assert set(values) == set(intervals)
    for metric, (low, high) in intervals.items():
        tiny = 1e-9 * abs(values[metric])
        assert low - tiny <= values[metric] <= high + tiny, (metric, low, values[metric], high)


def test_the_interval_of_fvu_does_not_depend_on_the_reference() -> None:
    """By hand: errors over the spread about the mean of all rows, of resampled contexts."""
    x, context = torch.randn(600, 5).double() * 2 + 1, np.repeat(np.arange(30), 20)
    x_hat = x + torch.randn(600, 5)
    spread = ((x - x.mean(0)) ** 2).sum(1).view(30, 20).sum(1)
    error = ((x - x_hat) ** 2).sum(1).view(30, 20).sum(1)
    want = bootstrap(torch.stack([error, spread], 1).numpy(), lambda t: t[..., 0] / t[..., 1])
    for reference in (None, x.mean(0), torch.full((5,), 40.0)):
        r = Reconstruction(5, reference)
        r.add(x, x_hat, None, context)
        assert r.intervals()["fvu"] == pytest.approx(want, rel=1e-9)
        assert r.values()["fvu"] == pytest.approx((error.sum() / spread.sum()).item(), rel=1e-9)


def test_many_short_contexts_do_not_fill_the_memory_and_keep_their_interval(monkeypatch) -> None:
    x = torch.randn(3000, 4) + 2
    x_hat, got = x + 0.5 * torch.randn(3000, 4), []
    for size in (saes.metrics.GROUP_BYTES, (4 + 10) * 8 * 300):
        monkeypatch.setattr(saes.metrics, "GROUP_BYTES", size)
        r = Reconstruction(4)
        for i in range(0, 3000, 500):
            r.add(x[i : i + 500], x_hat[i : i + 500], None, np.arange(i, i + 500) // 2 + 7)
        got.append((r.groups, r.values(), r.intervals()))
    (many, values, wide), (few, same, near) = got
    assert (many, few) == (1500, 300) and values == same
    for metric, (low, high) in near.items():
        assert low <= values[metric] <= high
        assert high - low == pytest.approx(wide[metric][1] - wide[metric][0], rel=0.25), metric


def test_bootstrap_of_equal_contexts_is_a_point() -> None:
    assert bootstrap(np.ones((5, 2)), lambda t: t[:, 0] / t[:, 1]) == (1.0, 1.0)


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
@pytest.mark.parametrize("flat", [False, True])
def test_consistency_counts_a_context_once_though_batches_cut_it(batch: int, flat: bool) -> None:
    rng = np.random.default_rng(3)
    context = np.sort(rng.integers(0, 12, size=60))
    values = torch.from_numpy(rng.normal(size=(60, 3)) * (rng.random((60, 3)) < 0.5)).float()
    indices = torch.from_numpy(np.stack([rng.permutation(9)[:3] for _ in range(60)])).int()
    firing = Firing(9)
    for i in range(0, 60, batch):
        v, j = values[i : i + batch], indices[i : i + batch]
        offsets = torch.arange(len(v) + 1) * 3
        firing.add(Codes(v.flatten(), j.flatten(), offsets) if flat else Codes(v, j), context[i : i + batch])
    dense = Codes(values, indices).dense(9).numpy() != 0
    want = [dense[:, f].sum() / len(set(context[dense[:, f]])) for f in range(9)]
    np.testing.assert_allclose(firing.consistency(), want)
    assert firing.values()["consistency"] == pytest.approx(np.mean(want))


def test_density_shares_state_their_thresholds() -> None:
    firing = Firing(4)
    values = torch.zeros(1000, 3)
    values[:, 0], values[:50, 1], values[:5, 2] = 1.0, 1.0, -1.0
    firing.add(Codes(values, torch.tensor([[0, 1, 2]]).expand(1000, 3).int()))
    assert firing.values() == {"alive": 0.75, "dense": 0.25, "dense_1pct": 0.5}
    assert np.isnan(firing.consistency()).all()


def test_weight_statistics_equal_the_dense_matrix() -> None:
    sae = SAE(SAEConfig(d_sae=40, k=2, d_model=6)).requires_grad_(False)
    for i, p in enumerate(sae.parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    sae.W_dec[7] = -3 * sae.W_dec[8]
    stats = weight_statistics(sae)
    w, e = sae.W_dec.double(), sae.W_enc.double()
    unit = F.normalize(w, dim=1)
    cos = (unit @ unit.T).fill_diagonal_(-2)
    np.testing.assert_allclose(stats["max_dec_cos"], cos.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(stats["cos_enc_dec"], F.cosine_similarity(w, e, dim=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["dec_norm"], w.norm(dim=1), rtol=1e-6)
    assert max_cosine(sae.W_dec, torch.tensor([7]), signed=True).item() == pytest.approx(1.0), (
        "an antipode is a duplicate"
    )
    assert max_cosine(sae.W_dec, torch.tensor([7]), signed=False).item() < 0.95
    some = weight_statistics(sae, sample=10)
    assert len(some["max_dec_cos"]) == 10 and len(some["dec_norm"]) == 40
    assert set(some["max_dec_cos"].round(5)) <= set(stats["max_dec_cos"].round(5))


def test_kl_and_cross_entropy_equal_the_formulas(tiny_model) -> None:
    ids, mask = torch.randint(5, 200, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    clean = scored_logits(tiny_model, ids, mask, TINY_HOOK, None)
    zero = scored_logits(tiny_model, ids, mask, TINY_HOOK, lambda x: (torch.zeros_like(x), None))
    contexts = clean_contexts(clean, ids, mask)
    for logits in (clean, zero):
        sums = context_sums(logits, contexts)
        for i, (n, ce, kl) in enumerate(sums):
            keep = mask[i, 2:]
            p, q = clean[i][keep].double().log_softmax(-1), logits[i][keep].double().log_softmax(-1)
            assert n == keep.sum()
            assert ce == pytest.approx(F.nll_loss(q, ids[i, 2:][keep], reduction="sum").item(), rel=1e-5)
            want = F.kl_div(q, p, log_target=True, reduction="sum").item()
            assert kl == pytest.approx(want, rel=1e-4, abs=1e-5)


class Named:
    """A reconstruction with a name."""

    def __init__(self, name: str, fn) -> None:
        self.name, self.fn = name, fn

    def __call__(self, x: torch.Tensor):
        return self.fn(x), None


def test_predictions_of_known_reconstructions(tiny_workspace) -> None:
    from cache import ActivationStore, load_model

    store = ActivationStore.open(ActivationStore.find_all(tiny_workspace.path)[0])
    model = load_model(tiny_workspace.model_dir, workspace=tiny_workspace.path)
    subjects = [
        Named("copy", lambda x: x.clone()), Named("nothing", torch.zeros_like), Named("noisy", lambda x: x + torch.ones_like(x)),
    ]  # fmt: skip
    found = prediction_rows(subjects, store, model, TINY_HOOK, 400)
    value = {(r["subject"], r["metric"]): r["value"] for r in found}
    for metric, copy, nothing in (
        ("delta_ce", 0.0, None), ("kl", 0.0, value["model", "kl_zero"]), ("delta_loss_pct", 0.0, None),
        ("ce_recovered_zero", 1.0, 0.0), ("kl_score_zero", 1.0, 0.0), ("ce_recovered_mean", 1.0, None),
        ("kl_score_mean", 1.0, None), ("ce", value["model", "ce_clean"], value["model", "ce_zero"]),
    ):  # fmt: skip
        assert value["copy", metric] == pytest.approx(copy, abs=1e-5), metric
        assert nothing is None or value["nothing", metric] == pytest.approx(nothing, abs=1e-9), metric
    want = 100 * (value["noisy", "ce"] / value["model", "ce_clean"] - 1)
    assert value["noisy", "delta_loss_pct"] == pytest.approx(want) and value["noisy", "kl"] > 0
    for r in found:
        if r["subject"] != "model":
            assert r["ci_low"] - 1e-9 <= r["value"] <= r["ci_high"] + 1e-9, r


def test_every_row_of_the_list_is_in_an_evaluation(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40, d=8)
    sae = SAE(SAEConfig(d_sae=24, k=3, d_model=8, hook=HOOK)).requires_grad_(False)
    for i, p in enumerate(sae.parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    table = evaluate(sae, store).table()
    for metric in (
        "l0", "l1", "fvu", "fvu_usual", "mse", "nmse", "cos", "norm_ratio", "bias", "alive", "dense", "dense_1pct",
        "consistency", "enc_norm", "dec_norm", "b_enc", "cos_enc_dec", "max_dec_cos", "max_dec_cos_p95", "max_enc_cos",
    ):  # fmt: skip
        assert np.isfinite(table.loc[metric, "sae"]), metric
    assert np.isfinite(table.loc["l1", "untrained"]) and np.isfinite(table.loc["bias", "pca-3"])
    rows = [r for r in evaluate(sae, store, token_classes=True).rows if r["ci_low"] is not None]
    assert {"fvu", "fvu_usual", "cos", "l1", "bias", "nmse@content"} <= {r["metric"] for r in rows}
    for r in rows:
        tiny = 1e-9 * abs(r["value"])
        assert r["ci_low"] - tiny <= r["value"] <= r["ci_high"] + tiny, r
