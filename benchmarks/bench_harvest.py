"""What storing costs: tokens per second of `harvest` against the same forward passes with nothing stored.

The packaged model over packaged text, one residual hook in the middle, early stop in both. Each repeat runs both,
in alternating order, over the same batches; the verdict is the median of the repeats' ratios (target ≥ 0.95).
Harvest's time is all of it: opening the store, checks, cast, queue, and the wait for the last shard's commit.

    python benchmarks/bench_harvest.py [--workspace DIR] [--repeats 7] [--tokens 4000]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cache import Corpus, LanguageModel, build_corpus, harvest, load_model
from cache.harvesting import bare_forward_rate

MODEL = "smollm2-135m-instruct-q4_1"
TARGET = 0.95
ROWS_PER_SHARD = 1024
"""Small, so that a short run has several shards and the writer works beside the model, as in a long one."""


def harvest_rate(model: LanguageModel, corpus: Corpus, hook: str) -> tuple[float, float]:
    """Tokens per second of a whole harvest into a fresh workspace, and the writer's share of the time."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = harvest(
            model,
            corpus,
            hooks=hook,
            workspace=folder,
            rows_per_shard=ROWS_PER_SHARD,
            dtype="fp16",
            show_progress=False,
        )
        seconds = time.perf_counter() - began
        return corpus.n_tokens / seconds, store.last_run["write_seconds"] / seconds


def bare_rate(model: LanguageModel, corpus: Corpus, hook: str) -> float:
    return bare_forward_rate(model, corpus, hook, rows_per_shard=ROWS_PER_SHARD, clock=time.perf_counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", help="where the packaged model is, or is put")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--backend", default="transformer_lens")
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one swings wildly on a busy machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_model(MODEL, backend=args.backend, workspace=args.workspace, device="cpu")
    hook = f"blocks.{model.n_layers // 2}.hook_resid_post"
    corpus = build_corpus(
        "boolq", model.tokenizer, max_tokens=args.tokens, context=256, workspace=args.workspace
    )
    print(
        f"{model.name}, {args.backend}, {hook}, {corpus.n_tokens:,} tokens, {torch.get_num_threads()} threads"
    )
    bare_rate(model, corpus, hook)  # warm up: allocator, page cache
    bare, full, ratios, shares = [], [], [], []
    for i in range(args.repeats):
        if i % 2:
            rate, share = harvest_rate(model, corpus, hook)
            plain = bare_rate(model, corpus, hook)
        else:
            plain = bare_rate(model, corpus, hook)
            rate, share = harvest_rate(model, corpus, hook)
        bare.append(plain)
        full.append(rate)
        shares.append(share)
        ratios.append(rate / plain)
        print(f"  repeat {i + 1}: bare {plain:,.0f} tok/s, harvest {rate:,.0f} tok/s, ratio {ratios[-1]:.3f}")
    ratio = statistics.median(ratios)
    print(f"harvest / bare forward: {ratio:.3f} (median of {args.repeats}; target ≥ {TARGET})")
    result = {
        "harvest_over_bare": round(ratio, 4),
        "harvest_over_bare_min": round(min(ratios), 4),
        "harvest_over_bare_max": round(max(ratios), 4),
        "bare_tokens_per_second": round(statistics.median(bare), 1),
        "harvest_tokens_per_second": round(statistics.median(full), 1),
        "writer_share_of_time": round(statistics.median(shares), 4),
        "tokens": corpus.n_tokens,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "backend": args.backend,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
