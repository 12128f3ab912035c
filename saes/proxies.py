"""Interpretability proxies: how readable a feature is, judged from its firings and the text alone. No language model.

For each pole (feature and sign) that fires at least MIN_FIRINGS times, in at least MIN_DOCS documents:

    word_f1, before_f1    best rule "fires where (or after) this word"          entropy, top_share  of words fired on
    coherence, detection, intruder, weighted   how alike its contexts are       (saes/proxy_measures.py)
    lens_input, lens_next  share of the words it raises that it fires on; how much oftener such a word comes next
    proxy_score            1 to 5: 1 + 4 * mean of rule, detection, intruder and coherence, each from 0 (chance) to 1

    features/<sae_id>@<store>/proxies-<n>.parquet, named in proxies.json with the index file that it was made from
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import AtomscopeError
from cache.progress import progress
from cache.provenance import provenance
from cache.workspace import atomic_file, read_json, write_json
from saes.proxy_measures import (
    OWN,
    Chance,
    ContextMeasures,
    Rules,
    Words,
    context_measures,
    embed,
    read_words,
    rules,
)
from saes.queries import PROXIES_RECORD, FeatureIndex

MIN_FIRINGS = 10
MIN_DOCS = OWN + 1
WINDOWS = 16
BLOCK_FIRINGS = 4_000_000
INPUT_WORDS = 30
COHERENCE_SCALE = 5.0
SCHEMA_VERSION = 1
MEASURES = (
    "word_f1", "before_f1", "entropy", "top_share", "coherence", "detection", "intruder", "weighted", "lens_input",
    "lens_next", "proxy_score",
)  # fmt: skip


def build_proxies(index: FeatureIndex, *, seed: int = 0) -> Path:
    """Compute the table of an index and name it in its record; a finished one of the same index file is reused."""
    record = index.folder / PROXIES_RECORD
    if record.is_file() and read_json(record).get("index") == index.meta["file"]:
        return record
    started = time.time()
    frame = compute_proxies(index, seed=seed)
    taken = [int(p.stem.split("-")[1]) for p in index.folder.glob("proxies-*.parquet")]
    file = index.folder / f"proxies-{1 + max(taken, default=0)}.parquet"
    with atomic_file(file) as tmp:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), tmp)
    write_json(record, {
        "schema_version": SCHEMA_VERSION, "file": file.name, "index": index.meta["file"], "sae_id": index.sae_id,
        "poles": len(frame), "seed": seed, "provenance": provenance(started=started),
    })  # fmt: skip
    return record


def compute_proxies(index: FeatureIndex, *, seed: int = 0) -> pd.DataFrame:
    """One row a pole that fires: feature, sign, n, and MEASURES (NaN where there are too few firings or documents)."""
    corpus = index.corpus
    words = read_words(
        *(corpus.column("tok"), corpus.vocab), *(corpus.column(c) for c in ("seq", "doc", "pos"))
    )
    if not words.usable.any():
        raise AtomscopeError(
            "every document of this corpus has one token: there is no context to judge features by"
        )
    chance = Chance(words, WINDOWS, seed=seed)
    counts = index.frame("SELECT feature, n_fire FROM idx.feature ORDER BY feature")
    lens = _lens_words(index, words)
    parts = []
    with progress("proxies", int(counts["n_fire"].sum()), unit="firing") as bar:
        for first, last in _blocks(counts["n_fire"].to_numpy()):
            found = index.frame(
                "SELECT feature, row, value FROM idx.activation WHERE feature >= ? AND feature < ?",
                [first, last],
            )
            if len(found):
                parts.append(_block(found, words, chance, lens))
            bar.advance(len(found))
    frame = pd.concat(parts, ignore_index=True)
    frame["proxy_score"] = _score(frame)
    return frame[["feature", "sign", "n", *MEASURES]]


def _blocks(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of features with about BLOCK_FIRINGS firings: memory does not grow with the index."""
    first, total = 0, 0
    for f, n in enumerate(counts.tolist()):
        if f > first and total + n > BLOCK_FIRINGS:
            yield first, f
            first, total = f, 0
        total += n
    yield first, len(counts)


def _block(
    found: pd.DataFrame, words: Words, chance: Chance, lens: dict[tuple[int, int], np.ndarray]
) -> pd.DataFrame:
    sign = np.where(found["value"] > 0, 1, -1)
    size = found["value"].abs().to_numpy(dtype=np.float64)
    row = found["row"].to_numpy()
    # by feature, positive pole first, strongest first
    order = np.lexsort((row, -size, -sign, found["feature"].to_numpy()))
    feature, sign, size, row = (a[order] for a in (found["feature"].to_numpy(), sign, size, row))
    start = np.flatnonzero(np.r_[True, (np.diff(feature) != 0) | (np.diff(sign) != 0)])
    n = np.diff(np.r_[start, len(row)])
    pole = np.repeat(np.arange(len(n)), n)
    columns: dict[str, np.ndarray] = {"feature": feature[start], "sign": sign[start].astype(np.int8), "n": n}
    columns |= rules(words, pole, row, size, n)._asdict()
    columns |= {
        name: np.full(len(n), np.nan) for name in (*ContextMeasures._fields, "lens_input", "lens_next")
    }
    for p in np.flatnonzero(n >= MIN_FIRINGS).tolist():
        mine = slice(start[p], start[p] + n[p])
        picks = choose(words.doc[row[mine]])
        if len(picks) >= MIN_DOCS:
            measures = context_measures(embed(words, row[mine][picks]), size[mine][picks], chance)
            for name, value in measures._asdict().items():
                columns[name][p] = value
        promoted = lens.get((int(feature[start[p]]), int(sign[start[p]])))
        if promoted is not None:
            columns["lens_input"][p], columns["lens_next"][p] = _lens(row[mine], size[mine], promoted, words)
    for name in Rules._fields:
        columns[name][n < MIN_FIRINGS] = np.nan
    return pd.DataFrame(columns)


def choose(doc: np.ndarray) -> np.ndarray:
    """Positions of at most WINDOWS firings (ordered by strength), each of another document: the strongest and a spread."""
    n = len(doc)
    spread = np.linspace(0, n - 1, min(n, 4 * WINDOWS)).round().astype(int)
    top = np.arange(min(n, 4 * WINDOWS))
    _, first = np.unique(doc[top], return_index=True)
    strongest = np.sort(first)[: WINDOWS // 2]
    rest = spread[~np.isin(doc[spread], doc[strongest])]
    _, first = np.unique(doc[rest], return_index=True)
    spaced = rest[np.sort(first)]
    spaced = spaced[
        np.linspace(0, len(spaced) - 1, min(len(spaced), WINDOWS - len(strongest))).round().astype(int)
    ]
    return np.concatenate([strongest, spaced])


def _lens_words(index: FeatureIndex, words: Words) -> dict[tuple[int, int], np.ndarray]:
    """Words that each pole raises on the direct path: the raised ones of +, the lowered ones of - (its mirror image)."""
    if not index.meta["logit_lens"]:
        return {}
    of_token = np.full(len(index.corpus.vocab), -1, dtype=np.int64)
    of_token[index.corpus.column("tok")] = words.word
    frame = index.frame("SELECT feature, logit_top_tok, logit_bottom_tok FROM idx.feature WHERE n_fire > 0")
    out = {}
    for sign, column in ((1, "logit_top_tok"), (-1, "logit_bottom_tok")):
        for feature, tokens in zip(frame["feature"], frame[column]):
            ids = np.asarray(tokens, dtype=np.int64)
            seen = of_token[ids[(ids >= 0) & (ids < len(of_token))]]
            out[(int(feature), sign)] = np.unique(seen[seen >= 0])
    return out


def _lens(row: np.ndarray, size: np.ndarray, promoted: np.ndarray, words: Words) -> tuple[float, float]:
    if not len(promoted):
        return 0.0, 0.0
    mass = np.bincount(words.word[row], weights=size)
    strongest = np.argsort(-mass, kind="stable")[:INPUT_WORDS]
    both = np.isin(promoted, strongest[mass[strongest] > 0]).mean()
    last = row + 1 >= len(words.word)
    after = np.minimum(row + 1, len(words.word) - 1)
    inside = ~last & (words.seq[after] == words.seq[row])
    hit = np.isin(words.word[after][inside], promoted).mean() if inside.any() else 0.0
    base = words.total[promoted].sum() / max(words.total.sum(), 1)
    return float(both), float(hit - base)


def _score(frame: pd.DataFrame) -> np.ndarray:
    rule = frame[["word_f1", "before_f1"]].max(axis=1)
    detection = (2 * frame["detection"] - 1).clip(lower=0)
    intruder = ((frame["intruder"] - 1 / (OWN + 1)) * (OWN + 1) / OWN).clip(lower=0)
    coherence = 1 - np.exp(-frame["coherence"].clip(lower=0) / COHERENCE_SCALE)
    return (1 + 4 * (rule + detection + intruder + coherence) / 4).to_numpy(dtype=float)
