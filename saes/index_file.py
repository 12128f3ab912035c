"""The DuckDB file of a feature index, opened so that a query can read the workspace and nothing else; and old ones."""

from __future__ import annotations

import time
from pathlib import Path

import duckdb

from cache.errors import AtomscopeError, DataError, MissingDataError
from cache.workspace import read_json


def connect_index(file: Path, workspace: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory connection that sees the index as `idx` and no file outside the workspace."""
    if not file.is_file():
        raise MissingDataError(f"{file} is gone: run `atomscope index` again")
    con = duckdb.connect()
    try:
        # questions are answered from a few row groups: a second thread adds more waiting than it saves
        con.execute("SET threads = 1")
        con.execute(f"ATTACH '{str(file).replace(chr(39), chr(39) * 2)}' AS idx (READ_ONLY)")
    except duckdb.Error as e:
        raise DataError(
            f"{file} is not a readable index ({e}): delete its folder and run `atomscope index` again"
        ) from e
    con.execute(f"SET allowed_directories = ['{str(workspace.resolve()).replace(chr(39), chr(39) * 2)}/']")
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    return con


def superseded_files(workspace: Path, *, older_than: float) -> list[Path]:
    """Databases and proxy tables of indexes that no record names, last written `older_than` seconds ago or earlier.

    Who has one open goes on reading it. Folders whose records cannot be read are left alone.
    """
    found = []
    for record, pattern in (("current.json", "features-*.duckdb"), ("proxies.json", "proxies-*.parquet")):
        for folder in sorted(p for p in workspace.glob("features/*") if p.is_dir()):
            path = folder / record
            try:
                named = read_json(path)["file"] if path.is_file() else None
            except (AtomscopeError, KeyError, TypeError):
                continue
            found += [
                file
                for file in sorted(folder.glob(pattern))
                if file.name != named and time.time() - file.stat().st_mtime >= older_than
            ]
    return found
