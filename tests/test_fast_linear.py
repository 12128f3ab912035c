"""Layers of a loaded model made by the faster library: the same numbers, gradients and weights as torch's own."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cache import fast_linear, load_model, products
from cache.fast_linear import FastLinear, use_fast_products

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for every size, so that tiny models take it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN linear")
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    monkeypatch.setattr(products, "MIN_ROWS", 1)
    monkeypatch.setattr(products, "MIN_WEIGHTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that went to oneDNN."""
    seen: list[torch.Size] = []

    def counted(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(x.shape)
        return products.onednn_linear(x, w, b)

    monkeypatch.setattr(fast_linear, "onednn_linear", counted)
    return seen


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5, bias=False)).requires_grad_(False)


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_a_loaded_model_has_the_logits_and_gradients_of_the_plain_one(
    backend: str, tiny_dir: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_dir, device="cpu", backend=backend)
    tokens = torch.randint(0, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    hook = "blocks.0.hook_resid_post"
    logits, resid = model.hf(tokens).logits, model.capture(tokens, hook)[hook]
    assert len(calls) > 10, "its linear layers go the fast way"
    monkeypatch.setattr(products, "onednn_gains", lambda: False)
    calls.clear()
    torch.testing.assert_close(logits, model.hf(tokens).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(resid, model.capture(tokens, hook)[hook], rtol=1e-4, atol=1e-4)
    assert not calls


def test_gradients_of_any_order_reach_the_input() -> None:
    fast = layers()
    plain = copy.deepcopy(fast)
    assert use_fast_products(fast) == 2 and use_fast_products(fast) == 0
    found = []
    for net in (fast, plain):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        found.append((g, h))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_biases_that_are_trained_alone_have_their_gradients(calls: list[Any]) -> None:
    net = layers()
    use_fast_products(net)
    net[0].bias.requires_grad_(True)
    net(torch.randn(4, 12)).square().sum().backward()
    assert net[0].bias.grad is not None and bool(net[0].bias.grad.any())
    assert len(calls) >= 1, "the other layer still goes the fast way"


def test_forward_mode_derivatives_are_those_of_the_plain_layer() -> None:
    fast = layers()
    plain = copy.deepcopy(fast)
    use_fast_products(fast)
    x, t = torch.randn(4, 12), torch.randn(4, 12)
    for a, b in zip(torch.func.jvp(fast, (x,), (t,)), torch.func.jvp(plain, (x,), (t,))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_choice_of_library_does_not_hang_on_what_its_first_caller_had_switched_on() -> None:
    script = """
import torch
torch.set_default_dtype(torch.float64)
from cache.products import onednn_gains
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(onednn_gains() in (True, False))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_a_layer_that_is_trained_cast_or_under_autocast_does_as_before(calls: list[Any]) -> None:
    net = layers()
    use_fast_products(net)
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    assert copy.deepcopy(net).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    net.requires_grad_(True)
    net(x).sum().backward()
    assert net[0].weight.grad is not None and not calls


def test_other_kinds_of_layers_and_the_weights_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    net = nn.ModuleList([Own(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3)])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert use_fast_products(net) == 1
    assert type(net[0]) is Own and isinstance(net[1], FastLinear) and isinstance(net[1], nn.Linear)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
