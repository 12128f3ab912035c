"""TrainConfig.window: how many row groups of a store are mixed at a time, and what it leaves as it was."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import DataError, UsageError
from saes.presets import topk
from saes.runs import run_name
from saes.sources import StoreSource
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import HOOK, make_store
from tests.kills import killed_at
from tests.rings import WINDOW, make_ring, ring_corpus, ring_space  # noqa: F401 (fixtures)

CPU = torch.device("cpu")


def epoch(source: StoreSource, window: int) -> torch.Tensor:
    """First column, which no two rows share, of the rows of one epoch in the order of training."""
    stream = source.stream(TrainConfig(window=window, batch_size=1), None, CPU)
    batches = iter(stream)
    found = torch.cat([next(batches).x.clone() for _ in range(stream.rows_per_epoch)])[:, 0]
    stream.close()
    return found


def test_another_window_is_another_order_of_the_same_rows(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 12)
    source = StoreSource(store, HOOK)
    orders = [epoch(source, window) for window in (1, 4, 32)]
    assert len(orders[0].unique()) == len(orders[0]) > 300
    for a in orders[1:]:
        assert torch.equal(a.sort().values, orders[0].sort().values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    # one row group of 16 rows at a time: rows that follow each other are from the same one
    rows = store.rows(HOOK, [*range(480)])[:, 0]
    # a document of 40 rows is a shard
    groups = {float(v): (i // 40, i % 40 // 16) for i, v in enumerate(rows)}
    jumps = [sum(groups[float(a)] != groups[float(b)] for a, b in pairwise(o)) for o in orders]
    assert jumps[0] == 12 * 3 * 3 // 4 - 1 and jumps[0] < jumps[1] < jumps[2]


def test_a_run_with_its_own_window_resumes_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    store, _ = make_store(tmp_path / "a", [40] * 30)
    other, _ = make_store(tmp_path / "b", [40] * 30)
    config = TrainConfig(steps=60, batch_size=64, screen="off", log_every=10, window=3)
    whole = train(store, topk(d_sae=24, k=2), config)[0]
    with killed_at(23, monkeypatch):
        train(other, topk(d_sae=24, k=2), TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0})))
    resumed = train(other, topk(d_sae=24, k=2), config)[0]
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name


def test_a_checkpoint_is_never_gone_on_from_with_another_window(tmp_path: Path) -> None:
    """Another window is another run; a position made with one is refused by a stream of another."""
    store, _ = make_store(tmp_path, [40] * 12)
    source, sae = StoreSource(store, HOOK), topk(d_sae=24, k=2, d_model=8)
    names = {run_name([sae], TrainConfig(window=w), source) for w in (3, 4, 32)}
    assert len(names) == 3 and run_name([sae], TrainConfig(), source) in names
    stream = source.stream(TrainConfig(window=3, batch_size=8), None, CPU)
    state = stream.state_dict()
    stream.close()
    with pytest.raises(DataError, match="window size"):
        source.stream(TrainConfig(window=4, batch_size=8), state, CPU)


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_a_window_of_nothing_is_refused_by_name(window: Any) -> None:
    with pytest.raises(UsageError, match="window"):
        TrainConfig(window=window)


def test_a_ring_refuses_a_window_that_is_not_its_own(make_ring: Any) -> None:  # noqa: F811 (the fixture)
    """It would be trained with the ring's, under the name of the other."""
    with pytest.raises(UsageError, match=f"mixes {WINDOW} row groups.*harvest_ring.window=64"):
        train(make_ring(), topk(d_sae=24, k=2), TrainConfig(steps=2, window=64))


def test_naming_a_ring_s_own_window_is_the_same_run(make_ring: Any) -> None:  # noqa: F811 (the fixture)
    """Another name would train a finished run again."""
    paths = [
        train(make_ring(), topk(d_sae=24, k=2), TrainConfig(steps=2, batch_size=8, **more))[0].path
        for more in ({}, {"window": WINDOW})
    ]
    assert paths[0] == paths[1] is not None
