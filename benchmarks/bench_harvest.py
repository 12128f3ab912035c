"""What storing costs: `harvest` against the same forward passes with nothing stored, and 30 hooks against one.

The packaged model over packaged text, early stop everywhere, each pair run in alternating order over the same batches.
harvest_over_bare: tokens/s of a harvest of one residual hook in the middle / of the bare passes (target >= 0.95); the
harvest's time is all of it: opening the store, checks, cast, queue, and the wait for the last shard's commit.
bare_over_torch: the bare passes / the same with torch's own linear layers (cache/fast_linear.py; 1 where torch's are as fast).
write_share: seconds in the writer's thread / seconds of that harvest.
layers30_over_1: tokens/s of the model's thread (passes, checks, cast) at every hook_resid_post / at the deepest alone;
layers30_write_share: what the writer's thread then takes, in the model's seconds. It runs beside the model, and
hides behind it while this is below 1. Figures are medians of the pairs. About two minutes; --full takes ten.

    python benchmarks/bench_harvest.py [--workspace DIR] [--full]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cache import ActivationStore, Corpus, LanguageModel, build_corpus, harvest, load_model
from cache.fast_linear import FastLinear
from cache.harvesting import BATCH_TOKENS, bare_forward_rate, run_shard, store_identity
from cache.writer import TokenSlices, commit_shard

MODEL = "smollm2-135m-instruct-q4_1"
TARGET = 0.95
ROWS_PER_SHARD = 512
"""Small, so that a short run has several shards and the writer works beside the model, as in a long one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One harvest into a fresh workspace, or the bare passes."""

    rate: float
    """Tokens per second."""
    write_share: float = 0.0
    """Seconds in the writer's thread over seconds of the harvest."""


def harvested(model: LanguageModel, corpus: Corpus, hooks: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = harvest(
            model,
            corpus,
            hooks=hooks,
            workspace=folder,
            rows_per_shard=ROWS_PER_SHARD,
            dtype="fp16",
            show_progress=False,
        )
        seconds = time.perf_counter() - began
        return Run(rate=corpus.n_tokens / seconds, write_share=store.last_run["write_seconds"] / seconds)


def bare(model: LanguageModel, corpus: Corpus, hooks: list[str]) -> Run:
    rate = bare_forward_rate(model, corpus, hooks, rows_per_shard=ROWS_PER_SHARD, clock=time.perf_counter)
    return Run(rate=rate)


def with_torch_layers(model: LanguageModel, corpus: Corpus, hooks: list[str]) -> Run:
    """The bare passes with the linear layers as torch has them."""
    fast = [m for m in model.hf.modules() if isinstance(m, FastLinear)]
    try:
        for module in fast:
            module.__class__ = torch.nn.Linear
        return bare(model, corpus, hooks)
    finally:
        for module in fast:
            module.__class__ = FastLinear


def captured(model: LanguageModel, corpus: Corpus, hooks: list[str]) -> Run:
    """What the model's thread does in a harvest, timed alone; then the writer's part for the same shards."""
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore.create(folder, store_identity(model, corpus), corpus)
        tokens = TokenSlices(corpus.path / "tokens.parquet")
        seconds = writing = 0.0
        for shard in range(len(store.shards)):
            began = time.perf_counter()
            values, _ = run_shard(model, store, shard, dict.fromkeys(hooks, torch.float16), BATCH_TOKENS)
            done = time.perf_counter()
            for hook, x in values.items():
                commit_shard(store, tokens, shard, hook, x)
            seconds, writing = seconds + done - began, writing + time.perf_counter() - done
        return Run(rate=corpus.n_tokens / seconds, write_share=writing / seconds)


def interleaved(
    names: tuple[str, str], first: Callable[[], Run], second: Callable[[], Run], pairs: int
) -> tuple[list[Run], list[Run]]:
    """`pairs` runs of both, the order alternating, so that a slow minute of the machine hits both alike."""
    found: tuple[list[Run], list[Run]] = ([], [])
    for i in range(pairs):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            found[which].append((first, second)[which]())
        a, b = found[0][-1].rate, found[1][-1].rate
        print(
            f"  pair {i + 1}: {names[0]} {a:,.0f} tok/s, {names[1]} {b:,.0f} tok/s, ratio {b / a:.3f}",
            flush=True,
        )
    return found


def ratios(runs: tuple[list[Run], list[Run]]) -> list[float]:
    return [b.rate / a.rate for a, b in zip(*runs, strict=True)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", help="where the packaged model is, or is put")
    parser.add_argument("--full", action="store_true", help="15 pairs of 6,000 tokens")
    parser.add_argument("--pairs", type=int, help="default 5")
    parser.add_argument("--tokens", type=int, help="default 1,600")
    parser.add_argument("--backend", default="transformer_lens")
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one swings wildly on a busy machine"
    )
    args = parser.parse_args()
    args.pairs = args.pairs or (15 if args.full else 5)
    args.tokens = args.tokens or (6000 if args.full else 1600)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model = load_model(MODEL, backend=args.backend, workspace=args.workspace, device="cpu")
    middle = [f"blocks.{model.n_layers // 2}.hook_resid_post"]
    layers = [f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)]
    corpus = build_corpus(
        "boolq", model.tokenizer, max_tokens=args.tokens, context=256, workspace=args.workspace
    )
    print(f"{model.name}, {args.backend}, {corpus.n_tokens:,} tokens, {torch.get_num_threads()} threads")
    bare(model, corpus, middle)  # warm up: allocator, page cache
    one = interleaved(
        ("bare", "harvest"),
        lambda: bare(model, corpus, middle),
        lambda: harvested(model, corpus, middle),
        args.pairs,
    )
    ratio, share = statistics.median(ratios(one)), statistics.median(r.write_share for r in one[1])
    print(
        f"harvest / bare forward: {ratio:.3f} (median of {args.pairs}; target >= {TARGET}), writer {share:.2%}"
    )
    plain = interleaved(
        ("torch's layers", "bare"),
        lambda: with_torch_layers(model, corpus, middle),
        lambda: bare(model, corpus, middle),
        args.pairs,
    )
    faster = statistics.median(ratios(plain))
    print(f"bare forward / with torch's own layers: {faster:.2f} (median of {args.pairs})")
    many = interleaved(
        ("deepest hook", f"{len(layers)} hooks"),
        lambda: captured(model, corpus, layers[-1:]),
        lambda: captured(model, corpus, layers),
        args.pairs,
    )
    spread = statistics.median(ratios(many))
    print(f"{len(layers)} hooks / deepest hook: {spread:.3f} (median of {args.pairs})")
    result = {
        "harvest_over_bare": round(ratio, 4),
        "harvest_over_bare_min": round(min(ratios(one)), 4),
        "harvest_over_bare_max": round(max(ratios(one)), 4),
        "bare_over_torch": round(faster, 3),
        "write_share": round(share, 5),
        "layers30_over_1": round(spread, 4),
        "layers30_over_1_min": round(min(ratios(many)), 4),
        "layers30_over_1_max": round(max(ratios(many)), 4),
        "layers30_write_share": round(statistics.median(r.write_share for r in many[1]), 5),
        "bare_tokens_per_second": round(statistics.median(r.rate for r in one[0]), 1),
        "harvest_tokens_per_second": round(statistics.median(r.rate for r in one[1]), 1),
        "tokens": corpus.n_tokens,
        "pairs": args.pairs,
        "threads": torch.get_num_threads(),
        "backend": args.backend,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
