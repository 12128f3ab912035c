"""Codes on disk, token-major: one Parquet file per shard of the store, with raw-page columns `ids` and `values`.

    features/<sae_id>@<store>/codes/shard-00000.parquet   ids uint16|uint32 [k], values float16 [k] of each row
                                    shard-00000.json      commit record: rows, row groups, hashes, k

Row i of a shard is row `row0 + i` of the token table. Rows that were left out (position 0) hold zeros: a value of 0
is not a firing. float16 keeps 3 digits; where an activation does not fit, the shard is written in float32 and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from cache.errors import DataError, MissingDataError
from cache.pages import PageReader, rows_per_group, write_shard
from cache.workspace import atomic_file, read_json, write_json

FLOAT16_LIMIT = 60_000.0


class CodeBlock(NamedTuple):
    """Codes of consecutive rows: first row id, ids `[n, k]` unsigned, values float32 `[n, k]`."""

    row0: int
    ids: np.ndarray
    values: np.ndarray


def id_dtype(d_sae: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if d_sae <= 2**16 else np.uint32


def record_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.json"


def write_codes(folder: Path, shard: int, row0: int, ids: np.ndarray, values: np.ndarray) -> None:
    """Write and commit one shard: ids `[n, k]`, values float32 `[n, k]`."""
    top = float(np.abs(values).max(initial=0.0))
    values = np.ascontiguousarray(values, dtype=np.float16 if top < FLOAT16_LIMIT else np.float32)
    wide = {"ids": np.ascontiguousarray(ids), "values": values}
    group_rows = rows_per_group(values.shape[1] * max(values.itemsize, ids.itemsize))
    rows = pa.table({"row": pa.array(np.arange(row0, row0 + len(ids), dtype=np.int64))})
    data = folder / f"shard-{shard:05d}.parquet"
    with atomic_file(data) as tmp:
        groups = write_shard(tmp, rows, wide, group_rows)
    record = {
        "schema_version": 1,
        "row0": row0,
        "rows": len(ids),
        "k": int(ids.shape[1]),
        "ids": str(ids.dtype),
        "values": str(values.dtype),
        "bytes": data.stat().st_size,
        "groups": list(groups),
    }
    write_json(record_file(folder, shard), record)


def read_codes(folder: Path, shards: int) -> Iterator[CodeBlock]:
    """All committed codes in row order, one row group at a time; each is checked against its hash."""
    for shard in range(shards):
        path = record_file(folder, shard)
        if not path.is_file():
            raise MissingDataError(f"{folder} lacks shard {shard} of {shards}: run `atomscope index` again")
        record = read_json(path)
        reader = PageReader(folder / f"shard-{shard:05d}.parquet", record["groups"], record["bytes"])
        row = record["row0"]
        for g, group in enumerate(record["groups"]):
            shape = (group["rows"], record["k"])
            out = {name: np.empty(shape, dtype=record[name]) for name in ("ids", "values")}
            for name, array in out.items():
                reader.read_into(g, name, array)
                if xxhash.xxh3_64_hexdigest(array.data) != group["pages"][name]["xxh3"]:
                    raise DataError(
                        f"{reader.path}: row group {g} is damaged; delete it and run `atomscope index` again"
                    )
            yield CodeBlock(row, out["ids"], out["values"].astype(np.float32))
            row += group["rows"]
        reader.close()
