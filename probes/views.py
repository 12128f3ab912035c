"""SQL of the views that `cache.connect` shows for probes: attributions, attribution_runs, _recall and _bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.errors import AtomscopeError
from cache.views import create_view, literal, values_sql
from cache.workspace import read_json

_NODES = {
    "run": "VARCHAR", "node": "BIGINT", "layer": "INTEGER", "kind": "VARCHAR", "index": "INTEGER", "pos": "INTEGER",
    "token": "VARCHAR", "hook": "VARCHAR", "score": "DOUBLE", "signed": "DOUBLE", "exact": "DOUBLE", "exact_abs": "DOUBLE",
}  # fmt: skip
_RUNS = {
    "run": "VARCHAR", "name": "VARCHAR", "model": "VARCHAR", "metric": "VARCHAR", "method": "VARCHAR", "n_pairs": "INTEGER",
    "tokens": "INTEGER", "passes": "DOUBLE", "created": "VARCHAR",
}  # fmt: skip
_RECALL = {"run": "VARCHAR", "method": "VARCHAR", "passes": "DOUBLE", "recall": "DOUBLE"}
_BOUNDS = {
    "run": "VARCHAR", "k": "INTEGER", "pair": "INTEGER", "alpha": "DOUBLE", "bound": "DOUBLE", "missed": "DOUBLE",
    "n_samples": "INTEGER", "p": "DOUBLE",
}  # fmt: skip


def views(workspace: Path) -> list[str]:
    """CREATE VIEW statements over the attributions that the workspace holds now; a view of nothing is empty."""
    runs = []
    for path in sorted(workspace.glob("attributions/*/run.json")):
        try:
            runs.append((path.parent, read_json(path)))
        except AtomscopeError:
            continue
    folders = [folder for folder, _ in runs]
    return [
        create_view("attribution_runs", values_sql(_RUNS, [_run(f, r) for f, r in runs])),
        create_view("attributions", _union(folders, "nodes.parquet", _NODES)),
        create_view("attribution_recall", _union(folders, "recall.parquet", _RECALL)),
        create_view("attribution_bounds", _union(folders, "bounds.parquet", _BOUNDS)),
    ]


def _run(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    known = {c: record[c] for c in _RUNS if c in record}
    return known | {"run": folder.name, "created": record["provenance"]["created"]}


def _union(folders: list[Path], name: str, columns: dict[str, str]) -> str:
    casts = ", ".join(f'"{c}"::{kind} AS "{c}"' for c, kind in columns.items() if c != "run")
    parts = [
        f"SELECT {literal(f.name)} AS run, {casts} FROM read_parquet({literal(f / name)})"
        for f in folders
        if (f / name).is_file()
    ]
    return " UNION ALL ".join(parts) if parts else values_sql(columns, [])
