"""What is written comes back: by order, by id, by SQL, through pyarrow and through DuckDB."""

from __future__ import annotations

import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError, MissingDataError, UsageError
from cache.store import ActivationStore, plan_shards
from tests.corpora import HOOK, OTHER, VOCAB, empty_store, make_corpus, make_store, random_vectors

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def as_bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    dtype=st.sampled_from(DTYPES),
    d=st.integers(1, 17),
    rows_per_shard=st.integers(1, 120),
    group_rows=st.integers(1, 64),
    batch=st.integers(1, 90),
)
def test_vectors_come_back_bit_for_bit_on_every_path(
    lengths: list[int], dtype: torch.dtype, d: int, rows_per_shard: int, group_rows: int, batch: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made, vectors = make_store(
            Path(folder), lengths, d=d, dtype=dtype, rows_per_shard=rows_per_shard, group_rows=group_rows
        )
        store, x = ActivationStore.open(made.path), vectors[HOOK]
        assert store.complete(HOOK) and store.n_rows(HOOK) == len(x) and store.verify() == []
        got = [b.x[HOOK] for b in store.sequential(HOOK, batch_size=batch, skip=None, dtype=dtype)]
        assert all(len(g) == batch for g in got[:-1])
        assert as_bytes(torch.cat(got)) == as_bytes(x)
        files = [str(store.folder(HOOK) / r.file) for r in store.records(HOOK).values()]
        arrow = [v for f in files for v in pq.read_table(f, columns=["x"]).column("x").to_pylist()]
        assert b"".join(arrow) == as_bytes(x)
        found = duckdb.connect().execute(f"SELECT x FROM read_parquet({files}) ORDER BY doc, pos").fetchall()
        assert b"".join(bytes(r[0]) for r in found) == as_bytes(x)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 195), max_size=40))
def test_rows_come_in_the_order_of_the_ids_repeats_included(store: ActivationStore, ids: list[int]) -> None:
    want = random_vectors(196, 8)[ids]
    assert torch.equal(store.rows(HOOK, ids), want)
    assert torch.equal(store.rows(HOOK, np.array(ids, dtype=np.int64)), want)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("ws"))[0]


@pytest.mark.parametrize("split", [None, "train", "heldout"])
@pytest.mark.parametrize("skip", [None, "first"])
@pytest.mark.parametrize("start_row", [0, 1, 77, 195, 500])
def test_sequential_gives_the_selected_rows_in_order(
    store: ActivationStore, split: str | None, skip: str | None, start_row: int
) -> None:
    column = store.corpus.column
    keep = np.arange(196) >= start_row
    keep &= (column("split") == (split == "heldout")) | (split is None)
    keep &= (column("pos") > 0) | (skip is None)
    batches = list(store.sequential(HOOK, batch_size=13, split=split, skip=skip, start_row=start_row))
    rows = [r for b in batches for r in b.row.tolist()]
    assert rows == np.flatnonzero(keep).tolist()
    if rows:
        assert torch.equal(torch.cat([b.x[HOOK] for b in batches]), random_vectors(196, 8)[rows])


def test_rows_where_names_token_strings_and_document_labels(store: ActivationStore) -> None:
    tok, pos, doc = (store.corpus.column(c) for c in ("tok", "pos", "doc"))
    want = np.flatnonzero((tok == VOCAB.index(" the")) & (pos > 0) & (doc % 2 == 1))
    where = "token = ' the' and pos > 0 and label_kind = 'odd'"
    assert store.row_ids(where).tolist() == want.tolist() and len(want)
    assert torch.equal(store.rows(HOOK, where=where), random_vectors(196, 8)[want])
    quoted = np.flatnonzero(tok == VOCAB.index("it's")).tolist()
    assert store.row_ids("token = 'it''s' -- a comment").tolist() == quoted
    assert store.rows(HOOK, where="false").shape == (0, 8)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tokn = 3", "tokn.*columns: corpus, row, seq, pos"),
        ("pos >", "columns:"),
        ("true); SELECT (1", "more than one condition"),
        ("tok in (SELECT column0 FROM read_csv('/etc/passwd'))", "Cannot access file"),
    ],
)
def test_a_wrong_where_names_the_cause_and_the_columns(
    store: ActivationStore, where: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        store.rows(HOOK, where=where)


def test_wrong_ids_and_arguments_are_refused(store: ActivationStore) -> None:
    for ids in ([-1], [196], [0, 400]):
        with pytest.raises(UsageError, match=r"0\.\.195"):
            store.rows(HOOK, ids)
    with pytest.raises(UsageError, match="ids or where"):
        store.rows(HOOK)
    with pytest.raises(UsageError, match="not a hook name"):
        store.rows("../../etc", [0])
    with pytest.raises(MissingDataError, match=f"it has: {HOOK}"):
        store.rows(OTHER, [0])


def test_the_norm_column_is_the_norm_of_the_vector(store: ActivationStore) -> None:
    files = [store.folder(HOOK) / r.file for r in store.records(HOOK).values()]
    norm = np.concatenate([pq.read_table(f, columns=["norm"]).column("norm").to_numpy() for f in files])
    np.testing.assert_allclose(norm, random_vectors(196, 8).double().norm(dim=1).numpy(), rtol=1e-6)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), rows_per_shard=st.integers(1, 120))
def test_shards_cover_all_sequences_once_and_keep_to_their_size(
    lengths: list[int], rows_per_shard: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    plan = plan_shards(offsets, rows_per_shard)
    assert [p[0] for p in plan] == [0, *(p[1] for p in plan[:-1])] and plan[-1][1] == len(lengths)
    for seq0, seq1, row0, row1 in plan:
        assert (row0, row1) == (offsets[seq0], offsets[seq1])
        assert row1 - row0 <= rows_per_shard or seq1 - seq0 == 1


def test_a_store_is_found_again_by_what_it_was_made_from(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [9, 8, 7])
    first = empty_store(tmp_path, corpus, rows_per_shard=10)
    assert ActivationStore.create(tmp_path, dict(reversed(first.identity.items())), corpus).path == first.path
    assert empty_store(tmp_path, corpus, rows_per_shard=10, model="other").path != first.path
    other = make_corpus(tmp_path, [9, 8, 6])
    assert empty_store(tmp_path, other, rows_per_shard=10).path != first.path
    assert len(ActivationStore.find_all(tmp_path)) == 3
    with pytest.raises(UsageError, match="leave rows_per_shard out"):
        empty_store(tmp_path, corpus, rows_per_shard=11)
    with pytest.raises(DataError, match="was harvested from corpus"):
        ActivationStore(first.path, other)
