"""FAST (arXiv 2506.07691): SAEs of a chat model trained on dialogues that ran alone, against block training.

    python benchmarks/claims/fast.py --workspace W [--full]      W: a workspace with the packaged model and corpora

Arms, equal in tokens, batches, architecture and seed, all rows kept (skip=None):
    FAST   dialogues one a row               BT(P)  plain text joined and cut into blocks
    BT(F)  rendered dialogues end to end, cut into blocks     BT(A)  as BT(F), but every block begins with a dialogue
Judged on held-out dialogues that ran alone, the same for all arms; an MSE is the mean in a dialogue, then over dialogues.

Registered before the run (verdicts as in _common.py: mean and 95 % t interval over seeds, effect = smallest that counts).
Differences are log2 MSE(arm) - log2 MSE(FAST), in bits; 3 seeds, 5 with --full (initialisation and order; the texts are fixed):
    <arm>_special_<kind>        template tokens, position 0 included (MSE_st of the paper)      at least 0.25
    <arm>_special_rest_<kind>   the same without position 0                                      at least 0.25
    <arm>_all_<kind>            every token (the paper: not in every cell)                       at least 0.05
    <arm>_nmse_<kind>           log2 of the error over the row's own size, every token           at least 0.05
    <arm>_top_rated             share of features with proxy_score >= 4 (no judge), FAST less arm  at least 0.02
arm: packed_text BT(P), packed_dialogues BT(F). kind: topk (k 32, the same L0 by construction) and jumprelu (trained at
L0 targets 16 and 64, read at L0 = 32 between them in logarithms; left out where they do not bracket it). BT(A) is the
mechanism: `data` has it, no claim. The paper trains 41M tokens; the default run 0.2M in epochs over 40,000 (--full 0.3M over 60,000).
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Report, arguments, judge, parsed

from cache import build_corpus, harvest, load_model
from cache.chats import Message
from cache.dialogue import ChatTemplate
from cache.packing import HELDOUT, split_of
from cache.sources import Fields, open_source
from cache.workspace import workspace_path
from saes import SAE, FeatureIndex, TrainConfig, build_index, build_proxies, presets, train
from saes.config import SAEConfig
from saes.controls import Dictionary
from saes.token_classes import CLASSES, token_class_rows

K = 32
TARGETS = (16, 64)
CALLED = {"packed_text": "BT(P)", "packed_dialogues": "BT(F)", "aligned_dialogues": "BT(A)"}
BASELINES = ("packed_text", "packed_dialogues")
# log2 MSE differences of the paper at 8x: Qwen2.5-0.5B L12; Llama-3.2-1B L9
PAPER = {
    ("packed_text", "special", "topk"): "3.00; 0.63 (Standard)", ("packed_dialogues", "special", "topk"): "1.95; 0.49 (Standard)",
    ("packed_text", "all", "topk"): "0.23; 0.17 (Standard)", ("packed_dialogues", "all", "topk"): "0.00; 0.05 (Standard)",
    ("packed_text", "special", "jumprelu"): "22.66; 6.71", ("packed_dialogues", "special", "jumprelu"): "21.79; 3.44",
    ("packed_text", "all", "jumprelu"): "11.63; 8.50", ("packed_dialogues", "all", "jumprelu"): "10.74; 0.39",
}  # fmt: skip
TOP_RATED = {
    "packed_text": "21.1 % against 7.0 % (judge)",
    "packed_dialogues": "21.1 % against 10.2 % (judge)",
}


def chosen_dialogues(
    tokenizer: Any, root: Path, wanted: int, heldout: int, context: int
) -> tuple[list[Any], list[Any]]:
    """(train, held out) packaged dialogues that fit the context, in one random order, until both have their tokens.

    The side is the corpus's own rule. None is cut, so all arms have the same tokens of the same dialogues.
    """
    source = open_source("chat-pairs", workspace=root, fields=Fields(dialogue=True))
    every = [d.messages for d in source.documents]
    order = np.random.default_rng(0).permutation(len(every))
    template, sides, counts = ChatTemplate(tokenizer), ([], []), [0, 0]
    limits = (wanted, heldout)
    for start in range(0, len(order), 64):
        part: list[tuple[Message, ...]] = [every[i] for i in order[start : start + 64]]
        for messages, found in zip(part, template.tokenise(part), strict=True):
            side = split_of(found.ids)
            if counts[side] < limits[side] and len(found.ids) <= context:
                sides[side].append(messages)
                counts[side] += len(found.ids)
        if all(c >= m for c, m in zip(counts, limits, strict=True)):
            break
    return sides[1 - HELDOUT], sides[HELDOUT]


def harvested(model: Any, ws: Path, root: Path, args: Any) -> dict[str, Any]:
    """A store for each arm; that of FAST holds the held-out dialogues too."""
    chats, heldout = chosen_dialogues(model.tokenizer, root, args.tokens, args.tokens // 3, args.context)
    # plain text is held out by document too: the same number of training tokens
    plain = {"max_tokens": int(args.tokens * 1.11)}
    jobs: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "fast": (chats + heldout, "dialogue", {}),
        "packed_text": ("boolq", "packed", plain),
        "packed_dialogues": (chats, "dialogue_packed", {}),
        "aligned_dialogues": (chats, "dialogue_aligned", {}),
    }
    stores = {}
    for arm, (source, mode, more) in jobs.items():
        corpus = build_corpus(source, model.tokenizer, mode=mode, context=args.context, workspace=ws, **more)
        stores[arm] = harvest(model, corpus, hooks=args.hook, workspace=ws, show_progress=False)
        rows = stores[arm].stats(args.hook, split="train", skip=None).n
        print(f"{arm}: {corpus.n_docs} documents, {corpus.n_seqs} rows, {rows} training tokens", flush=True)
    return stores


def configs(width: int) -> dict[str, SAEConfig]:
    out = {"topk": presets.topk(d_sae=width, k=K)}
    for t in TARGETS:
        out[f"jumprelu_{t}"] = presets.jumprelu(
            d_sae=width, l0=1.0, l0_target=t, threshold_init=3.0, bandwidth=0.5, name=f"jumprelu-{t}"
        )
    return out


def trained(stores: dict[str, Any], args: Any) -> Iterator[tuple[int, str, str, SAE]]:
    """(seed, arm, name, SAE): all of an arm and seed in one pass over the same kind of batches."""
    named = configs(args.width * stores["fast"].d(args.hook))
    for seed in range(args.seeds):
        config = TrainConfig(
            steps=args.steps, batch_size=args.batch, lr=args.lr, warmup_steps=50, dead_window_tokens=50_000,
            skip=None, seed=seed, log_every=args.steps,
        )  # fmt: skip
        for arm, store in stores.items():
            wanted = {"topk": named["topk"]} if arm == "aligned_dialogues" else named
            for name, result in zip(wanted, train(store, list(wanted.values()), config), strict=True):
                yield seed, arm, name, result.sae


def between(points: list[tuple[float, float]], l0: float) -> float:
    """log2 value at an L0 from (L0, log2 value) points, linear in log L0 inside them."""
    x, y = (np.asarray(c) for c in zip(*sorted(points), strict=True))
    return float(np.interp(math.log(l0), np.log(x), y)) if x[0] <= l0 <= x[-1] else math.nan


def scores_of(sae: SAE, store: Any, hook: str) -> dict[str, float]:
    rows = token_class_rows([Dictionary(sae, "sae")], store, hook)
    return {r["metric"]: r["value"] for r in rows}


def bits(scores: dict[str, dict[str, float]], kind: str, metric: str) -> float:
    """log2 of a metric: of TopK, or of JumpReLU at L0 = K on all rows."""
    if kind == "topk":
        return math.log2(scores["topk"][metric])
    return between([(s["l0@all"], math.log2(s[metric])) for n, s in scores.items() if n != "topk"], K)


def top_rated(sae: SAE, store: Any) -> tuple[float, int]:
    """Share of poles rated 4 or more among those that fire often enough to be judged, and their number."""
    build_index(sae, store)
    build_proxies(FeatureIndex.open(store.workspace, sae.sae_id))
    frame = FeatureIndex.open(store.workspace, sae.sae_id).proxies()
    judged = frame["proxy_score"].dropna()
    return float((judged >= 4).mean()), len(judged)


def spent(found: dict[tuple[int, str], dict[str, Any]], arm: str, kind: str, metric: str, seeds: int) -> str:
    """Mean L0 of FAST and of an arm on the tokens of a metric, at L0 = K on all rows."""
    name, out = metric.replace("mse@", "l0@"), []
    for a in ("fast", arm):
        if kind == "topk":
            values = [found[s, a]["topk"][name] for s in range(seeds)]
        else:
            values = [2 ** bits(found[s, a], kind, name) for s in range(seeds)]
        known = [v for v in values if math.isfinite(v)]
        out.append(f"{np.mean(known):.1f}" if known else "unknown")
    return f"L0 {out[0]} and {out[1]}"


def decide(
    report: Report, found: dict[tuple[int, str], dict[str, Any]], rated: dict[Any, Any], seeds: int
) -> None:
    """Every registered claim, over the seeds."""
    kinds = (("special", "mse@special", 0.25), ("special_rest", "mse@special_rest", 0.25),
             ("all", "mse@all", 0.05), ("nmse", "nmse@all", 0.05))  # fmt: skip
    for arm in BASELINES:
        for kind in ("topk", "jumprelu"):
            l0 = [np.mean([found[s, a]["topk" if kind == "topk" else f"jumprelu_{t}"]["l0@all"] for s in range(seeds)])
                  for a in ("fast", arm) for t in (TARGETS if kind == "jumprelu" else (0,))]  # fmt: skip
            for name, metric, effect in kinds:
                gaps = [
                    bits(found[s, arm], kind, metric) - bits(found[s, "fast"], kind, metric)
                    for s in range(seeds)
                ]
                known = [g for g in gaps if math.isfinite(g)]
                why = f"bits, {CALLED[arm]} less FAST; L0 {', '.join(f'{v:.1f}' for v in l0)}"
                if metric.endswith(("special", "special_rest")):
                    # equal in L0 over all rows; what the arms spend on these tokens is theirs
                    why += f"; there {spent(found, arm, kind, metric, seeds)}"
                if len(known) < len(gaps):
                    why += f"; {len(gaps) - len(known)} seeds did not bracket L0 {K}"
                report.claim(f"{arm}_{name}_{kind}", judge(known or [math.nan], effect), seeds=len(known), why=why,
                             paper_figure=PAPER.get((arm, name, kind)))  # fmt: skip
        if rated:
            gaps = [rated[s, "fast"][0] - rated[s, arm][0] for s in range(seeds)]
            shares = ", ".join(
                f"{np.mean([rated[s, a][0] for s in range(seeds)]):.3f}" for a in ("fast", arm)
            )
            report.claim(f"{arm}_top_rated", judge(gaps, 0.02), seeds=seeds, paper_figure=TOP_RATED[arm],
                         why=f"shares of judged poles with proxy_score >= 4: {shares} (FAST, {CALLED[arm]}); TopK")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, batch=512)
    parser.add_argument("--tokens", type=int, help="training tokens of each arm")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a block; the paper: 2,048")
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1", help="a chat model")
    parser.add_argument("--hook", default="blocks.15.hook_resid_post")
    parser.add_argument("--width", type=int, default=4, help="latents over d_model")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--no-proxies", action="store_true", help="leave out the share of top-rated features")
    args = parsed(parser, argv, full_seeds=5)
    args.tokens = args.tokens or (60_000 if args.full else 40_000)
    args.steps = args.steps or (600 if args.full else 400)
    report = Report("FAST (arXiv 2506.07691)", args.out)
    root = workspace_path(args.workspace, create=False)
    with tempfile.TemporaryDirectory(prefix="claims-") as folder:
        ws = Path(folder)
        (ws / "assets").symlink_to((root / "assets").resolve())
        model = load_model(args.model, workspace=ws)
        stores = harvested(model, ws, root, args)
        del model
        found: dict[tuple[int, str], dict[str, Any]] = {}
        rated: dict[Any, Any] = {}
        for seed, arm, name, sae in trained(stores, args):
            scores = found.setdefault((seed, arm), {})[name] = scores_of(sae, stores["fast"], args.hook)
            told = "  ".join(f"{c} {math.log2(scores[f'mse@{c}']):.2f}" for c in CLASSES)
            print(f"seed {seed} {arm} {name}: L0 {scores['l0@all']:.1f}  log2 MSE {told}", flush=True)
            if name == "topk" and arm != "aligned_dialogues" and not args.no_proxies:
                rated[seed, arm] = top_rated(sae, stores["fast"])
                print(
                    f"  top-rated share {rated[seed, arm][0]:.3f} of {rated[seed, arm][1]} poles", flush=True
                )
    decide(report, found, rated, args.seeds)
    report.data = {
        "by_seed": {
            f"{arm}/{name}": {m: [found[s, arm][name][m] for s in range(args.seeds)] for m in found[0, arm][name]}
            for arm in stores for name in found[0, arm]
        },
        "top_rated": {f"{arm} seed {seed}": share for (seed, arm), (share, _) in rated.items()},
        "tokens": args.tokens, "steps": args.steps, "batch": args.batch, "context": args.context, "width": args.width,
    }  # fmt: skip
    report.finish()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
