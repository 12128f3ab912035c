"""`connect(workspace)`: DuckDB over everything a workspace holds, as views that the packages ship.

DuckDB is the query engine and never the truth: the connection is in memory, the views point at immutable
files, and there is nothing to migrate, lock or corrupt. Each package names a function
`views(workspace) -> list of CREATE VIEW statements` in the entry-point group "atomscope.views", so the lowest
layer does not know the upper ones. Files outside the workspace cannot be read through the connection.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from pathlib import Path

import duckdb
import numpy as np

from cache.errors import MissingDataError, UsageError
from cache.views import create_view, literal, tokens_sql
from cache.workspace import workspace_path

GROUP = "atomscope.views"
# For a checkout that is not installed.
_OWN = {"cache": "cache.views:views", "saes": "saes.views:views", "probes": "probes.views:views"}

Views = Callable[[Path], list[str]]


def connect(workspace: str | os.PathLike[str] | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory connection with the views of the workspace as it is now; connect again to see more."""
    root = workspace_path(workspace, create=False)
    con = _open(root, root)
    for views in _sources():
        _create(con, views(root))
    return con


def _open(workspace: Path, readable: Path) -> duckdb.DuckDBPyConnection:
    """A connection that reads files of one folder only and spills large sorts to the workspace's `_tmp`."""
    con = duckdb.connect()
    con.execute(f"SET temp_directory = {literal(workspace / '_tmp')}")
    con.execute(f"SET allowed_directories = [{literal(readable)}]")
    con.execute("SET enable_external_access = false")
    return con


def _sources() -> list[Views]:
    """The packages' view functions, the lowest layer first."""
    names = dict(_OWN)
    names |= {p.name: p.value for p in metadata.entry_points(group=GROUP)}
    found: list[Views] = []
    for value in names.values():
        module, _, function = value.partition(":")
        try:
            found.append(getattr(import_module(module), function))
        except ModuleNotFoundError as e:
            if e.name not in (module, module.partition(".")[0]):
                raise
    return found


def _create(con: duckdb.DuckDBPyConnection, statements: Iterable[str]) -> None:
    """Run the statements; a view over a damaged file tells so when it is queried, and the others work."""
    cause = ""
    for sql in statements:
        try:
            con.execute(sql)
        except duckdb.Error as e:
            name = re.match(r'CREATE (?:OR REPLACE )?VIEW\s+"?(\w+)"?\s+AS', sql)
            if name is None:  # an ATTACH: the views over it fail next
                cause = first_line(e)
                continue
            message = f"view {name[1]} cannot be read ({cause or first_line(e)}): check with `atomscope store verify`"
            con.execute(
                create_view(name[1], f"SELECT NULL AS problem WHERE error({literal(message)}) IS NULL")
            )


@functools.lru_cache(maxsize=8)
def _tokens_of(corpus: Path) -> duckdb.DuckDBPyConnection:
    """A connection with the `tokens` view of one corpus. A corpus is frozen, and to connect costs 15 ms: keep it."""
    con = _open(corpus.parent.parent, corpus)
    con.execute(create_view("tokens", tokens_sql(corpus)))
    return con


def select_rows(corpus: Path, where: str) -> np.ndarray:
    """Row ids, ascending, of the tokens of one corpus that meet a SQL condition."""
    if not (corpus / "tokens.parquet").exists():
        raise MissingDataError(f"{corpus} has no token table: build the corpus again")
    con = _tokens_of(corpus.resolve()).cursor()
    query = f"SELECT row FROM tokens WHERE (\n{where}\n) ORDER BY row"
    try:
        if len(con.extract_statements(query)) != 1:
            raise UsageError(f"where={where!r} is more than one condition")
        found = con.sql(query).fetchnumpy()["row"]
    except duckdb.Error as e:
        columns = ", ".join(con.sql("SELECT * FROM tokens LIMIT 0").columns)
        raise UsageError(f"where={where!r}: {first_line(e)}; columns: {columns}") from e
    finally:
        con.close()
    return np.asarray(found, dtype=np.int64)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
