"""The text around firings: windows of tokens with the activation of one feature on each.

A window takes two thirds of its tokens before the firing and one third after, and never leaves its forward context.
Windows of the same text are shown once and counted. Text comes from the corpus, activations from the codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cache.corpus import Corpus
from saes.code_reader import CodeReader
from saes.example import Example


def windows(
    corpus: Corpus, codes: CodeReader, feature: int, *, rows: np.ndarray, values: np.ndarray, kinds: list[str],
    n: int, width: int,
) -> list[Example]:  # fmt: skip
    """The first `n` different windows around `rows`, in their order. Identical ones of a kind appear once."""
    tok, vocab = corpus.column("tok"), corpus.vocab
    shown: dict[tuple[Any, ...], int] = {}
    picked: list[tuple[int, range]] = []
    repeats: list[int] = []
    for i, (row, start, stop) in enumerate(zip(rows.tolist(), *_spans(corpus, rows, width), strict=True)):
        key = (kinds[i] if kinds[i] != "top" else "", row - start, tok[start:stop].tobytes())
        if key in shown:
            repeats[shown[key]] += 1
        elif len(picked) < n:
            shown[key] = len(picked)
            picked.append((i, range(start, stop)))
            repeats.append(1)
    acts = _activations(codes, feature, [span for _, span in picked])
    at = rows[[i for i, _ in picked]] if picked else rows[:0]
    doc, seq, split = (corpus.column(c)[at].tolist() for c in ("doc", "seq", "split"))
    pos = at - corpus.seq_offsets[seq]  # rows are sorted by (seq, pos), without gaps
    return [
        Example(
            row=int(rows[i]), doc=doc[j], seq=seq[j], pos=int(pos[j]), split="heldout" if split[j] else "train",
            value=float(values[i]), tokens=[vocab[t] for t in tok[span.start : span.stop].tolist()],
            values=[acts.get(r, 0.0) for r in span], centre=int(rows[i]) - span.start, repeats=repeats[j],
            band=kinds[i] if kinds[i].startswith("q") else "", rows=span,
        )
        for j, (i, span) in enumerate(picked)
    ]  # fmt: skip


def _spans(corpus: Corpus, rows: np.ndarray, width: int) -> tuple[list[int], list[int]]:
    """First row and end of the window around each of `rows`."""
    seq, offsets = corpus.column("seq")[rows], corpus.seq_offsets
    start = np.maximum(offsets[seq], rows - max(0, width - 1) * 2 // 3)
    stop = np.minimum(offsets[seq + 1], start + max(1, width))
    return start.tolist(), stop.tolist()


def _activations(codes: CodeReader, feature: int, spans: list[range]) -> dict[int, float]:
    if not spans:
        return {}
    rows = np.sort(np.concatenate([np.arange(s.start, s.stop) for s in spans]))
    found = codes.codes(rows[np.diff(rows, prepend=-1) > 0])
    mine = found.ids == feature
    return dict(zip(found.rows[mine].tolist(), found.values[mine].tolist(), strict=True))


__all__ = ["windows"]
