"""Training: planted truth is found, a resumed run equals an uninterrupted one, bad data stops with a reason."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import DataError, UsageError
from saes import presets, training
from saes.config import SAEConfig
from saes.initialise import geometric_median
from saes.presets import abs_topk, batch_abs_topk, batch_topk, jumprelu, relu_l1, topk
from saes.runs import run_name
from saes.sae import SAE
from saes.sources import Moments, StoreSource, TensorSource
from saes.top_products import Scratch
from saes.train_config import TrainConfig
from saes.trainer import Trainer
from saes.training import train
from tests.children import started
from tests.corpora import HOOK, empty_store, fill, make_corpus, make_store

CPU = torch.device("cpu")


def planted(n: int = 20_000, d: int = 32, atoms: int = 64, active: int = 3, seed: int = 0):
    """Rows made of `active` unit atoms each, and the atoms `[atoms, d]`."""
    gen = torch.Generator().manual_seed(seed)
    truth = torch.randn(atoms, d, generator=gen)
    truth /= truth.norm(dim=1, keepdim=True)
    z = torch.zeros(n, atoms)
    ids = torch.rand(n, atoms, generator=gen).topk(active, dim=1).indices
    z.scatter_(1, ids, 1 + torch.rand(n, active, generator=gen))
    return z @ truth * 5 + torch.randn(d, generator=gen), truth


@pytest.mark.parametrize("preset", [topk, abs_topk])
def test_planted_atoms_are_found(preset) -> None:
    x, truth = planted()
    config = TrainConfig(steps=800, batch_size=512, lr=3e-3, warmup_steps=20)
    result = train(x, [preset(d_sae=64, k=3)], config)[0]
    found = (result.sae.W_dec @ truth.T).abs().max(0).values
    assert (found > 0.95).float().mean() > 0.9
    x_hat = result.sae(x)
    fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fvu < 0.1
    assert abs(result.metrics[-1]["fvu"] - fvu.item()) < 0.05


@pytest.mark.parametrize("preset", [abs_topk, batch_abs_topk])
def test_the_plus_pole_of_a_saved_two_sided_latent_has_the_larger_activations(preset, tmp_path: Path) -> None:
    """(w, b_enc, d) flip together: without a fixed gauge, labels and steering would mean either pole by chance."""
    x, _ = planted(4096)
    config = TrainConfig(steps=40, batch_size=256, lr=3e-3, warmup_steps=5, screen="off")
    result = train(x, [preset(d_sae=64, k=3)], config, workspace=tmp_path)[0]
    codes = SAE.load(result.path).encode(x).dense(64)
    assert (codes < 0).any() and (codes.double().sum(0) >= 0).all()
    torch.testing.assert_close(SAE.load(result.path)(x), result.sae(x))


def test_every_step_keeps_decoder_rows_unit_and_the_gradient_tangent() -> None:
    x, _ = planted(2000)
    source, config = TensorSource(x), TrainConfig(steps=50, batch_size=128, screen="off")
    t = Trainer(SAEConfig(d_sae=80, k=3, auxk=1 / 32, d_model=32), config, source.moments(config), CPU)
    t.start(x)
    radial: list[float] = []

    def look(*_: Any) -> None:
        g = t.sae.W_dec.grad
        assert g is not None and g.norm() > 0
        radial.append(float((g * t.sae.W_dec.detach()).sum(1).abs().max() / g.norm(dim=1).max()))

    t.optimiser.register_step_pre_hook(look)
    for step in range(5):
        t.step(x[step * 128 : (step + 1) * 128], step)
        assert (t.sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert len(radial) == 5 and max(radial) < 1e-5


@pytest.mark.parametrize("screen", ["on", "off"])
def test_saes_of_one_run_share_buffers_and_train_as_they_do_alone(screen: str) -> None:
    """What one of them left in a shared buffer must never reach another."""
    x, _ = planted(4000)
    config = TrainConfig(
        steps=30, batch_size=128, lr=3e-3, warmup_steps=5, screen=screen, dead_window_tokens=512,  # type: ignore[arg-type]
        dead_refresh_steps=5,
    )  # fmt: skip
    configs = [
        topk(d_sae=96, k=3), batch_topk(d_sae=64, k=4), abs_topk(d_sae=48, k=2), jumprelu(d_sae=80),
        presets.matryoshka(d_sae=64, k=3, matryoshka=(8, 24), name="nested"), relu_l1(d_sae=40), presets.gba(d_sae=50),
    ]  # fmt: skip
    together = train(x, configs, config)
    for cfg, result in zip(configs, together, strict=True):
        alone = train(x, [cfg], config)[0].sae
        for name, tensor in alone.state_dict().items():
            assert torch.equal(tensor, result.sae.state_dict()[name]), f"{cfg.label}: {name}"


def test_gradients_of_many_saes_take_the_memory_of_one() -> None:
    x, _ = planted(1000)
    config, scratch = TrainConfig(steps=4, batch_size=128, screen="off"), Scratch()
    source = TensorSource(x)
    for width in (64, 128, 96):
        t = Trainer(topk(d_sae=width, k=3, d_model=32), config, source.moments(config), CPU, scratch=scratch)
        t.start(x)
        t.step(x[:128], 0)
        assert all(p.grad is None for p in t.sae.parameters())
    held = {n: b.numel() for n, b in scratch._buffers.items() if n.startswith("gradient")}
    assert held == {"gradient enc": 128 * 32, "gradient dec": 128 * 32}


def test_the_loss_does_not_depend_on_the_units_of_the_data() -> None:
    """Scalar normalisation: activations a thousand times larger give the same run, folded back into their units."""
    x, _ = planted(4000)
    config = TrainConfig(steps=60, batch_size=256, screen="off")
    a = train(x, [topk(d_sae=64, k=3)], config)[0]
    b = train(x * 1024, [topk(d_sae=64, k=3)], config)[0]
    assert a.metrics[-1]["fvu"] == pytest.approx(b.metrics[-1]["fvu"], rel=1e-3)
    torch.testing.assert_close(b.sae(x * 1024) / 1024, a.sae(x), rtol=1e-2, atol=1e-2)


def test_dead_latents_are_revived_by_auxk() -> None:
    x, _ = planted(8000)

    def dead_after(auxk: float) -> int:
        config = TrainConfig(
            steps=400,
            batch_size=256,
            lr=1e-2,
            warmup_steps=5,
            dead_window_tokens=2560,
            dead_refresh_steps=10,
            screen="off",
        )
        source = TensorSource(x)
        t = Trainer(SAEConfig(d_sae=128, k=3, auxk=auxk, d_model=32), config, source.moments(config), CPU)
        t.start(x)
        with torch.no_grad():
            t.sae.b_enc[:96] -= 6.0
        stream = iter(source.stream(config, None, CPU))
        for step in range(400):
            t.step(next(stream).x, step)
        return int(t.metrics()["n_dead"])

    assert dead_after(0.0) >= 90
    assert dead_after(1.0) < 60


def test_a_silent_latent_is_dead_and_a_selected_zero_is_not_a_firing() -> None:
    x, _ = planted(512)
    config = TrainConfig(
        steps=100, batch_size=256, dead_window_tokens=300, dead_refresh_steps=1, screen="off"
    )
    t = Trainer(
        SAEConfig(d_sae=40, k=3, auxk=1 / 32, d_model=32), config, TensorSource(x).moments(config), CPU
    )
    t.start(x)
    with torch.no_grad():
        t.sae.b_enc -= 1e4
    for step in range(3):
        t.step(x[:256], step)
    assert t.metrics()["n_dead"] == 40


@pytest.mark.parametrize("preset", [topk, abs_topk])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(preset, tmp_path: Path, monkeypatch) -> None:
    store, _ = make_store(tmp_path / "a", [40] * 60, d=12)
    other, _ = make_store(tmp_path / "b", [40] * 60, d=12)
    config = TrainConfig(steps=120, batch_size=64, screen="off", log_every=10, dead_window_tokens=500)
    job = [preset(d_sae=40, k=3), preset(d_sae=24, k=2)]
    whole = train(store, job, config, hook=HOOK)

    real, calls = training.save_checkpoint, []

    def stop_after_two(run: Path, checkpoint):
        path = real(run, checkpoint)
        calls.append(checkpoint.step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(training, "save_checkpoint", stop_after_two)
    often = TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0}))
    with pytest.raises(KeyboardInterrupt):
        train(other, job, often, hook=HOOK)
    monkeypatch.setattr(training, "save_checkpoint", real)
    resumed = train(other, job, config, hook=HOOK)
    for a, b in zip(whole, resumed, strict=True):
        for name, tensor in a.sae.state_dict().items():
            assert torch.equal(tensor, b.sae.state_dict()[name]), name
        keep = ("step", "fvu", "auxk", "l0", "n_dead")
        assert [[r[k] for k in keep] for r in a.metrics] == [[r[k] for k in keep] for r in b.metrics]


def test_a_finished_run_is_loaded_not_repeated(tmp_path: Path, monkeypatch) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    config = TrainConfig(steps=20, batch_size=32, screen="off", log_every=5)
    first = train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)[0]
    monkeypatch.setattr(training, "_run", lambda *_: pytest.fail("trained again"))
    again = train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)[0]
    assert again.path == first.path and len(again.metrics) == len(first.metrics) == 4
    assert torch.equal(again.sae.W_enc, first.sae.W_enc)
    assert first.path is not None and not (first.path.parent / "checkpoints").exists()


_KILLED = """
import sys
from pathlib import Path
from cache import ActivationStore
from saes import TrainConfig, presets, train
store = ActivationStore.open(sys.argv[1])
config = TrainConfig(steps=4000, batch_size=64, screen="off", checkpoint_seconds=0.05, log_every=50)
train(store, [presets.topk(d_sae=48, k=3)], config)
"""


def test_kill_9_during_training_costs_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    child = started(_KILLED, store.path)
    try:
        while not list(tmp_path.glob("saes/*/checkpoints/step-*/state.json")):
            assert child.poll() is None, "the run ended before its first checkpoint"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    run = next(tmp_path.glob("saes/*/run.json")).parent
    reached = training.latest_checkpoint(run)
    assert reached is not None and 0 < reached.step < 4000
    config = TrainConfig(steps=4000, batch_size=64, screen="off", checkpoint_seconds=0.05, log_every=50)
    result = train(store, [topk(d_sae=48, k=3)], config)[0]
    steps = [r["step"] for r in result.metrics]
    assert steps == list(range(50, 4001, 50))
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_a_checkpoint_is_dropped_whole_or_kept_whole(tmp_path: Path) -> None:
    """A folder without state.json is what a kill during the write would leave if it were not atomic: it is ignored."""
    (tmp_path / "checkpoints" / "step-00000099").mkdir(parents=True)
    assert training.latest_checkpoint(tmp_path) is None


def test_nan_stops_the_run_and_names_step_and_sae() -> None:
    x, _ = planted(1000)
    with pytest.raises(DataError, match=r"step \d+ of SAE topk-64-k3.*lower lr"):
        train(
            x, [topk(d_sae=64, k=3)], TrainConfig(steps=60, batch_size=64, lr=1e30, log_every=5, grad_clip=0)
        )


def test_a_state_gone_wrong_between_two_logged_steps_is_never_saved(tmp_path: Path, monkeypatch) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    config = TrainConfig(steps=60, batch_size=64, screen="off", log_every=60, checkpoint_seconds=-1.0)
    real = Trainer.step

    def poisoned(self, x, step, *target):
        if step == 20:
            with torch.no_grad():
                self.sae.W_enc[0, 0] = float("nan")
        real(self, x, step, *target)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(DataError, match="not finite"):
        train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)
    monkeypatch.setattr(Trainer, "step", real)
    result = train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)[0]
    assert result.metrics[-1]["step"] == 60


def test_metrics_of_a_start_without_a_checkpoint_are_dropped(tmp_path: Path, monkeypatch) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    config = TrainConfig(steps=40, batch_size=64, screen="off", log_every=5, checkpoint_seconds=-1.0)

    def killed(*_):
        raise KeyboardInterrupt

    real = training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)
    monkeypatch.setattr(training, "save_checkpoint", real)
    train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)
    again = train(store, [topk(d_sae=24, k=2)], config, hook=HOOK)[0]
    assert [r["step"] for r in again.metrics] == list(range(5, 41, 5))


def test_nan_in_training_rows_is_refused_with_the_row() -> None:
    x, _ = planted(100)
    x[17, 3] = float("nan")
    with pytest.raises(DataError, match="row 17"):
        train(x, [topk(d_sae=64, k=3)])


def test_sae_of_another_width_is_refused_before_training(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 8, d=8)
    with pytest.raises(DataError, match="d_model=9"):
        train(store, [topk(d_sae=24, k=2, d_model=9)], hook=HOOK)


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 0}, {"k": 99}, {"activation": "swish"}, {"space": "whitened"}, {"auxk": -1.0}, {"activation": "relu"},
        {"l1": 1.0}, {"l0": 1.0}, {"activation": "jumprelu", "k": 0, "l0_target": 4.0}, {"sparsity_warmup": 2.0},
        {"activation": "gated", "k": 0, "l1": 1.0, "auxk": 0.1}, {"activation": "batch_topk", "k": 0},
        {"matryoshka": (8, 4)}, {"matryoshka": (8, 32)}, {"matryoshka": (0, 8)}, {"bandwidth": 0.0},
        {"activation": "relu", "k": 0, "l1": 1.0, "matryoshka": (8,)}, {"threshold_init": float("nan")},
    ],
)  # fmt: skip
def test_illegal_configs_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        SAEConfig(**({"d_sae": 32, "k": 4} | bad))


def test_a_threshold_sae_without_a_sparsity_term_is_refused_before_training() -> None:
    """The same config is a fine SAE to load: files do not hold the weights of loss terms."""
    x, _ = planted(100)
    for activation in ("relu", "gated", "jumprelu"):
        with pytest.raises(UsageError, match=f"{activation} needs l"):
            train(x, [SAEConfig(d_sae=64, activation=activation)])


def test_configs_with_prefixes_round_trip_through_json() -> None:
    cfg = SAEConfig(d_sae=32, k=4, activation="batch_topk", matryoshka=[4, 8])
    again = SAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and again.matryoshka == (4, 8) and hash(again) == hash(cfg)


def test_a_threshold_that_drifted_is_put_where_the_mean_l0_is_k() -> None:
    """Too few steps for the moving average to follow a threshold that grows: finish measures and corrects it."""
    x, _ = planted(6000)
    config = TrainConfig(steps=40, batch_size=256, lr=3e-3, warmup_steps=5, screen="off")
    source = TensorSource(x)
    for preset in (batch_topk, batch_abs_topk):
        cfg = preset(d_sae=64, k=3, d_model=32)
        t = Trainer(cfg, config, source.moments(config), CPU)
        t.start(x)
        for step in range(40):
            t.step(x[step * 128 : step * 128 + 256], step)
        t.theta.fill_(1e-3)
        sae = t.finish(x)
        assert sae.encode(x[4096:]).l0().float().mean() == pytest.approx(3, rel=0.1)
        assert sae.threshold.unique().numel() == 1


def test_sparsity_terms_warm_up_linearly() -> None:
    config = TrainConfig(steps=200, screen="off")
    cfg = relu_l1(d_sae=64, d_model=32, sparsity_warmup=0.1)
    t = Trainer(cfg, config, Moments(10, 1.0), CPU)
    assert [t._sparsity_weight(s) for s in (0, 9, 19, 150)] == pytest.approx([0.05, 0.5, 1.0, 1.0])


def test_jumprelu_reaches_the_l0_it_is_asked_for() -> None:
    x, _ = planted(8000)
    config = TrainConfig(steps=600, batch_size=256, lr=5e-3, warmup_steps=20, screen="off")
    job = [jumprelu(d_sae=64, l0=1.0, l0_target=t, bandwidth=0.5) for t in (3.0, 6.0)]
    for cfg, result in zip(job, train(x, job, config), strict=True):
        assert result.sae.encode(x).l0().float().mean() == pytest.approx(cfg.l0_target, rel=0.1)


def test_unknown_config_fields_are_refused_and_known_ones_round_trip() -> None:
    config = TrainConfig(steps=7, lr=1e-3)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="learning_rate"):
        TrainConfig.from_dict({"learning_rate": 1e-3})


def test_learning_rate_rises_stays_and_falls() -> None:
    c = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2)
    rates = [c.lr_at(s, 64) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert rates[79] == 1.0 and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_the_learning_rate_is_that_of_sae_lens_at_every_step(schedule: str, decay: float) -> None:
    optim = pytest.importorskip("sae_lens.training.optim")
    c = TrainConfig(
        steps=200, lr=2.0, warmup_steps=20, decay_fraction=decay, lr_schedule=schedule, lr_end=0.25
    )  # type: ignore[arg-type]
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=2.0)
    name = {"constant": "constant", "cosine": "cosineannealing"}[schedule]
    theirs = optim.get_lr_scheduler(name, adam, 200, 2.0, 20, int(200 * decay), 0.5, 1)
    for step in range(200):
        assert c.lr_at(step, 64) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-5), step
        adam.step()
        theirs.step()


@pytest.mark.parametrize("decay", [0.9, 0.95, 1.0])
def test_a_cosine_without_room_between_warm_up_and_decay_is_that_decay(decay: float) -> None:
    c = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay_fraction=decay, lr_schedule="cosine")
    plain = replace(c, lr_schedule="constant")
    assert [c.lr_at(s, 64) for s in range(100)] == [plain.lr_at(s, 64) for s in range(100)]


@pytest.mark.parametrize("bad", [{"lr_schedule": "step"}, {"lr_end": -0.1}, {"lr_end": 1.5}])
def test_a_schedule_that_means_nothing_is_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_runs_of_before_a_field_existed_keep_their_names() -> None:
    """Names that the first release gave: another default, or a field that is not in LATER, would train old runs again."""
    source, config = TensorSource(torch.ones(4, 32)), TrainConfig(steps=4, batch_size=64)
    sae = topk(d_sae=64, k=3, d_model=32)
    assert run_name([sae], config, source) == "topk-64-k3-52762eb6"
    assert run_name([presets.gba(d_sae=64, d_model=32)], config, source) == "gba-jumprelu-64-6d16518b"
    for other in (replace(config, lr_schedule="cosine"), replace(config, window=8)):
        assert run_name([sae], other, source) != run_name([sae], config, source)
    assert run_name([replace(sae, multi_topk=0.125)], config, source).split("-")[-1] != "52762eb6"


def test_a_few_attention_sinks_do_not_flatter_the_logged_fvu() -> None:
    x, _ = planted(4096)
    sinks = x.clone()
    sinks[::512] *= 1e3
    config = TrainConfig(steps=150, batch_size=256, lr=3e-3, warmup_steps=5, log_every=150, screen="off")
    result = train(sinks, [topk(d_sae=64, k=3)], config)[0]
    usual = sinks[sinks.norm(dim=1) < 1e3]
    plain = ((sinks - result.sae(sinks)) ** 2).sum() / ((sinks - sinks.mean(0)) ** 2).sum()
    honest = ((usual - result.sae(usual)) ** 2).sum() / ((usual - usual.mean(0)) ** 2).sum()
    assert abs(result.metrics[-1]["fvu"] - plain) > abs(result.metrics[-1]["fvu"] - honest)


def test_a_few_attention_sinks_do_not_set_the_units_of_the_run() -> None:
    x, _ = planted(4096)
    sinks = x.clone()
    sinks[::1100] *= 1e3

    def normaliser(rows: torch.Tensor) -> float:
        config = TrainConfig(steps=1, screen="off")
        t = Trainer(
            SAEConfig(d_sae=64, k=3, d_model=32, space="raw"), config, TensorSource(rows).moments(config), CPU
        )
        t.start(rows)
        return t.variance

    assert normaliser(sinks) == pytest.approx(normaliser(x), rel=0.05)


@pytest.mark.parametrize("preset", [topk, abs_topk, batch_topk, batch_abs_topk])
def test_multi_topk_keeps_an_sae_good_when_k_is_raised_after_training(preset) -> None:
    """Gao et al. 2024: without the term, latents past the k-th were never asked to add up."""
    x, _ = planted(6000, active=6)
    config = TrainConfig(steps=300, batch_size=256, lr=5e-3, warmup_steps=10, screen="off")
    plain, multi = train(
        x, [preset(d_sae=64, k=3, auxk=0), preset(d_sae=64, k=3, auxk=0, multi_topk=1 / 8)], config
    )
    assert "multi" in multi.sae.cfg.label or multi.path is None

    def fvu(sae: SAE, k: int) -> float:
        u = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        keep = torch.topk(u.abs() if sae.cfg.signed else u, k, dim=1).indices
        z = torch.zeros_like(u).scatter(1, keep, u.gather(1, keep))
        x_hat = (z if sae.cfg.signed else z.relu()) @ sae.W_dec + sae.b_dec
        return float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())

    assert fvu(multi.sae, 12) < 0.8 * fvu(plain.sae, 12)
    assert fvu(multi.sae, 3) < 1.3 * fvu(plain.sae, 3)
    l0 = multi.sae.encode(x).l0().float().mean().item()
    assert l0 == pytest.approx(3, rel=0.1), "codes and thresholds are those of k"
    assert multi.metrics[-1]["l0"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("preset", [topk, batch_topk, jumprelu, relu_l1, presets.gated])
def test_frozen_biases_stay_where_they_were_and_the_rest_is_trained(preset, tmp_path: Path) -> None:
    x, _ = planted(2000)
    more = {"k": 3} if "topk" in preset.__name__ else {}
    config = TrainConfig(steps=30, batch_size=128, lr=5e-3, warmup_steps=5)
    result = train(x, [preset(d_sae=64, bias_rule="frozen", **more)], config, workspace=tmp_path)[0]
    sae = SAE.load(result.path)
    assert not sae.b_enc.any() and result.sae.cfg.label.startswith("frozen-")
    assert not hasattr(sae, "b_mag") or not sae.b_mag.any()
    assert float(((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()) < 0.9


@pytest.mark.parametrize("preset", [relu_l1, jumprelu, topk])
def test_attention_sinks_do_not_set_the_scale_of_training(preset) -> None:
    """A penalty and a learning rate mean something in units of the usual rows: a sink in a hundred would halve them."""
    x, _ = planted(6000)
    sinks = torch.cat(
        [
            x,
            torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
            * 100
            * x.norm(dim=1).mean()
            / 32**0.5,
        ]
    )
    config = TrainConfig(steps=4, batch_size=64, screen="off")
    with_sinks, without = (TensorSource(rows).moments(config).mean_norm for rows in (sinks, x))
    assert with_sinks == pytest.approx(without, rel=1e-6) and sinks.norm(dim=1).mean() > 1.9 * without
    cfg = preset(d_sae=64, d_model=32)
    scales = [Trainer(cfg, config, TensorSource(rows).moments(config), CPU).scale for rows in (sinks, x)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)


@pytest.mark.parametrize("skip", [None, "special", "first"])
def test_a_store_trained_on_with_position_0_has_the_scale_of_the_other_rows(
    skip: str | None, tmp_path: Path
) -> None:
    """FAST keeps position 0, whose norm is a hundred times the rest: its arms must share one space of training."""
    store, _ = make_store(tmp_path)
    source = StoreSource(store, HOOK)
    parts = ["first"] + ([skip] if skip not in (None, "first") else [])
    found = source.moments(TrainConfig(skip=skip)).mean_norm
    assert found == pytest.approx(store.stats(HOOK, split="train", skip="+".join(parts)).mean_norm)
    assert store.stats(HOOK, split="train", skip=None).mean_norm != pytest.approx(found)


def test_a_few_rows_past_position_0_do_not_set_the_scale_of_a_store_of_single_tokens(tmp_path: Path) -> None:
    x = make_store(tmp_path, [1] * 300 + [3])[1]
    x[HOOK][300:] *= 1e-3
    again = empty_store(tmp_path / "small", make_corpus(tmp_path / "small", [1] * 300 + [3]))
    fill(again, x)
    found = StoreSource(again, HOOK).moments(TrainConfig(skip=None)).mean_norm
    assert found == pytest.approx(again.stats(HOOK, split="train", skip=None).mean_norm)


def test_geometric_median_survives_an_outlier_and_a_point_on_itself() -> None:
    x = torch.cat([torch.zeros(50, 3), torch.randn(60, 3) * 0.01, torch.full((3, 3), 1e4)])
    m = geometric_median(x)
    assert torch.isfinite(m).all() and m.norm() < 0.1


def test_run_without_a_workspace_leaves_no_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, _ = planted(500)
    result = train(x, [topk(d_sae=64, k=3)], TrainConfig(steps=5, batch_size=64, screen="off"))[0]
    assert result.path is None and isinstance(result.sae, SAE) and not list(tmp_path.iterdir())


def test_moments_of_a_tensor_are_the_closed_form() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert TensorSource(x).moments(TrainConfig()) == Moments(2, 2.0)


@pytest.mark.parametrize(
    "config",
    [presets.relu_l1(d_sae=64, l1=40.0), presets.topk(d_sae=64, k=2, auxk=0.0)],
    ids=["relu", "topk"],
)
def test_silent_latents_are_counted_in_the_log_without_auxk_too(config: SAEConfig) -> None:
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3:] *= 0.01
    result = train(
        x, [config], TrainConfig(steps=200, batch_size=256, lr=1e-2, warmup_steps=5, log_every=200)
    )[0]
    fires = (result.sae.encode(x).dense(64) != 0).any(0)
    assert (~fires).sum() > 5, "the setting leaves latents silent, or nothing is tested"
    assert abs(result.metrics[-1]["n_dead"] - int((~fires).sum())) <= 3, (
        "of the last window; the rows are the same"
    )


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"lr": 0.0}, {"beta1": 1.5}, {"beta2": 1.0}, {"eps": -1.0}, {"grad_clip": -1.0}, {"steps": 10.5},
     {"dead_window_tokens": -5}, {"dead_window_tokens": 0}, {"warmup_steps": -1}, {"seed": -1}, {"batch_size": True}],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_train_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        TrainConfig(**bad)


@pytest.mark.parametrize("bad", [{"k": 4.5}, {"d_sae": 64.0}, {"beta1": 1.0}, {"k_aux": 0}], ids=str)
def test_settings_of_an_sae_that_cannot_be_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SAEConfig(**({"d_sae": 64, "k": 4} | bad))


@pytest.mark.parametrize(
    "name", ["topk", "abs_topk", "batch_topk", "batch_abs_topk", "matryoshka", "jumprelu", "gba", "relu_l1"]
)
def test_screening_asked_for_is_on_and_audited_where_latents_are_sparse(name: str) -> None:
    """Without an audit to end it, it would make AuxK's products coarse for the whole run."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=10, batch_size=128, screen="on")
    more = {"k": 2} if "topk" in name or name == "matryoshka" else {}
    trainer = Trainer(getattr(presets, name)(d_sae=64, d_model=8, **more), config, Moments(256, 1.0), CPU)
    trainer.start(x)
    assert trainer.screen.enabled
    with torch.no_grad():  # few latents above their thresholds
        if trainer.cfg.activation == "jumprelu":
            trainer.sae.threshold.fill_(12.0)
        elif not more:
            trainer.sae.b_enc.fill_(-12.0)
    trainer.step(x[:128], 0)
    assert trainer.screen.audits == 1 and trainer.screen.misses == 0
