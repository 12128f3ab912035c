"""Recovery of known dictionaries: every suite of saes/synthetic.py with the presets that fit it, over seeds.

    python benchmarks/bench_synthetic.py [--suites S0 S4] [--seeds 5] [--steps 1000]

All SAEs of a suite and seed train in one pass over 32,768 rows and are scored on 4,096 fresh rows of the same
dictionary. Printed: mean (smallest to largest) over the seeds. tests/test_synthetic.py takes its thresholds from these
five seeds; docs/synthetic.md has the table. S9 is trained in plain space and in the whitened one (space="aip"); both
are judged by cosines in the whitened space.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from saes import TrainConfig, make_suite, presets, recovery_scores, train
from saes.aip import SecondMoment
from saes.config import SAEConfig
from saes.synthetic import SUITES

ROWS, FRESH, BATCH, LR = 32_768, 4_096, 256, 6e-3
SHOWN = (
    "mmcs",
    "mmcs_precision",
    "mcc",
    "frr",
    "support_f1",
    "coefficient_correlation",
    "alive",
    "fvu",
    "l0",
)


def configs(name: str) -> dict[str, SAEConfig]:
    """SAEs that suit a suite: k is its mean number of active features, the width its number of features."""
    suite, _ = SUITES[name]
    n, k = suite.n, {"S2": 12, "S2-rows": 12, "S3": 2}.get(name, suite.l0)
    if name == "S4":
        return {
            "abs_topk": presets.abs_topk(d_sae=n, k=k, name="abs_topk"),
            "topk": presets.topk(d_sae=n, k=k, name="topk"),
            "topk 2n": presets.topk(d_sae=2 * n, k=k, name="topk_2n"),
        }
    if name == "S5":
        return {
            "abs_topk n/2": presets.abs_topk(d_sae=n // 2, k=k, name="abs_topk"),
            "topk n/2": presets.topk(d_sae=n // 2, k=k, name="topk"),
            "topk n": presets.topk(d_sae=n, k=k, name="topk_n"),
        }
    learnt: dict[str, Any] = {"l0": 0.02, "l0_target": k, "threshold_init": 1.0, "bandwidth": 0.5}
    out = {
        "topk": presets.topk(d_sae=n, k=k, name="topk"),
        "batch_topk": presets.batch_topk(d_sae=n, k=k, name="batch_topk"),
        "jumprelu": presets.jumprelu(d_sae=n, name="jumprelu", **learnt),
    }
    if not name.startswith("S9"):
        return out
    aip = {"topk, aip": dataclasses.replace(out["topk"], space="aip", name="topk_aip")}
    return out | aip | {"threshold_atoms": presets.threshold_atoms(d_sae=n, name="atoms", **learnt)}


def run(
    name: str, seed: int, cases: dict[str, SAEConfig], *, steps: int = 1000
) -> dict[str, dict[str, float]]:
    """Scores of each case on fresh rows of the suite's dictionary of this seed."""
    suite, fresh = (make_suite(name, seed, n_rows=n, draw=i) for i, n in enumerate((ROWS, FRESH)))
    more: dict[str, Any] = {"map": whitening(suite.x)} if name.startswith("S9") else {}
    config = TrainConfig(
        steps=steps, batch_size=BATCH, lr=LR, warmup_steps=50, seed=seed, screen="off",
        dead_window_tokens=100 * BATCH, log_every=steps,
    )  # fmt: skip
    results = train(suite.x, list(cases.values()), config)
    return {k: recovery_scores(r.sae, fresh, **more) for k, r in zip(cases, results, strict=True)}


def whitening(x: torch.Tensor) -> torch.Tensor:
    """The root of the atomic inner product: cosines are taken after it."""
    moment = SecondMoment(x.shape[1])
    moment.add(x)
    return moment.aip().root


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown row a case: mean (smallest to largest) of the measures of SHOWN."""
    lines = []
    for case, seeds in scores.items():
        cells = []
        for name in SHOWN:
            values = [s[name] for s in seeds]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the SAEs are tiny: a second thread costs more than it computes
    print(f"| suite, SAE | {' | '.join(SHOWN)} |\n|{'---|' * (len(SHOWN) + 1)}")
    result: dict[str, Any] = {"seeds": args.seeds, "steps": args.steps, "batch": BATCH, "lr": LR}
    for name in args.suites:
        runs = [run(name, seed, configs(name), steps=args.steps) for seed in range(args.seeds)]
        cases = {f"{name} {case}": [r[case] for r in runs] for case in runs[0]}
        print(table(cases), flush=True)
        result |= {case: {m: [round(s[m], 4) for s in seeds] for m in SHOWN} for case, seeds in cases.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
