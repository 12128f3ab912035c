"""Measures of one block of poles (a feature and a sign) from firings and words alone: numpy and scipy, no model.

Rules       best F1 of "fires where this word is" and "fires after this word", over all rows
Contexts    windows as bags in three channels (the word, the word before, the words around), idf-weighted, each
            channel of length 1; their similarity s is the mean over channels
  coherence   mean pairwise cosine of the words around, against sets of random windows, in their standard deviations
  detection   AUROC of the centroid of half of the windows on the other half against random windows; documents differ
  intruder    share of trials in which the random one of five windows is the least similar; chance is 0.2
  weighted    sum a_i a_j s_ij / sum a_i a_j over pairs (monosemanticity of Pach et al. 2025, with s on words)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

BEFORE, AFTER = 10, 5
TRIALS, OWN = 16, 4
CHANNELS = 3


class Words(NamedTuple):
    """A token table as words (tokens but for case and surrounding space), and where its sequences and documents are.

    word, before int32 `[rows]`: id of the row's word, of the one before it in its sequence (-1: none);
    usable bool `[rows]`: rows that features are computed on; total, total_before int64 `[n_words]`: their counts.
    """

    word: np.ndarray
    before: np.ndarray
    seq: np.ndarray
    doc: np.ndarray
    usable: np.ndarray
    total: np.ndarray
    total_before: np.ndarray
    idf: np.ndarray


def read_words(tok: np.ndarray, vocab: list[str], seq: np.ndarray, doc: np.ndarray, pos: np.ndarray) -> Words:
    """Words of a token table; position 0 is not usable."""
    names = {name: i for i, name in enumerate(dict.fromkeys(t.strip().casefold() for t in vocab))}
    of_token = np.array([names[t.strip().casefold()] for t in vocab], dtype=np.int32)
    word = of_token[tok]
    before = np.concatenate([[-1], word[:-1]]).astype(np.int32)
    before[pos == 0] = -1
    usable = pos > 0
    n, docs = len(names), int(doc.max(initial=0)) + 1
    in_docs = np.bincount(np.unique(doc.astype(np.int64) * n + word) % n, minlength=n)
    return Words(
        word, before, seq, doc, usable, np.bincount(word[usable], minlength=n),
        np.bincount(before[usable & (before >= 0)], minlength=n), np.log((1 + docs) / (1 + in_docs)).astype(np.float32),
    )  # fmt: skip


class Rules(NamedTuple):
    """Per pole: best F1 by word and by the word before, entropy and largest share of the activation mass over words."""

    word_f1: np.ndarray
    before_f1: np.ndarray
    entropy: np.ndarray
    top_share: np.ndarray


def rules(words: Words, pole: np.ndarray, row: np.ndarray, size: np.ndarray, n: np.ndarray) -> Rules:
    """pole, row, size: firings, pole in 0 .. len(n) - 1; n: firings of each pole."""
    word_f1 = _best_f1(pole, words.word[row], n, words.total)
    before = words.before[row]
    before_f1 = _best_f1(pole[before >= 0], before[before >= 0], n, words.total_before)
    keys, inverse = np.unique(pole * len(words.total) + words.word[row], return_inverse=True)
    owner = keys // len(words.total)
    mass = np.bincount(inverse, weights=size)
    share = mass / np.maximum(np.bincount(owner, weights=mass, minlength=len(n))[owner], 1e-30)
    entropy = np.bincount(owner, weights=-share * np.log(np.maximum(share, 1e-30)), minlength=len(n))
    top = np.zeros(len(n))
    np.maximum.at(top, owner, share)
    return Rules(word_f1, before_f1, entropy / np.log(np.clip(n, 2, len(words.total))), top)


def _best_f1(pole: np.ndarray, word: np.ndarray, n: np.ndarray, total: np.ndarray) -> np.ndarray:
    keys, both = np.unique(pole * len(total) + word, return_counts=True)
    owner = keys // len(total)
    best = np.zeros(len(n))
    np.maximum.at(best, owner, 2 * both / (n[owner] + total[keys % len(total)]))
    return best


def embed(words: Words, rows: np.ndarray) -> sparse.csr_matrix:
    """Windows around rows as `[len(rows), 3 * n_words]`: word, word before, words around; each channel of length 1."""
    n, inside = len(words.total), len(words.word)
    around = rows[:, None] + np.concatenate([np.arange(-BEFORE, 0), np.arange(1, AFTER + 1)])[None]
    valid = (around >= 0) & (around < inside)
    around = np.clip(around, 0, inside - 1)
    valid &= words.seq[around] == words.seq[rows][:, None]
    parts = []
    for ids, keep in (
        (words.word[rows][:, None], np.ones((len(rows), 1), dtype=bool)),
        (words.before[rows][:, None], words.before[rows][:, None] >= 0),
        (words.word[around], valid),
    ):
        at, _ = np.nonzero(keep)
        seen = np.unique(at * n + ids[keep])  # a word counts once in a window
        i, w = seen // n, seen % n
        weight = words.idf[w] + 1e-3
        length = np.sqrt(np.bincount(i, weights=weight**2, minlength=len(rows)))
        parts.append(sparse.csr_matrix((weight / length[i], (i, w)), shape=(len(rows), n)))
    return sparse.hstack(parts, format="csr").astype(np.float32)


class Chance:
    """Random windows: what the measures of contexts are held against."""

    def __init__(self, words: Words, k: int, *, n: int = 512, sets: int = 200, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        rows = np.flatnonzero(words.usable)
        self.windows = embed(words, self.rng.choice(rows, size=min(n, len(rows)), replace=False))
        self.k, n_words = k, len(words.total)
        around = self.windows[:, 2 * n_words :]
        cos = np.asarray((around @ around.T).todense())
        picks = [self.rng.choice(len(cos), size=min(k, len(cos)), replace=False) for _ in range(sets)]
        found = [mean_of_pairs(cos[np.ix_(p, p)]) for p in picks]
        self.mean, self.sd = float(np.mean(found)), max(float(np.std(found)), 1e-6)

    def z(self, coherence: float, n: int) -> float:
        """Standard deviations above sets of `n` random windows; the deviation falls with the number of pairs."""
        pairs = n * (n - 1) / (self.k * (self.k - 1))
        return (coherence - self.mean) / (self.sd / np.sqrt(pairs))


def mean_of_pairs(s: np.ndarray) -> float:
    """Mean off the diagonal."""
    n = len(s)
    return float((s.sum() - np.trace(s)) / (n * (n - 1)))


class ContextMeasures(NamedTuple):
    coherence: float
    detection: float
    intruder: float
    weighted: float


def context_measures(windows: sparse.csr_matrix, size: np.ndarray, chance: Chance) -> ContextMeasures:
    """Measures of one pole from its windows (of different documents) and their activation sizes; at least OWN + 1."""
    n, n_words = windows.shape[0], windows.shape[1] // CHANNELS
    around = windows[:, 2 * n_words :]
    coherence = chance.z(mean_of_pairs(np.asarray((around @ around.T).todense())), n)
    similar = np.asarray((windows @ windows.T).todense()) / CHANNELS
    other = np.asarray((windows @ chance.windows.T).todense()) / CHANNELS
    weight = np.outer(size, size) * (1 - np.eye(n))
    return ContextMeasures(
        coherence, _detection(similar, other, chance), _intruder(similar, other, chance),
        float((weight * similar).sum() / max(weight.sum(), 1e-30)),
    )  # fmt: skip


def _detection(similar: np.ndarray, other: np.ndarray, chance: Chance) -> float:
    """AUROC of x . (centroid of half of the windows - centroid of half of the random ones) on the other halves."""
    half = chance.windows.shape[0] // 2
    train, test = np.arange(0, len(similar), 2), np.arange(1, len(similar), 2)
    centroid = np.asarray(chance.windows[:half].mean(axis=0)).ravel()
    # x . centroid of the random half, for windows of the pole it is the mean of their similarities
    positive = similar[np.ix_(test, train)].mean(1) - other[test, :half].mean(1)
    negative = other[train, half:].mean(0) - np.asarray(chance.windows[half:] @ centroid) / CHANNELS
    wins = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    return float(wins.mean())


def _intruder(similar: np.ndarray, other: np.ndarray, chance: Chance) -> float:
    """Share of trials in which the random window is the one least like the other four; a tie counts by its share."""
    right = 0.0
    for _ in range(TRIALS):
        own = chance.rng.choice(len(similar), size=OWN, replace=False)
        to_odd = other[own, chance.rng.integers(other.shape[1])]
        block = similar[np.ix_(own, own)]
        likeness = np.append(block.sum(1) - np.diag(block) + to_odd, to_odd.sum())
        least = likeness <= likeness.min() + 1e-9
        right += least[-1] / least.sum()
    return right / TRIALS
