"""A ring in trouble: NaN, a full disk, closing early, damaged files, the model in use elsewhere."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import cache.ring_filler
from cache import (
    ActivationStore,
    Corpus,
    LanguageModel,
    build_corpus,
    harvest_ring,
    load_model,
)
from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from saes import TrainConfig, presets, train, training
from tests.rings import MLP, POST, WINDOW, no_filler_runs, shards_on_disk
from tests.tiny import SENTENCES

pytest_plugins = ("tests.rings",)


def test_nan_of_the_model_reaches_the_training_loop_as_one_line(
    tiny_dir: Path, ring_corpus: Corpus, make_ring: Any
) -> None:
    model = load_model(tiny_dir, device="cpu")
    tok = int(ring_corpus.column("tok")[-1])
    ring = make_ring(model=model)
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[tok, 3] = float("nan")  # type: ignore[operator]
    with pytest.raises(DataError, match=f"{POST}: doc .* is NaN or infinite") as e:
        train(ring, [presets.topk(d_sae=96, k=4)], TrainConfig(steps=200, batch_size=64, screen="off"))
    assert "\n" not in str(e.value) and no_filler_runs()
    stream = ring.stream(POST, batch_size=64)
    with pytest.raises(DataError, match="NaN or infinite"):
        for _ in range(200):
            next(stream)
    ring.close()


def test_a_full_disk_reaches_the_training_loop_as_one_line(
    make_ring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = cache.ring_filler.commit_shard, []

    def full(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    monkeypatch.setattr(cache.ring_filler, "commit_shard", full)
    with pytest.raises(AtomscopeError, match=r"No space left.*fewer disk_bytes.*last checkpoint") as e:
        train(make_ring(), [presets.topk(d_sae=96, k=4)], TrainConfig(steps=200, batch_size=64, screen="off"))
    assert "\n" not in str(e.value) and no_filler_runs()
    calls[:] = [1] * 8
    with pytest.raises(AtomscopeError, match="No space left"):
        make_ring(9).stats(POST, seed=9)


def test_closing_early_stops_the_model_and_leaves_no_half_file(make_ring: Any) -> None:
    ring = make_ring(9)
    stream = ring.stream(POST, batch_size=8)
    next(stream)
    ring.close()
    assert no_filler_runs() and not list((ring.path / "_tmp").iterdir())
    there = shards_on_disk(ring)
    assert there and there == sorted(ring.store.records(POST, refresh=True)) and ring.store.verify() == []
    with pytest.raises(AtomscopeError, match="closed"):
        for _ in range(1000):
            next(stream)
    ring.remove()
    assert not ring.path.exists()


def test_a_ring_closed_while_somebody_waits_for_the_model_does_not_hang(
    make_ring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()
    ring, real = make_ring(), LanguageModel.capture

    def slow(self: LanguageModel, *args: Any) -> Any:
        entered.set()
        go.wait(30)
        return real(self, *args)

    monkeypatch.setattr(LanguageModel, "capture", slow)
    stream = ring.stream(POST, batch_size=8)
    got: list[BaseException] = []

    def read() -> None:
        try:
            next(stream)
        except AtomscopeError as e:
            got.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(30)
    go.set()
    ring.close()
    reader.join(30)
    assert not reader.is_alive() and no_filler_runs()


def test_other_use_of_the_model_while_it_fills_a_ring_mixes_nothing_up(
    ring_store: ActivationStore, tiny_model: LanguageModel, make_ring: Any
) -> None:
    want = ring_store.stream(POST, batch_size=64, window=WINDOW)
    tokens = torch.arange(12)[None]
    logits, deep = tiny_model(tokens), tiny_model.capture(tokens, MLP)[MLP]
    with make_ring() as ring:
        got = ring.stream(POST, batch_size=64)
        while got.epoch < 1:
            assert torch.equal(next(got).x[POST], next(want).x[POST])
            assert torch.equal(tiny_model(tokens), logits)
            assert torch.equal(tiny_model.capture(tokens, MLP)[MLP], deep)
        with (
            tiny_model.hooked({POST: lambda x: x + 1}),
            pytest.raises(UsageError, match="leave that `with` block"),
        ):
            for _ in range(100):
                next(got)
    assert torch.equal(tiny_model(tokens), logits)


def test_damaged_and_foreign_files_in_the_folder_are_harvested_again(make_ring: Any) -> None:
    with make_ring(9) as ring:
        stream = ring.stream(POST, batch_size=64)
        want = [next(stream).row.tolist() for _ in range(5)]
    folder = ring.store.folder(POST)
    first, second, *_ = sorted(folder.glob("*.parquet"))
    with first.open("r+b") as file:
        file.truncate(100)
    second.with_name(f"{second.stem[:11]}.json").unlink()
    (folder / "half").write_bytes(b"x")
    with make_ring(9) as ring:
        stream = ring.stream(POST, batch_size=64)
        assert [next(stream).row.tolist() for _ in range(5)] == want
    assert ring.store.verify() == [] and not (folder / "half").exists()


def test_wrong_uses_are_one_line_that_says_what_to_do(
    make_ring: Any, tiny_model: Any, ring_space: Path
) -> None:
    with make_ring() as ring:
        ring.stream(POST, batch_size=8)
        with pytest.raises(UsageError, match="feeds another stream"):
            make_ring().stream(POST, batch_size=8)
        with pytest.raises(UsageError, match="name it in hooks="):
            train(ring, [presets.topk(d_sae=96, k=4)], hook=MLP)
    with pytest.raises(UsageError, match="did you mean"):
        make_ring(hooks="blocks.1.hook_resid")
    with pytest.raises(UsageError, match="window"):
        make_ring(window=0)
    held = build_corpus(SENTENCES[:2], tiny_model.tokenizer, workspace=ring_space, context=24)
    lone = harvest_ring(tiny_model, held, hooks=POST, workspace=ring_space)
    missing = "heldout" if not held.column("split").any() else "train"
    with lone, pytest.raises(MissingDataError, match=f"no {missing} rows"):
        lone.stats(POST, split=missing)


def test_a_second_ctrl_c_does_not_wait_for_the_model() -> None:
    """The first one ends after the step in hand, which may wait for a window of a slow model."""
    with training._stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
