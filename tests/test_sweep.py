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
from saes.footprint import estimate
from saes.runs import LATER
from saes.started import started_groups
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
    whole = estimate(saes, schedule, 512, 1024)["memory_bytes"]
    one = estimate(saes[:1], schedule, 512, 1024)["memory_bytes"]
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


# ---- trouble in a sweep ----


def command(capsys, tmp_path: Path, job: dict, *more: str) -> tuple[int, list[dict], str]:
    """Exit code, printed SAEs and stderr of `atomscope train` on a job file, in a workspace with one store."""
    store, _ = make_store(tmp_path, d=8)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    code, out, err = run(
        capsys, "train", str(store.path), "--config", str(path), "-w", str(tmp_path), "--json", *more
    )
    return code, json.loads(out or "[]"), err


def folders(tmp_path: Path) -> dict[str, int]:
    """Runs of a workspace, and when their records were last written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("saes/*/run.json")}


@pytest.mark.parametrize("memory", [[], ["--memory-gb", "1e-6"]])
def test_a_diverging_sae_of_a_sweep_costs_none_of_the_others(capsys, tmp_path: Path, memory: list) -> None:
    """Together (no --memory-gb) and one in each run; the command ends with 1 and names it, again and again."""
    train = JOB["train"] | {"steps": 12, "log_every": 2, "grad_clip": 0, "warmup_steps": 0}
    job = JOB | {"train": train, "grid": {"lr": [1e30, 1e-3], "k": [2, 4]}}
    for _ in range(2):
        code, rows, err = command(capsys, tmp_path, job, *memory)
        assert code == 1
        assert sorted(Path(r["path"]).name[2:] for r in rows) == ["topk-64-k2-lr0.001", "topk-64-k4-lr0.001"]
        assert all((Path(r["path"]) / "cfg.json").is_file() for r in rows)
        last = err.strip().splitlines()[-1]
        assert "2 of 4 SAEs failed" in last and "topk-64-k2-lr1e-30" in last and "topk-64-k4-lr1e-30" in last


def test_one_sae_that_diverges_alone_ends_the_command_with_its_step(capsys, tmp_path: Path) -> None:
    job = JOB | {"saes": [{"d_sae": 64, "k": 2}], "train": JOB["train"] | {"lr": 1e30, "grad_clip": 0}}
    code, _, err = command(capsys, tmp_path, job)
    assert code == 1 and "not finite at step 2 of SAE topk-64-k2 (noticed at step 4)" in err.splitlines()[-1]


def test_the_same_sweep_keeps_its_runs_whatever_memory_is_free(capsys, tmp_path: Path, monkeypatch) -> None:
    job = JOB | {"grid": {"k": [1, 2, 3, 4]}}
    saes, schedule = sweep.expand(job)[0]
    rows = make_store(tmp_path, d=8)[0].corpus.n_tokens
    three = estimate(saes[:3], schedule, 8, 16, store_rows=rows)["memory_bytes"]
    monkeypatch.setattr(sweep, "free_memory", lambda: three * 1.0000001 / sweep.SHARE)
    assert command(capsys, tmp_path, job)[0] == 0
    before = folders(tmp_path)
    assert sorted(name.split("-and-")[-1][:1] for name in before) == ["2", "t"]  # three together, one alone
    for free in (1.0, float("inf")):
        monkeypatch.setattr(sweep, "free_memory", lambda free=free: free)
        code, rows, _ = command(capsys, tmp_path, job)
        assert code == 0 and folders(tmp_path) == before
        assert [Path(r["path"]).name for r in rows] == [f"{i}-topk-64-k{i + 1}" for i in range(3)] + [
            "0-topk-64-k4"
        ]


def test_saes_that_no_run_has_begun_are_grouped_by_the_memory_of_now(capsys, tmp_path: Path) -> None:
    """A sweep that grew, and one whose second run never started: what is there is kept, the rest is put together anew."""
    assert command(capsys, tmp_path, JOB | {"grid": {"k": [2, 3]}}, "--memory-gb", "1e-6")[0] == 0
    before = folders(tmp_path)
    assert len(before) == 2
    more = JOB | {"grid": {"k": [1, 2, 3, 4]}}
    code, rows, err = command(capsys, tmp_path, more)
    assert code == 0 and "4 SAEs in 3 runs of 2 + 1 + 1" in err
    after = folders(tmp_path)
    assert {n: t for n, t in after.items() if n in before} == before and len(after) == 3
    assert [Path(r["path"]).name for r in rows] == [
        "0-topk-64-k1", "1-topk-64-k4", "0-topk-64-k2", "0-topk-64-k3",
    ]  # fmt: skip


def test_memory_asked_for_regroups_a_run_that_has_kept_nothing_yet(tmp_path: Path) -> None:
    """Killed before its first checkpoint (by the system, for want of memory): a smaller --memory-gb must help."""
    store, _ = make_store(tmp_path, d=8)
    saes, schedule = sweep.expand(JOB | {"grid": {"k": [2, 4]}})[0]
    done = train(store, saes, schedule)
    record = done[0].path.parent / "run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "running"'))
    assert started_groups(store, saes, schedule) == [[0, 1]]
    assert started_groups(store, saes, schedule, worth=True) == []
    assert started_groups(store, saes, TrainConfig(**(schedule.to_dict() | {"seed": 1}))) == []
    assert started_groups(store, saes, schedule, warm_start=done[0].path) == []


def test_a_sweep_begun_before_a_field_existed_is_found_again(tmp_path: Path) -> None:
    """Its SAEs would be put together by the memory of now, and trained again in other folders."""
    store, _ = make_store(tmp_path, d=8)
    saes, schedule = sweep.expand(JOB | {"grid": {"k": [2, 4]}})[0]
    path = train(store, saes, schedule)[0].path.parent / "run.json"
    record = json.loads(path.read_text())
    for fields in (record["train"], *record["configs"]):
        for later in LATER:
            fields.pop(later, None)
    path.write_text(json.dumps(record))
    assert started_groups(store, saes, schedule) == [[0, 1]]
    now = TrainConfig(**(schedule.to_dict() | {"lr_schedule": "cosine"}))
    assert started_groups(store, saes, now) == [], "another schedule is another run"
    tied = [presets.gba(d_sae=64, gba_b_dec=rule) for rule in ("fixed", "trained")]
    record["configs"] = [{k: v for k, v in c.to_dict().items() if k not in LATER} for c in tied[:1]]
    path.write_text(json.dumps(record))
    assert started_groups(store, tied[1:], schedule) == [], "the field's other value is another SAE"


def test_warm_start_from_latest_says_what_it_is_and_is_the_same_for_every_run(capsys, tmp_path: Path) -> None:
    one = JOB | {"saes": [{"d_sae": 64, "k": 2}]}
    first = command(capsys, tmp_path, one)[1][0]
    job = one | {"grid": {"lr": [1e-3, 2e-3]}}
    code, _, err = command(capsys, tmp_path, job, "--memory-gb", "1e-6", "--warm-start", "latest")
    assert code == 0 and first["path"] in err and f"--warm-start {first['sae_id']}" in err
    warm = [json.loads(p.read_text()).get("warm_start") for p in tmp_path.glob("saes/*/run.json")]
    assert [w[0]["sae_id"] for w in warm if w] == [first["sae_id"]] * 2
    before = folders(tmp_path)
    code, _, err = command(capsys, tmp_path, job, "--memory-gb", "1e-6", "--warm-start", first["sae_id"])
    assert code == 0 and folders(tmp_path) == before


@pytest.mark.parametrize(
    "job, words",
    [
        ({"grid": {"lr": [1e-3], "train.lr": [1e-3, 2e-3]}}, "own lr hides train.lr"),
        ({"saes": [{"d_sae": 64, "k": 2, "lr": 1e-3}], "grid": {"train.lr": [1e-3, 2e-3]}}, "own lr hides"),
        ({"saes": [{"preset": "jumprelu", "d_sae": 64}], "grid": {"train.beta1": [0.0, 0.9]}}, "own beta1 hides"),
        ({"grid": {"k": [4, 4]}}, "grid names k 4 twice"),
        ({"grid": {"k": [2], "lr": [1e-3, "1e-3"]}}, "grid names lr 1e-3 twice"),
        ({"grid": {"k": [2], "train.seed": [0, 1, 0.0]}}, "grid names train.seed 0.0 twice"),
    ],
)  # fmt: skip
def test_a_grid_that_would_train_an_sae_twice_is_refused(job: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sweep.expand(JOB | job)


@pytest.mark.parametrize("memory", ["0", "-1", "nan"])
def test_memory_of_nothing_is_refused_in_one_line(capsys, tmp_path: Path, memory: str) -> None:
    code, _, err = command(capsys, tmp_path, JOB | {"grid": {"k": [2]}}, "--memory-gb", memory, "--dry-run")
    assert code == 2 and "--memory-gb must be above 0" in err and len(err.strip().splitlines()) == 1
