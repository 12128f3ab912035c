"""The default weight of the L1 term on planted data of two widths: it must neither kill the latents nor leave them dense."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cache.errors import UsageError
from saes import TrainConfig, presets, train
from saes.config import SAEConfig

CONFIG = TrainConfig(steps=400, batch_size=256, lr=3e-3, warmup_steps=20, screen="off")


def planted(d: int, atoms: int, active: int) -> tuple[Tensor, Tensor]:
    """Rows that are sums of about `active` unit atoms with coefficients in [0.5, 1.5], and the atoms."""
    gen = torch.Generator().manual_seed(d)
    directions = torch.nn.functional.normalize(torch.randn(atoms, d, generator=gen), dim=1)
    fires = torch.rand(8192, atoms, generator=gen) < active / atoms
    return (fires * (0.5 + torch.rand(8192, atoms, generator=gen))) @ directions, directions


@pytest.mark.parametrize("d, active", [(64, 4), (192, 8)])
def test_the_default_l1_finds_planted_atoms_at_any_width(d: int, active: int) -> None:
    x, atoms = planted(d, 2 * d, active)
    result = train(x, [presets.relu_l1(d_sae=4 * d)], CONFIG)[0]
    found = (atoms @ result.sae.W_dec.T).amax(1)
    last = result.metrics[-1]
    assert last["n_dead"] == 0 and last["fvu"] < 0.15
    assert found.mean() > 0.9
    assert active <= last["l0"] < 12 * active


def test_the_default_l1_follows_the_norm_of_the_rows() -> None:
    for preset in (presets.relu_l1, presets.gated):
        assert preset(d_sae=64).l1 is None
        assert preset(d_sae=64, d_model=400).l1 == pytest.approx(2.0)
        assert preset(d_sae=64, d_model=400, d_out=900, out_hook="b").l1 == pytest.approx(3.0)
        assert preset(d_sae=64, d_model=2500).l1 == pytest.approx(5.0)
        assert preset(d_sae=64, d_model=400, l1=5.0).l1 == 5.0
    assert SAEConfig(d_sae=64, activation="relu", l1=None, space="unit", d_model=400).l1 == 0.1
    assert math.isclose(SAEConfig.from_dict(presets.relu_l1(d_sae=64, d_model=16).to_dict()).l1 or 0, 0.4)


def test_a_default_l1_without_a_known_norm_or_use_is_refused() -> None:
    with pytest.raises(UsageError, match="space raw"):
        presets.relu_l1(d_sae=64, space="raw")
    with pytest.raises(UsageError, match="l1 is for relu"):
        SAEConfig(d_sae=64, k=4, l1=None)
