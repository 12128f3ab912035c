"""The full TopK training step against its floor, the encoder GEMM, and beside the steps of three other libraries.

Step: forward, AuxK with 5 % of the latents dead, backward, decoder projection, clip, fused Adam, renormalisation,
dead tracking. Median over interleaved rounds (GEMM, exact, screened, peer, peer ...), so machine noise hits all alike;
peers run in processes of their own, one computing at a time (peers/README.md).

    python benchmarks/bench_train.py [--pairs 15] [--peers .venv-peers | --no-peers] [--varying] [--growth]

step_over_gemm           exact step / torch.addmm of the encoder, float32
step_screened_over_gemm  step with bf16 screening / the same (None where the start-up probe leaves screening off)
gemm_bf16_over_gemm      the bf16 GEMM / the same: what no screened step can go below
speedup_vs_<peer>        the peer's step / the step as it is by default (screened where that gains); with _exact: / the exact step
speedup_vs_dense         dense autograd step (scatter, two GEMMs forward, Adam) / the step as it is by default
curves                   held-out FVU after equal tokens, from each trainer's own start, at its best rate of CURVE_LRS
curve_lrs                that learning rate
eight_vs_multisae, data_share, memory_growth_vs_saelens  train_eight.py, train_peers.py
<preset>_over_gemm       with --varying: the step of an SAE of varying L0, float32
growth                   with --growth alone: sizes d_sae 4k to 131k and d_model 256 to 2,304, with FLOP and byte bounds
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.train_eight import data_share, versus_multisae
from benchmarks.train_growth import growth
from benchmarks.train_peers import Peer, Rows, curves, environment, median_ratio, memory_growth
from saes import presets
from saes.config import SAEConfig
from saes.kernels import Dead
from saes.selection import threshold_for
from saes.sources import Moments
from saes.train_config import TrainConfig
from saes.trainer import Trainer

D_MODEL, D_SAE, K, BATCH = 576, 16_384, 32, 2_048
CURVE_LRS = (1e-3, 2e-3, 4e-3, 8e-3)
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


def sized(x: torch.Tensor, d_sae: int) -> Trainer:
    """An exact trainer of another size."""
    return make_trainer(x, "off", presets.topk(d_sae=d_sae, k=K, d_model=x.shape[1]))


def make_dead(trainer: Trainer) -> None:
    """Offer 5 % of the latents to AuxK on every step; the window is so long that no refresh takes them away."""
    d_sae = trainer.cfg.d_sae
    ids = torch.randperm(d_sae, generator=torch.Generator().manual_seed(1))
    ids = ids[: int(d_sae * DEAD_SHARE)].sort().values
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
    own = fn()
    return own if isinstance(own, float) else time.perf_counter() - start


def interleave(fns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function (its own, where it returns them), taken in turns; two warm-up rounds are dropped."""
    out: dict[str, list[float]] = {name: [] for name in fns}
    for i in range(rounds + 2):
        for name, fn in fns.items():
            seconds = timed(fn)
            if i >= 2:
                out[name].append(seconds)
    return out


def planted_rows(n: int, atoms: int = 2048, active: float = 41.0, noise: float = 0.5) -> torch.Tensor:
    """Sparse sums of random directions with noise, scaled to a mean norm of sqrt(d_model)."""
    gen = torch.Generator().manual_seed(1000)  # not a seed of an initialisation: it would start at the truth
    directions = torch.randn(atoms, D_MODEL, generator=gen)
    fires = torch.rand(n, atoms, generator=gen) < active / atoms
    z = torch.randn(n, atoms, generator=gen).relu() * fires
    x = z @ directions + torch.randn(n, D_MODEL, generator=gen) * noise
    return x * (D_MODEL**0.5 / x.norm(dim=1).mean())


def steps(x: torch.Tensor, args: argparse.Namespace) -> tuple[dict[str, Any], Trainer]:
    """Ours against the GEMM and the dense step, and the peers' steps, all in one interleaved run."""
    batch = x[:BATCH]
    exact, auto = make_trainer(x, "off"), make_trainer(x, "auto")
    weights = exact.sae.W_enc.detach(), exact.sae.b_enc.detach()
    half = [t.bfloat16() for t in (*weights, batch)]
    fns: dict[str, Callable[[], Any]] = {
        "gemm": lambda: torch.addmm(weights[1], batch, weights[0].T),
        "gemm_bf16": lambda: torch.addmm(half[1], half[2], half[0].T),
        "exact": lambda: exact.step(batch, 0),
    }
    if auto.screen.enabled:
        fns["screened"] = lambda: auto.step(batch, 0)
    say(f"d_model {D_MODEL}, d_sae {D_SAE}, k {K}, batch {BATCH}, {torch.get_num_threads()} threads, "
        f"{DEAD_SHARE:.0%} dead, screening {'on' if auto.screen.enabled else 'off'}")  # fmt: skip
    with contextlib.ExitStack() as open_peers, tempfile.TemporaryDirectory() as folder:
        for name in peer_names(args):
            peer = Peer(name, args.python, **job(Rows(x, Path(folder))))
            open_peers.callback(peer.close)
            fns[name] = peer.seconds  # its own clock: what passes between the processes is not counted
        t = interleave(fns, args.pairs)
    d = interleave({"step": lambda: auto.step(batch, 0), "dense": dense_of(exact, batch)}, args.dense_pairs)
    for name, seconds in (t | {"dense autograd": d["dense"]}).items():
        say(f"  {name:<22}{statistics.median(seconds) * 1e3:8.0f} ms")
    ours = "screened" if "screened" in t else "exact"
    result: dict[str, Any] = {
        "step_over_gemm": round(median_ratio(t["exact"], t["gemm"]), 3),
        "step_screened_over_gemm": round(median_ratio(t["screened"], t["gemm"]), 3) if ours == "screened" else None,
        "gemm_bf16_over_gemm": round(median_ratio(t["gemm_bf16"], t["gemm"]), 3),
        "speedup_vs_dense": round(median_ratio(d["dense"], d["step"]), 2),
    }  # fmt: skip
    for name in peer_names(args):
        result[f"speedup_vs_{name}"] = round(median_ratio(t[name], t[ours]), 2)
        result[f"speedup_vs_{name}_exact"] = round(median_ratio(t[name], t["exact"]), 2)
    result |= {"screening": auto.screen.enabled, "audit_misses": auto.screen.misses}
    return result, auto


def dense_of(trainer: Trainer, batch: torch.Tensor) -> Callable[[], Any]:
    dense = DenseStep(trainer)
    return lambda: dense.step(batch)


def job(rows: Rows, **more: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {
        "data": str(rows.path), "d_sae": D_SAE, "k": K, "batch": BATCH, "lr": 1e-4, "dead": DEAD_SHARE, "threads": threads
    } | more  # fmt: skip


def peer_names(args: argparse.Namespace) -> list[str]:
    return [] if args.no_peers else ["saelens", "dictionary_learning", "sparsify"]


def beside_peers(x: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Loss after equal tokens, growth of memory, and eight SAEs at once."""
    with tempfile.TemporaryDirectory() as folder:
        # fewer atoms than latents, fewer at a time than k: something that can be learnt in so few tokens
        learnable = Rows(planted_rows(1024 * (args.curve_steps // 2 + 1), 1024, 16.0, 0.1), Path(folder))
        say(
            f"held-out FVU after tokens: d_sae 4096, k {K}, batch 1024, the best of {CURVE_LRS} for each trainer"
        )
        named: dict[str, dict[str, Any]] = {
            "ours-exact": {"screen": "off"},
            "ours-screened": {"screen": "on"},
        }
        named |= {name: {} for name in peer_names(args)}
        small = job(learnable, d_sae=4096, batch=1024, dead=0.0)
        out = curves(named, args.python, args.curve_steps, args.curve_steps // 5, CURVE_LRS, **small)
        rows = Rows(x, Path(folder))
        grown = memory_growth({"ours": {}, "saelens": {}}, args.python, **job(rows))
    say(
        f"memory after construction: ours +{grown['ours'] / 1e6:.0f} MB, SAELens +{grown['saelens'] / 1e6:.0f} MB"
    )
    out["memory_growth_vs_saelens"] = round(grown["ours"] / grown["saelens"], 3)
    return out | versus_multisae(args.eight_tokens, 4608, BATCH)


def say(text: str) -> None:
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=15, help="interleaved rounds (at least 15 for the record)"
    )
    parser.add_argument("--dense-pairs", type=int, default=5, help="rounds with the slow dense step")
    parser.add_argument("--curve-steps", type=int, default=100, help="steps of each loss curve")
    parser.add_argument("--eight-tokens", type=int, default=16_384, help="tokens of the eight SAEs")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="the peers' environment")
    parser.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    parser.add_argument("--varying", action="store_true", help="also SAEs whose L0 varies, at a mean L0 of K")
    parser.add_argument("--growth", action="store_true", help="only how the cost grows with the sizes")
    args = parser.parse_args()
    if not (args.no_peers or args.growth):
        args.python = environment(args.peers)
    return args


def main() -> None:
    args = arguments()
    if args.growth:
        table = growth(sized, BATCH, K, DEAD_SHARE, min(args.pairs, 3))
        print(json.dumps({"growth": table}))
        return
    x = planted_rows(BATCH * 10)
    result, trainer = steps(x, args)
    result["data_share"] = round(data_share(trainer, BATCH, 10), 4)
    say(f"the loop waits for data in {result['data_share']:.1%} of its time")
    if not args.no_peers:
        result |= beside_peers(x, args)
    if args.varying:
        trainers, batch = varying(x), x[:BATCH]
        fns: dict[str, Callable[[], Any]] = {
            name: lambda t=t: t.step(batch, 0) for name, t in trainers.items()
        }
        w = trainer.sae
        fns["gemm"] = lambda: torch.addmm(w.b_enc.detach(), batch, w.W_enc.detach().T)
        times = interleave(fns, args.pairs)
        result |= {
            f"{name}_over_gemm": round(median_ratio(times[name], times["gemm"]), 3) for name in trainers
        }
    print("GPU: not measured")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
