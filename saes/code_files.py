"""Codes on disk, token-major: for each shard of the store one Parquet file of raw pages and its commit record.

    features/<sae_id>@<store>/codes/shard-00000.parquet   fixed k: ids uint16|uint32 [k], values float16 [k] of each row
                                    shard-00000.parquet   variable L0: ids and values one after the other, BLOCK a page
                                                          row, the last one filled up with zeros
                                    shard-00000-counts.parquet   variable L0: row, n (stored values of each row)
                                    shard-00000.json      rows, encoded rows, row groups, hashes, k (0: variable)

Row i of a shard is row `row0 + i` of the token table. Rows that were left out (position 0) hold zeros or nothing: a
value of 0 is not a firing. float16 keeps 3 digits; where an activation does not fit, the shard is written in float32
and says so. Variable codes are written and read a row group at a time: memory does not grow with L0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cache.errors import DataError, MissingDataError
from cache.pages import PageReader, rows_per_group, write_groups, write_shard
from cache.workspace import atomic_file, read_json, write_json

FLOAT16_LIMIT = 60_000.0
BLOCK = 64
GROUP_BLOCKS = 16_384
"""A row group of variable codes holds BLOCK * GROUP_BLOCKS values, about a million."""


class CodeBlock(NamedTuple):
    """Codes of consecutive rows, flat: row ids int64, ids unsigned, values float32, all `[n]`, in row order."""

    rows: np.ndarray
    ids: np.ndarray
    values: np.ndarray


class Part(NamedTuple):
    """Codes of some rows of a shard in rising order: places in the shard int64 `[m]`, counts `[m]`, flat ids and values."""

    at: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    values: np.ndarray


class _TooLarge(Exception):
    """An activation does not fit into float16."""


def id_dtype(d_sae: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if d_sae <= 2**16 else np.uint32


def record_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.json"


def data_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"


def counts_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}-counts.parquet"


def write_codes(
    folder: Path, shard: int, row0: int, ids: np.ndarray, values: np.ndarray, encoded: int
) -> None:
    """Write and commit one shard of fixed k: ids `[n, k]`, values float32 `[n, k]`, of which `encoded` rows were encoded."""
    top = float(np.abs(values).max(initial=0.0))
    values = np.ascontiguousarray(values, dtype=np.float16 if top < FLOAT16_LIMIT else np.float32)
    wide = {"ids": np.ascontiguousarray(ids), "values": values}
    group_rows = rows_per_group(values.shape[1] * max(values.itemsize, ids.itemsize))
    rows = pa.table({"row": pa.array(np.arange(row0, row0 + len(ids), dtype=np.int64))})
    data = data_file(folder, shard)
    with atomic_file(data) as tmp:
        groups = write_shard(tmp, rows, wide, group_rows)
    dtypes = {"ids": str(ids.dtype), "values": str(values.dtype)}
    _commit(
        folder, shard, row0, len(ids), {"k": int(ids.shape[1]), "encoded": encoded, "groups": groups} | dtypes
    )


def write_varying(
    folder: Path, shard: int, row0: int, rows: int, parts: Callable[[], Iterable[Part]], d_sae: int
) -> None:
    """Write and commit one shard of variable L0. `parts()` gives its rows; it is called again where float16 is too small."""
    data, ids = data_file(folder, shard), np.dtype(id_dtype(d_sae))
    for dtype in (np.float16, np.float32):
        counts, encoded = np.zeros(rows, dtype=np.uint32), np.zeros(1, dtype=np.int64)
        try:
            with atomic_file(data) as tmp:
                groups = write_groups(tmp, _groups(parts(), counts, encoded, ids, np.dtype(dtype)))
            break
        except _TooLarge:
            continue
    table = pa.table({"row": np.arange(row0, row0 + rows, dtype=np.int64), "n": counts})
    with atomic_file(counts_file(folder, shard)) as tmp:
        pq.write_table(table, tmp, compression="zstd")
    record = {"k": 0, "encoded": int(encoded[0]), "nnz": int(counts.sum(dtype=np.int64)), "groups": groups}
    record |= {"counts_xxh3": xxhash.xxh3_64_hexdigest(counts.data)}
    _commit(folder, shard, row0, rows, record | {"ids": str(ids), "values": str(np.dtype(dtype))})


def _commit(folder: Path, shard: int, row0: int, rows: int, more: dict[str, Any]) -> None:
    size = data_file(folder, shard).stat().st_size
    write_json(
        record_file(folder, shard), {"schema_version": 1, "row0": row0, "rows": rows, "bytes": size} | more
    )


def _groups(
    parts: Iterable[Part], counts: np.ndarray, encoded: np.ndarray, ids: np.dtype, values: np.dtype
) -> Iterator[dict[str, np.ndarray]]:
    """Row groups of full pages from the parts, whose counts are filled in on the way."""
    full = BLOCK * GROUP_BLOCKS
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    held = n_groups = 0
    for part in parts:
        counts[part.at] = part.counts
        encoded += len(part.at)
        if values == np.float16 and np.abs(part.values).max(initial=0.0) >= FLOAT16_LIMIT:
            raise _TooLarge
        waiting.append((part.ids.astype(ids), part.values.astype(values)))
        held += len(part.ids)
        while held >= full:
            columns = [np.concatenate(c) for c in zip(*waiting, strict=True)]
            yield _pages(columns[0][:full], columns[1][:full])
            waiting, held, n_groups = [(columns[0][full:], columns[1][full:])], held - full, n_groups + 1
    if held or not n_groups:
        empty = (np.zeros(0, ids), np.zeros(0, values))
        columns = [np.concatenate(c) for c in zip(empty, *waiting, strict=True)]
        yield _pages(columns[0], columns[1])


def _pages(ids: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    fill = (-len(ids)) % BLOCK or (0 if len(ids) else BLOCK)
    padded = {"ids": np.pad(ids, (0, fill)), "values": np.pad(values, (0, fill))}
    return {name: np.ascontiguousarray(a.reshape(-1, BLOCK)) for name, a in padded.items()}


def encoded_rows(folder: Path, shards: Iterable[int]) -> int | None:
    """Rows that were encoded, from the records; None where an older version wrote one of them without it."""
    counts = [read_json(record_file(folder, s)).get("encoded") for s in shards]
    return None if None in counts else sum(counts)


def stored_values(folder: Path, shards: Iterable[int]) -> int:
    """Values that `read_codes` will give, zeros included."""
    records = (read_json(record_file(folder, s)) for s in shards)
    return sum(r["rows"] * r["k"] if r["k"] else r["nnz"] for r in records)


def has_wide_values(folder: Path, shards: Iterable[int]) -> bool:
    """Whether a shard holds activations that float16 does not."""
    return any(read_json(record_file(folder, s))["values"] != "float16" for s in shards)


def read_codes(folder: Path, shards: Iterable[int]) -> Iterator[CodeBlock]:
    """The codes of committed shards, about a row group at a time; each is checked against its hash."""
    for shard in shards:
        path = record_file(folder, shard)
        if not path.is_file():
            raise MissingDataError(f"{folder} lacks shard {shard}: run `atomscope index` again")
        record = read_json(path)
        reader = PageReader(data_file(folder, shard), record["groups"], record["bytes"])
        try:
            read = (
                _read_fixed(reader, record) if record["k"] else _read_varying(reader, record, folder, shard)
            )
            yield from read
        finally:
            reader.close()


def _read_group(reader: PageReader, record: dict[str, Any], g: int, width: int) -> dict[str, np.ndarray]:
    """Flat ids and values of one row group, checked."""
    out = {}
    for name in ("ids", "values"):
        array = np.empty((record["groups"][g]["rows"], width), dtype=record[name])
        reader.read_into(g, name, array)
        if xxhash.xxh3_64_hexdigest(array.data) != record["groups"][g]["pages"][name]["xxh3"]:
            raise _damaged(reader.path, f"row group {g}")
        out[name] = array.reshape(-1)
    return out


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what} is damaged; delete it and run `atomscope index` again")


def _read_fixed(reader: PageReader, record: dict[str, Any]) -> Iterator[CodeBlock]:
    row, k = record["row0"], record["k"]
    for g, group in enumerate(record["groups"]):
        flat = _read_group(reader, record, g, k)
        rows = np.arange(row, row + group["rows"], dtype=np.int64).repeat(k)
        yield CodeBlock(rows, flat["ids"], flat["values"].astype(np.float32))
        row += group["rows"]


def _read_varying(
    reader: PageReader, record: dict[str, Any], folder: Path, shard: int
) -> Iterator[CodeBlock]:
    path = counts_file(folder, shard)
    try:
        counts = pq.read_table(path)["n"].to_numpy()
    except (OSError, pa.ArrowException) as e:
        raise _damaged(path, "the file") from e
    counts = np.ascontiguousarray(counts)
    if xxhash.xxh3_64_hexdigest(counts.data) != record["counts_xxh3"]:
        raise _damaged(path, "the column n")
    ends = np.cumsum(counts, dtype=np.int64)
    at = 0
    for g in range(len(record["groups"])):
        flat = _read_group(reader, record, g, BLOCK)
        n = min(len(flat["ids"]), record["nnz"] - at)
        # the row of value i is the first one that ends past it
        first, last = np.searchsorted(ends, [at, at + n - 1], side="right") if n else (0, -1)
        upto = np.minimum(ends[first : last + 1], at + n) - at
        rows = np.arange(first, last + 1).repeat(np.diff(upto, prepend=0)) + record["row0"]
        yield CodeBlock(rows, flat["ids"][:n], flat["values"][:n].astype(np.float32))
        at += n
