"""Whether a store still is what its records say: sizes, page headers, xxh3 of every row group, norms, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from cache.errors import AtomscopeError
from cache.records import COLUMN, ShardRecord
from cache.vectors import Vectors
from cache.writer import TORCH_DTYPE, TokenSlices

if TYPE_CHECKING:
    from cache.store import ActivationStore

_ROWS = 512  # of a float64 copy, so that it stays in the processor's cache


def problems(store: ActivationStore, hooks: Sequence[str]) -> list[str]:
    """One line for each damaged shard or row group, with what to do; empty if all is well."""
    found: list[str] = []
    for hook in hooks:
        try:
            records = store.records(hook, refresh=True)
        except AtomscopeError as e:
            found.append(str(e))
            continue
        if not records:
            store.d(hook)  # raises, and names the hooks there are
        for record in records.values():
            try:
                found += _shard(store, hook, record)
            except (AtomscopeError, OSError, pa.ArrowException) as e:
                found.append(f"{store.folder(hook) / record.file}: {e}")
    return found


def _shard(store: ActivationStore, hook: str, record: ShardRecord) -> list[str]:
    path, again = store.folder(hook) / record.file, "delete its .json, harvest again"
    reader = Vectors(store.folder(hook), [record]).reader(record.shard)
    norm = pq.read_table(path, columns=["norm"]).column("norm").to_numpy()
    found, row = [], 0
    for g, group in enumerate(record.groups):
        page, stop = group["pages"][COLUMN], row + group["rows"]
        raw = np.empty(group["rows"] * page["width"], np.uint8)
        reader.read_into(g, COLUMN, raw)
        if xxhash.xxh3_64_hexdigest(raw.data) != page["xxh3"]:
            found.append(f"{path}: row group {g} of {len(record.groups)} differs from its xxh3: {again}")
        elif not np.allclose(_norms(raw, record), norm[row:stop], rtol=1e-6, atol=0):
            found.append(f"{path}: the norms of row group {g} are not those of its vectors: {again}")
        row = stop
    want = TokenSlices(store.corpus.path / "tokens.parquet").read(record.row0, record.row0 + record.rows)
    if pq.read_table(path, columns=want.column_names).columns != want.columns:
        found.append(f"{path}: doc, pos, tok are not the corpus's: {again}")
    return found


def _norms(raw: np.ndarray, record: ShardRecord) -> np.ndarray:
    x = torch.from_numpy(raw).view(TORCH_DTYPE[record.dtype]).view(-1, record.d)
    return torch.cat([part.double().norm(dim=1) for part in x.split(_ROWS)]).numpy()
