"""An index of a store that grows, is killed, or is very wide: the same answers as a build from nothing, and no work twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cache import connect
from cache.errors import MissingDataError, UsageError
from cache.store import ActivationStore
from cache.workspace import read_json
from saes import encoding, feature_file, indexing, token_table
from saes.config import SAEConfig
from saes.indexing import build_index
from saes.queries import FeatureIndex
from saes.ranking import TOP, Firings, examples, find_runs, sort_block
from saes.sae import SAE
from tests.corpora import HOOK, empty_store, fill, make_corpus, make_store, random_vectors
from tests.test_index import LENGTHS, D, F, make_sae

TABLES = {
    "feature": "feature", "activation": "feature, value DESC, row", "neighbour": "feature, other",
    "feature_example": "feature, kind, sign, rank", "token_feature": "tok, feature", "rare_token": "tok, row",
}  # fmt: skip


def some_of(store: ActivationStore, x: torch.Tensor, shards: list[int]) -> None:
    with store.writer() as writer:
        for i in shards:
            _, _, row0, row1 = store.shards[i]
            writer.submit(i, HOOK, x[row0:row1])


def assert_same_index(a: FeatureIndex, b: FeatureIndex) -> None:
    for table, order in TABLES.items():
        mine, theirs = (i.frame(f"SELECT * FROM idx.{table} ORDER BY {order}") for i in (a, b))
        assert len(mine) == len(theirs), table
        for column in mine:
            left, right = mine[column].tolist(), theirs[column].tolist()
            assert str(left) == str(right), (table, column)
    assert {k: a.meta[k] for k in ("n_tokens", "shards")} == {k: b.meta[k] for k in ("n_tokens", "shards")}


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Row ids that go through the encoder."""
    rows: list[int] = []
    real = encoding._encoded

    def counting(sae, store, hook, row0, row1, skip):
        for part in real(sae, store, hook, row0, row1, skip):
            rows.extend((part.at + row0).tolist())
            yield part

    monkeypatch.setattr(encoding, "_encoded", counting)
    return rows


@pytest.mark.parametrize("activation", ["topk", "batch_abs_topk"])
def test_shards_that_come_later_are_added_and_the_index_equals_one_built_at_once(
    activation: str, tmp_path: Path, encoded: list[int]
) -> None:
    full, vectors = make_store(tmp_path / "full", LENGTHS, d=D)
    sae = make_sae(activation)
    build_index(sae, full)
    encoded.clear()
    store = empty_store(tmp_path / "grows", make_corpus(tmp_path / "grows", LENGTHS))
    # not in order, so that later rows come first
    some_of(store, vectors[HOOK], [0, 3])
    with pytest.raises(MissingDataError):
        build_index(sae, store)
    folder = build_index(sae, store, partial=True)
    early = FeatureIndex.open(tmp_path / "grows")
    first, covered = list(encoded), {s for s, _ in early.meta["shards"]}
    assert covered == {0, 3}
    rows = early.frame("SELECT row FROM idx.activation")["row"]
    inside = [store.shards[s][2:] for s in covered]
    assert all(any(a <= r < b for a, b in inside) for r in rows)
    assert build_index(sae, store, partial=True) == folder and encoded == first

    fill(store, vectors)
    build_index(sae, store)
    late = encoded[len(first) :]
    assert late and not set(late) & set(first)
    grown = FeatureIndex.open(tmp_path / "grows")
    assert grown.meta["file"] == "features-2.duckdb"
    assert_same_index(grown, FeatureIndex.open(tmp_path / "full"))
    # who opened the index before goes on reading what it opened
    assert early.frame("SELECT count(*) AS n FROM idx.activation")["n"][0] == len(rows)
    assert early.examples(0, n=3)


def test_a_longer_corpus_of_the_same_texts_takes_over_the_codes_it_shares(
    tmp_path: Path, encoded: list[int]
) -> None:
    """Shards whose vectors are the same bytes; the one that ends in the middle of the longer one's is made again."""
    sae, more = make_sae(), [*LENGTHS, 25, 31, 40]
    short, long = (make_corpus(tmp_path, lengths) for lengths in (LENGTHS, more))
    x = random_vectors(long.n_tokens, D)
    a, b = empty_store(tmp_path, short), empty_store(tmp_path, long)
    fill(a, {HOOK: x[: short.n_tokens]}, group_rows=16)
    fill(b, {HOOK: x}, group_rows=16)
    build_index(sae, a)
    encoded.clear()
    folder = build_index(sae, b)
    shared = [s for s in range(len(a.shards)) if a.shards[s] == b.shards[s]]
    assert len(shared) >= 3
    assert not any(b.shards[s][2] <= r < b.shards[s][3] for r in encoded for s in shared)
    other, _ = make_store(tmp_path / "alone", more, d=D)
    assert torch.equal(other.rows(HOOK, range(50)), x[:50])
    build_index(sae, other)
    assert_same_index(FeatureIndex(folder, tmp_path), FeatureIndex.open(tmp_path / "alone"))


def test_vectors_that_changed_are_encoded_again(tmp_path: Path, encoded: list[int]) -> None:
    sae = make_sae()
    corpora = [make_corpus(tmp_path, lengths) for lengths in (LENGTHS, [*LENGTHS, 25])]
    for i, corpus in enumerate(corpora):
        encoded.clear()
        store = empty_store(tmp_path, corpus)
        fill(store, {HOOK: random_vectors(corpus.n_tokens, D, seed=i)})
        build_index(sae, store)
        assert len(encoded) == (corpus.column("pos") > 0).sum()


_KILLED = """
import os, signal, sys
from saes import encoding, indexing, feature_file
from cache.store import ActivationStore
from tests.test_index import make_sae

where, path = sys.argv[1:]
left = [2]

def die(real):
    def run(*a, **k):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    return run

if where == "codes":
    encoding.write_codes = die(encoding.write_codes)
else:
    left[0] = 0
    feature_file._add_geometry = die(feature_file._add_geometry)
indexing.build_index(make_sae(), ActivationStore.open(path))
"""


@pytest.mark.parametrize("where", ["codes", "database"])
def test_kill_9_costs_the_shard_at_hand_and_nothing_else(
    where: str, tmp_path: Path, encoded: list[int]
) -> None:
    store, _ = make_store(tmp_path / "killed", LENGTHS, d=D)
    run = [sys.executable, "-c", _KILLED, where, str(store.path)]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": "."}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with pytest.raises(MissingDataError):
        FeatureIndex.open(tmp_path / "killed")
    build_index(make_sae(), store)
    kept = store.shards[1][3] if where == "codes" else store.meta["n_rows"]
    assert all(r >= kept for r in encoded)
    other, _ = make_store(tmp_path / "whole", LENGTHS, d=D)
    build_index(make_sae(), other)
    assert_same_index(FeatureIndex.open(tmp_path / "killed"), FeatureIndex.open(tmp_path / "whole"))


def test_an_index_of_131072_latents_keeps_their_ids(tmp_path: Path, monkeypatch) -> None:
    """Past 65,536 ids need 32 bits in the codes and more than one range of features in the sort."""
    wide = 131_072
    none = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    monkeypatch.setattr(feature_file, "neighbours", lambda w: none)  # quadratic; tested where it is small
    store, vectors = make_store(tmp_path, LENGTHS, d=D)
    sae = SAE(SAEConfig(d_sae=wide, k=4, d_model=D, hook=HOOK, model="tiny")).requires_grad_(False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(0)))
        sae.W_dec.copy_(sae.W_enc)
    folder = build_index(sae, store)
    assert read_json(folder / "codes" / "shard-00000.json")["ids"] == "uint32"
    index = FeatureIndex.open(tmp_path)
    dense = sae.encode(vectors[HOOK]).dense(wide)
    dense[torch.from_numpy(store.corpus.column("pos") == 0)] = 0
    fires = (dense != 0).sum(0).numpy()
    assert (fires[2**16 :] > 0).any() and (fires[: 2**16] > 0).any()
    found = index.frame("SELECT feature, n_fire FROM idx.feature ORDER BY feature")
    assert found["feature"].tolist() == list(range(wide)) and found["n_fire"].tolist() == fires.tolist()
    last = int(np.flatnonzero(fires)[-1])
    best = index.examples(last, n=1)[0]
    assert best.row == int(dense[:, last].argmax()) and best.values[best.centre] == best.value
    doc = int(store.corpus.column("doc")[best.row])
    assert last in index.document_features(doc, limit=10_000)["feature"].tolist()


@pytest.mark.parametrize("frequent", [1, 58, 10_000])
@pytest.mark.parametrize("activation", ["abs_topk", "jumprelu"])
def test_tokens_and_documents_give_the_same_features_from_the_table_and_from_the_codes(
    frequent: int, activation: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(token_table, "FREQUENT", frequent)
    monkeypatch.setattr(feature_file, "FREQUENT", frequent)
    monkeypatch.setattr(feature_file, "BLOCK_FIRINGS", 100)
    store, vectors = make_store(tmp_path, LENGTHS, d=D)
    sae = make_sae(activation)
    build_index(sae, store)
    index = FeatureIndex.open(tmp_path)
    dense = sae.encode(vectors[HOOK]).dense(F)
    dense[torch.from_numpy(store.corpus.column("pos") == 0)] = 0
    z = dense.half().float().numpy()
    tok, doc = store.corpus.column("tok"), store.corpus.column("doc")
    tabled = index.frame("SELECT count(DISTINCT tok) AS n FROM idx.token_feature")["n"][0]
    assert tabled == (np.bincount(tok) >= frequent).sum()
    view = connect(tmp_path).execute("SELECT * FROM feature_tokens").df()
    for t in range(6):
        want = brute(z[tok == t])
        assert as_rows(index.token_features(t, limit=100)) == want
        assert as_rows(view[view["tok"] == t]) == want
    for d in range(store.corpus.n_docs):
        assert as_rows(index.document_features(d, limit=100)) == brute(z[doc == d])
    with pytest.raises(MissingDataError, match="documents 0 to"):
        index.document_features(store.corpus.n_docs)


def brute(z: np.ndarray) -> set[tuple[float, ...]]:
    return {
        (f, (c != 0).sum(), round(float(max(c.max(), 0)), 4), round(float(min(c.min(), 0)), 4),
         round(float(np.abs(c).sum()), 2))
        for f, c in enumerate(z.T) if c.any()
    }  # fmt: skip


def as_rows(frame) -> set[tuple[float, ...]]:
    columns = zip(*(frame[c] for c in ("feature", "n", "max_act", "min_act", "mass")), strict=True)
    return {(f, n, round(a, 4), round(b, 4), round(m, 2)) for f, n, a, b, m in columns}


def test_activations_that_float16_does_not_hold_are_ranked_exactly(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(feature_file, "BLOCK_FIRINGS", 40)
    corpus = make_corpus(tmp_path, LENGTHS)
    store, x = empty_store(tmp_path, corpus), random_vectors(corpus.n_tokens, D) * 1e4
    fill(store, {HOOK: x})
    sae = make_sae("abs_topk")
    build_index(sae, store)
    index, z = FeatureIndex.open(tmp_path), sae.encode(x).dense(F).numpy()
    z[corpus.column("pos") == 0] = 0
    assert np.abs(z).max() > 65_504
    for f in range(F):
        found = index.frame("SELECT row, value FROM idx.activation WHERE feature = ?", [f])
        want = np.flatnonzero(z[:, f])
        want = want[np.lexsort((want, -z[want, f]))]
        assert found["row"].tolist() == want.tolist() and found["value"].tolist() == z[want, f].tolist()


def test_histograms_count_what_numpy_counts(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LENGTHS, d=D)
    build_index(make_sae("abs_topk"), store)
    index = FeatureIndex.open(tmp_path)
    for f in range(F):
        values = index.frame("SELECT value FROM idx.activation WHERE feature = ?", [f])["value"].to_numpy()
        shown = index.histogram(f)
        if len(values):
            edges = [*shown["lo"], shown["hi"].iloc[-1]]
            want = np.histogram(values.astype(np.float64), bins=edges)[0]
            # a value within rounding of an edge may be on either side
            assert np.abs(np.cumsum(want) - np.cumsum(shown["count"])).max() <= 1
            assert shown["count"].sum() == len(values)
    shown = index.density_histogram()
    assert shown["count"].sum() == (index.densities() > 0).sum()


def test_rows_left_out_by_skip_fire_nowhere_and_another_skip_is_refused(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LENGTHS, d=D)
    sae = make_sae()
    build_index(sae, store, skip=None)
    index = FeatureIndex.open(tmp_path)
    rows = index.frame("SELECT DISTINCT row FROM idx.activation")["row"].to_numpy()
    assert (store.corpus.column("pos")[rows] == 0).any() and index.meta["n_tokens"] == store.meta["n_rows"]
    with pytest.raises(UsageError, match="skip=None"):
        build_index(sae, store, skip="first")
    assert indexing.index_path(sae, store).is_dir()


def test_of_equal_activations_the_first_rows_are_the_top_ones_of_either_pole() -> None:
    """Oracle: a sort by |value| and row. Ties are common: float16 has few values, and some features are constant."""
    g = np.random.default_rng(0)
    n = 4000
    f = Firings(
        g.integers(0, 6, n).astype(np.int32), g.permutation(n).astype(np.uint32),
        g.choice([-2.0, -1.0, -0.5, 1.0, 2.0], n).astype(np.float32),
    )  # fmt: skip
    f = Firings(*(c[f.feature != 3] for c in f))  # 3 is silent
    block = sort_block(f)
    found = examples(block, find_runs(block, 0, 7))
    kind = np.asarray(found["kind"].to_pylist())
    for feature in range(7):
        for sign in (1, -1):
            mine = (f.feature == feature) & (f.value * sign > 0)
            order = np.lexsort((f.row[mine], -np.abs(f.value[mine])))[:TOP]
            at = np.flatnonzero((kind == "top") & (found["feature"] == feature) & (found["sign"] == sign))
            at = at[np.argsort(found["rank"][at])]
            assert found["rank"][at].tolist() == list(range(len(order)))
            assert found["row"][at].tolist() == f.row[mine][order].tolist(), (feature, sign)


def test_a_mistyped_skip_does_not_bind_the_index_that_is_built_next(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LENGTHS, d=D)
    with pytest.raises(UsageError, match="fisrt"):
        build_index(make_sae(), store, skip="fisrt")
    build_index(make_sae(), store)
    assert FeatureIndex.open(tmp_path).meta["skip"] == "first"
