"""SAEs beside each other: which features two dictionaries share, and what each SAE keeps at what L0. No torch but to load.

Matching  cos[i, j] between decoder rows, |cos| where an SAE is signed (a latent and its mirror image are one).
          hungarian: the one-to-one matching with the largest total cosine, exact up to DENSE_ENTRIES pairs, past
          that over the CANDIDATES nearest rows both ways;  mutual: pairs that are each other's nearest.
Chance    mean cosine of a row with the nearest of as many random unit rows: what no sharing at all looks like.
Frontier  L0, FVU and delta CE of every evaluated SAE and its controls; best where none on the same store is better.

    comparisons/<sae_id>@<sae_id>/matching-<method>.parquet and <method>.json, which names it
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.provenance import provenance
from cache.workspace import atomic_file, read_json, write_json
from saes.queries import FeatureIndex

METHODS = ("hungarian", "mutual")
SHARES = (0.7, 0.9)
DENSE_ENTRIES = 6144**2
CANDIDATES = 32
BLOCK = 1024
SCHEMA_VERSION = 1


class Nearest(NamedTuple):
    """For each row of one dictionary: ids and sizes of the nearest rows of the other, best first, `[n, c]`."""

    ids: np.ndarray
    size: np.ndarray


def unit_rows(w: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a zero row stays zero."""
    w = np.asarray(w, dtype=np.float32)
    return w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-12)


def nearest(a: np.ndarray, b: np.ndarray, *, signed: bool, n: int = 1) -> Nearest:
    """The `n` rows of b nearest to each row of a; both have unit rows. Blocked: memory is BLOCK x len(b)."""
    n = min(n, len(b))
    ids = np.empty((len(a), n), dtype=np.int64)
    size = np.empty((len(a), n), dtype=np.float32)
    for i in range(0, len(a), BLOCK):
        cos = a[i : i + BLOCK] @ b.T
        cos = np.abs(cos) if signed else cos
        part = np.argpartition(-cos, n - 1, axis=1)[:, :n]
        values = np.take_along_axis(cos, part, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        ids[i : i + BLOCK] = np.take_along_axis(part, order, axis=1)
        size[i : i + BLOCK] = np.take_along_axis(values, order, axis=1)
    return Nearest(ids, size)


def match_decoders(
    w_a: np.ndarray, w_b: np.ndarray, *, signed: bool, method: str = "hungarian"
) -> pd.DataFrame:
    """One row a feature of either side: side, feature, match (-1: none), cos, nearest, nearest_cos, mutual.

    cos has the sign of the cosine (negative: the match is the mirror image), and is NaN without a match.
    """
    if method not in METHODS:
        raise UsageError(f"match is one of {', '.join(METHODS)}, not {method!r}")
    a, b = unit_rows(w_a), unit_rows(w_b)
    near = {"a": nearest(a, b, signed=signed, n=CANDIDATES), "b": nearest(b, a, signed=signed, n=CANDIDATES)}
    first = {side: n.ids[:, 0] for side, n in near.items()}
    mutual = {
        "a": first["b"][first["a"]] == np.arange(len(a)),
        "b": first["a"][first["b"]] == np.arange(len(b)),
    }
    if method == "mutual":
        rows = np.flatnonzero(mutual["a"])
        pairs = rows, first["a"][rows]
    else:
        pairs = _assign(a, b, near["a"], near["b"], signed)
    sides = []
    for side, mine, other, (i, j) in (("a", a, b, pairs), ("b", b, a, pairs[::-1])):
        match = np.full(len(mine), -1, dtype=np.int64)
        match[i] = j
        cos = np.full(len(mine), np.nan, dtype=np.float32)
        cos[i] = (mine[i] * other[j]).sum(1)
        sides.append(pd.DataFrame({
            "side": side, "feature": np.arange(len(mine)), "match": match, "cos": cos, "nearest": first[side],
            "nearest_cos": (mine * other[first[side]]).sum(1), "mutual": mutual[side],
        }))  # fmt: skip
    return pd.concat(sides, ignore_index=True)


def _assign(
    a: np.ndarray, b: np.ndarray, of_a: Nearest, of_b: Nearest, signed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a and b of the matching with the largest total size of cosine; every pair has size > 0."""
    from scipy.optimize import linear_sum_assignment

    if len(a) * len(b) <= DENSE_ENTRIES:
        cos = a @ b.T
        i, j = linear_sum_assignment(np.abs(cos) if signed else cos, maximize=True)
        keep = (np.abs(cos[i, j]) if signed else cos[i, j]) > 0
        return i[keep], j[keep]
    return _assign_sparse(len(a), len(b), of_a, of_b)


def _assign_sparse(n_a: int, n_b: int, of_a: Nearest, of_b: Nearest) -> tuple[np.ndarray, np.ndarray]:
    """The same over the candidate pairs alone; a column of its own for each row of a stands for `no match`."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    i = np.concatenate([np.repeat(np.arange(n_a), of_a.ids.shape[1]), of_b.ids.ravel()])
    j = np.concatenate([of_a.ids.ravel(), np.repeat(np.arange(n_b), of_b.ids.shape[1])])
    size = np.concatenate([of_a.size.ravel(), of_b.size.ravel()]).astype(np.float64)
    _, once = np.unique(i * n_b + j, return_index=True)
    once = once[size[once] > 0]
    i, j, cost = i[once], j[once], 2.0 - size[once]  # a cost of 0 would read as no edge
    alone = np.arange(n_a)
    graph = coo_matrix(
        (np.concatenate([cost, np.full(n_a, 2.0)]), (np.concatenate([i, alone]), np.concatenate([j, n_b + alone]))),
        shape=(n_a, n_b + n_a),
    )  # fmt: skip
    rows, columns = min_weight_full_bipartite_matching(graph.tocsr())
    matched = columns < n_b
    return rows[matched], columns[matched]


def chance_cos(w_a: np.ndarray, n_b: int, *, signed: bool, seed: int = 0) -> float:
    """Mean nearest cosine of the rows of w_a to `n_b` random unit rows."""
    a = unit_rows(w_a)
    random = unit_rows(np.random.default_rng(seed).standard_normal((n_b, a.shape[1]), dtype=np.float32))
    return float(nearest(a, random, signed=signed).size.mean())


def summarise(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Of each side: features counted (those that fire, where that is known), mean |cos|, shares above SHARES, mutual.

    A feature without a match counts as one below every threshold, and is left out of the mean.
    """
    out = {}
    for side, part in frame.groupby("side"):
        part = part[part["density"] > 0] if part["density"].notna().all() else part
        size = part["cos"].abs()
        shares = {f"over_{s}": float((size > s).mean()) if len(part) else 0.0 for s in SHARES}
        out[str(side)] = {
            "n": len(part), "mean_cos": float(size.mean()) if size.notna().any() else 0.0,
            "mean_nearest": float(part["nearest_cos"].abs().mean()) if len(part) else 0.0,
            "mutual": float(part["mutual"].mean()) if len(part) else 0.0,
        } | shares  # fmt: skip
    return out


def stability(frame: pd.DataFrame, side: str = "a", *, step: float = 0.5) -> pd.DataFrame:
    """Matched |cos| against density: lo, hi (log10 density), n, median, over_0.7 of the features of each bin."""
    part = frame[(frame["side"] == side) & (frame["density"] > 0)]
    bins = np.floor(np.log10(part["density"].to_numpy(dtype=float)) / step).astype(int)
    rows = []
    for b in np.unique(bins):
        size = part["cos"].abs().fillna(0.0).to_numpy()[bins == b]
        rows.append(
            (b * step, (b + 1) * step, len(size), float(np.median(size)), float((size > SHARES[0]).mean()))
        )
    return pd.DataFrame(rows, columns=["lo", "hi", "n", "median", f"over_{SHARES[0]}"])


# ---- two SAEs of a workspace ----


def compare_saes(
    workspace: Path, folder_a: Path, folder_b: Path, *, method: str = "hungarian"
) -> dict[str, Any]:
    """Match two SAE folders, keep the table in the workspace, and return its record.

    Raises UsageError for the same SAE twice and DataError where the decoders live in different spaces.
    """
    from saes.sae import SAE

    started = time.time()
    pair = sorted(((SAE.load(f), f) for f in (folder_a, folder_b)), key=lambda p: p[0].sae_id)
    (a, _), (b, _) = pair
    _check_pair(a, b)
    signed = a.cfg.signed or b.cfg.signed
    w_a, w_b = (s.W_dec.detach().cpu().numpy() for s in (a, b))
    frame = match_decoders(w_a, w_b, signed=signed, method=method)
    densities = [_density(workspace, s.sae_id, s.cfg.d_sae) for s in (a, b)]
    frame["density"] = np.concatenate(densities)
    folder = workspace / "comparisons" / f"{a.sae_id}@{b.sae_id}"
    file = folder / f"matching-{method}.parquet"
    with atomic_file(file) as tmp:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), tmp)
    record = {
        "schema_version": SCHEMA_VERSION, "a": _describe(*pair[0]), "b": _describe(*pair[1]), "method": method,
        "signed": signed, "file": file.name, "sides": summarise(frame),
        "chance": chance_cos(w_a, len(w_b), signed=signed), "provenance": provenance(started=started),
    }  # fmt: skip
    write_json(folder / f"{method}.json", record)
    return record


def _check_pair(a: Any, b: Any) -> None:
    if a.sae_id == b.sae_id:
        raise UsageError(f"both names stand for SAE {a.sae_id}: give two different SAEs")
    for what, left, right in (
        ("d_model", a.cfg.d_model, b.cfg.d_model),
        ("the model", a.cfg.model_sha or a.cfg.model, b.cfg.model_sha or b.cfg.model),
    ):
        if left != right and left and right:
            raise DataError(
                f"{a.sae_id} and {b.sae_id} differ in {what} ({str(left)[:40]}, {str(right)[:40]}): their decoder rows "
                "are directions in different spaces, compare SAEs of one model"
            )


def _density(workspace: Path, sae_id: str, d_sae: int) -> np.ndarray:
    """Share of tokens on which each feature fires, NaN where the SAE has no index."""
    try:
        index = FeatureIndex.open(workspace, sae_id)
    except MissingDataError:
        return np.full(d_sae, np.nan)
    try:
        return index.frame("SELECT density FROM idx.feature ORDER BY feature")["density"].to_numpy(
            dtype=float
        )
    finally:
        index.close()


def _describe(sae: Any, folder: Path) -> dict[str, Any]:
    cfg, run = sae.cfg, folder.parent / "run.json"
    record = read_json(run) if run.is_file() else {}
    return {
        "sae_id": sae.sae_id, "name": cfg.label, "run": folder.parent.name if record else None, "hook": cfg.hook,
        "model": cfg.model, "activation": cfg.activation, "d_sae": cfg.d_sae,
        "seed": record.get("train", {}).get("seed"),
    }  # fmt: skip


def find_comparisons(workspace: Path) -> list[dict[str, Any]]:
    """Records of all comparisons, the newest first, each with its `folder`."""
    found = [
        read_json(p) | {"folder": str(p.parent)}
        for method in METHODS
        for p in workspace.glob(f"comparisons/*/{method}.json")
    ]
    return sorted(found, key=lambda r: r["provenance"]["created"], reverse=True)


def read_matching(record: dict[str, Any]) -> pd.DataFrame:
    """The table of a comparison: one row a feature of either side."""
    path = Path(record["folder"]) / record["file"]
    try:
        return pq.read_table(path).to_pandas()
    except FileNotFoundError:
        raise MissingDataError(f"{path} is gone: run `atomscope compare` on the two SAEs again") from None
    except (OSError, pa.ArrowInvalid) as e:
        raise DataError(f"{path} is damaged ({e}): run `atomscope compare` on the two SAEs again") from None


# ---- all evaluated SAEs ----

_MEASURES = ("l0", "fvu", "fvu_usual", "delta_ce", "kl", "ce_recovered_mean", "alive")
_NAMES = ("name", "run", "activation", "d_sae", "k", "seed", "tokens")


def frontier(workspace: Path) -> pd.DataFrame:
    """L0, FVU and delta CE of every evaluated SAE and its controls, best_fvu and best_ce marking the Pareto frontiers.

    Only SAEs on the same rows (store, hook, skip) are held against each other. PCA counts as an L0 of its number of components.
    """
    names, rows = _sae_names(workspace), []
    for path in sorted(workspace.glob("evaluations/*.parquet")):
        try:
            table = pq.read_table(path).to_pandas()
        except (OSError, pa.ArrowInvalid) as e:
            raise DataError(
                f"{path} is damaged ({e}): delete it and run `atomscope evaluate` again"
            ) from None
        if (table["subject"] == "untrained").any():  # `random` is what it was called before
            table = table[table["subject"] != "random"]
        rows += _evaluated(table.replace({"subject": {"random": "untrained"}}), names)
    columns = ["sae_id", "subject", *_NAMES, "store", "hook", "skip", *_MEASURES, "ci_low", "ci_high"]
    frame = pd.DataFrame(rows, columns=columns)
    for mark, measure in (("best_fvu", "fvu"), ("best_ce", "delta_ce")):
        frame[mark] = False
        for _, group in frame[frame["subject"] == "sae"].groupby(["store", "hook", "skip"]):
            frame.loc[group.index, mark] = _undominated(group["l0"], group[measure])
    return frame.sort_values(["store", "hook", "l0", "fvu"]).reset_index(drop=True)


def _evaluated(table: pd.DataFrame, names: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (sae_id, store, hook, subject), part in table.groupby(["sae_id", "store", "hook", "subject"]):
        if subject == "model" or subject.startswith("atoms:"):
            continue
        values = part.drop_duplicates("metric").set_index("metric")
        skip = values["skip"].get("fvu") if "skip" in values else None  # older files do not say it
        row: dict[str, Any] = {"sae_id": sae_id, "subject": subject, "store": store, "hook": hook}
        row["skip"] = skip if isinstance(skip, str) else "first"
        row |= names.get(sae_id, {"name": sae_id})
        row |= {m: float(values["value"][m]) for m in _MEASURES if m in values.index}
        if "delta_ce" in values.index:
            row |= {c: values[c]["delta_ce"] for c in ("ci_low", "ci_high")}
        if subject.startswith("pca-"):
            row["l0"] = float(subject.removeprefix("pca-"))
        rows.append(row)
    return rows


def _undominated(x: pd.Series, y: pd.Series) -> np.ndarray:
    """Points for which no other is at most as large in both and smaller in one."""
    a, b = x.to_numpy(dtype=float), y.to_numpy(dtype=float)
    known = np.isfinite(a) & np.isfinite(b)
    better = (
        (a[None] <= a[:, None]) & (b[None] <= b[:, None]) & ((a[None] < a[:, None]) | (b[None] < b[:, None]))
    )
    return known & ~(better & known[None]).any(1)


def _sae_names(workspace: Path) -> dict[str, dict[str, Any]]:
    """What the runs of a workspace say of each sae_id."""
    out: dict[str, dict[str, Any]] = {}
    for path in sorted(workspace.glob("saes/*/*/cfg.json")):
        try:
            meta, run = read_json(path).get("metadata") or {}, read_json(path.parent.parent / "run.json")
        except AtomscopeError:
            continue  # a run that has not finished, or a folder that is no run
        cfg = dict(zip(run["saes"], run["configs"], strict=True)).get(path.parent.name, {})
        out[str(meta.get("sae_id"))] = {
            "name": meta.get("name") or path.parent.name, "run": path.parent.parent.name, "k": cfg.get("k") or None,
            "activation": cfg.get("activation"), "d_sae": cfg.get("d_sae"), "seed": run["train"]["seed"],
            "tokens": run["tokens"],
        }  # fmt: skip
    return out
