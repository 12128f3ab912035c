"""Matryoshka SAEs (arXiv 2503.17547): does nesting stop a child from absorbing its parent, and what does it cost?

    python benchmarks/claims/matryoshka.py [--full]

Registered before the run (smallest effect that counts; verdicts as in _common.py):

    hierarchy  5 seeds, S6: 16 parents with 4 children each, a child fires only with its parent; width 80, k 3, 2,000 steps
        absorption        BatchTopK - Matryoshka                         at least 0.10   (paper 0.49 -> 0.05, Gemma-2-2B)
        children          children with cos >= 0.9 (an absorbing latent holds its parent's direction too):
                          Matryoshka - BatchTopK                         at least 0.10
    store      3 seeds, width 2,304, k = 32, 500 steps (--full 1,500), held-out FVU
        fvu_cost          FVU(Matryoshka) / FVU(BatchTopK) - 1           at least 0.01   (nesting is not free)

Absorption: of the rows on which a child is active, the share on which no latent near its parent (cos >= 0.7, or, where
there is none, the nearest) fires. It is 1 - the recall of the parent where it matters, and needs no probe: the truth is known.
Prefixes on S6 are 16, 48, 80 (parents first would be the right order, which the SAE has to find); the paper's on the store.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from _common import Report, arguments, heldout_rows, judge, one_thread, parsed, quality, scratch_store

from saes import Suite, TrainConfig, make_suite, presets, train
from saes.config import SAEConfig
from saes.recovery import cosines, frr, mcc
from saes.sae import SAE

K, LR = 32, 2e-3
NEAR = 0.7


@torch.no_grad()
def absorption(sae: SAE, suite: Suite, near: float = NEAR) -> float:
    """Share of (row, active child) pairs on which no latent of the child's parent fires."""
    assert suite.parent is not None
    fires = sae.encode(suite.x).dense(sae.cfg.d_sae) > 0
    cos = torch.from_numpy(cosines(sae.W_dec, suite.V))
    cos[~fires.any(0)] = -1.0
    missed = total = 0
    for child in (suite.parent >= 0).nonzero()[:, 0].tolist():
        on = suite.supports[:, child]
        of_parent = cos[:, suite.parent[child]]
        latents = of_parent >= min(near, float(of_parent.max()))
        missed += int((~fires[on][:, latents].any(1)).sum())
        total += int(on.sum())
    return missed / max(total, 1)


def hierarchy(report: Report, seeds: int, steps: int) -> None:
    found: dict[str, list[dict[str, float]]] = {"batch_topk": [], "matryoshka": []}
    for seed in range(seeds):
        suite, fresh = (make_suite("S6", seed, n_rows=n, draw=i) for i, n in enumerate((32_768, 8_192)))
        assert suite.parent is not None
        n, parents = len(suite.V), int((suite.parent < 0).sum())
        configs: list[SAEConfig] = [
            presets.batch_topk(d_sae=n, k=3), presets.matryoshka(d_sae=n, k=3, matryoshka=(parents, 3 * parents))
        ]  # fmt: skip
        config = TrainConfig(
            steps=steps, batch_size=256, lr=6e-3, warmup_steps=50, seed=seed, screen="off", dead_window_tokens=25_600
        )  # fmt: skip
        for name, result in zip(found, train(suite.x, configs, config), strict=True):
            w = result.sae.W_dec
            found[name].append({
                "absorption": absorption(result.sae, fresh), "parents": frr(w, suite.V[:parents]),
                "children": frr(w, suite.V[parents:]), "mcc": mcc(w, suite.V), "fvu": quality(result.sae, fresh.x)["fvu"],
            })  # fmt: skip
    report.data["S6"] = {name: {m: [r[m] for r in runs] for m in runs[0]} for name, runs in found.items()}
    mean = {n: {m: round(sum(r[m] for r in v) / len(v), 3) for m in v[0]} for n, v in found.items()}
    for name, sign, paper in (
        ("absorption", 1, {"batch_topk": 0.49, "matryoshka": 0.05}),
        ("children", -1, None),
    ):
        gain = [
            sign * (b[name] - m[name]) for b, m in zip(found["batch_topk"], found["matryoshka"], strict=True)
        ]
        report.claim(name, judge(gain, 0.10), seeds=seeds, why=str(mean), paper_figure=paper)


def cost(report: Report, store: Any, args: Any) -> None:
    """What nesting costs in reconstruction at equal k."""
    rows = heldout_rows(store, store.hooks[0])
    width, fvu = 4 * rows.shape[1], {"batch_topk": [], "matryoshka": []}  # type: ignore[var-annotated]
    for seed in range(args.seeds):
        config = TrainConfig(
            steps=args.steps, batch_size=args.batch, lr=LR, warmup_steps=50, seed=seed, log_every=args.steps
        )
        configs = [presets.batch_topk(d_sae=width, k=K), presets.matryoshka(d_sae=width, k=K)]
        for name, result in zip(fvu, train(store, configs, config, hook=store.hooks[0]), strict=True):
            fvu[name].append(quality(result.sae, rows))
    report.data["store"] = fvu
    ratio = [m["fvu"] / b["fvu"] - 1 for b, m in zip(fvu["batch_topk"], fvu["matryoshka"], strict=True)]
    mean = {n: {m: round(sum(r[m] for r in v) / len(v), 4) for m in ("fvu", "l0")} for n, v in fvu.items()}
    report.claim(
        "fvu_cost", judge(ratio, 0.01), seeds=args.seeds, why=f"{mean}, {args.steps * args.batch:,} tokens"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--suite-steps", type=int, default=2000, help="training steps on S6")
    args = parsed(parser, argv)
    args.steps = args.steps or (1500 if args.full else 500)
    report = Report("Matryoshka SAEs (arXiv 2503.17547)", args.out)
    with one_thread():
        hierarchy(report, max(5, args.seeds), args.suite_steps)
    with scratch_store(args.workspace) as store:
        cost(report, store, args)
    report.data["settings"] = {"steps": args.steps, "batch": args.batch, "lr": LR}
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
