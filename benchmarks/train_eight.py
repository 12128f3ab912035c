"""Eight SAEs at once, harvest included, beside SAELens's MultiSAETrainer for the same eight; and the data path's share.

eight_vs_multisae  seconds of harvest + `train` of eight TopK SAEs / seconds of MultiSAETrainer on the same tokens, whose
                   rows come from the same model's forward passes (ours, with early stop) through its own mixing
                   buffer. Each token passes the model once; ours also writes the store, and reads it back.
data_share         seconds for which the loop waits for its batch / seconds of batch and step (d_sae 16,384), from a store

The model is a random Llama of SmolLM2-135M's width and first 16 layers: nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import build_contexts, harvest, load_module
from saes import TrainConfig, presets, train
from tests.corpora import HOOK as STORE_HOOK
from tests.corpora import empty_store, fill, make_corpus

D_MODEL, LAYERS, CONTEXT, MODEL_BATCH = 576, 16, 128, 16
HOOK = f"layers.{LAYERS - 1}"
KS = (8, 16, 24, 32, 40, 48, 64, 96)
LR = 4e-4


def versus_multisae(tokens: int, d_sae: int, batch: int) -> dict[str, float]:
    """One run of each, one after the other (each takes tens of seconds); {} where sae-lens is not installed."""
    try:
        import sae_lens  # noqa: F401
    except ImportError as e:
        print(f"eight SAEs beside SAELens's: not compared, {e}")
        return {}
    ids = torch.randint(0, 1000, (tokens // CONTEXT, CONTEXT), generator=torch.Generator().manual_seed(0))
    model = load_module(_llama(), [HOOK], ids[:2])
    model.capture(ids[:MODEL_BATCH], HOOK)  # warm
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours(model, ids, d_sae, batch, Path(folder))
    theirs = _theirs(model, ids, d_sae, batch)
    steps = tokens // batch
    print(f"eight SAEs of {d_sae} latents, {steps * batch:,} tokens, harvest included: {ours:.1f} s, "
          f"MultiSAETrainer {theirs:.1f} s", flush=True)  # fmt: skip
    return {"eight_vs_multisae": round(ours / theirs, 3)}


def _llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=D_MODEL, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=CONTEXT, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config).eval()


def _ours(model: Any, ids: Tensor, d_sae: int, batch: int, folder: Path) -> float:
    steps = ids.numel() // batch
    start = time.perf_counter()
    table = build_contexts(ids, rows=CONTEXT, split=[0] * len(ids), workspace=folder)
    store = harvest(model, table, hooks=[HOOK], workspace=folder)
    config = TrainConfig(steps=steps, batch_size=batch, lr=LR, log_every=steps)
    train(store, [presets.topk(d_sae=d_sae, k=k) for k in KS], config)
    return time.perf_counter() - start


def _theirs(model: Any, ids: Tensor, d_sae: int, batch: int) -> float:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    def passes() -> Iterator[dict[str, Tensor]]:
        for part in ids.split(MODEL_BATCH):
            yield {HOOK: model.capture(part, HOOK)[HOOK].reshape(-1, D_MODEL).clone()}

    start = time.perf_counter()
    saes = {
        f"k{k}": TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=d_sae, k=k, device="cpu"))
        for k in KS
    }
    config = SAETrainerConfig(
        total_training_samples=ids.numel() // batch * batch, train_batch_size_samples=batch, lr=LR, lr_end=LR,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    rows = multi_hook_concat_split_iter(4 * batch, batch, passes(), [HOOK])
    trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, HOOK), rows)
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        trainer.fit()
    return time.perf_counter() - start


def data_share(trainer: Any, batch: int, steps: int) -> float:
    """Of a shuffled stream over a store of fp16 rows that has more windows than are read."""
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), 2 * batch * (steps + 2)
        store = empty_store(
            folder,
            make_corpus(folder, [CONTEXT] * (rows // CONTEXT), group_rows=122_880),
            rows_per_shard=65_536,
        )
        x = torch.randn(rows // CONTEXT * CONTEXT, D_MODEL, generator=torch.Generator().manual_seed(0))
        fill(store, {STORE_HOOK: x.half()})
        stream = store.stream(STORE_HOOK, batch_size=batch, window=8)
        waited = worked = 0.0
        for i in range(steps + 2):
            start = time.perf_counter()
            rows_ = next(stream).x[STORE_HOOK]
            between = time.perf_counter()
            trainer.step(rows_, i)
            if i >= 2:
                waited, worked = waited + between - start, worked + time.perf_counter() - between
        stream.close()
    return waited / (waited + worked)
