"""The sparse step against a dense reference in float64: forward, and the gradient of each loss term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saes import kernels, presets, screening, top_products
from saes.kernels import Dead, sparse_step
from saes.row_dots import by_gather
from saes.screening import Screen, screening_gains
from saes.top_products import Also, column_width, top_pre_activations

B, D, F, K = 9, 7, 40, 5


def _params(seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = ((B, D), (F, D), (F,), (F, D), (D,))
    return [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes]


def _dense(x: Tensor, we: Tensor, be: Tensor, wd: Tensor, bd: Tensor, signed: bool, dead: Dead | None):
    """The definition, with dense [B, F] tensors and autograd."""
    u = (x - bd) @ we.T + be
    keep = torch.zeros_like(u).scatter(1, (u.abs() if signed else u).topk(K, dim=1).indices, 1.0)
    z = u * keep
    if not signed:
        z = z.relu()
    x_hat = z @ wd + bd
    e_hat = None
    if dead is not None:
        ud = u[:, dead.ids]
        kd = torch.zeros_like(ud).scatter(
            1, (ud.abs() if signed else ud).topk(dead.k_aux, dim=1).indices, 1.0
        )
        e_hat = (ud * kd) @ wd[dead.ids]
    return x_hat, z, e_hat


def _loss(term: str, x: Tensor, x_hat: Tensor, z: Tensor, e_hat: Tensor | None) -> Tensor:
    if term == "mse":
        return ((x_hat - x.detach()) ** 2).sum()
    if term == "auxk":
        assert e_hat is not None
        return ((e_hat - (x - x_hat).detach()) ** 2).sum()
    if term == "sparsity":
        return (z.abs() ** 1.5).sum()
    return sum(_loss(t, x, x_hat, z, e_hat) for t in ("mse", "auxk", "sparsity"))  # type: ignore[return-value]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("term", ["mse", "auxk", "sparsity", "all"])
@pytest.mark.parametrize("fallback", [False, True])
def test_gradient_of_each_term_equals_dense_autograd(
    term: str, signed: bool, fallback: bool, monkeypatch
) -> None:
    if fallback:
        monkeypatch.setattr(kernels, "row_dots", by_gather)
    dead = Dead(torch.tensor([1, 4, 6, 17, 30, 31]), 3)
    sparse, dense = _params(), _params()
    out = sparse_step(*sparse, k=K, signed=signed, dead=dead)
    _loss(term, sparse[0], out.x_hat, out.values, out.e_hat).backward()
    x_hat, z, e_hat = _dense(*dense, signed, dead)
    _loss(term, dense[0], x_hat, z, e_hat).backward()
    torch.testing.assert_close(out.x_hat, x_hat)
    torch.testing.assert_close(out.e_hat, e_hat)
    for name, a, b in zip(("x", "W_enc", "b_enc", "W_dec", "b_dec"), sparse, dense, strict=True):
        want = torch.zeros_like(b) if b.grad is None else b.grad
        got = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{term}: gradient of {n}: {m}")


def test_auxk_moves_the_encoder_and_decoder_of_dead_latents_only() -> None:
    x, we, be, wd, bd = _params(1)
    dead = Dead(torch.tensor([2, 3, 5, 39]), 2)
    out = sparse_step(x.detach(), we, be, wd, bd, k=K, dead=dead)
    _loss("auxk", x, out.x_hat, out.values, out.e_hat).backward()
    for grad in (we.grad, wd.grad):
        assert grad is not None
        assert (grad[dead.ids].abs().sum(1) > 0).sum() >= 2
        rest = torch.ones(F, dtype=torch.bool)
        rest[dead.ids] = False
        assert not grad[rest].any()


def test_a_selected_latent_below_zero_neither_fires_nor_learns() -> None:
    x, we, be, wd, bd = _params(2)
    with torch.no_grad():
        be -= 100.0
    out = sparse_step(x.detach(), we, be, wd, bd, k=K)
    assert not out.values.any()
    out.x_hat.sum().backward()
    assert be.grad is not None and not be.grad.any()


def test_latents_that_never_fire_get_zero_gradient_not_garbage() -> None:
    """Empty bags: most latents own no row in a small batch."""
    x, we, be, wd, bd = _params(3)
    out = sparse_step(x.detach()[:1], we, be, wd, bd, k=1)
    (out.x_hat**2).sum().backward()
    assert wd.grad is not None
    assert int((wd.grad.abs().sum(1) > 0).sum()) == 1


@pytest.mark.parametrize("signed", [False, True])
def test_blocks_of_rows_do_not_change_the_selection(signed: bool, monkeypatch) -> None:
    x, w, b = torch.randn(50, 8), torch.randn(64, 8), torch.randn(64)
    whole = top_pre_activations(x, w, b, 6, signed=signed)
    monkeypatch.setattr(top_products, "CHUNK_BYTES", 64 * 4 * 7)
    parts = top_pre_activations(x, w, b, 6, signed=signed)
    u = x @ w.T + b
    want = (u.abs() if signed else u).topk(6, dim=1).values.sum(1)
    for values, _ in (whole, parts):
        torch.testing.assert_close((values.abs() if signed else values).sum(1), want)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("d_sae", [4096, 4608, 8192])
@pytest.mark.parametrize("k", [1, 32, 64])
def test_selection_in_blocks_of_latents_finds_what_a_search_of_whole_rows_finds(
    signed: bool, d_sae: int, k: int, monkeypatch
) -> None:
    """With a block boundary of rows in the middle, dead latents at the edges of blocks, and half of the rows all equal."""
    gen = torch.Generator().manual_seed(k)
    x, w, b = (torch.randn(s, generator=gen) for s in ((20, 8), (d_sae, 8), (d_sae,)))
    x[10:] = 0  # u is the bias: every row the same
    width = column_width(d_sae)
    assert 0 < width < d_sae, "more than one block, or nothing is tested"
    monkeypatch.setattr(top_products, "CHUNK_BYTES", d_sae * 4 * 13)
    also = Also(torch.tensor([0, 5, width - 1, width, d_sae - 1]))
    values, ids = top_pre_activations(x, w, b, k, signed=signed, also=also)
    u = x @ w.T + b
    torch.testing.assert_close(values, u.gather(1, ids))
    size = u.abs() if signed else u
    torch.testing.assert_close(size.gather(1, ids).sort(1).values, size.topk(k, dim=1).values.sort(1).values)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert also.values is not None
    torch.testing.assert_close(also.values, u[:, also.ids])


def test_widths_that_blocks_do_not_divide_are_searched_whole() -> None:
    """A prime number of latents, and fewer than the search by groups pays for."""
    assert column_width(4099) == 0
    x, w, b = torch.randn(6, 8), torch.randn(4099, 8), torch.randn(4099)
    values, ids = top_pre_activations(x, w, b, 5, signed=False)
    torch.testing.assert_close(values.sort(1).values, (x @ w.T + b).topk(5, dim=1).values.sort(1).values)
    assert ids.max() < 4099


@pytest.mark.parametrize("signed", [False, True])
def test_screening_keeps_the_float32_values_and_audits(signed: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(64, 32, generator=gen), torch.randn(1024, 32, generator=gen), torch.zeros(1024)
    screen = Screen(enabled=True)
    values, ids = screen(x, w, b, 8, signed=signed)
    u = x @ w.T + b
    torch.testing.assert_close(values, u.gather(1, ids), rtol=1e-5, atol=1e-5)
    want = (u.abs() if signed else u).topk(8, dim=1).values.sort(1).values
    torch.testing.assert_close(
        (values.abs() if signed else values).sort(1).values, want, rtol=1e-5, atol=1e-5
    )
    assert screen.audits == 1 and screen.misses == 0


def test_latents_that_bfloat16_cannot_rank_are_ranked_in_float32() -> None:
    """They differ only past its eight bits: hundreds of candidates, of which float32 must choose."""
    x = torch.ones(16, 4)
    w = torch.full((512, 4), 100.0) + torch.linspace(0, 0.05, 512)[torch.randperm(512)][:, None]
    screen = Screen(enabled=True)
    values, _ = screen(x, w, torch.zeros(512), 8, signed=False)
    assert screen.misses == 0 and screen.enabled
    torch.testing.assert_close(values.sort(1).values, (x @ w.T).topk(8, dim=1).values.sort(1).values)


def test_screening_is_not_decided_by_a_race_so_the_same_run_gives_the_same_sae(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for share, wanted in ((0.24, True), (1.3, False)):
        monkeypatch.setattr(screening, "bf16_product_share", lambda device, s=share: s)
        for preset, more in (
            (presets.topk, {"k": 32}),
            (presets.batch_topk, {"k": 32}),
            (presets.jumprelu, {}),
        ):
            assert screening_gains(preset(d_sae=4608, d_model=576, **more), cpu) is wanted
            small = preset(d_sae=96, d_model=64, **({"k": 4} if more else {}))
            assert not screening_gains(small, cpu), "a small encoder gains nothing worth a race"
    monkeypatch.undo()
    assert screening.bf16_product_share("cpu") == screening.bf16_product_share("cpu"), "asked once a process"
