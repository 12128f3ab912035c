"""Attribution against exact patching on the packaged model: time, agreement and recall, one JSON line at the end.

All q, k, v, z nodes at every position of one 20-token pair. Exact patching of every node that can have an effect, with
the cache, is the truth. The time of the plain way (batched full forwards, all nodes) is seconds a node on a random
sample, drawn in turn with everything else so that all meet the same machine, times the number of nodes; --full runs all
of them. A ratio is a quotient of medians.

    atp_qk_vs_exact, atp_star_vs_exact   batched uncached exact patching of all nodes / the method (goals 150, 80)
    recall50_at75                        share of the true top 50 among the first 75 of AtP* (goal .95); of the others too
    pearson_{q,k}_{atp,fix}              with |exact| over the top decile of the nodes of that kind
    cached_vs_batched                    seconds a node of the nodes that can have an effect (goal 1.7)
    bound_coverage, bound_tightness      bound (alpha .1, after the top 50) >= the largest missed effect; their quotient

--growth fits seconds = a · layers^b · tokens^c for the methods and one exact node on random models of the
packaged model's width instead; the noise token is in the middle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache.models import LanguageModel, load_model, load_tokenizer
from probes.attribution.atp import AtPStar, NodeScores
from probes.attribution.diagnose import diagnose
from probes.attribution.pairs import PromptPair, TokenPair
from probes.attribution.patching import ExactPatching
from probes.attribution.recall import recall_at

MODEL = "smollm2-135m-instruct-q4_1"
TEXT = "My new friend Anna was born in a small town in {} and for this reason her first language is"
PAIR = PromptPair(
    clean=TEXT.format("France"), noise=TEXT.format("Italy"), answers=(" French",), wrong=(" Italian",)
)
METHODS = {
    "atp": {"qk_fix": False, "grad_drop": False}, "atp_qk": {"grad_drop": False}, "atp_star": {},
}  # fmt: skip
SLICES, UNCACHED_BATCH, TOP = 10, 32, 50


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    out = fn()
    return time.perf_counter() - started, out


def interleaved(model: Any, full: bool) -> dict[str, Any]:
    """Truth, scores and seconds of everything, in turns."""
    methods = {name: AtPStar(model, **options) for name, options in METHODS.items()}
    cached = ExactPatching(methods["atp_star"], PAIR)
    plain = ExactPatching(methods["atp_star"], PAIR, cached=False, batch=UNCACHED_BATCH)
    n = len(cached.space)
    live = np.flatnonzero(cached.live(np.arange(n)))
    shuffled = np.random.default_rng(0).permutation(n)
    sample = shuffled if full else shuffled[: SLICES * UNCACHED_BATCH]
    truth, seconds = np.zeros(n), {name: [] for name in ("cached", "batched", *methods)}
    scores: dict[str, NodeScores] = {}
    # Every slice takes nodes of all layers and positions: whole chunks, dealt out in turn.
    chunks = list(cached._chunks(live))
    difference = 0.0
    for i in range(SLICES):
        nodes = live[np.concatenate(chunks[i::SLICES])]
        took, truth[nodes] = timed(lambda nodes=nodes: cached.effects(nodes))
        seconds["cached"].append(took / len(nodes))
        part = sample[i::SLICES]
        took, effects = timed(lambda part=part: plain.effects(part))
        seconds["batched"].append(took / len(part))
        for name, method in methods.items():
            took, scores[name] = timed(lambda method=method: method.attribute(PAIR))
            seconds[name].append(took)
        known = np.isin(part, np.concatenate([live[np.concatenate(chunks[j::SLICES])] for j in range(i + 1)]))
        if known.any():
            difference = max(difference, float(np.abs(effects[known] - truth[part[known]]).max()))
        print(
            f"slice {i + 1}/{SLICES}: " + ", ".join(f"{k} {v[-1]:.3g} s" for k, v in seconds.items()),
            flush=True,
        )
    return {
        "truth": truth, "scores": scores, "live": live, "exact": cached, "largest_difference": difference,
        "seconds": {k: statistics.median(v) for k, v in seconds.items()}, "batched_nodes_timed": len(sample),
    }  # fmt: skip


def decile_pearson(found: dict[str, Any], method: str, kind: str) -> float:
    truth, space = np.abs(found["truth"]), found["exact"].space
    nodes = found["live"][(space.frame(found["live"])["kind"] == kind).to_numpy()]
    best = nodes[np.argsort(-truth[nodes])[: len(nodes) // 10]]
    return float(np.corrcoef(truth[best], found["scores"][method].score[best])[0, 1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.model, workspace=args.workspace)
    found = interleaved(model, args.full)
    exact, truth, seconds = found["exact"], found["truth"], found["seconds"]
    n, order = len(exact.space), found["scores"]["atp_star"].order()
    whole = seconds["batched"] * n
    bound = diagnose(exact, order[:TOP], n_samples=200).bounds[0.1]
    missed = float(np.abs(np.delete(truth, order[:TOP])).max())
    recalls = {m: recall_at(s.order(), truth, TOP, 75) for m, s in found["scores"].items()}
    return {
        "atp_qk_vs_exact": whole / seconds["atp_qk"], "atp_star_vs_exact": whole / seconds["atp_star"],
        "recall50_at75": recalls["atp_star"], "recall50_at75_atp_qk": recalls["atp_qk"], "recall50_at75_atp": recalls["atp"],
        "pearson_q_atp": decile_pearson(found, "atp", "q"), "pearson_q_fix": decile_pearson(found, "atp_qk", "q"),
        "pearson_k_atp": decile_pearson(found, "atp", "k"), "pearson_k_fix": decile_pearson(found, "atp_qk", "k"),
        "cached_vs_batched": seconds["batched"] / seconds["cached"],
        "cached_vs_batched_all_nodes": whole / (seconds["cached"] * len(found["live"])),
        "bound_coverage": float(bound >= missed), "bound_tightness": bound / missed,
        "nodes": n, "nodes_with_effect": len(found["live"]), "tokens": exact.space.length,
        "first_difference": exact.target.pair.first_difference, "batched_nodes_timed": found["batched_nodes_timed"],
        "seconds_batched_exact_all": whole, "seconds_atp_qk": seconds["atp_qk"], "seconds_atp_star": seconds["atp_star"],
        "largest_difference_cached_uncached": found["largest_difference"], "clean": exact.clean_value,
        "model": model.name, "threads": torch.get_num_threads(),
    }  # fmt: skip


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Exponents of layers and tokens in the seconds of the methods and of one exact node, on random models."""
    import transformers as tf

    tokenizer = load_tokenizer(args.model, workspace=args.workspace)
    rows: list[dict[str, float]] = []
    for layers, tokens in product((5, 10, 20), (12, 24, 48)):
        config = tf.LlamaConfig(
            hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
            intermediate_size=1536, tie_word_embeddings=True, attn_implementation="eager", pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            hf: Any = tf.LlamaForCausalLM(config).eval()
            hf.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model = LanguageModel(
                "random", hf, tokenizer, Path(folder), backend="transformer_lens", weights_sha="0"
            )
        ids = np.random.default_rng(0).integers(1000, 40000, tokens).tolist()
        noise = [*ids[: tokens // 2], ids[0], *ids[tokens // 2 + 1 :]]
        pair = TokenPair(clean=tuple(ids), noise=tuple(noise), answers=((50,),), wrong=((60,),))
        row: dict[str, float] = {"layers": layers, "tokens": tokens}
        for name, options in METHODS.items():
            method = AtPStar(model, **options)
            row[name] = statistics.median(timed(lambda m=method, p=pair: m.attribute(p))[0] for _ in range(3))
        for name, cached in (("batched_node", False), ("cached_node", True)):
            exact = ExactPatching(AtPStar(model), pair, cached=cached)
            every = (
                np.flatnonzero(exact.live(np.arange(len(exact.space))))
                if cached
                else np.arange(len(exact.space))
            )
            nodes = every[:: max(1, len(every) // 32)]
            row[name] = timed(lambda e=exact, n=nodes: e.effects(n))[0] / len(nodes)
        rows.append(row)
        print(json.dumps(row), flush=True)
    x = np.array([[1, np.log(r["layers"]), np.log(r["tokens"])] for r in rows])
    out: dict[str, Any] = {"growth": rows}
    for name in (*METHODS, "batched_node", "cached_node"):
        fit = np.linalg.lstsq(x, np.log([r[name] for r in rows]), rcond=None)[0]
        out[f"{name}_exponents"] = {"layers": float(fit[1]), "tokens": float(fit[2])}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", help="where the packaged model is (nothing is written there)")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--full", action="store_true", help="time the plain way on all nodes, not on a sample"
    )
    parser.add_argument(
        "--growth", action="store_true", help="fit cost against depth and prompt length instead"
    )
    args = parser.parse_args()
    found = growth(args) if args.growth else measure(args)
    print(
        json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}),
        flush=True,
    )


if __name__ == "__main__":
    main()
