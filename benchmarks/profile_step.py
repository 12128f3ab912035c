"""Where a training step's time goes: each operator's CPU time, put together by what it is for.

    python benchmarks/profile_step.py [--steps 5] [--d-sae 16384] [--rows 2048]

One thread and its CPU time (not the profiler's wall time), so other processes on the machine change little. In units of
the encoder product alone, `torch.addmm`, timed beside it: the floor of an exact step is 1. Medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_train as bench
from saes import presets
from saes.products import COLUMNS
from saes.trainer import Trainer

PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
ENCODER = "product of the encoder"
PARTS = {
    "encoder product": (ENCODER,),
    "selection (group maxima, top-k, gathers)": (
        "aten::topk", "aten::amax", "aten::gather", "aten::index_select", "aten::take", "aten::nonzero", "aten::index",
        "aten::clamp_min_", "aten::bitwise_and_",
    ),
    "dot products at chosen latents (value gradients, rescoring)": (
        "aten::_embedding_bag_per_sample_weights_backward", "aten::sparse_sampled_addmm",
    ),
    "decode and weight gradients (embedding bags)": (
        "aten::_embedding_bag_forward_only", "aten::_embedding_bag", "aten::addcmul", "aten::sort", "aten::bincount",
    ),
    "AuxK products, bias gradient": (*PRODUCTS, "aten::mv", "aten::addmv"),
    "Adam with the clip": ("aten::_fused_adam_",),
    "norms of gradients and decoder rows": ("aten::linalg_vector_norm",),
    "casts and copies": ("aten::copy_",),
}  # fmt: skip


class Clock(TorchDispatchMode):
    """CPU milliseconds of this thread by operator, of everything that runs under it, backward included.

    d_sae: a product of that width, or of a block of latents, is the encoder's.
    """

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.widths = d_sae, COLUMNS
        self.ms: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name in PRODUCTS and out.shape[-1] in self.widths:
            name = ENCODER
        self.ms[name] += (time.thread_time() - start) * 1e3
        return out


def shares(trainer: Trainer, x: torch.Tensor, steps: int) -> dict[str, float]:
    """Milliseconds a step of each part; what is in none, Python and autograd among it, is `rest`."""
    part_of = {op: part for part, ops in PARTS.items() for op in ops}
    seen: dict[str, list[float]] = defaultdict(list)
    for i in range(steps + 2):
        start = time.thread_time()
        with Clock(trainer.cfg.d_sae) as clock:
            trainer.step(x, i)
        parts = dict.fromkeys([*PARTS, "rest"], 0.0)
        for op, ms in clock.ms.items():
            parts[part_of.get(op, "rest")] += ms
        parts["rest"] += (time.thread_time() - start) * 1e3 - sum(clock.ms.values())
        if i >= 2:
            for part, ms in parts.items():
                seen[part].append(ms)
    return {part: statistics.median(ms) for part, ms in seen.items()}


def gemm_ms(trainer: Trainer, x: torch.Tensor) -> float:
    w, b = trainer.sae.W_enc.detach(), trainer.sae.b_enc.detach()
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        torch.addmm(b, x, w.T)
        best = min(best, time.thread_time() - start)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--d-sae", type=int, default=bench.D_SAE)
    parser.add_argument("--rows", type=int, default=bench.BATCH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = bench.planted_rows(args.rows * 4)
    cfg = presets.topk(d_sae=args.d_sae, k=bench.K, d_model=bench.D_MODEL)
    result: dict[str, dict[str, float]] = {}
    for name, screen in (("exact", "off"), ("screened", "on")):
        trainer = bench.make_trainer(x, screen, cfg)
        rows = x[: args.rows]
        gemm, parts = gemm_ms(trainer, rows), shares(trainer, rows, args.steps)
        total = sum(parts.values())
        print(f"{name}: {total:.0f} ms of CPU a step, {total / gemm:.2f} encoder GEMMs of {gemm:.0f} ms")
        for part, ms in sorted(parts.items(), key=lambda kv: -kv[1]):
            print(f"  {part:<62}{ms:7.1f} ms  {ms / gemm:6.3f} GEMM")
        result[name] = {part: round(ms / gemm, 4) for part, ms in parts.items()} | {
            "total": round(total / gemm, 3)
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
