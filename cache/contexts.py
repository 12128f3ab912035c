"""A token table of inputs that are not text: images, boards, vectors; one context each, T rows a context.

A row of the table is a place in a context (pos 0 … T − 1), with any further columns: for feature maps [C, H, W] these
are H·W rows with y and x (`grid_columns`). The inputs are frozen beside the table as inputs.npy. Nothing is a sink
here, so no row is flagged "first" unless asked for, and readers leave out none.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache.corpus import Corpus, docs_table, fingerprint_of, write_corpus
from cache.errors import DataError, UsageError
from cache.packing import COLUMNS, FLAG_FIRST, HELDOUT, TRAIN, split_of_bytes
from cache.provenance import provenance
from cache.sources import Label
from cache.tokenising import Tokenised
from cache.workspace import workspace_path

MODE = "contexts"
_TAKEN = {*COLUMNS, "corpus", "row", "token", "n_tokens", "source", "sha"}
_SPLITS = {"train": TRAIN, "heldout": HELDOUT}


def grid_columns(height: int, width: int) -> dict[str, np.ndarray]:
    """Columns y and x of a feature map's rows, in the order of "b c h w -> b (h w) c"."""
    y, x = np.mgrid[:height, :width]
    return {"y": y.ravel().astype(np.int32), "x": x.ravel().astype(np.int32)}


def build_contexts(
    inputs: Any,
    *,
    rows: int = 1,
    columns: Mapping[str, Any] | None = None,
    labels: Mapping[str, Sequence[Label]] | None = None,
    split: Sequence[int | str] | None = None,
    tokens: Any = None,
    vocab: Sequence[str] | None = None,
    first: bool = False,
    name: str = "contexts",
    workspace: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Freeze `inputs` [N, …] (numbers, tensor or array) as a table of N contexts with `rows` rows each.

    `columns`: values per row, [rows] (the same in each context) or [N, rows]. `labels`: one value per context.
    `split`: 0/1 or train/heldout per context; otherwise a tenth is held out by a hash of its bytes. `tokens`: int
    [N, rows], the id in `vocab` that each row stands for; without them every row has id 0 and the text "".
    `first` flags position 0 of every context, for models with an attention sink.
    """
    started = time.time()
    array = _numbers(inputs)
    n = len(array)
    if rows < 1:
        raise UsageError(f"rows is {rows}: a context has at least one row")
    digests = [c.tobytes() for c in array.reshape(n, -1)]
    splits = _splits(split, n) if split is not None else np.array([split_of_bytes(d) for d in digests])
    ids, words = _ids(tokens, vocab, n, rows)
    table = _table(n, rows, ids, splits.astype(np.uint8), first) | _extra(columns or {}, n, rows)
    docs = Tokenised(
        ids=list(ids), split=splits.tolist(), sha=[hashlib.sha256(d).hexdigest() for d in digests],
        source=[name] * n, labels=_labels(labels or {}, n),
    )  # fmt: skip
    documents = docs_table(docs)
    content = hashlib.sha256(array.tobytes()).hexdigest()
    policy = {"mode": MODE, "context": rows, "shape": list(array.shape), "dtype": str(array.dtype)}
    meta = {
        "schema_version": 1,
        "fingerprint": fingerprint_of(table, documents, [content, words, policy]),
        "inputs_key": None,
        "name": name,
        **policy,
        "prepend_bos": False,
        "tokenizer_sha256": None,
        "inputs_sha256": content,
        "columns": {k: str(v.dtype) for k, v in table.items() if k not in COLUMNS},
        "provenance": provenance(started=started, source=name),
    }

    def save(path: Path) -> None:
        with path.open("wb") as f:
            np.save(f, array, allow_pickle=False)

    return write_corpus(
        workspace_path(workspace), table, documents, lambda: words, meta, files={"inputs.npy": save}
    )


def _numbers(inputs: Any) -> np.ndarray:
    if hasattr(inputs, "detach"):
        inputs = inputs.detach().cpu().numpy()
    array = np.ascontiguousarray(inputs)
    if array.ndim < 1 or not array.size or array.dtype.kind not in "fiub":
        raise UsageError(f"inputs must be numbers [N, ...], got {array.dtype} {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0])
        raise DataError(f"context {bad} of the inputs holds NaN or infinite values")
    return array


def _splits(split: Sequence[int | str], n: int) -> np.ndarray:
    values = np.array([_SPLITS.get(s, s) if isinstance(s, str) else int(s) for s in split], dtype=object)
    if len(values) != n or not set(values) <= {TRAIN, HELDOUT}:
        raise UsageError(f"split must be {n} values, 0 or 'train', 1 or 'heldout'")
    return values.astype(np.uint8)


def _ids(tokens: Any, vocab: Sequence[str] | None, n: int, rows: int) -> tuple[np.ndarray, list[str]]:
    """int32 [N, rows] and the texts of the ids."""
    if tokens is None:
        return np.zeros((n, rows), np.int32), [""]
    if hasattr(tokens, "detach"):
        tokens = tokens.detach().cpu().numpy()
    ids = np.asarray(tokens)
    if ids.shape != (n, rows) or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise UsageError(f"tokens must be ids >= 0 of shape ({n}, {rows}), got {ids.dtype} {ids.shape}")
    words = [str(i) for i in range(int(ids.max()) + 1)] if vocab is None else list(vocab)
    if ids.max() >= len(words):
        raise UsageError(f"tokens go up to {ids.max()}, the vocab has {len(words)} entries")
    return ids.astype(np.int32), words


def _table(n: int, rows: int, ids: np.ndarray, splits: np.ndarray, first: bool) -> dict[str, np.ndarray]:
    context = np.repeat(np.arange(n), rows)
    pos = np.tile(np.arange(rows), n)
    values = {
        "seq": context, "pos": pos, "doc": context, "doc_pos": pos, "tok": ids.reshape(-1),
        "role": np.zeros(n * rows), "flags": FLAG_FIRST * ((pos == 0) & first), "split": splits[context],
    }  # fmt: skip
    return {name: values[name].astype(dtype) for name, dtype in COLUMNS.items()}


def _extra(columns: Mapping[str, Any], n: int, rows: int) -> dict[str, np.ndarray]:
    out = {}
    for name, values in columns.items():
        if name in _TAKEN or name.startswith("label_") or not name.isidentifier():
            raise UsageError(f"{name!r} cannot be the name of a row column: it is taken, or not a plain name")
        array = np.asarray(values)
        if array.shape not in ((rows,), (n, rows)) or array.dtype.kind not in "fiub":
            raise UsageError(
                f"column {name!r} must be numbers of shape ({rows},) or ({n}, {rows}), got {array.dtype} {array.shape}"
            )
        out[name] = np.ascontiguousarray(np.broadcast_to(array, (n, rows)).reshape(-1))
    return out


def _labels(labels: Mapping[str, Sequence[Label]], n: int) -> list[dict[str, Label]]:
    columns = {}
    for name, values in labels.items():
        plain = pa.array(values).to_pylist()  # numbers of numpy and torch become Python's
        if len(plain) != n:
            raise UsageError(f"label {name!r} has {len(plain)} values, there are {n} contexts: give one each")
        columns[name if name.startswith("label_") else f"label_{name}"] = plain
    return [{k: v[i] for k, v in columns.items()} for i in range(n)]
