"""The feature-major DuckDB file of an index, made from codes on disk in one pass.

    feature          n_fire .. hist, top_tok, dec_norm, x, y, logit lens; one row a latent
    activation       every firing by feature and falling value        feature_example   the rows that a page shows
    token_feature    the features of frequent tokens, strongest first rare_token        the rows of all other tokens
    neighbour        nearest decoder rows by |cosine|

Memory: BLOCK_FIRINGS firings are held and sorted at a time (more only where that makes over MAX_RANGES files), and DuckDB
keeps to MEMORY_LIMIT. Blocks are small because arrays of 32 MB are reused by malloc, larger ones are new pages each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from torch import Tensor

from cache.errors import AtomscopeError
from cache.progress import progress
from saes.buckets import plan_ranges, sorted_ranges
from saes.code_files import encoded_rows, has_wide_values, read_codes, stored_values
from saes.geometry import feature_map, logit_lens, neighbours
from saes.ranking import MAX_ROWS, Firings, examples, find_runs, histograms, statistics
from saes.token_table import FREQUENT, best_tokens, pairs_of, rare_rows

BLOCK_FIRINGS = 4_000_000
MAX_RANGES = 200
MEMORY_LIMIT = "2GB"

_TABLES = """
CREATE TABLE activation (feature INTEGER, row BIGINT, value FLOAT);
CREATE TABLE feature_example (feature INTEGER, sign TINYINT, kind VARCHAR, rank INTEGER, row BIGINT, value FLOAT);
CREATE TABLE rare_token (tok INTEGER, row BIGINT);
CREATE TABLE neighbour (feature INTEGER, other INTEGER, cos FLOAT);
CREATE TEMP TABLE stat (feature INTEGER, n_fire BIGINT, n_pos BIGINT, n_neg BIGINT, density DOUBLE, mean_act DOUBLE,
                        max_act FLOAT, min_act FLOAT, hist INTEGER[]);
CREATE TEMP TABLE top_token (feature INTEGER, top_tok INTEGER);
CREATE TEMP TABLE pair (tok INTEGER, feature INTEGER, n BIGINT, max_act FLOAT, min_act FLOAT, mass FLOAT);
CREATE TEMP TABLE geometry (feature INTEGER, dec_norm FLOAT, x FLOAT, y FLOAT, logit_top_tok INTEGER[],
                            logit_top FLOAT[], logit_bottom_tok INTEGER[], logit_bottom FLOAT[]);
"""

_FINISH = """
CREATE TABLE token_feature AS SELECT * FROM pair ORDER BY tok, mass DESC, feature;
CREATE TABLE feature AS
SELECT s.*, t.top_tok, g.dec_norm, g.x, g.y, g.logit_top_tok, g.logit_top, g.logit_bottom_tok, g.logit_bottom
FROM stat s JOIN geometry g USING (feature) LEFT JOIN top_token t USING (feature) ORDER BY feature;
"""


def write_feature_file(
    file: Path, *, codes: Path, shards: Sequence[int], rows: np.ndarray, tok: np.ndarray, w_dec: Tensor, model: Any
) -> int:  # fmt: skip
    """Make `file` (written directly: wrap in `atomic_file`) from the codes of `shards`. Returns the rows encoded.

    rows: ids of the rows of those shards. tok: the token of every row of the corpus. Raises AtomscopeError where
    nothing fires.
    """
    if len(tok) > MAX_ROWS:
        raise AtomscopeError(f"an index takes {MAX_ROWS:,} rows at most: index a smaller store")
    counts, n_tokens = count_firings(codes, shards, len(w_dec))
    if not counts.any():
        raise AtomscopeError("no latent fired on any row: the SAE is dead on this store, train it again")
    con = duckdb.connect(str(file))
    try:
        con.execute(f"SET threads = 2; SET memory_limit = '{MEMORY_LIMIT}'")
        con.execute("SET temp_directory = $folder", {"folder": str(file.parent / "spill")})
        con.execute(_TABLES)
        wide = has_wide_values(codes, shards)
        ranges = plan_ranges(counts, max(BLOCK_FIRINGS, int(counts.sum()) // MAX_RANGES))
        totals = np.bincount(tok[rows], minlength=int(tok.max(initial=0)) + 1)
        with progress("index", stored_values(codes, shards) + counts.sum(), unit="firing") as bar:
            blocks = read_codes(codes, shards)
            for first, last, firings in sorted_ranges(
                blocks, ranges, file.parent, wide=wide, done=bar.advance
            ):
                _add_range(con, firings, first, last, n_tokens, tok, totals, wide=wide)
                bar.advance(len(firings.row))
        _insert(con, "rare_token", dict(zip(("tok", "row"), rare_rows(tok, rows, totals), strict=True)))
        _add_geometry(con, w_dec, model)
        con.execute(_FINISH)
        con.execute("CHECKPOINT")
    finally:
        con.close()
    return n_tokens


def count_firings(codes: Path, shards: Sequence[int], d_sae: int) -> tuple[np.ndarray, int]:
    """Firings of each feature, and the rows that were encoded."""
    counts, rows = np.zeros(d_sae, dtype=np.int64), 0
    encoded = encoded_rows(codes, shards)
    for block in read_codes(codes, shards):
        fires = block.values != 0
        counts += np.bincount(block.ids[fires], minlength=d_sae)
        rows += len(np.unique(block.rows[fires])) if encoded is None else 0
    return counts, rows if encoded is None else encoded


def _insert(con: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Any]) -> None:
    block = pa.table(columns)
    con.register("block", block)
    con.execute(f"INSERT INTO {table} SELECT {', '.join(columns)} FROM block")
    con.unregister("block")


def _add_range(
    con: duckdb.DuckDBPyConnection, f: Firings, first: int, last: int, n_tokens: int, tok: np.ndarray,
    totals: np.ndarray, *, wide: bool,
) -> None:  # fmt: skip
    runs = find_runs(f, first, last)
    s = statistics(f, runs)
    hist = histograms(f, runs, s["min_act"], s["max_act"])
    offsets = np.arange(len(hist) + 1, dtype=np.int32) * hist.shape[1]
    bins = pa.ListArray.from_arrays(offsets, pa.array(hist.reshape(-1).astype(np.int32)))
    stat = {"feature": runs.feature, "n_fire": s["n_fire"], "n_pos": s["n_pos"], "n_neg": s["n_neg"],
            "density": s["n_fire"] / n_tokens, "mean_act": s["mean_act"], "max_act": s["max_act"],
            "min_act": s["min_act"], "hist": bins}  # fmt: skip
    _insert(con, "stat", stat)
    _insert(con, "activation", f._asdict())
    _insert(con, "feature_example", examples(f, runs))
    pairs = pairs_of(f, tok, first, wide=wide)
    feature, top = best_tokens(pairs, totals)
    _insert(con, "top_token", {"feature": feature, "top_tok": top})
    frequent = pairs.at(totals[pairs.tok] >= FREQUENT)
    names = ("tok", "feature", "n", "max_act", "min_act", "mass")
    _insert(con, "pair", {name: getattr(frequent, name) for name in names})


def _add_geometry(con: duckdb.DuckDBPyConnection, w_dec: Tensor, model: Any) -> None:
    w = w_dec.detach().float()
    xy, lens = feature_map(w), logit_lens(w, model)
    columns: dict[str, Any] = {
        "feature": np.arange(len(w), dtype=np.int32), "dec_norm": w.norm(dim=1).cpu().numpy(),
        "x": xy[:, 0], "y": xy[:, 1],
    }  # fmt: skip
    for name, kind in (
        ("logit_top_tok", pa.int32()), ("logit_top", pa.float32()),
        ("logit_bottom_tok", pa.int32()), ("logit_bottom", pa.float32()),
    ):  # fmt: skip
        values = [None] * len(w) if lens is None else lens[name].tolist()
        columns[name] = pa.array(values, pa.list_(kind))
    _insert(con, "geometry", columns)
    _insert(con, "neighbour", dict(zip(("feature", "other", "cos"), neighbours(w), strict=True)))


__all__ = ["count_firings", "write_feature_file"]
