"""Bags: one document at a time, whole, in order and with its labels, however the corpus was packed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.bags
from cache.bags import document_runs, pooled
from cache.corpus import Corpus
from cache.errors import MissingDataError, UsageError
from cache.packing import COLUMNS, Packing, pack
from cache.store import ActivationStore
from tests.corpora import HOOK, OTHER, VOCAB, empty_store, fill, make_corpus, make_store, random_vectors


def packed_corpus(workspace: Path, lengths: list[int], mode: str, context: int) -> Corpus:
    """A corpus whose documents are cut into rows by the project's own packing: they cross rows and shards."""
    corpus = make_corpus(workspace, lengths)
    docs = [np.full(n, i % len(VOCAB), np.int32) for i, n in enumerate(lengths)]
    columns = pack(docs, Packing(mode=mode, context=context, separator=0 if mode == "packed" else None))
    table = pa.table({name: columns[name] for name in COLUMNS})
    pq.write_table(table, corpus.path / "tokens.parquet", row_group_size=64)
    corpus.meta |= {"n_tokens": len(table), "n_seqs": int(columns["seq"][-1]) + 1}
    return Corpus(corpus.path, corpus.meta)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=15),
    mode=st.sampled_from(["document", "packed"]),
    context=st.integers(2, 30),
    rows_per_shard=st.integers(30, 150),
    split=st.sampled_from([None, "train"]),
    skip=st.sampled_from([None, "first"]),
)
def test_each_bag_is_the_rows_of_its_document_in_order(
    lengths: list[int], mode: str, context: int, rows_per_shard: int, split: str | None, skip: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = packed_corpus(Path(folder), lengths, mode, context)
        store = empty_store(Path(folder), corpus, rows_per_shard=rows_per_shard)
        x = random_vectors(corpus.n_tokens, 5)
        fill(store, {HOOK: x}, group_rows=16)
        doc, doc_pos = corpus.column("doc"), corpus.column("doc_pos")
        keep = (corpus.column("split") == 0) | (split is None)
        keep &= (corpus.column("pos") > 0) | (skip is None)
        bags = store.bags(HOOK, split=split, skip=skip)
        for _ in range(2):  # it can be gone through again
            found = list(bags)
            assert [b.doc for b in found] == sorted(set(doc[keep].tolist()))
            for bag in found:
                rows = np.flatnonzero(keep & (doc == bag.doc))
                assert torch.equal(bag.x, x[rows]) and bag.x.dtype == torch.float32
                assert (np.diff(doc_pos[rows]) > 0).all()
                assert bag.labels == {"label_kind": "odd" if bag.doc % 2 else "even"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("ws"))[0]


def test_arrays_are_the_bags_end_to_end(store: ActivationStore) -> None:
    bags = list(store.bags(HOOK, split="train"))
    a = store.bags(HOOK, split="train").arrays("label_kind")
    assert len(a.offsets) == len(bags) + 1 and a.x.dtype == np.float32
    assert a.y is not None and a.y.tolist() == [b.labels["label_kind"] for b in bags]
    for i, bag in enumerate(bags):
        part = slice(a.offsets[i], a.offsets[i + 1])
        assert np.array_equal(a.x[part], bag.x.numpy()) and set(a.doc[part]) == {bag.doc}
    assert np.array_equal(store.rows(HOOK, a.row).numpy(), a.x)
    assert np.array_equal(store.corpus.column("doc")[a.row], a.doc)


def test_bags_may_be_limited_by_sql_and_by_document(store: ActivationStore) -> None:
    tok, doc = store.corpus.column("tok"), store.corpus.column("doc")
    for bag in store.bags(HOOK, skip=None, where="token = ' the'", docs=[3, 4, 0]):
        rows = np.flatnonzero((tok == VOCAB.index(" the")) & (doc == bag.doc))
        assert bag.doc in (0, 3, 4) and torch.equal(bag.x, random_vectors(196, 8)[rows])
    assert list(store.bags(HOOK, where="false")) == []
    with pytest.raises(MissingDataError, match="no document is left"):
        store.bags(HOOK, where="false").arrays()
    with pytest.raises(UsageError, match=r"documents must be in 0\.\.9"):
        store.bags(HOOK, docs=[10])
    with pytest.raises(UsageError, match="this corpus has label_kind"):
        store.bags(HOOK).arrays("label_truth")


def test_a_document_with_a_missing_shard_is_left_out_whole(tmp_path: Path) -> None:
    corpus = packed_corpus(tmp_path, [10, 10, 30, 10, 10, 10], "packed", 15)
    store, x = empty_store(tmp_path, corpus, rows_per_shard=15), random_vectors(corpus.n_tokens, 4)
    shards = [i for i in range(len(store.shards)) if i != 2]
    with store.writer() as writer:
        for i in shards:
            writer.submit(i, HOOK, x[store.shards[i][2] : store.shards[i][3]])
    row0, row1 = store.shards[2][2:]
    cut = set(corpus.column("doc")[row0:row1].tolist())
    assert cut and {b.doc for b in store.bags(HOOK, skip=None)} == set(range(6)) - cut
    with pytest.raises(MissingDataError, match="harvest this hook"):
        store.bags(OTHER)


def test_a_document_of_any_length_is_one_bag_whatever_the_read_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = make_store(tmp_path, [100, 3, 64, 1])
    whole = document_runs(store)
    real = pq.ParquetFile.iter_batches

    def small(self: Any, batch_size: int, **options: Any) -> Any:
        return real(self, batch_size=7, **options)

    monkeypatch.setattr(cache.bags.pq.ParquetFile, "iter_batches", small)
    assert np.array_equal(document_runs(store), whole)
    assert whole.tolist() == [[0, 0, 100], [1, 100, 103], [2, 103, 167], [3, 167, 168]]


def test_bags_hold_no_token_column_and_one_document_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = make_store(tmp_path)
    store, largest = ActivationStore.open(made.path), 0
    real = ActivationStore.rows

    def rows(self: ActivationStore, hook: str, ids: Any = None, where: str | None = None) -> Any:
        nonlocal largest
        largest = max(largest, len(ids))
        return real(self, hook, ids, where)

    monkeypatch.setattr(ActivationStore, "rows", rows)
    assert len(list(store.bags(HOOK))) == 9
    assert largest == 39 and set(store.corpus._columns) == {"flags", "split"}


def test_pooled_gives_one_vector_a_document(store: ActivationStore) -> None:
    bags = store.bags(HOOK)
    mean, docs = pooled(bags)
    last, _ = pooled(bags, "last")
    for i, bag in enumerate(bags):
        assert docs[i] == bag.doc
        np.testing.assert_allclose(mean[i], bag.x.mean(0).numpy(), rtol=1e-6)
        assert np.array_equal(last[i], bag.x[-1].numpy())
    with pytest.raises(UsageError, match="'mean' or 'last'"):
        pooled(bags, "max")
