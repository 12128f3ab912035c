"""The raw page path: its bytes are the bytes that pyarrow and DuckDB read from the same file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError
from cache.pages import MAX_GROUP_ROWS, PageReader, parse_page_header, rows_per_group, write_shard


def write(path: Path, wide: dict[str, np.ndarray], group_rows: int) -> PageReader:
    n = len(next(iter(wide.values())))
    narrow = pa.table({"doc": np.arange(n, dtype=np.int32), "norm": np.ones(n, np.float32)})
    return PageReader(path, write_shard(path, narrow, wide, group_rows), path.stat().st_size)


def read_all(reader: PageReader, column: str, like: np.ndarray) -> np.ndarray:
    out, at = np.empty_like(like), 0
    for g, group in enumerate(reader.groups):
        reader.read_into(g, column, out[at : at + group["rows"]])
        at += group["rows"]
    assert at == len(like)
    return out


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    d=st.integers(1, 40),
    k=st.integers(1, 9),
    dtype=st.sampled_from([np.float16, np.float32, np.uint16, np.int32]),
    group_rows=st.integers(1, 130),
    seed=st.integers(0, 2**32 - 1),
)
def test_raw_path_pyarrow_and_duckdb_read_the_same_bytes(
    n: int, d: int, k: int, dtype: type, group_rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (n, d * np.dtype(dtype).itemsize), dtype=np.uint8)
    wide = {"x": bits.view(dtype), "ids": rng.integers(0, 65536, (n, k), dtype=np.uint16)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        reader = write(path, wide, group_rows)
        table = pq.read_table(path)
        con = duckdb.connect()
        for name, array in wide.items():
            want = array.tobytes()
            assert read_all(reader, name, array).tobytes() == want
            assert b"".join(table.column(name).to_pylist()) == want
            rows = con.execute(f"SELECT {name} FROM read_parquet('{path}') ORDER BY doc").fetchall()
            assert b"".join(bytes(r[0]) for r in rows) == want
        assert all(
            reader.digest(g, c) == p["xxh3"]
            for g, o in enumerate(reader.groups)
            for c, p in o["pages"].items()
        )


def test_a_part_of_a_row_group_can_be_read(tmp_path: Path) -> None:
    x = np.arange(100 * 6, dtype=np.float32).reshape(100, 6)
    reader = write(tmp_path / "a.parquet", {"x": x}, 40)
    out = np.empty((7, 6), np.float32)
    reader.read_into(1, "x", out, start=33)
    assert np.array_equal(out, x[73:80])
    with pytest.raises(DataError, match=r"rows 34\.\.41 are not in row group 1"):
        reader.read_into(1, "x", out, start=34)


def test_the_largest_row_group_is_still_one_page(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 2**16, (MAX_GROUP_ROWS + 5, 4), dtype=np.uint16)
    reader = write(tmp_path / "a.parquet", {"x": x}, MAX_GROUP_ROWS)
    assert [g["rows"] for g in reader.groups] == [MAX_GROUP_ROWS, 5]
    assert np.array_equal(read_all(reader, "x", x), x)


def test_files_that_pyarrow_wrote_with_several_pages_are_refused_and_not_misread(tmp_path: Path) -> None:
    n, path = 50_000, tmp_path / "pages.parquet"
    x = np.arange(n * 2, dtype=np.uint16).reshape(n, 2)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4), n, [None, pa.py_buffer(x)])
    schema = pa.schema([pa.field("x", pa.binary(4), nullable=False)])
    pq.write_table(
        pa.Table.from_arrays([column], schema=schema), path, compression="none", use_dictionary=False
    )
    chunk = pq.read_metadata(path).row_group(0).column(0)
    start, length = chunk.data_page_offset, chunk.total_compressed_size - n * 4
    page = {"header": start, "offset": start + min(length, 255), "width": 4, "xxh3": ""}
    with pytest.raises(DataError, match="not the page its record describes"):
        PageReader(path, [{"rows": n, "pages": {"x": page}}]).read_into(0, "x", np.empty_like(x))


@pytest.mark.parametrize("shift", [-1, 1, 64])
def test_a_wrong_offset_in_a_record_is_refused(tmp_path: Path, shift: int) -> None:
    reader = write(tmp_path / "a.parquet", {"x": np.ones((50, 8), np.float16)}, 20)
    reader.groups[1]["pages"]["x"]["offset"] += shift
    with pytest.raises(DataError, match="row group 1"):
        reader.read_into(1, "x", np.empty((20, 8), np.float16))


def test_page_header_fields_are_those_of_the_format() -> None:
    raw = bytes.fromhex("1500158080800215808080022c158080021500150615061c000000") + b"values"
    assert parse_page_header(raw) == {
        "type": 0,
        "uncompressed": 2**21,
        "compressed": 2**21,
        "num_values": 2**14,
        "encoding": 0,
        "length": 27,
    }


def test_row_groups_are_about_6_mb_and_never_past_the_page_limit() -> None:
    assert rows_per_group(2 * 768) == 4096
    assert rows_per_group(2 * 4) == MAX_GROUP_ROWS
    assert rows_per_group(2**30) == 1
    assert 4e6 <= rows_per_group(2 * 576) * 2 * 576 <= 8e6


def test_columns_that_are_not_contiguous_or_of_one_length_are_refused(tmp_path: Path) -> None:
    x = np.ones((6, 4), np.float32)
    with pytest.raises(DataError, match="C-contiguous"):
        write(tmp_path / "a.parquet", {"x": x.T}, 2)
    with pytest.raises(DataError, match="differ in length"):
        write(tmp_path / "a.parquet", {"x": x, "y": x[:3]}, 2)
    with pytest.raises(DataError, match="rows_per_group"):
        write(tmp_path / "a.parquet", {"x": x}, MAX_GROUP_ROWS + 1)
