"""The full TopK training step against its floor, the encoder GEMM, and against a dense autograd step.

Step: forward, AuxK with 5 % of the latents dead, backward, decoder projection, clip, fused Adam, renormalisation,
dead tracking. Median over interleaved pairs (GEMM, step, GEMM, step ...) in one process, so machine noise hits both.

    python benchmarks/bench_train.py [--pairs 15] [--varying]

step_over_gemm    step / torch.addmm of the encoder, float32 (screening by bf16 where the start-up probe shows a gain)
exact_over_gemm   the same without screening
speedup_vs_dense  dense autograd step (scatter, two GEMMs forward, Adam) / step
<preset>_over_gemm  with --varying: the step of an SAE of varying L0, float32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from saes import presets
from saes.config import SAEConfig, TrainConfig
from saes.kernels import Dead
from saes.selection import threshold_for
from saes.sources import Moments
from saes.trainer import Trainer

D_MODEL, D_SAE, K, BATCH = 576, 16_384, 32, 2_048
DEAD_SHARE = 0.05


def make_trainer(x: torch.Tensor, screen: str, cfg: SAEConfig | None = None) -> Trainer:
    cfg = cfg or presets.topk(d_sae=D_SAE, k=K, d_model=D_MODEL)
    train = TrainConfig(steps=10_000, batch_size=BATCH, screen=screen, dead_window_tokens=10**12)  # type: ignore[arg-type]
    moments = Moments(len(x), x.norm(dim=1).mean().item())
    trainer = Trainer(cfg, train, moments, x.device)
    trainer.start(x)
    make_dead(trainer)
    return trainer


def varying(x: torch.Tensor) -> dict[str, Trainer]:
    """SAEs of varying L0 at a mean L0 of K; JumpReLU's threshold is put where it is K, as after training."""
    out = {
        name: make_trainer(x, "off", getattr(presets, name)(d_sae=D_SAE, d_model=D_MODEL, **more))
        for name, more in (
            ("batch_topk", {"k": K}), ("batch_abs_topk", {"k": K}), ("matryoshka", {"k": K}), ("jumprelu", {"auxk": 1 / 32})
        )
    }  # fmt: skip
    s, rows = out["jumprelu"].sae, x[:BATCH] * out["jumprelu"].scale
    with torch.no_grad():
        s.threshold.fill_(threshold_for(rows - s.b_dec, s.W_enc, s.b_enc, K, signed=False))
    return out


def make_dead(trainer: Trainer) -> None:
    """Offer 5 % of the latents to AuxK on every step; the window is so long that no refresh takes them away."""
    ids = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))[: int(D_SAE * DEAD_SHARE)]
    trainer.dead = Dead(ids, min(trainer.cfg.aux_width(), len(ids)))
    trainer.refresh_dead = lambda: None  # type: ignore[method-assign]


class DenseStep:
    """The textbook step: dense pre-activations, scatter of the top k, dense decode, autograd, the same AuxK and Adam."""

    def __init__(self, trainer: Trainer) -> None:
        self.t = trainer
        self.p = [p.detach().clone().requires_grad_() for p in trainer.sae.parameters()]
        self.opt = torch.optim.Adam(self.p, lr=1e-4, eps=6.25e-10, fused=True)

    def step(self, x: torch.Tensor) -> None:
        we, be, wd, bd = self.p
        x = x * self.t.scale
        u = (x - bd) @ we.T + be
        top = u.topk(K, dim=1, sorted=False)
        z = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
        x_hat = z @ wd + bd
        error = x_hat - x
        dead = self.t.dead
        assert dead is not None
        mask = torch.zeros(D_SAE, dtype=torch.bool).index_fill_(0, dead.ids, True)
        ud = torch.where(mask, u, -torch.inf)
        aux_top = ud.topk(dead.k_aux, dim=1, sorted=False)
        e_hat = torch.zeros_like(u).scatter(1, aux_top.indices, aux_top.values) @ wd
        e = -error.detach()
        loss = (error**2).sum() / (len(x) * self.t.variance) + ((e_hat - e) ** 2).sum() / (
            (e - e.mean(0)) ** 2
        ).sum() / 32
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        g = wd.grad
        assert g is not None
        with torch.no_grad():
            g -= (g * wd).sum(1, keepdim=True) * wd
            torch.nn.utils.clip_grad_norm_(self.p, 1.0)
            self.opt.step()
            wd /= wd.norm(dim=1, keepdim=True)


def timed(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def interleave(fns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, taken in turns; two warm-up rounds are dropped."""
    out: dict[str, list[float]] = {name: [] for name in fns}
    for i in range(rounds + 2):
        for name, fn in fns.items():
            seconds = timed(fn)
            if i >= 2:
                out[name].append(seconds)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=15, help="interleaved pairs (at least 15 for the record)"
    )
    parser.add_argument("--dense-pairs", type=int, default=5, help="pairs with the slow dense step")
    parser.add_argument(
        "--varying", action="store_true", help="also time SAEs whose L0 varies, at a mean L0 of K"
    )
    args = parser.parse_args()
    gen = torch.Generator().manual_seed(0)
    atoms = torch.randn(2048, D_MODEL, generator=gen)
    z = torch.randn(BATCH * 8, 2048, generator=gen).relu() * (
        torch.rand(BATCH * 8, 2048, generator=gen) < 0.02
    )
    x = z @ atoms + torch.randn(BATCH * 8, D_MODEL, generator=gen) * 0.5
    batch = x[:BATCH]
    auto, exact = make_trainer(x, "auto"), make_trainer(x, "off")

    def gemm() -> None:
        w = exact.sae
        torch.addmm(w.b_enc.detach(), batch, w.W_enc.detach().T)

    print(f"d_model {D_MODEL}, d_sae {D_SAE}, k {K}, batch {BATCH}, {torch.get_num_threads()} threads, "
          f"{DEAD_SHARE:.0%} dead, screening {'on' if auto.screen.enabled else 'off'} after the probe")  # fmt: skip
    t = interleave(
        {"gemm": gemm, "step": lambda: auto.step(batch, 0), "exact": lambda: exact.step(batch, 0)}, args.pairs
    )
    dense = DenseStep(exact)
    d = interleave(
        {"step": lambda: auto.step(batch, 0), "dense": lambda: dense.step(batch)}, args.dense_pairs
    )

    def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
        return statistics.median(p / q for p, q in zip(times[a], times[b], strict=True))

    result = {
        "step_over_gemm": round(ratio(t, "step", "gemm"), 3),
        "exact_over_gemm": round(ratio(t, "exact", "gemm"), 3),
        "speedup_vs_dense": round(ratio(d, "dense", "step"), 2),
        "screening": auto.screen.enabled,
        "audit_misses": auto.screen.misses,
    }
    print(f"encoder GEMM {statistics.median(t['gemm']) * 1e3:.0f} ms, step {statistics.median(t['step']) * 1e3:.0f} ms, "
          f"without screening {statistics.median(t['exact']) * 1e3:.0f} ms, "
          f"dense autograd {statistics.median(d['dense']) * 1e3:.0f} ms")  # fmt: skip
    if args.varying:
        trainers = varying(x)
        steps = {name: lambda t=t: t.step(batch, 0) for name, t in trainers.items()}
        times = interleave({"gemm": gemm} | steps, args.pairs)
        result |= {f"{name}_over_gemm": round(ratio(times, name, "gemm"), 3) for name in trainers}
    print("GPU: not measured")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
