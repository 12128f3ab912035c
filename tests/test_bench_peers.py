"""The worker protocol of the side-by-side benchmark, with our own trainer as the peer: no second environment needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.train_peers import Peer, Rows, median_ratio


@pytest.fixture
def job(tmp_path: Path) -> dict:
    gen = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(24, 16, generator=gen), dim=1)
    x = ((torch.rand(640, 24, generator=gen) < 0.1) * (1 + torch.rand(640, 24, generator=gen))) @ atoms
    path = Rows(x, tmp_path).path
    return {
        "data": str(path), "d_sae": 48, "k": 3, "batch": 64, "lr": 1e-2, "dead": 0.1, "threads": 1, "screen": "off"
    }  # fmt: skip


def test_a_worker_times_steps_learns_and_measures_memory(job: dict) -> None:
    peer = Peer("ours", Path(sys.executable), **job)
    try:
        assert 0 < peer.seconds() < 60
        curve = peer.ask("train", steps=60, every=30)["fvu"]
        assert [tokens for tokens, _ in curve] == [0, 30 * 64, 60 * 64]
        assert curve[2][1] < curve[1][1] < curve[0][1]
        if os.access("/proc/self/clear_refs", os.W_OK):
            assert peer.ask("memory", steps=1)["growth"] >= 0
    finally:
        peer.close()


def test_a_worker_that_fails_says_why(job: dict) -> None:
    with pytest.raises(RuntimeError, match="nobody"):
        Peer("nobody", Path(sys.executable), **job)


def test_ratios_are_medians_over_pairs_not_of_medians() -> None:
    assert median_ratio([2.0, 30.0, 9.0], [1.0, 10.0, 2.0]) == 3.0
