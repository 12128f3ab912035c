"""Activations document by document: what probes over whole texts (multiple-instance learning) train on.

A bag is (doc, x float32 [n, d], labels): the rows of one document in their order, and its label_* values.
Documents come in the order of their numbers, however a corpus packs them. Memory is bounded by the number of
documents (24 bytes a piece of one) and one document's vectors, not by the tokens. A document with a row that is
not committed is left out: half a bag would be wrong evidence for its label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache.errors import MissingDataError, UsageError
from cache.filters import row_classes

if TYPE_CHECKING:
    from cache.store import ActivationStore


class Bag(NamedTuple):
    """One document at one hook."""

    doc: int
    x: Tensor
    """float32 [n, d], in the order of the text."""
    labels: dict[str, Any]
    """label_* columns of the corpus's docs table; None where the document has no such label."""


class BagArrays(NamedTuple):
    """All bags at once, as scikit-learn takes them: bag i is x[offsets[i]:offsets[i + 1]]."""

    x: np.ndarray
    """float32 [N, d]."""
    row: np.ndarray
    """int64 [N]: row ids."""
    doc: np.ndarray
    """int32 [N]: document of each row; the groups of a grouped split."""
    offsets: np.ndarray
    """int64 [bags + 1]."""
    y: np.ndarray | None
    """[bags]: the label asked for."""


class Bags:
    """Iterate over it as often as you like; made by `store.bags(hook, ...)`."""

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        *,
        split: str | None = None,
        skip: str | None = "first",
        where: str | None = None,
        docs: Sequence[int] | None = None,
    ) -> None:
        self.store, self.hook, self.d = store, hook, store.d(hook)
        self._wanted = store.class_mask(row_classes(split, skip))
        self._where = None if where is None else store.row_ids(where)
        self._docs = None if docs is None else np.unique(np.asarray(docs, dtype=np.int64))
        known = store.corpus.n_docs
        if self._docs is not None and len(self._docs) and not 0 <= self._docs[0] <= self._docs[-1] < known:
            raise UsageError(f"documents must be in 0..{known - 1}")

    @cached_property
    def _runs(self) -> np.ndarray:
        """int64 [pieces, 3]: (doc, row0, row1), by document and place in it; complete documents only."""
        runs = document_runs(self.store)
        gone = np.unique(runs[~self._committed(runs), 0])
        runs = runs[~np.isin(runs[:, 0], gone)]
        return runs if self._docs is None else runs[np.isin(runs[:, 0], self._docs)]

    def _committed(self, runs: np.ndarray) -> np.ndarray:
        """Whether every row of a piece is in a committed shard: pieces may cross from shard to shard."""
        blocks = self.store.vectors(self.hook).blocks
        held = np.concatenate([[0], np.cumsum(blocks[:, 1] - blocks[:, 0])])

        def below(row: np.ndarray) -> np.ndarray:
            """Number of committed rows before each row id."""
            b = np.searchsorted(blocks[:, 0], row, side="right") - 1
            inside = np.clip(row - blocks[b, 0], 0, blocks[b, 1] - blocks[b, 0])
            return np.where(b < 0, 0, held[b] + inside)

        return below(runs[:, 2]) - below(runs[:, 1]) == runs[:, 2] - runs[:, 1]

    def row_ids(self) -> Iterator[tuple[int, np.ndarray]]:
        """(doc, row ids) of every bag that has a row; reads no vectors."""
        runs = self._runs
        cuts = np.flatnonzero(np.diff(runs[:, 0])) + 1
        for piece in np.split(runs, cuts) if len(runs) else []:
            ids = np.concatenate([self._chosen(a, b) for _, a, b in piece.tolist()])
            if len(ids):
                yield int(piece[0, 0]), ids

    def _chosen(self, row0: int, row1: int) -> np.ndarray:
        ids = np.flatnonzero(self._wanted[self.store.row_class(row0, row1)]) + row0
        if self._where is None:
            return ids
        return ids[np.isin(ids, self._where[slice(*np.searchsorted(self._where, (row0, row1)))])]

    def __iter__(self) -> Iterator[Bag]:
        labels = document_labels(self.store)
        for doc, ids in self.row_ids():
            x = self.store.rows(self.hook, ids)
            yield Bag(doc, x, {name: values[doc] for name, values in labels.items()})

    def arrays(self, label: str | None = None) -> BagArrays:
        """Every bag in memory; with `label`, bags of documents without a value of it are left out."""
        labels = document_labels(self.store)
        if label is not None and label not in labels:
            raise UsageError(f"no label {label!r}: this corpus has {', '.join(labels) or 'none'}")
        found = [(doc, ids) for doc, ids in self.row_ids() if label is None or labels[label][doc] is not None]
        if not found:
            raise MissingDataError(f"{self.hook}: no document is left: change split, where or docs")
        row = np.concatenate([ids for _, ids in found])
        sizes = [len(ids) for _, ids in found]
        return BagArrays(
            x=self.store.rows(self.hook, row).numpy(),
            row=row,
            doc=np.repeat(np.array([d for d, _ in found], np.int32), sizes),
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            y=None if label is None else np.array([labels[label][d] for d, _ in found]),
        )


def document_runs(store: ActivationStore) -> np.ndarray:
    """int64 [pieces, 3]: (doc, row0, row1) of every stretch of rows of one document, sorted by (doc, row0)."""
    parts: list[np.ndarray] = []
    row = 0
    with pq.ParquetFile(store.corpus.path / "tokens.parquet") as file:
        for batch in file.iter_batches(batch_size=1 << 18, columns=["doc"]):
            doc = batch.column(0).to_numpy().astype(np.int64)
            cut = np.concatenate([[0], np.flatnonzero(np.diff(doc)) + 1, [len(doc)]])
            parts.append(np.stack([doc[cut[:-1]], cut[:-1] + row, cut[1:] + row], axis=1))
            row += len(doc)
    runs = np.concatenate(parts)
    runs = runs[np.concatenate([[True], runs[1:, 0] != runs[:-1, 0]])]  # read batches cut pieces in two
    runs[:, 2] = np.append(runs[1:, 1], row)
    return runs[np.argsort(runs[:, 0], kind="stable")]


def document_labels(store: ActivationStore) -> dict[str, list[Any]]:
    """label_* columns of the docs table by document number."""
    path = store.corpus.path / "docs.parquet"
    names = [n for n in pq.read_schema(path).names if n.startswith("label_")]
    return {n: pq.read_table(path, columns=[n]).column(n).to_pylist() for n in names}


def pooled(bags: Bags, how: str = "mean") -> tuple[np.ndarray, np.ndarray]:
    """One float32 vector a document, [bags, d], and the documents: the mean of its rows, or its last row."""
    if how not in ("mean", "last"):
        raise UsageError(f"how={how!r} is unknown: use 'mean' or 'last'")
    docs, vectors = [], []
    for bag in bags:
        docs.append(bag.doc)
        vectors.append(bag.x.mean(0) if how == "mean" else bag.x[-1])
    if not docs:
        raise MissingDataError(f"{bags.hook}: no document is left: change split, where or docs")
    return torch.stack(vectors).numpy(), np.array(docs, np.int32)
