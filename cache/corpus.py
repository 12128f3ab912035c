"""Token tables: a corpus is tokenised once, split, cut into rows of forward passes, and frozen.

Folder corpora/<fingerprint16>/ : tokens.parquet (one row per token, sorted by (seq, pos), no padding),
docs.parquet, vocab.parquet, corpus.json. The index of a row in tokens.parquet is the ROW ID that activation
stores, codes and features refer to. Columns of tokens: seq, pos (place in the forward pass; 0 = attention sink),
doc, doc_pos, tok, role, flags (1 first in context, 2 special id, 4 not assistant; the last only in dialogues),
split (0 train, 1 held out: one document in ten, chosen by a hash of its token ids before anything is packed).
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import DataError, MissingDataError, UsageError
from cache.packing import COLUMNS, Packing, pack, split_of
from cache.provenance import provenance
from cache.sources import Document, Label, Source, open_source
from cache.vocab import prepends_bos, tokenizer_sha256, vocab_strings
from cache.workspace import atomic_dir, canonical_json, read_json, workspace_path, write_json

SCHEMA_VERSION = 1
MODES = ("document", "packed")
_DOCS_PER_CALL = 256
_ROWS_PER_GROUP = 122_880


class Corpus:
    """A frozen token table on disk. Columns are read when asked for and kept."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.fingerprint: str = meta["fingerprint"]
        self.n_tokens: int = meta["n_tokens"]
        self.n_seqs: int = meta["n_seqs"]
        self.n_docs: int = meta["n_docs"]
        self.context: int = meta["context"]
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Corpus:
        """Open corpora/<fingerprint>; the data columns are not read yet."""
        folder = Path(path)
        meta = read_json(folder / "corpus.json")
        if meta.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{folder} has schema {meta.get('schema_version')}, this version reads {SCHEMA_VERSION}: "
                "build the corpus again"
            )
        return cls(folder, meta)

    def column(self, name: str) -> np.ndarray:
        """A whole column of the token table, in row order; read-only."""
        if name not in COLUMNS:
            raise UsageError(f"no token column {name!r}: there are {', '.join(COLUMNS)}")
        if name not in self._columns:
            try:
                table = pq.read_table(self.path / "tokens.parquet", columns=[name])
            except FileNotFoundError as e:
                raise MissingDataError(
                    f"{self.path / 'tokens.parquet'} is gone: build the corpus again"
                ) from e
            values = table.column(name).to_numpy()
            values.flags.writeable = False
            self._columns[name] = values
        return self._columns[name]

    @functools.cached_property
    def seq_offsets(self) -> np.ndarray:
        """int64 [n_seqs + 1]: sequence s is rows seq_offsets[s] … seq_offsets[s + 1] − 1."""
        counts = np.bincount(self.column("seq"), minlength=self.n_seqs)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @functools.cached_property
    def vocab(self) -> list[str]:
        """Text of each token id."""
        return pq.read_table(self.path / "vocab.parquet", columns=["token"]).column("token").to_pylist()

    def docs(self) -> pa.Table:
        """doc, sha, split, n_tokens, source and the label_* columns."""
        return pq.read_table(self.path / "docs.parquet")

    def __repr__(self) -> str:
        name, mode = self.meta["name"], self.meta["mode"]
        return f"Corpus({name!r}, {mode}, {self.n_docs:,} docs, {self.n_tokens:,} tokens, {self.path})"


def list_corpora(workspace: str | os.PathLike[str] | None = None) -> list[Corpus]:
    """All corpora of a workspace, oldest first."""
    root = workspace_path(workspace, create=False) / "corpora"
    found = [Corpus.open(p.parent) for p in sorted(root.glob("*/corpus.json"))]
    return sorted(found, key=lambda c: c.meta["provenance"]["created"])


def build_corpus(
    source: str | os.PathLike[str] | Iterable[str],
    tokenizer: Any,
    *,
    mode: str = "document",
    max_tokens: int | None = None,
    context: int = 128,
    workspace: str | os.PathLike[str] | None = None,
    name: str | None = None,
    labels: Mapping[str, Sequence[Label]] | None = None,
) -> Corpus:
    """Tokenise `source` (packaged corpus, .txt/.jsonl/.csv/.parquet path, or strings) into a frozen token table.

    `max_tokens` takes whole documents in order and stops before the one that would pass it (the first is always
    taken). An identical call on a packaged corpus or an unchanged file returns the existing table at once.
    """
    started = time.time()
    root = workspace_path(workspace)
    packing = _packing(tokenizer, mode, context)
    opened = open_source(source, workspace=root, labels=labels)
    policy = {"mode": mode, "context": context, "prepend_bos": packing.bos is not None}
    tokenizer_sha = tokenizer_sha256(tokenizer)
    key = _inputs_key(opened, policy, tokenizer_sha, max_tokens, labels)
    if key is not None and (existing := _find_existing(root, key)) is not None:
        return existing

    docs, ids = _tokenise(opened, tokenizer, max_tokens)
    columns = pack(ids, packing)
    docs_table = _docs_table(docs, ids)
    fingerprint = _fingerprint(columns, docs_table, tokenizer_sha, policy)
    folder = root / "corpora" / fingerprint[:16]
    if not (folder / "corpus.json").exists():
        meta = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint,
            "inputs_key": key,
            "name": name or opened.name,
            **policy,
            "tokenizer_sha256": tokenizer_sha,
            "max_tokens": max_tokens,
            "n_tokens": len(columns["tok"]),
            "n_seqs": int(columns["seq"][-1]) + 1,
            "n_docs": len(docs),
            "n_heldout_tokens": int(columns["split"].sum()),
            "provenance": provenance(started=started, source=opened.name, source_key=opened.key),
        }
        _write(folder, columns, docs_table, vocab_strings(tokenizer), meta)
    return Corpus.open(folder)


def _packing(tokenizer: Any, mode: str, context: int) -> Packing:
    if mode not in MODES:
        raise UsageError(f"no corpus mode {mode!r}: the modes are {' and '.join(repr(m) for m in MODES)}")
    bos = tokenizer.bos_token_id if prepends_bos(tokenizer) else None
    if context < 2:
        raise UsageError(f"context is {context}: a row of a forward pass needs at least 2 tokens")
    if mode == "packed" and tokenizer.eos_token_id is None:
        raise UsageError(
            "packed mode joins documents with the eos token, and this tokenizer has none: use document"
        )
    return Packing(
        mode=mode,
        context=context,
        bos=bos,
        separator=tokenizer.eos_token_id if mode == "packed" else None,
        special=tuple(sorted(int(i) for i in tokenizer.all_special_ids)),
    )


def _inputs_key(
    opened: Source,
    policy: dict[str, Any],
    tokenizer_sha: str,
    max_tokens: int | None,
    labels: Mapping[str, Sequence[Label]] | None,
) -> str | None:
    if opened.key is None:
        return None
    value = [SCHEMA_VERSION, opened.name, opened.key, policy, tokenizer_sha, max_tokens]
    value.append({k: list(v) for k, v in labels.items()} if labels else None)
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _find_existing(root: Path, key: str) -> Corpus | None:
    for path in (root / "corpora").glob("*/corpus.json"):
        if read_json(path).get("inputs_key") == key:
            return Corpus.open(path.parent)
    return None


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    stream = iter(documents)
    while chunk := list(islice(stream, _DOCS_PER_CALL)):
        yield chunk


def _tokenise(
    opened: Source, tokenizer: Any, max_tokens: int | None
) -> tuple[list[Document], list[np.ndarray]]:
    """Documents that have at least one token, and their ids without special tokens added."""
    docs: list[Document] = []
    ids: list[np.ndarray] = []
    total = 0
    for chunk in _chunks(opened.documents):
        encoded = tokenizer(
            [d.text for d in chunk],
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )
        for doc, tokens in zip(chunk, encoded["input_ids"]):
            if max_tokens is not None and ids and total + len(tokens) > max_tokens:
                return docs, ids
            if len(tokens):
                docs.append(doc)
                ids.append(np.asarray(tokens, dtype=np.int32))
                total += len(tokens)
    if not ids:
        raise DataError(f"corpus {opened.name!r} has no tokens: it is empty, or all its documents are")
    return docs, ids


def _docs_table(docs: Sequence[Document], ids: Sequence[np.ndarray]) -> pa.Table:
    labels = list(dict.fromkeys(k for d in docs for k in d.labels))
    columns = {
        "doc": pa.array(range(len(docs)), pa.int32()),
        "sha": [hashlib.sha256(d.text.encode()).hexdigest() for d in docs],
        "split": pa.array([split_of(i) for i in ids], pa.uint8()),
        "n_tokens": pa.array([len(i) for i in ids], pa.int32()),
        "source": [d.source for d in docs],
    }
    for name in labels:
        try:
            columns[name] = pa.array([d.labels.get(name) for d in docs])
        except pa.ArrowException as e:
            raise DataError(f"{name} mixes types ({e}): use one type for all documents") from e
    return pa.table(columns)


def _fingerprint(
    columns: dict[str, np.ndarray], docs: pa.Table, tokenizer_sha: str, policy: dict[str, Any]
) -> str:
    """Content id: token columns, tokenizer, context policy, and the labels where there are any."""
    digest = hashlib.sha256(canonical_json([SCHEMA_VERSION, tokenizer_sha, policy]).encode())
    for name in COLUMNS:
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(columns[name]).tobytes())
    for name in docs.column_names:
        if name.startswith("label_"):
            digest.update(repr((name, docs.column(name).to_pylist())).encode())
    return digest.hexdigest()


def _write(
    folder: Path, columns: dict[str, np.ndarray], docs: pa.Table, vocab: list[str], meta: dict[str, Any]
) -> None:
    words = pa.table({"tok": pa.array(range(len(vocab)), pa.int32()), "token": pa.array(vocab, pa.string())})
    with atomic_dir(folder) as tmp:
        tokens = pa.table({name: columns[name] for name in COLUMNS})
        pq.write_table(tokens, tmp / "tokens.parquet", compression="zstd", row_group_size=_ROWS_PER_GROUP)
        pq.write_table(docs, tmp / "docs.parquet", compression="zstd")
        pq.write_table(words, tmp / "vocab.parquet", compression="zstd")
        write_json(tmp / "corpus.json", meta)
