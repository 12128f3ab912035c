"""Runs that meet trouble: tiny batches, the same run started twice, an SAE that diverges beside healthy ones."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.catalog import connect
from cache.errors import AtomscopeError, DataError
from cache.workspace import locked
from saes import training
from saes.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from saes.presets import PRESETS, topk
from saes.sources import TensorSource
from saes.train_config import TrainConfig
from saes.training import train
from tests.children import started
from tests.corpora import HOOK, OTHER, make_store
from tests.kills import killed_at
from tests.test_training import planted

RUN = TrainConfig(steps=40, batch_size=32, screen="off", log_every=5, warmup_steps=2, grad_clip=0)
GOOD, BAD = topk(d_sae=24, k=2, lr=1e-3, name="good"), topk(d_sae=24, k=2, lr=1e30, name="bad")


def record_of(workspace: Path) -> dict[str, Any]:
    (path,) = workspace.glob("saes/*/run.json")
    return json.loads(path.read_text())


def often(config: TrainConfig) -> TrainConfig:
    """With a checkpoint after every step."""
    return TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0}))


def test_a_run_with_batches_of_one_row_starts_at_once(monkeypatch) -> None:
    """The first rows are counted as they come, not all of them again with every batch."""
    x, _ = planted(400)
    monkeypatch.setattr(training, "SAMPLE_ROWS", 300)
    calls, real = [0], torch.Tensor.__len__

    def counted(self) -> int:
        calls[0] += 1
        return real(self)

    config = TrainConfig(batch_size=1)
    source = TensorSource(x)
    monkeypatch.setattr(torch.Tensor, "__len__", counted)
    rows = training._sample(source, config, torch.device("cpu"))
    assert calls[0] < 20 * 300  # every batch anew would be 300 * 300 / 2
    assert rows.x.shape == (300, x.shape[1])


_RUNNING = """
import sys
from cache import ActivationStore
from saes import TrainConfig, presets, train
store = ActivationStore.open(sys.argv[1])
config = TrainConfig(steps=200000, batch_size=32, screen="off", checkpoint_seconds=0.05)
train(store, [presets.topk(d_sae=24, k=2)], config)
"""


def test_a_run_started_twice_at_once_is_refused_and_kill_9_sets_it_free(tmp_path: Path) -> None:
    """That it then goes on from its checkpoint: test_kill_9_during_training... in test_training.py."""
    store, _ = make_store(tmp_path, [40] * 20)
    child = started(_RUNNING, store.path)
    try:
        while not list(tmp_path.glob("saes/*/run.json")):
            assert child.poll() is None, "the run ended before it began"
            threading.Event().wait(0.05)
        (record,) = tmp_path.glob("saes/*/run.json")
        before = record.read_bytes()
        with pytest.raises(AtomscopeError, match="being trained by another process"):
            train(store, [topk(d_sae=24, k=2)], TrainConfig(steps=200_000, batch_size=32, screen="off"))
        assert child.poll() is None and record.read_bytes() == before
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with locked(record.parent, exclusive=True) as alone:
        assert alone


def test_a_finished_run_is_returned_though_another_process_holds_its_folder(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    first = train(store, [GOOD], RUN)[0]
    assert first.path is not None
    with locked(first.path.parent, exclusive=True) as alone:
        assert alone
        assert train(store, [GOOD], RUN)[0].sae.sae_id == first.sae.sae_id


@pytest.mark.parametrize("bad_first", [False, True])
def test_one_diverging_sae_does_not_cost_the_others(bad_first: bool, tmp_path: Path, capsys) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    alone = train(store, [GOOD], RUN)[0]
    path = alone.path.parent / "run.json"  # type: ignore[union-attr]
    path.unlink()  # so that the record of the run of both is the only one
    job = [BAD, GOOD] if bad_first else [GOOD, BAD]
    at = job.index(BAD)
    results = train(store, job, RUN)
    good, bad = results[1 - at], results[at]
    for name, tensor in alone.sae.state_dict().items():
        assert torch.equal(tensor, good.sae.state_dict()[name])
    assert good.path is not None and (good.path / "cfg.json").is_file()
    assert bad.path is None and "SAE bad" in (bad.failed or "")
    with pytest.raises(DataError, match=r"not finite at step \d+ of SAE bad"):
        _ = bad.sae
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "SAE bad" in s]
    assert "goes on without it" in line and "at step" in line
    record = record_of(tmp_path)
    assert record["status"] == "finished"
    assert [f["sae"] for f in record["failed"]] == [f"{at}-bad"] and "not finite" in record["failed"][0][
        "why"
    ]
    again = train(store, job, RUN)
    assert again[at].failed == bad.failed and again[1 - at].sae.sae_id == good.sae.sae_id
    shown = connect(tmp_path).sql("SELECT sae, status, problem FROM runs ORDER BY sae").fetchall()
    assert {(s[2:], status) for s, status, _ in shown} == {("good", "finished"), ("bad", "failed")}
    assert "not finite" in shown[at][2] and shown[1 - at][2] == ""


def test_a_dropped_sae_stays_dropped_after_a_kill_and_the_others_go_on_exactly(
    tmp_path: Path, monkeypatch
) -> None:
    store, _ = make_store(tmp_path / "a", [40] * 20)
    other, _ = make_store(tmp_path / "b", [40] * 20)
    job = [GOOD, BAD, topk(d_sae=32, k=3, name="third")]
    whole = train(store, job, RUN)
    with killed_at(20, monkeypatch):
        train(other, job, often(RUN))
    running = record_of(tmp_path / "b")
    assert running["status"] == "running" and [f["sae"] for f in running["failed"]] == ["1-bad"]
    stepped = []
    step = training.Trainer.step
    monkeypatch.setattr(
        training.Trainer, "step", lambda self, *a: (stepped.append(self.cfg.label), step(self, *a))[1]
    )
    resumed = train(other, job, RUN)
    assert set(stepped) == {"good", "third"}
    for a, b in zip(whole, resumed, strict=True):
        assert (a.failed is None) == (b.failed is None)
        if a.failed is None:
            assert all(torch.equal(t, b.sae.state_dict()[n]) for n, t in a.sae.state_dict().items())
            assert [r["fvu"] for r in a.metrics] == [r["fvu"] for r in b.metrics]


@pytest.mark.parametrize("saes", [[BAD], [BAD, topk(d_sae=16, k=2, lr=1e30, name="worse")]])
def test_a_run_that_is_lost_says_failed_and_why_and_not_running(saes: list, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    with pytest.raises(DataError, match=r"not finite at step \d+ of SAE bad.*lower lr") as e:
        train(store, saes, RUN)
    record = record_of(tmp_path)
    assert record["status"] == "failed" and record["problem"] == str(e.value)
    assert len(record["failed"]) == len(saes)
    assert not list(tmp_path.glob("saes/*/*/cfg.json"))


def test_a_run_that_breaks_for_another_reason_is_failed_and_goes_on_later(
    tmp_path: Path, monkeypatch
) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    real = training.Trainer.step

    def broken(self, x, step, *more):
        if step == 20:
            raise RuntimeError("out of\nmemory")
        return real(self, x, step, *more)

    monkeypatch.setattr(training.Trainer, "step", broken)
    with pytest.raises(RuntimeError):
        train(store, [GOOD], often(RUN))
    record = record_of(tmp_path)
    assert record["status"] == "failed" and record["problem"] == "RuntimeError: out of memory"
    monkeypatch.setattr(training.Trainer, "step", real)
    assert train(store, [GOOD], RUN)[0].metrics[-1]["step"] == 40
    assert "problem" not in record_of(tmp_path)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"fast"}))
def test_weights_that_are_nan_are_found_whatever_the_activation(preset: str, monkeypatch) -> None:
    """A step on NaN weights must reach the next logged step, or the one bad SAE would end the run of all."""
    x, _ = planted(600)
    real = training.Trainer.step

    def poisoned(self, x, step, *more):
        if step == 7 and self.cfg.label == "bad":
            with torch.no_grad():
                self.sae.W_enc.fill_(float("nan"))
                self.sae.W_dec.fill_(float("nan"))
        return real(self, x, step, *more)

    monkeypatch.setattr(training.Trainer, "step", poisoned)
    needs = {"k": 3} if preset in ("topk", "abs_topk", "batch_topk", "batch_abs_topk", "matryoshka") else {}
    bad = PRESETS[preset](d_sae=48, name="bad", **needs)
    good, lost = train(x, [GOOD, bad], TrainConfig(steps=20, batch_size=32, screen="off", log_every=5))
    assert lost.failed is not None and good.metrics[-1]["step"] == 20


def poison(monkeypatch, at: int, name: str) -> None:
    """NaN in a weight of the SAE `name` before step `at` (1-based)."""
    real = training.Trainer.step

    def poisoned(self, x, step, *more):
        if step + 1 == at and self.cfg.label == name:
            with torch.no_grad():
                self.sae.W_enc[0, 0] = float("nan")
        return real(self, x, step, *more)

    monkeypatch.setattr(training.Trainer, "step", poisoned)


def checkpoint_at(monkeypatch, step: int) -> None:
    """One checkpoint, after `step` steps (of a run whose checkpoint_seconds are below 0)."""
    real = training._save

    def save(group, stream, run, log, done):
        if done == step:
            real(group, stream, run, log, done)

    monkeypatch.setattr(training, "_save", save)


@pytest.mark.parametrize("at, logged", [(4, 5), (5, 5), (6, 10), (33, 35)])
def test_the_first_step_that_went_wrong_is_named_and_not_the_logged_one(
    at: int, logged: int, tmp_path: Path, monkeypatch
) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    poison(monkeypatch, at, "good")
    with pytest.raises(DataError, match=f"not finite at step {at} of SAE good") as e:
        train(store, [GOOD], RUN)
    assert (f"(noticed at step {logged})" in str(e.value)) == (at != logged)
    assert "no checkpoint was written before" in str(e.value)
    (failed,) = record_of(tmp_path)["failed"]
    assert failed["step"] == at and failed["last_good"] is None


@pytest.mark.parametrize("together", [False, True])
def test_the_last_good_checkpoint_is_named_of_one_sae_and_beside_others(
    together: bool, tmp_path: Path, monkeypatch, capsys
) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    poison(monkeypatch, 23, "second")
    checkpoint_at(monkeypatch, 17)
    second = topk(d_sae=16, k=2, name="second")
    if together:
        lost = train(store, [GOOD, second], often(RUN))[1]
        said, why = capsys.readouterr().err, lost.failed or ""
    else:
        with pytest.raises(DataError) as e:
            train(store, [second], often(RUN))
        said = why = str(e.value)
    (run,) = (p.parent for p in tmp_path.glob("saes/*/run.json"))
    words = "at step 23 of SAE second (noticed at step 25): lower lr"
    assert words in why and "last good checkpoint: step 17" in why
    assert f"last good checkpoint: step 17 in {run}" in said
    assert record_of(tmp_path)["failed"][0]["last_good"] == 17


def test_a_step_that_went_wrong_after_a_resume_is_counted_from_the_start(tmp_path: Path, monkeypatch) -> None:
    """The checkpoint falls between two logged steps."""
    store, _ = make_store(tmp_path, [40] * 20)
    checkpoint_at(monkeypatch, 17)
    poison(monkeypatch, 19, "good")
    with pytest.raises(DataError, match="at step 19 of"):
        train(store, [GOOD], often(RUN))
    with pytest.raises(
        DataError, match=r"at step 19 of SAE good \(noticed at step 20\).*checkpoint: step 17"
    ):
        train(store, [GOOD], RUN)


def test_a_checkpoint_never_holds_a_weight_that_is_not_finite(tmp_path: Path, monkeypatch) -> None:
    """An optimiser step may break the weights after a loss that was fine: the next loss would show it, too late."""
    store, _ = make_store(tmp_path, [40] * 20)
    real = training.Trainer.step

    def broken(self, x, step, *more):
        real(self, x, step, *more)
        if step + 1 == 12:
            with torch.no_grad():
                self.sae.b_enc[3] = float("inf")

    monkeypatch.setattr(training.Trainer, "step", broken)
    with pytest.raises(
        DataError, match=r"a weight is not finite at step 12 of SAE good.*checkpoint: step 11"
    ):
        train(store, [GOOD], often(RUN))


def test_a_checkpoint_holds_every_tensor_though_two_are_one_in_memory(tmp_path: Path) -> None:
    """As the roots of two SAEs in the same whitened space may be, and the first rows of a longer tensor."""
    x = torch.arange(12.0).view(3, 4)
    saes = [({"root": x, "first": x[:2]}, {}), ({"root": x, "turned": x.T}, {})]
    save_checkpoint(tmp_path, Checkpoint(5, {"epoch": 1}, saes))
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 5
    for (tensors, _), (wanted, _) in zip(found.saes, saes, strict=True):
        assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[n], t) for n, t in wanted.items())


def test_a_config_made_for_another_hook_is_refused_by_name(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    with pytest.raises(DataError, match=f"{OTHER}.*{HOOK}"):
        train(store, [topk(d_sae=24, k=2, hook=OTHER)], RUN)
    saved = train(store, [GOOD], RUN)[0].sae.cfg
    assert saved.hook == HOOK
    assert train(store, [saved], RUN)[0].sae.cfg.hook == HOOK
    x, _ = planted(200, d=saved.d_model)
    assert train(x, [saved], RUN)[0].metrics[-1]["step"] == 40
