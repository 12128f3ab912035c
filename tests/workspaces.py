"""A small finished workspace: corpus, store, two SAEs and their indexes of the tiny model, through the public API.

The tokenizer has tokens that would do harm if any page took them for markup; they stand in the documents, in the
vocabulary and in a label. `HOSTILE_HOST` is where they would send a request to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import SENTENCES, tiny_model_dir

HOOK = "blocks.1.hook_resid_post"
HOSTILE_HOST = "evil.test"
HOSTILE_TOKENS = (
    "<script>window.XSS=1</script>",
    f'<img src="http://{HOSTILE_HOST}/x.png" onerror="window.XSS=1">',
    '"><b onmouseover="window.XSS=1">',
    f"![x](http://{HOSTILE_HOST}/y.png)",
    "$x$ :red[hi]",
    "</div></style><style>*{display:none}",
    "\u202e",
)


@dataclass(frozen=True)
class TinyWorkspace:
    """What a test needs to know about the workspace."""

    path: Path
    model_dir: Path
    sae_ids: dict[str, str]  # activation -> sae_id
    hostile: tuple[str, ...] = HOSTILE_TOKENS

    @property
    def topk(self) -> str:
        return self.sae_ids["topk"]

    @property
    def abs_topk(self) -> str:
        return self.sae_ids["abs_topk"]


def hostile_model_dir(path: Path) -> Path:
    """The tiny model with HOSTILE_TOKENS as single tokens of its vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model_dir(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(HOSTILE_TOKENS))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tiny_workspace(root: Path) -> TinyWorkspace:
    """Corpus → harvest → train → evaluate → index, in a few seconds."""
    from cache import build_corpus, harvest, load_model
    from saes import TrainConfig, build_index, evaluate, presets, train
    from saes.labels import add_label

    path = root / "workspace"
    model_dir = hostile_model_dir(root / "tiny-hostile")
    model = load_model(model_dir, workspace=path)
    words = list(HOSTILE_TOKENS)
    documents = [
        f"{text} {words[i % len(words)]}{words[(i // 7) % len(words)]} {text}"
        for i, text in enumerate(SENTENCES)
    ]
    corpus = build_corpus(documents, model.tokenizer, context=32, workspace=path, name="sentences")
    store = harvest(model, corpus, hooks=[HOOK], workspace=path)
    configs = [presets.topk(d_sae=96, k=4), presets.abs_topk(d_sae=96, k=4)]
    results = train(store, configs, TrainConfig(steps=60, batch_size=256, lr=3e-3, log_every=20), hook=HOOK)
    ids = {}
    for result in results:
        evaluate(result.sae, store, model, max_tokens=400)
        build_index(result.sae, store, model, sae_path=result.path)
        ids[result.sae.cfg.activation] = result.sae.sae_id
    add_label(
        path,
        sae_id=ids["topk"],
        feature=_alive(path, ids["topk"]),
        text=HOSTILE_TOKENS[1],
        author="<b>me</b>",
    )
    return TinyWorkspace(path, model_dir, ids)


def _alive(path: Path, sae_id: str) -> int:
    """The feature that fires most."""
    from saes import FeatureIndex

    frame, _ = FeatureIndex.open(path, sae_id).list_features(limit=1)
    return int(frame["feature"].iloc[0])


@pytest.fixture(scope="session")
def tiny_workspace(tmp_path_factory: pytest.TempPathFactory) -> TinyWorkspace:
    """Built once a session; tests that write labels add events and take nothing away."""
    return build_tiny_workspace(tmp_path_factory.mktemp("tiny-workspace"))
