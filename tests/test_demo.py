"""The demo's pipeline on the tiny model: killed anywhere it goes on, a second run has nothing to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from app.demo import DemoConfig, run_demo, summary_lines
from cache.workspace import read_json
from saes import FeatureIndex
from tests.tiny import SENTENCES

ROOT = Path(__file__).resolve().parent.parent
_RUN = """
import json, sys
from pathlib import Path
from app.demo import DemoConfig, run_demo
run_demo(Path(sys.argv[1]), DemoConfig(**json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def job(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    text = tmp_path_factory.mktemp("text") / "sentences.txt"
    text.write_text("\n\n".join(SENTENCES * 3), encoding="utf-8")
    return {
        "model": str(tiny_dir), "corpus": str(text), "max_tokens": 6000, "context": 64, "eval_tokens": 400,
        "hook": "blocks.1.hook_resid_post", "d_sae": 64, "k": 4, "steps": 1500, "batch_size": 128,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(job: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspace of an uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    child = start(root, job)
    child.communicate()
    assert child.returncode == 0
    return root


def start(root: Path, job: dict) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (root / "_tmp").mkdir(exist_ok=True)
    args = [sys.executable, "-c", _RUN, str(root), json.dumps(job)]
    return subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_at(root: Path, job: dict, stage: str) -> None:
    """Run until the demo prints the stage's heading, then SIGKILL a moment later."""
    child = start(root, job)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(f"== {stage}"):
            break
    else:
        raise AssertionError(f"the demo ended before {stage}")
    threading.Event().wait(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()


def test_killed_in_every_stage_the_demo_still_ends_with_the_same_sae(
    whole: Path, job: dict, tmp_path: Path
) -> None:
    for stage in ("model", "corpus", "harvest", "train", "evaluate", "index"):
        kill_at(tmp_path, job, stage)
        assert (
            not read_json(tmp_path / "demo.json")["finished"] if (tmp_path / "demo.json").is_file() else True
        )
    child = start(tmp_path, job)
    child.communicate()
    assert child.returncode == 0
    a, b = read_json(whole / "demo.json"), read_json(tmp_path / "demo.json")
    assert b["finished"] and a["store"] == b["store"] and a["sae"] == b["sae"]
    one, two = (load_file(r / d["sae"] / "sae_weights.safetensors") for r, d in ((whole, a), (tmp_path, b)))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-5)
    x, y = FeatureIndex.open(whole), FeatureIndex.open(tmp_path)
    assert abs(x.list_features()[1] - y.list_features()[1]) <= 2


def test_a_second_run_loads_no_model(whole: Path, job: dict, monkeypatch) -> None:
    monkeypatch.setattr("cache.models.load_model", lambda *_, **__: pytest.fail("loaded the model again"))
    record = run_demo(whole, DemoConfig(**job))
    assert record["finished"]


def test_the_summary_tells_shares_floors_and_controls(whole: Path, job: dict) -> None:
    record = read_json(whole / "demo.json")
    text = "\n".join(summary_lines(record))
    assert sum(s["seconds"] for s in record["stages"].values()) > 0
    for words in ("bare forward", "encoder GEMM", "held-out FVU", "pca-4", "untrained", "delta CE"):
        assert words in text


def test_another_config_starts_another_summary(whole: Path, job: dict) -> None:
    from app.demo import Summary

    assert not Summary(whole, DemoConfig(**(job | {"k": 5}))).record["finished"]
    assert Summary(whole, DemoConfig(**job)).record["finished"]
