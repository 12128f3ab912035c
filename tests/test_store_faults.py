"""Kills at random moments, two writers at once, a full disk: rows exact, none twice, committed shards never lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache.writer
from cache import harvest
from cache.cleaning import collect_garbage
from cache.corpus import Corpus
from cache.errors import AtomscopeError
from cache.records import ShardRecord
from cache.store import ActivationStore
from cache.writer import TokenSlices, commit_shard
from tests.conftest import REAL_MODEL
from tests.corpora import make_corpus
from tests.fake_model import HOOK, D, FakeModel, expected
from tests.test_cli import run

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [3 + 7 * i % 23 for i in range(300)]
OPTIONS: dict[str, Any] = {"rows_per_shard": 40, "batch_tokens": 64, "show_progress": False}

# One process imports everything and forks the harvests, so that a run costs milliseconds.
_NURSERY = """
import contextlib, json, os, random, signal, sys, time, traceback
from pathlib import Path
from cache import Corpus, harvest, harvesting
from tests.fake_model import HOOK, FakeModel

folder, corpus, job = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
moments = random.Random(7)

def start(**model):
    pid = os.fork()
    if pid:
        return pid
    try:
        harvest(FakeModel(**model), Corpus.open(corpus), hooks=HOOK, workspace=folder, rows_per_shard=40,
                batch_tokens=64, show_progress=False)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def committed():
    found = {}
    for record in folder.glob("activations/*/acts/*/shard-*.json"):
        for path in (record, record.parent / json.loads(record.read_text())["file"]):
            found[path.name] = (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes().hex())
    return found

def wait_for_more(pid, before):
    while len(list(folder.glob("activations/*/acts/*/shard-*.json"))) <= before:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.03))
    return True

def kill(pid, lost, kept):
    os.kill(pid, signal.SIGKILL)
    alive = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    now = committed()
    lost += [name for name, was in kept.items() if now.get(name) != was]
    kept.update(now)
    return alive

kills, lost, kept, codes = 0, [], {}, []
if job == "kill":
    for _ in range(40):
        if kills == 10:
            break
        pid = start(seconds=0.002)
        if not wait_for_more(pid, len(kept) // 2):
            break
        kills += kill(pid, lost, kept)
    codes = [os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])]
else:
    harvesting.only_one = lambda *_: contextlib.nullcontext()  # as where the file system has no locks
    second = 0 if job == "same" else 1
    pair = [start(shift=0), start(shift=second)]
    if job == "kill one":
        wait_for_more(pair[0], 3)
        kills = int(kill(pair.pop(0), lost, kept))
        pair.append(start(shift=0))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pair]
now = committed()
lost += [name for name, was in kept.items() if now.get(name) != was]
print(json.dumps({"kills": kills, "lost": lost, "codes": codes}))
"""


def nursery(workspace: Path, corpus: Corpus, job: str) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _NURSERY, str(workspace), str(corpus.path), job]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def the_store(workspace: Path) -> ActivationStore:
    (path,) = ActivationStore.find_all(workspace)
    return ActivationStore.open(path)


def check_whole(store: ActivationStore) -> None:
    """Complete and sound, every row id once, one data file a shard."""
    assert store.complete(HOOK) and store.verify() == []
    rows = [r for b in store.sequential(HOOK, batch_size=1000, skip=None) for r in b.row.tolist()]
    assert rows == list(range(store.corpus.n_tokens))
    assert len(list(store.folder(HOOK).iterdir())) == 2 * len(store.shards)


def test_ten_kills_at_random_moments_lose_no_committed_shard_and_double_no_row(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, LENGTHS)
    report = nursery(tmp_path, corpus, "kill")
    assert report == {"kills": 10, "lost": [], "codes": [0]}
    store = the_store(tmp_path)
    check_whole(store)
    assert torch.equal(store.rows(HOOK, range(corpus.n_tokens)), expected(corpus))
    collect_garbage(tmp_path, older_than=0, delete=True)  # the half-written files of the ten
    assert list((tmp_path / "_tmp").iterdir()) == []
    check_whole(the_store(tmp_path))


@pytest.mark.parametrize("job", ["same", "other rounding", "kill one"])
def test_two_processes_on_one_store_without_locks_make_one_store(tmp_path: Path, job: str) -> None:
    """With them the second is refused: test_one_at_a_time.py."""
    corpus = make_corpus(tmp_path, LENGTHS)
    report = nursery(tmp_path, corpus, job)
    assert report["lost"] == [] and set(report["codes"]) == {0}
    # the killed one may have left a data file of a shard that the other had committed
    if job == "kill one":
        collect_garbage(tmp_path, older_than=0, delete=True)
    store = the_store(tmp_path)
    check_whole(store)
    got = store.rows(HOOK, range(corpus.n_tokens))
    one, other = expected(corpus), expected(corpus, shift=0 if job == "same" else 1)
    for _, _, row0, row1 in store.shards:  # each shard is of one of the two, from its first row to its last
        part = got[row0:row1]
        assert torch.equal(part, one[row0:row1]) or torch.equal(part, other[row0:row1])


@pytest.mark.parametrize("moment", ["before the data", "before the record"])
def test_a_shard_that_another_writer_committed_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    corpus = make_corpus(tmp_path, [20, 20])
    mine = harvest(FakeModel(), corpus, hooks=HOOK, workspace=tmp_path / "other", **OPTIONS)
    x = mine.rows(HOOK, range(40)).half()
    store = ActivationStore.create(tmp_path, {"model": "fake"}, corpus, rows_per_shard=40)
    tokens = TokenSlices(corpus.path / "tokens.parquet")
    owner, name = (cache.writer, "write_shard") if moment == "before the data" else (ShardRecord, "save")
    real = getattr(owner, name)

    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        commit_shard(store, tokens, 0, HOOK, x + 1)
        return real(*args)

    monkeypatch.setattr(owner, name, overtaken)
    record = commit_shard(store, tokens, 0, HOOK, x)
    assert record == ActivationStore.open(store.path).records(HOOK)[0]
    check_whole(ActivationStore.open(store.path))
    assert torch.equal(ActivationStore.open(store.path).rows(HOOK, range(40)), (x + 1).float())


# ----------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where this process may make one."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(path)], capture_output=True
    )
    if made.returncode:
        pytest.skip("no right to mount a small file system here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_one_clear_line_and_the_harvest_goes_on_when_there_is_room(small_disk: Path) -> None:
    corpus = make_corpus(small_disk, [50] * 400)  # 20,000 rows of 24 bytes and more
    options = OPTIONS | {"rows_per_shard": 1000}
    with pytest.raises(AtomscopeError, match=r"^no space left for .*run the same command again[^\n]*$"):
        harvest(FakeModel(), corpus, hooks=HOOK, workspace=small_disk, **options)
    store = the_store(small_disk)
    done = store.committed(HOOK)
    assert 0 < len(done) < 20 and store.verify() == []
    assert list((small_disk / "_tmp").iterdir()) == []
    kept = {p: p.stat().st_ino for s in done for p in store.folder(HOOK).glob(f"shard-{s:05d}*")}
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    store = harvest(FakeModel(), corpus, hooks=HOOK, workspace=small_disk, **options)
    check_whole(store)
    assert torch.equal(store.rows(HOOK, range(20_000)), expected(corpus))
    assert {p: p.stat().st_ino for p in kept} == kept


_LIMITED = """
import resource, signal, sys
from cache import Corpus, harvest
from cache.errors import AtomscopeError
from tests.fake_model import HOOK, FakeModel

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
try:
    harvest(FakeModel(), Corpus.open(sys.argv[2]), hooks=HOOK, workspace=sys.argv[1], rows_per_shard=40,
            show_progress=False)
except AtomscopeError as e:
    print(e)
"""


def test_a_file_that_may_not_grow_is_the_same_and_needs_no_mount(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [30, 35, 4000, 38, 25])  # the third shard has 96 kB of vectors
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LIMITED, str(tmp_path), str(corpus.path)]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("no space left for ") and out.count("\n") == 1 and "shard-00002" in out
    store = the_store(tmp_path)
    assert {0, 1} <= store.committed(HOOK) < set(range(5)) and store.verify() == []
    assert list((tmp_path / "_tmp").iterdir()) == []
    store = harvest(FakeModel(), corpus, hooks=HOOK, workspace=tmp_path, **OPTIONS)
    check_whole(store)
    assert torch.equal(store.rows(HOOK, range(corpus.n_tokens)), expected(corpus))


def test_a_full_disk_at_the_command_line_is_one_line_and_exit_code_1(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path, [30] * 4)
    harvest(FakeModel(), corpus, hooks=HOOK, workspace=tmp_path, **OPTIONS)
    assert run(capsys, "store", "export", str(tmp_path / "s.tar"), "-w", str(tmp_path))[0] == 0

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cache.transfer._copy", full)
    code, _, err = run(capsys, "store", "import", str(tmp_path / "s.tar"), "-w", str(tmp_path / "to"))
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 1 and len(lines) == 1 and "no space left" in lines[0] and "Traceback" not in err
    assert [p for p in (tmp_path / "to").rglob("*") if p.is_file()] == []


# ------------------------------------------------------------------------------------------------ the real model

_REAL = """
import sys
from cache import Corpus, harvest, load_model
print("ready", flush=True)
harvest(load_model(sys.argv[3], workspace=sys.argv[4]), Corpus.open(sys.argv[2]), hooks="blocks.3.hook_resid_post",
        workspace=sys.argv[1], rows_per_shard=400, batch_tokens=256, show_progress=False)
"""


@pytest.mark.assets
def test_a_harvest_of_the_real_model_that_was_killed_twice_equals_an_uninterrupted_one(
    real_workspace: Path, tmp_path: Path
) -> None:
    from cache import build_corpus
    from cache.models import load_tokenizer

    hook = "blocks.3.hook_resid_post"
    text = [f"Chapter {i}. The river rose {i} times in the spring of {1700 + i}, and the town moved uphill. " * 3
            for i in range(60)]  # fmt: skip
    tokenizer = load_tokenizer(REAL_MODEL, workspace=real_workspace)
    corpora = [build_corpus(text, tokenizer, workspace=tmp_path / w, context=96) for w in ("killed", "whole")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def child(i: int) -> subprocess.Popen[bytes]:
        where = ("killed", "whole")[i]
        arguments = [str(tmp_path / where), str(corpora[i].path), REAL_MODEL, str(real_workspace)]
        return subprocess.Popen([sys.executable, "-c", _REAL, *arguments], cwd=ROOT, env=env)

    def records() -> int:
        return len(list((tmp_path / "killed").rglob("shard-*.json")))

    moments, kept = np.random.default_rng(3), {}
    for _ in range(2):
        run_, before = child(0), records()
        while records() == before and run_.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        run_.send_signal(signal.SIGKILL)
        run_.wait()
        assert kept.items() <= (kept := sizes(tmp_path / "killed")).items()
    assert child(0).wait() == 0 and child(1).wait() == 0
    a, b = the_store(tmp_path / "killed"), the_store(tmp_path / "whole")
    assert a.complete(hook) and a.verify() == [] and a.corpus.n_tokens > 3000
    assert kept.items() <= sizes(tmp_path / "killed").items()
    rows = range(a.corpus.n_tokens)
    assert torch.equal(a.rows(hook, rows), b.rows(hook, rows))
    assert a.rows(hook, rows).shape[1] > D


def sizes(workspace: Path) -> dict[str, tuple[int, int]]:
    """(inode, size) of every record and of the data it names."""
    found = {}
    for record in workspace.glob("activations/*/acts/*/shard-*.json"):
        for path in (record, record.parent / json.loads(record.read_text())["file"]):
            found[path.name] = (path.stat().st_ino, path.stat().st_size)
    return found
