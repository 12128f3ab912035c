"""Crashes, damage and wrong input: nothing half-written is read, and every refusal says what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.records import ShardRecord, record_path
from cache.store import ActivationStore
from tests.corpora import HOOK, OTHER, empty_store, fill, make_corpus, make_store, random_vectors

ROOT = Path(__file__).resolve().parent.parent

KILLED = """
import os, signal, sys
from cache.records import ShardRecord
from tests.corpora import HOOK, empty_store, fill, make_corpus, random_vectors

save = ShardRecord.save
def save_or_die(self, folder):
    if self.shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
ShardRecord.save = save_or_die
corpus = make_corpus(sys.argv[1], [20] * 10)
x = random_vectors(200, 8)
x[80:] += 1.0  # the run after the crash writes other bytes there
fill(empty_store(sys.argv[1], corpus, rows_per_shard=40), {HOOK: x}, group_rows=16)
"""


def test_a_writer_killed_before_the_record_leaves_an_orphan_that_resume_replaces(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    store = ActivationStore.open(ActivationStore.find_all(tmp_path)[0])
    assert store.committed(HOOK) == {0, 1} and store.n_rows(HOOK) == 80
    orphan = next(store.folder(HOOK).glob("shard-00002-*.parquet"))
    with pytest.raises(MissingDataError, match=r"3 of 5 shards are missing.*goes on where it stopped"):
        store.require_complete(HOOK)
    kept = {p: p.stat().st_mtime_ns for p in store.folder(HOOK).glob("shard-0000[01]*")}
    x = random_vectors(200, 8)
    fill(store, {HOOK: x}, group_rows=16)
    assert store.complete(HOOK) and store.verify() == [] and not orphan.exists()
    assert torch.equal(store.rows(HOOK, range(200)), x)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    assert list((tmp_path / "_tmp").iterdir()) == []


def data_file(store: ActivationStore, shard: int) -> Path:
    return store.folder(HOOK) / store.records(HOOK)[shard].file


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_one_flipped_bit_in_the_vectors_is_found_and_located(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    record = store.records(HOOK)[1]
    flip(data_file(store, 1), record.groups[1]["pages"]["x"]["offset"] + 100)
    problems = store.verify()
    assert len(problems) == 1
    assert record.file in problems[0] and "row group 1" in problems[0] and "harvest again" in problems[0]


def test_damage_of_a_token_column_is_found(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    chunk = pq.read_metadata(data_file(store, 1)).row_group(0).column(2)
    assert chunk.path_in_schema == "tok"
    flip(data_file(store, 1), chunk.data_page_offset + chunk.total_compressed_size - 8)
    problems = store.verify()
    assert len(problems) == 1 and store.records(HOOK)[1].file in problems[0]


def test_a_norm_that_is_not_its_vector_s_is_found(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    chunk = pq.read_metadata(data_file(store, 1)).row_group(0).column(3)
    assert chunk.path_in_schema == "norm"
    flip(data_file(store, 1), chunk.data_page_offset + chunk.total_compressed_size - 8)
    problems = store.verify()
    assert len(problems) == 1 and "norms" in problems[0] and store.records(HOOK)[1].file in problems[0]


def test_verify_goes_on_after_a_hook_whose_records_are_damaged(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, hooks=(HOOK, OTHER))
    record_path(store.folder(HOOK), 1).write_text("{")
    flip(
        store.folder(OTHER) / store.records(OTHER)[0].file,
        store.records(OTHER)[0].groups[0]["pages"]["x"]["offset"],
    )
    problems = ActivationStore.open(store.path).verify()
    assert len(problems) == 2 and "not valid JSON" in problems[0] and "xxh3" in problems[1]
    with pytest.raises(MissingDataError, match="it has"):
        store.verify("blocks.7.hook_resid_post")


def test_a_flipped_bit_in_a_page_header_is_found_before_the_vectors_are_read(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    flip(data_file(store, 0), store.records(HOOK)[0].groups[0]["pages"]["x"]["header"] + 4)
    with pytest.raises(DataError, match="not the page its record describes"):
        store.rows(HOOK, [3])
    assert len(store.verify(HOOK)) == 1


def test_a_truncated_or_missing_data_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    path = data_file(store, 1)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    data_file(store, 2).unlink()
    row1, row2 = store.shards[1][2], store.shards[2][2]
    with pytest.raises(DataError, match=rf"{path.name} has .* bytes, its record says"):
        store.rows(HOOK, [row1])
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        store.rows(HOOK, [row2])
    assert len(store.verify()) == 2


def test_a_missing_record_means_the_shard_is_not_there(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path)
    record_path(store.folder(HOOK), 1).unlink()
    fresh = ActivationStore.open(store.path)
    row0, row1 = fresh.shards[1][2:]
    assert fresh.committed(HOOK) == {0, 2, 3, 4} and not fresh.complete(HOOK)
    with pytest.raises(MissingDataError, match="run harvest again to complete it"):
        fresh.rows(HOOK, [row0])
    found = fresh.rows(HOOK, where="true")
    assert torch.equal(found, torch.cat([vectors[HOOK][:row0], vectors[HOOK][row1:]]))
    assert sum(len(b.row) for b in fresh.sequential(HOOK, batch_size=9, skip=None)) == len(found)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_files_of_another_schema_version_are_refused(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    edit(record_path(store.folder(HOOK), 0), lambda v: v.update(schema_version=99))
    with pytest.raises(DataError, match="schema version 99, this version reads 1"):
        ActivationStore.open(store.path).rows(HOOK, [0])
    edit(store.path / "store.json", lambda v: v.pop("schema_version"))
    with pytest.raises(DataError, match="schema version None"):
        ActivationStore.open(store.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(rows=v["rows"] + 1),
        lambda v: v.update(dtype="fp16"),
        lambda v: v.update(row0=7),
        lambda v: v.update(hook=OTHER),
        lambda v: v.pop("groups"),
        lambda v: v.update(surprise=1),
    ],
)
def test_a_record_that_contradicts_itself_or_the_plan_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    store, _ = make_store(tmp_path)
    edit(record_path(store.folder(HOOK), 1), change)
    with pytest.raises(DataError, match="harvest again"):
        ActivationStore.open(store.path).rows(HOOK, [0])


def test_a_record_that_is_not_json_is_refused(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    record_path(store.folder(HOOK), 1).write_text('{"schema_version": 1, ')
    with pytest.raises(DataError, match="not valid JSON"):
        ActivationStore.open(store.path).stats(HOOK)


def test_an_error_of_the_writer_thread_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path, [10] * 20)
    store, x = empty_store(tmp_path, corpus, rows_per_shard=10), random_vectors(10, 4)

    def full_disk(self: ShardRecord, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardRecord, "save", full_disk)
    with pytest.raises(OSError, match="No space left"), store.writer(queue_size=1) as writer:
        for i in range(20):  # more than the queue holds: nobody may be left waiting
            writer.submit(i, HOOK, x)
    writer = store.writer()
    writer.submit(0, HOOK, x)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert store.committed(HOOK) == set()


def test_an_interrupted_harvest_keeps_the_shards_it_has_submitted(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [10] * 5)
    store = empty_store(tmp_path, corpus, rows_per_shard=10)
    with pytest.raises(KeyboardInterrupt), store.writer() as writer:
        writer.submit(0, HOOK, random_vectors(10, 4))
        raise KeyboardInterrupt
    assert store.committed(HOOK) == {0} and store.verify() == []


def test_a_row_that_reads_back_differently_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path, [10] * 2)
    store = empty_store(tmp_path, corpus)
    monkeypatch.setattr("cache.pages.PageReader.digest", lambda *_: "0" * 16)
    with pytest.raises(AtomscopeError, match="check the disk"):
        fill(store, {HOOK: random_vectors(20, 4)})
    assert store.committed(HOOK) == set()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinity_are_refused_with_hook_document_and_position(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    corpus = make_corpus(tmp_path, [10, 12, 14])
    store, x = empty_store(tmp_path, corpus), random_vectors(36, 4, dtype)
    x[10 + 5, 2] = bad
    with pytest.raises(DataError, match=rf"{HOOK}: 1 rows are NaN or infinite, first at doc 1 pos 5"):
        fill(store, {HOOK: x})
    assert store.hooks == []


def test_input_of_a_wrong_shape_or_dtype_is_refused_at_once(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path)
    x = vectors[HOOK][:38]
    with store.writer() as writer:
        with pytest.raises(DataError, match="shard 0 has 38 rows"):
            writer.submit(0, HOOK, x[:37])
        with pytest.raises(UsageError, match="cannot be stored, cast to one of fp16, bf16, fp32"):
            writer.submit(0, HOOK, x.double())
        with pytest.raises(UsageError, match="stored with d=8 fp32, not d=8 fp16"):
            writer.submit(0, HOOK, x.half())
        with pytest.raises(UsageError, match="not d=7 fp32"):
            writer.submit(0, HOOK, x[:, :7])
        with pytest.raises(UsageError, match="not a hook name"):
            writer.submit(0, "acts/../x", x)
    with pytest.raises(UsageError, match="writer is closed"):
        writer.submit(0, HOOK, x)


def test_a_folder_that_is_not_a_store_is_missing_data(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="not an activation store"):
        ActivationStore.open(tmp_path)
