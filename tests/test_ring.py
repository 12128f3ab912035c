"""Train without keeping: a ring streams what the store streams, within its disk bound, and resumes exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache import (
    ActivationStore,
    Corpus,
    LanguageModel,
    build_corpus,
    harvest,
    load_model,
)
from cache.errors import DataError, UsageError
from cache.ring_filler import WindowOrder
from saes import TrainConfig, presets, train, training
from tests.rings import HARVEST, MLP, POST, ROWS, SHARD, WINDOW, no_filler_runs, shards_on_disk
from tests.tiny import SENTENCES

pytest_plugins = ("tests.rings",)

# ------------------------------------------------------------------------------------- same as the store


@pytest.mark.parametrize("shards", [3, 7, 1000])
def test_a_ring_streams_bit_for_bit_what_the_store_streams_over_epochs(
    shards: int, ring_store: ActivationStore, ring_corpus: Corpus, make_ring: Any
) -> None:
    options: dict[str, Any] = {"batch_size": 47, "seed": 3}
    want = ring_store.stream(POST, window=WINDOW, **options)
    with make_ring(shards) as ring:
        got = ring.stream(POST, **options)
        assert got.rows_per_epoch == want.rows_per_epoch and got.n_windows == want.n_windows >= 8
        while want.epoch < 2:
            a, b = next(want), next(got)
            assert torch.equal(a.row, b.row) and torch.equal(a.x[POST], b.x[POST])
            assert want.state_dict() == got.state_dict()
    if shards == 1000:  # it holds everything: the model runs once over each token
        assert ring.harvested_tokens == ring_corpus.n_tokens
    else:  # a part of the ring is reused in the next epoch, the rest is harvested again, no more than once
        assert ring_corpus.n_tokens < ring.harvested_tokens <= 3 * ring_corpus.n_tokens + WINDOW * ROWS


def test_the_other_backend_fills_a_ring_from_a_thread_too(
    tiny_dir: Path, ring_corpus: Corpus, tmp_path: Path, make_ring: Any
) -> None:
    model = load_model(tiny_dir, backend="nnsight", device="cpu")
    store = harvest(model, ring_corpus, hooks=POST, workspace=tmp_path, show_progress=False, **HARVEST)
    want = store.stream(POST, batch_size=47, window=WINDOW)
    with make_ring(model=model) as ring:
        got = ring.stream(POST, batch_size=47)
        while want.epoch < 1:
            a, b = next(want), next(got)
            assert torch.equal(a.row, b.row) and torch.equal(a.x[POST], b.x[POST])


@pytest.mark.parametrize(("split", "skip"), [("heldout", None), (None, "first+special")])
def test_filters_and_several_hooks_agree_with_the_store(
    split: str | None, skip: str | None, ring_store: ActivationStore, make_ring: Any
) -> None:
    hooks = [MLP, POST]
    options: dict[str, Any] = {"batch_size": 20, "seed": 1, "split": split, "skip": skip}
    want = ring_store.stream([POST, MLP], window=WINDOW, **options)
    with make_ring(hooks=hooks) as ring:
        got = ring.stream([POST, MLP], **options)
        while want.epoch < 1:
            a, b = next(want), next(got)
            assert torch.equal(a.row, b.row)
            assert all(torch.equal(a.x[h], b.x[h]) for h in hooks)


def test_an_sae_trained_through_a_ring_equals_the_one_trained_on_the_store(
    ring_store: ActivationStore, tiny_model: LanguageModel, tmp_path: Path, make_ring: Any
) -> None:
    config = TrainConfig(steps=60, batch_size=64, screen="off", log_every=10)
    job = [presets.topk(d_sae=96, k=4), presets.abs_topk(d_sae=80, k=3)]
    want = train(ring_store, job, config, hook=POST)
    # One window over everything: statistics and order are the store's own.
    whole = train(make_ring(1000, window=32, workspace=tmp_path / "whole"), job, config)
    for a, b in zip(want, whole, strict=True):
        assert all(torch.equal(t, b.sae.state_dict()[name]) for name, t in a.sae.state_dict().items())
        assert a.path is not None and b.path is not None and a.path.parent.name != b.path.parent.name
    record = json.loads((whole[0].path.parent / "run.json").read_text())
    assert record["data"]["ring"] == {"rows_per_shard": ROWS, "window": 32, "statistics": "first window"}
    assert record["data"]["model_sha"] == tiny_model.identity["weights_sha256"]


def test_a_transcoder_trained_through_a_ring_equals_the_one_trained_on_the_store(
    ring_store: ActivationStore, tmp_path: Path, make_ring: Any
) -> None:
    """Rows of both hooks stay those of the same tokens while shards come and go."""
    config = TrainConfig(steps=40, batch_size=64, screen="off", log_every=10)
    job, hooks = [presets.topk(d_sae=96, k=4)], {"hook": MLP, "out_hook": POST}
    want = train(ring_store, job, config, **hooks)[0].sae
    ring = make_ring(1000, hooks=[MLP, POST], window=32, workspace=tmp_path / "both")
    found = train(ring, job, config, **hooks)[0].sae
    assert found.cfg.out_hook == POST
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in want.state_dict().items())


def test_statistics_are_those_of_the_first_window_or_the_given_ones(
    ring_store: ActivationStore, make_ring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = make_ring()
    found = ring.stats(POST, seed=5)
    stream = ring_store.stream(POST, batch_size=1, seed=5, window=WINDOW)
    rows = []
    while stream.window == 0 or not rows:
        batch = next(stream)
        if stream.window == 0:
            rows.append(batch.x[POST].double().clone())
    norms = torch.cat(rows).norm(dim=1)
    assert found.n == len(norms) and found.mean_norm == pytest.approx(float(norms.mean()), rel=1e-6)
    assert found.mean_norm == pytest.approx(ring_store.stats(POST).mean_norm, rel=0.1)
    with monkeypatch.context() as patch:  # kept: a resumed run does not run the model for them
        patch.setattr(LanguageModel, "capture", lambda *_: pytest.fail("harvested again"))
        assert make_ring(dtype="fp16").stats(POST, seed=5).mean_norm == found.mean_norm
    whole = make_ring(1000, window=1000)
    for split, skip in (("train", "first"), (None, "first+special")):
        assert whole.stats(POST, split, skip).mean_norm == ring_store.stats(POST, split, skip).mean_norm
    exact = ring_store.stats(POST)
    given = make_ring(stats={POST: exact})
    assert given.stats(POST) is exact and given.provenance != ring.provenance
    assert no_filler_runs()


# ------------------------------------------------------------------------------------------- disk bound


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Sizes of everything under `folder`, looked at all the time from another thread."""
    seen: list[int] = [0]
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            total = 0
            for where, _, names in os.walk(folder):
                for name in names:
                    with suppress(FileNotFoundError):
                        total += os.stat(os.path.join(where, name)).st_size
            seen.append(total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("hooks", [POST, [MLP, POST]])
def test_the_disk_bound_holds_at_every_moment(hooks: Any, make_ring: Any) -> None:
    ring = make_ring(5, hooks=hooks)
    with watched(ring.path) as seen, ring:
        stream = ring.stream(hooks, batch_size=64)
        while stream.epoch < 1:
            next(stream)
    assert len(seen) > 20 and 0 < max(seen) <= ring.disk_bytes + (ring.path / "store.json").stat().st_size
    assert len(shards_on_disk(ring)) <= 5


def test_a_bound_that_cannot_hold_a_window_is_refused_with_what_it_needs(make_ring: Any) -> None:
    with pytest.raises(UsageError, match=r"too small: a shard takes up to [\d,]+ bytes.*smaller window") as e:
        make_ring(2.0)
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="too small"):
        make_ring(0.5, window=1)
    assert make_ring(1.0, window=1).shard_bytes(0) <= SHARD


def test_a_smaller_bound_on_an_old_ring_drops_what_is_too_much(make_ring: Any) -> None:
    with make_ring(12) as ring:
        stream = ring.stream(POST, batch_size=64)
        while stream.window < 5:
            next(stream)
        stream.close()
        assert len(shards_on_disk(ring)) > 5
    with make_ring(4) as small:
        next(small.stream(POST, batch_size=64))
        assert len(shards_on_disk(small)) <= 4


def test_a_slow_trainer_holds_the_model_back(make_ring: Any) -> None:
    with make_ring(6) as ring:
        stream = ring.stream(POST, batch_size=8)
        next(stream)
        filler = stream._filler
        with filler._changed:  # windows 0 and 1 are read ahead; six shards hold two windows more
            assert filler._changed.wait_for(lambda: (0, 3) in filler._ready, timeout=30)
    assert ring.harvested_tokens <= 4 * WINDOW * ROWS


# ------------------------------------------------------------------------------------------------ resume

_CHILD = """
import json, os, signal, sys
from cache import Corpus, harvest_ring, load_model
folder, model, corpus, options, at = sys.argv[1:]
ring = harvest_ring(load_model(model, device="cpu"), Corpus.open(corpus), workspace=folder, **json.loads(options))
stream = ring.stream(ring.hooks, batch_size=31, seed=2)
for i in range(10**6):
    print(json.dumps([stream.state_dict(), next(stream).row.tolist()]), flush=True)
    if i == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_kill_9_the_same_rows_come_again_in_the_same_order(
    ring_store: ActivationStore, tiny_dir: Path, ring_corpus: Corpus, tmp_path: Path, make_ring: Any
) -> None:
    options = {"hooks": [POST], "disk_bytes": 4 * SHARD, "window": WINDOW, **HARVEST}
    command = [
        sys.executable, "-c", _CHILD, str(tmp_path), str(tiny_dir), str(ring_corpus.path), json.dumps(options), "30",
    ]  # fmt: skip
    run = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    seen = [json.loads(line) for line in run.stdout.splitlines()]
    rows = ring_store.rows(POST, ids=range(ring_corpus.n_tokens))
    with make_ring(4) as ring:
        before = sorted(ring.path.rglob("*.parquet"))
        stream = ring.stream([POST], batch_size=31, state=seen[0][0])
        assert [p for p in (ring.path / "_tmp").iterdir()] == [] and before
        for _, want in seen:  # from the very start: shards that were dropped are harvested again
            batch = next(stream)
            assert batch.row.tolist() == want and torch.equal(batch.x[POST], rows[batch.row])
        last = stream.state_dict()
        stream.close()
        state, want = seen[-2]  # and from the last state
        stream = ring.stream([POST], batch_size=31, state=state)
        assert next(stream).row.tolist() == want and next(stream).row.tolist() == seen[-1][1]
        assert stream.state_dict() == last


def test_a_run_through_a_ring_resumes_bit_for_bit(make_ring: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "SAMPLE_ROWS", 500)
    config = TrainConfig(steps=20, batch_size=64, screen="off", log_every=10)
    job = [presets.topk(d_sae=96, k=4)]
    whole = train(make_ring(5, workspace=tmp_path / "a"), job, config)[0]
    real, calls = training.save_checkpoint, []

    def stop_after_eight(run: Path, checkpoint: Any) -> Path:
        calls.append(checkpoint.step)
        path = real(run, checkpoint)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return path

    often = TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0}))
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", stop_after_eight)
        with pytest.raises(KeyboardInterrupt):
            train(make_ring(3, workspace=tmp_path / "b"), job, often)
    assert no_filler_runs()
    resumed = train(make_ring(4, workspace=tmp_path / "b"), job, config)[0]  # the bound is no part of the run
    assert all(torch.equal(t, resumed.sae.state_dict()[n]) for n, t in whole.sae.state_dict().items())


def test_a_state_of_another_window_is_refused(make_ring: Any) -> None:
    with make_ring() as ring:
        state = ring.stream(POST, batch_size=8).state_dict()
    with make_ring(window=2) as other, pytest.raises(DataError, match="resume with the settings"):
        other.stream(POST, batch_size=8, state=state)


# -------------------------------------------------------------------------------------------- around it


def test_the_command_line_trains_on_the_fly_and_leaves_no_vectors(
    tiny_dir: Path, ring_corpus: Corpus, ring_space: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.cli import main

    monkeypatch.setattr(training, "SAMPLE_ROWS", 500)
    flags = ["--d-sae", "96", "--k", "4", "--steps", "20", "--batch-size", "64", "--json"]
    command = ["atomscope", "train", "--on-the-fly", ring_corpus.path.name, "--model", str(tiny_dir), *flags]
    command += ["--disk-gb", "0.02", "-w", str(ring_space)]

    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    code, _, error = run()
    assert code == 2 and "--on-the-fly needs --hook" in error
    code, out, _ = run("--hook", POST, "--dry-run")
    plan = json.loads(out)
    assert code == 0 and plan["disk_gb"] == 0.02 and plan["estimate"]["disk_bytes"] > 2e7
    assert not list(ring_space.glob("rings/*"))
    code, out, _ = run("--hook", POST)
    (row,) = json.loads(out)
    assert code == 0 and Path(row["path"]).is_dir() and not list(ring_space.glob("rings/*"))


def test_a_small_store_of_the_same_source_holds_out_the_same_documents(
    tiny_model: LanguageModel, tmp_path: Path
) -> None:
    """How a run on the fly is evaluated: no document of the small store that it held out was trained on."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    large, small = (
        build_corpus(file, tiny_model.tokenizer, workspace=tmp_path, context=24, max_tokens=n)
        for n in (2500, 600)
    )
    a, b = large.docs().to_pydict(), small.docs().to_pydict()
    assert a["sha"][: len(b["sha"])] == b["sha"] and a["split"][: len(b["sha"])] == b["split"]
    assert sum(b["split"]) > 0


def test_a_ring_gives_up_the_shard_that_is_needed_last() -> None:
    """Against a plain search through the windows of two epochs."""
    blocks = np.stack([np.arange(0, 900, 30), np.arange(30, 930, 30)], axis=1)
    order = WindowOrder(blocks, np.arange(30) // 4, seed=7, window=4)
    for key in [(0, -1), (0, 0), (0, 4), (0, order.n_windows - 1), (3, 2)]:
        windows = [(key[0], w) for w in range(key[1] + 1, order.n_windows)]
        windows += [(key[0] + 1, w) for w in range(order.n_windows)]
        for shard, use in enumerate(order.next_uses(key).tolist()):
            first = next(w for w in windows if shard in order.shards(w))
            assert use == (first[0] - key[0]) * order.n_windows + first[1]


def test_a_geometry_of_wide_rows_is_estimated_from_as_many_rows_as_a_ring_will_give(
    ring_store: ActivationStore, make_ring, tmp_path: Path
) -> None:
    """Not from its first window, which holds too few of them."""
    plan = TrainConfig(steps=2, batch_size=32)
    with make_ring(1000) as ring:
        assert ring.stats(POST).n < 640 < ring_store.stats(POST).n, (
            "ten rows a dimension: only the whole ring has them"
        )
        result = train(ring, [presets.threshold_atoms(d_sae=64)], plan, hook=POST, workspace=tmp_path)[0]
    stored = train(
        ring_store, [presets.threshold_atoms(d_sae=64)], plan, hook=POST, workspace=tmp_path / "b"
    )[0]
    rows = [json.loads((r.path / "aip.json").read_text())["rows"] for r in (result, stored)]
    assert rows[0] == rows[1]
