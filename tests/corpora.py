"""Token tables and stores for tests, made without a model or a tokenizer.

`make_corpus` writes the four files of a corpus folder from lengths of documents, `make_store` fills a store
with given or random vectors. Row r of every column can be computed by hand from the lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache.corpus import Corpus
from cache.store import ActivationStore
from cache.workspace import canonical_json, workspace_path, write_json

VOCAB = [" the", " cat", " sat", "it's", "\n", "é"]
HOOK = "blocks.0.hook_resid_post"
OTHER = "blocks.1.hook_resid_post"


def make_corpus(
    workspace: Path, lengths: Sequence[int], *, label: str | None = "label_kind", group_rows: int = 1000
) -> Corpus:
    """One document a sequence, lengths[i] tokens; every fourth document is held out."""
    lengths_ = np.asarray(lengths)
    n, docs = int(lengths_.sum()), np.arange(len(lengths_), dtype=np.int32)
    doc = np.repeat(docs, lengths_)
    pos = (np.arange(n) - np.repeat(np.cumsum(lengths_) - lengths_, lengths_)).astype(np.int32)
    split = (docs % 4 == 3).astype(np.uint8)
    columns = {
        "seq": doc,
        "pos": pos,
        "doc": doc,
        "doc_pos": pos,
        "tok": ((np.arange(n) * 7) % len(VOCAB)).astype(np.int32),
        "role": np.zeros(n, np.uint8),
        "flags": (pos == 0).astype(np.uint8),
        "split": split[doc],
    }
    fingerprint = hashlib.sha256(canonical_json([*map(int, lengths), label]).encode()).hexdigest()
    folder = workspace_path(workspace) / "corpora" / fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(columns), folder / "tokens.parquet", compression="zstd", row_group_size=group_rows
    )
    words = {"tok": pa.array(range(len(VOCAB)), pa.int32()), "token": pa.array(VOCAB, pa.string())}
    pq.write_table(pa.table(words), folder / "vocab.parquet")
    table: dict[str, Any] = {
        "doc": docs,
        "sha": [f"{i:064x}" for i in docs.tolist()],
        "split": split,
        "n_tokens": lengths_.astype(np.int32),
        "source": ["test"] * len(docs),
    }
    if label:
        table[label] = ["odd" if i % 2 else "even" for i in docs.tolist()]
    pq.write_table(pa.table(table), folder / "docs.parquet")
    meta = {
        "schema_version": 1,
        "fingerprint": fingerprint,
        "inputs_key": None,
        "name": "test",
        "mode": "document",
        "context": int(lengths_.max()),
        "prepend_bos": False,
        "tokenizer_sha256": "0" * 64,
        "n_tokens": n,
        "n_seqs": len(docs),
        "n_docs": len(docs),
        "provenance": {"created": "2026-01-01T00:00:00Z"},
    }
    write_json(folder / "corpus.json", meta)
    return Corpus.open(folder)


def empty_store(
    workspace: Path, corpus: Corpus, *, rows_per_shard: int = 50, **identity: Any
) -> ActivationStore:
    identity = {"model": "tiny", "backend": "transformer_lens"} | identity
    return ActivationStore.create(workspace, identity, corpus, rows_per_shard=rows_per_shard)


def random_vectors(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 30.0, d)
    return (torch.randn(n, d, generator=generator) * scale + 2.0).to(dtype)


def fill(store: ActivationStore, vectors: dict[str, Tensor], *, group_rows: int | None = None) -> None:
    """Write rows [n_tokens, d] of each hook, shard by shard."""
    with store.writer(group_rows=group_rows) as writer:
        for i, (_, _, row0, row1) in enumerate(store.shards):
            for hook, x in vectors.items():
                if i not in store.committed(hook):
                    writer.submit(i, hook, x[row0:row1])


def make_store(
    workspace: Path,
    lengths: Sequence[int] = (30, 7, 1, 40, 25, 12, 33, 18, 9, 21),
    *,
    d: int = 8,
    dtype: torch.dtype = torch.float32,
    hooks: Sequence[str] = (HOOK,),
    rows_per_shard: int = 50,
    group_rows: int | None = 16,
) -> tuple[ActivationStore, dict[str, Tensor]]:
    """A complete store and what was written into it."""
    corpus = make_corpus(workspace, lengths)
    store = empty_store(workspace, corpus, rows_per_shard=rows_per_shard)
    vectors = {h: random_vectors(corpus.n_tokens, d + i, dtype, seed=i) for i, h in enumerate(hooks)}
    fill(store, vectors, group_rows=group_rows)
    return store, vectors
