"""Activations of a model over a corpus, on disk: `activations/<hash16>/`.

    store.json                               identity, corpus, plan of shards
    acts/<hook>/shard-00000-<xxh8>.parquet   doc, pos, tok, norm and the vectors (pages.py)
    acts/<hook>/shard-00000.json             commit record (records.py)
A shard is a range of sequences; a row id is an index into the corpus's token table, the same at every hook.
The folder's name is the hash of everything that determines the values; hooks can be added later.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cache.catalog import select_rows
from cache.errors import DataError, MissingDataError, UsageError
from cache.filters import class_mask, in_records, row_class, row_classes, shard_sums
from cache.provenance import provenance
from cache.records import (
    SCHEMA_VERSION,
    ShardRecord,
    Sums,
    list_records,
    read_store_json,
    record_path,
)
from cache.stats import Stats
from cache.stream import Batch, Stream
from cache.vectors import Vectors
from cache.workspace import canonical_json, workspace_path, write_json
from cache.writer import TORCH_DTYPE, ShardWriter

if TYPE_CHECKING:
    from cache.bags import Bags
    from cache.corpus import Corpus
    from cache.dataset import RowDataset

ROWS_PER_SHARD = 65_536


class ActivationStore:
    """Open one with `ActivationStore.open(path)`; `harvest` makes and fills it."""

    def __init__(self, path: Path, corpus: Corpus) -> None:
        self.path = Path(path).resolve()
        self.meta: dict[str, Any] = read_store_json(self.path)
        self.corpus = corpus
        if corpus.fingerprint != self.meta["corpus"]:
            raise DataError(
                f"{self.path} was harvested from corpus {self.meta['corpus'][:16]}: open it with that one"
            )
        self.shards: list[tuple[int, int, int, int]] = [tuple(s) for s in self.meta["shards"]]
        """(seq0, seq1, row0, row1) of every shard."""
        self.last_run: dict[str, float] = {}
        """Set by harvest: tokens, seconds, forward_seconds, write_seconds."""
        self._records: dict[str, dict[int, ShardRecord]] = {}
        self._vectors: dict[str, Vectors] = {}
        self._sums: dict[tuple[str, ...], Sums] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ActivationStore:
        """Open a store folder; its corpus is found in the same workspace."""
        from cache.corpus import Corpus

        folder = Path(path)
        fingerprint = read_store_json(folder)["corpus"]
        return cls(folder, Corpus.open(folder.resolve().parent.parent / "corpora" / fingerprint[:16]))

    @classmethod
    def create(
        cls,
        workspace: str | os.PathLike[str] | None,
        identity: dict[str, Any],
        corpus: Corpus,
        *,
        rows_per_shard: int | None = None,
        model_source: str | None = None,
        kind: str = "activations",
    ) -> ActivationStore:
        """Open the store of `identity` and `corpus` in the workspace's folder `kind`, or make it.

        `model_source` is where to load the model again; it is no part of the identity.
        """
        path = cls.folder_of(workspace_path(workspace), identity, corpus, kind)
        identity = {"corpus": corpus.fingerprint} | identity
        if not (path / "store.json").exists():
            plan = plan_shards(corpus.seq_offsets, rows_per_shard or ROWS_PER_SHARD)
            meta = {
                "schema_version": SCHEMA_VERSION,
                "identity": identity,
                "corpus": corpus.fingerprint,
                "n_rows": int(corpus.n_tokens),
                "rows_per_shard": rows_per_shard or ROWS_PER_SHARD,
                "shards": plan,
                "model_source": model_source,
                "provenance": provenance(),
            }
            write_json(path / "store.json", meta)
        store = cls(path, corpus)
        if rows_per_shard not in (None, store.meta["rows_per_shard"]):
            raise UsageError(
                f"{path} has shards of {store.meta['rows_per_shard']:,} rows, not {rows_per_shard:,}: "
                "leave rows_per_shard out to go on with it"
            )
        return store

    @staticmethod
    def folder_of(root: Path, identity: dict[str, Any], corpus: Corpus, kind: str = "activations") -> Path:
        """Where the store of `identity` and `corpus` is, or would be."""
        value = canonical_json({"corpus": corpus.fingerprint} | identity)
        return root / kind / hashlib.sha256(value.encode()).hexdigest()[:16]

    @staticmethod
    def find_all(workspace: str | os.PathLike[str] | None = None) -> list[Path]:
        """Folders of the stores in a workspace."""
        root = workspace_path(workspace, create=False)
        return sorted(p.parent for p in root.glob("activations/*/store.json"))

    # ---- what is there ----

    @property
    def identity(self) -> dict[str, Any]:
        return self.meta["identity"]

    @property
    def workspace(self) -> Path:
        """The workspace this store is in."""
        return self.path.parents[1]

    @property
    def model_source(self) -> str:
        """What `load_model` takes to load the model that filled this store."""
        return self.meta.get("model_source") or self.identity.get("model", "")

    def check_model(self, model: Any) -> None:
        """Raise DataError unless `model` has the weights that filled this store."""
        want, got = self.identity.get("weights_sha256"), model.identity["weights_sha256"]
        if want is not None and want != got:
            raise DataError(
                f"{model.name} has other weights ({got[:12]}) than {self.identity.get('model')} "
                f"({want[:12]}), which filled store {self.hash}: load that model"
            )

    @property
    def hash(self) -> str:
        """The folder's name: 16 hex digits of the identity's sha256."""
        return self.path.name

    @property
    def hooks(self) -> list[str]:
        """Hooks with a committed shard."""
        return sorted(p.name for p in self.path.glob("acts/*") if list_records(p))

    def folder(self, hook: str) -> Path:
        if not re.fullmatch(r"\w+(\.\w+)*", hook):
            raise UsageError(f"{hook!r} is not a hook name, such as blocks.15.hook_resid_post")
        return self.path / "acts" / hook

    def records(self, hook: str, *, refresh: bool = False) -> dict[int, ShardRecord]:
        """Commit records by shard, as of the first look or of `refresh`."""
        with self._lock:
            known = self._records.get(hook)
            if known is None or refresh:
                folder = self.folder(hook)
                fresh = {i: self._load_record(folder, i) for i in list_records(folder)}
                if known is None or fresh.keys() != known.keys():
                    self._vectors.pop(hook, None)
                known = self._records[hook] = fresh
            return dict(known)

    def _load_record(self, folder: Path, shard: int) -> ShardRecord:
        path = record_path(folder, shard)
        record = ShardRecord.load(path)
        planned = self.shards[shard][2:] if shard < len(self.shards) else None
        if (record.row0, record.row0 + record.rows) != planned or record.hook != folder.name:
            raise DataError(f"{path} is not of this store's plan of shards: delete it and harvest again")
        return record

    def add_record(self, record: ShardRecord) -> None:
        """Take note of a shard that a writer has committed."""
        self.records(record.hook)
        with self._lock:
            self._records[record.hook][record.shard] = record
            self._vectors.pop(record.hook, None)

    def check_matches(self, hook: str, d: int, dtype: str) -> None:
        """Refuse to mix widths or dtypes within a hook."""
        record = next(iter(self.records(hook).values()), None)
        if record is not None and (record.d, record.dtype) != (d, dtype):
            raise UsageError(
                f"{hook} is stored with d={record.d} {record.dtype}, not d={d} {dtype}: "
                f"harvest with dtype={record.dtype!r}, or delete {self.folder(hook)}"
            )

    def committed(self, hook: str) -> set[int]:
        """Shards that are there, looked up on disk."""
        return set(self.records(hook, refresh=True))

    def complete(self, hook: str) -> bool:
        return len(self.records(hook, refresh=True)) == len(self.shards)

    def require_complete(self, hook: str) -> None:
        missing = len(self.shards) - len(self._existing(hook, refresh=True))
        if missing:
            raise MissingDataError(
                f"{hook}: {missing} of {len(self.shards)} shards are missing in {self.path}: "
                "run the same harvest again, it goes on where it stopped"
            )

    def _existing(self, hook: str, *, refresh: bool = False) -> dict[int, ShardRecord]:
        found = self.records(hook, refresh=refresh)
        if not found:
            known = ", ".join(self.hooks) or "none"
            raise MissingDataError(
                f"{self.path} has no activations of {hook!r} (it has: {known}): harvest this hook"
            )
        return found

    def d(self, hook: str) -> int:
        return next(iter(self._existing(hook).values())).d

    def dtype(self, hook: str) -> str:
        """fp16, bf16 or fp32, as stored."""
        return next(iter(self._existing(hook).values())).dtype

    def n_rows(self, hook: str) -> int:
        """Committed rows."""
        return sum(r.rows for r in self._existing(hook).values())

    def count(self, hook: str, classes: Sequence[str], shards: Sequence[int] | None = None) -> int:
        """Committed rows of some row classes."""
        found = self._existing(hook)
        chosen = found if shards is None else shards
        if in_records(classes):
            return sum(found[s].stats[c]["n"] for s in chosen for c in classes)
        wanted = self.class_mask(classes)
        return sum(int(wanted[self.row_class(*self.shards[s][2:])].sum()) for s in chosen)

    def row_class(self, row0: int, row1: int) -> np.ndarray:
        """Class of rows row0..row1 (filters.py), from two byte columns of the token table."""
        return row_class(self.corpus.column("flags")[row0:row1], self.corpus.column("split")[row0:row1])

    @staticmethod
    def class_mask(classes: Sequence[str]) -> np.ndarray:
        """Boolean look-up table over the classes that `row_class` gives."""
        return class_mask(classes)

    # ---- writing ----

    def writer(self, *, group_rows: int | None = None, queue_size: int = 4) -> ShardWriter:
        """A writer thread; use it in a `with` block."""
        return ShardWriter(self, group_rows=group_rows, queue_size=queue_size)

    # ---- reading ----

    def vectors(self, hook: str) -> Vectors:
        """Raw reader of the committed shards."""
        found = list(self._existing(hook).values())
        with self._lock:
            if hook not in self._vectors:
                self._vectors[hook] = Vectors(self.folder(hook), found)
            return self._vectors[hook]

    def stats(self, hook: str, split: str | None = "train", skip: str | None = "first") -> Stats:
        """Statistics of the committed rows, from the records alone where `skip` is None or "first"."""
        total, classes = Sums.zero(self.d(hook)), row_classes(split, skip)
        for record in self._existing(hook).values():
            total = total + self._shard_sums(record, classes)
        if not total.n:
            raise MissingDataError(f"{hook}: no {split or ''} rows in {self.path}: harvest more text")
        return Stats.of(total)

    def _shard_sums(self, record: ShardRecord, classes: list[str]) -> Sums:
        if in_records(classes):
            return record.sums(classes)
        key = (record.hook, record.file, *classes)
        if key not in self._sums:  # a pass over the vectors: once for each object
            self._sums[key] = shard_sums(self, record, classes)
        return self._sums[key]

    def stream(self, hooks: str | Sequence[str], **options: Any) -> Stream:
        """Endless shuffled batches: options of `Stream` (batch_size, seed, split, skip, window, ...)."""
        return Stream(self, hooks, **options)

    def sequential(
        self,
        hook: str,
        *,
        batch_size: int,
        split: str | None = None,
        skip: str | None = "first",
        start_row: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Batch]:
        """Batches in row order, each in its own memory; the last may be short."""
        wanted = self.class_mask(row_classes(split, skip))
        vectors = self.vectors(hook)
        rest = np.empty(0, np.int64)
        for row0, row1 in [*vectors.blocks.tolist(), (0, 0)]:
            first = max(row0, start_row)
            vectors.will_need(row1)
            fresh = np.flatnonzero(wanted[self.row_class(first, row1)]) + first if first < row1 else rest[:0]
            rest = np.concatenate([rest, fresh])
            while len(rest) >= batch_size or (row1 == 0 and len(rest)):
                ids, rest = rest[:batch_size], rest[batch_size:]
                yield Batch(x={hook: self._gather(hook, ids).to(dtype)}, row=torch.from_numpy(ids))

    def dataset(self, hooks: str | Sequence[str], **options: Any) -> RowDataset:
        """The same rows for torch's DataLoader, with workers and ranks: options of `RowDataset`."""
        from cache.dataset import RowDataset

        return RowDataset(self, hooks, **options)

    def bags(self, hook: str, **options: Any) -> Bags:
        """(doc, x float32 [n, d], labels) of every complete document: options of `Bags` (split, skip, where, docs).

        `.arrays(label)` gives them all as numpy arrays, for probes.
        """
        from cache.bags import Bags

        return Bags(self, hook, **options)

    def row_ids(self, where: str) -> np.ndarray:
        """Row ids of this store's corpus for a SQL condition over the columns of the `tokens` view."""
        return select_rows(self.corpus.path, where)

    def rows(
        self, hook: str, ids: Sequence[int] | np.ndarray | None = None, where: str | None = None
    ) -> Tensor:
        """Vectors as float32 [n, d]: rows `ids` in their order, or those of `where` in row order.

        `where` is SQL over the `tokens` columns, e.g. "token = ' the' and pos > 0"; of an incomplete store it
        finds the committed rows only.
        """
        if (ids is None) == (where is None):
            raise UsageError("rows() needs either ids or where")
        if where is not None:
            found = self.row_ids(where)
            return self._gather(hook, found[self._is_committed(hook, found)]).float()
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        unique, inverse = np.unique(wanted, return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < self.meta["n_rows"]:
            raise UsageError(f"row ids must be in 0..{self.meta['n_rows'] - 1}")
        return self._gather(hook, unique).float()[torch.from_numpy(inverse)]

    def _is_committed(self, hook: str, ids: np.ndarray) -> np.ndarray:
        blocks = self.vectors(hook).blocks
        b = np.searchsorted(blocks[:, 0], ids, side="right") - 1
        return (b >= 0) & (ids < blocks[b, 1])

    def _gather(self, hook: str, ids: np.ndarray) -> Tensor:
        """Ascending row ids as stored: [n, d]."""
        vectors = self.vectors(hook)
        out = torch.empty(len(ids), vectors.d, dtype=TORCH_DTYPE[vectors.dtype])
        vectors.read_ids(ids, out.view(torch.uint8).numpy())
        return out

    # ---- checking ----

    def verify(self, hook: str | None = None) -> list[str]:
        """Problems of the committed shards: size, page headers, xxh3 of every row group, token columns."""
        from cache.verifying import problems

        return problems(self, [hook] if hook else self.hooks)


def plan_shards(seq_offsets: np.ndarray, rows_per_shard: int) -> list[tuple[int, int, int, int]]:
    """Cut the sequences into shards of at most `rows_per_shard` rows, at least one sequence each."""
    if rows_per_shard < 1:
        raise UsageError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    plan, seq = [], 0
    while seq < len(seq_offsets) - 1:
        row = int(seq_offsets[seq])
        end = max(seq + 1, int(np.searchsorted(seq_offsets, row + rows_per_shard, side="right")) - 1)
        plan.append((seq, end, row, int(seq_offsets[end])))
        seq = end
    return plan
