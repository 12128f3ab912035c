"""A synthetic corpus and codes for bench_index.py: what a trained SAE leaves on disk, without a model.

Firing densities are log-normal over the features (median about a hundredth of the mean of the hottest), every row has
k distinct features (systematic sampling keeps the densities exact), values are exponential, tokens follow Zipf's law
over 49,152 ids, documents have 256 tokens. Features do not depend on tokens, which is the worst case for the tables of
(token, feature) pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache.corpus import Corpus
from cache.workspace import workspace_path
from saes.code_files import id_dtype, record_file, write_codes
from tests.corpora import make_corpus

DOC = 256
VOCAB = 49_152
SHARD_ROWS = 65_536
SIGMA = 2.0


def zipf_corpus(workspace: Path, tokens: int) -> Corpus:
    """A corpus of `tokens` rows in documents of DOC, its tokens drawn from Zipf's law."""
    workspace_path(workspace)
    folder = make_corpus(workspace, [DOC] * (tokens // DOC), group_rows=122_880).path
    table = pq.read_table(folder / "tokens.parquet")
    share = 1 / (np.arange(VOCAB) + 2.7)
    rng = np.random.default_rng(1)
    tok = np.searchsorted(np.cumsum(share / share.sum()), rng.random(len(table))).astype(np.int32)
    table = table.set_column(table.column_names.index("tok"), "tok", pa.array(tok.clip(max=VOCAB - 1)))
    pq.write_table(table, folder / "tokens.parquet", compression="zstd", row_group_size=122_880)
    words = {"tok": pa.array(range(VOCAB), pa.int32()), "token": [f" w{i}" for i in range(VOCAB)]}
    pq.write_table(pa.table(words), folder / "vocab.parquet")
    return Corpus.open(folder)


def densities(features: int, k: int, *, seed: int = 0) -> np.ndarray:
    """Share of rows on which each feature fires: log-normal, at most 0.3, k in total."""
    p = np.random.default_rng(seed).lognormal(0, SIGMA, features)
    p *= k / p.sum()
    for _ in range(50):
        free = p < 0.3
        p = np.minimum(p, 0.3)
        p[free] *= (k - p[~free].sum()) / p[free].sum()
    return np.minimum(p, 0.3)


def write_synthetic(folder: Path, rows: int, features: int, k: int) -> list[int]:
    """Codes of `rows` rows in shards; returns the shard numbers. Shards that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.cumsum(densities(features, k))
    edges *= k / edges[-1]
    shards = list(range(-(-rows // SHARD_ROWS)))
    for shard in shards:
        if record_file(folder, shard).is_file():
            continue
        n = min(SHARD_ROWS, rows - shard * SHARD_ROWS)
        rng = np.random.default_rng(shard)
        at = rng.random((n, 1)) + np.arange(k)
        ids = np.searchsorted(edges, at.reshape(-1), side="right").clip(max=features - 1).reshape(n, k)
        values = (rng.exponential(1, (n, k)) + 0.01).astype(np.float32)
        write_codes(folder, shard, shard * SHARD_ROWS, ids.astype(id_dtype(features)), values, n)
    return shards
