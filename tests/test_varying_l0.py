"""SAEs whose number of active latents varies: selection over a batch, splices, evaluation and training sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saes import selection
from saes.codes import Codes
from saes.config import SAEConfig
from saes.evaluation import evaluate
from saes.sae import SAE
from saes.splice import attach
from tests.corpora import HOOK, make_store

D, F = 7, 40
ARGUMENTS = {"jumprelu": {}, "batch_abs_topk": {"k": 3}, "relu": {}, "gated": {}}


def fill(sae: SAE, threshold: float, scale: float = 1.0) -> SAE:
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * scale)
        if sae.cfg.has_threshold:
            sae.threshold.fill_(threshold)
    return sae


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_the_batch_keeps_exactly_its_largest_pre_activations(n: int, signed: bool, monkeypatch) -> None:
    """Also where one row holds nearly all of them, so that a bound from a sample of rows is far off."""
    gen = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(70, D, generator=gen), torch.randn(F, D, generator=gen), torch.zeros(F)
    for scale in (torch.ones(70, 1), torch.where(torch.arange(70)[:, None] == 69, 100.0, 0.01),
                  torch.where(torch.arange(70)[:, None] < 3, 100.0, 0.01)):  # fmt: skip
        monkeypatch.setattr(selection, "SAMPLE_ROWS", 4)
        got = selection.batch_largest(x * scale, w, b, n, signed=signed)
        u = x * scale @ w.T
        size = u.abs() if signed else u
        torch.testing.assert_close(
            (got.values.abs() if signed else got.values).sort().values,
            size.flatten().topk(n).values.sort().values,
        )
        at = torch.arange(70).repeat_interleave(got.offsets.diff())
        torch.testing.assert_close(got.values, u[at, got.indices], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["jumprelu", "batch_abs_topk", "gated"])
def test_a_splice_of_varying_l0_is_exact_editable_and_differentiable(activation: str, tiny_model) -> None:
    hook = "blocks.1.hook_resid_post"
    d = tiny_model.d_hook(hook)
    cfg = SAEConfig(d_sae=F, d_model=d, activation=activation, hook=hook, **ARGUMENTS[activation])
    sae = fill(SAE(cfg), 0.2, 0.3)
    ids = torch.randint(5, 200, (2, 7))
    plain, _ = tiny_model.forward(ids)
    with attach(tiny_model, {hook: sae}) as a:
        logits, _ = tiny_model.forward(ids)
        codes = a.codes[hook]
    assert torch.equal(plain, logits) and codes.n_rows == 12
    logits.sum().backward()
    assert codes.values.grad is not None and codes.values.grad.abs().sum() > 0
    sae.requires_grad_(False)
    before = tiny_model.capture(ids, [hook])[hook]
    with attach(tiny_model, {hook: sae}) as a:
        a.edit(hook, lambda c: Codes(c.values * 2, c.indices, c.offsets))
        after = tiny_model.capture(ids, [hook])[hook]
        dense = a.codes[hook].dense(F)
    want = before.clone()
    want[:, 1:] += (dense @ sae.W_dec).view(2, 6, d)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ARGUMENTS)
def test_controls_of_an_sae_of_varying_l0_have_its_mean_l0(activation: str, tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path, [40] * 40, d=8)
    cfg = SAEConfig(d_sae=24, d_model=8, hook=HOOK, activation=activation, **ARGUMENTS[activation])
    sae = fill(SAE(cfg), 40.0).requires_grad_(False)
    result = evaluate(sae, store)
    first = torch.from_numpy(store.corpus.column("pos") == 0)
    heldout = ~first & torch.from_numpy(store.corpus.column("split") == 1)
    x, dense = vectors[HOOK], sae.encode(vectors[HOOK]).dense(24)
    l0 = (dense[heldout] != 0).sum(1).double().mean().item()
    assert result.value("l0") == pytest.approx(l0) and 0 < l0 < 24
    assert 0 <= round(l0) - result.value("l0", "untrained") < 1
    assert f"pca-{min(round(l0), 8)}" in result.table().columns
    error = (x[heldout] - dense[heldout] @ sae.W_dec - sae.b_dec).double()
    spread = (x[heldout] - x[heldout].mean(0)).double()
    assert result.value("fvu") == pytest.approx(((error**2).sum() / (spread**2).sum()).item(), rel=1e-3)
    assert result.value("alive") == pytest.approx((dense[~first] != 0).any(0).double().mean().item())
