"""Sweeps: which SAEs and runs a grid stands for, how they are put together, and the command that trains them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from app import jobs, sweep
from cache.errors import UsageError
from saes import TrainConfig, presets, train
from tests.corpora import make_store
from tests.test_cli import run

JOB = {"saes": [{"preset": "topk", "d_sae": 64}], "train": {"steps": 4, "batch_size": 16, "screen": "off"}}


def test_a_grid_is_every_combination_and_names_say_what_varies() -> None:
    ((saes, schedule),) = sweep.expand(JOB | {"grid": {"k": [2, 4], "lr": [1e-3, "4e-4"]}})
    assert [(s.k, s.lr, s.label) for s in saes] == [
        (2, 1e-3, "topk-64-k2-lr0.001"), (2, 4e-4, "topk-64-k2-lr4e-4"),
        (4, 1e-3, "topk-64-k4-lr0.001"), (4, 4e-4, "topk-64-k4-lr4e-4"),
    ]  # fmt: skip
    assert schedule.steps == 4


def test_presets_and_widths_may_vary_and_keep_their_own_names() -> None:
    ((saes, _),) = sweep.expand(
        {"saes": [{"k": 3}], "grid": {"preset": ["topk", "abs_topk"], "d_sae": [32, 64]}}
    )
    assert [s.label for s in saes] == ["topk-32-k3", "topk-64-k3", "abs-topk-32-k3", "abs-topk-64-k3"]


def test_fields_of_the_run_make_runs_of_their_own() -> None:
    runs = sweep.expand(JOB | {"grid": {"train.seed": [0, 1, 2], "k": [2, 4]}})
    assert [(schedule.seed, [s.k for s in saes]) for saes, schedule in runs] == [
        (i, [2, 4]) for i in range(3)
    ]
    assert all(schedule.steps == 4 for _, schedule in runs)


def test_a_job_without_a_grid_is_one_run() -> None:
    job = {"saes": [{"d_sae": 64, "k": 2}]}
    assert sweep.expand(job) == [jobs.resolve(job)]


@pytest.mark.parametrize(
    "grid, words",
    [
        ({"k": 4}, "lists of values"), ([1], "lists of values"), ({"k": []}, "lists of values"),
        ({"kk": [1]}, "kk"), ({"train.speed": [1]}, "speed"), ({"d_sae": [32]}, "d_sae stands in saes and in grid"),
        ({"k": [2], "lr": [-1.0]}, "lr must be above 0"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_one_line_before_anything_is_trained(grid: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sweep.expand({"saes": [{"d_sae": 64}], "grid": grid})


def test_groups_stay_within_the_memory_and_lose_no_sae() -> None:
    ((saes, schedule),) = sweep.expand(JOB | {"grid": {"k": list(range(1, 8))}})
    whole = jobs.estimate(saes, schedule, 512, 1024)["memory_bytes"]
    one = jobs.estimate(saes[:1], schedule, 512, 1024)["memory_bytes"]
    budget = one + 2.5 * (whole - one) / 6
    runs, used = sweep.plan([(saes, schedule)], 512, budget=budget)
    assert used == budget and [s for run in runs for s in run.saes] == saes
    assert [len(run.saes) for run in runs] == [3, 3, 1]
    assert all(run.need["memory_bytes"] <= budget for run in runs)
    assert len(sweep.plan([(saes, schedule)], 512, budget=2 * whole)[0]) == 1


def test_what_fits_in_no_memory_runs_alone_with_a_warning() -> None:
    runs, budget = sweep.plan(sweep.expand(JOB | {"grid": {"k": [1, 2]}}), 512, budget=1000.0)
    assert [len(run.saes) for run in runs] == [1, 1]
    assert any("above" in line for line in sweep.before(runs, budget))


def test_the_command_trains_a_grid_in_groups_and_prints_every_sae(capsys, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, d=8)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"grid": {"k": [2, 4], "lr": [1e-3, 2e-3]}}))
    args = ["train", str(store.path), "--config", str(path), "-w", str(tmp_path), "--json"]
    code, out, _ = run(capsys, *args, "--dry-run")
    plan = json.loads(out)
    assert code == 0
    assert len(plan["saes"]) == 4 and plan["hook"] == store.hooks[0] and plan["estimate"]["memory_bytes"] > 0
    code, out, err = run(capsys, *args, "--memory-gb", "1e-6")
    rows = json.loads(out)
    assert code == 0 and "4 SAEs in 4 runs" in err
    assert [Path(r["path"]).name for r in rows] == [
        f"0-topk-64-k{k}-lr{lr}" for k in (2, 4) for lr in (0.001, 0.002)
    ]
    assert all(Path(r["path"]).is_dir() for r in rows)


def test_the_command_hands_the_metrics_to_weights_and_biases(capsys, monkeypatch, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, d=8)
    monkeypatch.setitem(sys.modules, "wandb", None)
    size = ["--d-sae", "32", "--k", "2", "--steps", "2", "--batch-size", "16"]
    code, _, err = run(capsys, "train", str(store.path), *size, "--wandb", "lab", "-w", str(tmp_path))
    assert code == 2 and "pip install 'atomscope[wandb]'" in err


def test_an_sae_trained_in_a_sweep_equals_the_one_trained_alone_with_its_learning_rate() -> None:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    run = TrainConfig(steps=12, batch_size=32, lr=5e-3, screen="off")
    together = train(x, [presets.topk(d_sae=32, k=2, lr=lr) for lr in (1e-3, 2e-2)], run)
    for lr, result in zip((1e-3, 2e-2), together, strict=True):
        alone = train(x, [presets.topk(d_sae=32, k=2)], TrainConfig(**(run.to_dict() | {"lr": lr})))[0]
        assert torch.equal(result.sae.W_dec, alone.sae.W_dec)
        assert [r["lr"] for r in result.metrics] == [r["lr"] for r in alone.metrics]
