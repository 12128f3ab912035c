"""The linear layers of a loaded model through cache/products.py: its passes take half the time where oneDNN wins.

Only frozen float32 weights on a CPU go that way; layers that are moved, trained or run under autocast do as before.
Differentiable in the input, any number of times. Small inputs (one token of a generation) stay with torch, which is
faster there, so a token alone and the same token in a batch differ in the last bits, as they do in torch itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cache.products import onednn_linear, onednn_wins


class _Linear(torch.autograd.Function):
    """(x, w, b) -> x @ w.T + b, with a gradient for x alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:  # type: ignore[override]
        return onednn_linear(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return t @ ctx.saved_tensors[0].T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (w,) = ctx.saved_tensors
        return _Linear.apply(g, w.T, None), None, None


def _wins(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    trained = w.requires_grad or (b is not None and b.requires_grad)
    return not trained and not torch.is_autocast_enabled("cpu") and onednn_wins(x, w)


class FastLinear(nn.Linear):
    """`nn.Linear`, made in place of one by `use_fast_products`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _wins(x, self.weight, self.bias):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> int:
    """Give the plain `nn.Linear` modules of a model the faster product; how many there were. Weights stay where they are."""
    plain = [m for m in model.modules() if type(m) is nn.Linear]
    for module in plain:
        module.__class__ = FastLinear
    return len(plain)
