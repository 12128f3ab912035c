"""Statistics from the records equal the closed form over the rows, for every class of rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import MissingDataError, UsageError
from cache.store import ActivationStore
from tests.corpora import HOOK, empty_store, fill, make_corpus, make_store, random_vectors

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def selected(store: ActivationStore, split: str | None, skip: str | None) -> np.ndarray:
    heldout, first = store.corpus.column("split") == 1, store.corpus.column("pos") == 0
    keep = np.ones(store.corpus.n_tokens, bool)
    if split:
        keep &= heldout == (split == "heldout")
    return keep & ~first if skip else keep


def check(store: ActivationStore, x: np.ndarray, split: str | None, skip: str | None) -> None:
    x = x[selected(store, split, skip)]
    stats, norms = store.stats(HOOK, split=split, skip=skip), np.linalg.norm(x, axis=1)
    assert stats.n == len(x)
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stats.var, x.var(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stats.mean_norm, norms.mean(), rtol=1e-12)
    np.testing.assert_allclose(stats.mean_sq_norm, (norms**2).mean(), rtol=1e-12)
    np.testing.assert_allclose(stats.total_variance, ((x - x.mean(0)) ** 2).sum(1).mean(), rtol=1e-9)
    assert stats.max_abs == np.abs(x).max()


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=4, max_size=12),
    dtype=st.sampled_from(DTYPES),
    rows_per_shard=st.integers(5, 200),
    d=st.integers(1, 12),
)
def test_statistics_of_every_class_of_rows_equal_the_closed_form(
    lengths: list[int], dtype: torch.dtype, rows_per_shard: int, d: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, vectors = make_store(Path(folder), lengths, d=d, dtype=dtype, rows_per_shard=rows_per_shard)
        x = vectors[HOOK].double().numpy()
        for split in (None, "train", "heldout"):
            for skip in (None, "first"):
                check(store, x, split, skip)


def test_a_shard_longer_than_one_chunk_is_summed_in_full(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path, [700, 800, 900, 1000], rows_per_shard=5000, group_rows=None)
    check(store, vectors[HOOK].double().numpy(), None, None)


def test_special_tokens_and_other_speakers_are_in_the_statistics(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [20] * 8)
    path = corpus.path / "tokens.parquet"
    table = pq.read_table(path)
    flags = table.column("flags").to_numpy() | (np.arange(160) % 4 << 1)
    pq.write_table(
        table.set_column(table.column_names.index("flags"), "flags", [flags.astype(np.uint8)]), path
    )
    store, x = empty_store(tmp_path, corpus), random_vectors(160, 6, torch.float16)
    fill(store, {HOOK: x})
    assert set(store.row_class(0, 160)) > {0, 1, 2, 3} and store.verify() == []
    for split in (None, "train", "heldout"):
        for skip in (None, "first"):
            check(store, x.double().numpy(), split, skip)


def test_attention_sinks_do_not_reach_the_statistics_of_the_other_rows(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [20] * 8)
    store, x = empty_store(tmp_path, corpus), random_vectors(160, 6, torch.float16)
    x[::20, 2] = 27_000.0
    fill(store, {HOOK: x})
    assert store.stats(HOOK).max_abs < 200 < 20_000 < store.stats(HOOK, skip=None).max_abs
    for split in ("train", "heldout"):
        check(store, x.double().numpy(), split, "first")


def test_a_large_mean_does_not_eat_the_variance(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [50] * 4)
    store = empty_store(tmp_path, corpus)
    x = random_vectors(200, 4) + 3000.0
    fill(store, {HOOK: x})
    want = x.double().numpy()[selected(store, "train", "first")].var(0)
    np.testing.assert_allclose(store.stats(HOOK).var, want, rtol=1e-7)


def test_no_rows_and_unknown_words_are_errors_not_nans(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [5, 6, 7])
    with pytest.raises(MissingDataError, match="no heldout rows"):
        store.stats(HOOK, split="heldout")
    with pytest.raises(UsageError, match="skip='bos' is unknown"):
        store.stats(HOOK, skip="bos")
