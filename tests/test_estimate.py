"""`--dry-run`: what it says is what the run takes, and it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cache import ActivationStore, LanguageModel, build_contexts, build_corpus, harvest, load_module
from cache.estimate import Estimate
from tests.tiny import SENTENCES

HOOKS = [f"blocks.{i}.{k}" for i in range(3) for k in ("hook_resid_post", "hook_mlp_out", "attn.hook_z")]

_CHILD = """
import json, sys
from pathlib import Path
from cache import Corpus, harvest, load_model
from cache.estimate import _peak, _status

action, model, corpus, workspace, hooks, rows = sys.argv[1:]
model, corpus = load_model(model, device="cpu"), Corpus.open(corpus)
options = dict(hooks=hooks.split(","), workspace=workspace, rows_per_shard=int(rows), dtype="fp32")
if action == "estimate":
    print(json.dumps(harvest(model, corpus, dry_run=True, **options).to_dict()))
else:
    with _peak() as peak:
        store = harvest(model, corpus, show_progress=False, **options)
    print(json.dumps({"growth": peak[0], "peak": _status("VmHWM"), "seconds": store.last_run["seconds"]}))
"""


def child(action: str, model: Path, corpus: Path, workspace: Path, rows: int) -> dict[str, Any]:
    """A process of its own, so that what it has in memory is what the action took."""
    args = [action, str(model), str(corpus), str(workspace), ",".join(HOOKS), str(rows)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", _CHILD, *args], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def on_disk(workspace: Path) -> int:
    return sum(p.stat().st_size for p in workspace.rglob("activations/*/acts/**/*") if p.is_file())


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc"
)
def test_disk_and_memory_of_the_run_are_within_a_fifth_of_the_estimate(
    tiny_dir: Path, tiny_model: LanguageModel, tmp_path: Path
) -> None:
    texts = [" ".join(SENTENCES[i % 200 : i % 200 + 1 + i % 7]) + f" {i}." for i in range(1500)]
    corpus = build_corpus(texts, tiny_model.tokenizer, context=128, workspace=tmp_path)
    rows = corpus.n_tokens // 3
    said = child("estimate", tiny_dir, corpus.path, tmp_path, rows)
    assert not (tmp_path / "activations").exists() and not list((tmp_path / "_tmp").iterdir())
    took = child("harvest", tiny_dir, corpus.path, tmp_path, rows)
    assert said["tokens"] == corpus.n_tokens and said["shards"] == 4
    assert said["disk_bytes"] == pytest.approx(on_disk(tmp_path), rel=0.2)
    assert said["memory_growth_bytes"] == pytest.approx(took["growth"], rel=0.2)
    assert said["memory_bytes"] == pytest.approx(took["peak"], rel=0.2)


def test_an_estimate_counts_only_what_is_missing(tiny_model: LanguageModel, tmp_path: Path) -> None:
    corpus = build_corpus(SENTENCES, tiny_model.tokenizer, workspace=tmp_path)
    go: dict[str, Any] = {"workspace": tmp_path, "rows_per_shard": 500, "show_progress": False}
    whole = harvest(tiny_model, corpus, hooks=HOOKS[:2], dry_run=True, **go)
    assert isinstance(whole, Estimate) and not ActivationStore.find_all(tmp_path)
    assert whole.tokens == corpus.n_tokens and set(whole.hooks.values()) == {"fp16"} and whole.seconds > 0
    store = harvest(tiny_model, corpus, hooks=HOOKS[0], **go)
    first = on_disk(tmp_path)
    rest = harvest(tiny_model, corpus, hooks=HOOKS[:2], dry_run=True, **go)
    assert rest.tokens == corpus.n_tokens and rest.disk_bytes == pytest.approx(first, rel=0.2)
    assert whole.disk_bytes == pytest.approx(2 * first, rel=0.2)
    assert rest.shards == whole.shards == len(store.shards)
    nothing = harvest(tiny_model, corpus, hooks=HOOKS[0], dry_run=True, **go)
    assert nothing.tokens == nothing.disk_bytes == nothing.memory_growth_bytes == 0
    text = str(rest)
    assert (
        f"{corpus.n_tokens:,}" in text
        and HOOKS[1] in text
        and all(w in text for w in ("disk", "memory", "time", "tokens/s"))
    )


def test_contexts_of_a_module_are_estimated_too(tmp_path: Path) -> None:
    images = torch.rand(200, 1, 8, 8)
    model = load_module(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1)), ["0"], images[:2])
    corpus = build_contexts(images, rows=64, workspace=tmp_path)
    said = harvest(model, corpus, hooks="0", workspace=tmp_path, dry_run=True, dtype="fp32")
    harvest(model, corpus, hooks="0", workspace=tmp_path, dtype="fp32", show_progress=False)
    assert said.tokens == 200 * 64 and said.disk_bytes == pytest.approx(on_disk(tmp_path), rel=0.2)
