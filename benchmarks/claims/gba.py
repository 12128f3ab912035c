"""Group bias adaptation (arXiv 2506.14002): is it free of tuning, does resonance exist, do seeds agree?

    python benchmarks/claims/gba.py --workspace WORKSPACE [--parts imbalanced resonance store] [--full]

Registered before the run, seeds 0, 1, 2 (0-4, and four times the steps on the store, with --full); smallest effect that counts, verdicts as in _common.py:

    imbalanced  S2-rows (n 128, d 42; half of the rows have 3 active features, half 20), 384 latents, rows of unit norm
        recovered           FRR@.8 of GBA - 0.9                                            at least 0.05   (paper 1.00)
        against_topk        FRR@.9: GBA - mean of TopK over K = 3, 6, 12, 24               at least 0.10
        grid_against_grid   FRR@.9: mean of GBA over HTF = .05, .1, .2, .4 - that mean of TopK (added after the runs: the
                            default HTF, .1, comes from trials on this very mixture)       at least 0.10
        against_best_k      FRR@.9: GBA - TopK at the best of these K                      at least 0.01
        against_one_group   FRR@.9: GBA - best single group, p = 3/128, 11.5/128, 20/128   at least 0.05
        less_sensitive      regret(TopK) - regret(GBA), regret = best - mean FRR@.9 over settings a factor 8 apart:
                            K = 3, 6, 12, 24 and HTF = .05, .1, .2, .4                     at least 0.10
    resonance   S1 (every feature fires on f = 3/128 of the rows), one group with target p = f/8, f/4, ... 8f
        peak                2 - |log2(p with the largest MMCS / f)|                        at least 1: within a factor 2
        too_frequent        MMCS: p = f minus p = 8f                                       at least 0.10
        too_rare            MMCS: p = f minus p = f/8                                      at least 0.05
    store       SmolLM2 residuals, 2,304 latents; TopK gets the L0 that GBA came to, each its best learning rate (STORE_LR)
        parity              0.05 - |FVU(GBA) / FVU(TopK) - 1|                              above 0
        consistent          mean cosine to the nearest latent of another seed: GBA - TopK  at least 0.02
        less_sensitive      fall of that cosine when the other seed's HTF or K is halved or doubled: TopK - GBA
                                                                                           at least 0.01

A target frequency was tried only if the rule converged: settings with over 5 % of latents above target are named and left
out. The paper's toy has unknown magnitudes, width and steps: ranks are compared, not values. Its TopK recovers 98 % at
K = 20; GBA with a wrong range 4 %.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _common import Report, arguments, heldout_rows, judge, parsed, quality, scratch_store

from saes import Suite, TrainConfig, make_suite, presets, train
from saes.config import SAEConfig
from saes.gba import CONVERGED, over_target
from saes.recovery import cosines, frr, mcs_curve, mmcs, pw_mcc
from saes.sae import SAE

WIDTH, LR = 384, 3e-3
STORE_WIDTH = 2304
STORE_LR = {"gba": 8e-3, "topk": 4e-3}
"""The best held-out FVU at 1e-3, 2e-3, 4e-3, 8e-3 in 409,600 tokens, seed 0: GBA .357, .322, .299, .291; TopK (k 27) .261,
.238, .232, .250."""
PARTS = ("imbalanced", "resonance", "store")
KS, HTFS = (3, 6, 12, 24), (0.05, 0.1, 0.2, 0.4)
F1 = 3 / 128
TARGETS = tuple(F1 * 2.0**i for i in range(-3, 4))


def one_group(p: float, **other: Any) -> SAEConfig:
    """Plain bias adaptation: all latents have the same target frequency."""
    return presets.gba(d_sae=WIDTH, gba_groups=1, gba_htf=p, gba_ltf=min(p, 1e-3), space="unit", **other)


@torch.no_grad()
def scores(sae: SAE, suite: Suite, fresh: Suite) -> dict[str, float]:
    """Recovery of the suite's features; L0 and convergence on rows that training did not see."""
    fires = sae.encode(fresh.x).dense(sae.cfg.d_sae) > 0
    alive = fires.any(0)
    out = {"mmcs": mmcs(sae.W_dec, suite.V, alive=alive).recall, "l0": float(fires.float().sum(1).mean())}
    out |= {f"frr{t}": frr(sae.W_dec, suite.V, t, alive=alive) for t in (0.8, 0.9)}
    if sae.cfg.bias_rule == "gba":
        out["over_target"] = over_target(sae.cfg, fires.float().mean(0), rows=len(fresh.x))
    return out


def sweep(name: str, jobs: dict[str, SAEConfig], seeds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Every setting on the suite, all of a seed in one pass; a list over seeds."""
    found: dict[str, list[dict[str, float]]] = {key: [] for key in jobs}
    for seed in range(seeds):
        suite, fresh = make_suite(name, seed), make_suite(name, seed, n_rows=16_384, draw=1)
        config = TrainConfig(
            steps=steps, batch_size=256, lr=LR, warmup_steps=50, screen="off", seed=seed, log_every=steps
        )
        for key, result in zip(jobs, train(suite.x, list(jobs.values()), config), strict=True):
            found[key].append(scores(result.sae, suite, fresh))
            print(f"{name} seed {seed} {key}: {_line(found[key][-1])}", flush=True)
    return found


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in row.items())


def values(found: dict[str, list[dict[str, float]]], keys: Sequence[str], what: str) -> np.ndarray:
    """`[settings, seeds]`."""
    return np.array([[row[what] for row in found[key]] for key in keys])


def converged(found: dict[str, list[dict[str, float]]], keys: Sequence[str]) -> list[str]:
    """The settings of which all seeds had reached their targets."""
    good = [k for k in keys if max(row["over_target"] for row in found[k]) < CONVERGED]
    for key in sorted(set(keys) - set(good)):
        print(f"{key} has not converged on every seed: left out", flush=True)
    return good


def imbalanced(report: Report, seeds: int, steps: int) -> None:
    jobs = {f"K {k}": presets.topk(d_sae=WIDTH, k=k, space="unit") for k in KS}
    jobs |= {f"HTF {p}": presets.gba(d_sae=WIDTH, gba_htf=p, space="unit") for p in HTFS}
    jobs |= {f"one {p:.3f}": one_group(p) for p in (3 / 128, 11.5 / 128, 20 / 128)}
    found = sweep("S2-rows", jobs, seeds, steps)
    report.data["imbalanced"] = found
    judge_imbalanced(report, found, seeds)


def judge_imbalanced(report: Report, found: dict[str, list[dict[str, float]]], seeds: int) -> None:
    best_of = lambda keys: found[max(keys, key=lambda k: values(found, [k], "frr0.9").mean())]  # noqa: E731
    gba, ks = found["HTF 0.1"], [f"K {k}" for k in KS]
    htfs = converged(found, [f"HTF {p}" for p in HTFS])
    ones = converged(found, [k for k in found if k.startswith("one")])
    nine = values(found, ["HTF 0.1"], "frr0.9")[0]
    topk = values(found, ks, "frr0.9")
    report.claim(
        "imbalanced.recovered", judge([r["frr0.8"] - 0.9 for r in gba], 0.05), seeds=seeds, paper_figure=1.0,
        ours=float(np.mean([r["frr0.8"] for r in gba])), why="FRR@.8 of GBA at the default range; interval of FRR - 0.9",
    )  # fmt: skip
    report.claim(
        "imbalanced.against_topk", judge(nine - topk.mean(0), 0.1), seeds=seeds,
        why=f"FRR@.9 {nine.mean():.3f} against {', '.join(f'K {k}: {v:.3f}' for k, v in zip(KS, topk.mean(1)))}",
    )  # fmt: skip
    every = values(found, [f"HTF {p}" for p in HTFS], "frr0.9")
    report.claim(
        "imbalanced.grid_against_grid", judge(every.mean(0) - topk.mean(0), 0.1), seeds=seeds,
        why=f"FRR@.9, means over {', '.join(map(str, HTFS))} and over K {', '.join(map(str, KS))}: {every.mean():.3f} "
        f"against {topk.mean():.3f}",
    )  # fmt: skip
    report.claim(
        "imbalanced.against_best_k",
        judge([a - b["frr0.9"] for a, b in zip(nine, best_of(ks), strict=True)], 0.01),
        seeds=seeds,
        why=f"the best K recovers {values(found, ks, 'frr0.9').mean(1).max():.3f}",
    )
    if ones:
        report.claim(
            "imbalanced.against_one_group",
            judge([a - b["frr0.9"] for a, b in zip(nine, best_of(ones), strict=True)], 0.05), seeds=seeds,
            why="one group: " + ", ".join(f"p {k[4:]}: {values(found, [k], 'frr0.9').mean():.3f}" for k in ones),
        )  # fmt: skip
    if len(htfs) < 2:
        return
    grid = values(found, htfs, "frr0.9")
    regret = [a.mean(1).max() - a.mean(0) for a in (topk, grid)]
    report.claim(
        "imbalanced.less_sensitive", judge(regret[0] - regret[1], 0.1), seeds=seeds,
        why=f"regret of TopK {regret[0].mean():.3f}, of GBA {regret[1].mean():.3f} over {', '.join(htfs)}: "
        f"FRR@.9 {', '.join(f'{v:.3f}' for v in grid.mean(1))}",
    )  # fmt: skip


def resonance(report: Report, seeds: int, steps: int) -> None:
    keys = {f"p {p / F1:g}f": one_group(p) for p in TARGETS}
    found = sweep("S1", keys, seeds, steps)
    report.data["resonance"] = found
    good = converged(found, list(keys))
    ratio = {key: p / F1 for key, p in zip(keys, TARGETS, strict=True)}
    table = ", ".join(f"{k[2:]}: {values(found, [k], 'mmcs').mean():.3f}" for k in good)
    if not good:
        return
    grid = values(found, good, "mmcs")
    peaks = [2 - abs(math.log2(ratio[good[i]])) for i in grid.argmax(0)]
    report.claim("resonance.peak", judge(peaks, 1.0), seeds=seeds, why=f"MMCS at p = {table}")
    for name, far, effect in (("too_frequent", "p 8f", 0.1), ("too_rare", "p 0.125f", 0.05)):
        if {far, "p 1f"} <= set(good):
            fall = values(found, ["p 1f"], "mmcs")[0] - values(found, [far], "mmcs")[0]
            report.claim(
                f"resonance.{name}", judge(fall, effect), seeds=seeds, why=f"p = f minus {far}; {table}"
            )


def nearest(w: Any, others: Sequence[Any]) -> float:
    """Mean over latents of the largest cosine to one of another dictionary, averaged over those."""
    return float(np.mean([cosines(w, o).max(1).mean() for o in others]))


def on_store(report: Report, args: Any) -> None:
    with scratch_store(args.workspace) as store:
        hook = store.hooks[0]
        x = heldout_rows(store, hook)

        def fit(cfg: SAEConfig, seed: int) -> tuple[np.ndarray, dict[str, float]]:
            """Decoder rows of the latents alive on held-out rows, and quality there."""
            rule = "gba" if cfg.bias_rule == "gba" else "topk"
            config = TrainConfig(
                steps=args.steps, batch_size=args.batch, lr=STORE_LR[rule], warmup_steps=50, screen="off", seed=seed,
                log_every=args.steps,
            )  # fmt: skip
            sae = train(store, [cfg], config, hook=hook)[0].sae
            row = quality(sae, x)
            if sae.cfg.bias_rule == "gba":
                rate = torch.cat(
                    [(sae.encode(b).dense(sae.cfg.d_sae) > 0).sum(0)[None] for b in x.split(4096)]
                )
                row["over_target"] = over_target(sae.cfg, rate.sum(0) / len(x), rows=len(x))
            print(f"{hook} seed {seed} {cfg.label}: {_line(row)}", flush=True)
            with torch.no_grad():
                alive = torch.cat([sae.encode(b).indices.long().unique() for b in x.split(8192)]).unique()
            return sae.W_dec[alive].numpy(), row

        gba = [fit(presets.gba(d_sae=STORE_WIDTH), s) for s in range(args.seeds)]
        k = round(float(np.mean([row["l0"] for _, row in gba])))
        topk = [fit(presets.topk(d_sae=STORE_WIDTH, k=k), s) for s in range(args.seeds)]
        off = {
            "gba": [fit(presets.gba(d_sae=STORE_WIDTH, gba_htf=p), 100 + i) for i, p in enumerate((0.05, 0.2))],
            "topk": [fit(presets.topk(d_sae=STORE_WIDTH, k=c), 100 + i) for i, c in enumerate((k // 2, 2 * k))],
        }  # fmt: skip
    compare(report, {"gba": gba, "topk": topk}, off, k)


def compare(report: Report, runs: dict[str, Any], off: dict[str, Any], k: int) -> None:
    seeds = len(runs["gba"])
    own: dict[str, list[float]] = {}
    moved: dict[str, list[float]] = {}
    for name, found in runs.items():
        w = [rows for rows, _ in found]
        own[name] = [nearest(w[i], w[:i] + w[i + 1 :]) for i in range(seeds)]
        moved[name] = [own[name][i] - nearest(w[i], [o for o, _ in off[name]]) for i in range(seeds)]
        curve = mcs_curve(w[0], w[1]) if seeds > 1 else {}
        report.data[name] = {
            "rows": [r for _, r in found], "other_settings": [r for _, r in off[name]], "mcs": own[name],
            "fall": moved[name], "pw_mcc": pw_mcc(w) if seeds > 1 else None, "mcs_curve": curve,
        }  # fmt: skip
        print(
            f"{name}: mcs {np.mean(own[name]):.4f}  pw_mcc {report.data[name]['pw_mcc']}  curve {curve}",
            flush=True,
        )
    fvu = {name: np.array([r["fvu"] for _, r in found]) for name, found in runs.items()}
    excess = fvu["gba"] / fvu["topk"] - 1
    report.claim(
        "store.parity", judge(0.05 - np.abs(excess), 0.0), seeds=seeds, ours=float(excess.mean()),
        why=f"FVU {fvu['gba'].mean():.4f} (GBA) and {fvu['topk'].mean():.4f} (TopK, k {k}); paper: about equal",
    )  # fmt: skip
    report.claim(
        "store.consistent", judge(np.subtract(own["gba"], own["topk"]), 0.02), seeds=seeds,
        why=f"mean nearest cosine {np.mean(own['gba']):.4f} (GBA) and {np.mean(own['topk']):.4f} (TopK) at L0 {k}",
    )  # fmt: skip
    report.claim(
        "store.less_sensitive", judge(np.subtract(moved["topk"], moved["gba"]), 0.01), seeds=seeds,
        why=f"fall {np.mean(moved['gba']):.4f} (HTF .05, .2) and {np.mean(moved['topk']):.4f} (K {k // 2}, {2 * k})",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, batch=1024)
    parser.add_argument("--suite-steps", type=int, help="training steps on the suites")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--judge", metavar="FILE", help="judge the mixture of an earlier output again")
    args = parsed(parser, argv, full_seeds=5)
    args.steps = args.steps or (1600 if args.full else 400)
    suite_steps = args.suite_steps or (4000 if args.full else 2000)
    report = Report("arXiv 2506.14002", args.out)
    if args.judge:
        claims = report.earlier(args.judge)
        judge_imbalanced(report, report.data["imbalanced"], len(report.data["imbalanced"]["HTF 0.1"]))
        report.keep(claims)
        report.finish()
        return 0
    if "imbalanced" in args.parts:
        imbalanced(report, args.seeds, suite_steps)
    if "resonance" in args.parts:
        resonance(report, args.seeds, suite_steps)
    if "store" in args.parts:
        on_store(report, args)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
