"""Tokens and features: which features fire on a token, and the token that a feature marks best.

Of tokens with at least FREQUENT rows the features are put into a table, for there are too many firings to go through
on a question; of the others the rows are listed, and their codes are read when asked (saes/code_reader.py). So every
answer is complete, and the tables stay near half a byte a firing.

Best token: the largest activation mass times the share of the token's rows on which the feature fires. Mass alone
names commas and hyphens, the share alone names tokens seen once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saes.ranking import Firings, rising_bits

FREQUENT = 1024


class Pairs(NamedTuple):
    """(feature, token) pairs with a firing, by feature and token: n, largest and smallest value, and sum of |value|."""

    feature: np.ndarray
    tok: np.ndarray
    n: np.ndarray
    max_act: np.ndarray
    min_act: np.ndarray
    mass: np.ndarray

    def at(self, which: np.ndarray) -> Pairs:
        return Pairs(*(column[which] for column in self))


def pairs_of(f: Firings, tok: np.ndarray, first: int, *, wide: bool) -> Pairs:
    """Pairs of a block of firings; `tok` is the token of every row of the corpus, `first` the first feature of the block."""
    own, local = tok[f.row], f.feature - np.int32(first)
    if wide:
        order = np.lexsort((f.value, own, local))
        local, own, value = local[order], own[order], f.value[order]
    else:
        key = local.astype(np.uint64)
        key <<= np.uint64(32)
        key |= own.astype(np.uint64)
        key <<= np.uint64(16)
        key |= rising_bits(f.value.astype(np.float16))
        key.sort()
        rising = key.astype(np.uint16)
        bits = rising ^ np.where(rising & 0x8000, np.uint16(0x8000), np.uint16(0xFFFF))
        value = bits.view(np.float16).astype(np.float32)
        key >>= np.uint64(16)
        own, local = key.astype(np.uint32).astype(np.int32), (key >> np.uint64(32)).astype(np.int32)
    if not len(own):
        return Pairs(local, own, *(np.zeros(0, dtype=t) for t in (np.int64, "f4", "f4", "f8")))
    start = np.flatnonzero(np.r_[True, (own[1:] != own[:-1]) | (local[1:] != local[:-1])])
    end = np.r_[start[1:], len(own)]
    mass = np.add.reduceat(np.abs(value), start, dtype=np.float64)
    return Pairs(
        local[start] + np.int32(first), own[start], end - start,
        np.maximum(value[end - 1], 0), np.minimum(value[start], 0), mass,
    )  # fmt: skip


def best_tokens(pairs: Pairs, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(feature, token) of the features that fire; totals: rows of each token. Of equal ones the smallest token id."""
    if not len(pairs.feature):
        return pairs.feature, pairs.tok
    score = pairs.mass * pairs.n / totals[pairs.tok]
    start = np.flatnonzero(np.r_[True, pairs.feature[1:] != pairs.feature[:-1]])
    n = np.diff(np.r_[start, len(score)])
    best = np.flatnonzero(score == np.repeat(np.maximum.reduceat(score, start), n))
    _, one = np.unique(pairs.feature[best], return_index=True)
    return pairs.feature[best[one]], pairs.tok[best[one]]


def rare_rows(tok: np.ndarray, rows: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(token, row) of `rows` whose token is not frequent, by token and row."""
    rows = rows[totals[tok[rows]] < FREQUENT]
    order = np.argsort(tok[rows], kind="stable")
    return tok[rows][order], rows[order]


__all__ = ["FREQUENT", "Pairs", "best_tokens", "pairs_of", "rare_rows"]
