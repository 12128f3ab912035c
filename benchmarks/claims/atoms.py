"""Threshold atoms (arXiv 2509.20784): what the atomic inner product changes, on known dictionaries and on a store.

    python benchmarks/claims/atoms.py [--parts synthetic store] [--full]

Registered before the run (smallest effect that counts; verdicts as in _common.py; 3 seeds):

    synthetic  S9 (dictionary under a map of condition 32) and S9-zipf, fresh rows; for each suite
        <suite>_oracle_f1       true atoms, W_enc = D^T S and the best single threshold: support F1, AIP - plain   0.05
        <suite>_oracle_q_star   q* of the true atoms at the true L0s, AIP - plain                                  0.05
        <suite>_trained_f1      JumpReLU trained in each space; of three l0 weights the one whose L0 on fresh rows is
                                nearest to the true one: support F1, AIP - plain                                   0.05
        <suite>_trained_q_star  the same SAEs, each in the geometry of its training, at the true L0s               0.05
    store      threshold atoms, width 4 d, l0_target 32; a TopK SAE with k = their mean L0 on the same rows and steps
        q_star_over_random      q* - q* of random unit atoms of the same shape at the same L0s                     0.01
        q_star_over_kmeans      that excess - the excess of k-means centroids (added after the runs)               0.01
        q_star_over_tight       q* - q* of a tight frame of the same shape at the same L0s (added after the runs)  0.01
        q_star_over_topk        that excess - the excess of the TopK SAE                                           0.01
        q_star_of_training      that excess - the excess of atoms trained in plain space, judged in the same AIP   0.01
        r2_over_topk            held-out R^2, atoms - TopK                                                         0.02
        r2_aip_over_topk        the same in whitened space, where every direction counts alike                     0.02
        r2_of_paper             held-out R^2 - 0.99 (paper: .9985 to .9993)                                        0
        r2_carries_over         0.02 - (train R^2 - held-out R^2): memorised atoms lose more                       0.01
        dictionary_over_kmeans  matching pursuit with the same L0, held-out R^2, atoms - k-means centroids         0.02
        l1_over_random          share of codes that basis pursuit recovers, atoms - random unit atoms              0.05
        width_helps             held-out R^2 at width 4 d - at width d                                             0.02
        angles_over_gaussian    how much nearer to 90 degrees the AIP brings the median pairwise angle of rows, beyond
                                what it does for Gaussian rows of the same mean and covariance (degrees)           1

R^2 leaves out attention sinks. q* is nearly a function of L0: only its excess is judged. Atoms of whitened space start at an
excess of 0 (random directions there are the random control), those of plain space far below: q_star_over_topk and
q_star_of_training hold already for untrained dictionaries; orthogonal directions (PCA) have a q* of 1 whatever they mean. What
counts is q_star_over_random beside k-means and the tight frame. l1_over_random is undecided where every dictionary recovers all. Runs are short; --full has four
times the steps on the store and twice on the suites, width 8 d and more codes for basis pursuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _common import Report, arguments, heldout_rows, judge, parsed, quality, scratch_store
from torch import Tensor

from saes import TrainConfig, evaluate_atoms, make_suite, presets, recovery_scores, train
from saes.aip import AIP, angle_histogram, histogram_median, second_moment, store_aip
from saes.coherence import coherence, q_star
from saes.config import SAEConfig, Space
from saes.sae import SAE

PARTS = ("synthetic", "store")
WEIGHTS = (0.003, 0.01, 0.03)
L0, LR = 32, 2e-3
GEOMETRIES = ("aip", "plain")


# ---- known dictionaries ----


def synthetic(report: Report, seeds: int, steps: int) -> None:
    for name in ("S9", "S9-zipf"):
        report.data[name] = [one_suite(name, seed, steps) for seed in range(seeds)]
        judge_suite(report, name)


def judge_suite(report: Report, name: str) -> None:
    runs = report.data[name]
    for kind in ("oracle", "trained"):
        for measure in ("f1", "q_star"):
            found = {g: [r[kind][g][measure] for r in runs] for g in GEOMETRIES}
            mean = {g: round(float(np.mean(v)), 3) for g, v in found.items()}
            gain = [a - b for a, b in zip(found["aip"], found["plain"], strict=True)]
            report.claim(f"{name}_{kind}_{measure}", judge(gain, 0.05), seeds=len(runs), why=f"means {mean}")


def one_suite(name: str, seed: int, steps: int) -> dict[str, Any]:
    rows, fresh = (make_suite(name, seed, n_rows=n, draw=i) for i, n in enumerate((16_384, 4_096)))
    aip = second_moment([rows.x], rows.x.shape[1], len(rows.x)).aip()
    l0 = fresh.supports.sum(1).numpy()
    spaces = {"aip": aip.root, "plain": torch.eye(len(aip.root), dtype=torch.float64)}
    out: dict[str, Any] = {"condition": aip.record["condition"], "oracle": {}, "trained": {}}
    for geometry, root in spaces.items():
        atoms = (fresh.V.double() @ root).float()
        stable = q_star(coherence(atoms), l0).q_star
        out["oracle"][geometry] = {"f1": threshold_f1(fresh, root), "q_star": stable}
    config = TrainConfig(
        steps=steps, batch_size=256, lr=8e-3, warmup_steps=30, seed=seed, screen="off", log_every=steps
    )
    width = int(1.5 * len(rows.V))
    trained_in: dict[str, Space] = {"aip": "aip", "plain": "scalar"}
    for geometry, space in trained_in.items():
        job = [
            presets.threshold_atoms(d_sae=width, l0=w, space=space, bandwidth=0.2, threshold_init=1.0)
            for w in WEIGHTS
        ]
        scored = [(recovery_scores(r.sae, fresh), r.sae) for r in train(rows.x, job, config)]
        scores, sae = min(scored, key=lambda s: abs(np.log(s[0]["l0"] / s[0]["true_l0"])))
        learned = alive_atoms(sae, fresh.x)
        out["trained"][geometry] = {
            "f1": scores["support_f1"], "mcc": scores["mcc"], "l0": scores["l0"],
            "weight": job[[s is sae for _, s in scored].index(True)].l0,
            "q_star": q_star(coherence((learned.double() @ spaces[geometry]).float()), l0).q_star,
        }  # fmt: skip
    print(f"{name} seed {seed}: {out}", flush=True)
    return out


def threshold_f1(suite: Any, root: Tensor) -> float:
    """Support F1 of the best single threshold on u = x S d / ||d||_S^2 with the true atoms."""
    white = suite.V.double() @ root
    u = (suite.x.double() @ root) @ (white / (white**2).sum(1, keepdim=True)).T
    best = 0.0
    for tau in torch.linspace(0.05, 1.5, 60):
        hit = int(((u > tau) & suite.supports).sum())
        best = max(best, 2 * hit / max(1, int((u > tau).sum()) + int(suite.supports.sum())))
    return best


@torch.no_grad()
def alive_atoms(sae: SAE, x: Tensor) -> Tensor:
    codes = sae.encode(x)
    fired = torch.bincount(codes.indices[codes.values != 0].long(), minlength=sae.cfg.d_sae) > 0
    return sae.W_dec.detach()[fired]


# ---- a store ----


def widths(d: int, full: bool) -> list[int]:
    return [d, 2 * d, 4 * d, *([8 * d] if full else [])]


def atoms_config(width: int, name: str, space: Space = "aip") -> SAEConfig:
    """Thresholds start at 2 standard deviations of u: a Gaussian row has an L0 of 2 % of the width there."""
    return presets.threshold_atoms(
        d_sae=width, space=space, l0=0.1, l0_target=L0, threshold_init=2.0, bandwidth=0.3, name=name
    )


def fit(store: Any, seed: int, args: Any, rows: Tensor) -> dict[str, SAE]:
    """Atoms of all widths, atoms of plain space at 4 d, and a TopK SAE with their L0."""
    d = store.d(store.hooks[0])
    config = TrainConfig(
        steps=args.steps, batch_size=args.batch, lr=LR, warmup_steps=30, seed=seed, log_every=args.steps
    )
    job = [atoms_config(w, f"atoms-{w}") for w in widths(d, args.full)] + [
        atoms_config(4 * d, "plain", "scalar")
    ]
    saes = {r.sae.cfg.name: r.sae for r in train(store, job, config)}
    saes["atoms"] = saes.pop(f"atoms-{4 * d}")
    k = min(max(1, round(quality(saes["atoms"], rows)["l0"])), 4 * d)
    saes["topk"] = train(store, [presets.topk(d_sae=4 * d, k=k, name="topk")], config)[0].sae
    return saes


def on_store(report: Report, store: Any, args: Any) -> None:
    hook = store.hooks[0]
    rows, aip = heldout_rows(store, hook, 20_000), store_aip(store, hook)
    report.data["aip"] = aip.record
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        saes = fit(store, seed, args, rows)
        beside = {n: s for n, s in saes.items() if n in ("plain", "topk")}
        found = evaluate_atoms(
            saes["atoms"], store, beside=beside, aip=aip, max_rows=20_000, pursuit_rows=256,
            recovery=args.recovery, seed=seed,
        )  # fmt: skip
        table: dict[str, dict[str, float]] = {}
        for row in found.rows:
            if row["subject"].startswith("atoms:") and not row["metric"].endswith("_count"):
                table.setdefault(row["subject"].removeprefix("atoms:"), {})[row["metric"]] = row["value"]
        by_width = {s.cfg.d_sae: quality(s, rows) for n, s in saes.items() if n.startswith("atoms")}
        runs.append({"table": table, "width": by_width, "angles": angles(store, hook, aip, seed)})
        print(f"store seed {seed}: {runs[-1]}", flush=True)
    report.data["store"] = runs
    report.data["settings"] = {n: getattr(args, n) for n in ("steps", "batch", "recovery")}
    judge_store(report, runs, store.d(hook), args)


def judge_store(report: Report, runs: list[dict[str, Any]], d: int, args: Any) -> None:
    def values(who: str, metric: str) -> list[float]:
        return [r["table"][who][metric] for r in runs]

    def gain(metric: str, who: str, base: str = "sae") -> list[float]:
        return [a - b for a, b in zip(values(base, metric), values(who, metric), strict=True)]

    def means(metric: str, *who: str) -> dict[str, float]:
        return {w: round(float(np.mean(values(w, metric))), 4) for w in who}

    def claim(name: str, found: list[float], effect: float, why: Any, figure: Any = None) -> None:
        report.claim(name, judge(found, effect), seeds=len(runs), why=str(why), paper_figure=figure)

    tokens = f"{args.steps * args.batch:,} tokens, mean L0 {means('l0', 'sae', 'topk', 'plain')}"
    stable = means("q_star", "sae", "topk", "plain", "random", "kmeans", "tight-frame")
    paper = {"atoms": [0.9974, 0.9995], "features": 0.682, "neurons": 0.005}
    claim("q_star_over_random", values("sae", "excess_random"), 0.01, f"q* {stable}; {tokens}", paper)
    excess = means("excess_random", "sae", "topk", "plain", "kmeans")
    claim("q_star_over_kmeans", gain("excess_random", "kmeans"), 0.01, f"excess {excess}")
    claim(
        "q_star_over_tight",
        values("sae", "excess_tight"),
        0.01,
        f"excess {means('excess_tight', 'sae', 'kmeans')}",
    )
    claim("q_star_over_topk", gain("excess_random", "topk"), 0.01, f"excess {excess}")
    claim("q_star_of_training", gain("excess_random", "plain"), 0.01, f"excess {excess}")
    r2 = means("r2_heldout", "sae", "topk", "plain")
    claim(
        "r2_over_topk",
        gain("r2_heldout", "topk"),
        0.02,
        f"held-out R2 {r2}",
        {"atoms": 0.999, "features": 0.488},
    )
    white = means("r2_aip_heldout", "sae", "topk", "plain")
    claim("r2_aip_over_topk", gain("r2_aip_heldout", "topk"), 0.02, f"held-out R2 in the AIP {white}")
    claim("r2_of_paper", [v - 0.99 for v in values("sae", "r2_heldout")], 0.0, f"held-out R2 {r2}", 0.999)
    lost = [a - b for a, b in zip(values("sae", "r2_train"), values("sae", "r2_heldout"), strict=True)]
    claim(
        "r2_carries_over",
        [0.02 - v for v in lost],
        0.01,
        f"train R2 {means('r2_train', 'sae', 'topk')}, held-out {r2}",
    )
    pursuit = means("pursuit_r2_heldout", "sae", "topk", "plain", "random", "pca", "kmeans")
    claim("dictionary_over_kmeans", gain("pursuit_r2_heldout", "kmeans"), 0.02, f"pursuit R2 {pursuit}")
    if args.recovery:
        shares = means("l1_recovery", "sae", "topk", "plain", "random")
        found = judge(gain("l1_recovery", "random"), 0.05)
        told = f"{args.recovery} codes a seed: {shares}"
        if min(shares.values()) == 1.0:  # no difference could show
            found, told = (
                found._replace(verdict="underpowered"),
                f"{told}: at this L0 every dictionary recovers all",
            )
        report.claim("l1_over_random", found, seeds=len(runs), why=told)
    fits = {w: round(float(np.mean([1 - r["width"][w]["fvu"] for r in runs])), 4) for w in runs[0]["width"]}
    wide = [r["width"][d]["fvu"] - r["width"][4 * d]["fvu"] for r in runs]
    claim("width_helps", wide, 0.02, f"held-out R2 by width {fits}")
    shift = [r["angles"]["gain"] - r["angles"]["gain_gaussian"] for r in runs]
    claim("angles_over_gaussian", shift, 1.0, f"median angles {runs[0]['angles']}")


def angles(store: Any, hook: str, aip: AIP, seed: int) -> dict[str, float]:
    """Median pairwise angle of 512 rows, plain and in the AIP; and of Gaussian rows in an AIP of their own."""
    stream = store.stream([hook], batch_size=4096, seed=seed, split="train", skip="first")
    x = next(iter(stream)).x[hook].double().clone()
    stream.close()
    gen = torch.Generator().manual_seed(seed)
    moment = second_moment([x], x.shape[1], len(x))
    values, vectors = torch.linalg.eigh(moment.moment(centred=True))
    noise = torch.randn(20_000, x.shape[1], generator=gen, dtype=torch.float64)
    fake = x.mean(0) + (noise * values.clamp_min(0).sqrt()) @ vectors.T
    own = second_moment([fake], x.shape[1], len(fake)).aip()
    out: dict[str, float] = {}
    for name, rows, inner in (("", x, aip), ("_gaussian", fake, own)):
        plain, white = (histogram_median(angle_histogram(r)) for r in (rows[:512], inner.whiten(rows[:512])))
        out |= {f"plain{name}": plain, f"aip{name}": white, f"gain{name}": abs(plain - 90) - abs(white - 90)}
    return out


def judge_again(report: Report, args: Any) -> None:
    """The claims from the values of an earlier output."""
    report.earlier(args.judge)
    for name, value in report.data.get("settings", {}).items():
        setattr(args, name, value)
    for name in ("S9", "S9-zipf"):
        if name in report.data:
            judge_suite(report, name)
    if runs := report.data.get("store"):
        for run in runs:
            run["width"] = {int(w): q for w, q in run["width"].items()}
        judge_store(report, runs, min(runs[0]["width"]), args)
    report.finish()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, batch=1024)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    parser.add_argument("--judge", metavar="FILE", help="judge the values of an earlier output again")
    parser.add_argument(
        "--recovery", type=int, help="codes a seed and SAE for basis pursuit (3; 8 with --full)"
    )
    args = parsed(parser, argv)
    args.steps = args.steps or (1200 if args.full else 300)
    if args.recovery is None:
        args.recovery = 8 if args.full else 3
    torch.manual_seed(0)
    report = Report("arXiv 2509.20784, threshold atoms", args.out)
    if args.judge:
        judge_again(report, args)
        return
    if "synthetic" in args.parts:
        synthetic(report, args.seeds, 1600 if args.full else 800)
    if "store" in args.parts:
        with scratch_store(args.workspace) as store:
            on_store(report, store, args)
    report.finish()


if __name__ == "__main__":
    main()
