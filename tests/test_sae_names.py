"""Names of SAEs on the command line: which SAE a name means, what is said where it means several or none, `sae list`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from app.lookup import sae_folder
from cache.errors import MissingDataError, UsageError
from saes import SAE, TrainConfig, presets, train
from saes.config import SAEConfig
from tests.test_cli import run

SHORT = TrainConfig(steps=4, batch_size=16, log_every=2, screen="off")


def saved(workspace: Path, run_name: str, name: str, seed: int, age: int = 0) -> SAE:
    """An SAE in a run folder, `age` seconds old."""
    sae = SAE(SAEConfig(d_sae=16, k=2, d_model=8, hook="blocks.0.hook_resid_post"))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    folder = sae.save(workspace / "saes" / run_name / name)
    os.utime(folder / "cfg.json", (1e9 - age, 1e9 - age))
    return sae


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A run of eight SAEs, ten runs with an SAE of one name, and the newest: a run of one."""
    for i in range(8):
        saved(tmp_path, "sweep-1", f"{i}-topk-16-k{i + 2}", i, age=100 - i)
    for i in range(10):
        saved(tmp_path, f"seed-{i}", "0-topk-300-k8", 10 + i, age=50 - i)
    saved(tmp_path, "alone", "0-newest", 30)
    return tmp_path


def test_a_run_of_several_saes_is_not_taken_for_its_first_one(workspace: Path) -> None:
    with pytest.raises(UsageError) as e:
        sae_folder("sweep-1", workspace)
    said = str(e.value)
    assert "8 SAEs" in said and "sweep-1/0-topk-16-k2" in said and "sweep-1/4-topk-16-k6" in said
    assert "sweep-1/5" not in said and "and 3 more" in said and "run/sae" in said and "\n" not in said


def test_a_name_that_ten_runs_share_is_not_taken_for_one_of_them(capsys, workspace: Path) -> None:
    code, out, err = run(capsys, "sae", "check", "0-topk-300-k8", "-w", str(workspace))
    assert code in (2, 3) and not out and err.count("\n") == 1
    with pytest.raises(UsageError, match=r"10 SAEs.*and 5 more"):
        sae_folder("0-topk-300-k8", workspace)


def test_every_name_that_means_one_sae_finds_it(workspace: Path, monkeypatch) -> None:
    saes = workspace / "saes"
    third = saes / "sweep-1" / "3-topk-16-k5"
    sae_id = SAE.load(third).sae_id
    for name in ("sweep-1/3-topk-16-k5", "3-topk-16-k5", sae_id, sae_id[:6], str(third), f"{third}/"):
        assert sae_folder(name, workspace) == third, name
    assert sae_folder("seed-4/0-topk-300-k8", workspace) == saes / "seed-4" / "0-topk-300-k8"
    for name in ("latest", "alone", "0-newest", str(saes / "alone")):
        assert sae_folder(name, workspace) == saes / "alone" / "0-newest", name
    monkeypatch.chdir(workspace)
    assert sae_folder("saes/alone", Path(".")).resolve() == saes / "alone" / "0-newest"


def test_copies_of_one_sae_are_one_sae(workspace: Path) -> None:
    shutil.copytree(workspace / "saes" / "alone", workspace / "saes" / "copy")
    sae_id = SAE.load(workspace / "saes" / "copy" / "0-newest").sae_id
    assert SAE.load(sae_folder(sae_id, workspace)).sae_id == sae_id
    assert sae_folder("copy", workspace) == workspace / "saes" / "copy" / "0-newest"


def test_a_wrong_name_comes_with_the_few_nearest_ones_and_no_name_twice(workspace: Path) -> None:
    with pytest.raises(MissingDataError) as e:
        sae_folder("sweep-2", workspace)
    said = str(e.value)
    assert said.count("sweep-1") == 1 and said.count(",") <= 3 and "atomscope sae list" in said
    (workspace / "saes" / "cut-off").mkdir()
    (workspace / "saes" / "cut-off" / "run.json").write_text("{}")
    for name in ("cut-off", str(workspace / "saes" / "cut-off")):
        with pytest.raises(MissingDataError, match="run cut-off has no finished SAE"):
            sae_folder(name, workspace)
    with pytest.raises(MissingDataError, match=r"no SAE in the folder .*cfg\.json"):
        sae_folder(str(workspace / "saes"), Path("/nowhere"))


def test_a_run_folder_in_python_says_which_saes_are_in_it(workspace: Path) -> None:
    with pytest.raises(MissingDataError, match=r"0-topk-16-k2.*and 3 more") as e:
        SAE.load(workspace / "saes" / "sweep-1")
    assert "\n" not in str(e.value)
    with pytest.raises(MissingDataError, match=r"cfg\.json"):
        SAE.load(workspace / "saes")


def test_a_folder_of_several_saes_given_by_path_lists_their_paths(workspace: Path) -> None:
    with pytest.raises(UsageError) as e:
        sae_folder(str(workspace / "saes" / "sweep-1"), Path("/nowhere"))
    assert str(workspace / "saes" / "sweep-1" / "0-topk-16-k2") in str(e.value)


def test_convert_takes_the_names_that_check_takes(capsys, workspace: Path) -> None:
    out = workspace / "out"
    w = ["-w", str(workspace)]
    for i, name in enumerate(("latest", "alone", "sweep-1/3-topk-16-k5")):
        code, _, err = run(capsys, "sae", "convert", name, str(out / str(i)), *w)
        assert code == 0, err
        assert SAE.load(out / str(i)).sae_id == SAE.load(sae_folder(name, workspace)).sae_id
    code, _, err = run(capsys, "sae", "convert", "sweep-1", str(out / "x"), *w)
    assert code == 2 and "8 SAEs" in err and not (out / "x").exists()


def test_convert_finds_a_release_in_the_mirror_of_the_workspace_it_is_given(capsys, tmp_path: Path) -> None:
    sae = saved(tmp_path, "r", "0-a", 1)
    shutil.copytree(tmp_path / "saes" / "r" / "0-a", tmp_path / "saes-mirror" / "lab" / "first")
    shutil.rmtree(tmp_path / "saes")
    code, _, err = run(capsys, "sae", "convert", "lab:first", str(tmp_path / "out"), "-w", str(tmp_path))
    assert code == 0, err
    assert SAE.load(tmp_path / "out").sae_id == sae.sae_id
    assert not (tmp_path / "saes").exists()


def test_the_saes_of_a_workspace_are_listed_with_names_that_the_commands_take(capsys, tmp_path: Path) -> None:
    from saes import evaluate
    from tests.corpora import make_store

    store, _ = make_store(tmp_path, [40] * 20, d=8)
    configs = [presets.topk(d_sae=32, k=2), presets.topk(d_sae=32, k=4)]
    first, second = train(store, configs, SHORT)
    measured = evaluate(second.sae, store, max_tokens=0)
    w = ["-w", str(tmp_path)]
    code, out, _ = run(capsys, "sae", "list", *w, "--json")
    rows = {r["sae_id"]: r for r in json.loads(out)}
    assert code == 0 and set(rows) == {first.sae.sae_id, second.sae.sae_id}
    for result in (first, second):
        row = rows[result.sae.sae_id]
        assert (row["run"], row["sae"]) == (result.path.parent.name, result.path.name)
        assert row["status"] == "finished" and row["hook"] == store.hooks[0]
        for theirs, ours in (("train_fvu", "fvu"), ("train_l0", "l0"), ("n_dead", "n_dead")):
            assert row[theirs] == pytest.approx(result.metrics[-1][ours])
    assert not rows[first.sae.sae_id]["evaluated"] and rows[first.sae.sae_id]["heldout_fvu"] is None
    fvu = next(r["value"] for r in measured.rows if (r["subject"], r["metric"]) == ("sae", "fvu"))
    assert rows[second.sae.sae_id]["evaluated"] and rows[second.sae.sae_id]["heldout_fvu"] == fvu
    code, out, _ = run(capsys, "sae", "list", *w)
    lines = out.splitlines()
    for result in (first, second):
        (line,) = [x for x in lines if result.sae.sae_id in x]
        assert sae_folder(line.split()[0], tmp_path) == result.path


def test_a_run_that_was_stopped_is_listed_without_an_id(capsys, tmp_path: Path) -> None:
    results = train(
        torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), [presets.topk(d_sae=32, k=2)], SHORT,
        workspace=tmp_path,
    )  # fmt: skip
    (results[0].path / "cfg.json").unlink()
    code, out, _ = run(capsys, "sae", "list", "-w", str(tmp_path), "--json")
    assert code == 0 and json.loads(out)[0]["sae_id"] is None
    code, out, _ = run(capsys, "sae", "list", "-w", str(tmp_path))
    assert code == 0 and results[0].path.name in out


def test_a_workspace_without_saes_says_how_to_get_one(capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "sae", "list", "-w", str(tmp_path), "--json")
    assert code == 0 and json.loads(out) == []
    assert "atomscope train" in run(capsys, "sae", "list", "-w", str(tmp_path))[1]
