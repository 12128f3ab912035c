"""AtP* (arXiv 2403.00745) on the packaged model: what the QK fix, GradDrop and the diagnostic buy, against exact patching.

    python benchmarks/claims/atp_star.py [--full] [--work FOLDER]

Every q, k, v, z node of every position is patched exactly (cached), pair by pair; that is the truth. Built-in pair sets,
10 pairs each, intervals over pairs (--full: 5 sets, 50 pairs; --minutes ends earlier with the pairs there are). Registered before the run (smallest effect that counts;
verdicts as in _common.py):

    <set>_q_fix, <set>_k_fix     Pearson with |exact| over the top decile of q (k) nodes, AtP + QK fix - AtP    at least 0.02
    <set>_against_subsets        log2 of forward-equivalents to .9 of the true top 50: subset sampling / AtP*   at least 1
    <set>_against_iterative      the same against brute force in order                                          at least 1
    <set>_qk_fix_recall          the same, AtP / (AtP + QK fix)                                                 at least 0.1
    <set>_grad_drop_recall       the same, (AtP + QK fix) / AtP*                                                at least 0.1
    <set>_grad_drop_last         log2 of passes to the last of the true top 50, (AtP + QK fix) / AtP*           at least 0.1
    bound_covers                 share of pairs whose bound (alpha .1, after the top 50 of AtP*) is at least the largest
                                 true effect among the rest, - 0.8 (95 % Wilson interval)                      at least 0.1
    bound_is_tight               log2(3 x that largest effect / bound)                                          at least 0

A method's own passes count: 3 forwards and 2 for a backward; GradDrop (L - 1) more; a subset is one pass. Truth is kept
in --work, so the same command goes on where it stopped. The paper's sizes (Pythia) are other models: figures are ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Difference, Report, decide, judge

from cache import load_model
from cache.workspace import write_json
from probes.attribution.atp import AtPStar
from probes.attribution.diagnose import diagnose
from probes.attribution.pair_sets import PAIR_SETS, pair_set
from probes.attribution.pairs import PromptPair
from probes.attribution.patching import ExactPatching
from probes.attribution.recall import Ranking, blocks, iterative, recall_curve, subset_sampling

MODEL = "smollm2-135m-instruct-q4_1"
DEFAULT_SETS = ("city_country", "indirect_object", "gender_pronoun")
K, ALPHA, SUBSETS = 50, 0.1, 200
METHODS = {
    "atp": {"qk_fix": False, "grad_drop": False}, "atp+qk_fix": {"qk_fix": True, "grad_drop": False},
    "atp+grad_drop": {"qk_fix": False, "grad_drop": True}, "atp_star": {"qk_fix": True, "grad_drop": True},
}  # fmt: skip


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else math.nan


def measured(methods: dict[str, AtPStar], pair: PromptPair, folder: Path) -> dict[str, Any]:
    """Everything about one pair: agreement, passes to recall, bound and truth."""
    exact = ExactPatching(methods["atp_star"], pair)
    truth = exact.run(folder)
    live = exact.live(np.arange(len(truth)))
    kinds = exact.space.frame()["kind"].to_numpy()
    out: dict[str, Any] = {
        "clean": exact.clean_value, "nodes": int(live.sum()), "pearson": {}, "pearson_all": {}, "signed": {}
    }  # fmt: skip
    rankings: list[Ranking] = []
    for name, method in methods.items():
        scores = method.attribute(pair)
        rankings.append(Ranking(method=name, order=scores.order(), passes=scores.passes))
        for kind in "qkvz":
            nodes = np.flatnonzero((kinds == kind) & live)
            best = nodes[np.argsort(-np.abs(truth[nodes]), kind="stable")[: max(10, len(nodes) // 10)]]
            out["pearson"][f"{name}/{kind}"] = pearson(scores.score[best], np.abs(truth[best]))
            out["pearson_all"][f"{name}/{kind}"] = pearson(scores.score[nodes], np.abs(truth[nodes]))
    rankings += [subset_sampling(exact, n_samples=SUBSETS), iterative(exact), blocks(exact)]
    curves = {r.method: recall_curve(r, truth, K) for r in rankings}
    out["passes_to_90"] = {m: float(c[math.ceil(0.9 * K) - 1]) for m, c in curves.items()}
    out["passes_to_all"] = {m: float(c[-1]) for m, c in curves.items()}
    out["recall_at"] = {
        m: {str(n): float((c <= n).mean()) for n in (50, 75, 100, 150, 200, 400, 800, 1600)} for m, c in curves.items()
    }  # fmt: skip
    best = next(r for r in rankings if r.method == "atp_star").order[:K]
    found = diagnose(exact, best, n_samples=SUBSETS)
    out["bound"] = found.bounds[ALPHA]
    out["missed"] = float(np.abs(np.delete(truth, best)).max())
    return out


def all_rows(model: Any, args: argparse.Namespace, sets: Sequence[str], n: int) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The measurements of every pair, set by set in turn, kept as they are made."""
    methods = {m: AtPStar(model, **options) for m, options in METHODS.items()}
    pairs = {name: pair_set(name, model.tokenizer, n) for name in sets}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    began = time.time()
    for i in range(n):
        for name in sets:
            file, started = args.work / name / f"{i:03d}" / "measured.json", time.time()
            if not file.exists():
                if args.minutes and started - began > 60 * args.minutes:
                    continue
                row = measured(methods, pairs[name][i], file.parent)
                write_json(file, json.loads(json.dumps(row).replace("NaN", "null")))
            rows[name].append(json.loads(file.read_text(encoding="utf-8")))
            seconds = time.time() - started
            print(f"{name} {i + 1}/{n}: {rows[name][-1]['nodes']} nodes, {seconds:.0f} s", flush=True)
    return rows


def fix_claims(report: Report, name: str, rows: list[dict[str, Any]]) -> None:
    """Agreement of q and k with exact patching, before and after the QK fix."""
    for kind, paper in (("q", None), ("k", None)):
        before, after = ([r["pearson"][f"{m}/{kind}"] for r in rows] for m in ("atp", "atp+qk_fix"))
        both = [(a, b) for a, b in zip(after, before) if a is not None and b is not None]
        mean = [round(float(np.mean(side)), 3) for side in zip(*both)]
        report.claim(
            f"{name}_{kind}_fix", judge([a - b for a, b in both], 0.02), seeds=len(both),
            why=f"Pearson on the top decile {mean[1]} to {mean[0]}", paper_figure=paper,
        )  # fmt: skip


def recall_claims(report: Report, name: str, rows: list[dict[str, Any]]) -> None:
    """Forward-equivalents to .9 (and all) of the true top 50."""
    for claim, field, worse, better, effect in (
        ("against_subsets", "passes_to_90", "subset_sampling", "atp_star", 1.0),
        ("against_iterative", "passes_to_90", "iterative", "atp_star", 1.0),
        ("qk_fix_recall", "passes_to_90", "atp", "atp+qk_fix", 0.1),
        ("grad_drop_recall", "passes_to_90", "atp+qk_fix", "atp_star", 0.1),
        ("grad_drop_last", "passes_to_all", "atp+qk_fix", "atp_star", 0.1),
    ):
        ratio = [math.log2(r[field][worse] / r[field][better]) for r in rows]
        median = [float(np.median([r[field][m] for r in rows])) for m in (worse, better)]
        report.claim(
            f"{name}_{claim}", judge(ratio, effect), seeds=len(rows),
            why=f"median passes {worse} {median[0]:.0f}, {better} {median[1]:.0f}",
        )  # fmt: skip


def wilson(hits: int, n: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bound_claims(report: Report, rows: list[dict[str, Any]]) -> None:
    """Does the bound cover the largest missed effect, and how far above it is it."""
    hits = [r["bound"] >= r["missed"] for r in rows]
    share, (low, high) = float(np.mean(hits)), wilson(sum(hits), len(hits))
    found = Difference(
        share - 0.8, (low - 0.8, high - 0.8), decide(share - 0.8, low - 0.8, high - 0.8, 0.1, len(rows))
    )
    report.claim("bound_covers", found, seeds=len(rows), why=f"{sum(hits)} of {len(hits)} pairs", ours=share)
    ratio = [r["bound"] / r["missed"] for r in rows]
    report.claim(
        "bound_is_tight", judge([math.log2(3 / x) for x in ratio], 0.0), seeds=len(rows),
        why=f"bound / truth: median {np.median(ratio):.2f}, 90 % of pairs below {np.quantile(ratio, 0.9):.2f}",
        ours=float(np.median(ratio)),
    )  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over pairs of every measurement."""

    def mean(values: list[Any]) -> float:
        kept = [v for v in values if v is not None]
        return float(np.mean(kept)) if kept else math.nan

    out: dict[str, Any] = {k: mean([r[k] for r in rows]) for k in ("clean", "nodes", "bound", "missed")}
    for part in ("pearson", "pearson_all", "passes_to_90", "passes_to_all"):
        out[part] = {k: mean([r[part][k] for r in rows]) for k in rows[0][part]}
    out["recall_at"] = {
        m: {n: mean([r["recall_at"][m][n] for r in rows]) for n in steps} for m, steps in rows[0]["recall_at"].items()
    }  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--workspace", help="where the packaged model is (nothing is written there)")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--sets", nargs="+", choices=tuple(PAIR_SETS), help="default: three; all five with --full"
    )
    parser.add_argument("--pairs", type=int, help="pairs of a set (10; 50 with --full)")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "atomscope-claims-atp-star"
    )
    parser.add_argument("--minutes", type=float, help="measure no further pair after this long")
    parser.add_argument("--full", action="store_true", help="5 sets of 50 pairs: hours")
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args(argv)
    sets = args.sets or (tuple(PAIR_SETS) if args.full else DEFAULT_SETS)
    report = Report("AtP* (arXiv 2403.00745)", args.out)
    model = load_model(args.model, workspace=args.workspace)
    everything = []
    for name, rows in all_rows(model, args, sets, args.pairs or (50 if args.full else 10)).items():
        report.data[name] = summary(rows)
        fix_claims(report, name, rows)
        recall_claims(report, name, rows)
        everything += rows
    bound_claims(report, everything)
    report.data["settings"] = {
        "model": model.name, "top": K, "subsets": SUBSETS, "alpha": ALPHA, "threads": torch.get_num_threads(),
    }  # fmt: skip
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
