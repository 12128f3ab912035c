"""Speed of the activation store, as ratios of interleaved pairs in one process. Above 1: the store is faster.

write_over_tofile   bytes/s of a Parquet shard, synced, over np.tofile of the same array, synced
raw_over_memcpy     bytes/s of the raw page path into a reused buffer, over memcpy from RAM into that buffer
raw_over_flat       the same over preadv of a flat file of the same bytes
shuffled_over_ram   rows/s of `store.stream`, over the same stream fed from an array in RAM instead of files
shuffled_over_gather  the same over a bare gather and cast in RAM, row ids known: what no loader can exceed by
                    much; the reading thread needs a free core to come near it
random_rows_vs_memmap   100 random rows as float32, over opening a np.memmap and fancy indexing; random_rows_vs_open_memmap
                    the same over a map that stays open
sql_rows_vs_duckdb_blob  `rows(where="tok = 3 ...")`, over selecting the vectors in DuckDB
metadata_bytes_share    bytes read by a query over tokens, norms and labels, as a share of the data (lower is better)
cold_over_preadv        cache_cold.py        shuffled_vs_saelens, write_vs_saelens   cache_saelens.py

A synthetic fp16 store of about 0.5 GB is written to a temporary workspace (page cache warm, one torch thread).
A pair is (reference, candidate) run one after the other; the figure is best candidate over best reference.
The last line is one JSON object. `--quick` is small, `--full` adds the cold store of 10 GB (else 1 GB, or 0.3).
Usage: python benchmarks/bench_cache.py [--quick | --full] [--rows N] [--d D] [--repeats R] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cache_cold import cold
from benchmarks.cache_saelens import versus_saelens
from cache.catalog import connect
from cache.pages import PageReader, rows_per_group, write_shard
from cache.records import COLUMN
from cache.store import ActivationStore
from cache.stream import Stream
from cache.vectors import Vectors
from cache.workspace import fsync_file
from cache.writer import TokenSlices, row_sums
from tests.corpora import HOOK, empty_store, make_corpus

BATCH = 4096
LABEL = "label_kind"
BUFFER_BYTES = 100 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=450_000)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="100,000 rows, 3 repeats, 0.3 GB cold")
    parser.add_argument("--full", action="store_true", help="10 GB cold")
    parser.add_argument("--folder", help="where to put the temporary stores (a real disk)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, repeats = (100_000, 3) if args.quick else (args.rows, args.repeats)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        corpus = make_corpus(Path(folder), [128] * (rows // 128), group_rows=122_880)
        store = empty_store(Path(folder), corpus, rows_per_shard=65_536)
        x = torch.randn(corpus.n_tokens, args.d, generator=torch.Generator().manual_seed(0)).half()
        flat = Path(folder) / "flat.bin"
        figures = {"gb": round(x.nbytes / 1e9, 3)} | write(store, x) | tofile(store, x, flat, repeats)
        figures |= raw_path(store, x, flat, repeats)
        figures |= shuffled(store, x, repeats)
        figures |= random_rows(store, x, flat, repeats)
        figures |= sql(store, x, repeats)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures |= cold(Path(folder), 0.3 if args.quick else 10 if args.full else 1, args.d)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures |= versus_saelens(
            Path(folder), 65_536 if args.quick else 122_880, 768, 2 if args.quick else 4
        )
    print(json.dumps(figures))


def write(store: ActivationStore, x: torch.Tensor) -> dict[str, float]:
    started = time.perf_counter()
    with store.writer() as writer:
        for i, (_, _, row0, row1) in enumerate(store.shards):
            writer.submit(i, HOOK, x[row0:row1])
    seconds = time.perf_counter() - started
    a, b = store.shards[0][2:]
    sums = timed(lambda: row_sums(x[a:b], store.row_class(a, b)))
    gb = x.nbytes / 1e9
    print(f"write          {gb / seconds:6.2f} GB/s with sums, fsync and read-back; sums alone "
          f"{x[a:b].nbytes / 1e9 / sums:.2f} GB/s")  # fmt: skip
    return {"write_gb_per_s": round(gb / seconds, 3)}


def tofile(store: ActivationStore, x: torch.Tensor, flat: Path, repeats: int) -> dict[str, float]:
    """One shard as Parquet and as a flat file, both synced; leaves all of `x` in `flat`."""
    a, b = store.shards[0][2:]
    raw = x.view(torch.uint8).numpy()
    narrow = TokenSlices(store.corpus.path / "tokens.parquet").read(a, b)

    def plain() -> None:
        raw[a:b].tofile(flat)
        fsync_file(flat)

    def parquet() -> None:
        path = flat.with_suffix(".parquet")
        write_shard(path, narrow, {COLUMN: raw[a:b]}, rows_per_group(raw.shape[1]))
        fsync_file(path)

    reference, ours = pairs(plain, parquet, repeats)
    gb = raw[a:b].nbytes / 1e9
    print(
        f"write a shard  {gb / ours:6.2f} GB/s against np.tofile {gb / reference:.2f} GB/s: {reference / ours:.2f}"
    )
    raw.tofile(flat)
    fsync_file(flat)
    return {"write_over_tofile": round(reference / ours, 3)}


def raw_path(store: ActivationStore, x: torch.Tensor, flat: Path, repeats: int) -> dict[str, float]:
    source, width = x.view(torch.uint8).numpy(), x.shape[1] * 2
    rows = BUFFER_BYTES // width
    buffer = np.zeros((rows, width), np.uint8)
    vectors = store.vectors(HOOK)
    readers: list[tuple[PageReader, int]] = [
        (vectors.reader(r.shard), len(r.groups)) for r in store.records(HOOK).values()
    ]
    jobs = row_group_jobs(readers, rows)

    def memcpy() -> None:
        done = 0
        for _, _, at, n in jobs:
            buffer[at : at + n] = source[done : done + n]
            done += n

    def raw() -> None:
        for reader, g, at, n in jobs:
            reader.read_into(g, COLUMN, buffer[at : at + n])

    def preadv() -> None:
        done = 0
        for _, _, at, n in jobs:
            os.preadv(fd, [buffer[at : at + n].data.cast("B")], done * width)
            done += n

    ram, disk = pairs(memcpy, raw, repeats)
    fd = os.open(flat, os.O_RDONLY)
    plain, again = pairs(preadv, raw, repeats)
    os.close(fd)
    gb = x.nbytes / 1e9
    print(
        f"raw page path  {gb / disk:6.2f} GB/s against memcpy {gb / ram:.2f} GB/s: {ram / disk:.2f}; against preadv of "
        f"a flat file {gb / plain:.2f} GB/s: {plain / again:.2f}"
    )
    return {"raw_over_memcpy": round(ram / disk, 3), "raw_over_flat": round(plain / again, 3)}


def row_group_jobs(
    readers: list[tuple[PageReader, int]], rows: int
) -> list[tuple[PageReader, int, int, int]]:
    """(reader, group, place in the buffer, rows) of every row group; the buffer is used round and round."""
    jobs, at = [], 0
    for reader, n_groups in readers:
        for g in range(n_groups):
            n = reader.groups[g]["rows"]
            at = at if at + n <= rows else 0
            jobs.append((reader, g, at, n))
            at += n
    return jobs


class RamVectors(Vectors):
    """The store's vectors from an array in RAM: what `Stream` does, without a file."""

    def __init__(self, store: ActivationStore, x: torch.Tensor) -> None:
        super().__init__(store.folder(HOOK), list(store.records(HOOK).values()))
        self.source = x.view(torch.uint8).numpy()

    def read_range(self, row0: int, row1: int, out: np.ndarray) -> None:
        out[:] = self.source[row0:row1]

    def will_need(self, row: int) -> None:
        pass


def shuffled(store: ActivationStore, x: torch.Tensor, repeats: int) -> dict[str, float]:
    window = min(
        32, -(-len(store.vectors(HOOK).blocks) // 4)
    )  # several windows, or nothing would be read again
    disk_stream, ram_stream = (
        store.stream(HOOK, batch_size=BATCH, split=None, window=window) for _ in range(2)
    )
    ram_stream._vectors = {HOOK: RamVectors(store, x)}
    n_batches = disk_stream.rows_per_epoch // BATCH
    ids = [next(ram_stream).row.clone() for _ in range(n_batches)]
    stage, out = torch.empty(BATCH, x.shape[1], dtype=x.dtype), torch.empty(2, BATCH, x.shape[1])

    def epoch(stream: Stream) -> None:
        for _ in range(n_batches):
            next(stream)

    def gather() -> None:
        for i, rows in enumerate(ids):
            torch.index_select(x, 0, rows, out=stage)
            out[i % 2].copy_(stage)

    ram, disk = pairs(lambda: epoch(ram_stream), lambda: epoch(disk_stream), repeats)
    bare, again = pairs(gather, lambda: epoch(disk_stream), repeats)
    disk_stream.close(), ram_stream.close()
    rows = n_batches * BATCH
    print(
        f"shuffled       {rows / disk / 1e3:6.0f} krows/s against RAM {rows / ram / 1e3:.0f}: {ram / disk:.2f} "
        f"(against the gather alone: {bare / again:.2f})"
    )
    return {"shuffled_over_ram": round(ram / disk, 3), "shuffled_over_gather": round(bare / again, 3)}


def random_rows(store: ActivationStore, x: torch.Tensor, flat: Path, repeats: int) -> dict[str, float]:
    ids = np.random.default_rng(0).choice(len(x), 100, replace=False)
    mapped = np.memmap(flat, np.float16, "r", shape=tuple(x.shape))

    def memmap() -> None:
        for _ in range(20):
            np.memmap(flat, np.float16, "r", shape=tuple(x.shape))[ids].astype(np.float32)

    def opened() -> None:
        for _ in range(20):
            mapped[ids].astype(np.float32)

    def ours() -> None:
        for _ in range(20):
            store.rows(HOOK, ids)

    plain, disk = pairs(memmap, ours, repeats)
    kept, again = pairs(opened, ours, repeats)
    print(
        f"100 random rows {disk * 50:5.2f} ms against np.memmap {plain * 50:.2f} ms: {plain / disk:.2f} "
        f"(against an open one {kept * 50:.2f} ms: {kept / again:.2f})"
    )
    return {
        "random_rows_vs_memmap": round(plain / disk, 3),
        "random_rows_vs_open_memmap": round(kept / again, 3),
        "random_100_rows_ms": round(disk * 50, 3),
    }


def sql(store: ActivationStore, x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Vectors of one token in documents with one label at low positions; and what metadata queries read."""
    files = [str(store.folder(HOOK) / r.file) for r in store.records(HOOK).values()]
    query = f"SELECT x FROM read_parquet({files}) WHERE tok = 3 AND pos < 12 AND doc % 2 = 1"

    def blob() -> None:
        column = duckdb.connect().sql(query).to_arrow_table().column(0).combine_chunks()
        np.frombuffer(column.buffers()[2], np.float16).astype(np.float32)

    def ours() -> None:
        store.rows(HOOK, where=f"tok = 3 AND pos < 12 AND {LABEL} = 'odd'")

    plain, disk = pairs(blob, ours, max(2, repeats // 2))
    n = len(store.rows(HOOK, where=f"tok = 3 AND pos < 12 AND {LABEL} = 'odd'"))
    con = connect(store.workspace)
    before = bytes_read()
    con.execute(
        f"SELECT t.token, avg(r.norm) FROM rows_{HOOK.replace('.', '_')} r JOIN tokens t USING (corpus, row) "
        f"WHERE t.{LABEL} = 'odd' GROUP BY 1"
    ).fetchall()
    share = (bytes_read() - before) / x.nbytes
    print(
        f"SQL            {n:,} rows by condition {disk * 1e3:.0f} ms against {plain * 1e3:.0f} ms by DuckDB: "
        f"{plain / disk:.1f}; a query on metadata reads {share:.2%} of the data"
    )
    return {"sql_rows_vs_duckdb_blob": round(plain / disk, 2), "metadata_bytes_share": round(share, 5)}


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def pairs(reference: Callable[[], object], candidate: Callable[[], object], n: int) -> tuple[float, float]:
    """Best times of both, run in turn after one warm-up each."""
    reference(), candidate()
    times = [(timed(reference), timed(candidate)) for _ in range(n)]
    return min(t[0] for t in times), min(t[1] for t in times)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
