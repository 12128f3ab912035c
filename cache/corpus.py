"""Token tables: a corpus is tokenised once, split, cut into rows of forward passes, and frozen.

Folder corpora/<fingerprint16>/ : tokens.parquet (one row per token, sorted by (seq, pos), no padding),
docs.parquet, vocab.parquet, corpus.json. The index of a row in tokens.parquet is the ROW ID that activation
stores, codes and features refer to. Columns of tokens: seq, pos (place in the forward pass; 0 = attention sink),
doc, doc_pos, tok, role (0 none, 1 system, 2 user, 3 assistant, 4 tool, 5 other), flags (1 first in context,
2 special id or token of the chat template, 4 not of an assistant's message; the last only in dialogues), split
(0 train, 1 held out: one document in ten, chosen by a hash of its token ids before anything is packed), and any
further columns that a table of contexts brings (cache/contexts.py).
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import DataError, MissingDataError, UsageError
from cache.packing import COLUMNS, DIALOGUES, MODES, Packing, add_roles, pack
from cache.provenance import provenance
from cache.sources import Fields, Label, Source, open_source
from cache.tokenising import Tokenised, tokenise
from cache.vocab import prepends_bos, template_sha256, tokenizer_sha256, vocab_strings
from cache.workspace import atomic_dir, canonical_json, read_json, workspace_path, write_json

SCHEMA_VERSION = 1
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
        known = [*COLUMNS, *self.meta.get("columns", {})]
        if name not in known:
            raise UsageError(f"no token column {name!r}: there are {', '.join(known)}")
        if name not in self._columns:
            try:
                # not read_table, which imports pyarrow.dataset: a sixth of the time to open an index
                with pq.ParquetFile(self.path / "tokens.parquet") as file:
                    table = file.read(columns=[name])
            except FileNotFoundError as e:
                raise MissingDataError(
                    f"{self.path / 'tokens.parquet'} is gone: build the corpus again"
                ) from e
            values = table.column(name).to_numpy()
            values.flags.writeable = False
            self._columns[name] = values
        return self._columns[name]

    def is_loaded(self, name: str) -> bool:
        """Whether a column is in memory."""
        return name in self._columns

    @functools.cached_property
    def seq_offsets(self) -> np.ndarray:
        """int64 [n_seqs + 1]: sequence s is rows seq_offsets[s] … seq_offsets[s + 1] − 1."""
        counts = np.bincount(self.column("seq"), minlength=self.n_seqs)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @functools.cached_property
    def vocab(self) -> list[str]:
        """Text of each token id."""
        with pq.ParquetFile(self.path / "vocab.parquet") as file:
            return file.read(columns=["token"]).column("token").to_pylist()

    @functools.cached_property
    def inputs(self) -> np.ndarray | None:
        """Inputs [n_seqs, …] of a table of contexts, mapped from disk; None for a corpus of text."""
        path = self.path / "inputs.npy"
        if "inputs_sha256" not in self.meta:
            return None
        if not path.exists():
            raise MissingDataError(f"{path} is gone: build the contexts again")
        return np.load(path, mmap_mode="r", allow_pickle=False)

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
    source: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Any,
    *,
    mode: str = "document",
    max_tokens: int | None = None,
    context: int = 128,
    workspace: str | os.PathLike[str] | None = None,
    name: str | None = None,
    labels: Mapping[str, Sequence[Label]] | None = None,
    text_field: str | None = None,
    label_fields: Sequence[str] = (),
    prepend_bos: bool | None = None,
) -> Corpus:
    """Tokenise `source` into a frozen token table.

    `source`: a packaged corpus, a .txt/.jsonl/.csv/.parquet file, a data set (hf:owner/name, a folder, a `datasets`
    object), or an iterable of strings, rows or, in the dialogue modes, lists of messages. Modes: cache/packing.py. Rows have their text in
    `text_field` and may have labels: fields called label_* and those in `label_fields`.
    `prepend_bos` None: as the tokenizer does it.
    `max_tokens` takes whole documents in order and stops before the one that would pass it (the first is always
    taken). An identical call on a packaged corpus or an unchanged file returns the existing table at once.
    """
    started = time.time()
    root = workspace_path(workspace)
    packing = _packing(tokenizer, mode, context, prepend_bos)
    fields = Fields(dialogue=mode in DIALOGUES, text=text_field, labels=tuple(label_fields))
    opened = open_source(source, workspace=root, labels=labels, fields=fields)
    policy: dict[str, Any] = {"mode": mode, "context": context, "prepend_bos": packing.bos is not None}
    if fields.dialogue:
        policy["template_sha256"] = template_sha256(tokenizer)
    tokenizer_sha = tokenizer_sha256(tokenizer)
    key = _inputs_key(opened, policy, tokenizer_sha, max_tokens, labels, fields)
    if key is not None and (existing := _find_existing(root, key)) is not None:
        return existing

    docs = tokenise(
        opened.documents,
        tokenizer,
        dialogue=fields.dialogue,
        max_tokens=max_tokens,
        cut=context if mode in ("dialogue", "dialogue_aligned") else None,
        name=opened.name,
    )
    columns = pack(docs.ids, packing, docs.split)
    if fields.dialogue:
        columns = add_roles(columns, docs.role, docs.template)
    table = docs_table(docs)
    meta = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint_of(columns, table, [tokenizer_sha, policy]),
        "inputs_key": key,
        "name": name or opened.name,
        **policy,
        "tokenizer_sha256": tokenizer_sha,
        "max_tokens": max_tokens,
        "truncated_docs": docs.truncated_docs,
        "truncated_tokens": docs.truncated_tokens,
        "provenance": provenance(started=started, source=opened.name, source_key=opened.key),
    }
    return write_corpus(root, columns, table, lambda: vocab_strings(tokenizer), meta)


def write_corpus(
    root: Path,
    columns: dict[str, np.ndarray],
    docs: pa.Table,
    vocab: Callable[[], list[str]],
    meta: dict[str, Any],
    *,
    files: Mapping[str, Callable[[Path], None]] | None = None,
) -> Corpus:
    """Freeze a table in corpora/<fingerprint>, unless it is there already; `files` are written beside it."""
    folder = root / "corpora" / meta["fingerprint"][:16]
    if not (folder / "corpus.json").exists():
        counts = {
            "n_tokens": len(columns["tok"]),
            "n_seqs": int(columns["seq"][-1]) + 1,
            "n_docs": docs.num_rows,
            "n_heldout_tokens": int(columns["split"].sum()),
        }
        words = vocab()
        with atomic_dir(folder) as tmp:
            tokens = pa.table(columns)
            pq.write_table(tokens, tmp / "tokens.parquet", compression="zstd", row_group_size=_ROWS_PER_GROUP)
            pq.write_table(docs, tmp / "docs.parquet", compression="zstd")
            table = {"tok": pa.array(range(len(words)), pa.int32()), "token": pa.array(words, pa.string())}
            pq.write_table(pa.table(table), tmp / "vocab.parquet", compression="zstd")
            for filename, write in (files or {}).items():
                write(tmp / filename)
            write_json(tmp / "corpus.json", meta | counts)
    return Corpus.open(folder)


def _packing(tokenizer: Any, mode: str, context: int, prepend_bos: bool | None) -> Packing:
    if mode not in MODES:
        raise UsageError(f"no corpus mode {mode!r}: the modes are {', '.join(repr(m) for m in MODES)}")
    # A chat template writes the BOS itself.
    wanted = mode not in DIALOGUES and (prepends_bos(tokenizer) if prepend_bos is None else prepend_bos)
    if prepend_bos and (not wanted or tokenizer.bos_token_id is None):
        reason = "this tokenizer has none" if wanted else "dialogues have what their template writes"
        raise UsageError(f"prepend_bos asks for a BOS before each row, and {reason}: leave it out")
    bos = tokenizer.bos_token_id if wanted else None
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
    fields: Fields,
) -> str | None:
    if opened.key is None:
        return None
    value = [SCHEMA_VERSION, opened.name, opened.key, policy, tokenizer_sha, max_tokens]
    value.append({k: list(v) for k, v in labels.items()} if labels else None)
    if fields.text or fields.labels:
        value.append([fields.text, list(fields.labels)])
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _find_existing(root: Path, key: str) -> Corpus | None:
    for path in (root / "corpora").glob("*/corpus.json"):
        if read_json(path).get("inputs_key") == key:
            return Corpus.open(path.parent)
    return None


def docs_table(docs: Tokenised) -> pa.Table:
    """One row a document: doc, sha, split, n_tokens, source, and the labels."""
    labels = list(dict.fromkeys(k for d in docs.labels for k in d))
    columns = {
        "doc": pa.array(range(len(docs)), pa.int32()),
        "sha": docs.sha,
        "split": pa.array(docs.split, pa.uint8()),
        "n_tokens": pa.array([len(i) for i in docs.ids], pa.int32()),
        "source": docs.source,
    }
    for name in labels:
        try:
            columns[name] = pa.array([d.get(name) for d in docs.labels])
        except pa.ArrowException as e:
            raise DataError(f"{name} mixes types ({e}): use one type for all documents") from e
    return pa.table(columns)


def fingerprint_of(columns: dict[str, np.ndarray], docs: pa.Table, policy: list[Any]) -> str:
    """Content id: token columns, tokenizer and context policy, and the labels where there are any."""
    digest = hashlib.sha256(canonical_json([SCHEMA_VERSION, *policy]).encode())
    for name, column in columns.items():
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(column).tobytes())
    for name in docs.column_names:
        if name.startswith("label_"):
            digest.update(repr((name, docs.column(name).to_pylist())).encode())
    return digest.hexdigest()
