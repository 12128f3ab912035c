"""What the home page lists: stores, corpora, SAEs and their measures, from the views of `cache.connect`. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pandas as pd

from app.lookup import saved_saes
from cache.catalog import connect
from cache.errors import DataError


class Catalogue(NamedTuple):
    """Frames of everything a workspace holds."""

    saes: (
        pd.DataFrame
    )  # one row per SAE of a run: run, sae, status, activation, d_sae, k, hook, model, tokens, fvu, l0
    stores: pd.DataFrame  # one row per store and hook
    corpora: pd.DataFrame  # corpus, documents, held out, tokens
    measures: (
        pd.DataFrame
    )  # evaluations without the density histogram: sae_id, subject, metric, value, ci_low, ci_high, skip
    bytes: int  # size of the workspace


_SAES = """
SELECT r.*, m.fvu AS train_fvu, m.l0 AS train_l0, m.n_dead
FROM runs r
LEFT JOIN (
  SELECT run, sae, arg_max(fvu, step) AS fvu, arg_max(l0, step) AS l0, arg_max(n_dead, step) AS n_dead
  FROM metrics GROUP BY run, sae
) m ON m.run = r.run AND r.sae LIKE m.sae || '-%'
ORDER BY r.created DESC, r.sae
"""
_CORPORA = """
SELECT corpus, string_agg(DISTINCT source, ', ' ORDER BY source) AS source, count(*) AS documents,
  count(*) FILTER (split = 1) AS held_out, sum(n_tokens)::BIGINT AS tokens
FROM docs GROUP BY corpus ORDER BY corpus
"""
_MEASURES = """
SELECT sae_id, store, hook, subject, metric, value, n, ci_low, ci_high, skip
FROM evaluations WHERE NOT ends_with(metric, '_count') ORDER BY created DESC, sae_id
"""


_HELDOUT = """
SELECT sae_id, arg_max(value, created) FILTER (metric = 'fvu') AS fvu, arg_max(value, created) FILTER (metric = 'l0') AS l0
FROM evaluations WHERE subject = 'sae' GROUP BY sae_id
"""


def read_catalogue(workspace: Path) -> Catalogue:
    """Read it as it is now. Raises MissingDataError without a workspace, DataError on a damaged file."""
    saes, stores, corpora, measures = _ask(workspace, _SAES, "SELECT * FROM stores", _CORPORA, _MEASURES)
    return Catalogue(saes, stores, corpora, measures, folder_bytes(workspace))


def read_saes(workspace: Path) -> list[dict[str, Any]]:
    """One row per SAE of a run, the newest first: what `Catalogue.saes` holds, its sae_id and its newest evaluation.

    sae_id is None before the SAE is saved; heldout_fvu and heldout_l0 are None where it is not evaluated.
    """
    saes, heldout = _ask(workspace, _SAES, _HELDOUT)
    ids = {(s.run, s.name): s.sae_id for s in saved_saes(workspace)}
    measured = {m["sae_id"]: m for m in _records(heldout)}
    rows = []
    for r in _records(saes):
        sae_id = ids.get((r["run"], r["sae"])) or None
        kept = {f"heldout_{m}": measured.get(sae_id, {}).get(m) for m in ("fvu", "l0")}
        rows.append(r | {"sae_id": sae_id, "evaluated": sae_id in measured} | kept)
    return rows


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of Python values; what is not known is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _ask(workspace: Path, *queries: str) -> list[pd.DataFrame]:
    con = connect(workspace)
    try:
        return [con.execute(sql).df() for sql in queries]
    except duckdb.Error as e:
        raise DataError(
            f"the workspace cannot be read ({str(e).splitlines()[0]}): check it with `atomscope doctor`"
        ) from e
    finally:
        con.close()


_CURVES = """
SELECT r.run || ' / ' || r.sae AS name, r.status, r.problem, m.* EXCLUDE (run, sae)
FROM metrics m JOIN runs r ON r.run = m.run AND r.sae LIKE m.sae || '-%'
ORDER BY r.created DESC, name, m.step
"""


def read_curves(workspace: Path) -> pd.DataFrame:
    """Every logged point, newest run first: name, status, problem, step, tokens, lr, fvu, auxk, l0, grad_norm, n_dead, rate."""
    con = connect(workspace)
    try:
        return con.execute(_CURVES).df()
    except duckdb.Error as e:
        raise DataError(
            f"the metrics cannot be read ({str(e).splitlines()[0]}): check the run's folder"
        ) from e
    finally:
        con.close()


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; files that go away meanwhile count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def measure_table(measures: pd.DataFrame, sae_id: str) -> pd.DataFrame:
    """Measures of one SAE as `newest_measures` has them, subjects down (the SAE first, then its controls), metrics across."""
    part, _ = newest_measures(measures, sae_id)
    if not len(part):
        return pd.DataFrame()
    wide = part.pivot_table(index="subject", columns="metric", values="value", aggfunc="first")
    order = sorted(wide.index, key=lambda s: (s != "sae", s in ("untrained", "initial"), s != "untrained", s))
    return wide.loc[[s for s in order if s != "model" and not s.startswith("atoms:")]]


def rows_left_out(measures: pd.DataFrame, sae_id: str) -> str:
    """`skip` of what `newest_measures` has of this SAE."""
    return newest_measures(measures, sae_id)[1]


def newest_measures(measures: pd.DataFrame, sae_id: str) -> tuple[pd.DataFrame, str]:
    """Measures of one SAE on the store of its newest FVU, and that FVU's `skip`: figures of two stores or of two kinds of
    rows are no table. Atoms and kinds of token have no skip; older evaluations, which do not say it, left out position 0."""
    part = measures[measures["sae_id"] == sae_id]
    fvu = part[(part["subject"] == "sae") & (part["metric"] == "fvu")]
    if not len(part):
        return part, "first"
    said = part["skip"].astype(object).where(part["skip"].notna(), "first")
    store = (fvu if len(fvu) else part)["store"].iloc[0]
    skip = str(said[fvu.index[0]]) if len(fvu) else "first"
    apart = part["subject"].str.startswith("atoms:") | part["metric"].str.contains("@", regex=False)
    return part[(part["store"] == store) & (apart | (said == skip))], skip
