"""AtP* on the packaged model: its attention is what the fix takes it for, and the shortcuts are exact on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.assets import find
from cache.licences import is_accepted
from cache.models import load_model
from probes.attribution.atp import AtPStar
from probes.attribution.pairs import PromptPair
from probes.attribution.patching import ExactPatching, verify
from tests.conftest import REAL_MODEL

GEMMA = "gemma3-270m"
PAIR = PromptPair(
    clean="Because Amy was tired,", noise="Because Kevin was tired,", answers=(" she",), wrong=(" he",)
)


@pytest.mark.assets
def test_on_the_packaged_model_the_best_nodes_are_what_exact_patching_finds(real_workspace: Path) -> None:
    model = load_model(REAL_MODEL, workspace=real_workspace, device="cpu")
    method = AtPStar(model)
    scores = verify(method, method.attribute(PAIR), PAIR, 12)
    best = scores.frame(scores.top(12))
    assert np.corrcoef(best["score"], best["exact_abs"])[0, 1] > 0.8
    assert (best["exact_abs"] > 0.1).all(), "every one of them moves the answer"
    ids = scores.top(12)[::3]
    plain = ExactPatching(method, PAIR, cached=False).effects(ids)
    assert np.allclose(plain, scores.columns["exact"][ids], atol=1e-3)
    queries = scores.space.frame().query("kind == 'q'")["node"].to_numpy()
    ids = queries[np.argsort(-scores.score[queries])[:8]]
    truth = ExactPatching(method, PAIR).effects(ids)
    assert np.corrcoef(scores.signed[ids], truth)[0, 1] > 0.9, "signed, queries, with the QK fix"


@pytest.mark.assets
def test_on_gemma_the_fix_of_queries_and_keys_is_what_exact_patching_finds(real_workspace: Path) -> None:
    """QK-norm, sliding windows and one key-value head, for real; the model asks for its terms, so nobody accepts them here."""
    if not is_accepted(find(GEMMA, "model"), real_workspace):
        pytest.skip(
            f"needs `atomscope models fetch {GEMMA}` in ATOMSCOPE_TEST_HOME: its terms are yours to accept"
        )
    model = load_model(GEMMA, workspace=real_workspace, device="cpu")
    method = AtPStar(model, nodes=("q", "k"), grad_drop=False)
    scores = method.attribute(PAIR)
    ids = scores.top(24)
    truth = ExactPatching(method, PAIR).effects(ids)
    assert np.corrcoef(scores.signed[ids], truth)[0, 1] > 0.95
    assert np.allclose(ExactPatching(method, PAIR, cached=False).effects(ids[::6]), truth[::6], atol=1e-3)
