"""The TopK SAE that `evaluate_atoms` trains beside an SAE: matched in L0, width and schedule, trained once, resumable."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from app.lookup import sae_folder
from cache.errors import DataError, UsageError
from saes import topk_control as module
from saes import training
from saes.atoms import evaluate_atoms
from saes.config import SAEConfig
from saes.presets import batch_topk, threshold_atoms, topk
from saes.sae import SAE
from saes.synthetic import make_suite
from saes.topk_control import DEFAULT, matched_topk
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import HOOK, empty_store, fill, make_corpus
from tests.test_cli import run

SCHEDULE = TrainConfig(steps=60, batch_size=128, lr=1e-2, warmup_steps=5, screen="off", log_every=20, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Any, SAE]:
    """S9 rows in a store, and atoms trained on it."""
    root = tmp_path_factory.mktemp("matched")
    corpus = make_corpus(root, [60] * 60)
    store = empty_store(root, corpus, rows_per_shard=1000)
    fill(store, {HOOK: make_suite("S9", 0, n_rows=corpus.n_tokens, n=48, d=16).x})
    atoms = threshold_atoms(d_sae=40, l0=0.02, bandwidth=0.2, threshold_init=1.0)
    return store, train(store, atoms, SCHEDULE)[0].sae


def controls(store: Any) -> list[Path]:
    return sorted(store.workspace.glob("saes/control-*"))


def test_the_control_has_the_l0_width_and_schedule_of_the_atoms_and_is_trained_once(
    made, capsys, monkeypatch
):
    store, sae = made
    found = matched_topk(sae, store)
    x = store.rows(HOOK, where="split = 0 AND pos > 0")
    l0 = float(sae.encode(x).l0().float().mean())
    assert found is not None and found.l0 == pytest.approx(l0) and abs(found.k - l0) <= 0.5
    assert found.sae.cfg.activation == "topk" and found.sae.cfg.d_sae == 40
    assert found.sae.encode(x).l0().float().mean() <= found.k
    (folder,) = controls(store)
    record = json.loads((folder / "run.json").read_text())
    assert folder.name.startswith(f"control-topk-40-k{found.k}-") and record["status"] == "finished"
    assert TrainConfig.from_dict(record["train"]) == SCHEDULE and record["data"]["hook"] == HOOK
    said = capsys.readouterr().err
    assert f"k {found.k} for a mean L0" in said and "60 steps of 128 rows (7,680 in all)" in said
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained a second time"))
    again = matched_topk(sae, store)
    assert again is not None and again.sae.sae_id == found.sae.sae_id
    assert "there already" in capsys.readouterr().err and len(controls(store)) == 1


def test_the_control_learns_at_the_rate_that_the_sae_has_of_its_own(made, monkeypatch) -> None:
    store, sae = made
    run_folder = next(iter(store.workspace.glob("saes/*/run.json"))).parent
    asked: list[SAEConfig] = []

    def stop(_: Any, cfg: SAEConfig, *__: Any, **___: Any) -> None:
        asked.append(cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    own = SAEConfig.from_dict(sae.cfg.to_dict() | {"lr": 3e-3})
    monkeypatch.setattr(module, "_own_run", lambda *_: module._OwnRun(run_folder, own, SCHEDULE))
    with pytest.raises(KeyboardInterrupt):
        matched_topk(sae, store)
    assert [cfg.lr for cfg in asked] == [3e-3]


@pytest.mark.parametrize("name", ["topk-3", "sae", "random"])
def test_an_sae_put_beside_under_the_name_of_a_control_is_refused_not_replaced(
    made, monkeypatch, name: str
) -> None:
    store, sae = made
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained before it was refused"))
    with pytest.raises(UsageError, match=name):
        evaluate_atoms(sae, store, beside={name: sae}, topk=True)


def test_the_command_shows_it_among_the_controls_and_latest_stays_the_atoms(made, capsys) -> None:
    store, sae = made
    args = ["atoms", "latest", "--recovery", "0", "-w", str(store.workspace)]
    code, out, _ = run(capsys, *args, "--json")
    rows = json.loads(out)
    (k,) = {int(r["subject"].rpartition("-")[2]) for r in rows if r["subject"].startswith("atoms:topk-")}
    l0 = {r["subject"]: r["value"] for r in rows if r["metric"] == "l0"}
    assert code == 0 and {r["sae_id"] for r in rows} == {sae.sae_id}
    assert 0 < l0[f"atoms:topk-{k}"] <= k and abs(l0["atoms:sae"] - k) < 2
    code, out, _ = run(capsys, *args)
    (line,) = [s for s in out.splitlines() if s.startswith("TopK, k ")]
    assert code == 0 and line.startswith(f"TopK, k {k} ") and f"{l0[f'atoms:topk-{k}']:.1f}" in line
    lines = out.splitlines()
    assert lines.index(line) > next(i for i, s in enumerate(lines) if s.startswith("SAE"))
    assert sae_folder("latest", store.workspace).name == "0-threshold-atoms-40"
    assert "control-topk" in str(sae_folder(controls(store)[0].name, store.workspace))


def test_without_it_nothing_is_trained(made, capsys, monkeypatch, tmp_path: Path) -> None:
    store, sae = made
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr("saes.evaluation.evaluation_path", lambda *_: tmp_path / "fresh.parquet")
    args = ["atoms", sae.sae_id, "latest", "--recovery", "0", "-w", str(store.workspace)]
    code, out, err = run(capsys, *args, "--no-topk")
    assert code == 0 and "TopK, k" not in out and "TopK control" not in err
    assert not any("topk" in r["subject"] for r in evaluate_atoms(sae, store, recovery=0).rows)


def test_an_interrupted_control_goes_on_where_it_was(made, monkeypatch, capsys) -> None:
    """That kill -9 costs no more than the steps since the last checkpoint: test_training.py."""
    store, sae = made
    first = matched_topk(sae, store)
    assert first is not None
    (folder,) = controls(store)
    aside = folder.with_name(f"aside-{folder.name}")
    folder.rename(aside)
    real, calls = training._log, []

    def log(*args: Any) -> None:
        real(*args)
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(1)

    monkeypatch.setattr(training, "_log", log)
    with pytest.raises(KeyboardInterrupt):
        matched_topk(sae, store)
    capsys.readouterr()
    second = matched_topk(sae, store)
    assert second is not None and second.sae.sae_id == first.sae.sae_id
    assert "going on at step 20 of 60 steps" in capsys.readouterr().err


def test_a_plain_topk_sae_needs_no_control_and_other_ks_do(made, capsys) -> None:
    store, _ = made
    plain, batch = (r.sae for r in train(store, [topk(d_sae=24, k=3), batch_topk(d_sae=24, k=3)], SCHEDULE))
    assert matched_topk(plain, store) is None
    assert "plain TopK SAE itself" in capsys.readouterr().err
    found = matched_topk(batch, store)
    assert found is not None and found.k == 3


def test_an_sae_from_elsewhere_is_matched_by_the_default_schedule(made, monkeypatch, capsys) -> None:
    store, sae = made
    other = SAE(SAEConfig(d_sae=40, d_model=16, activation="jumprelu", hook=HOOK))
    other.load_state_dict(sae.state_dict())
    with torch.no_grad():
        other.threshold.fill_(1e9)  # nothing fires
    asked: list[TrainConfig] = []

    class Stop(Exception):
        pass

    def stop(_: Any, __: Any, schedule: TrainConfig, **___: Any) -> None:
        asked.append(schedule)
        raise Stop

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(Stop):
        matched_topk(other, store)
    said = capsys.readouterr().err
    assert asked == [DEFAULT] and "k 1 for a mean L0 of 0.0" in said and "1,500 steps of 2,048 rows" in said
    assert "default schedule" in said


def test_a_control_that_diverges_says_how_to_do_without_it(made, monkeypatch) -> None:
    store, sae = made
    broken = TrainConfig(**(SCHEDULE.to_dict() | {"lr": 1e30, "grad_clip": 0.0, "seed": 9}))
    run_folder = next(iter(store.workspace.glob("saes/*/run.json"))).parent
    found = module._OwnRun(run_folder, sae.cfg, broken)
    monkeypatch.setattr(module, "_own_run", lambda *_: found)
    with pytest.raises(DataError, match="--no-topk"):
        matched_topk(sae, store)


def test_a_transcoder_has_no_topk_control(made) -> None:
    with pytest.raises(UsageError, match="transcoder"):
        matched_topk(SAE(SAEConfig(d_sae=8, k=2, d_model=16, d_out=4, out_hook="mlp", hook=HOOK)), made[0])
