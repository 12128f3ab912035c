"""The SQL views: complete, empty where nothing was made, and usable where one file is damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

from cache.catalog import connect
from cache.errors import MissingDataError
from cache.records import record_path
from tests.corpora import HOOK, OTHER, VOCAB, empty_store, fill, make_corpus, make_store, random_vectors


def test_an_empty_workspace_has_the_views_and_no_rows(tmp_path: Path) -> None:
    con = connect(tmp_path)
    for view in ("stores", "docs", "vocab", "tokens"):
        assert con.execute(f"SELECT count(*) FROM {view}").fetchall() == [(0,)]
    assert (
        con.execute("SELECT token FROM tokens WHERE row = 3 AND split = 0 AND corpus = 'x'").fetchall() == []
    )
    assert con.execute("SELECT hook FROM stores WHERE complete AND n_rows > 5").fetchall() == []


def test_a_workspace_that_does_not_exist_is_missing_data_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no workspace at"):
        connect(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_tokens_joins_strings_and_labels_and_its_row_is_the_row_id(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [4, 1, 6])
    found = connect(tmp_path).execute(
        "SELECT row, seq, pos, doc, tok, token, flags, split, label_kind, corpus FROM tokens ORDER BY row"
    )
    rows = found.fetchall()
    assert [r[0] for r in rows] == list(range(11))
    for i, name in enumerate(("seq", "pos", "doc", "tok"), start=1):
        assert [r[i] for r in rows] == corpus.column(name).tolist()
    assert [r[5] for r in rows] == [VOCAB[t] for t in corpus.column("tok")]
    assert [r[8] for r in rows] == ["odd" if d % 2 else "even" for d in corpus.column("doc")]
    assert {r[9] for r in rows} == {corpus.path.name}


def test_corpora_with_different_labels_share_one_view(tmp_path: Path) -> None:
    make_corpus(tmp_path, [4, 1], label="label_a")
    make_corpus(tmp_path, [2, 2, 2], label="label_b")
    make_corpus(tmp_path, [3], label=None)
    con = connect(tmp_path)
    counts = con.execute("SELECT count(*), count(label_a), count(label_b) FROM tokens").fetchall()
    assert counts == [(14, 5, 6)]
    assert con.execute("SELECT count(*), count(DISTINCT corpus) FROM docs").fetchall() == [(6, 3)]


def test_rows_views_give_each_row_of_each_store_its_row_id(tmp_path: Path) -> None:
    first, vectors = make_store(tmp_path, hooks=(HOOK, OTHER))
    second = empty_store(tmp_path, first.corpus, model="other")
    fill(second, {HOOK: vectors[HOOK]})
    con = connect(tmp_path)
    for store in (first, second):
        found = con.execute(
            "SELECT row, doc, pos, tok, norm FROM rows_blocks_0_hook_resid_post WHERE store = ? ORDER BY row",
            [store.hash],
        ).fetchnumpy()
        assert found["row"].tolist() == list(range(196))
        for name in ("doc", "pos", "tok"):
            assert found[name].tolist() == store.corpus.column(name).tolist()
        np.testing.assert_allclose(found["norm"], vectors[HOOK].norm(dim=1).numpy(), rtol=1e-5)
    joined = (
        "SELECT count(*) FROM rows_blocks_1_hook_resid_post r JOIN stores s USING (store) "
        "JOIN tokens t ON t.corpus = s.corpus AND t.row = r.row WHERE s.hook = ? AND t.tok = r.tok"
    )
    assert con.execute(joined, [OTHER]).fetchall() == [(196,)]


def test_stores_says_what_is_complete(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    with store.writer() as writer:
        writer.submit(1, OTHER, random_vectors(40, 3))
    rows = connect(tmp_path).execute(
        "SELECT hook, d, dtype, shards, shards_total, n_rows, n_rows_total, complete, model, problem FROM stores"
    )
    assert rows.fetchall() == [
        (HOOK, 8, "fp32", 5, 5, 196, 196, True, "tiny", None),
        (OTHER, 3, "fp32", 1, 5, 40, 196, False, "tiny", None),
    ]


def test_files_without_a_record_are_not_in_any_view(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    record_path(store.folder(HOOK), 0).unlink()
    count = (
        connect(tmp_path).execute("SELECT count(*), min(row) FROM rows_blocks_0_hook_resid_post").fetchall()
    )
    assert count == [(196 - 38, 38)]


def test_one_damaged_file_does_not_close_the_whole_catalogue(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, hooks=(HOOK, OTHER))
    (store.folder(HOOK) / store.records(HOOK)[0].file).write_bytes(b"not parquet")
    record_path(store.folder(OTHER), 2).write_text("{}")
    con = connect(tmp_path)
    assert con.execute("SELECT count(*) FROM tokens").fetchall() == [(196,)]
    with pytest.raises(duckdb.Error, match="atomscope store verify"):
        con.execute("SELECT count(*) FROM rows_blocks_0_hook_resid_post").fetchall()
    problems = con.execute("SELECT problem FROM stores WHERE hook = ?", [OTHER]).fetchall()
    assert "schema version" in problems[0][0]


def test_a_database_that_cannot_be_attached_is_named_by_the_views_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.duckdb").write_bytes(b"half a database")
    statements = [
        f"ATTACH '{tmp_path / 'index.duckdb'}' AS features_0 (READ_ONLY)",
        'CREATE OR REPLACE VIEW "features" AS SELECT * FROM features_0.features',
        "CREATE VIEW ones AS SELECT 1 AS one",
    ]
    monkeypatch.setattr("cache.catalog._sources", lambda: [lambda _: statements])
    con = connect(tmp_path)
    assert con.execute("SELECT one FROM ones").fetchall() == [(1,)]
    with pytest.raises(duckdb.Error, match=r"view features cannot be read .*index\.duckdb"):
        con.execute("SELECT count(*) FROM features").fetchall()


def test_sql_cannot_read_files_outside_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.csv").write_text("a\n1\n")
    con = connect(tmp_path / "inside")
    with pytest.raises(duckdb.Error, match="Cannot access file"):
        con.execute(f"SELECT * FROM read_csv('{tmp_path / 'secret.csv'}')").fetchall()


def test_a_sort_larger_than_memory_spills_into_the_workspace_and_leaves_nothing(tmp_path: Path) -> None:
    con = connect(tmp_path)
    con.execute("SET memory_limit = '30MB'; SET threads = 1")
    query = "SELECT sum(length(b)) FROM (SELECT hash(range)::VARCHAR AS b FROM range(1000000) ORDER BY b OFFSET 9)"
    assert con.execute(query).fetchall()[0][0] > 1e7
    con.close()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_workspace_with_a_quote_and_spaces_in_its_name_works(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "Ada's work space")
    con = connect(tmp_path / "Ada's work space")
    assert con.execute("SELECT count(*) FROM rows_blocks_0_hook_resid_post").fetchall() == [(196,)]
    assert len(store.rows(HOOK, where="pos = 0")) == 10


def test_metadata_queries_do_not_read_vectors(tmp_path: Path) -> None:
    make_store(tmp_path)
    con = connect(tmp_path)
    assert "x" not in con.sql("SELECT * FROM rows_blocks_0_hook_resid_post").columns


def test_queries_work_without_torch(tmp_path: Path) -> None:
    make_store(tmp_path)
    code = (
        "import sys; from cache import connect; c = connect(sys.argv[1]); "
        "assert c.execute('SELECT count(*) FROM tokens').fetchall() == [(196,)]; "
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True)
