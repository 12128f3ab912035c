"""Two processes with one store or one feature index: the second is refused in one line, and goes on once the first is gone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cache import harvest, harvesting
from cache.errors import AtomscopeError
from saes import FeatureIndex, build_index
from saes.config import SAEConfig
from saes.sae import SAE
from tests.children import started
from tests.corpora import OTHER, make_corpus, make_store
from tests.fake_model import HOOK, FakeModel, expected

OPTIONS: dict[str, Any] = {"rows_per_shard": 200, "show_progress": False}


class TwoHooks(FakeModel):
    """The fake model with the same values at a second hook."""

    def check_hook(self, name: str, /) -> None:
        assert name in (HOOK, OTHER)

    def capture(self, inputs: torch.Tensor, hooks: Sequence[str], /) -> dict[str, torch.Tensor]:
        (x,) = super().capture(inputs, hooks).values()
        return dict.fromkeys(hooks, x)


_PAUSE = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])

def pause():
    (folder / "in").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
"""
_HARVEST = (
    _PAUSE
    + """
from cache import Corpus, harvest, harvesting
from tests.fake_model import HOOK, FakeModel
real = harvesting.run_shard

def run_shard(model, store, shard, *args):
    if shard == 1:
        pause()
    return real(model, store, shard, *args)

harvesting.run_shard = run_shard
harvest(FakeModel(), Corpus.open(sys.argv[2]), hooks=HOOK, workspace=folder, rows_per_shard=200)
"""
)
_INDEX = (
    _PAUSE
    + """
from cache import ActivationStore
from saes import SAE, build_index, indexing
real = indexing.write_all_codes

def write_all_codes(*args, **options):
    pause()
    return real(*args, **options)

indexing.write_all_codes = write_all_codes
build_index(SAE.load(sys.argv[2]), ActivationStore.open(sys.argv[3]))
"""
)


@contextmanager
def paused(folder: Path, script: str, *args: object) -> Iterator[subprocess.Popen[bytes]]:
    """The script in a process of its own that is in the middle of its work, until `folder/go` is there."""
    child = started(script, folder, *args)
    try:
        for _ in range(6000):
            if (folder / "in").exists():
                break
            assert child.poll() is None, "it ended before it came so far"
            time.sleep(0.02)
        assert (folder / "in").exists(), "it never came so far"
        yield child
    finally:
        child.kill()
        child.wait()


def finish(child: subprocess.Popen[bytes], folder: Path, *, kill: bool) -> None:
    if kill:
        child.kill()
        child.wait()
        return
    (folder / "go").touch()
    assert child.wait(timeout=120) == 0


@pytest.mark.parametrize("kill", [True, False])
def test_one_process_harvests_a_hook_and_another_hook_is_free(kill: bool, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [20] * 40)

    def here(hook: str) -> Any:
        return harvest(TwoHooks(), corpus, hooks=hook, workspace=tmp_path, **OPTIONS)

    with paused(tmp_path, _HARVEST, corpus.path) as child:
        with pytest.raises(AtomscopeError, match="being harvested by another process") as e:
            here(HOOK)
        assert "\n" not in str(e.value) and HOOK in str(e.value)
        assert here(OTHER).complete(OTHER) and child.poll() is None
        finish(child, tmp_path, kill=kill)
    store = here(HOOK)
    assert store.complete(HOOK) and store.verify() == []
    assert torch.equal(store.rows(HOOK, range(800)), expected(corpus))
    assert (store.last_run["tokens"] > 0) == kill  # of one that finished nothing is left to do
    assert here(HOOK).last_run["tokens"] == 0


def test_what_another_process_finished_just_before_the_lock_is_not_done_again(
    tmp_path: Path, monkeypatch
) -> None:
    corpus, real = make_corpus(tmp_path, [20] * 40), harvesting.only_one

    @contextmanager
    def late(*args: Any) -> Iterator[None]:
        monkeypatch.setattr(harvesting, "only_one", real)
        harvest(FakeModel(), corpus, hooks=HOOK, workspace=tmp_path, **OPTIONS)
        with real(*args):
            yield

    monkeypatch.setattr(harvesting, "only_one", late)
    store = harvest(FakeModel(), corpus, hooks=HOOK, workspace=tmp_path, **OPTIONS)
    assert store.complete(HOOK) and store.last_run["tokens"] == 0


def test_one_process_builds_an_index(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 20)
    sae = SAE(SAEConfig(d_sae=12, k=2, d_model=8, hook=HOOK)).requires_grad_(False)
    for i, p in enumerate(sae.parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    folder = sae.save(tmp_path / "saes" / "run" / "0-some")
    with paused(tmp_path, _INDEX, folder, store.path) as child:
        with pytest.raises(AtomscopeError, match="index is being built by another process") as e:
            build_index(sae, store)
        assert "\n" not in str(e.value) and child.poll() is None
        finish(child, tmp_path, kill=True)
    made = build_index(sae, store)
    assert [p.name for p in made.glob("features-*.duckdb")] == ["features-1.duckdb"]
    assert FeatureIndex.open(tmp_path, sae.sae_id).feature(0)["density"] >= 0
    assert build_index(sae, store) == made
