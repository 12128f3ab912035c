"""`saes.checking`: an SAE that is used as it was trained passes; each wrong convention is found and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.errors import DataError
from saes.checking import check
from saes.config import SAEConfig
from saes.conventions import Conventions
from saes.evaluation import evaluate
from saes.indexing import build_index
from saes.presets import PRESETS
from saes.sae import SAE
from saes.train_config import TrainConfig
from saes.training import train
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


OTHERWISE = Conventions(prepend_bos=True, context=8, model="google/gemma-2-2b")


def test_evaluate_and_build_index_say_each_difference_in_one_line_and_once(space, capsys) -> None:
    """Only `check` did: figures of an SAE on text that it was not made for looked like any other."""
    store, sae, _ = space
    sae.conventions = Conventions(prepend_bos=False)
    evaluate(sae, store, controls=False)
    assert " on " not in capsys.readouterr().err
    sae.conventions = OTHERWISE
    evaluate(sae, store, controls=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if f" on {store.path.name}: " in line]
    assert len(lines) == 3, lines
    for line, words in zip(lines, ("gemma-2-2b", "prepend_bos=True", "contexts of 8"), strict=True):
        assert words in line and sae.cfg.label in line
    build_index(sae, store)
    evaluate(sae, store, controls=False)
    assert "gemma" not in capsys.readouterr().err


def test_build_index_alone_says_them_too(space, capsys) -> None:
    store, sae, _ = space
    with torch.no_grad():
        sae.b_enc += 0.01  # another SAE than that of other tests: lines come once a process
    sae.conventions = OTHERWISE
    build_index(sae, store)
    err = capsys.readouterr().err
    assert all(err.count(words) == 1 for words in ("gemma-2-2b", "prepend_bos=True", "contexts of 8")), err


def test_an_sae_trained_here_passes_and_with_a_wrong_decoder_does_not(space, tmp_path: Path) -> None:
    """Its card is the run's own FVU: a decoder of half the size was passed in silence."""
    store, _, _ = space
    config = TrainConfig(steps=300, batch_size=128, lr=5e-3, screen="off", log_every=50)
    kinds = [
        ("topk", {"k": K}),
        ("batch_topk", {"k": K}),
        ("relu_l1", {"l1": 0.1}),
        ("topk", {"k": K, "space": "raw"}),
    ]
    for result in train(store, [PRESETS[p](d_sae=24, **more) for p, more in kinds], config):
        assert result.path is not None
        sae = SAE.load(result.path)
        assert sae.conventions.fvu == pytest.approx(result.metrics[-1]["fvu"])
        assert check(sae, store).warnings == () and sae.sae_id == result.sae.sae_id
        with torch.no_grad():
            sae.W_dec.mul_(0.5)
        assert any("stated is" in w for w in check(sae, store).warnings), sae.cfg.label


def test_text_that_an_sae_was_not_trained_on_may_be_harder(space) -> None:
    store, sae, _ = space
    with torch.no_grad():
        sae.W_dec.mul_(0.8)  # an FVU of 0.04
    own = Conventions(dataset="test", context=store.corpus.context, fvu=0.0)
    assert any("stated is" in w for w in check_with(sae, own, store))
    for other in (replace(own, dataset="another"), replace(own, source="saelens")):
        assert not check_with(sae, other, store)


def check_with(sae: SAE, conventions: Conventions, store) -> tuple[str, ...]:
    sae.conventions = conventions
    return check(sae, store).warnings


@pytest.mark.parametrize("skip", ["special", "first+special"])
def test_an_sae_of_some_rows_alone_states_no_fvu_for_the_others(skip: str, space) -> None:
    """check sees all rows: a figure of the other tokens alone would be an alarm about a good SAE."""
    store = space[0]
    config = TrainConfig(steps=3, batch_size=32, lr=5e-3, screen="off", skip=skip)
    assert train(store, SAEConfig(d_sae=24, k=3), config)[0].sae.conventions.fvu is None
    first = train(store, SAEConfig(d_sae=24, k=3), replace(config, skip="first"))[0].sae
    assert first.conventions.fvu is not None


def test_text_that_changes_half_way_through_a_store_is_no_alarm(tmp_path: Path) -> None:
    """The first rows of a store of two sources are not what training saw."""
    gen = torch.Generator().manual_seed(0)
    corpus = make_corpus(tmp_path, [40] * 200)
    n = corpus.n_tokens
    atoms = torch.linalg.qr(torch.randn(D, D, generator=gen))[0]
    active = torch.where(torch.arange(n) < n // 2, 6, 3)
    rank = torch.rand(n, D, generator=gen).argsort(1).argsort(1)
    x = ((rank < active[:, None]) * (7 + torch.rand(n, D, generator=gen) * 7)) @ atoms + 3
    store = empty_store(tmp_path, corpus, prepend_bos=False, rows_per_shard=1000)
    fill(store, {HOOK: x}, group_rows=100)
    config = TrainConfig(steps=300, batch_size=256, lr=5e-3, screen="off")
    sae = train(store, SAEConfig(d_sae=24, k=3), config)[0].sae
    assert not check(sae, store, max_rows=n // 4).warnings
