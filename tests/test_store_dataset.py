"""Readers that share a store: ranks, DataLoader workers and both see every row once an epoch, and resume exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cache.errors import AtomscopeError, DataError, UsageError
from cache.store import ActivationStore
from tests.corpora import HOOK, OTHER, empty_store, fill, make_corpus, make_store, random_vectors

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (30, 7, 1, 40, 25, 12, 33, 18, 9, 21, 16, 16, 38, 5, 29)


def eligible(store: ActivationStore, split: str | None = "train") -> list[int]:
    keep = store.corpus.column("pos") > 0
    if split:
        keep = keep & (store.corpus.column("split") == (split == "heldout"))
    return np.flatnonzero(keep).tolist()


def rows_of(batches: Any) -> list[int]:
    return [r for batch in batches for r in batch.row.tolist()]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=12),
    world=st.integers(1, 5),
    batch=st.integers(1, 60),
    window=st.integers(1, 4),
    epochs=st.integers(1, 3),
    split=st.sampled_from([None, "train"]),
    seed=st.integers(0, 99),
    prefetch=st.booleans(),
)
def test_over_all_ranks_each_row_comes_once_an_epoch(
    lengths: list[int],
    world: int,
    batch: int,
    window: int,
    epochs: int,
    split: str | None,
    seed: int,
    prefetch: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, vectors = make_store(Path(folder), [*lengths, 20, 20, 20, 20, 20])
        options: dict[str, Any] = {"batch_size": batch, "window": window, "split": split, "seed": seed}
        options |= {"world": world, "prefetch": prefetch}
        of_epoch: list[Counter[int]] = [Counter() for _ in range(epochs)]
        for rank in range(world):
            stream = store.stream(HOOK, rank=rank, epochs=epochs, **options)
            sizes = []
            for got in stream:
                assert torch.equal(got.x[HOOK], vectors[HOOK][got.row])
                sizes.append(len(got.row))
            assert all(n == batch for n in sizes[:-1])  # only the last batch of all is short
            stream.close()
            for epoch in range(epochs):  # an epoch at a time: which rows belong to which epoch
                one = store.stream(HOOK, rank=rank, epochs=epoch + 1, **options)
                one.epoch = epoch
                of_epoch[epoch].update(rows_of(one))
                one.close()
        want = Counter(eligible(store, split))
        assert all(found == want for found in of_epoch)


@settings(max_examples=20, deadline=None)
@given(world=st.integers(1, 3), rank=st.integers(0, 2), batch=st.integers(1, 40), cut=st.integers(0, 30))
def test_a_rank_resumes_at_any_batch(
    shared: ActivationStore, world: int, rank: int, batch: int, cut: int
) -> None:
    options: dict[str, Any] = {"batch_size": batch, "window": 2, "rank": min(rank, world - 1), "world": world}
    whole = [b.row.tolist() for b in shared.stream(HOOK, epochs=3, prefetch=False, **options)]
    stream = shared.stream(HOOK, epochs=3, prefetch=False, **options)
    head = [next(stream).row.tolist() for _ in range(min(cut, len(whole)))]
    state = json.loads(json.dumps(stream.state_dict()))
    tail = [b.row.tolist() for b in shared.stream(HOOK, epochs=3, prefetch=False, state=state, **options)]
    assert head + tail == whole


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("ws"), LENGTHS)[0]


def test_one_reader_of_many_keeps_the_order_it_had_alone(shared: ActivationStore) -> None:
    alone = shared.stream(HOOK, batch_size=10)
    one = shared.stream(HOOK, batch_size=10, rank=0, world=1)
    assert [next(alone).row.tolist() for _ in range(20)] == [next(one).row.tolist() for _ in range(20)]
    assert alone.state_dict() == one.state_dict()


def test_a_state_of_another_rank_or_world_is_refused(shared: ActivationStore) -> None:
    state = shared.stream(HOOK, batch_size=4, rank=0, world=2).state_dict()
    for rank, world in ((1, 2), (0, 3), (0, 1)):
        with pytest.raises(DataError, match="rank or world"):
            shared.stream(HOOK, batch_size=4, rank=rank, world=world, state=state)


def test_readers_that_cannot_be_are_refused(shared: ActivationStore) -> None:
    with pytest.raises(UsageError, match=r"ranks are 0\.\.1"):
        shared.stream(HOOK, batch_size=4, rank=2, world=2)
    with pytest.raises(UsageError, match=r"row groups: use at most \d+ ranks x workers"):
        shared.stream(HOOK, batch_size=4, rank=99, world=100)
    with pytest.raises(UsageError, match="epochs is 0"):
        shared.dataset(HOOK, batch_size=4, epochs=0)


# ------------------------------------------------------------------------------------------------ DataLoader


def load(store: ActivationStore, workers: int, **options: Any) -> tuple[Any, Any]:
    data = store.dataset(HOOK, **{"batch_size": 13, "window": 3} | options)
    context = {"multiprocessing_context": "fork"} if workers else {}
    return data, DataLoader(data, batch_size=None, num_workers=workers, **context)


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (2, 3)])
def test_over_all_ranks_and_workers_each_row_comes_once_an_epoch(
    tmp_path: Path, workers: int, world: int
) -> None:
    store, vectors = make_store(tmp_path, LENGTHS)
    for epoch in range(2):
        seen: list[int] = []
        for rank in range(world):
            data, loader = load(store, workers, rank=rank, world=world)
            data.set_epoch(epoch)
            for batch in loader:
                assert torch.equal(batch.x[HOOK], vectors[HOOK][batch.row])
                seen += batch.row.tolist()
        assert Counter(seen) == Counter(eligible(store))
        assert data.rows_per_epoch == len(seen)


def test_epochs_come_in_different_orders(shared: ActivationStore) -> None:
    data, loader = load(shared, 2)
    first, again = rows_of(loader), rows_of(loader)
    data.set_epoch(1)
    second = rows_of(loader)
    assert first == again and sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_loader_resumes_after_the_last_batch_that_was_used(
    shared: ActivationStore, workers: int, cut: int
) -> None:
    _, loader = load(shared, workers, epochs=2)
    whole = [b.row.tolist() for b in loader]
    data, loader = load(shared, workers, epochs=2)
    head = []
    for batch in loader:  # the workers have run ahead of this loop when it stops
        head.append(batch.row.tolist())
        data.done(batch)
        if len(head) == cut:
            break
    state = json.loads(json.dumps(data.state_dict()))
    fresh, loader = load(shared, workers, epochs=2)
    fresh.load_state_dict(state)
    tail = [b.row.tolist() for b in loader]
    assert head + tail == whole


def test_a_loader_state_of_another_number_of_workers_is_refused(shared: ActivationStore) -> None:
    data, loader = load(shared, 2)
    data.done(next(iter(loader)))
    fresh, loader = load(shared, 0)
    fresh.load_state_dict(data.state_dict())
    with pytest.raises(DataError, match="num_workers=2"):
        next(iter(loader))


def test_batches_stay_valid_however_long_they_are_kept(shared: ActivationStore) -> None:
    want = random_vectors(shared.corpus.n_tokens, 8)
    for workers in (0, 2):
        for batch in list(load(shared, workers)[1]):
            assert torch.equal(batch.x[HOOK], want[batch.row])


def test_workers_see_the_shards_that_were_there_when_the_dataset_was_made(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [30] * 6)
    store, x = empty_store(tmp_path, corpus, rows_per_shard=30), random_vectors(180, 4)
    with store.writer(group_rows=8) as writer:
        for i in range(3):
            writer.submit(i, HOOK, x[i * 30 : i * 30 + 30])
    data, loader = load(store, 2, split=None)
    fill(store, {HOOK: x}, group_rows=8)
    assert sorted(rows_of(loader)) == [r for r in range(90) if r % 30]
    assert data.rows_per_epoch == 87


def test_several_hooks_stay_aligned_in_workers(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path, LENGTHS, hooks=(HOOK, OTHER), dtype=torch.float16)
    data = store.dataset([HOOK, OTHER], batch_size=20, dtype=torch.float64)
    for batch in DataLoader(data, batch_size=None, num_workers=2):
        for hook in (HOOK, OTHER):
            assert torch.equal(batch.x[hook], vectors[hook][batch.row].double())


def test_more_readers_than_row_groups_is_an_error_of_the_loader(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [20, 20, 20], rows_per_shard=100, group_rows=60)
    with pytest.raises(AtomscopeError, match="use at most 1 ranks x workers"):
        list(load(store, 2, split=None)[1])


_RANK = """
import json, sys
from torch.utils.data import DataLoader
from cache.store import ActivationStore

path, hook, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
data = ActivationStore.open(path).dataset(hook, batch_size=13, window=3, rank=rank, world=world)
print(json.dumps([r for b in DataLoader(data, batch_size=None, num_workers=1) for r in b.row.tolist()]))
"""


def test_two_processes_share_an_epoch(shared: ActivationStore) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RANK, str(shared.path), HOOK]
    ranks = [
        subprocess.Popen([*command, str(rank), "2"], env=env, cwd=ROOT, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    parts = [json.loads(p.communicate(timeout=120)[0]) for p in ranks]
    assert all(p.returncode == 0 for p in ranks) and all(parts)
    assert Counter(parts[0] + parts[1]) == Counter(eligible(shared))
