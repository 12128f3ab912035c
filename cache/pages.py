"""Vectors in Parquet whose bytes can be read at a known offset, as fast as a flat file.

A wide column is FIXED_LEN_BYTE_ARRAY(itemsize * d): required, PLAIN, uncompressed, without dictionary and
statistics, exactly one data page a row group. The values of a row group are then one byte range, which
`PageReader` fetches with `preadv`, while pyarrow and DuckDB read the same file as plain Parquet.
Narrow columns of the same file (ids, norms) are zstd with statistics.
Parquet checks nothing about those bytes, so every read checks the page header and every row group has an xxh3.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cache.errors import AtomscopeError, DataError

GROUP_BYTES = 6 * 2**20  # target size of a row group
MAX_GROUP_ROWS = 16_384  # pyarrow splits pages at 20,000 rows unless told otherwise
_ONE_PAGE = 2**30
_HEADER_LIMIT = 256  # a page header without statistics has 25 to 34 bytes


class Page(TypedDict):
    """Where the values of one wide column of one row group are."""

    header: int  # file offset of the page header, bytes
    offset: int  # file offset of the first value, bytes
    width: int  # bytes of one row
    xxh3: str  # xxh3_64 of the values, hex


class Group(TypedDict):
    """One row group, as stored in a commit record."""

    rows: int
    pages: dict[str, Page]


def rows_per_group(width: int) -> int:
    """Rows of a row group for rows of `width` bytes: about 6 MB, at most 16,384 rows."""
    return max(1, min(MAX_GROUP_ROWS, GROUP_BYTES // width))


def as_bytes(array: np.ndarray) -> np.ndarray:
    """A C-contiguous [n, d] array as uint8 [n, d * itemsize], without a copy."""
    if array.ndim != 2 or not array.flags.c_contiguous:
        raise DataError(f"a wide column must be C-contiguous [n, d], got {array.shape}, {array.strides=}")
    return array.view(np.uint8)


def write_shard(
    path: Path,
    narrow: pa.Table,
    wide: Mapping[str, np.ndarray],
    rows_per_group: int,
    metadata: Mapping[str, str] | None = None,
) -> list[Group]:
    """Write a Parquet file of `narrow` and `wide` columns (each [n, d], same n); return its row groups.

    The path is written directly: wrap the call in `workspace.atomic_file`.
    """
    columns = {name: as_bytes(array) for name, array in wide.items()}
    n = narrow.num_rows
    if any(len(c) != n for c in columns.values()):
        raise DataError(f"columns differ in length: {n} rows and { {k: len(c) for k, c in columns.items()} }")
    if not 0 < rows_per_group <= MAX_GROUP_ROWS:
        raise DataError(f"rows_per_group must be in 1..{MAX_GROUP_ROWS}, got {rows_per_group}")
    schema = _schema(narrow.schema, columns, metadata)
    hashes: list[dict[str, str]] = []
    with pq.ParquetWriter(path, schema, **_settings(narrow.column_names, columns)) as writer:
        for r0 in range(0, n, rows_per_group):
            part = {name: c[r0 : r0 + rows_per_group] for name, c in columns.items()}
            rows = min(rows_per_group, n - r0)
            arrays = [c.combine_chunks() for c in narrow.slice(r0, rows).columns]
            arrays += [_fixed(a) for a in part.values()]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=rows)
            hashes.append({name: xxhash.xxh3_64_hexdigest(a.data) for name, a in part.items()})
    return _locate(path, columns, hashes)


def write_groups(path: Path, groups: Iterable[Mapping[str, np.ndarray]]) -> list[Group]:
    """Write wide columns alone, one row group for each mapping as it comes; return the row groups.

    For data that should not be held whole. Every mapping has the same columns and widths, and at most MAX_GROUP_ROWS
    rows; at least one is needed. The path is written directly: wrap the call in `workspace.atomic_file`.
    """
    hashes: list[dict[str, str]] = []
    columns: dict[str, np.ndarray] = {}
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for group in groups:
            columns = {name: as_bytes(array) for name, array in group.items()}
            schema = _schema(pa.schema([]), columns, None)
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(path, schema, **_settings([], columns)))
            arrays = [_fixed(a) for a in columns.values()]
            rows = len(arrays[0])
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=rows)
            hashes.append({name: xxhash.xxh3_64_hexdigest(a.data) for name, a in columns.items()})
    return _locate(path, columns, hashes)


def _schema(
    narrow: pa.Schema, wide: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> pa.Schema:
    fields = [f.with_nullable(False) for f in narrow]
    fields += [pa.field(name, pa.binary(c.shape[1]), nullable=False) for name, c in wide.items()]
    return pa.schema(fields, metadata=dict(metadata or {}))


def _settings(narrow: Sequence[str], wide: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "compression": dict.fromkeys(narrow, "zstd") | dict.fromkeys(wide, "none"),
        "use_dictionary": False,
        "write_statistics": list(narrow),  # on a wide column they would put two vectors into every header
        "data_page_size": _ONE_PAGE,
        "max_rows_per_page": _ONE_PAGE,
    }


def _fixed(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
    )


def _locate(path: Path, wide: Mapping[str, np.ndarray], hashes: list[dict[str, str]]) -> list[Group]:
    """Offsets of the values, from the footer: a header is what the chunk has beyond its values."""
    meta = pq.read_metadata(path)
    index = {meta.schema.column(i).name: i for i in range(meta.num_columns)}
    groups: list[Group] = []
    for g, digests in enumerate(hashes):
        row_group = meta.row_group(g)
        pages: dict[str, Page] = {}
        for name, array in wide.items():
            chunk, width = row_group.column(index[name]), array.shape[1]
            length = chunk.total_compressed_size - row_group.num_rows * width
            if not 0 < length < _HEADER_LIMIT:
                raise AtomscopeError(f"{path}: row group {g} is not one plain page: use pyarrow >= 21")
            start = chunk.data_page_offset
            pages[name] = Page(header=start, offset=start + length, width=width, xxh3=digests[name])
        groups.append(Group(rows=row_group.num_rows, pages=pages))
    return groups


class PageReader:
    """Read rows of wide columns by offset. Thread-safe; the file is closed with the object."""

    def __init__(self, path: Path, groups: Sequence[Group], size: int | None = None) -> None:
        self.path, self.groups = path, groups
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise DataError(
                f"{path} cannot be read ({e.strerror}): delete its .json and harvest again"
            ) from e
        found = os.fstat(self._fd).st_size
        if size is not None and found != size:
            raise DataError(
                f"{path} has {found:,} bytes, its record says {size:,}: delete its .json and harvest again"
            )
        self._checked: set[tuple[int, str]] = set()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, group: int, column: str, out: np.ndarray, start: int = 0) -> None:
        """Fill `out` (C-contiguous, any dtype) with rows `start`.. of `column` in row group `group`."""
        g = self.groups[group]
        page = g["pages"][column]
        rows, rest = divmod(out.nbytes, page["width"])
        if rest or start < 0 or start + rows > g["rows"]:
            raise DataError(f"{self.path}: rows {start}..{start + rows} are not in row group {group}")
        if (group, column) not in self._checked:
            self._check_header(group, column)
        self._fill(out, page["offset"] + start * page["width"])

    def will_need(self, group: int, column: str) -> None:
        """Ask the system to read these values ahead; returns at once."""
        page = self.groups[group]["pages"][column]
        if hasattr(os, "posix_fadvise"):
            n_bytes = self.groups[group]["rows"] * page["width"]
            os.posix_fadvise(self._fd, page["offset"], n_bytes, os.POSIX_FADV_WILLNEED)

    def digest(self, group: int, column: str) -> str:
        """xxh3 of the values on disk, to compare with the record's."""
        page = self.groups[group]["pages"][column]
        buffer = np.empty(self.groups[group]["rows"] * page["width"], np.uint8)
        self.read_into(group, column, buffer)
        return xxhash.xxh3_64_hexdigest(buffer.data)

    def _fill(self, out: np.ndarray, offset: int) -> None:
        view = out.data.cast("B")
        done = os.preadv(self._fd, [view], offset)
        while done < len(view):  # one call reads at most 2 GB
            n = os.preadv(self._fd, [view[done:]], offset + done)
            if n <= 0:
                raise DataError(f"{self.path} ends early: delete its .json and harvest again")
            done += n

    def _check_header(self, group: int, column: str) -> None:
        g = self.groups[group]
        page = g["pages"][column]
        length, nbytes = page["offset"] - page["header"], g["rows"] * page["width"]
        if not 0 < length < _HEADER_LIMIT:
            raise DataError(f"{self.path}: row group {group} of {column!r} has a wrong offset in its record")
        raw = np.empty(length, np.uint8)
        self._fill(raw, page["header"])
        want = {
            "type": 0,
            "uncompressed": nbytes,
            "compressed": nbytes,
            "num_values": g["rows"],
            "encoding": 0,
        }
        try:
            found = parse_page_header(raw.tobytes())
        except (IndexError, ValueError):
            found = {}
        if found != want | {"length": length}:
            raise DataError(
                f"{self.path}: row group {group} of {column!r} is not the page its record describes: "
                "delete its .json and harvest again"
            )
        self._checked.add((group, column))


def parse_page_header(raw: bytes) -> dict[str, int]:
    """Fields of a Parquet PageHeader (Thrift compact protocol) of a data page v1 without statistics."""
    out: dict[str, int] = {}
    top, nested = {1: "type", 2: "uncompressed", 3: "compressed"}, {1: "num_values", 2: "encoding"}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def struct(names: dict[int, str], depth: int) -> None:
        nonlocal at
        field = 0
        while True:
            head = raw[at]
            at += 1
            if head == 0:
                return
            if not head >> 4:
                raise ValueError("long field ids are not used in a page header")
            field += head >> 4
            kind = head & 0x0F
            if kind == 12:  # field 5 is the data page header; pyarrow puts an empty statistics struct in it
                struct(nested if depth == 0 and field == 5 else {}, depth + 1)
            elif kind in (4, 5, 6):  # zigzag i16, i32, i64
                value = varint()
                if field in names:
                    out[names[field]] = (value >> 1) ^ -(value & 1)
            else:
                raise ValueError(f"unexpected field {field} of type {kind} in a page header")

    struct(top, 0)
    out["length"] = at
    return out
