"""The stream: each row once an epoch, full batches, and exact resume from any state."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError, MissingDataError, UsageError
from cache.store import ActivationStore
from cache.stream import permutation
from tests.corpora import HOOK, OTHER, empty_store, fill, make_corpus, make_store, random_vectors


def eligible(store: ActivationStore, split: str | None, skip: str | None) -> list[int]:
    heldout, first = store.corpus.column("split") == 1, store.corpus.column("pos") == 0
    keep = np.ones(store.corpus.n_tokens, bool)
    if split:
        keep &= heldout == (split == "heldout")
    if skip:
        keep &= ~first
    return np.flatnonzero(keep).tolist()


def take(stream: Any, n: int) -> list[int]:
    return [r for _ in range(n) for r in next(stream).row.tolist()]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=14),
    batch=st.integers(1, 70),
    window=st.integers(1, 5),
    split=st.sampled_from([None, "train", "heldout"]),
    skip=st.sampled_from([None, "first"]),
    seed=st.integers(0, 99),
    prefetch=st.booleans(),
)
def test_each_row_comes_exactly_once_an_epoch_and_batches_are_full(
    lengths: list[int],
    batch: int,
    window: int,
    split: str | None,
    skip: str | None,
    seed: int,
    prefetch: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, vectors = make_store(Path(folder), [*lengths, 3, 3, 3, 3])
        want = eligible(store, split, skip)
        options: dict[str, Any] = {"window": window, "split": split, "skip": skip, "seed": seed}
        stream = store.stream(HOOK, batch_size=batch, prefetch=prefetch, **options)
        assert stream.rows_per_epoch == len(want)
        seen: list[int] = []
        while len(seen) < 3 * len(want):
            got = next(stream)
            assert len(got.row) == batch
            assert torch.equal(got.x[HOOK], vectors[HOOK][got.row])
            seen += got.row.tolist()
        epochs = [seen[i * len(want) : (i + 1) * len(want)] for i in range(3)]
        assert all(Counter(e) == Counter(want) for e in epochs)
        stream.close()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_resuming_at_any_batch_goes_on_exactly_as_the_uninterrupted_run(
    tmp_path: Path, window: int, prefetch: bool
) -> None:
    store, vectors = make_store(tmp_path)
    options: dict[str, Any] = {"batch_size": 17, "window": window, "seed": 5, "prefetch": prefetch}
    whole = store.stream(HOOK, **options)
    states, batches = [], []
    for _ in range(30):  # 130 eligible rows: several windows and epochs
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(next(whole).row.tolist())
    assert states[-1]["epoch"] >= 2
    for start, state in enumerate(states):
        resumed = store.stream(HOOK, **options | {"seed": 0}, state=state)
        for want in batches[start : start + 9]:
            got = next(resumed)
            assert got.row.tolist() == want
            assert torch.equal(got.x[HOOK], vectors[HOOK][got.row])
        assert resumed.state_dict() == [*states, whole.state_dict()][min(start + 9, 30)]


def test_a_resumed_stream_may_use_another_batch_size_and_more_hooks(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, hooks=(HOOK, OTHER))
    a = store.stream(HOOK, batch_size=10, window=2)
    b = store.stream([HOOK, OTHER], batch_size=4, window=2)
    assert take(a, 6) == take(b, 15)
    assert a.state_dict() == b.state_dict()
    c = store.stream([HOOK, OTHER], batch_size=30, window=2, state=a.state_dict())
    assert take(c, 2) == take(a, 6)


def test_a_state_of_other_settings_is_refused_and_not_silently_reinterpreted(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    state = store.stream(HOOK, batch_size=4).state_dict()
    for other in ({"split": "heldout"}, {"skip": None}, {"window": 2}):
        with pytest.raises(DataError, match="resume with the settings"):
            store.stream(HOOK, batch_size=4, state=state, **other)


def test_hooks_of_other_widths_dtypes_and_row_groups_stay_aligned(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [40, 33, 20, 61, 5])
    store = empty_store(tmp_path, corpus)
    x = {HOOK: random_vectors(159, 6), OTHER: random_vectors(159, 9, torch.bfloat16, seed=1)}
    fill(store, {HOOK: x[HOOK]}, group_rows=7)
    fill(store, {OTHER: x[OTHER]}, group_rows=19)
    for hooks in ([HOOK, OTHER], [OTHER, HOOK]):
        stream = store.stream(hooks, batch_size=11, window=2, split=None, skip=None)
        for _ in range(40):
            batch = next(stream)
            for hook in hooks:
                assert torch.equal(batch.x[hook], x[hook][batch.row].float())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_batches_have_the_asked_dtype_whatever_is_stored(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    store, vectors = make_store(tmp_path, dtype=stored)
    batch = next(store.stream(HOOK, batch_size=50, dtype=wanted))
    assert batch.x[HOOK].dtype == wanted
    assert torch.equal(batch.x[HOOK], vectors[HOOK][batch.row].to(wanted))


def test_a_batch_is_still_valid_after_the_next_call(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path)
    stream = store.stream(HOOK, batch_size=20, window=2)
    last = next(stream)
    for _ in range(20):
        new = next(stream)
        assert torch.equal(last.x[HOOK], vectors[HOOK][last.row])
        last = new


def test_seeds_and_epochs_give_different_orders_and_one_seed_the_same(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    n = store.stream(HOOK, batch_size=1).rows_per_epoch
    first = store.stream(HOOK, batch_size=n)
    one, two = next(first).row.tolist(), next(first).row.tolist()
    assert one != two and one != sorted(one)
    assert one == next(store.stream(HOOK, batch_size=n)).row.tolist()
    assert one != next(store.stream(HOOK, batch_size=n, seed=1)).row.tolist()


def test_only_shards_that_all_hooks_hold_are_streamed(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [30] * 6)
    store = empty_store(tmp_path, corpus, rows_per_shard=30)
    x = random_vectors(180, 4)
    with store.writer() as writer:
        for hook, shards in ((HOOK, (0, 1, 2, 5)), (OTHER, (1, 2, 4))):
            for i in shards:
                writer.submit(i, hook, x[i * 30 : i * 30 + 30])
    stream = store.stream([HOOK, OTHER], batch_size=60, split=None, skip=None)
    assert sorted(next(stream).row.tolist()) == list(range(30, 90))
    assert sorted(next(store.stream(HOOK, batch_size=120, split=None, skip=None)).row.tolist()) == [
        *range(90),
        *range(150, 180),
    ]


def test_readers_load_only_the_two_byte_columns_of_a_token_table_that_may_be_huge(tmp_path: Path) -> None:
    made, _ = make_store(tmp_path)
    store = ActivationStore.open(made.path)
    next(store.stream(HOOK, batch_size=20))
    assert list(store.sequential(HOOK, batch_size=20)) and len(store.rows(HOOK, [1, 2])) == 2
    assert store.stats(HOOK).n and not store.verify()
    assert set(store.corpus._columns) == {"flags", "split"}


def test_asking_for_what_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [5, 6, 7])  # no held-out document
    with pytest.raises(MissingDataError, match="no heldout rows"):
        store.stream(HOOK, batch_size=4, split="heldout")
    with pytest.raises(MissingDataError, match=f"it has: {HOOK}"):
        store.stream(OTHER, batch_size=4)
    with pytest.raises(UsageError, match="'train', 'heldout' or None"):
        store.stream(HOOK, batch_size=4, split="test")
    with pytest.raises(UsageError, match="batch_size >= 1"):
        store.stream(HOOK, batch_size=0)


def test_an_error_of_the_reading_thread_reaches_the_training_loop(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    stream = store.stream(HOOK, batch_size=10, window=1)
    next(stream)
    for path in store.folder(HOOK).glob("*.parquet"):
        with path.open("r+b") as file:
            file.truncate(100)
    with pytest.raises(DataError, match="harvest again"):
        for _ in range(100):
            next(stream)


def test_the_permutation_does_not_change_between_versions() -> None:
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(1000, 3, 1, 4).tolist()) == list(range(1000))
    first = np.bincount([permutation(5, s)[0] for s in range(2000)], minlength=5)
    assert abs(first - 400).max() < 80  # 4.5 standard deviations
