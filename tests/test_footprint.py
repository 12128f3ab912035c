"""The estimate of a run's peak memory: held to what runs take, told before each one, and not too small or far too large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app import sweep
from saes import footprint
from saes.config import SAEConfig
from saes.footprint import estimate, free_memory
from saes.presets import matryoshka, topk
from saes.train_config import TrainConfig
from saes.training import train
from tests.children import ROOT
from tests.corpora import make_store
from tests.test_cli import run
from tests.test_training import planted

_MEASURED = """
import json, os, sys, tempfile
import torch
torch.set_num_threads(1)
from cache.estimate import _peak
from saes import TrainConfig, presets, train
from saes.footprint import estimate

d, batch = 128, 1024
x = torch.randn(4 * batch, d, generator=torch.Generator().manual_seed(0))

def grown(name, n, d_sae, more):
    saes = [getattr(presets, name)(d_sae=d_sae, d_model=d, name=f"s{i}", **more) for i in range(n)]
    config = TrainConfig(steps=2, batch_size=batch, screen="off", checkpoint_seconds=-1.0)
    with tempfile.TemporaryDirectory() as folder, _peak() as peak:
        train(x, saes, config, workspace=folder)
    return peak[0], estimate(saes, config, d, 2 * d, tensor_rows=len(x))["memory_bytes"]

def load():  # what is loaded once is no part of a run
    with tempfile.TemporaryDirectory() as folder:
        tiny = TrainConfig(steps=2, batch_size=64, screen="off", checkpoint_seconds=-1.0)
        train(x[:512], presets.batch_abs_topk(d_sae=64, k=2), tiny, workspace=folder)

load()
for name, n, d_sae, more in json.loads(sys.argv[1]):
    if not os.fork():  # each from the same, small heap; pages of code are mapped anew
        load()
        print(name, *grown(name, n, d_sae, more), flush=True)
        os._exit(0)
    os.wait()
"""
CASES = [
    ("topk", 1, 8192, {"k": 32}),
    ("batch_abs_topk", 8, 2048, {"k": 32}),
    ("jumprelu", 1, 4096, {}),
    ("matryoshka", 1, 4096, {"k": 32}),
    ("topk", 1, 4096, {"k": 32, "separability": 0.1}),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_the_estimate_is_neither_below_what_a_run_takes_nor_far_above_it() -> None:
    """Too low: a sweep puts together more SAEs than memory holds. Too high: it trains one at a time for nothing."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, json.dumps(CASES)], env=env, capture_output=True, text=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [r[0] for r in rows] == [c[0] for c in CASES], done.stderr
    for name, grew, estimated in rows:
        assert 0.85 <= float(estimated) / float(grew) <= 3, f"{name} grew {grew} bytes, estimated {estimated}"


def need(saes: list[SAEConfig], d_model: int = 128, d_out: int = 0, **train: Any) -> float:
    return estimate(saes, TrainConfig(**train), d_model, 2 * d_model, d_out)["memory_bytes"]


def test_another_sae_costs_its_weights_and_moments_and_no_second_step() -> None:
    one, two, three = ([topk(d_sae=4096, k=32, name=f"s{i}") for i in range(n)] for n in (1, 2, 3))
    added = need(two) - need(one)
    assert added == need(three) - need(two)
    assert 12 * 4096 * 257 <= added <= 1.1 * 12 * 4096 * 257


def test_what_makes_a_run_larger_makes_its_estimate_larger() -> None:
    usual = need([topk(d_sae=4096, k=32)])
    assert need([topk(d_sae=8192, k=32)]) > usual
    assert need([topk(d_sae=4096, k=32)], batch_size=8192) > usual
    assert need([topk(d_sae=4096, k=32)], d_out=512) > usual
    group = 6 * 2**20  # of each of two windows
    assert need([topk(d_sae=4096, k=32)], d_model=576, window=64) - need(
        [topk(d_sae=4096, k=32)], d_model=576
    ) == pytest.approx(2 * 32 * group, rel=0.1)
    groups = [(512, 1024), (256, 512, 1024, 2048)]
    few, many = (need([matryoshka(d_sae=4096, k=32, matryoshka=g)], d_model=2048) for g in groups)
    assert many - few >= 2 * 4096 * 2048 * 4


def test_a_window_has_no_more_rows_than_the_store() -> None:
    sae, config = [topk(d_sae=64, k=2)], TrainConfig(window=1000)
    few, many = (estimate(sae, config, 512, 1024, store_rows=n)["memory_bytes"] for n in (5_000, None))
    assert few < many / 10
    runs, _ = sweep.plan([([topk(d_sae=64, k=2), topk(d_sae=64, k=3)], config)], 512, budget=1e9, rows=5_000)
    assert [len(r.saes) for r in runs] == [2]


def test_a_ring_s_own_window_counts_in_the_plan() -> None:
    saes = [topk(d_sae=64, k=2)]
    usual, wide = (
        sweep.plan([(saes, TrainConfig())], 512, budget=1e12, window=w)[0][0].need for w in (None, 1000)
    )
    assert wide["memory_bytes"] > 5 * usual["memory_bytes"]


def test_a_run_says_what_memory_it_will_take_before_it_starts(capsys, monkeypatch) -> None:
    x, _ = planted(512)
    sae, config = topk(d_sae=64, k=3), TrainConfig(steps=2, batch_size=64)
    told = estimate([sae], config, 32, 64, tensor_rows=512)["memory_bytes"] / 2**30
    train(x, sae, config)
    err = capsys.readouterr().err
    assert err.splitlines()[0] == f"about {told:.2f} GiB of memory" and "warning" not in err
    monkeypatch.setattr(footprint, "free_memory", lambda: 2.0**20)
    train(x, sae, config)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == 1 and f"about {told:.2f} GiB are needed and 0.00 GiB are free" in warned[0]


def test_the_command_says_it_once_for_each_run(capsys, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, d=8)
    args = ["train", str(store.path), "--d-sae", "32", "--k", "2", "--steps", "2", "--batch-size", "16"]
    code, _, err = run(capsys, *args, "-w", str(tmp_path))
    assert code == 0 and err.count("GiB of memory") == 1


def test_what_is_above_the_budget_is_said_once(monkeypatch) -> None:
    """By the sweep, or, where not even all of the free memory is enough, by the run itself."""
    runs, budget = sweep.plan([([topk(d_sae=64, k=2)], TrainConfig())], 512, budget=1000.0)
    assert any("above" in line for line in sweep.before(runs, budget))
    monkeypatch.setattr(sweep, "free_memory", lambda: 2000.0)
    assert not sweep.before(runs, budget)


def test_free_memory_is_between_nothing_and_what_the_machine_has() -> None:
    there_is = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() <= there_is or free_memory() == float("inf")


def test_the_estimate_needs_no_torch() -> None:
    """A dry run, and what plans a sweep, must start at once."""
    code = "import sys, saes.footprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
