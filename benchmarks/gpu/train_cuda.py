"""The training step on a GPU: against its encoder GEMM, against dense autograd, and its gradients against the CPU's.

    python benchmarks/gpu/train_cuda.py [--pairs 15] [--sizes 576x16384 2304x65536] [--device cuda]

Same torch operations as on the CPU. Times are medians over interleaved rounds, each ended by a device synchronisation;
TF32 is off, so the GEMM is the float32 one. Without a GPU it prints "GPU: not measured" and ends; `--device cpu` runs the
same code on the processor, to try it.

    step_over_gemm     full step (5 % of the latents dead, AuxK, projection, clip, Adam) / torch.addmm of the encoder
    dense_over_step    forward and backward by dense autograd (no AuxK, no optimiser: a lower bound) / full step
    largest_gradient_error   of W_enc and W_dec against the CPU, relative to the largest entry
    peak_mib           of the device, while the step runs
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from saes import TrainConfig, presets
from saes.kernels import Dead, sparse_step
from saes.sources import Moments
from saes.trainer import Trainer

K, BATCH, DEAD_SHARE = 32, 2_048, 0.05
PRESETS = ("topk", "abs_topk", "batch_topk")


def rows(d: int, n: int, device: torch.device) -> torch.Tensor:
    """Sparse mixtures of random directions with noise: pre-activations with a tail, as real ones have."""
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1024, generator=gen).relu() * (torch.rand(n, 1024, generator=gen) < 0.03)
    x = z @ torch.randn(1024, d, generator=gen) + 0.5 * torch.randn(n, d, generator=gen)
    return x.to(device)


def trainer_of(preset: str, x: torch.Tensor, d_sae: int) -> Trainer:
    cfg = getattr(presets, preset)(d_sae=d_sae, k=K, d_model=x.shape[1])
    config = TrainConfig(steps=10_000, batch_size=BATCH, screen="off", dead_window_tokens=10**12)
    out = Trainer(cfg, config, Moments(len(x), x.norm(dim=1).mean().item()), x.device)
    out.start(x)
    ids = torch.randperm(d_sae, generator=torch.Generator().manual_seed(1))[: int(d_sae * DEAD_SHARE)]
    out.dead = Dead(ids.to(x.device), min(out.cfg.aux_width(), len(ids)))
    out.refresh_dead = lambda: None  # type: ignore[method-assign]
    return out


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(fns: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function, taken in turns after three warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for i in range(rounds + 3):
        for name, fn in fns.items():
            synchronise(device)
            start = time.perf_counter()
            fn()
            synchronise(device)
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def dense_step(t: Trainer, x: torch.Tensor) -> None:
    we, be, wd, bd = (
        p.detach().clone().requires_grad_() for p in (t.sae.W_enc, t.sae.b_enc, t.sae.W_dec, t.sae.b_dec)
    )
    u = (x - bd) @ we.T + be
    top = u.topk(K, dim=1, sorted=False)
    z = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
    ((z @ wd + bd - x) ** 2).sum().backward()


def gradient_error(d: int, device: torch.device) -> float:
    """Largest difference of a weight gradient between `device` and the CPU, relative to the largest entry."""
    gen = torch.Generator().manual_seed(0)
    shapes = ((64, d), (512, d), (512,), (512, d), (d,))
    made = [torch.randn(s, generator=gen) for s in shapes]
    grads = []
    for place in (torch.device("cpu"), device):
        leaves = [m.to(place).requires_grad_() for m in made]
        out = sparse_step(*leaves, k=8, dead=Dead(torch.arange(32, device=place), 8))
        (((out.x_hat - leaves[0]) ** 2).sum() + (out.e_hat**2).sum()).backward()
        grads.append([leaf.grad.cpu() for leaf in (leaves[1], leaves[3]) if leaf.grad is not None])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*grads, strict=True))


def measure(d: int, d_sae: int, device: torch.device, rounds: int) -> dict[str, float]:
    x = rows(d, 4 * BATCH, device)
    batch = x[:BATCH]
    trainers = {name: trainer_of(name, x, d_sae) for name in PRESETS}
    first = trainers["topk"]
    weights = (first.sae.b_enc.detach().clone(), first.sae.W_enc.detach().clone())
    fns: dict[str, Callable[[], Any]] = {"gemm": lambda: torch.addmm(weights[0], batch, weights[1].T)}
    fns |= {name: partial(t.step, batch, 0) for name, t in trainers.items()}
    fns["dense"] = lambda: dense_step(first, batch)
    seconds = medians(fns, rounds, device)
    out = {"gemm_ms": seconds["gemm"] * 1e3}
    out |= {f"{name}_over_gemm": seconds[name] / seconds["gemm"] for name in PRESETS}
    out |= {"step_over_gemm": out["topk_over_gemm"], "dense_over_step": seconds["dense"] / seconds["topk"]}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        first.step(batch, 0)
        out["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return {name: round(value, 3) for name, value in out.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--sizes", nargs="+", default=["576x16384", "2304x65536"], help="d_model x d_sae")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("GPU: not measured (torch sees no CUDA device)")
        print(json.dumps({"gpu": None}))
        return 0
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (no GPU figure)"
    result: dict[str, Any] = {"gpu": name, "torch": torch.__version__}
    print(f"{name}, torch {torch.__version__}, batch {BATCH}, k {K}")
    result["largest_gradient_error"] = gradient_error(64, device)
    print(f"gradients against the CPU: largest relative error {result['largest_gradient_error']:.1e}")
    for size in args.sizes:
        d, d_sae = (int(v) for v in size.split("x"))
        result[size] = measure(d, d_sae, device, args.pairs)
        print(f"{size}: {result[size]}", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
