"""Speed of the activation store, as ratios of interleaved pairs in one process.

raw_over_memcpy     bytes/s of the raw page path into a reused buffer, over memcpy from RAM into that buffer
shuffled_over_ram   rows/s of `store.stream`, over the same stream fed from an array in RAM instead of files
shuffled_over_gather  the same over a bare gather and cast in RAM, row ids known: what no loader can exceed by
                    much; the reading thread needs a free core to come near it

A synthetic fp16 store of about 0.5 GB is written to a temporary workspace (page cache warm, one torch thread).
A pair is (reference, candidate) run one after the other; the figure is best candidate over best reference.
The last line is one JSON object. Usage: python benchmarks/bench_cache.py [--rows N] [--d D] [--repeats R]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache.pages import PageReader
from cache.records import COLUMN
from cache.store import ActivationStore
from cache.stream import Stream
from cache.vectors import Vectors
from cache.writer import row_sums
from tests.corpora import HOOK, empty_store, make_corpus

BATCH = 4096
BUFFER_BYTES = 100 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=450_000)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), [128] * (args.rows // 128))
        store = empty_store(Path(folder), corpus, rows_per_shard=65_536)
        x = torch.randn(corpus.n_tokens, args.d, generator=torch.Generator().manual_seed(0)).half()
        figures = {"gb": round(x.nbytes / 1e9, 3)} | write(store, x)
        figures |= raw_path(store, x, args.repeats)
        figures |= shuffled(store, x, args.repeats)
        figures |= random_rows(store, x, args.repeats)
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


def raw_path(store: ActivationStore, x: torch.Tensor, repeats: int) -> dict[str, float]:
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

    ram, disk = pairs(memcpy, raw, repeats)
    gb = x.nbytes / 1e9
    print(f"raw page path  {gb / disk:6.2f} GB/s against memcpy {gb / ram:.2f} GB/s: {ram / disk:.2f}")
    return {"raw_over_memcpy": round(ram / disk, 3)}


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


def shuffled(store: ActivationStore, x: torch.Tensor, repeats: int) -> dict[str, float]:
    disk_stream, ram_stream = (store.stream(HOOK, batch_size=BATCH, split=None) for _ in range(2))
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


def random_rows(store: ActivationStore, x: torch.Tensor, repeats: int) -> dict[str, float]:
    ids = np.random.default_rng(0).choice(len(x), 100, replace=False)
    ram, disk = pairs(lambda: x[torch.from_numpy(ids)].float(), lambda: store.rows(HOOK, ids), repeats)
    print(f"100 random rows {disk * 1e3:5.2f} ms (in RAM {ram * 1e3:.2f} ms)")
    return {"random_100_rows_ms": round(disk * 1e3, 3)}


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
