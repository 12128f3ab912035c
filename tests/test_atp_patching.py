"""Exact patching: the shortcuts change nothing, features and their error add up, a killed run goes on, heads are found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cache.errors import DataError
from cache.models import LanguageModel
from probes.attribution import patching
from probes.attribution.atp import AtPStar
from probes.attribution.patching import ExactPatching, verify
from saes import SAE, attach, presets
from tests.atp_models import pair, random_pair, tiny_family
from tests.tiny import tiny_tokenizer

KINDS = ("q", "k", "v", "z", "mlp", "resid", "attn_out", "mlp_out")
HOOK = "blocks.1.hook_resid_post"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_family("llama", tmp_path_factory.mktemp("one"))


def last_two(logits: Tensor, example: Any) -> Tensor:
    """A metric that reads two positions."""
    return logits[:, -1, 7] - 0.5 * logits[:, -3, 9]


@pytest.mark.parametrize("metric", ["logit_diff", "kl", last_two], ids=["logit_diff", "kl", "callable"])
def test_cached_patching_equals_a_full_forward_of_each_node(model: Any, metric: Any) -> None:
    method, example = AtPStar(model, metric, nodes=KINDS), random_pair()
    cached, plain = (ExactPatching(method, example, cached=c) for c in (True, False))
    every = np.arange(len(cached.space))
    ids = np.random.default_rng(0).choice(every, 300, replace=False)
    a, b = cached.effects(ids), plain.effects(ids)
    assert np.abs(b).max() > 1e-3
    assert np.allclose(a, b, atol=1e-4 * np.abs(b).max())
    early = ~cached.live(ids)
    assert early.any() and not a[early].any(), "before the first differing token"


def test_subsets_and_summed_positions_equal_full_forwards(model: Any) -> None:
    for positions in ("each", "sum"):
        method, example = AtPStar(model, nodes=KINDS, positions=positions), random_pair()
        cached, plain = (ExactPatching(method, example, cached=c) for c in (True, False))
        g = np.random.default_rng(0)
        rows = [g.choice(len(cached.space), n, replace=False) for n in (2, 7, 40)]
        assert np.allclose(cached.patched(rows), plain.patched(rows), atol=1e-4)


def test_one_head_patched_by_hand_is_the_same_number(llama: Any) -> None:
    """Oracle: the hook written out. Key-value head 1 of layer 1 at position 3 serves query heads 2 and 3."""
    method, example = AtPStar(llama, nodes=("q", "k", "v", "z")), random_pair()
    exact = ExactPatching(method, example)
    clean, noise = torch.tensor([example.clean]), torch.tensor([example.noise])
    for kind in "kv":
        hook = f"blocks.1.attn.hook_{kind}"
        other = llama.capture(noise, hook)[hook]

        def edit(x: Tensor, other: Tensor = other) -> Tensor:
            x = x.clone()
            x[:, 3, 8:16] = other[:, 3, 8:16]
            return x

        before = llama(clean)[0, -1]
        with llama.hooked({hook: edit}):
            after = llama(clean)[0, -1]
        f = exact.space.frame()
        node = f[(f["layer"] == 1) & (f["kind"] == kind) & (f["index"] == 1) & (f["pos"] == 3)]["node"]
        want = float((after[7] - after[8]) - (before[7] - before[8]))
        assert abs(want) > 1e-4 and exact.effects(node.to_numpy())[0] == pytest.approx(want, abs=1e-5)


def test_a_set_of_nodes_gets_its_noise_values_and_all_of_them_the_noise_run(llama: Any) -> None:
    """Patched nodes that others of the set have moved are set, not moved twice: by hooks, and by the noise run itself."""
    example = random_pair()
    exact = ExactPatching(AtPStar(llama, nodes=("q", "k", "v", "z", "mlp")), example)
    frame, clean, noise = exact.space.frame(), torch.tensor([example.clean]), torch.tensor([example.noise])

    def value(logits: Tensor) -> float:
        return float(logits[0, -1, 7] - logits[0, -1, 8])

    everything = exact.patched([np.arange(len(frame))])[0]
    assert everything == pytest.approx(value(llama(noise)) - value(llama(clean)), abs=1e-4)
    chosen = frame[frame["kind"].isin(["v", "z"]) & (frame["pos"] >= 2) & (frame["index"] == 0)]
    edits = {}
    for hook in chosen["hook"].unique():
        other = llama.capture(noise, hook)[hook]
        edits[hook] = lambda x, other=other: torch.cat(
            [x[:, :2], torch.cat([other[:, 2:, :8], x[:, 2:, 8:]], -1)], 1
        )
    with llama.hooked(edits):
        want = value(llama(clean))
    got = exact.patched([chosen["node"].to_numpy()])[0]
    assert got == pytest.approx(want - value(llama(clean)), abs=1e-4)


# ------------------------------------------------------------------------------------ SAE features


@pytest.fixture(scope="module")
def sae(llama: Any) -> SAE:
    torch.manual_seed(0)
    out = SAE(presets.topk(d_sae=48, k=6, d_model=32, hook=HOOK))
    with torch.no_grad():
        out.W_enc.normal_()
        out.W_dec.copy_(torch.nn.functional.normalize(torch.randn(48, 32), dim=1))
    return out.requires_grad_(False)


def test_features_and_the_error_add_up_to_the_stream(llama: Any, sae: SAE) -> None:
    example = random_pair()
    both = AtPStar(llama, nodes=("resid",), saes={HOOK: sae}, qk_fix=False, grad_drop=False)
    frame = both.attribute(example).frame()
    frame = frame[(frame["layer"] == 1) & (frame["pos"] > 0)]
    parts = frame[frame["kind"] != "resid"].groupby("pos")["signed"].sum()
    whole = frame[frame["kind"] == "resid"].set_index("pos")["signed"]
    assert whole.abs().max() > 1e-3 and np.allclose(parts, whole, atol=1e-4)
    assert (frame["kind"] == "sae_error").any()
    exact = ExactPatching(both, example)
    f = exact.space.frame()
    at = (f["layer"] == 1) & (f["pos"] == 3)
    rows = [f[at & kinds]["node"].to_numpy() for kinds in (f["kind"] != "resid", f["kind"] == "resid")]
    together, stream = exact.patched(rows)
    assert abs(stream) > 1e-3 and together == pytest.approx(stream, abs=1e-4)


def test_without_the_error_term_features_are_patched_in_the_spliced_model(llama: Any, sae: SAE) -> None:
    example = random_pair()
    method = AtPStar(llama, nodes=("z",), saes={HOOK: sae}, error=False)
    exact = ExactPatching(method, example)
    clean, noise = torch.tensor([example.clean]), torch.tensor([example.noise])
    with torch.no_grad(), attach(llama, {HOOK: sae}, error=False) as a:
        logits = llama(clean)[0, -1]
        codes = a.codes[HOOK].dense(48)
        llama(noise)
        other = a.codes[HOOK].dense(48)
        base = float(logits[7] - logits[8])
        assert exact.clean_value == pytest.approx(base, abs=1e-5)
        at = int((other - codes).abs().amax(1).argmax())  # row of position at + 1
        feature = int((other - codes)[at].abs().argmax())
        step = (other - codes)[at, feature] * sae.W_dec[feature]

        def add(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, at + 1] += step
            return x

        with llama.hooked({HOOK: add}):
            patched = llama(clean)[0, -1]
    want = float(patched[7] - patched[8]) - base
    f = exact.space.frame()
    node = f[(f["kind"] == "sae") & (f["index"] == feature) & (f["pos"] == at + 1)]["node"].to_numpy()
    assert abs(want) > 1e-5 and exact.effects(node)[0] == pytest.approx(want, abs=1e-5)
    scores = method.attribute(example)
    assert scores.score[node[0]] > 0 and np.isfinite(scores.score).all()
    heads = f[(f["kind"] == "z") & (f["layer"] == 0)]["node"].to_numpy()
    assert np.abs(scores.signed[heads]).max() > 0, "gradients pass through the SAE to what is before it"


# -------------------------------------------------------------------------------- runs over all nodes

CHILD = """
import sys
from pathlib import Path
from cache.models import load_model
from probes.attribution import patching
from probes.attribution.atp import AtPStar
from tests.atp_models import random_pair
patching.PART_SECONDS = 0.0
exact = patching.ExactPatching(AtPStar(load_model(sys.argv[1], device="cpu")), random_pair(), batch=2)
print("ready", flush=True)
exact.run(Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_effects(llama: Any, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, llama.source, str(tmp_path / "run")],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list((tmp_path / "run").glob("part-*.parquet"))) < 3 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sum(pq.read_metadata(p).num_rows for p in (tmp_path / "run").glob("part-*.parquet"))
    method = AtPStar(llama)
    exact = ExactPatching(method, random_pair())
    got, want = exact.run(tmp_path / "run"), exact.effects()
    n = int(exact.live(np.arange(len(want))).sum())
    assert 0 < done < n, "it was killed on the way"
    assert exact.rows_run == 2 * n - done, "what was there is not computed again"
    assert np.allclose(got, want, atol=1e-5)
    with pytest.raises(DataError, match="another pair"):
        ExactPatching(method, random_pair(seed=1)).run(tmp_path / "run")


def test_verify_measures_the_best_and_leaves_the_rest_empty(llama: Any) -> None:
    example = random_pair()
    method = AtPStar(llama)
    scores = verify(method, method.attribute(example), example, 5)
    frame = scores.frame()
    measured = frame[frame["exact"].notna()]
    assert set(measured["node"]) == set(scores.top(5).tolist())
    exact = ExactPatching(method, example, cached=False)
    assert np.allclose(measured["exact"], exact.effects(measured["node"].to_numpy()), atol=1e-4)


# --------------------------------------------------------------------------------- a known circuit


def test_trained_induction_heads_are_found() -> None:
    """Heads of the fixture's layer 1 attend to the token after the earlier copy (tests/fixtures/make_induction.py)."""
    from transformers import LlamaForCausalLM

    folder = ROOT / "tests" / "fixtures" / "induction"
    hf = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    g = torch.Generator().manual_seed(5)
    ids = (torch.randperm(28, generator=g)[:12] + 2).tolist()
    clean = [*ids[:10], *ids[:4]]
    noise = list(clean)
    noise[4] = ids[10]  # another token follows the copy of the last one
    with torch.no_grad():
        out = hf(torch.tensor([clean]), output_attentions=True)
        assert int(out.logits[0, -1].argmax()) == clean[4], "the model continues the repetition"
        attention = out.attentions[1][0, :, -1, 4]
    known = set(torch.nonzero(attention > 0.5).flatten().tolist())
    assert known, "an induction head"
    model = LanguageModel("induction", hf, _wide(), folder, backend="transformer_lens", weights_sha="0" * 64)
    example = pair(clean, noise, answers=((clean[4],),), wrong=((noise[4],),))
    for method in (AtPStar(model, nodes=("z",)), AtPStar(model, nodes=("z",), grad_drop=False)):
        best = method.attribute(example).frame().sort_values("score", ascending=False)
        layer = best[best["layer"] == 1].head(len(known))
        assert set(layer["index"]) == known and set(layer["pos"]) == {len(clean) - 1}
        assert set(layer["node"]) <= set(best.head(2 * len(known))["node"]), (
            "near the top of all heads and positions"
        )


def _wide() -> Any:
    """A tokenizer whose ids fit the fixture's 32 tokens is not needed: prompts are token ids."""
    tok = tiny_tokenizer()
    tok.get_vocab = lambda: {"a": 31}  # type: ignore[method-assign]
    return tok


def test_parts_are_not_written_for_every_chunk(llama: Any, tmp_path: Path) -> None:
    exact = ExactPatching(AtPStar(llama), random_pair())
    exact.run(tmp_path / "run")
    assert patching.PART_SECONDS >= 5 and len(list((tmp_path / "run").glob("part-*"))) <= 3


def test_a_folder_with_effects_of_other_nodes_is_refused(llama: Any, tmp_path: Path) -> None:
    exact = ExactPatching(AtPStar(llama), random_pair())
    exact.run(tmp_path / "run", np.arange(100, 120))
    with pytest.raises(DataError, match="other nodes"):
        exact.run(tmp_path / "run", np.arange(200, 220))
