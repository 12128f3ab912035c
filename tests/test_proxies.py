"""Interpretability proxies: they tell features that follow the text from the same features at shuffled places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cache import connect
from cache.errors import MissingDataError
from cache.workspace import read_json, write_json
from saes import proxies, proxy_measures
from saes.proxies import MEASURES, build_proxies, choose, compute_proxies
from saes.queries import FeatureIndex
from tests.planted import VOCAB, Planted, build_planted
from tests.test_cli import run


@pytest.fixture(scope="module", params=[False, True], ids=["one-sided", "signed"])
def planted(request, tmp_path_factory) -> Planted:
    return build_planted(tmp_path_factory.mktemp("planted"), signed=request.param)


@pytest.fixture(scope="module")
def frame(planted) -> pd.DataFrame:
    return compute_proxies(planted.index)


def truth(planted: Planted, frame: pd.DataFrame) -> np.ndarray:
    return np.array([planted.clean[(f, s)] for f, s in zip(frame["feature"], frame["sign"])])


@pytest.mark.parametrize("measure", ["proxy_score", "detection", "intruder", "weighted"])
def test_clean_poles_are_told_from_shuffled_ones(planted, frame, measure: str) -> None:
    known = frame[measure].notna()
    assert known.sum() >= 28
    assert roc_auc_score(truth(planted, frame)[known], frame[measure][known]) >= 0.9


def test_shuffled_poles_score_as_chance_does(planted, frame) -> None:
    shuffled = frame[~truth(planted, frame)]
    assert shuffled["detection"].mean() == pytest.approx(0.5, abs=0.07)
    assert shuffled["intruder"].mean() == pytest.approx(0.2, abs=0.07)
    assert shuffled["coherence"].mean() == pytest.approx(0, abs=0.6)
    assert frame["proxy_score"].dropna().between(1, 5).all() and shuffled["proxy_score"].max() < 2.2


def test_each_kind_of_meaning_has_a_proxy_that_sees_it(planted, frame) -> None:
    plus = frame[frame["sign"] == 1].set_index("feature")
    assert (
        (plus["word_f1"][:8] == 1).all()
        and (plus["entropy"][:8] == 0).all()
        and (plus["top_share"][:8] == 1).all()
    )
    assert (plus["before_f1"][8:12] == 1).all() and (plus["word_f1"][8:12] < 0.2).all()
    topics = plus.loc[12:15].dropna(subset=["coherence"])
    assert len(topics) >= 3 and (topics["coherence"] > 10).all() and (topics["word_f1"] < 0.3).all()
    assert (plus["coherence"][8:12] < 4).all(), "the words around a common word have nothing in common"


def test_rules_equal_brute_force(planted, frame) -> None:
    corpus = planted.index.corpus
    tok, usable = corpus.column("tok"), corpus.column("pos") > 0
    sign = frame["sign"].to_numpy()
    for i, f in enumerate(frame["feature"]):
        fires = planted.values[:, f] * sign[i] > 0
        assert frame["n"][i] == fires.sum()
        best = max(
            2 * (fires & (tok == t)).sum() / (fires.sum() + (usable & (tok == t)).sum())
            for t in range(len(VOCAB))
        )
        assert frame["word_f1"][i] == pytest.approx(best)
        mass = np.bincount(tok[fires], weights=np.abs(planted.values[fires, f]))
        assert frame["top_share"][i] == pytest.approx(mass.max() / mass.sum(), rel=1e-4)


def test_small_blocks_give_the_same_table(planted, frame, monkeypatch) -> None:
    monkeypatch.setattr(proxies, "BLOCK_FIRINGS", 300)
    same = [
        "feature",
        "sign",
        "n",
        "word_f1",
        "before_f1",
        "entropy",
        "top_share",
        "coherence",
        "detection",
        "weighted",
    ]
    pd.testing.assert_frame_equal(compute_proxies(planted.index)[same], frame[same])


def test_contexts_are_of_different_documents_and_span_all_strengths() -> None:
    doc = np.repeat(np.arange(40), 5)
    picks = choose(doc)
    assert len(picks) == proxies.WINDOWS and len(set(doc[picks])) == len(picks)
    assert (picks[:8] < 40).all() and picks.max() > 150
    assert len(choose(np.zeros(50, dtype=int))) == 1


def test_a_pole_that_hardly_fires_is_not_judged(planted, monkeypatch) -> None:
    monkeypatch.setattr(proxies, "MIN_FIRINGS", 150)
    frame = compute_proxies(planted.index)
    few = frame["n"] < 150
    assert few.any() and frame.loc[few, list(MEASURES)].isna().all(axis=None)
    assert frame.loc[~few, "proxy_score"].notna().all()


def test_words_of_the_lens_are_held_against_the_text() -> None:
    vocab, tok = [" a", "A", "b", "c"], np.array([0, 2, 3, 1, 2, 3], dtype=np.int32)
    seq = np.array([0, 0, 0, 1, 1, 1])
    words = proxy_measures.read_words(tok, vocab, seq, seq, np.array([0, 1, 2, 0, 1, 2]))
    assert words.word.tolist() == [0, 1, 2, 0, 1, 2], "' a' and 'A' are one word"
    row, size = np.array([1, 4]), np.array([1.0, 2.0])
    assert proxies._lens(row, size, np.array([1]), words) == (1.0, -0.5)
    assert proxies._lens(row, size, np.array([2, 0]), words) == (0.0, 1.0 - 0.5)


def test_the_table_is_kept_named_and_asked_for_in_sql(tmp_path: Path, capsys) -> None:
    index = build_planted(tmp_path / "w").index
    w = ["-w", str(index.workspace)]
    with pytest.raises(MissingDataError, match="atomscope feature proxies"):
        index.list_features(sort="proxy_score")
    assert connect(index.workspace).sql("SELECT count(*) FROM proxies").fetchall() == [(0,)]
    code, out, _ = run(capsys, "feature", "proxies", *w, "--limit", "3", "--json")
    best = json.loads(out.rsplit("\n3 of", 1)[0])
    assert code == 0 and len(best) == 3 and all(r["feature"] < 16 for r in best)
    record = build_proxies(index)
    assert read_json(record)["file"] == "proxies-1.parquet", "a finished table is reused"
    listed, total = index.list_features(sort="proxy_score", limit=40)
    assert total == 32 and listed["feature"][0] == best[0]["feature"]
    assert listed["proxy_score"].dropna().is_monotonic_decreasing and listed["proxy_score"].isna().sum() == 1
    assert np.isnan(listed["proxy_score"].iloc[-1]), "what cannot be judged comes last"
    top = "SELECT max(proxy_score) FROM proxies WHERE NOT isnan(proxy_score)"
    assert connect(index.workspace).sql(top).fetchall()[0][0] == pytest.approx(
        best[0]["proxy_score"], abs=1e-6
    )
    code, out, _ = run(capsys, "feature", "proxies", "4", *w)
    assert code == 0 and "word_f1" in out and "1.000" in out
    assert run(capsys, "feature", "proxies", "99", *w)[0] == 3
    code, out, _ = run(capsys, "feature", "list", "--sort", "proxy_score", *w)
    assert code == 0 and "proxy_score" in out
    write_json(record, read_json(record) | {"index": "features-0.duckdb"})
    again = FeatureIndex.open(index.workspace)
    with pytest.raises(MissingDataError, match="no interpretability proxies"):
        again.proxies()
    build_proxies(again)
    assert read_json(record)["file"] == "proxies-2.parquet" and len(again.proxies()) == 32
