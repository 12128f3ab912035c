"""SQL of the views that `cache.connect` shows for SAEs: runs, metrics, features, feature_tokens, evaluations, labels.

`features` and `feature_examples` are read from each index's DuckDB file, which is attached read-only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.errors import AtomscopeError
from cache.views import create_view, literal, values_sql
from cache.workspace import read_json
from saes.labels import current_labels
from saes.queries import PROXIES_RECORD

_RUNS = {
    "run": "VARCHAR", "sae": "VARCHAR", "status": "VARCHAR", "activation": "VARCHAR", "d_sae": "INTEGER",
    "k": "INTEGER", "hook": "VARCHAR", "model": "VARCHAR", "store": "VARCHAR", "steps": "BIGINT", "tokens": "BIGINT",
    "seed": "INTEGER", "created": "VARCHAR", "problem": "VARCHAR",
}  # fmt: skip
_METRICS = {
    "run": "VARCHAR", "sae": "BIGINT", "step": "BIGINT", "tokens": "BIGINT", "lr": "DOUBLE", "rate": "DOUBLE",
    "fvu": "DOUBLE", "auxk": "DOUBLE", "l0": "DOUBLE", "grad_norm": "DOUBLE", "n_dead": "DOUBLE",
}  # fmt: skip
_EVALUATIONS = {
    "sae_id": "VARCHAR", "store": "VARCHAR", "hook": "VARCHAR", "created": "VARCHAR", "subject": "VARCHAR",
    "metric": "VARCHAR", "value": "DOUBLE", "n": "BIGINT", "lo": "DOUBLE", "hi": "DOUBLE", "ci_low": "DOUBLE",
    "ci_high": "DOUBLE", "skip": "VARCHAR",
}  # fmt: skip
_LABELS = {
    "sae_id": "VARCHAR", "feature": "INTEGER", "sign": "INTEGER", "text": "VARCHAR", "author": "VARCHAR",
    "method": "VARCHAR", "score": "DOUBLE", "created": "VARCHAR",
}  # fmt: skip
_FEATURES = {
    "sae_id": "VARCHAR", "store": "VARCHAR", "corpus": "VARCHAR", "feature": "INTEGER", "n_fire": "BIGINT", "n_pos": "BIGINT",
    "n_neg": "BIGINT", "density": "DOUBLE", "mean_act": "DOUBLE", "max_act": "FLOAT", "min_act": "FLOAT",
    "top_tok": "INTEGER", "dec_norm": "FLOAT", "x": "FLOAT", "y": "FLOAT",
}  # fmt: skip
_EXAMPLES = {
    "sae_id": "VARCHAR", "store": "VARCHAR", "corpus": "VARCHAR", "feature": "INTEGER", "sign": "TINYINT", "kind": "VARCHAR",
    "rank": "INTEGER", "row": "BIGINT", "value": "FLOAT",
}  # fmt: skip
_TOKENS = {
    "sae_id": "VARCHAR", "store": "VARCHAR", "corpus": "VARCHAR", "tok": "INTEGER", "feature": "INTEGER", "n": "BIGINT",
    "max_act": "FLOAT", "min_act": "FLOAT", "mass": "DOUBLE",
}  # fmt: skip
_PROXIES = {"sae_id": "VARCHAR", "store": "VARCHAR", "feature": "INTEGER", "sign": "TINYINT", "n": "BIGINT"}
_PROXIES |= dict.fromkeys(
    ("word_f1", "before_f1", "entropy", "top_share", "coherence", "detection", "intruder", "weighted", "lens_input",
     "lens_next", "proxy_score"), "DOUBLE",
)  # fmt: skip


def views(workspace: Path) -> list[str]:
    """ATTACH and CREATE VIEW statements over what the workspace holds now; a view of nothing is empty."""
    indexes = [(p.parent, _json(p)) for p in sorted(workspace.glob("features/*/current.json"))]
    attach = [
        f"ATTACH {literal(folder / meta['file'])} AS features_{i} (READ_ONLY)"
        for i, (folder, meta) in enumerate(indexes)
    ]
    metas = [m for _, m in indexes]
    return [
        *attach,
        create_view("runs", values_sql(_RUNS, _runs(workspace))),
        create_view("metrics", _metrics_sql(workspace)),
        create_view("evaluations", _evaluations_sql(sorted(workspace.glob("evaluations/*.parquet")))),
        create_view("labels", values_sql(_LABELS, list(current_labels(workspace).values()))),
        create_view("features", _index_sql("feature", _FEATURES, metas)),
        create_view("feature_examples", _index_sql("feature_example", _EXAMPLES, metas)),
        create_view("proxies", _proxies_sql(indexes)),
        create_view("feature_tokens", _tokens_sql(metas)),
    ]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path)


def _runs(workspace: Path) -> list[dict[str, Any]]:
    out = []
    for path in sorted(workspace.glob("saes/*/run.json")):
        try:
            r = read_json(path)
        except AtomscopeError:
            continue
        lost = {f["sae"]: f["why"] for f in r.get("failed", [])}
        for name, cfg in zip(r["saes"], r["configs"], strict=True):
            out.append({
                "run": path.parent.name, "sae": name, "status": "failed" if name in lost else r["status"],
                "problem": lost.get(name, r.get("problem", "")), "activation": cfg["activation"],
                "d_sae": cfg["d_sae"], "k": cfg["k"], "hook": cfg["hook"], "model": cfg["model"],
                "store": r["data"]["store"], "steps": r["train"]["steps"], "tokens": r["tokens"],
                "seed": r["train"]["seed"], "created": r["provenance"]["created"],
            })  # fmt: skip
    return out


def _empty(columns: dict[str, str]) -> str:
    return values_sql(columns, [])


def _metrics_sql(workspace: Path) -> str:
    parts = []
    for run in sorted(p.parent for p in workspace.glob("saes/*/run.json")):
        files = sorted((run / "metrics").glob("part-*.parquet"))
        if files:
            names = ", ".join(c for c in _METRICS if c != "run")
            listed = ", ".join(literal(f) for f in files)
            parts.append(
                f"SELECT {literal(run.name)} AS run, {names} FROM read_parquet([{listed}], union_by_name = true)"
            )
    return " UNION ALL ".join(parts) if parts else _empty(_METRICS)


def _evaluations_sql(files: list[Path]) -> str:
    if not files:
        return _empty(_EVALUATIONS)
    casts = ", ".join(f"{c}::{t} AS {c}" for c, t in _EVALUATIONS.items() if c != "subject")
    # `random` is what `untrained` was called before; a file that was written twice may hold both
    name = "CASE subject WHEN 'random' THEN 'untrained' ELSE subject END"
    return (
        # files of before it could be chosen do not say which rows they leave out
        f"SELECT {name} AS subject, {casts} FROM (SELECT * FROM read_parquet([{', '.join(literal(f) for f in files)}], "
        f"union_by_name = true) UNION ALL BY NAME SELECT NULL::VARCHAR AS skip WHERE false) QUALIFY subject <> 'random' OR NOT bool_or(subject = 'untrained') "
        f"OVER (PARTITION BY sae_id, store, metric)"
    )


def _proxies_sql(indexes: list[tuple[Path, dict[str, Any]]]) -> str:
    """The proxies of each index whose record names a table of the index file in use."""
    parts = []
    rest = ", ".join(f"{c}::{t} AS {c}" for c, t in _PROXIES.items() if c not in ("sae_id", "store"))
    for folder, meta in indexes:
        record = _json(folder / PROXIES_RECORD) if (folder / PROXIES_RECORD).is_file() else {}
        if record.get("index") == meta["file"]:
            ids = f"{literal(meta['sae_id'])} AS sae_id, {literal(meta['store'])} AS store"
            parts.append(f"SELECT {ids}, {rest} FROM read_parquet({literal(folder / record['file'])})")
    return " UNION ALL ".join(parts) if parts else _empty(_PROXIES)


def _tokens_sql(metas: list[dict[str, Any]]) -> str:
    """Features of every token, added up from the firings (an index holds them for frequent tokens only)."""
    if not metas:
        return _empty(_TOKENS)
    return " UNION ALL ".join(
        f"SELECT {literal(m['sae_id'])} AS sae_id, {literal(m['store'])} AS store, {literal(m['corpus'])} AS corpus, "
        "t.tok, a.feature, count(*) AS n, greatest(max(a.value), 0) AS max_act, least(min(a.value), 0) AS min_act, "
        f"sum(abs(a.value)) AS mass FROM features_{i}.activation a "
        f"JOIN (SELECT row, tok FROM tokens WHERE corpus = {literal(m['corpus'])}) t USING (row) GROUP BY t.tok, a.feature"
        for i, m in enumerate(metas)
    )


def _index_sql(table: str, columns: dict[str, str], metas: list[dict[str, Any]]) -> str:
    if not metas:
        return _empty(columns)
    rest = ", ".join(f"{c}::{t} AS {c}" for c, t in columns.items() if c not in ("sae_id", "store", "corpus"))
    return " UNION ALL ".join(
        f"SELECT {literal(m['sae_id'])} AS sae_id, {literal(m['store'])} AS store, {literal(m['corpus'])} AS corpus, "
        f"{rest} FROM features_{i}.{table}"
        for i, m in enumerate(metas)
    )
