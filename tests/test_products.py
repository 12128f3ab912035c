"""Matrix products by either library: right for any strides, and bfloat16 only where it was asked for."""

from __future__ import annotations

import pytest
import torch

from cache import products
from saes import SAE, TrainConfig, presets, train
from saes.activations import training_step
from saes.products import decode_dense, encode_dense, linear_into, product

LIBRARIES = pytest.mark.parametrize("onednn", [False, True])
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch):
    def choose(onednn: bool) -> None:
        if onednn and not HAS_ONEDNN:
            pytest.skip("this torch has no oneDNN linear")
        monkeypatch.setattr(products, "onednn_gains", lambda: onednn)
        monkeypatch.setattr(products, "MIN_ROWS", 0)
        monkeypatch.setattr(products, "MIN_WEIGHTS", 1)

    return choose


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@LIBRARIES
@pytest.mark.parametrize(
    ("a", "b"), [("plain", "plain"), ("turned", "plain"), ("plain", "turned"), ("turned", "turned")]
)
@pytest.mark.parametrize("shape", [(33, 17, 65), (1, 5, 3), (4, 1, 1), (0, 5, 3), (4, 0, 3)])
def test_a_product_is_right_whatever_the_strides_of_its_factors(onednn, a, b, shape, by) -> None:
    by(onednn)
    n, k, m = shape
    x = rows(n, k) if a == "plain" else rows(k, n).T
    y = rows(k, m, seed=1) if b == "plain" else rows(m, k, seed=1).T
    got = product(x, y)
    torch.testing.assert_close(got.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-4)
    assert got.is_contiguous() or got.numel() <= max(n, m), "gradients of weights must lie as the weights do"


@LIBRARIES
def test_pre_activations_of_many_blocks_land_in_their_columns(onednn, by) -> None:
    by(onednn)
    x, w, b = rows(7, 12), rows(2500, 12, seed=1), rows(2500, seed=2)
    out = linear_into(torch.full((7, 2500), torch.nan), x, w, b)
    torch.testing.assert_close(out.double(), x.double() @ w.double().T + b.double(), rtol=1e-5, atol=1e-5)


@LIBRARIES
@pytest.mark.parametrize("kind", ["column", "expanded"])
def test_a_bias_of_any_strides_is_the_one_that_is_added(onednn, kind, by) -> None:
    by(onednn)
    b = rows(40, 2, seed=2)[:, 0] if kind == "column" else torch.tensor([2.5]).expand(40)
    x, w = rows(6, 12), rows(40, 12, seed=1)
    out = linear_into(torch.empty(6, 40), x, w, b)
    torch.testing.assert_close(out, x @ w.T + b, rtol=1e-5, atol=1e-5)


@LIBRARIES
def test_factors_that_do_not_fit_are_refused_with_their_shapes(onednn, by) -> None:
    by(onednn)
    with pytest.raises(RuntimeError, match="3x4 and 5x6"):
        product(rows(3, 4), rows(5, 6))


@LIBRARIES
def test_dense_steps_have_the_gradients_of_plain_autograd(onednn, by) -> None:
    by(onednn)
    x, w, b, d = rows(9, 6), rows(20, 6, seed=1), rows(20, seed=2), rows(20, 6, seed=3)
    own = [t.clone().requires_grad_() for t in (x, w, b, d)]
    plain = [t.double().requires_grad_() for t in (x, w, b, d)]
    decode_dense(encode_dense(*own[:3]).relu(), own[3]).square().sum().backward()
    ((plain[0] @ plain[1].T + plain[2]).relu() @ plain[3]).square().sum().backward()
    for a, p in zip(own, plain):
        torch.testing.assert_close(a.grad.double(), p.grad, rtol=1e-4, atol=1e-4)
        assert a.grad.is_contiguous()


@pytest.mark.parametrize("preset", ["relu_l1", "gated", "jumprelu"])
def test_autocast_makes_dense_products_in_bfloat16_and_keeps_float32_weights_and_gradients(
    preset: str,
) -> None:
    sae = SAE(getattr(presets, preset)(d_sae=64, d_model=16, hook="x"))
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.copy_(rows(*p.shape, seed=i))
        if sae.cfg.activation == "jumprelu":
            sae.threshold.fill_(0.7)  # bfloat16 is coarser here than the window
    x = rows(256, 16, seed=9)
    found = {}
    for half in (False, True):
        sae.zero_grad(set_to_none=True)
        out = training_step(sae, x, half=half, eps=0.02)
        assert out.indices is None, "the dense branch is what is tested"
        ((out.x_hat - x) ** 2).sum().backward()
        found[half] = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    assert all(g.dtype == torch.float32 for g in found[True].values())
    assert not torch.equal(found[True]["W_enc"], found[False]["W_enc"]), "it changes something"
    for name, g in found[False].items():
        assert (found[True][name] - g).norm() <= 0.03 * g.norm() + 1e-6, name


def test_autocast_is_off_on_a_cpu_unless_it_is_asked_for_and_trains_as_well() -> None:
    x = rows(4096, 16) @ torch.diag(torch.linspace(2, 0.2, 16))
    fvu = {}
    for autocast in ("auto", "off", "on"):
        config = TrainConfig(steps=60, batch_size=256, lr=3e-3, autocast=autocast)  # type: ignore[arg-type]
        sae = train(x, [presets.relu_l1(d_sae=64)], config)[0].sae
        fvu[autocast] = float(((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert fvu["auto"] == fvu["off"] != fvu["on"]
    assert fvu["on"] == pytest.approx(fvu["off"], rel=0.05)
