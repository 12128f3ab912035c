"""`saes.checking`: an SAE that is used as it was trained passes; each wrong convention is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.errors import DataError
from saes.checking import check
from saes.config import SAEConfig
from saes.conventions import Conventions
from saes.sae import SAE
from tests.corpora import HOOK, empty_store, fill, make_corpus

D, F, K = 16, 16, 3
SIZE = 7.0
CENTRE = torch.linspace(-9, 12, D)


def planted(n: int, atoms: Tensor) -> Tensor:
    """K atoms a row with positive coefficients, around a mean that no atom points at."""
    gen = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(F, generator=gen)[:K] for _ in range(n)])
    z = torch.zeros(n, F).scatter_(1, chosen, torch.rand(n, K, generator=gen) * SIZE + SIZE)
    return z @ atoms + CENTRE


@pytest.fixture
def space(tmp_path: Path):
    """A store of planted rows over orthonormal atoms, and the TopK SAE that reconstructs them exactly."""
    atoms = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    corpus = make_corpus(tmp_path, [40] * 12)
    x = planted(corpus.n_tokens, atoms)
    store = empty_store(tmp_path, corpus, prepend_bos=False)
    fill(store, {HOOK: x})
    sae = SAE(SAEConfig(d_sae=F, k=K, activation="topk", d_model=D, hook=HOOK))
    with torch.no_grad():
        sae.W_dec.copy_(atoms)
        sae.W_enc.copy_(atoms)
        sae.b_dec.copy_(CENTRE)
    return store, sae.requires_grad_(False), x


def scaled(sae: SAE, factor: float) -> SAE:
    """The SAE as it would be had it been trained on rows times `factor` and never been folded."""
    out = SAE(sae.cfg)
    out.load_state_dict(sae.state_dict())
    with torch.no_grad():
        for p in (out.b_enc, out.b_dec):
            p.mul_(factor)
    return out.requires_grad_(False)


def fvu_of(sae: SAE, x: Tensor) -> float:
    return float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())


def test_an_sae_in_its_own_units_passes_with_the_figures_of_a_direct_computation(space) -> None:
    store, sae, x = space
    sae.conventions = Conventions(prepend_bos=False, l0=float(K))
    found = check(sae, store)
    rows = x[torch.from_numpy(store.corpus.column("pos") > 0)]
    assert found.warnings == () and found.rows == len(rows)
    codes = sae.encode(rows)
    assert found.fvu == pytest.approx(fvu_of(sae, rows), abs=1e-9) and found.fvu < 1e-6
    assert found.l0 == pytest.approx(float((codes.values != 0).sum()) / len(rows))
    assert str(found).count("\n") == 0 and "stated 3" in str(found)


def test_an_unfolded_input_scale_is_named_with_the_factor_that_repairs_it(space, tmp_path: Path) -> None:
    store, sae, x = space
    rows = x[torch.from_numpy(store.corpus.column("pos") > 0)]
    factor = D**0.5 / float(rows.norm(dim=1).mean())
    broken = scaled(sae, factor)
    found = check(broken, store)
    assert any(f"norm_factor={factor:.4g}" in w for w in found.warnings), found
    assert found.fvu > 2 * fvu_of(sae, rows)
    repaired = SAE.load(broken.save(tmp_path / "broken"), norm_factor=factor)
    assert check(repaired, store).warnings == () and check(repaired, store).fvu < 1e-6


def test_a_bias_that_should_not_be_subtracted_is_named(space) -> None:
    store, sae, _ = space
    broken = scaled(sae, 1.0)
    with torch.no_grad():
        broken.b_enc -= broken.W_enc @ broken.b_dec
    found = check(broken, store)
    assert any("apply_b_dec_to_input" in w for w in found.warnings), found


def test_an_l0_or_fvu_off_the_card_and_other_text_are_said(space) -> None:
    store, sae, _ = space
    jump = SAE(SAEConfig(d_sae=F, activation="jumprelu", d_model=D, hook=HOOK))
    with torch.no_grad():
        for n, p in sae.named_parameters():
            getattr(jump, n).copy_(p)
        jump.W_dec.mul_(0.4)
    jump.requires_grad_(False).conventions = Conventions(
        prepend_bos=True, context=8, l0=2.0, fvu=0.0, model="google/gemma-2-2b"
    )
    said = "\n".join(check(jump, store).warnings)
    for words in (
        "L0 is",
        "stated is 2.0",
        "prepend_bos=True",
        "contexts of 8",
        "gemma-2-2b",
        "stated is 0.000",
    ):
        assert words in said, said


def test_a_wrong_stated_l0_of_an_sae_with_a_fixed_k_is_said(space) -> None:
    store, sae, _ = space
    sae.conventions = Conventions(prepend_bos=False, l0=2.5 * K)
    assert any(f"L0 is {K:.1f}, stated is {2.5 * K:.1f}" in w for w in check(sae, store).warnings)
    sae.conventions = Conventions(prepend_bos=False)
    assert check(sae, store).warnings == ()  # k states no L0 of its own: fewer than k may be positive


def test_a_store_of_another_width_is_refused(space) -> None:
    store, _, _ = space
    with pytest.raises(DataError, match="d_model"):
        check(SAE(SAEConfig(d_sae=F, k=K, d_model=D + 1, hook=HOOK)), store)
