"""From documents' token ids to the rows of forward passes: pure numpy, no tokenizer and no model.

document          each document starts a row of its own; one longer than the context continues in the next rows
packed            documents of one split are joined by a separator (eos) and cut every `context` tokens; train blocks
                  come first, held-out blocks after them, so that no block ever holds tokens of both
dialogue          as document; dialogues come already cut to the context, and with the role of every token
dialogue_packed   rendered dialogues end to end, nothing between them, cut every `context` tokens as in packed: the usual
                  data path of SAEs of chat models (BT(F) of arXiv 2506.07691), in which few blocks begin with a dialogue
dialogue_aligned  whole dialogues (cut to the context) fill a row while they fit, so every row begins with a dialogue

Padding is never stored. With a BOS, every row starts with one, and it counts towards the context; a chat template
writes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

TRAIN, HELDOUT = 0, 1
MODES = ("document", "packed", "dialogue", "dialogue_packed", "dialogue_aligned")
DIALOGUES = ("dialogue", "dialogue_packed", "dialogue_aligned")
"""Modes that take lists of messages."""
BLOCKS = ("packed", "dialogue_packed", "dialogue_aligned")
"""Modes in which a row of a forward pass may hold several documents."""
FLAG_FIRST, FLAG_SPECIAL, FLAG_NOT_ASSISTANT = 1, 2, 4
ROLE_NONE, ROLE_ASSISTANT = 0, 3
BOS_DOC_POS = -1
"""`doc_pos` of a BOS row: it is no token of the document."""
HELDOUT_PER_MILLE = 100

COLUMNS: dict[str, type[np.generic]] = {
    "seq": np.int32,
    "pos": np.int32,
    "doc": np.int32,
    "doc_pos": np.int32,
    "tok": np.int32,
    "role": np.uint8,
    "flags": np.uint8,
    "split": np.uint8,
}


def split_of(ids: Sequence[int] | np.ndarray) -> int:
    """Split of a document, from its token ids alone: the same text is on the same side in every corpus."""
    return split_of_bytes(np.asarray(ids, dtype="<i4").tobytes())


def split_of_bytes(content: bytes) -> int:
    """Split of anything that is bytes."""
    return HELDOUT if xxhash.xxh3_64_intdigest(content) % 1000 < HELDOUT_PER_MILLE else TRAIN


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How token ids become rows."""

    mode: str
    """One of MODES."""
    context: int
    """Longest row of a forward pass, in tokens, BOS included."""
    bos: int | None = None
    """Id put before every row, None for no BOS."""
    separator: int | None = None
    """Id between documents (packed mode)."""
    special: tuple[int, ...] = ()
    """Ids that get flag 2."""

    @property
    def body(self) -> int:
        """Tokens of documents that fit in one row."""
        return self.context - (self.bos is not None)


def pack(
    docs: Sequence[np.ndarray], packing: Packing, splits: Sequence[int] | np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Token-table columns, sorted by (seq, pos), of documents given as int32 arrays (none of them empty)."""
    splits = np.array([split_of(d) for d in docs] if splits is None else splits, dtype=np.uint8)
    lengths = np.array([len(d) for d in docs], dtype=np.int64)
    if packing.mode not in BLOCKS:
        order = np.arange(len(docs))
        parts = [_stream(docs, order, None)]
        starts = [_document_starts(lengths, packing.body)]
    else:
        parts, starts = [], []
        for split in (TRAIN, HELDOUT):
            order = np.flatnonzero(splits == split)
            if len(order):
                parts.append(_stream(docs, order, packing.separator))
                if packing.mode == "dialogue_aligned":
                    starts.append(_whole_documents(lengths[order], packing.body))
                else:
                    starts.append(np.arange(0, len(parts[-1]["tok"]), packing.body))
    offsets = np.cumsum([0, *(len(p["tok"]) for p in parts)])
    table = {name: np.concatenate([p[name] for p in parts]) for name in ("tok", "doc", "doc_pos")}
    begin = np.concatenate([s + o for s, o in zip(starts, offsets)])
    return _finish(table, begin, splits, packing)


def _document_starts(lengths: np.ndarray, body: int) -> np.ndarray:
    """Indices, in the concatenation of all documents, at which a row of a forward pass begins."""
    rows = -(-lengths // body)
    doc_start = np.cumsum(lengths) - lengths
    within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    return np.repeat(doc_start, rows) + within * body


def _whole_documents(lengths: np.ndarray, body: int) -> np.ndarray:
    """Where rows begin when each takes the next documents as long as they fit; none is longer than `body`."""
    starts, at, room = [], 0, 0
    for n in lengths.tolist():
        if n > room:
            starts.append(at)
            room = body
        room -= n
        at += n
    return np.array(starts, dtype=np.int64)


def _stream(docs: Sequence[np.ndarray], order: np.ndarray, separator: int | None) -> dict[str, np.ndarray]:
    """The chosen documents end to end; the separator belongs to the document before it."""
    tail = np.array([] if separator is None else [separator], dtype=np.int32)
    pieces = [np.concatenate([docs[i], tail]) for i in order]
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    return {
        "tok": np.concatenate(pieces).astype(np.int32),
        "doc": np.repeat(order, lengths).astype(np.int32),
        "doc_pos": (np.arange(lengths.sum()) - np.repeat(first, lengths)).astype(np.int32),
    }


def add_roles(
    table: dict[str, np.ndarray], role: Sequence[np.ndarray], template: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """The table of dialogues with their roles, flag 2 on every token of the template, flag 4 off the assistant."""
    lengths = np.array([len(r) for r in role], dtype=np.int64)
    # packing may have put the documents in another order
    at = (np.cumsum(lengths) - lengths)[table["doc"]] + table["doc_pos"]
    roles = np.concatenate(role)[at]
    flags = table["flags"] | (FLAG_SPECIAL * np.concatenate(template)[at]).astype(np.uint8)
    flags |= (FLAG_NOT_ASSISTANT * (roles != ROLE_ASSISTANT)).astype(np.uint8)
    return table | {"role": roles, "flags": flags}


def _finish(
    table: dict[str, np.ndarray], begin: np.ndarray, splits: np.ndarray, packing: Packing
) -> dict[str, np.ndarray]:
    if packing.bos is not None:
        doc_at = table["doc"][begin]
        table = {
            "tok": np.insert(table["tok"], begin, packing.bos),
            "doc": np.insert(table["doc"], begin, doc_at),
            "doc_pos": np.insert(table["doc_pos"], begin, BOS_DOC_POS),
        }
        begin = begin + np.arange(len(begin))
    n = len(table["tok"])
    lengths = np.diff(np.append(begin, n))
    out = dict(table)
    out["seq"] = np.repeat(np.arange(len(begin)), lengths)
    out["pos"] = np.arange(n) - np.repeat(begin, lengths)
    special = np.isin(table["tok"], np.array(packing.special, dtype=np.int64))
    out["flags"] = FLAG_FIRST * (out["pos"] == 0) + FLAG_SPECIAL * special
    out["role"] = np.full(n, ROLE_NONE)
    out["split"] = splits[table["doc"]]
    return {name: out[name].astype(dtype) for name, dtype in COLUMNS.items()}
