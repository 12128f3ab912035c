"""gradcheck of the sparse kernels in float64, on both ways to the gradient of the codes: torch's private op and a gather.

The private op (`aten._embedding_bag_per_sample_weights_backward`) may go away with a torch release; then the gather is
all there is, and has to train the same SAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from saes import TrainConfig, kernels, presets, train
from saes.kernels import Dead, Support, decode_from, encode_at, row_dots

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


@pytest.fixture(params=["private op", "gather"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "gather":
        monkeypatch.setattr(torch.ops, "aten", _WithoutOp(torch.ops.aten))
    else:
        assert hasattr(torch.ops.aten, OP), "this torch has no private op: only the gather is left to test"
    yield request.param


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


def test_training_without_the_private_op_gives_the_same_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run on the fallback: fixed and varying L0, AuxK, nested prefixes."""
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    configs = [
        presets.topk(d_sae=48, k=4, name="topk"),
        presets.batch_topk(d_sae=48, k=4, name="batch"),
        presets.matryoshka(d_sae=48, k=4, matryoshka=(12, 24), name="nested"),
    ]
    config = TrainConfig(
        steps=30, batch_size=64, lr=5e-3, dead_window_tokens=128, dead_refresh_steps=5, screen="off"
    )
    private = train(x, configs, config)
    calls: list[int] = []
    gather = kernels._row_dots_by_gather
    monkeypatch.setattr(kernels, "_row_dots_by_gather", lambda *a: (calls.append(1), gather(*a))[1])
    monkeypatch.setattr(torch.ops, "aten", _WithoutOp(torch.ops.aten))
    for a, b in zip(private, train(x, configs, config), strict=True):
        for (name, p), q in zip(a.sae.named_parameters(), b.sae.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert len(calls) >= 3 * config.steps
