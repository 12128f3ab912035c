"""Questions that one query answers, and what answering them reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cache.catalog import connect
from cache.store import ActivationStore
from tests.corpora import HOOK, VOCAB, empty_store, fill, make_corpus, make_store, random_vectors

VIEW = "rows_blocks_0_hook_resid_post"
LABEL = "label_kind"


def rename_token(store: ActivationStore, old: str, new: str) -> None:
    words = [new if w == old else w for w in VOCAB]
    table = pa.table({"tok": pa.array(range(len(words)), pa.int32()), "token": pa.array(words, pa.string())})
    pq.write_table(table, store.corpus.path / "vocab.parquet")


def test_mean_norm_by_position_is_one_query(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path)
    norm, pos = vectors[HOOK].norm(dim=1).numpy(), store.corpus.column("pos")
    found = connect(tmp_path).execute(
        f"SELECT pos, count(*), avg(norm) FROM {VIEW} GROUP BY pos ORDER BY pos"
    )
    for p, n, mean in found.fetchall():
        assert n == (pos == p).sum() and mean == pytest.approx(norm[pos == p].mean(), rel=1e-5)
    assert p == pos.max()


def test_all_rows_of_a_token_in_documents_with_a_label_is_one_query(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path)
    rename_token(store, " cat", " Paris")
    make_store(tmp_path, [9, 30, 5, 61])  # another corpus, whose row ids are the same numbers
    tok, doc = store.corpus.column("tok"), store.corpus.column("doc")
    want = np.flatnonzero((tok == VOCAB.index(" cat")) & (doc % 2 == 1))
    found = connect(tmp_path).execute(
        f"SELECT r.row, r.doc, r.norm FROM {VIEW} r JOIN tokens t USING (corpus, row) "
        f"WHERE t.token = ' Paris' AND t.{LABEL} = 'odd' ORDER BY r.row"
    )
    rows = found.fetchall()
    assert [r[0] for r in rows] == want.tolist() and [r[1] for r in rows] == doc[want].tolist()
    np.testing.assert_allclose([r[2] for r in rows], vectors[HOOK][want].norm(dim=1).numpy(), rtol=1e-5)
    vectors_of = store.rows(HOOK, where=f"token = ' Paris' AND {LABEL} = 'odd'")
    assert torch.equal(vectors_of, vectors[HOOK][want])


def test_rows_say_which_store_and_corpus_they_are_of(tmp_path: Path) -> None:
    first, _ = make_store(tmp_path)
    second, _ = make_store(tmp_path, [9, 30, 5, 61])
    con = connect(tmp_path)
    found = con.execute(
        f"SELECT store, corpus, count(*) FROM {VIEW} JOIN tokens USING (corpus, row) GROUP BY 1, 2 ORDER BY 3"
    )
    assert found.fetchall() == [
        (second.path.name, second.corpus.path.name, 105),
        (first.path.name, first.corpus.path.name, 196),
    ]


def read_bytes() -> int:
    """Bytes that all threads of this process have asked the system for so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count the bytes read")
def test_queries_on_metadata_do_not_read_the_vectors(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [128] * 128)
    store, x = empty_store(tmp_path, corpus, rows_per_shard=4096), random_vectors(128 * 128, 512)
    fill(store, {HOOK: x})
    files = [str(store.folder(HOOK) / r.file) for r in store.records(HOOK).values()]

    def cost(query: str) -> float:
        """Bytes read, as a share of the vectors."""
        con = connect(tmp_path)
        before = read_bytes()
        assert con.execute(query).fetchall()
        return (read_bytes() - before) / x.nbytes

    import duckdb

    before = read_bytes()
    duckdb.connect().execute(f"SELECT sum(octet_length(x)) FROM read_parquet({files})").fetchall()
    assert (read_bytes() - before) / x.nbytes > 0.95  # the counter sees what DuckDB reads
    join = f"FROM {VIEW} r JOIN tokens t USING (corpus, row)"
    assert cost(f"SELECT count(*), avg(norm) {join} WHERE t.token = ' the' AND t.{LABEL} = 'odd'") < 0.01
    assert cost(f"SELECT pos, avg(norm) FROM {VIEW} GROUP BY pos") < 0.01
    assert cost(f"SELECT count(*) FROM {VIEW} WHERE tok = 3") < 0.01
    assert cost(f"SELECT * FROM {VIEW} WHERE doc = 17") < 0.01
    before = read_bytes()
    assert len(store.rows(HOOK, where="doc = 17"))  # and vectors by condition read theirs and no others
    assert (read_bytes() - before) / x.nbytes < 0.02
