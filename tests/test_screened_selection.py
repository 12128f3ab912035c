"""Screening of SAEs of varying L0: what bfloat16 finds is what float32 keeps, and audits, faults and resumes hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saes import presets, selection, training
from saes.activations import training_step
from saes.bounds import Bounds
from saes.config import SAEConfig
from saes.kernels import Dead
from saes.places import largest_places, true_places
from saes.screening import Screen
from saes.selection import (
    Flat,
    above_threshold,
    batch_largest,
    screened_above,
    screened_largest,
    screened_rows,
)
from saes.sources import Moments
from saes.top_products import Scratch
from saes.train_config import TrainConfig
from saes.trainer import Trainer
from saes.training import train
from tests.corpora import HOOK, make_store

B, D, F = 150, 24, 400
CPU = torch.device("cpu")


def problem(seed: int, spread: float = 0.0, outlier: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of different norm, weights of different norm, one dimension that dominates; biases."""
    gen = torch.Generator().manual_seed(seed)
    x, w = torch.randn(B, D, generator=gen), torch.randn(F, D, generator=gen)
    x *= torch.exp(spread * torch.randn(B, 1, generator=gen))
    w *= torch.exp(spread * torch.randn(F, 1, generator=gen))
    x[:, 3] *= outlier
    return x, w, torch.randn(F, generator=gen) * 0.3


def scores(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.double() @ w.double().T + b.double()


def check_order(found: Flat, rows: int) -> None:
    """In row order, ids rising within a row: prefixes of Matryoshka are cut by it."""
    assert len(found.offsets) == rows + 1 and found.offsets[-1] == len(found.values) == len(found.indices)
    assert (found.places(F).diff() > 0).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    outlier=st.sampled_from([1.0, 100.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    share=st.sampled_from([0.001, 0.02, 0.3]),
    signed=st.booleans(),
)
def test_no_entry_above_the_bound_is_missed(
    seed: int, spread: float, outlier: float, scale: float, share: float, signed: bool
) -> None:
    """The threshold is the exact score of an entry less one part in 10^12; random errors are far below the bound, and how
    tight it is show numbers just off midpoints, below."""
    x, w, b = problem(seed, spread, outlier)
    x, b = x * scale, b * scale
    u = scores(x, w, b)
    size = u.abs() if signed else u
    low = size.flatten().topk(int(share * size.numel())).values.min().item()
    low -= abs(low) * 1e-12
    found = Bounds(x, w, b, Scratch()).above(low, signed=signed, at_most=B * F)
    assert found is not None
    wanted = (size.flatten() > low).nonzero().squeeze(1)
    assert torch.isin(wanted, found[0]).all()
    if spread == 0 and outlier == 1 and share < 0.1:
        assert len(found[0]) < 2 * len(wanted), "a margin so wide would compute far more than is kept"


def off_midpoints(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers just off bfloat16 midpoints, so that all errors of a score have one sign: Cauchy-Schwarz with equality.

    Scores of latents 100 to 102 are the largest, .503, and bfloat16 sees .31; of latents 0 to 7 .5, seen as .69.
    """
    gen = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (D,), generator=gen) * 2.0 - 1
    down = torch.where(torch.randperm(D, generator=gen) < D // 2, 1.0, -1.0)  # 1: rounds down, -1: up
    x = sign * (1 + 2.0**-8 - down * 2.0**-16)
    w, b = 1e-3 * torch.randn(F, D, generator=gen), torch.zeros(F)
    w[100:103], b[100:103] = x * down, 0.5 + 2.0**-8
    w[:8], b[:8] = -x * down, 0.5
    return x.expand(B, D).contiguous(), w, b


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_margin_is_enough_for_the_largest_errors_and_a_twentieth_less_is_not(
    seed: int, signed: bool
) -> None:
    x, w, b = off_midpoints(seed)
    u = scores(x, w, b)
    best = torch.tensor([100, 101, 102])
    assert torch.equal(u.topk(3, dim=1).indices.sort(1).values, best.expand(B, 3))
    low = u[0, 100].item() * (1 - 1e-5)

    def kept(widen: float) -> dict[str, int]:
        """How many of the 3 B largest each selection has."""
        more: dict[str, Any] = {"scratch": Scratch(), "widen": widen}
        bounds = Bounds(x, w, b, **more).above(low, signed=signed, at_most=B * F)
        rows = screened_rows(x, w, b, 4, signed=signed, **more)
        assert bounds is not None and rows is not None
        found = {"bounds": bounds[0] % F, "rows": rows[1]}
        if not signed:
            above = screened_above(x, w, b, torch.full((F,), low), **more)
            assert above is not None
            found["above"] = above.indices
        return {name: int(torch.isin(ids, best).sum()) for name, ids in found.items()}

    assert set(kept(1.0).values()) == {3 * B}
    assert set(kept(0.95).values()) == {0}
    # the largest of a batch lie below others by both their margins: half of it loses them
    for widen, count in ((1.0, 3 * B), (0.5, 0)):
        largest = screened_largest(
            x, w, b, 3 * B, signed=signed, scratch=Scratch(), low=0.9 * low, widen=widen
        )
        assert largest is not None and int(torch.isin(largest.indices, best).sum()) == count


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), near=st.booleans(), per_latent=st.booleans())
def test_the_screened_selection_past_thresholds_is_exact(seed: int, near: bool, per_latent: bool) -> None:
    """near: hundreds of entries that bfloat16 cannot tell from their threshold."""
    x, w, b = problem(seed)
    u = scores(x, w, b)
    low = torch.full((F,), 11.0) + (
        torch.rand(F, generator=torch.Generator().manual_seed(seed)) if per_latent else 0
    )
    if near:
        # each latent's threshold is passed by its third-largest score by one part in 10^5
        low = (u.topk(3, dim=0).values[2] * (1 - 1e-5)).float()
    found = screened_above(x, w, b, low, scratch=Scratch())
    assert found is not None
    check_order(found, B)
    wanted = (u > low).flatten().nonzero().squeeze(1)
    # scores within rounding of their threshold may fall on either side of it, in float32 too
    doubtful = ((u - low).abs() < 1e-5).flatten().nonzero().squeeze(1)
    got = found.places(F)
    assert torch.isin(wanted[~torch.isin(wanted, doubtful)], got).all()
    assert torch.isin(got, torch.cat([wanted, doubtful])).all()
    torch.testing.assert_close(found.values, u.flatten()[got].float(), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    n=st.sampled_from([1, 50, 450, 900]),
    low=st.sampled_from([None, 0.9, 0.999, 1.2]),
    signed=st.booleans(),
)
def test_the_screened_batch_keeps_its_largest_whatever_bound_it_began_with(
    seed: int, spread: float, n: int, low: float | None, signed: bool
) -> None:
    """low: the first bound by the n-th largest; above 1 too few pass it, and a sample must give another."""
    x, w, b = problem(seed, spread)
    u = scores(x, w, b)
    size = (u.abs() if signed else u).flatten()
    best = size.topk(n).values.sort().values
    first = None if low is None else low * best[0].item()
    exact = batch_largest(x, w, b, n, signed=signed, low=first).values.abs().sort().values
    torch.testing.assert_close(exact, best.float(), rtol=1e-5, atol=1e-5)
    found = screened_largest(x, w, b, n, signed=signed, scratch=Scratch(), low=first)
    if (
        found is None
    ):  # rows of very different size: a sample may mislead, and the caller makes the exact pass
        assert spread == 2.0
        return
    check_order(found, B)
    torch.testing.assert_close(found.values.abs().sort().values, best.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values, u.flatten()[found.places(F)].float(), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    outlier=st.sampled_from([1.0, 100.0]),
    k=st.sampled_from([1, 3, 8]),
    width=st.sampled_from([397, 400]),
    signed=st.booleans(),
)
def test_screened_rows_keep_their_largest(
    seed: int, spread: float, outlier: float, k: int, width: int, signed: bool
) -> None:
    """Also a row of zeros, whose scores are biases; one of NaN, as in the exact selection; and a prime number of latents."""
    x, w, b = problem(seed, spread, outlier)
    w, b = w[:width], b[:width]
    x[5] = 0.0
    x[9, 2] = float("nan")
    found = screened_rows(x, w, b, k, signed=signed, scratch=Scratch())
    if (
        found is None
    ):  # one latent far above all others, so that half of the rows have fewer than k positive scores
        assert spread == 2.0 or outlier == 100.0
        return
    values, ids = found
    u = scores(x, w, b)
    size = u.abs() if signed else u
    rows = torch.arange(B) != 9
    best = size[rows].topk(k, dim=1).values.sort(1).values.float()
    got = (values.abs() if signed else values)[rows].sort(1).values
    tolerance = 1e-5 * (x[rows].norm(dim=1) * w.norm(dim=1).max())[:, None]
    assert ((got - best).abs() <= tolerance + 1e-5).all()
    assert ((values[rows] - u[rows].gather(1, ids[rows]).float()).abs() <= tolerance + 1e-5).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    assert values[9].isnan().all()


@pytest.mark.parametrize("signed", [False, True])
def test_ties_that_bfloat16_cannot_order_are_ordered_in_float32(signed: bool) -> None:
    """All latents are one direction and differ by parts in 10^4: the margin holds them all, float32 decides."""
    gen = torch.Generator().manual_seed(0)
    direction = torch.randn(D, generator=gen)
    w = direction * (1 + 1e-4 * torch.randperm(F, generator=gen)[:, None] / F)
    w[40:] *= 0.1
    x = direction * torch.where(torch.rand(B, 1, generator=gen) < 0.5 * signed, -1.0, 1.0)
    b = torch.zeros(F)
    size = scores(x, w, b).abs().flatten()
    found = screened_largest(x, w, b, 20 * B, signed=signed, scratch=Scratch(), low=size[0].item() * 0.9)
    assert found is not None
    best = size.topk(20 * B).values.sort().values
    torch.testing.assert_close(found.values.abs().sort().values, best.float(), rtol=1e-6, atol=0)
    assert (found.offsets.diff() == 20).all()


def test_rows_without_a_bound_empty_batches_and_equal_rows_do_not_hang_and_are_not_lost() -> None:
    x, w, b = problem(1)
    for broken in (float("nan"), float("inf")):
        bad = x.clone()
        bad[100, 2] = broken
        for place, rows in (("largest", bad), ("above", bad)):
            screen, scratch = Screen(enabled=True), Scratch()
            if place == "largest":
                found, true = (
                    screen.largest(rows, w, b, 600, signed=False, scratch=scratch),
                    batch_largest(rows, w, b, 600),
                )
            else:
                low = torch.full((F,), 11.0)
                found = screen.above(rows, w, b, low, scratch=scratch, dense_share=1 / 8)
                true = above_threshold(rows, w, b, low)
            assert found is not None and true is not None and screen.enabled and screen.crowded == 1
            assert torch.equal(found.places(F), true.places(F))
    same = x[:1].expand(B, -1).contiguous()
    for rows, n in ((x[:0], 0), (x, 0), (same, 600), (torch.zeros(B, D), 600), (same * 0 + 1, B * F)):
        found = Screen(enabled=True).largest(rows, w, b, n, signed=False, scratch=Scratch())
        true = batch_largest(rows, w, b, n)
        torch.testing.assert_close(
            found.values.sort().values, true.values.sort().values, rtol=1e-5, atol=1e-5
        )
    high = torch.full((F,), 1e9)
    for rows in (x[:0], x):
        none = Screen(enabled=True).above(rows, w, b, high, scratch=Scratch(), dense_share=1 / 8)
        assert none is not None and len(none.values) == 0 and len(none.offsets) == len(rows) + 1


def test_the_dense_switch_is_the_exact_one() -> None:
    x, w, b = problem(2)
    screen = Screen(enabled=True)
    assert screen.above(x, w, b, torch.zeros(F), scratch=Scratch(), dense_share=1 / 8) is None
    assert above_threshold(x, w, b, torch.zeros(F), dense_share=1 / 8) is None
    assert screen.enabled and not screen.crowded


@pytest.mark.parametrize("kind", ["largest", "above", "rows"])
def test_a_device_whose_bfloat16_errs_beyond_its_bound_is_found_by_the_audit(kind: str, monkeypatch) -> None:
    x, w, b = problem(3)
    real = Bounds._cast

    def worse(self: Bounds, name: str, t: Tensor):
        out, norm, gap = real(self, name, t)
        out[:, :D] *= 1 + 0.1 * torch.randn(len(t), D, generator=torch.Generator().manual_seed(0))
        return out, norm, gap

    monkeypatch.setattr(Bounds, "_cast", worse)
    screen, low = Screen(enabled=True), torch.full((F,), 12.0)
    if kind == "rows":
        values, _ = screen(x, w, b, 4, signed=False)
        true_values = (x @ w.T + b).topk(4, dim=1).values
        torch.testing.assert_close(values.sort(1).values, true_values.sort(1).values, rtol=1e-5, atol=1e-5)
    else:
        if kind == "largest":
            found = screen.largest(x, w, b, 300, signed=False, scratch=Scratch())
            true = batch_largest(x, w, b, 300)
        else:
            found = screen.above(x, w, b, low, scratch=Scratch(), dense_share=1 / 8)
            true = above_threshold(x, w, b, low)
        assert found is not None and true is not None and torch.equal(found.places(F), true.places(F))
    assert not screen.enabled and screen.misses > 0 and screen.audits == 1


def test_a_margin_too_small_is_found_by_the_audit() -> None:
    x, w, b = problem(4)
    u = scores(x, w, b)
    low = (u.topk(3, dim=0).values[2] * (1 - 1e-4)).float()
    for widen, on in ((1.0, True), (0.0, False)):
        screen = Screen(enabled=True)
        screen.widen = widen
        screen.above(x, w, b, low, scratch=Scratch(), dense_share=1 / 8)
        assert screen.enabled is on and (screen.misses == 0) is on


def test_where_most_would_be_computed_one_by_one_the_exact_pass_is_made_for_a_while(monkeypatch) -> None:
    """First rows with few firing latents say that screening pays, the others do not."""
    x, w, b = problem(5)
    low = torch.full((F,), 6.0)
    x[:64] *= 0.1
    screen, calls = Screen(enabled=True), []
    real = selection.Bounds
    monkeypatch.setattr(selection, "Bounds", lambda *a, **k: calls.append(1) or real(*a, **k))
    for _ in range(5):
        found = screen.above(x, w, b, low, scratch=Scratch(), dense_share=1 / 8)
        true = above_threshold(x, w, b, low)
        assert found is not None and true is not None and torch.equal(found.places(F), true.places(F))
    assert screen.crowded == 1 and screen.enabled and len(calls) == 2, "an audit and one screened pass"


def step_of(trainer: Trainer, x: Tensor, screen: Screen) -> dict[str, Tensor]:
    """Values, their places and all gradients of one forward and backward pass."""
    s = trainer.sae
    dead = Dead(torch.arange(0, s.cfg.d_sae, 9), 8) if s.cfg.auxk else None
    out = training_step(s, x, dead=dead, select=screen, eps=trainer.eps)
    assert out.indices is not None
    loss = ((out.x_hat - x) ** 2).mean() + (out.e_hat**2).sum()
    prefixes = None if out.nested is None else out.nested.prefixes
    for extra in (prefixes, out.gate, out.sparsity):
        loss = loss if extra is None else loss + ((extra**2).mean())
    s.zero_grad(set_to_none=True)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in s.named_parameters() if p.grad is not None}
    return grads | {"values": out.values.detach(), "indices": out.indices}


@pytest.mark.parametrize(
    "name",
    ["batch_topk", "batch_abs_topk", "matryoshka", "jumprelu", "threshold_atoms", "gba", "relu_l1", "gated"],
)
def test_gradients_of_a_screened_step_are_those_of_an_exact_one(name: str) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=gen)
    has_k = name in ("batch_topk", "batch_abs_topk", "matryoshka")
    cfg: SAEConfig = getattr(presets, name)(d_sae=F, d_model=D, **({"k": 6} if has_k else {}))
    if name == "threshold_atoms":
        cfg = SAEConfig.from_dict(cfg.to_dict() | {"space": "scalar"})
    trainer = Trainer(cfg, TrainConfig(steps=10, batch_size=B, screen="off"), Moments(B, D**0.5), CPU)
    trainer.start(x)
    s = trainer.sae
    with torch.no_grad():
        s.W_enc.copy_(torch.randn(s.W_enc.shape, generator=gen))
        if hasattr(s, "threshold") and not has_k:
            s.threshold.fill_(12.0)
        elif not has_k:
            s.b_enc.fill_(-12.0)
    screen = Screen(enabled=True)
    exact, screened = step_of(trainer, x, Screen(enabled=False)), step_of(trainer, x, screen)
    assert (
        screen.enabled
        and screen.audits == 1
        and screen.crowded == 0
        and 0 < len(exact["values"]) < B * F / 24
    )
    assert torch.equal(exact.pop("indices"), screened.pop("indices"))
    for key, wanted in exact.items():
        torch.testing.assert_close(
            screened[key], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu"])
def test_a_screened_run_that_was_stopped_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch) -> None:
    """Audits, rests and the bound that the last batch left are in the checkpoint."""
    monkeypatch.setattr("saes.screening.AUDIT_STEPS", 3)
    store, _ = make_store(tmp_path / "a", [40] * 60, d=12)
    other, _ = make_store(tmp_path / "b", [40] * 60, d=12)
    config = TrainConfig(steps=14, batch_size=128, screen="on", log_every=10, dead_window_tokens=500)
    more = {"k": 2} if "topk" in name else {"threshold_init": 3.0}
    job = [getattr(presets, name)(d_sae=96, **more)]
    states: list[dict] = []
    real_load = Screen.load_state
    monkeypatch.setattr(
        Screen, "load_state", lambda self, state: states.append(state) or real_load(self, state)
    )
    real, calls = training.save_checkpoint, []

    def stop_after_eight(run: Path, checkpoint):
        path = real(run, checkpoint)
        calls.append(checkpoint.step)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return path

    whole = train(store, job, config, hook=HOOK)[0]
    monkeypatch.setattr(training, "save_checkpoint", stop_after_eight)
    often = TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0}))
    with pytest.raises(KeyboardInterrupt):
        train(other, job, often, hook=HOOK)
    monkeypatch.setattr(training, "save_checkpoint", real)
    resumed = train(other, job, config, hook=HOOK)[0]
    assert states and states[0]["enabled"] and states[0]["misses"] == 0
    assert states[0]["calls"] == 8 and states[0]["audits"] == 3
    assert (states[0]["low"] is not None) == (name == "batch_topk")
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[key]), key


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(0, 300), share=st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_places_are_those_of_a_plain_search(seed: int, size: int, share: float) -> None:
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=gen) < share
    assert torch.equal(true_places(mask), mask.nonzero().squeeze(1))
    values = torch.randint(0, 12, (size,), generator=gen).float()  # many ties
    n = int(torch.randint(0, size + 1, (), generator=gen))
    places = largest_places(values, n)
    assert len(places) == n and (places.diff() > 0).all()
    assert torch.equal(values[places].sort().values, values.sort().values[size - n :])
