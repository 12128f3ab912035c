"""Documents → token ids, with roles where they are dialogues. Texts are let go of as soon as they are ids.

`max_tokens` takes whole documents in order and stops before the one that would pass it (the first is always taken).
A dialogue longer than `cut` tokens is cut there; its split is decided by all of its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from cache.dialogue import ChatTemplate
from cache.errors import DataError
from cache.packing import split_of
from cache.sources import Document, Label

_DOCS_PER_CALL = 256


@dataclass
class Tokenised:
    """One entry a document, in order; documents without tokens are left out."""

    ids: list[np.ndarray] = field(default_factory=list)
    """int32 token ids, without special tokens added."""
    split: list[int] = field(default_factory=list)
    sha: list[str] = field(default_factory=list)
    """sha256 of the text, or of the messages as JSON."""
    source: list[str] = field(default_factory=list)
    labels: list[dict[str, Label]] = field(default_factory=list)
    role: list[np.ndarray] = field(default_factory=list)
    """uint8 role of each token (dialogues only)."""
    template: list[np.ndarray] = field(default_factory=list)
    """bool, a token of the template (dialogues only)."""
    truncated_docs: int = 0
    truncated_tokens: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def tokenise(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    dialogue: bool,
    max_tokens: int | None,
    cut: int | None,
    name: str,
) -> Tokenised:
    """Tokenise a stream of documents, reading no further than `max_tokens`."""
    out, total, seen = Tokenised(), 0, 0
    template = ChatTemplate(tokenizer) if dialogue else None
    for chunk in _chunks(documents):
        encoded = _dialogues(chunk, template, seen) if template else _texts(chunk, tokenizer)
        seen += len(chunk)
        for doc, (ids, role, marks) in zip(chunk, encoded):
            kept = len(ids) if cut is None else min(len(ids), cut)
            if max_tokens is not None and len(out) and total + kept > max_tokens:
                return out
            if not kept:
                continue
            total += kept
            out.ids.append(ids[:kept])
            out.split.append(split_of(ids))
            out.sha.append(hashlib.sha256(_content(doc).encode()).hexdigest())
            out.source.append(doc.source)
            out.labels.append(doc.labels)
            if role is not None and marks is not None:
                out.role.append(role[:kept])
                out.template.append(marks[:kept])
            out.truncated_docs += kept < len(ids)
            out.truncated_tokens += len(ids) - kept
    if not len(out):
        raise DataError(f"corpus {name!r} has no tokens: it is empty, or all its documents are")
    return out


_Encoded = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


def _texts(chunk: list[Document], tokenizer: Any) -> Iterator[_Encoded]:
    encoded = tokenizer(
        [d.text for d in chunk],
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    for ids in encoded["input_ids"]:
        yield np.asarray(ids, dtype=np.int32), None, None


def _dialogues(chunk: list[Document], template: ChatTemplate, seen: int) -> Iterator[_Encoded]:
    yield from template.tokenise([d.messages for d in chunk], first=seen)


def _content(doc: Document) -> str:
    return json.dumps(doc.messages, ensure_ascii=False) if doc.messages else doc.text


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    stream = iter(documents)
    while chunk := list(islice(stream, _DOCS_PER_CALL)):
        yield chunk
