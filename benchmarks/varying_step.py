"""The training step of SAEs of varying L0 (and of TopK), exact and with bf16 screening, in units of the encoder product.

In one run and in turns (product, exact, screened, next SAE ...): d_model 576, batch 2,048, a mean L0 of 32, AuxK with 5 % of
the latents dead where the SAE has it. Thresholds of JumpReLU and GBA are put where the mean L0 of the rows is 32, as
late in training, with the learning rate so small that they stay.

    python benchmarks/varying_step.py [--d-sae 16384 2304] [--pairs 5] [--threads 1]

exact, screened     step / torch.addmm of the encoder into fresh memory, float32, medians of pairs
gain                screened / exact
computed            entries computed in float32 by one screened step / entries kept
differing           share of the kept entries of one batch on which the two disagree: ties within the last bits
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.bench_train import BATCH, D_MODEL, K, interleave, make_dead, planted_rows
from saes import presets, selection
from saes.config import SAEConfig
from saes.gba import set_bias
from saes.screening import Screen
from saes.selection import threshold_for
from saes.sources import Moments
from saes.top_products import Scratch
from saes.train_config import TrainConfig
from saes.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "batch_topk": {"k": K},
    "batch_abs_topk": {"k": K},
    "matryoshka": {"k": K},
    "jumprelu": {"auxk": 1 / 32},
    "gba": {},
}


def trainer_of(x: torch.Tensor, cfg: SAEConfig, screen: str) -> Trainer:
    train = TrainConfig(steps=10_000, batch_size=BATCH, lr=1e-9, screen=screen, dead_window_tokens=10**12)  # type: ignore[arg-type]
    trainer = Trainer(cfg, train, Moments(len(x), x.norm(dim=1).mean().item()), x.device)
    trainer.start(x)
    if cfg.auxk:
        make_dead(trainer)
    if cfg.activation in ("jumprelu", "relu"):
        s, rows = trainer.sae, trainer.input_rows(x[:BATCH])
        with torch.no_grad():
            # JumpReLU stores what is within half a bandwidth below the threshold too
            theta = threshold_for(rows - s.centre, s.W_enc, s.b_enc, K, signed=False)
            if trainer.bias is None:
                s.threshold.fill_(theta)
            else:
                set_bias(s, slice(None), torch.full_like(s.b_enc, -theta))
    return trainer


@torch.no_grad()
def compared(exact: Trainer, x: torch.Tensor) -> tuple[float, float]:
    """Entries computed by kept ones, and the share on which the screened and the exact selection of one batch differ."""
    s, xc = exact.sae, exact.input_rows(x) - exact.sae.centre
    entries, computed, real = [], [0], selection.row_dots
    weights = xc, s.W_enc.detach(), s.b_enc.detach()
    screens, scratch = [Screen(enabled=on) for on in (False, True, True)], Scratch()
    screens[2] = screens[1]  # a second time: with the bound of the batch before
    for screen in screens:
        computed.clear()
        selection.row_dots = lambda *a: computed.append(len(a[2])) or real(*a)  # type: ignore[func-returns-value]
        if s.cfg.fixed_k:
            rows = torch.arange(len(x))[:, None] * s.cfg.d_sae
            entries.append((screen(*weights, K, signed=s.cfg.signed)[1] + rows).view(-1))
            continue
        if s.cfg.has_k:
            found = screen.largest(*weights, len(x) * s.cfg.k, signed=s.cfg.signed, scratch=scratch)
        else:
            found = screen.above(*weights, s.threshold.detach(), scratch=scratch, dense_share=1 / 8)
        assert found is not None
        entries.append(found.places(s.cfg.d_sae))
    selection.row_dots = real
    both = int(torch.isin(entries[0], entries[2]).sum())
    return sum(computed) / len(entries[2]), 1 - both / max(len(e) for e in entries)


def table(x: torch.Tensor, d_sae: int, pairs: int) -> dict[str, dict[str, float]]:
    batch, fns = x[:BATCH], {}
    out: dict[str, dict[str, float]] = {}
    trainers = {}
    for name, more in KINDS.items():
        cfg = getattr(presets, name)(d_sae=d_sae, d_model=D_MODEL, **more)
        for screen in ("off", "on"):
            trainers[name, screen] = t = trainer_of(x, cfg, screen)
            fns[name, screen] = lambda t=t: t.step(batch, 0)
    w = trainers["batch_topk", "off"].sae
    gemm: dict[Any, Callable[[], Any]] = {
        "gemm": lambda: torch.addmm(w.b_enc.detach(), batch, w.W_enc.detach().T)
    }
    times = interleave(gemm | fns, pairs)
    for name in KINDS:
        t = trainers[name, "on"]
        exact, screened = (
            statistics.median(a / b for a, b in zip(times[name, on], times["gemm"], strict=True))
            for on in ("off", "on")
        )
        gain = statistics.median(a / b for a, b in zip(times[name, "on"], times[name, "off"], strict=True))
        out[name] = {
            "exact": round(exact, 3),
            "screened": round(screened, 3),
            "gain": round(gain, 3),
            "l0": round(t.metrics()["l0"], 1),
        }
        ratio, differing = compared(trainers[name, "off"], batch)
        out[name] |= {"computed": round(ratio, 2), "differing": differing}
        state = t.screen.state()
        print(f"d_sae {d_sae:>6,} {name:<15} exact {exact:.2f}  screened {screened:.2f}  gain {gain:.2f}  "
              f"L0 {out[name]['l0']}  misses {state['misses']} of {state['audits']} audits, crowded {state['crowded']}, "
              f"computed {ratio:.2f}, differing {differing:.1e}", flush=True)  # fmt: skip
    print(f"  encoder product {statistics.median(times['gemm']) * 1e3:.0f} ms", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-sae", type=int, nargs="+", default=[16_384, 2_304])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = planted_rows(BATCH * 4)
    print(json.dumps({str(n): table(x, n, args.pairs) for n in args.d_sae}))


if __name__ == "__main__":
    main()
