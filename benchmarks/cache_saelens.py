"""The store beside SAELens's, through SAELens's own classes: the peer part of bench_cache.py.

write_vs_saelens     tokens/s committed by our writer (fp16, sums, hashes, fsync, read-back) over its
                     CacheActivationsRunner writing shards and joining them (its default, fp32, nothing synced)
shuffled_vs_saelens  tokens/s of `store.stream`, shuffled in windows of 8 row groups (32,768 rows at d = 768), over
                     its ActivationsStore reading its own cache back through a mixing buffer of 16,384 tokens
Both get the same vectors ready-made, so no model is timed; batches of 4,096 float32 rows on the CPU, warm cache.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cache.store import ActivationStore
from tests.corpora import HOOK, empty_store, make_corpus

BATCH = 4096
CONTEXT = 128
PROMPTS = 16  # sequences that SAELens reads at a time
BUFFER = 16_384  # tokens of its mixing buffer
WINDOW = 8  # row groups of ours: small enough that windows change, as they do in a store larger than memory


def versus_saelens(folder: Path, tokens: int, d: int, repeats: int) -> dict[str, float]:
    """Both figures; {} with a message where sae-lens is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import sae_lens.cache_activations_runner as runner_module
        from datasets import Dataset, disable_progress_bars
        from sae_lens import ActivationsStore, CacheActivationsRunner, CacheActivationsRunnerConfig
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as e:
        print(f"SAELens        not compared: {e}")
        return {}
    disable_progress_bars()
    seqs = tokens // CONTEXT // PROMPTS * PROMPTS
    x = torch.randn(seqs * CONTEXT, d, generator=torch.Generator().manual_seed(0))
    tiny = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1,
            d_model=d,
            n_ctx=CONTEXT,
            d_head=8,
            n_heads=1,
            attn_only=True,
            d_vocab=50,
            device="cpu",
        )
    )
    runner_module.load_model = lambda **_: tiny
    ids = Dataset.from_dict({"input_ids": [[1] * CONTEXT] * seqs})

    def config(path: Path) -> Any:
        return CacheActivationsRunnerConfig(
            dataset_path="", model_name="tiny", model_batch_size=PROMPTS, hook_name="blocks.0.hook_resid_pre",
            d_in=d, training_tokens=seqs * CONTEXT, context_size=CONTEXT, new_cached_activations_path=str(path),
            shuffle=False, device="cpu", buffer_size_gb=0.1, prepend_bos=False, streaming=False,
        )  # fmt: skip

    def theirs_write(path: Path) -> float:
        runner = CacheActivationsRunner(config(path), override_dataset=ids)
        runner.activations_store.get_raw_llm_batch = batches(x)  # type: ignore[method-assign]
        with quiet():
            started = time.perf_counter()
            runner.run()
            return time.perf_counter() - started

    half = x.half()

    def ours_write(path: Path) -> tuple[float, ActivationStore]:
        store = empty_store(
            path, make_corpus(path, [CONTEXT] * seqs, group_rows=122_880), rows_per_shard=65_536
        )
        started = time.perf_counter()
        with store.writer() as writer:
            for i, (_, _, row0, row1) in enumerate(store.shards):
                writer.submit(i, HOOK, half[row0:row1])
        return time.perf_counter() - started, store

    written = [
        (theirs_write(folder / f"theirs-{i}"), ours_write(folder / f"ours-{i}")) for i in range(repeats)
    ]
    write_ratio = min(t for t, _ in written) / min(o for _, (o, _) in written)
    store = written[0][1][1]
    n = seqs * CONTEXT // BATCH // 2  # half an epoch: its buffer never runs dry

    def theirs_read() -> float:
        cfg = config(folder / "theirs-0")
        reader = ActivationsStore.from_cache_activations(tiny, cfg)
        reader.train_batch_size_tokens, reader.n_batches_in_buffer = BATCH, BUFFER // CONTEXT
        return drain(iter(reader), n)

    def ours_read() -> float:
        stream = store.stream(HOOK, batch_size=BATCH, split=None, skip=None, window=WINDOW)
        seconds = drain(stream, n)
        stream.close()
        return seconds

    theirs_read(), ours_read()
    read = [(theirs_read(), ours_read()) for _ in range(repeats)]
    theirs, ours = (min(r[i] for r in read) for i in (0, 1))
    rows = n * BATCH / 1e3
    print(
        f"SAELens        shuffled {rows / ours:,.0f} ktok/s against {rows / theirs:,.0f}: {theirs / ours:.1f}; "
        f"write {write_ratio:.1f} times its tokens/s"
    )
    return {"shuffled_vs_saelens": round(theirs / ours, 2), "write_vs_saelens": round(write_ratio, 2)}


def batches(x: torch.Tensor) -> Any:
    """What its runner asks for one LLM batch: vectors and token ids, ready-made."""
    at = iter(range(0, len(x), CONTEXT * PROMPTS))

    def get(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        a = next(at)
        part = x[a : a + CONTEXT * PROMPTS]
        return part, torch.ones(len(part), dtype=torch.int32)

    return get


def drain(stream: Iterator[Any], n: int) -> float:
    """Seconds of `n` batches after the first, which fills buffers."""
    next(stream)
    started = time.perf_counter()
    for _ in islice(stream, n):
        pass
    return time.perf_counter() - started


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Its progress bars and logs go elsewhere."""
    with (
        tempfile.TemporaryFile("w") as sink,
        contextlib.redirect_stderr(sink),
        contextlib.redirect_stdout(sink),
    ):
        yield
