"""An index of features whose meaning is known: half of the poles follow the text, half fire at shuffled places.

Documents have topics; half of their words are the topic's, half are common. The store holds the planted activations
themselves and the SAE is the identity, so the index's codes are exactly what was planted. With `signed`, the negative
pole of feature f is the positive pole of feature f + FEATURES / 2, so clean and shuffled poles share a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cache.corpus import Corpus
from saes.config import SAEConfig
from saes.indexing import build_index
from saes.queries import FeatureIndex
from saes.sae import SAE
from tests.corpora import HOOK, empty_store, fill, make_corpus

TOPICS, TOPIC_WORDS, COMMON, DOCS, LENGTH, FEATURES = 8, 6, 30, 96, 40, 32
CLEAN = FEATURES // 2
VOCAB = [f" t{i // TOPIC_WORDS}word{i % TOPIC_WORDS}" for i in range(TOPICS * TOPIC_WORDS)]
VOCAB += [f" common{i}" for i in range(COMMON)]


@dataclass(frozen=True)
class Planted:
    """The index, what fires where `[rows, FEATURES]`, and which (feature, sign) follow the text."""

    index: FeatureIndex
    values: np.ndarray
    clean: dict[tuple[int, int], bool]


def build_planted(root: Path, *, signed: bool = False, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    corpus = make_corpus(root, [LENGTH] * DOCS)
    topic = rng.integers(0, TOPICS, size=DOCS)
    doc, pos = corpus.column("doc"), corpus.column("pos")
    own = topic[doc] * TOPIC_WORDS + rng.integers(0, TOPIC_WORDS, size=len(doc))
    zipf = 1 / np.arange(1, COMMON + 1)
    common = TOPICS * TOPIC_WORDS + rng.choice(COMMON, size=len(doc), p=zipf / zipf.sum())
    tok = np.where(rng.random(len(doc)) < 0.5, own, common).astype(np.int32)
    _overwrite(corpus, tok)
    values = _plant(tok, topic[doc], pos, rng)
    clean = {(f, 1): f < CLEAN for f in range(FEATURES)}
    if signed:
        values = values[:, :CLEAN] - values[:, CLEAN:]
        clean = {(f, s): s == 1 for f in range(CLEAN) for s in (1, -1)}
    store = empty_store(root, Corpus.open(corpus.path), rows_per_shard=1000)
    fill(store, {HOOK: torch.from_numpy(values)})
    d = values.shape[1]
    sae = SAE(
        SAEConfig(
            d_sae=d, k=d, activation="abs_topk" if signed else "topk", d_model=d, hook=HOOK, model="tiny"
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
    build_index(sae.requires_grad_(False), store)
    return Planted(FeatureIndex.open(root), values, clean)


def _overwrite(corpus: Corpus, tok: np.ndarray) -> None:
    """Put these tokens into a corpus that was made with others."""
    path = corpus.path / "tokens.parquet"
    table = pq.read_table(path)
    table = table.set_column(table.schema.get_field_index("tok"), "tok", pa.array(tok))
    pq.write_table(table, path)
    words = {"tok": pa.array(range(len(VOCAB)), pa.int32()), "token": pa.array(VOCAB, pa.string())}
    pq.write_table(pa.table(words), corpus.path / "vocab.parquet")


def _plant(tok: np.ndarray, topic: np.ndarray, pos: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clean features: words (8), tokens after a word (4), topics (4). The others are the same, shuffled over the rows."""
    fires = np.zeros((len(tok), FEATURES), dtype=bool)
    before = np.concatenate([[-1], tok[:-1]])
    first_common = TOPICS * TOPIC_WORDS
    for f in range(8):
        fires[:, f] = tok == (first_common + f if f < 4 else 7 * f)
    for f in range(8, 12):
        fires[:, f] = before == first_common + f - 8
    for f in range(12, CLEAN):
        fires[:, f] = (topic == f - 12) & (rng.random(len(tok)) < 0.3)
    values = np.where(fires, rng.integers(8, 64, size=fires.shape) / 16, 0).astype(np.float32)
    inside = np.flatnonzero(pos > 0)
    values[pos == 0] = 0
    for f in range(CLEAN):
        values[inside, CLEAN + f] = values[rng.permutation(inside), f]
    # where two poles of a signed latent would meet, the clean one stays
    values[:, CLEAN:][values[:, :CLEAN] > 0] = 0
    return values
