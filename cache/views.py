"""SQL of the cache's views: stores, docs, vocab, tokens and rows_<hook> (dots become underscores).

Files are listed from the records, never by a glob, and the vector column is not in any view, so that no query
on metadata reads vectors. Where nothing has been made yet the view is there, with its columns, and empty.
Row ids are file row numbers: the token table is one file, and a shard's record says which row it starts at. They
count within a corpus: join rows_<hook> and tokens `USING (corpus, row)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cache.errors import AtomscopeError
from cache.records import ShardRecord, list_records, read_store_json, record_path

_STORES = {
    "store": "VARCHAR", "path": "VARCHAR", "hook": "VARCHAR", "d": "INTEGER", "dtype": "VARCHAR",
    "shards": "INTEGER", "shards_total": "INTEGER", "n_rows": "BIGINT", "n_rows_total": "BIGINT",
    "complete": "BOOLEAN", "corpus": "VARCHAR", "model": "VARCHAR", "backend": "VARCHAR", "created": "VARCHAR",
    "problem": "VARCHAR",
}  # fmt: skip
_DOCS = {"corpus": "VARCHAR", "doc": "INTEGER", "sha": "VARCHAR", "split": "UTINYINT", "n_tokens": "INTEGER"}
_DOCS |= {"source": "VARCHAR"}
_VOCAB = {"corpus": "VARCHAR", "tok": "INTEGER", "token": "VARCHAR"}
_TOKENS = {"corpus": "VARCHAR", "row": "BIGINT"}
_TOKENS |= dict.fromkeys(("seq", "pos", "doc", "doc_pos", "tok"), "INTEGER") | {"token": "VARCHAR"}
_TOKENS |= dict.fromkeys(("role", "flags", "split"), "UTINYINT")


def views(workspace: Path) -> list[str]:
    """CREATE VIEW statements over what the workspace holds now."""
    corpora = sorted(p.parent for p in workspace.glob("corpora/*/corpus.json"))
    stores, rows = _stores(workspace)
    return [
        create_view("stores", values_sql(_STORES, stores)),
        create_view("docs", _union([docs_sql(c) for c in corpora], _DOCS)),
        create_view("vocab", _union([vocab_sql(c) for c in corpora], _VOCAB)),
        create_view("tokens", _union([tokens_sql(c) for c in corpora], _TOKENS)),
        *(create_view(f"rows_{hook.replace('.', '_')}", _rows_sql(files)) for hook, files in rows.items()),
    ]


def tokens_sql(corpus: Path) -> str:
    """One row per token of a corpus: row id, token columns, the token's string, the document's labels."""
    names = pq.read_schema(corpus / "docs.parquet").names
    labels = "".join(f", d.{_name(n)}" for n in names if n.startswith("label_"))
    extra = set(pq.read_schema(corpus / "tokens.parquet").names) - set(_TOKENS)
    labels = "".join(f", t.{_name(n)}" for n in sorted(extra)) + labels
    columns = ", ".join(f"t.{c}" for c in ("seq", "pos", "doc", "doc_pos", "tok"))
    return (
        f"SELECT {literal(corpus.name)} AS corpus, t.file_row_number AS row, {columns}, v.token, "
        f"t.role, t.flags, t.split{labels} "
        f"FROM read_parquet({literal(corpus / 'tokens.parquet')}, file_row_number = true) t "
        f"LEFT JOIN read_parquet({literal(corpus / 'vocab.parquet')}) v ON v.tok = t.tok "
        f"LEFT JOIN read_parquet({literal(corpus / 'docs.parquet')}) d ON d.doc = t.doc"
    )


def docs_sql(corpus: Path) -> str:
    return f"SELECT {literal(corpus.name)} AS corpus, * FROM read_parquet({literal(corpus / 'docs.parquet')})"


def vocab_sql(corpus: Path) -> str:
    return (
        f"SELECT {literal(corpus.name)} AS corpus, * FROM read_parquet({literal(corpus / 'vocab.parquet')})"
    )


def create_view(name: str, select: str) -> str:
    return f"CREATE OR REPLACE VIEW {_name(name)} AS {select}"


def values_sql(columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> str:
    """A SELECT of literal rows with typed columns; no rows make an empty table."""
    names = ", ".join(f"CAST({_name(c)} AS {kind}) AS {_name(c)}" for c, kind in columns.items())
    lines = ["(" + ", ".join(literal(row.get(c)) for c in columns) + ")" for row in rows]
    body = ", ".join(lines) or "(" + ", ".join(["NULL"] * len(columns)) + ")"
    table = f"(VALUES {body}) AS t({', '.join(_name(c) for c in columns)})"
    return f"SELECT {names} FROM {table}" + ("" if lines else " WHERE false")


def literal(value: Any) -> str:
    """A value as SQL."""
    if value is None:
        return "NULL"
    if isinstance(value, bool | int | float):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _union(selects: list[str], columns: dict[str, str]) -> str:
    return " UNION ALL BY NAME ".join(f"({s})" for s in [values_sql(columns, []), *selects])


def _stores(workspace: Path) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Rows of `stores`, and for each hook the committed data files."""
    stores: list[dict[str, Any]] = []
    files: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(p.parent for p in workspace.glob("activations/*/store.json")):
        for folder in sorted(path.glob("acts/*")):
            row, found = _store_row(path, folder)
            stores.append(row)
            if found:
                files.setdefault(folder.name, []).extend(found)
    return stores, files


def _store_row(path: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of one hook of one store; a store that cannot be read says so in `problem`."""
    row: dict[str, Any] = {"store": path.name, "path": path, "hook": folder.name, "complete": False}
    try:
        meta = read_store_json(path)
        records = [ShardRecord.load(record_path(folder, i)) for i in list_records(folder)]
    except AtomscopeError as e:
        return row | {"problem": e}, []
    if records:
        row |= {"d": records[0].d, "dtype": records[0].dtype}
    row |= {
        "shards": len(records),
        "shards_total": len(meta["shards"]),
        "n_rows": sum(r.rows for r in records),
        "n_rows_total": meta["n_rows"],
        "complete": len(records) == len(meta["shards"]),
        "corpus": meta["corpus"][:16],
        "model": meta["identity"].get("model"),
        "backend": meta["identity"].get("backend"),
        "created": meta["provenance"]["created"],
    }
    common = {"store": path.name, "corpus": meta["corpus"][:16]}
    return row, [common | {"file": folder / r.file, "row0": r.row0} for r in records]


def _rows_sql(files: list[dict[str, Any]]) -> str:
    names = ", ".join(literal(f["file"]) for f in files)
    columns = {"store": "VARCHAR", "corpus": "VARCHAR", "file": "VARCHAR", "row0": "BIGINT"}
    shards = values_sql(columns, files)
    return (
        "SELECT s.store, s.corpus, s.row0 + r.file_row_number AS row, r.doc, r.pos, r.tok, r.norm "
        f"FROM read_parquet([{names}], filename = true, file_row_number = true) r "
        f"JOIN ({shards}) s ON s.file = r.filename"
    )
