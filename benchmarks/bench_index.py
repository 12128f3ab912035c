"""Speed and size of the feature index, on synthetic firings: 16,384 features x 1M tokens x k = 32 (index_data.py).

build_s             stored codes to a finished index, decoder geometry (d_model 576) included
build_over_limit    the same over sorting the firings' 64-bit keys in numpy and writing the index's bytes to disk, synced
encode_over_gemm    a store's rows to committed codes (reading, encoding, writing), over the encoder product alone
top20_p95_ms        the 20 strongest contexts of a feature with their text; document: features of a document;
                    density: the density histogram; token: features of a token. p95 of 200 warm queries each, half drawn
                    uniformly, half by firings or occurrences (the hot ones); *_over_select: over `SELECT 1`;
                    *_cpu_p95_ms: processor time of the same queries, which other programs do not touch
cold_first_query_ms open and top 20 in a fresh process after its imports, the index's files dropped from the file cache
bytes_per_firing    codes and database
growth_10x          largest ratio of the four p95s to those of an index of a tenth of the tokens

The last line is one JSON object. --full adds an index of 10M tokens and takes the growth to it; --quick is small.
--large: 65,536 features x 1M tokens, build only, with its peak memory.
Usage: python benchmarks/bench_index.py [--quick | --full | --large] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.index_data import write_synthetic, zipf_corpus
from saes.queries import FeatureIndex

K, D_MODEL, QUERIES = 32, 576, 200
NAMES = ("top20", "document", "density", "token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2,048 features x 50,000 tokens")
    parser.add_argument("--full", action="store_true", help="growth to 10M tokens")
    parser.add_argument("--large", action="store_true", help="65,536 features, build and memory only")
    parser.add_argument("--folder", help="where to put the temporary workspace (a real disk)")
    parser.add_argument("--step", nargs=2, metavar=("WHAT", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(globals()[args.step[0]](**json.loads(args.step[1]))))
        return
    features, tokens = (2_048, 50_000) if args.quick else (65_536 if args.large else 16_384, 1_000_000)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        if args.large:
            figures = step("build", root=str(root / "a"), tokens=tokens, features=features)
        else:
            figures = measure(root, tokens, features, full=args.full, quick=args.quick)
    print(json.dumps(figures))


def measure(root: Path, tokens: int, features: int, *, full: bool, quick: bool) -> dict[str, Any]:
    figures = step("build", root=str(root / "a"), tokens=tokens, features=features)
    figures |= step("limit", root=str(root / "a"))
    figures["build_over_limit"] = round(figures["build_s"] / figures["limit_s"], 2)
    figures["cold_first_query_ms"] = step("cold", root=str(root / "a"))["cold_first_query_ms"]
    warm = queries(root / "a")
    figures |= {f"{name}_p95_ms": round(warm[name], 3) for name in NAMES}
    figures |= {f"{name}_over_select": round(warm[name] / warm["select"], 1) for name in NAMES}
    figures |= {f"{name}_cpu_p95_ms": round(warm[f"{name}_cpu"], 3) for name in NAMES}
    other = tokens * 10 if full else tokens // 10
    more = step("build", root=str(root / "b"), tokens=other, features=features)
    second = queries(root / "b")
    ratio = {n: second[n] / warm[n] if full else warm[n] / second[n] for n in NAMES}
    figures |= {"growth_10x": round(max(ratio.values()), 2), "growth_tokens": max(other, tokens)}
    figures |= {f"growth_{name}": round(value, 2) for name, value in ratio.items()}
    spent = {n: second[f"{n}_cpu"] / warm[f"{n}_cpu"] for n in NAMES}
    figures["growth_10x_cpu"] = round(max(v if full else 1 / v for v in spent.values()), 2)
    figures |= {f"other_{name}": more[name] for name in ("build_s", "bytes_per_firing", "peak_gb")}
    figures |= step("encode", root=str(root / "c"), rows=8_192 if quick else 32_768, features=features)
    return figures


def step(name: str, **options: Any) -> dict[str, Any]:
    """One step in a process of its own: its memory and its file handles are its own too."""
    command = [sys.executable, __file__, "--step", name, json.dumps(options)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    result = json.loads(out.splitlines()[-1])
    print(f"{name:8} {json.dumps(result)}", flush=True)
    return result


def build(root: str, tokens: int, features: int) -> dict[str, Any]:
    """Synthetic codes, then the index; memory is that of the index's part."""
    import resource

    import torch

    from saes.indexing import publish

    corpus = zipf_corpus(Path(root), tokens)
    folder = Path(root) / "features" / "bench@bench"
    shards = write_synthetic(folder / "codes", corpus.n_tokens, features, K)
    w_dec = torch.randn(features, D_MODEL, generator=torch.Generator().manual_seed(0))
    meta = {
        "schema_version": 1, "sae_id": "bench", "sae_path": None, "name": "bench", "store": "bench",
        "corpus": corpus.path.name, "hook": "", "signed": False, "d_sae": features, "logit_lens": False,
        "shards": [[s, json.loads((folder / "codes" / f"shard-{s:05d}.json").read_text())["row0"]] for s in shards],
    }  # fmt: skip
    tok = corpus.column("tok")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, used = time.perf_counter(), time.process_time()
    publish(
        folder, meta, shards=shards, rows=np.arange(len(tok)), tok=tok, w_dec=w_dec, model=None, started=time.time()
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {
        "features": features, "tokens": len(tok), "firings": len(tok) * K, "build_s": round(seconds, 2),
        "build_cpu_s": round(cpu, 2),
        "bytes_per_firing": round(size / (len(tok) * K), 2), "before_gb": round(before / 2**20, 2),
        "peak_gb": round(peak / 2**20, 2),
    }  # fmt: skip


def limit(root: str) -> dict[str, float]:
    """Sorting as many 64-bit keys, and writing as many bytes as the index has, synced: what no build goes below."""
    folder = Path(root) / "features" / "bench@bench"
    from saes.code_files import read_codes
    from saes.ranking import pack

    shards = [s for s, _ in json.loads((folder / "current.json").read_text())["shards"]]
    keys = np.concatenate(
        [pack(b.ids, b.rows, b.values, wide=False) for b in read_codes(folder / "codes", shards)]
    )
    size = next(folder.glob("features-*.duckdb")).stat().st_size
    started = time.perf_counter()
    keys.sort()
    sort_s = time.perf_counter() - started
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    started = time.perf_counter()
    with (Path(root) / "flat.bin").open("wb") as file:
        file.write(noise.data)
        file.flush()
        os.fsync(file.fileno())
    write_s = time.perf_counter() - started
    (Path(root) / "flat.bin").unlink()
    return {"limit_s": round(sort_s + write_s, 3), "sort_s": round(sort_s, 3), "write_s": round(write_s, 3)}


def cold(root: str) -> dict[str, float]:
    """Open and first query, after the files have been dropped from the file cache."""
    for path in [*Path(root).rglob("*.parquet"), *Path(root).rglob("*.duckdb")]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    started = time.perf_counter()
    index = FeatureIndex.open(root)
    opened = time.perf_counter() - started
    index.examples(7, n=20)
    total = time.perf_counter() - started
    return {"open_ms": round(opened * 1e3, 1), "cold_first_query_ms": round(total * 1e3, 1)}


def queries(root: Path) -> dict[str, float]:
    """p95 in ms of QUERIES warm queries of each kind, and the median of a `SELECT 1`."""
    index, rng = FeatureIndex.open(root), np.random.default_rng(0)
    fire = index.arrays("SELECT n_fire FROM idx.feature ORDER BY feature")["n_fire"]
    tok, half = index.corpus.column("tok"), QUERIES // 2
    # features with 20 contexts to show: a smaller index has more without, which are answered faster
    alive, present = np.flatnonzero(fire >= 20), np.unique(tok)
    often = fire[alive] / fire[alive].sum()
    asked = {
        "top20": [*rng.choice(alive, half), *rng.choice(alive, half, p=often)],
        "document": rng.integers(0, index.corpus.n_docs, QUERIES),
        "density": range(QUERIES),
        "token": [*rng.choice(present, half), *rng.choice(tok, half)],
    }
    ask: dict[str, Callable[[int], Any]] = {
        "top20": lambda f: index.examples(f, n=20),
        "document": lambda d: index.document_features(d),
        "density": lambda _: index.density_histogram(),
        "token": lambda t: index.token_features(t),
    }
    out = {"select": float(np.median([timed(lambda: index.frame("SELECT 1"))[0] for _ in range(50)]))}
    for name in NAMES:
        for q in list(asked[name])[:5]:
            ask[name](int(q))
        took = np.array([timed(lambda q=q, name=name: ask[name](int(q))) for q in asked[name]])
        out[name], out[f"{name}_cpu"] = np.quantile(took, 0.95, axis=0).tolist()
        p50, most, spent = np.median(took[:, 0]), took[:, 0].max(), out[f"{name}_cpu"]
        print(
            f"{name:9} p50 {p50:7.2f} ms   p95 {out[name]:7.2f}   max {most:7.2f}   processor p95 {spent:7.2f}",
            flush=True,
        )
    index.close()
    return out


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Elapsed time and processor time, ms."""
    started, used = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - started) * 1e3, (time.process_time() - used) * 1e3


def encode(root: str, rows: int, features: int) -> dict[str, float]:
    """A store's rows to codes over the product of the same rows; interleaved, best of three."""
    import shutil

    import torch

    from saes import SAE, SAEConfig
    from saes.encoding import ENCODE_ROWS, write_all_codes
    from saes.initialise import initialise
    from tests.corpora import HOOK, empty_store, fill, make_corpus

    corpus = make_corpus(Path(root), [128] * (rows // 128), group_rows=122_880)
    store = empty_store(Path(root), corpus, rows_per_shard=65_536)
    x = torch.randn(corpus.n_tokens, D_MODEL, generator=torch.Generator().manual_seed(0)).half()
    fill(store, {HOOK: x})
    sae = SAE(SAEConfig(d_sae=features, k=K, d_model=D_MODEL, hook=HOOK)).requires_grad_(False)
    initialise(sae, x[:8192].float(), seed=0)
    out = torch.empty(ENCODE_ROWS, features)
    best = [float("inf"), float("inf")]
    for _ in range(3):
        started = time.perf_counter()
        for i in range(0, len(x), ENCODE_ROWS):
            part = x[i : i + ENCODE_ROWS].float()
            torch.mm(part, sae.W_enc.T, out=out[: len(part)])
        best[0] = min(best[0], time.perf_counter() - started)
        folder = Path(root) / "codes"
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        write_all_codes(sae, store, HOOK, folder)
        best[1] = min(best[1], time.perf_counter() - started)
    return {
        "encode_over_gemm": round(best[1] / best[0], 3), "gemm_s": round(best[0], 3), "encode_s": round(best[1], 3),
        "encode_rows_per_s": round(len(x) / best[1]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
