"""Rings of the tiny model for tests: the corpus, the store that a ring must be equal to, and `make_ring`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from cache import ActivationStore, Corpus, LanguageModel, Ring, build_corpus, harvest, harvest_ring
from cache.ring_filler import shard_bytes
from tests.tiny import SENTENCES

POST = "blocks.1.hook_resid_post"
MLP = "blocks.0.hook_mlp_out"
ROWS = 60
HARVEST: dict[str, Any] = {"rows_per_shard": ROWS, "batch_tokens": 64}
WINDOW = 3
SHARD = shard_bytes(ROWS, [(64, 2)])


@pytest.fixture(scope="session")
def ring_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ring")


@pytest.fixture(scope="session")
def ring_corpus(tiny_model: LanguageModel, ring_space: Path) -> Corpus:
    """About 1,500 tokens in documents of very different lengths, in 26 shards and 9 windows."""
    texts = [" ".join(SENTENCES[i : i + 1 + i % 5]) for i in range(0, 72, 2)]
    return build_corpus(texts, tiny_model.tokenizer, workspace=ring_space, context=24)


@pytest.fixture(scope="session")
def ring_store(tiny_model: LanguageModel, ring_corpus: Corpus, ring_space: Path) -> ActivationStore:
    """What a ring must be equal to."""
    return harvest(
        tiny_model, ring_corpus, hooks=[MLP, POST], workspace=ring_space, show_progress=False, **HARVEST
    )


@pytest.fixture
def make_ring(tiny_model: LanguageModel, ring_corpus: Corpus, tmp_path: Path) -> Any:
    def ring(shards: float = 4, hooks: Any = POST, model: Any = None, **options: Any) -> Ring:
        size = SHARD * (1 if isinstance(hooks, str) else len(hooks))
        options = {"workspace": tmp_path, "disk_bytes": int(shards * size), "window": WINDOW} | options
        return harvest_ring(model or tiny_model, ring_corpus, hooks=hooks, **HARVEST, **options)

    return ring


def shards_on_disk(ring: Ring) -> list[int]:
    return sorted(int(p.stem[6:11]) for p in ring.store.folder(ring.hooks[0]).glob("shard-*.parquet"))


def no_filler_runs() -> bool:
    return not any(t.name == "ring-filler" for t in threading.enumerate())
