"""gradcheck of the sparse kernels in float64, on all three ways to the gradient of the codes: torch's sampled product, its
private op, and a gather.

The sampled product is in beta and the private op (`aten._embedding_bag_per_sample_weights_backward`) may go away with a
torch release; then the gather is all there is, and has to train the same SAE.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from saes import TrainConfig, presets, train
from saes import row_dots as dots
from saes.kernels import Dead, Support, decode_from, encode_at
from saes.row_dots import row_dots

OP = "_embedding_bag_per_sample_weights_backward"
D, F, ROWS = 5, 12, 6
COUNTS = {"fixed": None, "varying": [3, 0, 2, 0, 0, 4], "all empty": [0] * ROWS}


class _WithoutOp:
    """torch.ops.aten of a release that has dropped the private op."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name == OP:
            raise AttributeError(name)
        return getattr(self._real, name)


@pytest.fixture(params=["sampled", "private op", "gather"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert dots.has_sampled() and hasattr(torch.ops.aten, OP), "this torch lacks a way: it is not tested"
    force(request.param, monkeypatch)
    return request.param


def force(way: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave torch this way and slower ones; the ways that are called from now on."""
    if way != "sampled":
        monkeypatch.setattr(dots, "has_sampled", lambda: False)
    if way == "gather":
        monkeypatch.setattr(torch.ops, "aten", _WithoutOp(torch.ops.aten))
    called: list[str] = []
    for name in ("by_sampled", "by_private_op", "by_gather"):
        real = getattr(dots, name)

        def noted(*args: Any, name: str = name, real: Any = real) -> torch.Tensor:
            called.append(name)
            return real(*args)

        monkeypatch.setattr(dots, name, noted)
    return called


def support(counts: list[int] | None) -> Support:
    gen = torch.Generator().manual_seed(0)
    if counts is None:
        return Support(torch.stack([torch.randperm(F, generator=gen)[:3] for _ in range(ROWS)]), F)
    ids = [torch.randperm(F, generator=gen)[:n].sort().values for n in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Support(torch.cat(ids), F, offsets)


def leaf(*shape: int, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("counts", COUNTS)
def test_decoding_has_the_gradient_of_its_definition(counts: str, way: str) -> None:
    s = support(COUNTS[counts])
    values, w_dec = leaf(*s.indices.shape, seed=1), leaf(F, D, seed=2)
    assert gradcheck(lambda v, w: decode_from(v, s, w)[0], (values, w_dec))
    dead = Dead(torch.tensor([0, 7, 11]), 2)
    z_dead = leaf(ROWS, 3, seed=3)
    assert gradcheck(lambda v, w, z: decode_from(v, s, w, z_dead=z, dead=dead), (values, w_dec, z_dead))


@pytest.mark.parametrize("counts", COUNTS)
def test_encoding_has_the_gradient_of_its_definition(counts: str, way: str) -> None:
    s, dead = support(COUNTS[counts]), Dead(torch.tensor([2, 3]), 2)
    leaves = (leaf(ROWS, D, seed=1), leaf(F, D, seed=2), leaf(F, seed=3), leaf(D, seed=4))

    def at_support(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, b_dec: torch.Tensor) -> Any:
        with torch.no_grad():
            xc = x - b_dec
            u = (xc[s.rows()] * w[s.ids]).sum(1) + b[s.ids]
        return encode_at(x, w, b, b_dec, s, u.view(s.indices.shape), xc=xc, dead=dead)

    assert gradcheck(at_support, leaves)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_gradient_of_the_codes_is_a_dot_product_for_each_entry(counts: str, way: str) -> None:
    s = support(COUNTS[counts])
    g, w = leaf(ROWS, D, seed=1).detach(), leaf(F, D, seed=2).detach()
    want = (g[s.rows()] * w[s.ids]).sum(1).view(s.indices.shape)
    torch.testing.assert_close(row_dots(g, w, s.indices, s.offsets), want)
    # rows that are a view, and latents in any order, some twice
    ids = torch.tensor([3, 0, 3, 11, 2, 2])[torch.arange(ROWS * 4).view(ROWS, 4) % 6]
    wide = leaf(ROWS, 2 * D, seed=3).detach()[:, ::2]
    torch.testing.assert_close(row_dots(wide, w, ids), torch.einsum("bd,bkd->bk", wide, w[ids]))


def test_the_gather_in_chunks_is_the_gather_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    s, g, w = support(COUNTS["varying"]), leaf(ROWS, D, seed=1).detach(), leaf(F, D, seed=2).detach()
    want = dots.by_gather(g, w, s.indices, s.offsets)
    monkeypatch.setattr(dots, "CHUNK_BYTES", D * 8 * 2)
    torch.testing.assert_close(dots.by_gather(g, w, s.indices, s.offsets), want)


def test_rows_in_half_precision_do_not_go_to_the_sampled_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has it for float32 and float64 only."""
    called = force("sampled", monkeypatch)
    g, w = leaf(ROWS, D, seed=1).detach().bfloat16(), leaf(F, D, seed=2).detach().bfloat16()
    found = row_dots(g, w, support(None).indices)
    assert found.dtype == torch.bfloat16 and "by_sampled" not in called


@pytest.mark.parametrize("fallback", ["private op", "gather"])
def test_training_on_a_fallback_gives_the_same_sae(fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run: fixed and varying L0, AuxK, nested prefixes."""
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    configs = [
        presets.topk(d_sae=48, k=4, name="topk"),
        presets.batch_topk(d_sae=48, k=4, name="batch"),
        presets.matryoshka(d_sae=48, k=4, matryoshka=(12, 24), name="nested"),
    ]
    config = TrainConfig(
        steps=30, batch_size=64, lr=5e-3, dead_window_tokens=128, dead_refresh_steps=5, screen="off"
    )
    usual = train(x, configs, config)
    called = force(fallback, monkeypatch)
    for a, b in zip(usual, train(x, configs, config), strict=True):
        for (name, p), q in zip(a.sae.named_parameters(), b.sae.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert called.count(f"by_{fallback.replace(' ', '_')}") >= 3 * config.steps
    assert len(set(called)) == 1
