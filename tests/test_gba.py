"""Group bias adaptation: the rule in closed form, exact counts, frozen biases, exact resume, files, planted atoms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app import jobs
from cache.errors import UsageError
from saes import activations
from saes.activations import training_step
from saes.config import SAEConfig
from saes.evaluation import evaluate
from saes.gba import GroupBias, bias_of, groups_of, over_target, rates_of, set_bias, warning
from saes.kernels import StepOutput
from saes.presets import abs_topk, batch_topk, gba
from saes.recovery import mmcs
from saes.sae import SAE
from saes.sources import TensorSource
from saes.synthetic import make_suite
from saes.train_config import TrainConfig
from saes.trainer import Trainer
from saes.training import train
from tests.corpora import HOOK, make_store

CPU = torch.device("cpu")
FORMS = ("jumprelu", "relu")


def rows(n: int = 4000, d: int = 8, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=gen) * torch.rand(n, 1, generator=gen) * 20 + 3


def trainer(cfg: SAEConfig, config: TrainConfig, x: Tensor) -> Trainer:
    t = Trainer(cfg, config, TensorSource(x).moments(config), CPU)
    t.start(x)
    return t


# ---- groups, bound, time constants ----


def test_target_frequencies_are_geometric_and_their_sum_bounds_l0() -> None:
    g = groups_of(gba(d_sae=400, gba_groups=4, gba_htf=0.1, gba_ltf=1e-4))
    assert g.targets == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4]) and g.sizes == [100] * 4
    assert g.l0_bound == pytest.approx(11.11) and g.top_share == pytest.approx(10 / 11.11)
    assert g.per_latent()[[0, 99, 100, 399]].tolist() == pytest.approx([0.1, 0.1, 0.01, 1e-4])
    assert "11.1" in str(g) and "90%" in str(g)
    assert groups_of(gba(d_sae=50, gba_groups=1, gba_htf=0.02)).l0_bound == pytest.approx(1.0)


def test_inverse_sizes_give_every_group_the_same_share_of_l0() -> None:
    g = groups_of(gba(d_sae=11_110, gba_groups=4, gba_ltf=1e-4, gba_sizes="inverse"))
    shares = [p * m for p, m in zip(g.targets, g.sizes, strict=True)]
    assert sum(g.sizes) == 11_110 and shares == pytest.approx([1.0] * 4, rel=0.2)


@pytest.mark.parametrize(("sizes", "budget"), [("equal", 24.0), ("inverse", 8.0)])
def test_an_l0_budget_chooses_the_highest_target_frequency(sizes: str, budget: float) -> None:
    cfg = gba(d_sae=2304, gba_l0_budget=budget, gba_sizes=sizes)
    assert groups_of(cfg).l0_bound == pytest.approx(budget, rel=0.1)
    with pytest.raises(UsageError, match="out of reach"):
        groups_of(gba(d_sae=100, gba_l0_budget=99.0))


def test_a_long_run_has_the_papers_rule_and_a_short_one_still_converges() -> None:
    cfg = gba(d_sae=1000, gba_groups=2, gba_htf=0.1, gba_ltf=1e-4)
    long = rates_of(cfg, TrainConfig(steps=200_000, batch_size=512), groups_of(cfg))
    # 10 / 1e-4 rows are 196 steps of 512; each 50 steps take 1 % of what is left
    assert long.windows == [50, 196] and long.stop == 190_000
    assert long.down == pytest.approx([0.01, 1 - 0.99 ** (196 / 50)])
    short = rates_of(cfg, TrainConfig(steps=2000, batch_size=512), groups_of(cfg))
    assert short.windows[0] == 1 and short.windows[1] == 1900 // 20
    for window, down in zip(short.windows, short.down, strict=True):
        assert (1 - down) ** (short.stop / window) == pytest.approx(math.exp(-20), rel=1e-6)


# ---- the rule ----


def output(values: Tensor, *, dense: bool) -> StepOutput:
    """A step whose latents fired with these values `[B, F]`."""
    if dense:
        return StepOutput(values, values, None, values)
    at = values.nonzero()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (values > 0).sum(1).cumsum(0)])
    return StepOutput(values, values[at[:, 0], at[:, 1]], at[:, 1], values, offsets)


EVERY = torch.ones(64, dtype=torch.bool)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_an_attention_sink_does_not_silence_the_latents_it_fires(form: str, dense: bool) -> None:
    """The same batch with a row of a hundred times the norm moves biases as it does without it."""
    cfg = gba(
        d_sae=6,
        d_model=3,
        gba_groups=2,
        gba_htf=0.5,
        gba_ltf=0.2,
        activation=form,
        gba_every=1,
        gba_events=0.0,
    )
    values = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).add(0.5)
    values[:, 3:] *= torch.arange(20)[:, None] % 7 == 0
    moved, usual = [], EVERY[:20].clone()
    for sink in (0.0, 300.0):
        rule, sae = GroupBias(cfg, TrainConfig(steps=100, batch_size=20), CPU), SAE(cfg)
        set_bias(sae, slice(None), torch.full((6,), -0.3))
        row = values.clone()
        row[11] = sink
        usual[11] = False
        rule.after_step(sae, output(row, dense=dense), 0, usual)
        moved.append(bias_of(sae).clone())
    torch.testing.assert_close(moved[0], moved[1])
    assert (moved[0][:3] < -0.3).all(), "over-active latents moved, so there was something to disturb"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_biases_move_as_the_rule_says(form: str, dense: bool) -> None:
    """Group one (target 0.5): over-active, at its clamp, within target, silent. Group two (0.25): silent but for one."""
    cfg = gba(d_sae=8, d_model=3, gba_groups=2, gba_htf=0.5, gba_ltf=0.25, activation=form, gba_events=0.0,
              gba_every=1, gba_gamma_down=0.1, gba_gamma_up=0.2, gba_folds=0.0)  # fmt: skip
    rule, sae = GroupBias(cfg, TrainConfig(steps=100, batch_size=4), CPU), SAE(cfg)
    rule.span = 1.0
    b = torch.tensor([-0.2, -0.99, -0.3, -0.4, -0.5, -0.05, -0.6, -0.7])
    set_bias(sae, slice(None), b)
    y = torch.tensor([[2.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0], [1.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0],
                      [0.5, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])  # fmt: skip
    values = torch.where(y > 0, y - b if form == "jumprelu" else y, 0.0)
    rule.after_step(sae, output(values, dense=dense), 0, EVERY[: len(values)])
    assert rule.groups.sizes == [4, 4]
    # mean head-room of the first group: (2 + 4 + 3) / 3; of the second: 0.5
    want = [
        -0.2 - 0.1 * 2,
        -1.0,
        -0.3,
        min(-0.4 + 0.2 * 3, 0.0),
        -0.5 + 0.2 * 0.5,
        0.0,
        -0.6,
        -0.7 + 0.2 * 0.5,
    ]
    torch.testing.assert_close(bias_of(sae), torch.tensor(want))
    assert not rule.counts.any() and not rule.peaks.any()


def test_a_group_that_never_fired_rises_by_the_mean_room_of_the_others() -> None:
    cfg = gba(
        d_sae=4,
        d_model=3,
        gba_groups=2,
        gba_htf=0.9,
        gba_ltf=0.9,
        gba_every=1,
        gba_gamma_up=0.1,
        gba_folds=0.0,
    )
    config = TrainConfig(steps=100, batch_size=16)
    rule, sae = GroupBias(cfg, config, CPU), SAE(cfg)
    set_bias(sae, slice(None), torch.full((4,), -0.8))
    values = torch.zeros(16, 4)
    values[0, 0] = 2.8
    rule.after_step(sae, output(values, dense=True), 0, EVERY[: len(values)])
    torch.testing.assert_close(bias_of(sae), torch.tensor([-0.8, -0.6, -0.6, -0.6]))
    alone, sae = GroupBias(cfg, config, CPU), SAE(cfg)
    alone.span = 3.0
    set_bias(sae, slice(None), torch.full((4,), -0.8))
    alone.after_step(sae, output(values * 0, dense=True), 0, EVERY[: len(values)])
    torch.testing.assert_close(bias_of(sae), torch.full((4,), -0.8 + 0.1 * 3.0))


@pytest.mark.parametrize("share", [2.0, -1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("form", FORMS)
def test_counts_and_maxima_are_those_of_all_rows_of_the_window(form: str, share: float, monkeypatch) -> None:
    monkeypatch.setattr(activations, "DENSE_SHARE", share)
    x = rows()
    cfg = gba(d_sae=40, d_model=8, activation=form, gba_groups=3, gba_ltf=5e-3, gba_htf=0.3)
    t = trainer(cfg, TrainConfig(steps=400, batch_size=50, lr=1e-2, warmup_steps=1, screen="off"), x)
    assert t.bias is not None and t.bias.rates.windows[-1] == 19 and t.bias.rates.windows[0] == 1
    count, peak = torch.zeros(40, dtype=torch.int64), torch.zeros(40)
    last = slice(t.bias.edges[2], 40)
    for step in range(30):
        if step == 19:
            count, peak = count * 0, peak * 0
        batch = x[step * 50 : step * 50 + 50]
        y = (batch * t.scale - t.sae.b_dec) @ t.sae.W_enc.T + bias_of(t.sae)
        count, peak = count + (y > 0).sum(0), torch.maximum(peak, y.amax(0).clamp_min(0.0)).detach()
        t.step(batch, step)
        if step != 18:
            assert torch.equal(t.bias.counts[last], count[last]) and t.bias.counts.dtype == torch.int64
            torch.testing.assert_close(t.bias.peaks[last], peak[last], rtol=1e-4, atol=1e-4)
    assert count[last].any()


def test_biases_stand_still_in_the_last_part_of_a_run() -> None:
    x = rows()
    config = TrainConfig(steps=100, batch_size=64, lr=1e-2, warmup_steps=1, screen="off")
    t = trainer(gba(d_sae=40, d_model=8, gba_groups=4, gba_freeze=0.1), config, x)
    history = []
    for step in range(100):
        t.step(x[step * 30 : step * 30 + 64], step)
        history.append(bias_of(t.sae).clone())
    assert all(torch.equal(b, history[89]) for b in history[90:]) and not torch.equal(
        history[88], history[80]
    )
    assert all((b <= 0).all() and (b >= -t.bias.span).all() for b in history)
    assert history[0].mean() > history[89].mean()


def test_latents_reach_their_target_frequencies() -> None:
    x = make_suite("S1", 0, n_rows=8000).x
    config = TrainConfig(steps=300, batch_size=128, lr=3e-3, warmup_steps=20, screen="off")
    cfg = gba(d_sae=128, gba_groups=4, gba_htf=0.1, gba_ltf=0.01)
    sae = train(x, [cfg], config)[0].sae
    frequency = (sae.encode(x).dense(128) > 0).float().mean(0)
    groups = groups_of(cfg)
    assert over_target(cfg, frequency, rows=len(x)) < 0.05
    assert frequency.sum() < groups.l0_bound * 1.05
    means = [part.mean().item() for part in frequency.split(groups.sizes)]
    assert means == sorted(means, reverse=True) and 0.002 < means[-1] < 0.01
    assert warning("x", {"over_target": 0.3}) and warning("x", {"over_target": 0.01}) is None


# ---- the step ----


@pytest.mark.parametrize("share", [2.0, -1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b_dec", ["fixed", "trained"])
def test_gradients_of_tied_weights_equal_dense_autograd(
    form: str, share: float, b_dec: str, monkeypatch
) -> None:
    monkeypatch.setattr(activations, "DENSE_SHARE", share)
    gen = torch.Generator().manual_seed(0)
    cfg = gba(d_sae=30, d_model=6, activation=form, gba_b_dec=b_dec)
    sae = SAE(cfg).double()
    GroupBias(cfg, TrainConfig(), CPU).prepare(sae)
    with torch.no_grad():
        for p in (sae.W_enc, sae.gain, sae.b_dec):
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64))
        set_bias(sae, slice(None), -torch.rand(30, generator=gen, dtype=torch.float64))
    x = torch.randn(11, 6, generator=gen, dtype=torch.float64)
    out = training_step(sae, x)
    assert (out.indices is None) == (share < 0)
    ((out.x_hat - x) ** 2).sum().backward()
    w, a = sae.W_enc.detach().clone().requires_grad_(), sae.gain.detach().clone().requires_grad_()
    centre = sae.b_dec.detach().clone().requires_grad_()
    u, b = (x - centre) @ w.T, bias_of(sae)
    z = (u if form == "jumprelu" else u + b) * (u + b > 0)
    ((z * a @ w + centre - x) ** 2).sum().backward()
    torch.testing.assert_close(sae.W_enc.grad, w.grad)
    torch.testing.assert_close(sae.gain.grad, a.grad)
    if b_dec == "trained":
        torch.testing.assert_close(sae.b_dec.grad, centre.grad)
    else:
        assert sae.b_dec.grad is None
    assert all(p.grad is None for p in (sae.W_dec, sae.b_enc))


def test_the_centre_stays_at_the_median_unless_it_is_trained() -> None:
    x, centres = rows(), {}
    config = TrainConfig(steps=50, batch_size=64, lr=1e-2, warmup_steps=1, screen="off")
    for b_dec in ("fixed", "trained"):
        t = trainer(gba(d_sae=40, gba_b_dec=b_dec, d_model=8), config, x)
        first = t.sae.b_dec.detach().clone()
        for step in range(50):
            t.step(x[step * 64 : step * 64 + 64], step)
        centres[b_dec] = float((t.sae.b_dec.detach() - first).norm())
        sae = t.finish()
        assert 1 - float(((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()) > 0.5
    assert centres["fixed"] == 0.0 < centres["trained"]


def test_biases_are_in_no_optimiser_and_the_run_starts_on_the_dense_switch() -> None:
    x = rows()
    config = TrainConfig(steps=200, batch_size=128, lr=3e-3, warmup_steps=1, screen="off")
    t = trainer(gba(d_sae=64, d_model=8, gba_groups=4, gba_htf=0.05), config, x)
    trained = {id(p) for group in t.optimiser.param_groups for p in group["params"]}
    assert trained == {id(t.sae.W_enc), id(t.sae.gain)}
    assert training_step(t.sae, x[:128] * t.scale).indices is None
    l0 = []
    for step in range(200):
        t.step(x[step * 15 : step * 15 + 128], step)
        assert (t.sae.W_enc.norm(dim=1) - 1).abs().max() < 1e-5
        l0.append(t.metrics()["l0"])
    assert 24 < l0[0] < 40 and l0[-1] < 4
    assert training_step(t.sae, x[:128] * t.scale).indices is not None


@pytest.mark.parametrize("more", [{}, {"activation": "relu"}, {"space": "unit"}, {"gba_b_dec": "trained"}])
def test_a_resumed_trainer_goes_on_bit_for_bit_with_its_counts(more: dict) -> None:
    x = rows()
    cfg = gba(d_sae=40, d_model=8, gba_ltf=5e-3, **more)
    config = TrainConfig(steps=200, batch_size=64, lr=1e-2, warmup_steps=1, screen="off")
    whole = trainer(cfg, config, x)
    for step in range(60):
        whole.step(x[step * 64 : step * 64 + 64], step)
        if step == 27:
            tensors = {n: t.clone() for n, t in whole.tensors().items()}
            state = json.loads(json.dumps(whole.state()))
            assert tensors["gba_counts"].any()
    again = Trainer(cfg, config, TensorSource(x).moments(config), CPU)
    again.load(tensors, state)
    for step in range(28, 60):
        again.step(x[step * 64 : step * 64 + 64], step)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    a, b = whole.finish(), again.finish()
    assert a.sae_id == b.sae_id


# ---- files ----


@pytest.mark.parametrize(("form", "architecture"), [("jumprelu", "jumprelu"), ("relu", "standard")])
def test_both_forms_load_in_sae_lens_with_equal_reconstructions(
    form: str, architecture: str, tmp_path: Path
) -> None:
    x = rows()
    config = TrainConfig(steps=80, batch_size=100, lr=1e-2, warmup_steps=5, screen="off")
    result = train(x, [gba(d_sae=40, activation=form, gba_groups=4)], config, workspace=tmp_path)[0]
    sae = result.sae
    assert result.path is not None and 0 < sae.encode(x).l0().float().mean() < 20
    unit = sae.W_enc.norm(dim=1)
    torch.testing.assert_close(unit, torch.ones_like(unit))
    cos = (sae.W_dec * sae.W_enc).sum(1).abs() / sae.W_dec.norm(dim=1)
    torch.testing.assert_close(cos, torch.ones_like(cos))
    assert (bias_of(sae) <= 0).all() and (bias_of(sae) < 0).any()
    again = SAE.load(result.path)
    assert again.sae_id == sae.sae_id and torch.equal(again(x), sae(x)) and not hasattr(sae, "gain")
    assert json.loads((result.path / "cfg.json").read_text())["architecture"] == architecture
    record = json.loads((result.path.parent / "run.json").read_text())["bias_rules"][0]
    assert (
        record["l0_bound"] == pytest.approx(groups_of(sae.cfg).l0_bound) and 0 <= record["over_target"] <= 1
    )
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    theirs = sae_lens.SAE.load_from_disk(str(result.path))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(40), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", [gba, batch_topk, abs_topk])
def test_unit_norm_stays_a_rule_of_the_saved_sae(preset, tmp_path: Path) -> None:
    """Rows twice as far from b_dec have codes twice as large; sae-lens, which has no such rule, refuses the folder."""
    x = rows()
    more = {} if preset is gba else {"k": 3}
    config = TrainConfig(steps=80, batch_size=100, lr=1e-2, warmup_steps=5, screen="off")
    result = train(x, [preset(d_sae=40, space="unit", **more)], config, workspace=tmp_path)[0]
    sae, far = result.sae, (x - result.sae.b_dec) * 2 + result.sae.b_dec
    codes, twice = sae.encode(x).dense(40), sae.encode(far).dense(40)
    torch.testing.assert_close(twice, codes * 2, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae(far) - sae.b_dec, (sae(x) - sae.b_dec) * 2, rtol=1e-3, atol=1e-3)
    fvu = ((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fvu < 0.9
    again = SAE.load(result.path)
    assert again.cfg.space == "unit" and again.sae_id == sae.sae_id and torch.equal(again(x), sae(x))
    raw = SAE(SAEConfig.from_dict(sae.cfg.to_dict() | {"space": "raw"}))
    raw.load_state_dict(sae.state_dict())
    assert raw.sae_id != sae.sae_id
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    with pytest.raises(ValueError, match="normalize_activations"):
        sae_lens.SAE.load_from_disk(str(result.path))


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "gated"])
def test_codes_under_unit_norm_are_differentiable_in_the_input(activation: str) -> None:
    gen = torch.Generator().manual_seed(3)
    sae = SAE(
        SAEConfig(
            d_sae=20, d_model=5, space="unit", activation=activation, k=4 if activation == "topk" else 0
        )
    )
    sae = sae.double()
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.5)
        if sae.cfg.has_threshold:
            sae.threshold.abs_()
    x = torch.randn(9, 5, generator=gen, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: sae(v), x.requires_grad_())


@pytest.mark.parametrize("space", ["scalar", "unit"])
def test_evaluation_uses_the_rule_of_the_sae(space: str, tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path, [40] * 40, d=8)
    config = TrainConfig(steps=60, batch_size=64, lr=1e-2, warmup_steps=5, screen="off")
    sae = train(store, [gba(d_sae=24, gba_groups=3, space=space)], config, hook=HOOK)[0].sae
    row = torch.from_numpy((store.corpus.column("pos") > 0) & (store.corpus.column("split") == 1))
    x = vectors[HOOK][row]
    y = x - sae.b_dec
    norm = y.norm(dim=1, keepdim=True) if space == "unit" else torch.ones(len(y), 1)
    u = y / norm @ sae.W_enc.T
    want = norm * (u * (u > sae.threshold)) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x), want, rtol=1e-4, atol=1e-3)
    fvu = ((x - want).double() ** 2).sum() / ((x - x.mean(0)).double() ** 2).sum()
    result = evaluate(sae, store)
    assert result.value("fvu") == pytest.approx(fvu.item(), rel=1e-3)
    assert result.value("l0") == pytest.approx((u > sae.threshold).sum(1).double().mean().item(), rel=1e-3)


# ---- what it is for ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_atoms_are_found_by_both_forms(seed: int) -> None:
    suite = make_suite("S0", seed, n_rows=8000)
    config = TrainConfig(
        steps=400, batch_size=128, lr=8e-3, warmup_steps=20, screen="off", seed=seed, log_every=600
    )
    job = [gba(d_sae=120, gba_groups=4, gba_htf=0.1, gba_ltf=0.02, activation=form) for form in FORMS]
    for result in train(suite.x, job, config):
        found = mmcs(result.sae.W_dec.numpy(), suite.V.numpy()).recall
        assert found > 0.93, f"{result.sae.cfg.label}: {found:.3f}"


# ---- what is refused ----


@pytest.mark.parametrize(
    "bad",
    [
        {"activation": "topk", "k": 3}, {"activation": "gated"}, {"auxk": 0.1}, {"l0": 0.1}, {"gba_htf": 1e-4},
        {"activation": "relu", "l1": 1.0}, {"gba_groups": 0}, {"separability": 0.1}, {"gba_groups": 99}, {"gba_htf": 1.0}, {"gba_ltf": 0.0},
        {"gba_gamma_up": 1.0}, {"gba_freeze": -0.1}, {"gba_sizes": "random"}, {"bias_rule": "hebb"}, {"gba_every": 0},
        {"out_hook": "blocks.0.hook_mlp_out"}, {"gba_events": float("nan")}, {"gba_b_dec": "zero"},
        {"gba_b_dec": "trained", "space": "unit"},
    ],
)  # fmt: skip
def test_illegal_rules_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        SAEConfig(**({"d_sae": 40, "activation": "jumprelu", "bias_rule": "gba"} | bad))


def test_a_transcoder_cannot_be_trained_with_tied_weights() -> None:
    x = rows(200)
    with pytest.raises(UsageError, match="out_hook"):
        train((x, x[:, :4]), [gba(d_sae=40)], TrainConfig(steps=2, batch_size=20))


def test_jobs_name_the_rule_its_form_and_its_budget() -> None:
    job = {
        "saes": [
            {"preset": "gba", "d_sae": 500, "activation": "relu", "gba_l0_budget": "1e1", "space": "unit"}
        ]
    }
    cfg = jobs.resolve(job)[0][0]
    assert (cfg.activation, cfg.bias_rule, cfg.space, cfg.gba_l0_budget) == ("relu", "gba", "unit", 10.0)
    assert cfg.label == "gba-relu-500"
    with pytest.raises(UsageError, match="activation"):
        jobs.resolve({"saes": [{"preset": "topk", "d_sae": 500, "k": 4, "activation": "relu"}]})
