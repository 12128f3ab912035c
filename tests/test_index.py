"""The feature index against brute force over dense codes: every number a user reads on a feature page."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import connect
from cache.errors import DataError, MissingDataError, UsageError
from cache.workspace import read_json
from saes import code_files, encoding, feature_file
from saes.code_files import Part
from saes.config import SAEConfig
from saes.indexing import build_index
from saes.labels import add_label, current_labels, label_events
from saes.queries import FeatureIndex
from saes.ranking import Firings, examples, find_runs, sort_block
from saes.sae import SAE
from tests.corpora import HOOK, make_store

D, F, K = 8, 24, 3
LENGTHS = [30, 7, 1, 40, 25, 12, 33, 18, 9, 21, 40, 40, 40, 40]


def make_sae(activation: str = "topk") -> SAE:
    gen = torch.Generator().manual_seed(3)
    k = K if "topk" in activation else 0
    sae = SAE(SAEConfig(d_sae=F, k=k, activation=activation, d_model=D, hook=HOOK, model="tiny"))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
        if sae.cfg.has_threshold:
            sae.threshold.fill_(30.0)
        sae.W_enc[5], sae.b_enc[5] = 0, -1e-3 if activation == "topk" else 0
    return sae.requires_grad_(False)


@pytest.fixture(scope="module", params=["topk", "abs_topk", "jumprelu", "batch_abs_topk"])
def indexed(request, tmp_path_factory):
    """(index, dense codes float32 [rows, F] with position 0 silent, store, sae)."""
    root = tmp_path_factory.mktemp(request.param)
    store, vectors = make_store(root, LENGTHS, d=D)
    sae = make_sae(request.param)
    build_index(sae, store)
    dense = sae.encode(vectors[HOOK]).dense(F)
    dense[torch.from_numpy(store.corpus.column("pos") == 0)] = 0
    return FeatureIndex.open(root), dense.half().float().numpy(), store, sae


def test_counts_extremes_and_density_equal_brute_force(indexed) -> None:
    index, dense, store, _ = indexed
    rows = int((store.corpus.column("pos") > 0).sum())
    for f in range(F):
        got, col = index.feature(f), dense[:, f]
        fires = col[col != 0]
        assert got["n_fire"] == len(fires) and got["n_pos"] == (fires > 0).sum()
        assert got["density"] == pytest.approx(len(fires) / rows)
        assert got["max_act"] == pytest.approx(max(fires.max(initial=0), 0), rel=1e-6)
        assert got["min_act"] == pytest.approx(min(fires.min(initial=0), 0), rel=1e-6)
        if len(fires):
            assert got["mean_act"] == pytest.approx(fires.mean(), rel=1e-5)
        assert index.histogram(f)["count"].sum() == len(fires)


def test_top_contexts_of_each_sign_are_the_largest_in_order(indexed) -> None:
    index, dense, _, _ = indexed
    for f in range(F):
        for sign in (1, -1):
            col = dense[:, f] * sign
            want = np.sort(col[col > 0])[::-1][:100]
            found = index.frame(
                "SELECT value FROM idx.feature_example WHERE kind = 'top' AND feature = ? AND sign = ? ORDER BY rank",
                [f, sign],
            )["value"].to_numpy()
            np.testing.assert_allclose(found * sign, want, rtol=1e-6)


def test_a_context_shows_the_right_tokens_and_activations_and_stays_in_its_document(indexed) -> None:
    index, dense, store, _ = indexed
    tok, seq, vocab = store.corpus.column("tok"), store.corpus.column("seq"), store.corpus.vocab
    for kind in ("top", "quantile", "random"):
        for e in index.examples(0, kind=kind, n=50, width=9):
            assert e.rows[e.centre] == e.row and e.seq == seq[e.row]
            assert {int(seq[r]) for r in e.rows} == {e.seq}
            assert e.tokens == [vocab[tok[r]] for r in e.rows]
            np.testing.assert_allclose(e.values, dense[list(e.rows), 0], rtol=1e-3)
            assert len(e.tokens) <= 9


def test_held_out_filter_shows_held_out_documents_only(indexed) -> None:
    index, dense, store, _ = indexed
    split = store.corpus.column("split")
    often = int(np.argmax((dense > 0).sum(0)))
    found = index.examples(often, kind="top", n=100, split="heldout")
    assert found and all(split[e.row] == 1 for e in found)
    assert len(found) < len(index.examples(often, kind="top", n=100))


def test_position_0_never_appears(indexed) -> None:
    index, _, store, _ = indexed
    rows = index.frame("SELECT row FROM idx.activation")["row"].to_numpy()
    assert (store.corpus.column("pos")[rows] > 0).all()


def test_token_table_equals_brute_force(indexed) -> None:
    index, dense, store, _ = indexed
    tok = store.corpus.column("tok")
    for t in range(6):
        got = index.token_features(t, limit=100).set_index("feature")
        part = dense[tok == t]
        for f in range(F):
            n = int((part[:, f] != 0).sum())
            assert (got.loc[f, "n"] if f in got.index else 0) == n
            if n:
                assert got.loc[f, "mass"] == pytest.approx(np.abs(part[:, f]).sum(), rel=1e-4)


def test_neighbours_are_the_largest_absolute_cosines(indexed) -> None:
    index, _, _, sae = indexed
    w = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cos = (w @ w.T).fill_diagonal_(0)
    got = index.neighbours(2)
    want = cos[2].abs().sort(descending=True).values[: len(got)]
    np.testing.assert_allclose(got["cos"].abs(), want.numpy(), rtol=1e-4)
    assert 2 not in got["other"].tolist()


def test_lists_filter_sort_and_page(indexed) -> None:
    index, dense, store, _ = indexed
    alive = (dense != 0).any(0)
    everything, total = index.list_features(limit=200, sort="feature", descending=False)
    assert total == alive.sum() and everything["feature"].tolist() == np.flatnonzero(alive).tolist()
    assert 5 not in everything["feature"].tolist()
    assert index.list_features(alive=False)[1] == F
    page, _ = index.list_features(limit=4, offset=4, sort="feature", descending=False)
    assert page["feature"].tolist() == everything["feature"].tolist()[4:8]
    low = everything["density"].median()
    assert index.list_features(density=(low, 1.0))[1] == (everything["density"] >= low).sum()
    by_token, n = index.list_features("cat", mode="token", sort="match")
    fires = (dense[store.corpus.column("tok") == 1] != 0).any(0)
    assert n == fires.sum() and by_token["match"].is_monotonic_decreasing
    assert index.list_features("7", mode="id", alive=False)[0]["feature"].tolist() == [7]


@pytest.mark.parametrize(
    "hostile", ["'; DROP TABLE idx.feature; --", "%", "\\", '"', "\x00", "<script>", "９" * 50, "²"]
)
def test_hostile_search_text_finds_nothing_and_breaks_nothing(indexed, hostile: str) -> None:
    index = indexed[0]
    for mode in ("label", "token", "id"):
        assert index.list_features(hostile, mode=mode)[1] == 0


def test_bad_ids_are_one_clear_line(indexed) -> None:
    index = indexed[0]
    for bad in (-1, F, 10**12):
        with pytest.raises(MissingDataError, match=f"0 to {F - 1}"):
            index.feature(bad)
    with pytest.raises(UsageError):
        index.list_features(sort="density; DROP TABLE x")
    with pytest.raises(UsageError):
        FeatureIndex.open(index.workspace, "../../etc/passwd")
    with pytest.raises(MissingDataError):
        FeatureIndex.open(index.workspace, "0" * 16)


def test_the_connection_cannot_read_outside_the_workspace(indexed, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(duckdb.Error):
        indexed[0].frame(f"SELECT * FROM read_csv('{secret}')")
    with pytest.raises(duckdb.Error):
        indexed[0].frame("DROP TABLE idx.feature")


def test_a_killed_build_goes_on_at_its_next_shard_and_an_old_index_stays_readable(
    tmp_path: Path, monkeypatch
) -> None:
    store, _ = make_store(tmp_path, LENGTHS, d=D)
    sae, real, written = make_sae(), encoding.write_codes, []

    def stop_at_third(folder, shard, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        real(folder, shard, *rest)

    monkeypatch.setattr(encoding, "write_codes", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build_index(sae, store)
    with pytest.raises(MissingDataError):
        FeatureIndex.open(tmp_path)
    monkeypatch.setattr(
        encoding, "write_codes", lambda folder, shard, *r: (written.append(shard), real(folder, shard, *r))
    )
    folder = build_index(sae, store)
    assert sorted(written) == list(range(len(store.shards)))
    assert read_json(folder / "current.json")["file"] == "features-1.duckdb"
    before = FeatureIndex.open(tmp_path).feature(1)["n_fire"]
    (folder / "current.json").unlink()
    build_index(sae, store)
    assert read_json(folder / "current.json")["file"] == "features-2.duckdb"
    assert FeatureIndex.open(tmp_path).feature(1)["n_fire"] == before


@pytest.mark.parametrize("per_row", [[3, 0, 5, 1, 0, 0, 7, 2], [0] * 6, [40], [0, 12, 0], [4, 4, 4]])
@pytest.mark.parametrize("size", [(4, 3), (64, 16_384)])
def test_codes_of_varying_l0_come_back_row_by_row(
    per_row: list[int], size, tmp_path: Path, monkeypatch
) -> None:
    """However rows fall on pages and row groups, and with rows that were left out between them."""
    monkeypatch.setattr(code_files, "BLOCK", size[0])
    monkeypatch.setattr(code_files, "GROUP_BLOCKS", size[1])
    rng = np.random.default_rng(0)
    counts, n = np.array(per_row), sum(per_row)
    ids, values = rng.integers(0, 99, n), rng.normal(size=n).astype(np.float16).astype(np.float32)
    at, ends = np.arange(len(counts)) * 2 + 1, np.cumsum(counts)

    def parts():
        for i in range(len(counts)):
            own = slice(ends[i] - counts[i], ends[i])
            yield Part(at[i : i + 1], counts[i : i + 1], ids[own], values[own])

    rows = 2 * len(counts) + 1
    code_files.write_varying(tmp_path, 0, 1000, rows, parts, 99)
    blocks = list(code_files.read_codes(tmp_path, [0]))
    got = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    assert got[0].tolist() == (1000 + at.repeat(counts)).tolist()
    assert got[1].tolist() == ids.tolist() and got[2].tolist() == values.tolist()
    assert max(len(b.ids) for b in blocks) <= size[0] * size[1]
    assert code_files.encoded_rows(tmp_path, [0]) == len(counts)


def test_codes_too_large_for_float16_are_kept_in_float32(tmp_path: Path) -> None:
    part = Part(
        np.array([0, 1]), np.array([1, 2]), np.array([3, 4, 5]), np.array([1.5, 7e5, -2.0], np.float32)
    )
    code_files.write_varying(tmp_path, 0, 0, 2, lambda: [part], 99)
    (block,) = code_files.read_codes(tmp_path, [0])
    assert block.values.tolist() == [1.5, 7e5, -2.0]
    assert read_json(tmp_path / "shard-00000.json")["values"] == "float32"


def test_damaged_counts_of_varying_codes_are_refused_with_the_file_named(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LENGTHS, d=D)
    folder = build_index(make_sae("jumprelu"), store)
    counts = folder / "codes" / "shard-00001-counts.parquet"
    table = pq.read_table(counts)
    n = table["n"].to_numpy().copy()
    n[1] += 1
    pq.write_table(table.set_column(1, "n", [n]), counts)
    (folder / "current.json").unlink()
    with pytest.raises(DataError, match="shard-00001-counts"):
        build_index(make_sae("jumprelu"), store)


def test_damaged_codes_are_refused_with_the_file_named(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LENGTHS, d=D)
    folder = build_index(make_sae(), store)
    data = folder / "codes" / "shard-00000.parquet"
    raw = bytearray(data.read_bytes())
    offset = read_json(folder / "codes" / "shard-00000.json")["groups"][0]["pages"]["values"]["offset"]
    raw[offset] ^= 1
    data.write_bytes(raw)
    (folder / "current.json").unlink()
    with pytest.raises(DataError, match="shard-00000"):
        build_index(make_sae(), store)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_small_blocks_give_the_same_index(activation: str, tmp_path: Path, monkeypatch) -> None:
    """Rows whose codes lie across two row groups included."""
    store, _ = make_store(tmp_path / "a", LENGTHS, d=D)
    other, _ = make_store(tmp_path / "b", LENGTHS, d=D)
    build_index(make_sae(activation), store)
    monkeypatch.setattr(feature_file, "BLOCK_FIRINGS", 40)
    monkeypatch.setattr(code_files, "BLOCK", 4)
    monkeypatch.setattr(code_files, "GROUP_BLOCKS", 3)
    build_index(make_sae(activation), other)
    a, b = FeatureIndex.open(tmp_path / "a"), FeatureIndex.open(tmp_path / "b")
    for sql in (
        "SELECT * FROM idx.activation",
        "SELECT feature, n_fire, density, max_act, top_tok FROM idx.feature",
    ):
        assert a.frame(sql).equals(b.frame(sql))


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.floats(-100, 100, width=16).filter(lambda v: v != 0)),
        min_size=1,
        max_size=200,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_firings_are_ranked_and_every_example_belongs_to_its_feature(pairs) -> None:
    feature = np.array([p[0] for p in pairs], dtype=np.int64)
    value = np.array([p[1] for p in pairs], dtype=np.float32)
    f = sort_block(Firings(feature, np.arange(len(pairs)), value))
    order = np.lexsort((-value, feature))
    assert f.feature.tolist() == feature[order].tolist() and f.value.tolist() == value[order].tolist()
    runs = find_runs(f, 0, 10)
    assert runs.n.tolist() == np.bincount(feature, minlength=10).tolist()
    shown = examples(f, runs)
    for i in range(len(shown["row"])):
        row = shown["row"][i]
        assert feature[row] == shown["feature"][i] and value[row] == shown["value"][i]
        assert np.sign(value[row]) == shown["sign"][i]
    for kind in ("q0", "q4", "random"):
        for k in range(10):
            mine = shown["row"][(shown["kind"] == kind) & (shown["feature"] == k)]
            assert len(set(mine.tolist())) == len(mine)


def test_views_answer_in_sql(indexed) -> None:
    index, dense, _, _ = indexed
    con = connect(index.workspace)
    n = con.execute("SELECT sum(n_fire) FROM features").fetchone()[0]
    assert n == (dense != 0).sum()
    top = con.execute(
        "SELECT t.token, e.value FROM feature_examples e JOIN tokens t USING (corpus, row) "
        "WHERE e.feature = 0 AND e.kind = 'top' AND e.sign = 1 ORDER BY e.rank LIMIT 1"
    ).fetchone()
    best = index.examples(0, n=1)[0]
    assert top == (best.tokens[best.centre], best.value)


def test_labels_are_events_and_the_latest_wins(tmp_path: Path) -> None:
    for text, author in (("one", "ada"), ("two", "bob"), ("other pole", "ada")):
        add_label(tmp_path, sae_id="s", feature=3, text=text, author=author, sign=-1 if "pole" in text else 1)
    labels = current_labels(tmp_path, "s")
    assert labels[("s", 3, 1)]["text"] == "two" and labels[("s", 3, -1)]["text"] == "other pole"
    add_label(tmp_path, sae_id="s", feature=3, text="", author="bob")
    assert ("s", 3, 1) not in current_labels(tmp_path, "s")
    assert len(label_events(tmp_path)) == 4
    with (tmp_path / "annotations" / "ada.jsonl").open("a") as f:
        f.write('{"sae_id": "s", "feat')
    assert len(label_events(tmp_path)) == 4
    with pytest.raises(UsageError):
        add_label(tmp_path, sae_id="s", feature=3, text="x" * 501)


def test_a_label_is_found_and_shown(indexed) -> None:
    index = indexed[0]
    add_label(index.workspace, sae_id=index.sae_id, feature=4, text="Calendar <b>systems</b>")
    frame, total = index.list_features("calendar", mode="label", alive=False)
    assert total == 1 and frame["label"][0] == "Calendar <b>systems</b>"
    assert index.feature(4)["labels"][1]["method"] == "hand"
