"""The error of nested reconstructions and its gradient, against autograd of their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saes import nested
from saes.nested import Nested
from saes.top_products import Scratch


def leaves(n: int, groups: int, d: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((n, groups, d), (d,), (n, d))
    return [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_errors_of_nested_reconstructions_have_the_gradient_of_their_definition(
    groups: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of rows of any size, the last one smaller."""
    monkeypatch.setattr(nested, "BLOCK_BYTES", rows * groups * 4 * 8)
    parts, b_dec, y = leaves(7, groups, 4)
    weights = (1.0, 0.125, 0.5, 2.0, 0.3)[:groups]
    got = Nested(parts, b_dec, Scratch(), weights).error(y)
    want = sum(weights[g] * (((parts[:, : g + 1].sum(1) + b_dec) - y) ** 2).sum() for g in range(groups))
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t, (parts, b_dec, y)) for t in (3 * got, 3 * want)), strict=True):
        torch.testing.assert_close(a, b)


def test_prefixes_are_the_sums_of_the_parts_so_far() -> None:
    parts, b_dec, _ = leaves(3, 4, 2)
    prefixes = Nested(parts, b_dec, Scratch(), (1.0,) * 4).prefixes
    for g in range(4):
        torch.testing.assert_close(prefixes[:, g], parts[:, : g + 1].sum(1) + b_dec)


def test_a_second_walk_back_is_an_error_and_not_a_wrong_gradient() -> None:
    parts, b_dec, y = leaves(3, 2, 2)
    error = Nested(parts, b_dec, Scratch(), (1.0, 1.0)).error(y)
    error.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        error.backward()


def test_a_gradient_that_another_error_has_overwritten_is_an_error_and_not_wrong() -> None:
    """Two forward passes on one set of buffers before the first backward."""
    scratch = Scratch()
    a, b = leaves(3, 2, 4), leaves(3, 2, 4)
    first = Nested(a[0], a[1], scratch, (1.0, 1.0)).error(a[2])
    second = Nested(b[0], b[1], scratch, (1.0, 1.0)).error(b[2])
    with pytest.raises(RuntimeError, match="before the next"):
        first.backward()
    second.backward()
    assert b[0].grad is not None
