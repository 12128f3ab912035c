"""`build_index`: everything the explorer asks about a feature, computed once, in one read-only DuckDB file.

1. Codes, token-major: every row of the store through the encoder (saes/code_files.py); resumable by shard.
2. Feature-major: firings sorted by feature and falling value, statistics, examples, logit lens, neighbours, map.

    features/<sae_id>@<store>/codes/  features-<n>.duckdb  current.json (names the file that readers open)

The database is built beside the old one and `current.json` is switched last, so a reader never sees half an index.
Memory: at most BLOCK_FIRINGS firings are sorted at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from cache.errors import AtomscopeError
from cache.progress import progress
from cache.provenance import provenance
from cache.workspace import atomic_file, read_json, write_json
from saes.code_files import (
    Part,
    encoded_rows,
    id_dtype,
    read_codes,
    record_file,
    write_codes,
    write_varying,
)
from saes.evaluation import check_fit
from saes.geometry import feature_map, logit_lens, neighbours
from saes.ranking import Firings, examples, find_runs, histograms, sort_block, statistics
from saes.sae import SAE

BLOCK_FIRINGS = 32_000_000
ENCODE_ROWS = 4096
SCHEMA_VERSION = 1


def index_path(sae: SAE, store: Any) -> Path:
    """Folder of the index of `sae` on `store`."""
    return store.workspace / "features" / f"{sae.sae_id}@{store.path.name}"


def build_index(sae: SAE, store: Any, model: Any = None, *, sae_path: str | Path | None = None) -> Path:
    """Index every latent of a folded SAE over the whole store. Returns the index folder; a finished one is reused.

    With `model` the logit lens (direct effect on the next token) is included. Raises DataError where SAE and store
    do not fit, MissingDataError where the store is incomplete. An interrupted build goes on at its next shard.
    """
    hook = check_fit(sae, store)
    if model is not None:
        store.check_model(model)
    folder = index_path(sae, store)
    if (folder / "current.json").is_file():
        current = read_json(folder / "current.json")
        if current["logit_lens"] or model is None:
            return folder
    started = time.time()
    write_all_codes(sae, store, hook, folder / "codes")
    meta = _describe(sae, store, hook, model, sae_path)
    version = 1 + max((int(p.stem.split("-")[1]) for p in folder.glob("features-*.duckdb")), default=0)
    file = folder / f"features-{version}.duckdb"
    with atomic_file(file) as tmp:
        _build_database(tmp, sae, store, model, folder / "codes", meta)
    write_json(folder / "current.json", meta | {"file": file.name, "provenance": provenance(started=started)})
    return folder


def _describe(sae: SAE, store: Any, hook: str, model: Any, sae_path: str | Path | None) -> dict[str, Any]:
    cfg, identity = sae.cfg, store.identity
    stats = store.stats(hook, split="train", skip="first")
    return {
        "schema_version": SCHEMA_VERSION,
        "sae_id": sae.sae_id,
        "sae_path": _inside(sae_path, store.workspace),
        "name": cfg.label,
        "store": store.path.name,
        "corpus": store.corpus.path.name,
        "corpus_name": store.corpus.meta.get("name", ""),
        "hook": hook,
        "model": identity.get("model", cfg.model),
        "model_source": store.model_source,
        "model_sha": identity.get("weights_sha256") or cfg.model_sha,
        "activation": cfg.activation,
        "signed": cfg.signed,
        "k": cfg.k,
        "d_sae": cfg.d_sae,
        "d_model": cfg.d_model,
        "n_rows": int(store.n_rows(hook)),
        "mean_resid_norm": float(stats.mean_norm),
        "logit_lens": model is not None,
    }


def _inside(path: str | Path | None, workspace: Path) -> str | None:
    """Where the SAE is, relative to the workspace; None for one outside it."""
    folder = Path(path).resolve() if path else None
    return str(folder.relative_to(workspace)) if folder and folder.is_relative_to(workspace) else None


def write_all_codes(sae: SAE, store: Any, hook: str, folder: Path) -> None:
    """Encode the rows of each shard of the store that has no committed codes yet."""
    folder.mkdir(parents=True, exist_ok=True)
    done = sum(r1 - r0 for i, (_, _, r0, r1) in enumerate(store.shards) if record_file(folder, i).is_file())
    with progress("encode", store.n_rows(hook), unit="tok", done=done) as bar:
        for shard, (_, _, row0, row1) in enumerate(store.shards):
            if record_file(folder, shard).is_file():
                continue

            def parts(row0: int = row0, row1: int = row1) -> Iterator[Part]:
                for part in _encoded(sae, store, hook, row0, row1):
                    yield part
                    bar.advance(len(part.at))

            if not sae.cfg.fixed_k:
                write_varying(folder, shard, row0, row1 - row0, parts, sae.cfg.d_sae)
                continue
            ids = np.zeros((row1 - row0, sae.cfg.k), dtype=id_dtype(sae.cfg.d_sae))
            values = np.zeros((row1 - row0, sae.cfg.k), dtype=np.float32)
            encoded = 0
            for part in parts():
                ids[part.at] = part.ids.reshape(-1, sae.cfg.k)
                values[part.at] = part.values.reshape(-1, sae.cfg.k)
                encoded += len(part.at)
            write_codes(folder, shard, row0, ids, values, encoded)


def _encoded(sae: SAE, store: Any, hook: str, row0: int, row1: int) -> Iterator[Part]:
    """Codes of the rows of one shard, a batch at a time; position 0 is left out."""
    for batch in store.sequential(hook, batch_size=ENCODE_ROWS, split=None, skip="first", start_row=row0):
        at = np.asarray(batch.row) - row0
        inside = int(np.searchsorted(at, row1 - row0))
        if inside:
            codes = sae.encode(batch.x[hook][:inside].to(sae.W_enc.device))
            counts = (
                np.full(inside, sae.cfg.k) if codes.offsets is None else codes.offsets.diff().cpu().numpy()
            )
            ids, values = codes.indices.reshape(-1).cpu().numpy(), codes.values.reshape(-1).cpu().numpy()
            yield Part(at[:inside], counts, ids, values)
        if inside < len(at):
            break


def _blocks(counts: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of features whose firings fit BLOCK_FIRINGS (a single feature may exceed it)."""
    out, first, total = [], 0, 0
    for f, n in enumerate(counts.tolist()):
        if f > first and (total + n > BLOCK_FIRINGS or f - first >= 2**16):
            out.append((first, f))
            first, total = f, 0
        total += n
    return [*out, (first, len(counts))]


def _firings(codes: Path, shards: int, first: int, last: int) -> Firings:
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for block in read_codes(codes, shards):
        keep = (block.values != 0) & (block.ids >= first) & (block.ids < last)
        parts.append((block.ids[keep].astype(np.int64), block.rows[keep], block.values[keep]))
    return Firings(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _count(codes: Path, shards: int, d_sae: int) -> tuple[np.ndarray, int]:
    """Firings of each feature, and the rows that were encoded."""
    counts, rows = np.zeros(d_sae, dtype=np.int64), 0
    encoded = encoded_rows(codes, shards)
    for block in read_codes(codes, shards):
        fires = block.values != 0
        counts += np.bincount(block.ids[fires], minlength=d_sae)
        rows += len(np.unique(block.rows[fires])) if encoded is None else 0
    return counts, rows if encoded is None else encoded


def _build_database(file: Path, sae: SAE, store: Any, model: Any, codes: Path, meta: dict[str, Any]) -> None:
    shards, d_sae = len(store.shards), sae.cfg.d_sae
    counts, n_tokens = _count(codes, shards, d_sae)
    meta["n_tokens"] = n_tokens
    if not counts.any():
        raise AtomscopeError("no latent fired on any row: the SAE is dead on this store, train it again")
    con = duckdb.connect(str(file))
    try:
        con.execute("SET threads = 2; SET preserve_insertion_order = true")
        con.execute(_TABLES)
        blocks = _blocks(counts)
        with progress("index", len(blocks) + 3, unit="part") as bar:
            for first, last in blocks:
                _add_block(con, _firings(codes, shards, first, last), first, last, n_tokens)
                bar.advance()
            _token_tables(con, store)
            bar.advance()
            _geometry_tables(con, sae, model)
            bar.advance()
            con.execute(_FEATURES)
            bar.advance()
        con.execute("CHECKPOINT")
    finally:
        con.close()


_TABLES = """
CREATE TABLE activation (feature INTEGER, row BIGINT, value FLOAT);
CREATE TABLE stat (feature INTEGER, n_fire BIGINT, n_pos BIGINT, n_neg BIGINT, density DOUBLE, mean_act DOUBLE,
                   max_act FLOAT, min_act FLOAT, hist INTEGER[]);
CREATE TABLE feature_example (feature INTEGER, sign TINYINT, kind VARCHAR, rank INTEGER, row BIGINT, value FLOAT);
"""

_FEATURES = """
CREATE TABLE feature AS
SELECT s.*, t.top_tok, g.dec_norm, g.x, g.y, g.logit_top_tok, g.logit_top, g.logit_bottom_tok, g.logit_bottom
FROM stat s JOIN geometry g USING (feature) LEFT JOIN top_token t USING (feature) ORDER BY feature;
DROP TABLE stat; DROP TABLE geometry; DROP TABLE top_token;
"""


def _insert(con: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Any]) -> None:
    block = pa.table(columns)
    con.register("block", block)
    con.execute(f"INSERT INTO {table} SELECT {', '.join(columns)} FROM block")
    con.unregister("block")


def _add_block(
    con: duckdb.DuckDBPyConnection, firings: Firings, first: int, last: int, n_tokens: int
) -> None:
    f = sort_block(firings)
    runs = find_runs(f, first, last)
    s = statistics(f, runs)
    hist = histograms(f, s["min_act"], s["max_act"], first)
    _insert(con, "activation", f._asdict())
    rows = pa.array(hist.astype(np.int32).tolist(), pa.list_(pa.int32()))
    _insert(
        con,
        "stat",
        {"feature": runs.feature, "n_fire": s["n_fire"], "n_pos": s["n_pos"], "n_neg": s["n_neg"],
         "density": s["n_fire"] / n_tokens, "mean_act": s["mean_act"], "max_act": s["max_act"],
         "min_act": s["min_act"], "hist": rows},
    )  # fmt: skip
    _insert(con, "feature_example", examples(f, runs))


def _token_tables(con: duckdb.DuckDBPyConnection, store: Any) -> None:
    """Which features fire on a token, and the token that a feature marks best.

    Best is the largest activation mass times the share of the token's occurrences on which the feature fires: mass
    alone names commas and hyphens, the share alone names tokens seen once.
    """
    tokens = pa.table({"tok": store.corpus.column("tok")})
    con.register("tokens", tokens)
    con.execute("CREATE TEMP TABLE tok_of AS SELECT row_number() OVER () - 1 AS row, tok FROM tokens")
    con.unregister("tokens")
    con.execute(
        "CREATE TABLE token_feature AS SELECT t.tok, a.feature, count(*) AS n, max(a.value) AS max_act, "
        "min(a.value) AS min_act, sum(abs(a.value)) AS mass FROM activation a JOIN tok_of t USING (row) "
        "GROUP BY t.tok, a.feature ORDER BY t.tok, mass DESC"
    )
    con.execute(
        "CREATE TABLE top_token AS SELECT f.feature, arg_max(f.tok, f.mass * f.n / t.total) AS top_tok "
        "FROM token_feature f JOIN (SELECT tok, count(*) AS total FROM tok_of GROUP BY tok) t USING (tok) "
        "GROUP BY f.feature"
    )


def _geometry_tables(con: duckdb.DuckDBPyConnection, sae: SAE, model: Any) -> None:
    w = sae.W_dec.detach().float()
    ids = np.arange(len(w), dtype=np.int32)
    xy = feature_map(w)
    lens = logit_lens(w, model)
    columns: dict[str, Any] = {
        "feature": ids,
        "dec_norm": w.norm(dim=1).cpu().numpy(),
        "x": xy[:, 0],
        "y": xy[:, 1],
    }
    for name, kind in (
        ("logit_top_tok", pa.int32()), ("logit_top", pa.float32()),
        ("logit_bottom_tok", pa.int32()), ("logit_bottom", pa.float32()),
    ):  # fmt: skip
        values = [None] * len(w) if lens is None else lens[name].tolist()
        columns[name] = pa.array(values, pa.list_(kind))
    con.execute(
        "CREATE TABLE geometry (feature INTEGER, dec_norm FLOAT, x FLOAT, y FLOAT, logit_top_tok INTEGER[], "
        "logit_top FLOAT[], logit_bottom_tok INTEGER[], logit_bottom FLOAT[])"
    )
    _insert(con, "geometry", columns)
    feature, other, cos = neighbours(w)
    con.execute("CREATE TABLE neighbour (feature INTEGER, other INTEGER, cos FLOAT)")
    _insert(con, "neighbour", {"feature": feature, "other": other, "cos": cos})


__all__ = ["build_index", "index_path", "write_all_codes"]
