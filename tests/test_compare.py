"""Comparison of SAEs: planted matchings are found, controls are where they belong, frontiers are frontiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app import figures
from cache.errors import DataError, MissingDataError, UsageError
from saes import compare
from saes.compare import chance_cos, compare_saes, find_comparisons, frontier, match_decoders, read_matching
from saes.config import SAEConfig
from saes.sae import SAE
from tests.test_cli import run

if TYPE_CHECKING:
    from tests.workspaces import TinyWorkspace

pytest_plugins = ("tests.workspaces",)


def planted(n: int, d: int, *, flip: bool, noise: float = 0.0, seed: int = 0):
    """(a, b, where): row where[j] of a is row j of b, perhaps mirrored and with noise."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d))
    where = rng.permutation(n)
    sign = np.where(rng.random(n) < 0.5, -1.0, 1.0) if flip else np.ones(n)
    b = a[where] * sign[:, None] * rng.uniform(0.5, 2, size=(n, 1)) + noise * rng.normal(size=(n, d))
    return a, b, where


@pytest.mark.parametrize("method", ["hungarian", "mutual"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dense", [True, False])
def test_a_planted_permutation_is_found_whatever_the_signs_and_norms(
    method, signed, dense, monkeypatch
) -> None:
    if not dense:
        monkeypatch.setattr(compare, "DENSE_ENTRIES", 0)
    a, b, where = planted(80, 24, flip=signed, noise=0.05)
    frame = match_decoders(a, b, signed=signed, method=method)
    of_a, of_b = (frame[frame["side"] == s].set_index("feature") for s in "ab")
    assert of_b["match"].tolist() == where.tolist()
    assert (of_b["match"][of_a["match"].to_numpy()].to_numpy() == of_a.index).all(), (
        "both sides tell one matching"
    )
    assert (frame["cos"].abs() > 0.97).all() and frame["mutual"].all()
    assert (frame["cos"] < 0).any() == signed, "a mirrored match has a negative cosine"


def test_a_mirrored_row_is_no_match_for_one_sided_saes() -> None:
    a = np.eye(6)
    frame = match_decoders(a, -a, signed=False)
    assert (frame["match"] == -1).all() and frame["cos"].isna().all()
    assert (match_decoders(a, -a, signed=True)["cos"] == -1).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_any_two_dictionaries_get_the_best_one_to_one_matching(n_a: int, n_b: int, seed: int) -> None:
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n_a, 5)), rng.normal(size=(n_b, 5))
    size = np.abs(compare.unit_rows(a) @ compare.unit_rows(b).T)
    i, j = linear_sum_assignment(size, maximize=True)
    near = compare.nearest(compare.unit_rows(a), compare.unit_rows(b), signed=True, n=32)
    back = compare.nearest(compare.unit_rows(b), compare.unit_rows(a), signed=True, n=32)
    si, sj = compare._assign_sparse(n_a, n_b, near, back)
    frame = match_decoders(a, b, signed=True)
    of_a = frame[(frame["side"] == "a") & (frame["match"] >= 0)]
    assert len(set(of_a["match"])) == len(of_a) == min(n_a, n_b)
    best = pytest.approx(size[i, j].sum(), rel=1e-5)
    assert of_a["cos"].abs().sum() == best and size[si, sj].sum() == best


def test_unrelated_dictionaries_are_at_chance_and_shared_halves_at_one_half() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(200, 32)), rng.normal(size=(200, 32))
    chance = chance_cos(a, 200, signed=False)
    frame = match_decoders(a, b, signed=False).assign(density=np.nan)
    assert compare.summarise(frame)["a"]["mean_nearest"] == pytest.approx(chance, abs=0.02)
    b[:100] = a[:100]
    shares = compare.summarise(match_decoders(a, b, signed=False).assign(density=np.nan))
    assert shares["a"]["over_0.9"] == shares["b"]["over_0.9"] == 0.5


def test_silent_features_do_not_count_and_stability_is_binned_by_density() -> None:
    frame = match_decoders(np.eye(4), np.eye(4)[[0, 1]], signed=False)
    frame["density"] = [0.0, 0.02, 0.03, 0.5, 0.1, 0.1]
    assert compare.summarise(frame)["a"] | {"n": 3} == compare.summarise(frame)["a"]
    assert compare.summarise(frame)["a"]["over_0.7"] == pytest.approx(1 / 3)
    bins = compare.stability(frame, "a")
    assert bins[["lo", "hi", "n"]].to_numpy().tolist() == [[-2.0, -1.5, 2], [-0.5, 0.0, 1]]
    assert bins["over_0.7"].tolist() == [0.5, 0.0]
    fig = figures.stability(frame[frame["side"] == "a"], bins)
    assert fig.layout.meta["n"] == 3 and list(fig.data[1].customdata) == [2, 1]
    hist = figures.matching_hist(frame[frame["side"] == "a"]["cos"], chance=0.2)
    assert hist.layout.meta == {"n": 2, "unit": "features", "unmatched": 2} and sum(hist.data[0].y) == 2


def saved(folder: Path, seed: int, **other: object) -> Path:
    sae = SAE(SAEConfig(**{"d_sae": 12, "k": 3, "d_model": 8, "hook": "h", "model": "m"} | other))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return sae.save(folder)


def test_a_comparison_is_kept_once_for_both_orders_and_read_back(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    first, second = compare_saes(tmp_path, a, b), compare_saes(tmp_path, b, a)
    assert first["a"] == second["a"] and len(find_comparisons(tmp_path)) == 1
    compare_saes(tmp_path, a, b, method="mutual")
    records = find_comparisons(tmp_path)
    assert {r["method"] for r in records} == {"hungarian", "mutual"}
    assert len(read_matching(records[0])) == 24
    (Path(records[0]["folder"]) / records[0]["file"]).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged"):
        read_matching(records[0])
    (Path(records[0]["folder"]) / records[0]["file"]).unlink()
    with pytest.raises(MissingDataError, match="gone"):
        read_matching(records[0])


def test_saes_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", 0)
    with pytest.raises(UsageError, match="two different"):
        compare_saes(tmp_path, a, a)
    with pytest.raises(DataError, match="d_model"):
        compare_saes(tmp_path, a, saved(tmp_path / "b", 1, d_model=6))
    with pytest.raises(DataError, match="the model"):
        compare_saes(tmp_path, a, saved(tmp_path / "c", 1, model="other"))
    with pytest.raises(UsageError, match="hungarian"):
        match_decoders(np.eye(2), np.eye(2), signed=False, method="best")


def evaluated(root: Path, sae_id: str, store: str, l0: float, fvu: float, ce: float | None = None) -> None:
    values = {("sae", "l0"): l0, ("sae", "fvu"): fvu, ("pca-3", "fvu"): fvu + 1, ("model", "ce_clean"): 3.0}
    values |= {} if ce is None else {("sae", "delta_ce"): ce}
    rows = [
        {
            "sae_id": sae_id,
            "store": store,
            "hook": "h",
            "subject": s,
            "metric": m,
            "value": v,
            "ci_low": None,
            "ci_high": None,
        }
        for (s, m), v in values.items()
    ]
    (root / "evaluations").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "evaluations" / f"{sae_id}@{store}.parquet")


def test_the_frontier_holds_what_no_other_sae_of_the_store_beats(tmp_path: Path) -> None:
    for i, (store, l0, fvu, ce) in enumerate([
        ("s", 8, 0.4, 0.9), ("s", 16, 0.3, 0.5), ("s", 16, 0.35, 0.4), ("s", 32, 0.3, None), ("t", 64, 0.9, 2.0),
    ]):  # fmt: skip
        evaluated(tmp_path, str(i), store, l0, fvu, ce)
    table = frontier(tmp_path)
    assert set(table[table["best_fvu"]]["sae_id"]) == {"0", "1", "4"}
    assert set(table[table["best_ce"]]["sae_id"]) == {"0", "2", "4"}
    pca = table[table["subject"] == "pca-3"]
    assert len(pca) == 5 and (pca["l0"] == 3).all() and not pca["best_fvu"].any()
    fig = figures.frontier(table)
    assert fig.layout.meta["n"] == 10 and [list(t.x) for t in fig.data[:2]] == [[8, 16], [64]]
    (tmp_path / "evaluations" / "x.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="damaged"):
        frontier(tmp_path)


def test_nothing_evaluated_is_an_empty_table(tmp_path: Path) -> None:
    table = frontier(tmp_path)
    assert (
        isinstance(table, pd.DataFrame) and not len(table) and figures.frontier(table).layout.meta["n"] == 0
    )


def test_the_command_matches_and_lists(tiny_workspace: TinyWorkspace, capsys) -> None:
    w = ["-w", str(tiny_workspace.path)]
    ids = [tiny_workspace.topk, tiny_workspace.abs_topk]
    code, out, _ = run(capsys, "compare", *ids, *w)
    assert code == 0 and "chance" in out and "pca-4" in out and "*" in out
    code, out, _ = run(capsys, "compare", *ids, "--match", "mutual", *w, "--json")
    value = json.loads(out)
    record = value["comparisons"][0]
    assert code == 0 and record["signed"] and 90 <= record["sides"]["a"]["n"] <= 96, "all but a few fire"
    assert record["sides"]["a"]["mean_cos"] > record["chance"], "two SAEs of one seed share more than chance"
    assert {r["name"] for r in value["frontier"]} == {"topk-96-k4", "abs-topk-96-k4"}
    code, _, err = run(capsys, "compare", ids[0], ids[0], *w)
    assert code == 2 and err.startswith("error: both names stand for")
    code, _, err = run(capsys, "compare", *ids, "--match", "best", *w)
    assert code == 2 and "hungarian, mutual" in err
