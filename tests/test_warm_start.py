"""Warm start: a run goes on from another SAE's weights, and at its first step is that SAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from cache.workspace import read_json
from saes.config import SAEConfig
from saes.presets import PRESETS, topk
from saes.sae import SAE
from saes.train_config import TrainConfig
from saes.training import train

STEP = TrainConfig(steps=1, batch_size=2000, lr=1e-9, warmup_steps=1, screen="off", log_every=1, seed=7)
EARLIER = TrainConfig(steps=40, batch_size=200, lr=3e-3, screen="off", log_every=20)
# weights of the sparsity terms that suit 10 dimensions
MORE = {"relu_l1": {"l1": 0.1}, "gated": {"l1": 0.1}, "jumprelu": {"l0": 0.01}}
KINDS = [p for p in PRESETS if p != "gba"]


def config(preset: str, **other) -> SAEConfig:
    more = {"k": 3} if "top" in preset or preset == "matryoshka" else MORE.get(preset, {})
    return PRESETS[preset](d_sae=24, **(more | other))


@pytest.fixture(scope="module")
def x() -> Tensor:
    gen = torch.Generator().manual_seed(0)
    return 8 * torch.randn(2000, 10, generator=gen) @ torch.randn(10, 10, generator=gen) + 3


def fvu(sae: SAE, x: Tensor, y: Tensor | None = None) -> float:
    y = x if y is None else y
    return float(((sae(x) - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


@pytest.mark.parametrize("preset", KINDS)
def test_the_first_step_has_the_fvu_of_the_given_sae(preset: str, x: Tensor) -> None:
    """Logged before the first update, on the same rows: the fold is undone exactly, in every space."""
    given = train(x, [config(preset)], EARLIER)[0].sae
    again = train(x, [config(preset)], STEP, warm_start=given)[0]
    # training of batch_* takes B k latents of a batch, not those above the threshold
    of_batch = given.cfg.has_k and not given.cfg.fixed_k
    want = fvu_of_batch(given, x) if of_batch else fvu(given, x)
    if again.sae.cfg.space == "aip":
        # its metrics are of whitened rows; a step this small leaves the SAE what it was
        torch.testing.assert_close(again.sae(x), given(x), rtol=1e-2, atol=0.05)
        return
    assert again.metrics[0]["fvu"] == pytest.approx(want, rel=2e-3)
    assert fvu(again.sae, x) == pytest.approx(fvu(given, x), rel=0.02)
    fresh = train(x, [config(preset)], STEP)[0]
    assert abs(fresh.metrics[0]["fvu"] / want - 1) > 0.05


def fvu_of_batch(sae: SAE, x: Tensor) -> float:
    u = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    size = u.abs() if sae.cfg.signed else u
    kept = torch.zeros_like(u).view(-1).scatter(0, size.view(-1).topk(len(x) * sae.cfg.k).indices, 1.0)
    x_hat = (u * kept.view_as(u)) @ sae.W_dec + sae.b_dec
    return float(((x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


@pytest.mark.parametrize("preset", ["topk", "jumprelu", "gated", "relu_l1"])
def test_a_transcoder_starts_from_a_transcoder(preset: str, x: Tensor) -> None:
    gen = torch.Generator().manual_seed(1)
    y = 0.1 * x @ torch.randn(10, 6, generator=gen) - 4
    given = train((x, y), [config(preset)], EARLIER)[0].sae
    again = train((x, y), [config(preset)], STEP, warm_start=given)[0]
    assert again.metrics[0]["fvu"] == pytest.approx(fvu(given, x, y), rel=2e-3)
    with pytest.raises(DataError, match="d_out"):
        train(x, [config(preset)], STEP, warm_start=given)


def test_decoder_rows_of_any_norm_are_made_unit_where_that_changes_nothing(x: Tensor) -> None:
    given = train(x, [config("jumprelu")], EARLIER)[0].sae
    want = fvu(given, x)
    with torch.no_grad():
        size = torch.linspace(0.5, 3.0, 24)
        for name in ("b_enc", "threshold"):
            getattr(given, name).div_(size)
        given.W_enc.div_(size[:, None])
        given.W_dec.mul_(size[:, None])
    assert fvu(given, x) == pytest.approx(want, rel=1e-4)
    again = train(x, [config("jumprelu")], STEP, warm_start=given)[0]
    assert again.metrics[0]["fvu"] == pytest.approx(want, rel=2e-3)
    torch.testing.assert_close(again.sae.W_dec.norm(dim=1), torch.ones(24), rtol=0, atol=1e-4)
    given = train(x, [config("topk")], EARLIER)[0].sae
    with torch.no_grad():
        given.W_dec.mul_(2.0)
    with pytest.raises(DataError, match="unit norm"):
        train(x, [config("topk")], STEP, warm_start=given)


def test_another_architecture_width_or_rule_is_refused_in_one_line(x: Tensor) -> None:
    given = train(x, [config("topk")], EARLIER)[0].sae
    for other, what in (
        (config("abs_topk"), "activation"),
        (topk(d_sae=32, k=3), "d_sae"),
        (topk(d_sae=24, k=3, d_model=10), "10 SAEs"),
    ):
        with pytest.raises((DataError, UsageError), match=what):
            train(x, [other], STEP, warm_start=[given] * 10 if what == "10 SAEs" else given)
    with pytest.raises(UsageError, match="gba"):
        relu = SAE(SAEConfig(d_sae=24, activation="jumprelu", d_model=10))
        train(x, [PRESETS["gba"](d_sae=24)], STEP, warm_start=relu)
    with pytest.raises(DataError, match="d_model"):
        train(x[:, :8], [topk(d_sae=24, k=3)], STEP, warm_start=given)


def test_a_batch_topk_run_goes_on_from_a_batch_topk_sae_that_sae_lens_saved(
    x: Tensor, tmp_path: Path
) -> None:
    """It comes as JumpReLU with one threshold; an SAE with many is refused."""
    pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    ours = train(x, [config("batch_topk")], EARLIER)[0].sae
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=10, d_sae=24, k=3))
    with torch.no_grad():
        size = torch.linspace(0.5, 2.0, 24)[
            :, None
        ]  # sae-lens leaves decoder rows as long as training made them
        theirs.W_enc.copy_((ours.W_enc / size).T)
        theirs.W_dec.copy_(ours.W_dec * size)
        theirs.b_enc.copy_(ours.b_enc / size[:, 0])
        theirs.b_dec.copy_(ours.b_dec)
        theirs.topk_threshold.fill_(float(ours.threshold[0]))
    theirs.save_inference_model(tmp_path / "theirs")
    given = SAE.load(tmp_path / "theirs")
    assert given.cfg.activation == "jumprelu"
    torch.testing.assert_close(given(x), ours(x), rtol=1e-4, atol=1e-4)
    again = train(x, [config("batch_topk")], STEP, warm_start=tmp_path / "theirs")[0]
    assert again.metrics[0]["fvu"] == pytest.approx(fvu_of_batch(ours, x), rel=2e-3)
    assert again.sae.cfg.activation == "batch_topk" and fvu(again.sae, x) == pytest.approx(
        fvu(ours, x), rel=0.02
    )
    with torch.no_grad():
        given.threshold[0] *= 2
    with pytest.raises(DataError, match="thresholds from"):
        train(x, [config("batch_topk")], STEP, warm_start=given)
    with pytest.raises(DataError, match="activation jumprelu"):
        train(x, [config("topk")], STEP, warm_start=tmp_path / "theirs")


def test_the_start_is_part_of_the_run_and_of_its_record(x: Tensor, tmp_path: Path) -> None:
    given = train(x, [config("topk")], EARLIER, workspace=tmp_path)[0]
    plain = train(x, [config("topk")], STEP, workspace=tmp_path)[0]
    warm = train(x, [config("topk")], STEP, workspace=tmp_path, warm_start=given.path)[0]
    assert warm.path is not None and given.path is not None and plain.path is not None
    assert warm.path.parent != plain.path.parent
    record = read_json(warm.path.parent / "run.json")
    assert record["warm_start"] == [{"sae_id": given.sae.sae_id, "source": str(given.path)}]
    assert "warm_start" not in read_json(plain.path.parent / "run.json")
    again = train(x, [config("topk")], STEP, workspace=tmp_path, warm_start=given.sae)[0]
    assert again.path == warm.path


def test_each_sae_of_a_run_may_start_from_its_own(x: Tensor) -> None:
    given = train(x, [config("topk"), config("abs_topk")], EARLIER)
    configs = [config("topk"), config("abs_topk"), config("topk", auxk=0.0, name="fresh")]
    again = train(x, configs, STEP, warm_start=[given[0].sae, given[1].sae, None])
    for a, b in zip(again, given, strict=False):
        assert a.metrics[0]["fvu"] == pytest.approx(fvu(b.sae, x), rel=2e-3)
    assert again[2].metrics[0]["fvu"] > again[0].metrics[0]["fvu"] * 1.05


def test_a_warm_started_run_keeps_improving(x: Tensor) -> None:
    given = train(x, [config("topk")], EARLIER)[0].sae
    more = TrainConfig(steps=60, batch_size=200, lr=1e-3, screen="off", log_every=20)
    assert fvu(train(x, [config("topk")], more, warm_start=given)[0].sae, x) < fvu(given, x)


def test_frozen_biases_take_no_bias_from_another_sae(x: Tensor) -> None:
    """They would keep it for ever, and the config says that they are 0."""
    config = TrainConfig(steps=20, batch_size=64, lr=5e-3, screen="off")
    usual = train(x, topk(d_sae=32, k=3), config)[0].sae
    frozen = topk(d_sae=32, k=3, bias_rule="frozen")
    with pytest.raises(DataError, match="b_enc of its own"):
        train(x, frozen, config, warm_start=usual)
    first = train(x, frozen, config)[0].sae
    assert not train(x, frozen, config, warm_start=first)[0].sae.b_enc.any()
