"""BatchTopK (arXiv 2412.06410) and JumpReLU (arXiv 2407.14435) against TopK on the L0 - FVU frontier.

    python benchmarks/claims/batch_topk.py [--full]

Registered before the run (smallest effect that counts; verdicts as in _common.py): width 2,304, 3 seeds, held-out FVU and
L0 of the saved SAE (BatchTopK with its one threshold, as it is used). TopK at k = 16, 32, 64, 128 makes the curve, linear in
the logarithms; each other SAE is held against it at its own L0. All SAEs of a seed train in one pass.

    batch_topk_k<k>    FVU(TopK at this L0) / FVU(BatchTopK) - 1       at least 0.005   (paper: lower at all settings)
    jumprelu_<target>  FVU(TopK at this L0) / FVU(JumpReLU) - 1        at least 0.005   (paper: lower at all settings)
    batch_against_jumprelu_<k>   0.05 - |log of the quotient of these two FVU ratios|   above 0   (paper: BatchTopK is near JumpReLU)

k and target: 24 and 48. 300 steps; --full 1,200. JumpReLU's thresholds start at 3 standard deviations with a wide rectangle,
since a short run moves them little; a long run (--full) is the fairer one for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from _common import Difference, Report, arguments, at_l0, heldout_rows, judge, parsed, quality, scratch_store

from saes import TrainConfig, presets, train
from saes.config import SAEConfig

LR = 2e-3
CURVE = (16, 32, 64, 128)
TARGETS = (24, 48)


def configs(width: int, targets: Sequence[int]) -> dict[str, SAEConfig]:
    out = {f"topk_k{k}": presets.topk(d_sae=width, k=k) for k in CURVE}
    out |= {f"batch_topk_k{k}": presets.batch_topk(d_sae=width, k=k) for k in targets}
    return out | {
        f"jumprelu_{k}": presets.jumprelu(
            d_sae=width, l0=0.1, l0_target=k, threshold_init=3.0, bandwidth=0.5, name=f"jumprelu-{k}"
        )
        for k in targets
    }


def gains(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """FVU of TopK's curve at the L0 of each other SAE, over the FVU of that SAE, less 1."""
    curve = [(v["l0"], v["fvu"]) for name, v in scores.items() if name.startswith("topk")]
    others = {name: v for name, v in scores.items() if not name.startswith("topk")}
    return {name: at_l0(curve, v["l0"]) / v["fvu"] - 1 for name, v in others.items()}


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(arguments(__doc__), argv)
    args.steps = args.steps or (1200 if args.full else 300)
    report = Report("BatchTopK (arXiv 2412.06410), JumpReLU (arXiv 2407.14435)", args.out)
    found: list[dict[str, dict[str, float]]] = []
    with scratch_store(args.workspace) as store:
        rows = heldout_rows(store, store.hooks[0])
        named = configs(4 * rows.shape[1], TARGETS)
        for seed in range(args.seeds):
            config = TrainConfig(
                steps=args.steps,
                batch_size=args.batch,
                lr=LR,
                warmup_steps=50,
                seed=seed,
                log_every=args.steps,
            )
            results = train(store, list(named.values()), config, hook=store.hooks[0])
            found.append({name: quality(r.sae, rows) for name, r in zip(named, results, strict=True)})
    report.data = {name: {m: [s[name][m] for s in found] for m in ("l0", "fvu", "alive")} for name in named}
    report.data["settings"] = {"steps": args.steps, "batch": args.batch, "lr": LR}
    over = [gains(scores) for scores in found]
    for name in over[0]:
        values = [g[name] for g in over]
        l0, fvu = ([round(s[name][m], 4) for s in found] for m in ("l0", "fvu"))
        judged, why = judge(values, 0.005), f"L0 {l0}, FVU {fvu}"
        if any(math.isnan(v) for v in values):
            judged, why = (
                Difference(math.nan, (-math.inf, math.inf), "underpowered"),
                f"{why}: outside TopK's curve",
            )
        report.claim(name, judged, seeds=args.seeds, why=why)
    for k in TARGETS:
        if any(math.isnan(g[name]) for g in over for name in (f"batch_topk_k{k}", f"jumprelu_{k}")):
            continue
        near = [0.05 - abs(math.log((1 + g[f"batch_topk_k{k}"]) / (1 + g[f"jumprelu_{k}"]))) for g in over]
        report.claim(
            f"batch_against_jumprelu_{k}",
            judge(near, 0.0),
            seeds=args.seeds,
            why="distance of the two ratios",
        )
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
