"""What a Weights & Biases run is sent, with a stand-in for the library: nothing leaves the machine in a test."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import UsageError
from saes import TrainConfig, presets, train

CONFIG = TrainConfig(steps=6, batch_size=16, log_every=2, screen="off")


class FakeRun:
    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.rows, self.exit_code = arguments, [], None

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def runs(monkeypatch) -> list[FakeRun]:
    made: list[FakeRun] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: made.append(FakeRun(**arguments)) or made[-1]  # type: ignore[attr-defined]
    fake.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return made


def rows() -> torch.Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def test_metrics_of_all_saes_reach_the_project_as_they_stand_in_the_results(runs, tmp_path: Path) -> None:
    saes = [presets.topk(d_sae=32, k=2), presets.topk(d_sae=32, k=4)]
    results = train(rows(), saes, CONFIG, workspace=tmp_path, wandb="lab")
    (run,) = runs
    assert run.arguments["project"] == "lab" and run.exit_code == 0
    assert run.arguments["id"] == results[0].path.parent.name and run.arguments["resume"] == "allow"
    assert run.arguments["config"]["train"]["steps"] == 6 and len(run.arguments["config"]["configs"]) == 2
    assert [step for step, _ in run.rows] == [2, 2, 4, 4, 6, 6]
    for i, result in enumerate(results):
        name = result.path.name
        sent = [v[f"{name}/fvu"] for _, v in run.rows[i::2]]
        assert sent == [row["fvu"] for row in result.metrics]


def test_nothing_is_sent_unless_a_project_is_named(runs) -> None:
    train(rows(), [presets.topk(d_sae=32, k=2)], CONFIG)
    assert not runs


def test_a_run_that_fails_is_marked_as_failed(runs) -> None:
    x = rows()
    with pytest.raises(Exception, match="not finite"):
        train(
            x * 1e30, [presets.topk(d_sae=32, k=2)], TrainConfig(steps=6, batch_size=16, lr=1e30), wandb="lab"
        )
    assert runs[0].exit_code == 1


def test_a_missing_library_is_one_line_with_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'atomscope\[wandb\]'"):
        train(rows(), [presets.topk(d_sae=32, k=2)], CONFIG, wandb="lab")


def test_a_missing_login_is_one_line_with_the_ways_out(runs, monkeypatch, tmp_path: Path) -> None:
    wandb = sys.modules["wandb"]

    def refuse(**_: Any) -> None:
        raise type("AuthenticationError", (wandb.Error,), {})("No API key\nconfigured.")  # type: ignore[name-defined]

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match=r"No API key configured.*wandb login.*WANDB_MODE=offline") as e:
        train(rows(), [presets.topk(d_sae=32, k=2)], CONFIG, workspace=tmp_path, wandb="lab")
    assert "\n" not in str(e.value)


def test_the_library_itself_without_a_login_is_one_line(monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from saes.wandb_log import wandb_log

    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal: it asks nothing
    with pytest.raises(UsageError, match="wandb login"), wandb_log("lab", "run", {"saes": ["0-a"]}):
        pass
