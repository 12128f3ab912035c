"""A store that is read from the disk, not from memory: the cold part of bench_cache.py, in a process of its own.

Reference: one `preadv` per row group into one reused buffer, file by file. Candidates: `store.sequential` in the
stored dtype, and one epoch of `store.stream` (shuffled, float32). Before each pass the page cache of every file is
dropped (posix_fadvise DONTNEED on closed, synced files; the host of a virtual machine may still cache them).
Peak memory is the growth of the process's peak resident size over a candidate's passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache.records import COLUMN
from cache.store import ActivationStore
from tests.corpora import HOOK, empty_store, make_corpus

BATCH = 4096
REPEATS = 3


def cold(folder: Path, gigabytes: float, d: int) -> dict[str, float]:
    """Write a synthetic fp16 store of this size, and measure it in a fresh process."""
    rows = int(gigabytes * 1e9 / (2 * d)) // 128 * 128
    store = empty_store(
        folder, make_corpus(folder, [128] * (rows // 128), group_rows=122_880), rows_per_shard=262_144
    )
    x = torch.randn(262_144, d, generator=torch.Generator().manual_seed(0)).half()
    with store.writer(queue_size=1) as writer:
        for i, (_, _, row0, row1) in enumerate(store.shards):
            writer.submit(i, HOOK, x[: row1 - row0])
    command = [sys.executable, __file__, str(store.path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.splitlines()[-1])
    print(
        f"cold           {found['cold_preadv_gb_per_s']:6.2f} GB/s by preadv over {found['cold_gb']} GB; sequential "
        f"{found['cold_over_preadv']:.2f} of it with {found['cold_rss_gib']:.2f} GiB more memory, shuffled stream "
        f"{found['cold_stream_over_preadv']:.2f} with {found['cold_stream_rss_gib']:.2f} GiB"
    )
    return found


def drop(files: list[Path]) -> None:
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def peak() -> float:
    """GiB that this process has had resident at most (getrusage would count its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def measure(path: str) -> dict[str, float]:
    torch.set_num_threads(1)
    store = ActivationStore.open(path)
    records = list(store.records(HOOK).values())
    files = [store.folder(HOOK) / r.file for r in records]
    dtype = {"fp16": torch.float16}[store.dtype(HOOK)]
    n_bytes = store.n_rows(HOOK) * records[0].groups[0]["pages"][COLUMN]["width"]
    buffer = memoryview(
        np.zeros(max(g["rows"] for r in records for g in r.groups) * store.d(HOOK) * 2, np.uint8)
    )
    store.corpus.column("flags"), store.corpus.column("split")

    def preadv() -> None:
        for file, record in zip(files, records):
            fd = os.open(file, os.O_RDONLY)
            for group in record.groups:
                page = group["pages"][COLUMN]
                done, want = 0, group["rows"] * page["width"]
                while done < want:
                    done += os.preadv(fd, [buffer[done:want]], page["offset"] + done)
            os.close(fd)

    def sequential() -> None:
        for _ in store.sequential(HOOK, batch_size=BATCH, skip=None, dtype=dtype):
            pass

    def shuffled() -> None:
        stream = store.stream(HOOK, batch_size=BATCH, split=None, epochs=1)
        for _ in stream:
            pass
        stream.close()

    def timed(run: Callable[[], None]) -> float:
        store._vectors.clear()  # closes the files: pages of an open file may stay
        drop(files)
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    names = ("", "_stream")
    out: dict[str, float] = {"cold_gb": round(n_bytes / 1e9, 2)}
    for name, candidate in zip(names, (sequential, shuffled)):
        before = peak()
        times = [(timed(preadv), timed(candidate)) for _ in range(REPEATS)]
        reference, best = (min(t[i] for t in times) for i in (0, 1))
        out |= {
            f"cold{name}_over_preadv": round(reference / best, 3),
            f"cold{name}_rss_gib": round(peak() - before, 3),
            "cold_preadv_gb_per_s": round(n_bytes / 1e9 / reference, 3),
        }
    return out


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
