"""gc: what dead processes left goes, what is committed or being written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cache.cleaning import collect_garbage
from cache.records import record_path
from cache.ring_filler import take_lock
from cache.workspace import atomic_dir, atomic_file, locked, write_json, write_new_json
from tests.corpora import HOOK, OTHER, make_store
from tests.test_cli import run

ROOT = Path(__file__).resolve().parent.parent


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def age(path: Path, hours: float) -> None:
    """Make a file, or a folder with all in it, look as if last written hours ago."""
    for p in [*path.rglob("*"), path]:
        os.utime(p)  # now, by the file system's own account
        when = p.stat().st_mtime - hours * 3600
        os.utime(p, (when, when))


def names(workspace: Path, *, older_than: float = 3600.0, delete: bool = False) -> list[str]:
    return sorted(g.path.name for g in collect_garbage(workspace, older_than=older_than, delete=delete))


def test_orphans_go_and_committed_shards_stay(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, hooks=(HOOK, OTHER))
    before = snapshot(tmp_path)
    orphan = store.folder(HOOK) / "shard-00001-0123abcd.parquet"
    orphan.write_bytes(b"x" * 1000)
    fresh = store.folder(OTHER) / "shard-00002-0123abcd.parquet"
    fresh.write_bytes(b"y")
    age(orphan, 2)
    assert names(tmp_path) == [orphan.name] and orphan.exists()
    found = collect_garbage(tmp_path, delete=True)
    assert [(g.bytes, g.why) for g in found] == [(1000, "a shard that was never committed")]
    assert fresh.exists() and not orphan.exists()
    fresh.unlink()
    assert snapshot(tmp_path) == before and store.verify() == [] and names(tmp_path, older_than=0) == []


def test_the_data_of_a_shard_with_a_damaged_record_is_kept(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    record_path(store.folder(HOOK), 2).write_text("{")
    age(store.path, 100)
    assert names(tmp_path, older_than=0) == []


def test_nothing_is_collected_in_a_folder_that_someone_writes_into(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    orphan = store.folder(HOOK) / "shard-00001-0123abcd.parquet"
    orphan.write_bytes(b"x")
    age(store.path, 100)
    with locked(store.folder(HOOK)):
        assert names(tmp_path, older_than=0, delete=True) == [] and orphan.exists()
    assert names(tmp_path, older_than=0, delete=True) == [orphan.name] and not orphan.exists()


_WRITER = """
import sys, time
from pathlib import Path
from cache.workspace import atomic_dir, atomic_file

root = Path(sys.argv[1])
with atomic_file(root / "a.parquet") as a, atomic_dir(root / "folder") as b:
    a.write_bytes(b"half"), (b / "part").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_half_written_files_of_a_living_writer_stay_and_those_of_a_dead_one_go(tmp_path: Path) -> None:
    (tmp_path / "_tmp").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    entries = sorted((tmp_path / "_tmp").iterdir())
    for entry in entries:
        age(entry, 1000)  # a slow writer: nothing written for weeks, and still at it
    assert len(entries) == 2 and names(tmp_path, delete=True) == []
    assert all(e.exists() for e in entries)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert names(tmp_path) == [e.name for e in entries]
    assert sum(g.bytes for g in collect_garbage(tmp_path)) == 8
    for entry in entries:
        age(entry, 0.5)
    assert names(tmp_path) == []  # dead, but younger than an hour
    assert len(names(tmp_path, older_than=60, delete=True)) == 2
    assert list((tmp_path / "_tmp").iterdir()) == []


def test_tmp_files_of_other_programs_go_by_age(tmp_path: Path) -> None:
    spill = tmp_path / "_tmp" / "duckdb_temp_storage-0.tmp"
    spill.parent.mkdir()
    spill.write_bytes(b"z")
    assert names(tmp_path) == []
    age(spill, 2)
    assert names(tmp_path, delete=True) == [spill.name] and not spill.exists()


def test_gc_lists_with_dry_run_and_deletes_without(capsys, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    orphan = store.folder(HOOK) / "shard-00000-ffffffff.parquet"
    orphan.write_bytes(b"x" * 10)
    for run_name, status in (("old", "finished"), ("new", "running")):
        write_json(tmp_path / "saes" / run_name / "run.json", {"status": status})
        (tmp_path / "saes" / run_name / "checkpoints" / "step-1").mkdir(parents=True)
        (tmp_path / "saes" / run_name / "checkpoints" / "step-1" / "state.safetensors").write_bytes(b"12345")
    age(tmp_path, 3)
    before = snapshot(tmp_path)
    code, out, _ = run(capsys, "store", "gc", "--dry-run", "-w", str(tmp_path))
    assert code == 0 and "2 items" in out and "would be deleted" in out and orphan.name in out
    assert "saes/old/checkpoints" in out and "saes/new" not in out
    assert snapshot(tmp_path) == before
    code, out, _ = run(capsys, "store", "gc", "-w", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0 and found["bytes"] == 15 and found["deleted"] and len(found["items"]) == 2
    gone = {k for k in before if k not in snapshot(tmp_path)}
    assert gone == {
        str(orphan.relative_to(tmp_path)),
        "saes/old/checkpoints/step-1/state.safetensors",
    }
    code, out, _ = run(capsys, "store", "gc", "-w", str(tmp_path), "--older-than", "0")
    assert "0 items" in out


# ------------------------------------------------------------------------------------- the ways into a workspace


def test_a_write_that_fails_leaves_the_old_file_and_nothing_in_tmp(tmp_path: Path) -> None:
    (tmp_path / "_tmp").mkdir()
    write_json(tmp_path / "a.json", 1)
    with atomic_dir(tmp_path / "d") as tmp:
        (tmp / "old").write_text("old")
    with pytest.raises(ValueError), atomic_file(tmp_path / "a.json") as tmp:
        tmp.write_text("half")
        raise ValueError
    with pytest.raises(ValueError), atomic_dir(tmp_path / "d") as tmp:
        (tmp / "new").write_text("half")
        raise ValueError
    assert snapshot(tmp_path) == {"a.json": b"1\n", "d/old": b"old"}
    with atomic_dir(tmp_path / "d") as tmp:
        (tmp / "new").write_text("new")
    assert snapshot(tmp_path) == {"a.json": b"1\n", "d/new": b"new"}
    assert list((tmp_path / "_tmp").iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_commits_of_one_name_the_first_stays(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert write_new_json(tmp_path / "r.json", 1)
    assert not write_new_json(tmp_path / "r.json", 2)
    assert json.loads((tmp_path / "r.json").read_text()) == 1


def test_an_idle_ring_goes_and_one_that_a_run_fills_stays(tmp_path: Path) -> None:
    for name in ("idle", "used", "young"):
        folder = tmp_path / "rings" / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "shard").write_bytes(bytes(1000))
        if name != "young":
            age(folder, 2)
    held = take_lock(tmp_path / "rings" / "used")
    age(tmp_path / "rings" / "used", 2)
    assert names(tmp_path) == ["idle"]
    held.close()
    assert names(tmp_path, delete=True) == ["idle", "used"]
    assert [p.name for p in (tmp_path / "rings").iterdir()] == ["young"]


def test_replaced_index_files_go_and_the_named_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features" / "a@b"
    for name in ("features-1.duckdb", "features-2.duckdb", "features-3.duckdb", "proxies-1.parquet"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(10))
    write_json(folder / "current.json", {"file": "features-2.duckdb"})
    write_json(folder / "proxies.json", {"file": "proxies-1.parquet"})
    damaged = tmp_path / "features" / "c@d"
    damaged.mkdir()
    (damaged / "features-1.duckdb").write_bytes(bytes(10))
    (damaged / "current.json").write_text("{")
    age(tmp_path / "features", 2)
    os.utime(folder / "features-3.duckdb")  # the one that is being made
    code, out, _ = run(capsys, "store", "gc", "-w", str(tmp_path))
    assert code == 0 and "replaced by a newer one" in out
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        "current.json", "features-2.duckdb", "features-3.duckdb", "proxies-1.parquet", "proxies.json",
    ]  # fmt: skip
    assert (damaged / "features-1.duckdb").is_file()
