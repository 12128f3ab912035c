"""The DuckDB file of a feature index, opened so that a query can read the workspace and nothing else."""

from __future__ import annotations

from pathlib import Path

import duckdb

from cache.errors import DataError, MissingDataError


def connect_index(file: Path, workspace: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory connection that sees the index as `idx` and no file outside the workspace."""
    if not file.is_file():
        raise MissingDataError(f"{file} is gone: run `atomscope index` again")
    con = duckdb.connect()
    try:
        con.execute(f"ATTACH '{str(file).replace(chr(39), chr(39) * 2)}' AS idx (READ_ONLY)")
    except duckdb.Error as e:
        raise DataError(
            f"{file} is not a readable index ({e}): delete its folder and run `atomscope index` again"
        ) from e
    con.execute(f"SET allowed_directories = ['{str(workspace.resolve()).replace(chr(39), chr(39) * 2)}/']")
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    return con
